// vitkernels._host: helpers on the host that need no torch. Python's side of it is vitkernels/host.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "common/isa.h"
#include "host/assignment.h"
#include "host/packing.h"
#include "host/watch.h"

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

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
py::tuple assign(const Array<T>& costs) {
  const int64_t rows = costs.shape(0), columns = costs.shape(1), pairs = std::min(rows, columns);
  Int64s row(pairs), column(pairs);
  int64_t *to_row = row.mutable_data(), *to_column = column.mutable_data();
  bool replaced;
  {
    py::gil_scoped_release release;
    replaced = host::assign(host::Costs<T>{costs.data(), rows, columns, columns, 1}, to_row, to_column);
  }
  return py::make_tuple(row, column, replaced);
}

template <class T>
py::tuple assign_all(const Array<T>& costs, const std::vector<int64_t>& offsets, int64_t threads) {
  const int64_t layers = costs.shape(0), queries = costs.shape(2), images = static_cast<int64_t>(offsets.size()) - 1;
  Int64s matches({layers, images, queries});
  Array<bool> replaced({layers, images});
  int64_t* to = matches.mutable_data();
  bool* said = replaced.mutable_data();
  {
    py::gil_scoped_release release;
    host::assign_all(costs.data(), layers, queries, offsets.data(), images, threads, to, said);
  }
  return py::make_tuple(matches, replaced);
}

bool unchanged(const py::tuple& tables, const py::tuple& contents, const py::tuple& empty, const py::tuple& modules, const py::tuple& classes,
               const py::tuple& own, const py::tuple& owners, const py::tuple& names, const py::tuple& values) {
  if (modules.size() != classes.size() || owners.size() != names.size() || owners.size() != values.size()) throw py::value_error("tuples of different lengths");
  const int answer = host::unchanged(
      {tables.ptr(), contents.ptr(), empty.ptr(), modules.ptr(), classes.ptr(), own.ptr(), owners.ptr(), names.ptr(), values.ptr()});
  if (answer < 0) throw py::error_already_set();
  return answer == 1;
}

py::bytes marks(const py::tuple& tensors, const py::object& version, const py::object& address, const py::tuple& plain) {
  PyObject* bytes = host::marks(tensors.ptr(), version.ptr(), address.ptr(), plain.ptr());
  if (bytes == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::bytes>(bytes);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host helpers of vitkernels, compiled. Use vitkernels.host.";
  m.def("cpu_features", &cpu_features, "The CPU features behind the choice of instruction set: name to present or not.");
  m.def("isa_report", &isa_report, "Instruction sets: detected, selected, built, usable, error.");
  m.def("first_fit", &pack<&host::first_fit>,
        "Lengths (int64 [n], each in [0, capacity]), the capacity, the most items of a bin: each one's bin, and their number.");
  m.def("assign", &assign<double>, py::arg().noconvert(), "Costs [N, M]: rows, columns, and whether a NaN or an infinity was replaced.");
  m.def("assign", &assign<float>, py::arg().noconvert());
  m.def("assign_all", &assign_all<float>, py::arg().noconvert(), py::arg(), py::arg(),
        "Costs [L, T, Q], the first target of each image and T, threads: the target of each query [L, B, Q] or -1, and whether one was replaced [L, B].");
  m.def("assign_all", &assign_all<double>, py::arg().noconvert(), py::arg(), py::arg());
  m.def("unchanged", &unchanged, "Whether modules are what they were; the arguments are those of vitkernels.nn._derived._unchanged.");
  m.def("marks", &marks, "Tensors, Tensor._version, Tensor.data_ptr, the classes that have no others: the version and the address of each tensor, in bytes.");
  m.def("best_fit_decreasing", &pack<&host::best_fit_decreasing>, "The same, from the longest, each into the fullest bin with room.");
}
