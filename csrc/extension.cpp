// The compiled module of dinov2.ops: importing it registers the operators (torch.ops.dinov2.*); it holds nothing else.

#include <Python.h>

#define JOIN(a, b) a##b
#define INIT(name) JOIN(PyInit_, name)

PyMODINIT_FUNC INIT(TORCH_EXTENSION_NAME)() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "dinov2._C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
