// The CUDA kernels: groups of lanes of one warp. vectors.h: blocks for neighbouring queries of one head, whose cells share
// voxels in the cache; a run of queries' gradient by each group. lanes.h, slower, for any size: an item (query and head) each.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "kernels.h"
#include "lanes.h"
#include "vectors.h"

namespace dinov2::msda {
namespace {

constexpr int64_t THREADS = 256, MAX_BLOCKS = 1 << 20;  // a block goes on to further items

#if __CUDA_ARCH__ >= 900
constexpr bool HAS_VECTOR_ADD = true;  // four float32 at once
#else
constexpr bool HAS_VECTOR_ADD = false;
#endif

// Half-precision numbers in memory; torch's build turns the toolkit's own conversions off.
struct F16 {
  __half bits;
  F16() = default;
  HOST_DEVICE explicit F16(float x) : bits(__float2half_rn(x)) {}
  HOST_DEVICE explicit operator float() const { return __half2float(bits); }
};
struct BF16 {
  __nv_bfloat16 bits;
  BF16() = default;
  HOST_DEVICE explicit BF16(float x) : bits(__float2bfloat16_rn(x)) {}
  HOST_DEVICE explicit operator float() const { return __bfloat162float(bits); }
};

template <typename S>
struct LaneGroup {
  unsigned mask;  // lanes of the warp that share an item
  int64_t lane, lanes;

  __device__ void add(S* address, S x) const { atomicAdd(address, x); }

  __device__ S reduce(S part, int step) const {
    for (; step > 0; step /= 2) part += __shfl_xor_sync(mask, part, step);
    return part;
  }

  __device__ void sum(S* address, S part) const {
    part = reduce(part, static_cast<int>(lanes) / 2);
    if (lane == 0) *address = part;
  }

  // Half of the lanes go on with half of the parts each time, while there are several: fewer exchanges than four sums.
  __device__ void sum(S* locations, S* weight, const S (&parts)[4], bool first) const {
    const int half = static_cast<int>(lanes) / 2, quarter = static_cast<int>(lanes) / 4;
    if (quarter == 0) {
      for (int i = 0; i < 4; ++i) {
        const S total = reduce(parts[i], half);
        if (lane == 0) put(i < 3 ? locations + i : weight, total, first);
      }
      return;
    }
    const bool upper = lane & half, odd = lane & quarter;
    const S a = (upper ? parts[2] : parts[0]) + __shfl_xor_sync(mask, upper ? parts[0] : parts[2], half);
    const S b = (upper ? parts[3] : parts[1]) + __shfl_xor_sync(mask, upper ? parts[1] : parts[3], half);
    const S total = reduce((odd ? b : a) + __shfl_xor_sync(mask, odd ? a : b, quarter), quarter / 2);
    const int which = static_cast<int>(lane) / quarter;
    if (lane % quarter == 0) put(which < 3 ? locations + which : weight, total, first);
  }

  __device__ static void put(S* address, S x, bool first) { *address = first ? x : *address + x; }

  template <int V>
  __device__ void add(S* address, const S (&x)[V]) const {
    if constexpr (HAS_VECTOR_ADD && sizeof(S) == 4 && V % 4 == 0) {
      UNROLL for (int v = 0; v < V; v += 4) {
        asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address + v)),
                     "f"(x[v]), "f"(x[v + 1]), "f"(x[v + 2]), "f"(x[v + 3])
                     : "memory");
      }
    } else {
      UNROLL for (int v = 0; v < V; ++v) atomicAdd(address + v, x[v]);
    }
  }
};

__device__ unsigned mask_of(int64_t lanes) {
  const unsigned low = lanes == WARP ? ~0u : (1u << lanes) - 1;
  return low << (threadIdx.x % WARP / lanes * lanes);
}

struct Place {
  int64_t item, lane, lanes, step;  // step: items from one turn to the next

  __device__ explicit Place(int64_t channels) : lanes(lanes_for(channels)) {
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    item = thread / lanes;
    lane = thread % lanes;
    step = static_cast<int64_t>(gridDim.x) * blockDim.x / lanes;
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
  const LaneGroup<S> group{mask_of(place.lanes), place.lane, place.lanes};
  for (int64_t item = place.item; item < items; item += place.step) {
    differentiate_lane(layout, in, item, place.lane, place.lanes, out, group);
  }
}

// How queries are shared out: a block works for one head of one volume, `turns` times for as many queries as it has groups.
struct Shares {
  int64_t lanes, groups, turns, parts, blocks;  // parts: blocks of a head

