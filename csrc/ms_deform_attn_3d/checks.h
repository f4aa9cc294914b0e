// What every back end checks before it touches memory; a wrong argument is a ValueError in Python.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>

#include "trilinear.h"

namespace dinov2::msda {

inline void check_companion(const char* name, const at::Tensor& x, const at::Tensor& value, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(x.scalar_type() == dtype, name, " must be ", dtype, " for a value of ", value.scalar_type(), ", got ",
                    x.scalar_type());
  TORCH_CHECK_VALUE(x.device() == value.device(), name, " must be on ", value.device(), " as value is, got ", x.device());
}

// Where each level of `value` starts; the sizes must add up to its rows.
inline void set_levels(const at::Tensor& value, at::IntArrayRef spatial_shapes, Layout* layout) {
  const int64_t count = static_cast<int64_t>(spatial_shapes.size());
  TORCH_CHECK_VALUE(count % 3 == 0 && count >= 3 && count <= 3 * MAX_LEVELS, "spatial_shapes must hold (H, W, D) of 1 to ",
                    MAX_LEVELS, " levels, got ", count, " numbers");
  layout->num_levels = count / 3;
  int64_t start = 0;
  for (int64_t l = 0; l < layout->num_levels; ++l) {
    layout->levels[l].start = start;
    int64_t voxels = 1;
    for (int64_t axis = 0; axis < 3; ++axis) {
      const int64_t size = spatial_shapes[3 * l + axis];
      TORCH_CHECK_VALUE(size > 0, "spatial_shapes must be positive, got ", spatial_shapes);
      TORCH_CHECK_VALUE(voxels <= layout->rows / size, "value has S = ", layout->rows, " voxels, fewer than spatial_shapes ",
                        spatial_shapes, " hold");  // asked before the product, which might not fit
      voxels *= layout->levels[l].size[axis] = size;
    }
    start += voxels;
  }
  TORCH_CHECK_VALUE(start == layout->rows, "value has S = ", layout->rows, " voxels, spatial_shapes ", spatial_shapes, " hold ",
                    start);
}

inline Layout check_arguments(const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& locations,
                              const at::Tensor& weights) {
  TORCH_CHECK_VALUE(at::isFloatingType(value.scalar_type()) && value.element_size() > 1,
                    "value must be float64, float32, float16 or bfloat16, got ", value.scalar_type());
  TORCH_CHECK_VALUE(value.dim() == 4 && value.size(2) > 0 && value.size(3) > 0,
                    "value must be [B, S, M, C] with heads and channels, got ", value.sizes());
  const at::ScalarType dtype = at::toOpMathType(value.scalar_type());
  check_companion("sampling_locations", locations, value, dtype);
  check_companion("attention_weights", weights, value, dtype);
  Layout layout{};
  layout.batch = value.size(0), layout.rows = value.size(1), layout.heads = value.size(2), layout.channels = value.size(3);
  set_levels(value, spatial_shapes, &layout);
  TORCH_CHECK_VALUE(locations.dim() == 6 && locations.size(0) == layout.batch && locations.size(2) == layout.heads &&
                        locations.size(3) == layout.num_levels && locations.size(5) == 3,
                    "sampling_locations must be [B, Q, M, L, P, 3] with B = ", layout.batch, ", M = ", layout.heads,
                    ", L = ", layout.num_levels, ", got ", locations.sizes());
  TORCH_CHECK_VALUE(weights.sizes() == locations.sizes().slice(0, 5),
                    "attention_weights must be [B, Q, M, L, P] = ", locations.sizes().slice(0, 5),
                    " as sampling_locations, got ", weights.sizes());
  layout.queries = locations.size(1), layout.points = locations.size(4);
  return layout;
}

inline void check_grad_output(const at::Tensor& grad_output, const at::Tensor& value, const Layout& layout) {
  check_companion("grad_output", grad_output, value, value.scalar_type());
  const std::array<int64_t, 3> expected = {layout.batch, layout.queries, layout.heads * layout.channels};
  TORCH_CHECK_VALUE(grad_output.sizes() == at::IntArrayRef(expected),
                    "grad_output must be [B, Q, M*C] = ", at::IntArrayRef(expected), ", got ", grad_output.sizes());
}

}  // namespace dinov2::msda
