// Whether anything has changed of what derived weights came from. vitkernels/nn/_derived.py asks it before every call of a model, and holds the same two
// functions in Python: what is compared, and why, stands there.
#pragma once

#include <Python.h>

namespace vitkernels::host {

// What modules were, as flat tuples, which nobody can change while they are compared.
struct Snapshot {
  PyObject *tables, *contents;        // dictionaries, and all their values, one table after the other
  PyObject* empty;                    // containers that were empty
  PyObject *modules, *classes;        // each module's class
  PyObject* own;                      // dictionaries that held no "forward"
  PyObject *owners, *names, *values;  // values[i] was owners[i][names[i]]
};

// 1 if all of it still is as it was, 0 if not, -1 with an exception set.
int unchanged(const Snapshot& was);

// For each tensor its version and its address, in a bytes object; null with an exception set, for instance where a tensor counts no versions. `version` and
// `address` are Tensor._version and Tensor.data_ptr: tensors of the classes in `plain` have no others, and are asked without a look-up.
PyObject* marks(PyObject* tensors, PyObject* version, PyObject* address, PyObject* plain);

}  // namespace vitkernels::host
