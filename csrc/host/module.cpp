// vitkernels._host: helpers on the host that need no torch. Python's side of it is vitkernels/host.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "common/isa.h"
#include "host/packing.h"

namespace py = pybind11;
namespace host = vitkernels::host;
namespace isa = vitkernels::isa;

namespace {

py::dict cpu_features() {
  py::dict found;
  for (const isa::Feature& feature : isa::features()) found[feature.name] = feature.present;
  return found;
}

py::dict isa_report() {
  py::list built, usable;
  for (const isa::Isa each : isa::kAll) {
    if (!isa::built(each)) continue;
    built.append(isa::name(each));
    if (isa::cpu_can_run(each)) usable.append(isa::name(each));
  }
  const char* error = isa::selection_error();
  py::dict report;
  report["detected"] = isa::name(isa::detected());
  report["selected"] = isa::name(isa::selected());
  report["built"] = built;
  report["usable"] = usable;
  report["error"] = error == nullptr ? py::object(py::none()) : py::object(py::str(error));
  return report;
}

using Int64s = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using Packer = int64_t (*)(const int64_t*, int64_t, int64_t, int64_t, int64_t*);

template <Packer packer>
py::tuple pack(const Int64s& lengths, int64_t capacity, int64_t most) {
  Int64s bin_of(lengths.size());
  const int64_t* from = lengths.data();
  int64_t* to = bin_of.mutable_data();
  int64_t bins;
  {
    py::gil_scoped_release release;  // a data loader's other threads go on
    bins = packer(from, lengths.size(), capacity, most, to);
  }
  return py::make_tuple(bin_of, bins);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host helpers of vitkernels, compiled. Use vitkernels.host.";
  m.def("cpu_features", &cpu_features, "The CPU features behind the choice of instruction set: name to present or not.");
  m.def("isa_report", &isa_report, "Instruction sets: detected, selected, built, usable, error.");
  m.def("first_fit", &pack<&host::first_fit>,
        "Lengths (int64 [n], each in [0, capacity]), the capacity, the most items of a bin: each one's bin, and their number.");
  m.def("best_fit_decreasing", &pack<&host::best_fit_decreasing>, "The same, from the longest, each into the fullest bin with room.");
}
