// Separable Gaussian smoothing of a cubic crop, and the sharpening made of two of them, in place.
//
// A plane (H fixed) stays in cache through the passes along D and W; the pass along H then reads the planes row by row.
// Outside the crop are zeros, and kernels are cut at four standard deviations: MONAI's GaussianFilter.

#pragma once

#include "simd.h"

namespace dinov2::KERNELS {

namespace {

constexpr int64_t BLOCK = 4;  // vectors of a row whose sums stay in registers

// out[i] = sum over k of weights[k] * (centre[i - k * step] + centre[i + k * step]) for `vectors` vectors of a row
INLINE void weigh_neighbours(const float* centre, int64_t step, Weights weights, int64_t vectors, float* out) {
  int64_t v = 0;
  for (; v + BLOCK <= vectors; v += BLOCK) {
    const float* c = centre + v * LANES;
    F8 sum[BLOCK];
    for (int64_t j = 0; j < BLOCK; ++j) sum[j] = weights.at[0] * load(c + j * LANES);
    for (int64_t k = 1; k <= weights.tail; ++k) {
      const float *before = c - k * step, *after = c + k * step;
      for (int64_t j = 0; j < BLOCK; ++j) sum[j] += weights.at[k] * (load(before + j * LANES) + load(after + j * LANES));
    }
    for (int64_t j = 0; j < BLOCK; ++j) store(out + v * LANES + j * LANES, sum[j]);
  }
  for (; v < vectors; ++v) {
    const float* c = centre + v * LANES;
    F8 sum = weights.at[0] * load(c);
    for (int64_t k = 1; k <= weights.tail; ++k) sum += weights.at[k] * (load(c - k * step) + load(c + k * step));
    store(out + v * LANES, sum);
  }
}

}  // namespace

void smooth_planes(const float* x, const CropLayout& l, Weights w, Weights d, int64_t begin, int64_t end, float* scratch,
                   float* planes) {
  const int64_t vectors = l.row / LANES;
  float* padded = scratch + d.tail;                                      // a row with zeros around it
  float* plane = scratch + l.row + 2 * d.tail + LANES + w.tail * l.row;  // rows with zero rows around them
  for (int64_t h = begin; h < end; ++h) {
    for (int64_t i = 0; i < l.width; ++i) {
      std::memcpy(padded, x + (h * l.width + i) * l.depth, l.depth * sizeof(float));
      weigh_neighbours(padded, 1, d, vectors, plane + i * l.row);
    }
    for (int64_t i = 0; i < l.width; ++i) {
      weigh_neighbours(plane + i * l.row, l.row, w, vectors, planes + h * l.plane + i * l.row);
    }
  }
}

void smooth_across(const float* planes, const CropLayout& l, Weights h, int64_t begin, int64_t end, const float* blurred,
                   float alpha, float* result, float* out) {
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t k = 0; k < l.height; ++k) {
      weigh_neighbours(planes + k * l.plane + i * l.row, l.plane, h, l.row / LANES, result);
      const int64_t at = (k * l.width + i) * l.depth;
      if (blurred == nullptr) {
        std::memcpy(out + at, result, l.depth * sizeof(float));
      } else {
        for (int64_t j = 0; j < l.depth; ++j) out[at + j] = blurred[at + j] + alpha * (blurred[at + j] - result[j]);
      }
    }
  }
}

}  // namespace dinov2::KERNELS
