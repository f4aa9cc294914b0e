// Launchers of the CUDA kernels, without torch: device pointers and a stream in, a cudaError_t out.
#pragma once

#include <cuda_runtime_api.h>

#include "../trilinear.h"

namespace dinov2::msda {

enum class Stored {
  f64,
  f32,
  f16,
  bf16
};  // type of value, grad_output and out; all else is double for f64 and float otherwise

cudaError_t launch_sample(Stored stored, const Layout& layout, const void* value, const void* locations, const void* weights,
                          void* out, cudaStream_t stream);

// All gradients start as zeros and have the type of sums, that of value too.
cudaError_t launch_differentiate(Stored stored, const Layout& layout, const void* grad_output, const void* value,
                                 const void* locations, const void* weights, void* grad_value, void* grad_locations,
                                 void* grad_weights, cudaStream_t stream);

}  // namespace dinov2::msda
