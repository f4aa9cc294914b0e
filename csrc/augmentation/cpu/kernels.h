// The arithmetic of the augmentation operators on plain memory, declared for two instruction sets. binding.cpp checks
// arguments, makes tables, spreads the parts [begin, end) over threads and takes the set that the machine has.
#pragma once

#include <cstdint>

#include "../../instruction_set.h"

namespace dinov2 {

// One source axis of a resize: for every output index two source indices (within the box) and the weight of the second.
struct ResizeAxis {
  const int32_t *low, *high;
  const float* weight;
  int64_t source_stride, output_stride;
  bool is_dense;  // eight neighbouring outputs have their low indices within sixteen
};

constexpr int64_t RESIZE_MARGIN = 24;
constexpr int64_t TILE = 16;  // output rows that are written together
constexpr int64_t NOISE_GROUP = 32;

// Weights of a symmetric filter at distance 0, 1, ..., tail.
struct Weights {
  const float* at;
  int64_t tail;
};

struct CropLayout {
  int64_t height, width, depth;
  int64_t row;    // floats of a padded row: depth rounded up to whole vectors
  int64_t plane;  // floats from one plane to the next; a cache line more than its rows, so that rows do not share cache sets

  CropLayout(int64_t height, int64_t width, int64_t depth)
      : height(height), width(width), depth(depth), row((depth + 7) / 8 * 8), plane(width * row + 16) {}

  int64_t scratch_size(Weights w, Weights d) const { return row + 2 * d.tail + 8 + (width + 2 * w.tail) * row; }
};

namespace generic {
#include "kernels.inc"
}
namespace avx2 {
#include "kernels.inc"
}

}  // namespace dinov2
