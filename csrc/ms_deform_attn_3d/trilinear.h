// Trilinear sampling of a pyramid of volumes and its derivatives: the one rule, for the CPU kernels, the CUDA kernels and
// tests.
//
// Along an axis of n voxels the location x in [0, 1] is the voxel coordinate x n - 1/2, so that voxel i has its centre at
// (i + 1/2) / n. Outside lie zeros. At a voxel's centre, where the slope jumps, the derivative is the one to the right (towards
// larger coordinates). A location that is not finite samples nothing: value 0, derivatives 0.
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline __attribute__((always_inline))  // never a symbol that files for several instruction sets share
#endif

namespace dinov2::msda {

constexpr int64_t MAX_LEVELS = 16;

struct Level {
  int64_t size[3];  // voxels along H, W, D
  int64_t start;    // row of `value` that holds its first voxel
};

// value [batch, rows, heads, channels]; locations [batch, queries, heads, num_levels, points, 3]; weights the same without 3.
struct Layout {
  int64_t batch, rows, heads, channels, queries, num_levels, points;
  Level levels[MAX_LEVELS];
};

// The two voxels around a coordinate, within the volume; one that is outside has weight and slope 0. I: of indices.
template <typename T, typename I = int64_t>
struct Axis {
  I index[2];
  T weight[2], slope[2];  // slope: of the weight, per voxel
};

template <typename T, typename I = int64_t>
struct Cell {
  Axis<T, I> axes[3];
};

// Rounded once, with or without such an instruction: which voxels a location lies between is the same on every processor.
HOST_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
HOST_DEVICE double multiply_add(double a, double b, double c) { return fma(a, b, c); }
HOST_DEVICE float round_down(float x) { return floorf(x); }
HOST_DEVICE double round_down(double x) { return floor(x); }

// False where the axis is left by a voxel or more, or the location is NaN.
template <typename T, typename I>
HOST_DEVICE bool locate_axis(T location, I size, Axis<T, I>* axis) {
  const T x = multiply_add(location, static_cast<T>(size), static_cast<T>(-0.5));
  if (!(x >= -1 && x < static_cast<T>(size))) return false;  // before the conversion below, which is undefined for large x
  const T below = round_down(x);
  const I low = static_cast<I>(below);
  const T fraction = x - below, has_low = low >= 0, has_high = low + 1 < size;
  axis->index[0] = low >= 0 ? low : 0;
  axis->index[1] = low + 1 < size ? low + 1 : low;
  axis->weight[0] = has_low * (1 - fraction);
  axis->weight[1] = has_high * fraction;
  axis->slope[0] = -has_low;
  axis->slope[1] = has_high;
  return true;
}

template <typename T, typename I>
HOST_DEVICE bool locate(const Level& level, const T* location, Cell<T, I>* cell) {
  return locate_axis(location[0], static_cast<I>(level.size[0]), &cell->axes[0]) &&
         locate_axis(location[1], static_cast<I>(level.size[1]), &cell->axes[1]) &&
         locate_axis(location[2], static_cast<I>(level.size[2]), &cell->axes[2]);
}

// Where the cell's corners lie in memory, `stride` elements from one row of `value` to the next; D runs fastest, then W, then
// H.
template <typename T>
HOST_DEVICE void corner_offsets(const Level& level, const Cell<T>& cell, int64_t stride, int64_t offsets[8]) {
  const int64_t step_w = level.size[2] * stride, step_h = level.size[1] * step_w;
  for (int k = 0; k < 8; ++k) {
    offsets[k] = level.start * stride + cell.axes[0].index[k >> 2] * step_h + cell.axes[1].index[k >> 1 & 1] * step_w +
                 cell.axes[2].index[k & 1] * stride;
  }
}

template <typename T, typename I>
HOST_DEVICE void corner_weights(const Cell<T, I>& cell, T factor, T weights[8]) {
  for (int k = 0; k < 8; ++k) {
    weights[k] = factor * cell.axes[0].weight[k >> 2] * cell.axes[1].weight[k >> 1 & 1] * cell.axes[2].weight[k & 1];
  }
}

// The interpolated value of numbers at the corners, and its derivatives by the location (h, w, d).
template <typename T, typename I>
HOST_DEVICE T interpolate(const Level& level, const Cell<T, I>& cell, const T corners[8], T gradient[3]) {
  const Axis<T, I>&h = cell.axes[0], &w = cell.axes[1], &d = cell.axes[2];
  T line[4], line_d[4], plane[2], plane_w[2], plane_d[2];
  for (int i = 0; i < 4; ++i) {
    line[i] = d.weight[0] * corners[2 * i] + d.weight[1] * corners[2 * i + 1];
    line_d[i] = d.slope[0] * corners[2 * i] + d.slope[1] * corners[2 * i + 1];
  }
  for (int i = 0; i < 2; ++i) {
    plane[i] = w.weight[0] * line[2 * i] + w.weight[1] * line[2 * i + 1];
    plane_w[i] = w.slope[0] * line[2 * i] + w.slope[1] * line[2 * i + 1];
    plane_d[i] = w.weight[0] * line_d[2 * i] + w.weight[1] * line_d[2 * i + 1];
  }
  gradient[0] = static_cast<T>(level.size[0]) * (h.slope[0] * plane[0] + h.slope[1] * plane[1]);
  gradient[1] = static_cast<T>(level.size[1]) * (h.weight[0] * plane_w[0] + h.weight[1] * plane_w[1]);
  gradient[2] = static_cast<T>(level.size[2]) * (h.weight[0] * plane_d[0] + h.weight[1] * plane_d[1]);
  return h.weight[0] * plane[0] + h.weight[1] * plane[1];
}

}  // namespace dinov2::msda
