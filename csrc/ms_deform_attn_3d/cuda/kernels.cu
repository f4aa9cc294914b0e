// The CUDA kernels: a group of lanes of one warp per query and head (lanes.h).

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "kernels.h"
#include "lanes.h"

namespace dinov2::msda {
namespace {

constexpr int64_t THREADS = 256, MAX_BLOCKS = 1 << 20;  // a block goes on to further items

// Half-precision numbers in memory; torch's build turns the toolkit's own conversions off.
struct F16 {
  __half bits;
  HOST_DEVICE explicit F16(float x) : bits(__float2half_rn(x)) {}
  HOST_DEVICE explicit operator float() const { return __half2float(bits); }
};
struct BF16 {
  __nv_bfloat16 bits;
  HOST_DEVICE explicit BF16(float x) : bits(__float2bfloat16_rn(x)) {}
  HOST_DEVICE explicit operator float() const { return __bfloat162float(bits); }
};

template <typename S>
struct LaneGroup {
  unsigned mask;  // lanes of the warp that share an item
  int64_t lane, lanes;

  __device__ void add(S* address, S x) const { atomicAdd(address, x); }

  __device__ void sum(S* address, S part) const {
    for (int step = static_cast<int>(lanes) / 2; step > 0; step /= 2) part += __shfl_xor_sync(mask, part, step);
    if (lane == 0) *address = part;
  }
};

struct Place {
  int64_t item, lane, lanes, step;  // step: items from one turn to the next

  __device__ explicit Place(int64_t channels) : lanes(lanes_for(channels)) {
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    item = thread / lanes;
    lane = thread % lanes;
    step = static_cast<int64_t>(gridDim.x) * blockDim.x / lanes;
  }

  __device__ unsigned mask() const {
    const unsigned low = lanes == WARP ? ~0u : (1u << lanes) - 1;
    return low << (threadIdx.x % WARP / lanes * lanes);
  }
};

template <typename T, typename S>
__global__ void sample_kernel(Layout layout, LaneOperands<T, S> in, int64_t items, T* out) {
  const Place place(layout.channels);
  for (int64_t item = place.item; item < items; item += place.step) {
    sample_lane(layout, in, item, place.lane, place.lanes, out);
  }
}

template <typename T, typename S>
__global__ void differentiate_kernel(Layout layout, LaneOperands<T, S> in, int64_t items, LaneGradients<S> out) {
  const Place place(layout.channels);
  const LaneGroup<S> group{place.mask(), place.lane, place.lanes};
  for (int64_t item = place.item; item < items; item += place.step) {
    differentiate_lane(layout, in, item, place.lane, place.lanes, out, group);
  }
}

unsigned blocks_for(const Layout& layout, int64_t items) {
  const int64_t per_block = THREADS / lanes_for(layout.channels);
  return static_cast<unsigned>(std::min(MAX_BLOCKS, (items + per_block - 1) / per_block));
}

template <typename T, typename S>
cudaError_t sample_as(const Layout& layout, const void* value, const void* locations, const void* weights, void* out,
                      cudaStream_t stream) {
  const LaneOperands<T, S> in{static_cast<const T*>(value), nullptr, static_cast<const S*>(locations),
                              static_cast<const S*>(weights)};
  const int64_t items = layout.batch * layout.queries * layout.heads;
  if (items == 0) return cudaSuccess;
  sample_kernel<<<blocks_for(layout, items), THREADS, 0, stream>>>(layout, in, items, static_cast<T*>(out));
  return cudaGetLastError();
}

template <typename T, typename S>
cudaError_t differentiate_as(const Layout& layout, const void* grad_output, const void* value, const void* locations,
                             const void* weights, const LaneGradients<S>& out, cudaStream_t stream) {
  const LaneOperands<T, S> in{static_cast<const T*>(value), static_cast<const T*>(grad_output),
                              static_cast<const S*>(locations), static_cast<const S*>(weights)};
  const int64_t items = layout.batch * layout.queries * layout.heads;
  if (items == 0) return cudaSuccess;
  differentiate_kernel<<<blocks_for(layout, items), THREADS, 0, stream>>>(layout, in, items, out);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_sample(Stored stored, const Layout& layout, const void* value, const void* locations, const void* weights,
                          void* out, cudaStream_t stream) {
  switch (stored) {
    case Stored::f64:
      return sample_as<double, double>(layout, value, locations, weights, out, stream);
    case Stored::f32:
      return sample_as<float, float>(layout, value, locations, weights, out, stream);
    case Stored::f16:
      return sample_as<F16, float>(layout, value, locations, weights, out, stream);
    case Stored::bf16:
      return sample_as<BF16, float>(layout, value, locations, weights, out, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_differentiate(Stored stored, const Layout& layout, const void* grad_output, const void* value,
                                 const void* locations, const void* weights, void* grad_value, void* grad_locations,
                                 void* grad_weights, cudaStream_t stream) {
  if (stored == Stored::f64) {
    const LaneGradients<double> out{static_cast<double*>(grad_value), static_cast<double*>(grad_locations),
                                    static_cast<double*>(grad_weights)};
    return differentiate_as<double, double>(layout, grad_output, value, locations, weights, out, stream);
  }
  const LaneGradients<float> out{static_cast<float*>(grad_value), static_cast<float*>(grad_locations),
                                 static_cast<float*>(grad_weights)};
  switch (stored) {
    case Stored::f32:
      return differentiate_as<float, float>(layout, grad_output, value, locations, weights, out, stream);
    case Stored::f16:
      return differentiate_as<F16, float>(layout, grad_output, value, locations, weights, out, stream);
    case Stored::bf16:
      return differentiate_as<BF16, float>(layout, grad_output, value, locations, weights, out, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace dinov2::msda