  // `enough` blocks, so that all processors are busy; smaller ones where even those are too few.
  Shares(const Layout& x, int64_t width, int64_t enough, int64_t max_turns)
      : lanes(lanes_for((x.channels + width - 1) / width)) {
    const auto blocks_of = [&] { return x.batch * x.heads * ((x.queries + groups - 1) / groups); };
    groups = THREADS / lanes;
    while (blocks_of() < enough && groups * lanes > 2 * WARP) groups /= 2;
    turns = std::clamp<int64_t>(blocks_of() / enough, 1, max_turns);
    parts = (x.queries + groups * turns - 1) / (groups * turns);
    blocks = x.batch * x.heads * parts;
  }

  unsigned threads() const { return static_cast<unsigned>(groups * lanes); }
};

__device__ Head head_of(const Layout& x, int64_t parts) {
  const int64_t i = blockIdx.x / parts;
  return {i / x.heads, i % x.heads};
}

template <int V, typename T, typename S>
__global__ void __launch_bounds__(THREADS) sample_vectors_kernel(Layout layout, LaneOperands<T, S> in, Shares shares, T* out) {
  const Head head = head_of(layout, shares.parts);
  const int lanes = static_cast<int>(shares.lanes), lane = static_cast<int>(threadIdx.x) % lanes;
  int64_t query = blockIdx.x % shares.parts * shares.turns * shares.groups + static_cast<int>(threadIdx.x) / lanes;
  for (int64_t turn = 0; turn < shares.turns && query < layout.queries; ++turn, query += shares.groups) {
    sample_query<V>(layout, in, head, query, lane, lanes, out);
  }
}

template <int V, typename T, typename S>
__global__ void __launch_bounds__(THREADS)
    differentiate_vectors_kernel(Layout layout, LaneOperands<T, S> in, Shares shares, LaneGradients<S> out) {
  const Head head = head_of(layout, shares.parts);
  const int lanes = static_cast<int>(shares.lanes), lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t query = (blockIdx.x % shares.parts * shares.groups + static_cast<int>(threadIdx.x) / lanes) * shares.turns;
  const int64_t count = layout.queries - query < shares.turns ? layout.queries - query : shares.turns;
  if (count <= 0) return;  // all lanes of a group
  const LaneGroup<S> group{mask_of(lanes), lane, lanes};
  differentiate_run<V>(layout, in, head, query, count, lane, lanes, out, group);
}

constexpr int64_t ENOUGH_TO_SAMPLE = 2048, MAX_TURNS = 8, ENOUGH_TO_DIFFERENTIATE = 800, MAX_RUN = 16;

bool is_aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Whether the elements of a volume, and blocks, count in 32 bits, as vectors.h asks.
bool fits(const Layout& x, const Shares& shares) {
  return x.rows <= INT32_MAX / (x.heads * x.channels) && shares.blocks < INT32_MAX;
}

template <int V, typename T, typename S>
cudaError_t sample_vectors(const Layout& x, const LaneOperands<T, S>& in, const Shares& shares, T* out, cudaStream_t stream) {
  sample_vectors_kernel<V><<<static_cast<unsigned>(shares.blocks), shares.threads(), 0, stream>>>(x, in, shares, out);
  return cudaGetLastError();
}

template <int V, typename T, typename S>
cudaError_t differentiate_vectors(const Layout& x, const LaneOperands<T, S>& in, const Shares& shares,
                                  const LaneGradients<S>& out, cudaStream_t stream) {
  differentiate_vectors_kernel<V><<<static_cast<unsigned>(shares.blocks), shares.threads(), 0, stream>>>(x, in, shares, out);
  return cudaGetLastError();
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
  constexpr int V = 16 / sizeof(T);
  const bool wide = layout.channels % V == 0 && is_aligned(value, 16) && is_aligned(out, 16);
  const Shares shares(layout, wide ? V : 1, ENOUGH_TO_SAMPLE, MAX_TURNS);
  if (fits(layout, shares)) {
    const auto launch = wide ? sample_vectors<V, T, S> : sample_vectors<1, T, S>;
    return launch(layout, in, shares, static_cast<T*>(out), stream);
  }
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
  constexpr int V = 16 / sizeof(S);
  const bool wide = layout.channels % V == 0 && is_aligned(value, V * sizeof(T)) && is_aligned(grad_output, V * sizeof(T)) &&
                    is_aligned(out.value, V * sizeof(S));
  const Shares shares(layout, wide ? V : 1, ENOUGH_TO_DIFFERENTIATE, MAX_RUN);
  if (fits(layout, shares)) {
    const auto launch = wide ? differentiate_vectors<V, T, S> : differentiate_vectors<1, T, S>;
    return launch(layout, in, shares, out, stream);
  }
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
