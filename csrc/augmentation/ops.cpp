// Schemas of the augmentation operators; dinov2/ops/augmentation.py says what they compute, cpu/ holds the kernels. Those that
// change a crop return nothing: functionalisation, and so torch.compile, takes no operator that returns what it was given.

#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(dinov2, m) {
  m.def(
      "crop_resize(Tensor volume, int[] start, int[] stop, int size, int[] source_axes, int[] flipped, float scale) -> Tensor");
  m.def("adjust_gamma_(Tensor(a!) x, float gamma) -> ()");
  m.def("shift_histogram_(Tensor(a!) x, float[] points) -> ()");
  m.def("add_gaussian_noise_(Tensor(a!) x, float std, int seed) -> ()");
  m.def("gaussian_smooth_(Tensor(a!) x, float[] sigma) -> ()");
  m.def("gaussian_sharpen_(Tensor(a!) x, float[] sigma1, float[] sigma2, float alpha) -> ()");
}
