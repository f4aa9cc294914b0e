// What one lane of a CUDA kernel does, in plain C++, so that a host program can run it lane by lane: `lanes` neighbouring lanes
// share an item (one query and head), each takes every lanes-th channel. `Group` joins them: sum(address, part) writes the sum
// of all lanes' parts, add(address, x) adds while other items may do so too.
#pragma once

#include "../trilinear.h"

namespace dinov2::msda {

constexpr int64_t WARP = 32;

// As many lanes as channels, but a power of two and at most a warp.
HOST_DEVICE int64_t lanes_for(int64_t channels) {
  int64_t lanes = 1;
  while (lanes < channels && lanes < WARP) lanes *= 2;
  return lanes;
}

// T: as stored. S: as summed, and the type of locations and weights.
template <typename T, typename S>
struct LaneOperands {
  const T *value, *grad_output;
  const S *locations, *weights;
};

template <typename S>
struct LaneGradients {
  S *value, *locations, *weights;
};

template <typename T, typename S>
HOST_DEVICE void sample_lane(const Layout& x, const LaneOperands<T, S>& in, int64_t item, int64_t lane, int64_t lanes, T* out) {
  const int64_t head = item % x.heads, volume = item / x.heads / x.queries;
  const T* value = in.value + (volume * x.rows * x.heads + head) * x.channels;
  for (int64_t c = lane; c < x.channels; c += lanes) {
    S sum = 0;
    int64_t point = item * x.num_levels * x.points;
    for (int64_t l = 0; l < x.num_levels; ++l) {
      for (int64_t p = 0; p < x.points; ++p, ++point) {
        Cell<S> cell;
        if (!locate(x.levels[l], in.locations + 3 * point, &cell)) continue;
        int64_t offsets[8];
        S weights[8];
        corner_offsets(x.levels[l], cell, x.heads * x.channels, offsets);
        corner_weights(cell, in.weights[point], weights);
        for (int k = 0; k < 8; ++k) sum += weights[k] * static_cast<S>(value[offsets[k] + c]);
      }
    }
    out[item * x.channels + c] = static_cast<T>(sum);
  }
}

template <typename T, typename S, typename Group>
HOST_DEVICE void differentiate_point(const Layout& x, const LaneOperands<T, S>& in, int64_t item, const Level& level,
                                     int64_t point, int64_t lane, int64_t lanes, const LaneGradients<S>& out,
                                     const Group& group) {
  Cell<S> cell;
  if (!locate(level, in.locations + 3 * point, &cell)) return;  // the same for all lanes of the item
  const int64_t head = item % x.heads, volume = item / x.heads / x.queries;
  const int64_t first = (volume * x.rows * x.heads + head) * x.channels;
  int64_t offsets[8];
  S weights[8], products[8] = {}, gradient[3];
  corner_offsets(level, cell, x.heads * x.channels, offsets);
  corner_weights(cell, in.weights[point], weights);
  for (int64_t c = lane; c < x.channels; c += lanes) {
    const S grad = static_cast<S>(in.grad_output[item * x.channels + c]);
    for (int k = 0; k < 8; ++k) {
      products[k] += grad * static_cast<S>(in.value[first + offsets[k] + c]);
      if (weights[k] != 0) group.add(out.value + first + offsets[k] + c, weights[k] * grad);
    }
  }
  const S sample = interpolate(level, cell, products, gradient);
  group.sum(out.weights + point, sample);
  for (int axis = 0; axis < 3; ++axis) group.sum(out.locations + 3 * point + axis, in.weights[point] * gradient[axis]);
}

// Gradients start as zeros.
template <typename T, typename S, typename Group>
HOST_DEVICE void differentiate_lane(const Layout& x, const LaneOperands<T, S>& in, int64_t item, int64_t lane, int64_t lanes,
                                    const LaneGradients<S>& out, const Group& group) {
  int64_t point = item * x.num_levels * x.points;
  for (int64_t l = 0; l < x.num_levels; ++l) {
    for (int64_t p = 0; p < x.points; ++p, ++point) {
      differentiate_point(x, in, item, x.levels[l], point, lane, lanes, out, group);
    }
  }
}

}  // namespace dinov2::msda
