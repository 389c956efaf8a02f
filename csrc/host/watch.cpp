#include "host/watch.h"

#include <cstdint>

namespace vitkernels::host {
namespace {

// Identities alone: no code of Python's runs meanwhile, which could change a dictionary that is gone through.
int same_contents(PyObject* tables, PyObject* contents) {
  const Py_ssize_t all = PyTuple_GET_SIZE(contents);
  Py_ssize_t seen = 0;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tables); ++i) {
    PyObject *table = PyTuple_GET_ITEM(tables, i), *value;
    if (!PyDict_Check(table)) return PyErr_BadArgument(), -1;
    for (Py_ssize_t at = 0; PyDict_Next(table, &at, nullptr, &value); ++seen) {
      if (seen == all || value != PyTuple_GET_ITEM(contents, seen)) return 0;
    }
  }
  return seen == all;
}

int all_empty(PyObject* containers) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(containers); ++i) {
    PyObject* container = PyTuple_GET_ITEM(containers, i);
    const int filled = PyDict_Check(container) ? PyDict_GET_SIZE(container) != 0 : PyObject_IsTrue(container);
    if (filled != 0) return filled < 0 ? -1 : 0;
  }
  return 1;
}

int same_classes(PyObject* modules, PyObject* classes) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(modules); ++i) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(PyTuple_GET_ITEM(modules, i))) != PyTuple_GET_ITEM(classes, i)) return 0;
  }
  return 1;
}

int no_forward(PyObject* own) {
  static PyObject* const forward = PyUnicode_InternFromString("forward");
  if (forward == nullptr) return -1;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(own); ++i) {
    PyObject* table = PyTuple_GET_ITEM(own, i);
    if (!PyDict_Check(table)) return PyErr_BadArgument(), -1;
    const int found = PyDict_Contains(table, forward);
    if (found != 0) return found < 0 ? -1 : 0;
  }
  return 1;
}

int same_values(PyObject* owners, PyObject* names, PyObject* values) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(owners); ++i) {
    PyObject *name = PyTuple_GET_ITEM(names, i), *was = PyTuple_GET_ITEM(values, i);
    PyObject* is = PyDict_GetItemWithError(PyTuple_GET_ITEM(owners, i), name);
    if (is == was) continue;
    if (is == nullptr) {
      if (!PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, name);
      return -1;
    }
    Py_INCREF(is);  // the comparison may run anything, and this be deleted meanwhile
    const int same = PyObject_RichCompareBool(is, was, Py_EQ);
    Py_DECREF(is);
    if (same != 1) return same;
  }
  return 1;
}

// What two questions return, as numbers; false with an exception set. Takes the references.
bool read(PyObject* version, PyObject* address, uint64_t* mark) {
  const bool answered = version != nullptr && address != nullptr;
  if (answered) {
    mark[0] = PyLong_AsUnsignedLongLongMask(version);
    mark[1] = PyLong_AsUnsignedLongLongMask(address);
  }
  Py_XDECREF(version);
  Py_XDECREF(address);
  return answered && !PyErr_Occurred();
}

}  // namespace

int unchanged(const Snapshot& was) {
  int answer = same_contents(was.tables, was.contents);
  if (answer == 1) answer = all_empty(was.empty);
  if (answer == 1) answer = same_classes(was.modules, was.classes);
  if (answer == 1) answer = no_forward(was.own);
  if (answer == 1) answer = same_values(was.owners, was.names, was.values);
  return answer;
}

PyObject* marks(PyObject* tensors, PyObject* version, PyObject* address, PyObject* plain) {
  const bool known = Py_TYPE(version) == &PyGetSetDescr_Type && Py_TYPE(address) == &PyMethodDescr_Type &&
                     reinterpret_cast<PyMethodDescrObject*>(address)->d_method->ml_flags == METH_NOARGS;
  const PyGetSetDef* get = known ? reinterpret_cast<PyGetSetDescrObject*>(version)->d_getset : nullptr;
  const PyCFunction call = known ? reinterpret_cast<PyMethodDescrObject*>(address)->d_method->ml_meth : nullptr;
  static PyObject* const name = PyUnicode_InternFromString("_version");
  const Py_ssize_t count = PyTuple_GET_SIZE(tensors);
  PyObject* bytes = name == nullptr ? nullptr : PyBytes_FromStringAndSize(nullptr, count * 2 * static_cast<Py_ssize_t>(sizeof(uint64_t)));
  if (bytes == nullptr) return nullptr;
  uint64_t* mark = reinterpret_cast<uint64_t*>(PyBytes_AS_STRING(bytes));
  for (Py_ssize_t i = 0; i < count; ++i, mark += 2) {
    PyObject *tensor = PyTuple_GET_ITEM(tensors, i), *type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
    bool direct = false;
    for (Py_ssize_t j = 0; known && j < PyTuple_GET_SIZE(plain); ++j) direct |= type == PyTuple_GET_ITEM(plain, j);
    PyObject* first = direct ? get->get(tensor, get->closure) : PyObject_GetAttr(tensor, name);
    PyObject* second = first == nullptr ? nullptr : direct ? call(tensor, nullptr) : PyObject_CallOneArg(address, tensor);
    if (!read(first, second, mark)) {
      Py_DECREF(bytes);
      return nullptr;
    }
  }
  return bytes;
}

}  // namespace vitkernels::host
