// What one lane of a vectorised CUDA kernel does, in plain C++, so that a host program can run it lane by lane: `lanes`
// neighbouring lanes share the points of one head at a query, each takes V channels that lie side by side (16 bytes where they
// may), then further ones if the head has more. The gradient of `value` is collected over a run of queries that follow each
// other, as long as a point stays in its cell or moves to the next one along D, and only then added in memory.
//
// `Group` joins the lanes: sum(locations, weight, parts, first) writes (or, not first, adds) the sums of all lanes' four parts
// to three numbers from `locations` on and to `weight`; add<V>(address, x) adds V numbers while others may do so too.
#pragma once

#include <string.h>

#include "lanes.h"

#ifdef __CUDA_ARCH__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL
#endif

namespace dinov2::msda {

// V numbers side by side, moved by one instruction; aligned to their size.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T x[V];
};

template <typename T, int V>
HOST_DEVICE void store(T* address, const Pack<T, V>& pack) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(pack) == 16) {  // the compiler would store number by number
    unsigned bits[4];
    memcpy(bits, &pack, sizeof(bits));
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)), "r"(bits[0]),
                 "r"(bits[1]), "r"(bits[2]), "r"(bits[3])
                 : "memory");
    return;
  }
#endif
  *reinterpret_cast<Pack<T, V>*>(address) = pack;
}

// The head that a lane works for.
struct Head {
  int64_t volume, head;
};

// Where a cell's corners lie in `value`, in elements from the head's first: the first one, and how far it is from there to the
// other one along H, W and D (0 at a border). 32 bits: a volume with 2^31 elements is for lanes.h.
struct Corners {
  int32_t first, step[3];

  HOST_DEVICE int32_t offset(int k) const { return first + (k >> 2) * step[0] + (k >> 1 & 1) * step[1] + (k & 1) * step[2]; }
};

// `stride` elements from one row of `value` to the next.
template <typename S>
HOST_DEVICE Corners corners_of(const Level& level, const Cell<S, int32_t>& cell, int32_t stride) {
  const int32_t step_w = static_cast<int32_t>(level.size[2]) * stride, step_h = static_cast<int32_t>(level.size[1]) * step_w;
  const int32_t (&h)[2] = cell.axes[0].index, (&w)[2] = cell.axes[1].index, (&d)[2] = cell.axes[2].index;
  const int32_t first = (static_cast<int32_t>(level.start) + d[0]) * stride + h[0] * step_h + w[0] * step_w;
  return {first, {(h[1] - h[0]) * step_h, (w[1] - w[0]) * step_w, (d[1] - d[0]) * stride}};
}

// One query's sum over all points, channels [c, c + V).
template <int V, typename T, typename S>
HOST_DEVICE void sample_channels(const Layout& x, const LaneOperands<T, S>& in, const Head& at, int64_t query, int64_t c,
                                 T* out) {
  const int64_t item = (at.volume * x.queries + query) * x.heads + at.head;
  const int32_t stride = static_cast<int32_t>(x.heads * x.channels);
  const T* value = in.value + (at.volume * x.rows * x.heads + at.head) * x.channels + c;
  S sum[V] = {};
  int64_t point = item * x.num_levels * x.points;
  for (int64_t l = 0; l < x.num_levels; ++l) {
    for (int64_t p = 0; p < x.points; ++p, ++point) {
      Cell<S, int32_t> cell;
      if (!locate(x.levels[l], in.locations + 3 * point, &cell)) continue;
      const Corners corners = corners_of(x.levels[l], cell, stride);
      S weights[8];
      corner_weights(cell, in.weights[point], weights);
      UNROLL for (int k = 0; k < 8; ++k) {
        const Pack<T, V> voxel = *reinterpret_cast<const Pack<T, V>*>(value + corners.offset(k));
        UNROLL for (int v = 0; v < V; ++v) sum[v] += weights[k] * static_cast<S>(voxel.x[v]);
      }
    }
  }
  Pack<T, V> rounded;
  UNROLL for (int v = 0; v < V; ++v) rounded.x[v] = static_cast<T>(sum[v]);
  store(out + item * x.channels + c, rounded);
}

template <int V, typename T, typename S>
HOST_DEVICE void sample_query(const Layout& x, const LaneOperands<T, S>& in, const Head& at, int64_t query, int64_t lane,
                              int64_t lanes, T* out) {
  for (int64_t c = lane * V; c < x.channels; c += lanes * V) sample_channels<V>(x, in, at, query, c, out);
}

