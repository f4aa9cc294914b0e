// Schemas of the 3D multi-scale deformable attention operators; dinov2/ops/ms_deform_attn.py says what they compute, cpu/ and
// cuda/ hold a kernel each. spatial_shapes is H, W, D of every level, one after another.

#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(dinov2, m) {
  m.def(
      "ms_deform_attn_3d(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights) -> "
      "Tensor");
  m.def(
      "ms_deform_attn_3d_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
      "Tensor attention_weights) -> (Tensor, Tensor, Tensor)");
}
