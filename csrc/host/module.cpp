// vitkernels._host: helpers on the host that need no torch. Python's side of it is vitkernels/host.py.
#include <pybind11/pybind11.h>

#include "common/isa.h"

namespace py = pybind11;
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

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host helpers of vitkernels, compiled. Use vitkernels.host.";
  m.def("cpu_features", &cpu_features, "The CPU features behind the choice of instruction set: name to present or not.");
  m.def("isa_report", &isa_report, "Instruction sets: detected, selected, built, usable, error.");
}
