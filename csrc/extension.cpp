// The compiled module of dinov2.ops: importing it registers the operators (torch.ops.dinov2.*); it holds nothing else.

#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030B0000  // one module for every Python from 3.11 on
#endif
#include <Python.h>

#define JOIN(a, b) a##b
#define INIT(name) JOIN(PyInit_, name)

PyMODINIT_FUNC INIT(TORCH_EXTENSION_NAME)() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "dinov2._C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
