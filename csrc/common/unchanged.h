// Whether Python objects hold what they held, for resnet_fused/modules/guard.py: one pass without a call into Python.
#pragma once

#include <Python.h>

namespace rf {

// What was there, in tuples. Every pair, type and name is compared by identity.
struct Unchanged {
  PyObject *holders, *keys, *values;                // dictionaries, a key of each, and what it stood for
  PyObject *modules, *types, *entries, *names;      // objects, their classes, their __dict__, and the names in that
  PyObject *empty, *sized, *sizes;                  // dictionaries that are to be empty; others, and how long they are

  bool operator()() const {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(holders); ++i) {
      PyObject* const holder = PyTuple_GET_ITEM(holders, i);
      if (!PyDict_Check(holder)) return false;
      PyObject* const found = PyDict_GetItemWithError(holder, PyTuple_GET_ITEM(keys, i));
      if (found != PyTuple_GET_ITEM(values, i)) return PyErr_Clear(), false;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(modules); ++i) {
      PyObject* const module = PyTuple_GET_ITEM(modules, i);
      if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != PyTuple_GET_ITEM(types, i)) return false;
      PyObject* const own = PyObject_GenericGetDict(module, nullptr);
      Py_XDECREF(own);  // its module holds it
      if (own == nullptr || own != PyTuple_GET_ITEM(entries, i)) return PyErr_Clear(), false;
      if (!same_names(own, PyTuple_GET_ITEM(names, i))) return false;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(empty); ++i) {
      PyObject* const dictionary = PyTuple_GET_ITEM(empty, i);
      if (!PyDict_Check(dictionary) || PyDict_Size(dictionary) != 0) return false;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(sized); ++i) {
      PyObject* const dictionary = PyTuple_GET_ITEM(sized, i);
      if (!PyDict_Check(dictionary)) return false;
      if (PyDict_Size(dictionary) != PyLong_AsSsize_t(PyTuple_GET_ITEM(sizes, i))) return false;
    }
    return true;
  }

 private:
  static bool same_names(PyObject* dictionary, PyObject* names) {
    if (PyDict_Size(dictionary) != PyTuple_GET_SIZE(names)) return false;
    Py_ssize_t at = 0, i = 0;
    PyObject* key = nullptr;
    while (PyDict_Next(dictionary, &at, &key, nullptr)) {
      if (key != PyTuple_GET_ITEM(names, i++)) return false;
    }
    return true;
  }
};

}  // namespace rf
