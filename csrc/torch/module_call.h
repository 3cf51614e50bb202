#pragma once
#include <Python.h>

namespace fastrnn {
// See module_call.cpp. METH_FASTCALL: binding by pybind11 would cost as much as the call.
PyObject* module_forward(PyObject* module, PyObject* const* args, Py_ssize_t count);
PyObject* without_view(PyObject* module, PyObject* const* args, Py_ssize_t count);
}  // namespace fastrnn
