// The operators for torch on CUDA: device guard, current stream, launch errors raised. The gradient of the value is summed by
// atomic additions, in any order.

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "../checks.h"
#include "kernels.h"

namespace dinov2::msda {
namespace {

Stored stored_type(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return Stored::f64;
    case at::kFloat:
      return Stored::f32;
    case at::kHalf:
      return Stored::f16;
    default:
      return Stored::bf16;  // check_arguments lets no other through
  }
}

void check_launch(cudaError_t error, const char* name) {
  TORCH_CHECK(error == cudaSuccess, name, ": the CUDA kernel could not be started: ", cudaGetErrorString(error));
}

at::Tensor forward(const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& sampling_locations,
                   const at::Tensor& attention_weights) {
  const Layout x = check_arguments(value, spatial_shapes, sampling_locations, attention_weights);
  const c10::cuda::CUDAGuard guard(value.device());
  const at::Tensor v = value.contiguous(), l = sampling_locations.contiguous(), w = attention_weights.contiguous();
  at::Tensor out = at::empty({x.batch, x.queries, x.heads * x.channels}, v.options());
  check_launch(launch_sample(stored_type(v.scalar_type()), x, v.const_data_ptr(), l.const_data_ptr(), w.const_data_ptr(),
                             out.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()),
               "ms_deform_attn_3d");
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad_output, const at::Tensor& value,
                                                        at::IntArrayRef spatial_shapes, const at::Tensor& sampling_locations,
                                                        const at::Tensor& attention_weights) {
  const Layout x = check_arguments(value, spatial_shapes, sampling_locations, attention_weights);
  check_grad_output(grad_output, value, x);
  at::globalContext().alertNotDeterministic("ms_deform_attn_3d_backward on CUDA");
  const c10::cuda::CUDAGuard guard(value.device());
  const at::Tensor v = value.contiguous(), l = sampling_locations.contiguous(), w = attention_weights.contiguous();
  const at::Tensor g = grad_output.contiguous();
  at::Tensor grad_value = at::zeros(v.sizes(), l.options()), grad_locations = at::zeros(l.sizes(), l.options());
  at::Tensor grad_weights = at::zeros(w.sizes(), w.options());
  check_launch(launch_differentiate(stored_type(v.scalar_type()), x, g.const_data_ptr(), v.const_data_ptr(), l.const_data_ptr(),
                                    w.const_data_ptr(), grad_value.mutable_data_ptr(), grad_locations.mutable_data_ptr(),
                                    grad_weights.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()),
               "ms_deform_attn_3d_backward");
  return {grad_value.to(value.scalar_type()), grad_locations, grad_weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(dinov2, CUDA, m) {
  m.impl("ms_deform_attn_3d", &forward);
  m.impl("ms_deform_attn_3d_backward", &backward);
}

}  // namespace dinov2::msda
