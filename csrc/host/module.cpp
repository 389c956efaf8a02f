// vitkernels._host: helpers on the host that need no torch. Python's side of it is vitkernels/host.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <numeric>
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

// One contiguous matrix, without what pybind11 does around a call, which would take longer than to solve a small one. Python's lock is kept while that is cheaper
// than to let it go.
template <class T>
PyObject* assign_matrix(const py::detail::PyArray_Proxy& costs) {
  const auto& numpy = py::detail::npy_api::get();
  const int64_t rows = costs.dimensions[0], columns = costs.dimensions[1];
  py::ssize_t pairs = std::min(rows, columns);
  PyObject* found[2] = {};
  for (PyObject*& indices : found) {
    PyObject* int64 = numpy.PyArray_DescrFromType_(py::detail::npy_api::NPY_INT64_);
    indices = numpy.PyArray_NewFromDescr_(numpy.PyArray_Type_, int64, 1, &pairs, nullptr, nullptr, 0, nullptr);
  }
  PyObject* result = nullptr;
  if (found[0] != nullptr && found[1] != nullptr) {
    const auto data = [](PyObject* array) { return reinterpret_cast<int64_t*>(py::detail::array_proxy(array)->data); };
    const host::Costs<T> problem = {reinterpret_cast<const T*>(costs.data), rows, columns, columns, 1};
    bool replaced;
    if (rows * columns < 4096) {
      replaced = host::assign(problem, data(found[0]), data(found[1]));
    } else {
      py::gil_scoped_release release;
      replaced = host::assign(problem, data(found[0]), data(found[1]));
    }
    result = PyTuple_Pack(3, found[0], found[1], replaced ? Py_True : Py_False);
  }
  Py_XDECREF(found[0]), Py_XDECREF(found[1]);
  return result;
}

PyObject* assign(PyObject*, PyObject* costs) {
  const auto& numpy = py::detail::npy_api::get();
  if (reinterpret_cast<PyObject*>(Py_TYPE(costs)) == reinterpret_cast<PyObject*>(numpy.PyArray_Type_)) {
    const auto& array = *py::detail::array_proxy(costs);
    constexpr int plain = py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_ | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
    const auto* dtype = py::detail::array_descriptor_proxy(array.descr);
    if (array.nd == 2 && (array.flags & plain) == plain && (dtype->byteorder == '=' || dtype->byteorder == '|')) {
      if (dtype->type == 'd') return assign_matrix<double>(array);
      if (dtype->type == 'f') return assign_matrix<float>(array);
    }
  }
  Py_RETURN_NONE;
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

py::tuple pairs_of(const Array<int64_t>& matches, const std::vector<int64_t>& offsets) {
  const int64_t images = matches.shape(0), queries = matches.shape(1), *match = matches.data();
  std::vector<int64_t> counts(images);
  for (int64_t i = 0; i < images; ++i) counts[i] = std::count_if(match + i * queries, match + (i + 1) * queries, [](int64_t target) { return target >= 0; });
  const int64_t total = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  Int64s query(total), target(total);
  int64_t *to_query = query.mutable_data(), *to_target = target.mutable_data();
  for (int64_t i = 0; i < images; ++i) {
    for (int64_t q = 0; q < queries; ++q, ++match) {
      if (*match >= 0) *to_query++ = q, *to_target++ = *match - offsets[i];
    }
  }
  return py::make_tuple(query, target, counts);
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
  static PyMethodDef of_one = {"assign", &assign, METH_O,
                               "Costs [N, M]: rows, columns, and whether a NaN or an infinity was replaced. None unless it is a contiguous float or double array."};
  m.attr("assign") = py::reinterpret_steal<py::object>(PyCFunction_New(&of_one, nullptr));
  m.def("assign_all", &assign_all<float>, py::arg().noconvert(), py::arg(), py::arg(),
        "Costs [L, T, Q], the first target of each image and T, threads: the target of each query [L, B, Q] or -1, and whether one was replaced [L, B].");
  m.def("assign_all", &assign_all<double>, py::arg().noconvert(), py::arg(), py::arg());
  m.def("pairs_of", &pairs_of, py::arg().noconvert(), py::arg(),
        "Matches [B, Q], the first target of each image: matched queries, their targets counted from their image's first, and how many of each image.");
  m.def("unchanged", &unchanged, "Whether modules are what they were; the arguments are those of vitkernels.nn._derived._unchanged.");
  m.def("marks", &marks, "Tensors, Tensor._version, Tensor.data_ptr, the classes that have no others: the version and the address of each tensor, in bytes.");
  m.def("best_fit_decreasing", &pack<&host::best_fit_decreasing>, "The same, from the longest, each into the fullest bin with room.");
}
