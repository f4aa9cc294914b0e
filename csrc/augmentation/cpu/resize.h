// Crop a box of a volume, resize it trilinearly to a cube, flip and turn it: one gather, straight from 16-bit voxels.
//
// Along each source axis a table gives, for every output index, two source indices and the weight of the second
// (align_corners=False, as torch's interpolate); flips are folded into the tables, quarter turns into output strides.
// For each output row the four source rows around it are blended once, then interpolated along the last source axis.

#pragma once

#include "simd.h"

namespace dinov2::KERNELS {

namespace {

INLINE F8 load_as_float(const float* p) { return load(p); }
INLINE F8 load_as_float(const int16_t* p) {
  S8 v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(__builtin_convertvector(v, I8), F8);
}

template <typename T>
INLINE void blend_rows(const T* const rows[4], const float weights[4], int64_t n, float* out) {
  const T *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3];
  const float w0 = weights[0], w1 = weights[1], w2 = weights[2], w3 = weights[3];
  const auto blend = [=](int64_t i) __attribute__((always_inline)) {
    store(out + i,
          w0 * load_as_float(r0 + i) + w1 * load_as_float(r1 + i) + w2 * load_as_float(r2 + i) + w3 * load_as_float(r3 + i));
  };
  for (int64_t i = 0; i + LANES <= n; i += LANES) blend(i);
  if (n >= LANES) {
    if (n % LANES) blend(n - LANES);  // the last vector overlaps the one before
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const float r[4] = {static_cast<float>(r0[i]), static_cast<float>(r1[i]), static_cast<float>(r2[i]),
                        static_cast<float>(r3[i])};
    out[i] = w0 * r[0] + w1 * r[1] + w2 * r[2] + w3 * r[3];
  }
}

// Along the contiguous axis. Where the sources of eight neighbouring outputs lie within sixteen voxels, two permutations pick
// them; `blended` goes on for RESIZE_MARGIN floats after its end.
INLINE void interpolate_row(const float* blended, const ResizeAxis& last, int64_t size, float* out) {
  int64_t i = 0;
#ifdef KERNELS_AVX2
  for (; i + LANES <= size && last.is_dense; i += LANES) {
    const int32_t base = std::min(last.low[i], last.low[i + LANES - 1]);
    I8 index;
    std::memcpy(&index, last.low + i, sizeof index);
    index -= base;
    const float* from = blended + base;
    const F8 low = __builtin_shuffle(load(from), load(from + LANES), index);
    const F8 high = __builtin_shuffle(load(from + 1), load(from + LANES + 1), index);
    store(out + i, low + load(last.weight + i) * (high - low));
  }
#endif
  for (; i < size; ++i) {
    const float low = blended[last.low[i]], high = blended[last.low[i] + 1];
    out[i] = low + last.weight[i] * (high - low);
  }
}

// Writes a tile of TILE rows of `size` floats, `ld` apart, as columns: column i goes to out + i * stride.
INLINE void write_columns(const float* tile, int64_t ld, int64_t rows, int64_t size, int64_t stride, float* out) {
  int64_t i = 0;
  for (; rows == TILE && i + LANES <= size; i += LANES) {
    for (int64_t half = 0; half < TILE; half += LANES) {
      F8 r[LANES];
      for (int64_t j = 0; j < LANES; ++j) r[j] = load(tile + (half + j) * ld + i);
      transpose8(r);
      for (int64_t j = 0; j < LANES; ++j) store(out + (i + j) * stride + half, r[j]);
    }
  }
  for (; i < size; ++i) {
    for (int64_t j = 0; j < rows; ++j) out[i * stride + j] = tile[j * ld + i];
  }
}

constexpr int64_t AHEAD = 4;  // rows that memory is asked for before they are needed

template <typename T>
INLINE void prefetch(const T* row, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + i);
}

template <typename T>
INLINE void blend_row(const T* low_plane, const T* high_plane, const ResizeAxis& inner, int64_t b, float outer_weight,
                      float scale, int64_t box_last, float* blended) {
  const int64_t low = inner.low[b] * inner.source_stride, high = inner.high[b] * inner.source_stride;
  const float wa = outer_weight, wb = inner.weight[b];
  const T* const rows[4] = {low_plane + low, low_plane + high, high_plane + low, high_plane + high};
  const float weights[4] = {scale * (1 - wa) * (1 - wb), scale * (1 - wa) * wb, scale * wa * (1 - wb), scale * wa * wb};
  blend_rows(rows, weights, box_last, blended);
}

// `scratch` holds a row of the box with its margin and a tile of TILE output rows. Where the last axis is not the output's
// contiguous one, the inner axis is: rows are collected in the tile, so that whole cache lines are written. Tiles of the same
// inner indices follow each other, so that the source rows of the next are near those of the last, whichever axis is which.
template <typename T>
INLINE void resize_rows_of(const T* box, const ResizeAxis& outer, const ResizeAxis& inner, const ResizeAxis& last,
                           int64_t box_last, int64_t size, float scale, int64_t begin, int64_t end, float* scratch,
                           float* out) {
  float *blended = scratch, *tile = scratch + box_last + RESIZE_MARGIN;
  const bool is_direct = last.output_stride == 1;
  const int64_t step = is_direct ? size : TILE;
  for (int64_t first = 0; first < size; first += step) {
    const int64_t count = std::min(step, size - first);
    for (int64_t a = begin; a < end; ++a) {
      const T* low_plane = box + outer.low[a] * outer.source_stride;
      const T* high_plane = box + outer.high[a] * outer.source_stride;
      const int64_t next = std::min(a + 1, end - 1);
      const T* next_low_plane = box + outer.low[next] * outer.source_stride;
      const T* next_high_plane = box + outer.high[next] * outer.source_stride;
      float* plane_out = out + a * outer.output_stride;
      for (int64_t b = 0; b < count; ++b) {
        const bool stays = b + AHEAD < count;  // in these planes; else the next planes' first rows
        const int64_t ahead = first + (stays ? b + AHEAD : std::min(b + AHEAD - count, count - 1));
        const int64_t low_row = inner.low[ahead] * inner.source_stride, high_row = inner.high[ahead] * inner.source_stride;
        const T *low = stays ? low_plane : next_low_plane, *high = stays ? high_plane : next_high_plane;
        prefetch(low + low_row, box_last);
        prefetch(low + high_row, box_last);
        prefetch(high + low_row, box_last);
        prefetch(high + high_row, box_last);
        blend_row(low_plane, high_plane, inner, first + b, outer.weight[a], scale, box_last, blended);
        blended[box_last] = blended[box_last - 1];  // the neighbour of the last voxel
        interpolate_row(blended, last, size, is_direct ? plane_out + b * inner.output_stride : tile + b * size);
      }
      if (!is_direct) write_columns(tile, size, count, size, last.output_stride, plane_out + first);
    }
  }
}

}  // namespace

void resize_rows(const int16_t* box, const ResizeAxis& outer, const ResizeAxis& inner, const ResizeAxis& last, int64_t box_last,
                 int64_t size, float scale, int64_t begin, int64_t end, float* scratch, float* out) {
  resize_rows_of(box, outer, inner, last, box_last, size, scale, begin, end, scratch, out);
}

void resize_rows(const float* box, const ResizeAxis& outer, const ResizeAxis& inner, const ResizeAxis& last, int64_t box_last,
                 int64_t size, float scale, int64_t begin, int64_t end, float* scratch, float* out) {
  resize_rows_of(box, outer, inner, last, box_last, size, scale, begin, end, scratch, out);
}

}  // namespace dinov2::KERNELS