// Gradients of the voxels at one cell's corners, not yet in memory.
template <int V, typename S>
struct Pending {
  Corners at{};
  unsigned touched = 0;  // corners with a weight; the others' sums are 0
  S sums[8][V] = {};

  template <typename Group>
  HOST_DEVICE void flush(S* value, unsigned which, const Group& group) {
    UNROLL for (int k = 0; k < 8; ++k) {
      if (!(which >> k & 1)) continue;
      if (touched >> k & 1) group.template add<V>(value + at.offset(k), sums[k]);
      UNROLL for (int v = 0; v < V; ++v) sums[k][v] = 0;
    }
    touched &= ~which;
  }

  // Makes these the corners: what lies elsewhere goes to memory.
  template <typename Group>
  HOST_DEVICE void move(const Corners& to, S* value, const Group& group) {
    const bool same_face = to.step[0] == at.step[0] && to.step[1] == at.step[1];
    if (touched && same_face && to.first == at.first && to.step[2] == at.step[2]) return;
    if (touched && same_face && to.first == at.first + at.step[2]) {  // one voxel on along D: its far face is the near one now
      flush(value, 0x55, group);
      UNROLL for (int k = 0; k < 8; k += 2) {
        UNROLL for (int v = 0; v < V; ++v) sums[k][v] = sums[k + 1][v], sums[k + 1][v] = 0;
      }
      touched >>= 1;
    } else if (touched) {
      flush(value, 0xff, group);
    }
    at = to;
  }
};

// Derivatives of the points number `point` (of their item) of queries [query, query + count), channels [c, c + V).
template <int V, typename T, typename S, typename Group>
HOST_DEVICE void differentiate_points(const Layout& x, const LaneOperands<T, S>& in, const Head& at, const Level& level,
                                      int64_t point, int64_t query, int64_t count, int64_t c, bool first,
                                      const LaneGradients<S>& out, const Group& group) {
  const int32_t stride = static_cast<int32_t>(x.heads * x.channels);
  const int64_t offset = (at.volume * x.rows * x.heads + at.head) * x.channels + c;
  const bool has_channels = c < x.channels;  // a lane without any only joins the sums
  Pending<V, S> pending;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t item = (at.volume * x.queries + query + i) * x.heads + at.head;
    const int64_t place = item * x.num_levels * x.points + point;
    S parts[4] = {};
    Cell<S, int32_t> cell;
    if (locate(level, in.locations + 3 * place, &cell) && has_channels) {
      const Corners corners = corners_of(level, cell, stride);
      S weights[8], products[8], slope[3];
      corner_weights(cell, in.weights[place], weights);
      const Pack<T, V> grad = *reinterpret_cast<const Pack<T, V>*>(in.grad_output + item * x.channels + c);
      pending.move(corners, out.value + offset, group);
      UNROLL for (int k = 0; k < 8; ++k) {
        const Pack<T, V> voxel = *reinterpret_cast<const Pack<T, V>*>(in.value + offset + corners.offset(k));
        products[k] = 0;
        UNROLL for (int v = 0; v < V; ++v) products[k] += static_cast<S>(grad.x[v]) * static_cast<S>(voxel.x[v]);
        if (weights[k] == 0) continue;
        pending.touched |= 1u << k;
        UNROLL for (int v = 0; v < V; ++v) pending.sums[k][v] += weights[k] * static_cast<S>(grad.x[v]);
      }
      parts[3] = interpolate(level, cell, products, slope);
      UNROLL for (int axis = 0; axis < 3; ++axis) parts[axis] = in.weights[place] * slope[axis];
    }
    group.sum(out.locations + 3 * place, out.weights + place, parts, first);
  }
  if (pending.touched) pending.flush(out.value + offset, 0xff, group);
}

// The gradient of `value` starts as zeros; the others are written.
template <int V, typename T, typename S, typename Group>
HOST_DEVICE void differentiate_run(const Layout& x, const LaneOperands<T, S>& in, const Head& at, int64_t query, int64_t count,
                                   int64_t lane, int64_t lanes, const LaneGradients<S>& out, const Group& group) {
  for (int64_t c = 0; c < x.channels; c += lanes * V) {
    int64_t point = 0;
    for (int64_t l = 0; l < x.num_levels; ++l) {
      for (int64_t p = 0; p < x.points; ++p, ++point) {
        differentiate_points<V>(x, in, at, x.levels[l], point, query, count, c + lane * V, c == 0, out, group);
      }
    }
  }
}

}  // namespace dinov2::msda
