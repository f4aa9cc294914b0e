// Deformable attention on the CPU: the corners of up to GROUP points are listed first (trilinear.h), then all channels of a
// head go through the list, in vectors of 32 bytes. Where values are many, the backward pass takes a head after the other and
// copies its rows side by side: an eighth of the memory at a time, and of its pages.
#pragma once

#define INLINE inline __attribute__((always_inline))

namespace dinov2::msda::KERNELS {

namespace {

constexpr int64_t GROUP = 16;
constexpr int64_t CACHE_LINE = 64;   // bytes
constexpr int64_t PACKED_FROM = 4;   // uses of a row on average, from which copying a head's rows costs less than it saves
constexpr int64_t CACHED = 2 << 20;  // bytes of values and their gradients that stay in a core's caches anyway

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(32)));
  static constexpr int64_t LANES = 32 / sizeof(T);
};
template <typename T>
using V = typename Vector<T>::type;

template <typename T>
INLINE V<T> load(const T* p) {
  V<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <typename T>
INLINE void store(T* p, V<T> v) {
  std::memcpy(p, &v, sizeof v);
}

// Sums over the lanes of each of eight vectors.
INLINE void sum_lanes(const V<float> x[8], float sums[8]) {
  typedef int32_t I8 __attribute__((vector_size(32)));
  const I8 even = {0, 2, 8, 10, 4, 6, 12, 14}, odd = {1, 3, 9, 11, 5, 7, 13, 15};  // within 128 bits: one instruction each
  const I8 low = {0, 1, 2, 3, 8, 9, 10, 11}, high = {4, 5, 6, 7, 12, 13, 14, 15};
  V<float> pairs[4], fours[2];
  for (int i = 0; i < 4; ++i) {
    pairs[i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], even) + __builtin_shuffle(x[2 * i], x[2 * i + 1], odd);
  }
  for (int i = 0; i < 2; ++i) {
    fours[i] = __builtin_shuffle(pairs[2 * i], pairs[2 * i + 1], even) + __builtin_shuffle(pairs[2 * i], pairs[2 * i + 1], odd);
  }
  store(sums, __builtin_shuffle(fours[0], fours[1], low) + __builtin_shuffle(fours[0], fours[1], high));
}
INLINE void sum_lanes(const V<double> x[8], double sums[8]) {
  for (int i = 0; i < 8; ++i) sums[i] = (x[i][0] + x[i][1]) + (x[i][2] + x[i][3]);
}

template <typename T>
struct Corner {
  int64_t offset;  // in elements, from the head's first voxel
  T weight;
};

// The part of the operands that one query and head sees.
template <typename T>
struct Item {
  const T *value, *locations, *weights, *grad_output;
  int64_t points, row_stride;

  // With the head's rows as they lie in the operand, or as they were copied.
  INLINE Item(const Layout& x, const Operands<T>& in, int64_t query, int64_t head, const T* copied = nullptr)
      : points(x.num_levels * x.points), row_stride(copied ? x.channels : x.heads * x.channels) {
    const int64_t item = query * x.heads + head;
    value = copied ? copied : in.value + (query / x.queries * x.rows * x.heads + head) * x.channels;
    locations = in.locations + item * points * 3;
    weights = in.weights + item * points;
    grad_output = in.grad_output + item * x.channels;
  }
};

// Up to GROUP points that lie inside: which, where, and their corners one after another.
template <typename T>
struct Located {
  int64_t count = 0, point[GROUP];
  Cell<T> cells[GROUP];
  Corner<T> corners[8 * GROUP];

  // Of the points [begin, end). What will be read, and where given written, is asked for ahead of its use: the volumes do not
  // fit in a core's cache.
  INLINE Located(const Layout& x, const Item<T>& item, int64_t begin, int64_t end, const T* written) {
    for (int64_t p = begin; p < end; ++p) {
      const Level& level = x.levels[p / x.points];
      Cell<T>& cell = cells[count];
      if (!locate(level, item.locations + 3 * p, &cell)) continue;
      int64_t offsets[8];
      T weights[8];
      corner_offsets(level, cell, item.row_stride, offsets);
      corner_weights(cell, item.weights[p], weights);
      for (int k = 0; k < 8; ++k) {
        corners[8 * count + k] = {offsets[k], weights[k]};
        for (int64_t c = 0; c < x.channels; c += CACHE_LINE / sizeof(T)) {
          __builtin_prefetch(item.value + offsets[k] + c);
          if (written) __builtin_prefetch(written + offsets[k] + c, 1);
        }
      }
      point[count++] = p;
    }
  }
};

template <typename T, int N>
INLINE void gather_vectors(const T* value, const Corner<T>* corners, int64_t n, T* out) {
  constexpr int64_t LANES = Vector<T>::LANES;
  V<T> sums[N];
  for (int j = 0; j < N; ++j) sums[j] = load(out + j * LANES);
  for (int64_t i = 0; i < n; ++i) {
    const T* row = value + corners[i].offset;
    for (int j = 0; j < N; ++j) sums[j] += corners[i].weight * load(row + j * LANES);
  }
  for (int j = 0; j < N; ++j) store(out + j * LANES, sums[j]);
}

template <typename T, int N>
INLINE void scatter_vectors(const T* grad_output, const Corner<T>* corners, int64_t n, T* grad_value) {
  constexpr int64_t LANES = Vector<T>::LANES;
  V<T> grads[N];
  for (int j = 0; j < N; ++j) grads[j] = load(grad_output + j * LANES);
  for (int64_t i = 0; i < n; ++i) {
    T* row = grad_value + corners[i].offset;
    for (int j = 0; j < N; ++j) store(row + j * LANES, load(row + j * LANES) + corners[i].weight * grads[j]);
  }
}

// out[c] += sum of weight * value over the corners.
template <typename T>
INLINE void gather(const T* value, const Corner<T>* corners, int64_t n, int64_t channels, T* out) {
  constexpr int64_t LANES = Vector<T>::LANES;
  int64_t c = 0;
  for (; c + 4 * LANES <= channels; c += 4 * LANES) gather_vectors<T, 4>(value + c, corners, n, out + c);
  for (; c + LANES <= channels; c += LANES) gather_vectors<T, 1>(value + c, corners, n, out + c);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = c; j < channels; ++j) out[j] += corners[i].weight * value[corners[i].offset + j];
  }
}

// value[c] += weight * grad_output[c] at every corner.
template <typename T>
INLINE void add_back(const T* grad_output, const Corner<T>* corners, int64_t n, int64_t channels, T* grad_value) {
  constexpr int64_t LANES = Vector<T>::LANES;
  int64_t c = 0;
  for (; c + 4 * LANES <= channels; c += 4 * LANES) scatter_vectors<T, 4>(grad_output + c, corners, n, grad_value + c);
  for (; c + LANES <= channels; c += LANES) scatter_vectors<T, 1>(grad_output + c, corners, n, grad_value + c);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = c; j < channels; ++j) grad_value[corners[i].offset + j] += corners[i].weight * grad_output[j];
  }
}

// Products of grad_output with the values at eight corners.
template <typename T>
INLINE void corner_products(const Item<T>& item, const Corner<T> corners[8], int64_t channels, T products[8]) {
  constexpr int64_t LANES = Vector<T>::LANES;
  V<T> sums[8] = {};
  int64_t c = 0;
  for (; c + LANES <= channels; c += LANES) {
    const V<T> grad = load(item.grad_output + c);
    for (int k = 0; k < 8; ++k) sums[k] += grad * load(item.value + corners[k].offset + c);
  }
  sum_lanes(sums, products);
  for (int k = 0; k < 8; ++k) {
    for (int64_t j = c; j < channels; ++j) products[k] += item.grad_output[j] * item.value[corners[k].offset + j];
  }
}

// Gradients of locations and weights; `out` points at those of the item's first point.
template <typename T>
INLINE void differentiate(const Layout& x, const Item<T>& item, const Located<T>& located, const Gradients<T>& out) {
  for (int64_t i = 0; i < located.count; ++i) {
    const int64_t p = located.point[i];
    T products[8], gradient[3];
    corner_products(item, located.corners + 8 * i, x.channels, products);
    out.weights[p] = interpolate(x.levels[p / x.points], located.cells[i], products, gradient);
    for (int axis = 0; axis < 3; ++axis) out.locations[3 * p + axis] = item.weights[p] * gradient[axis];
  }
}

// All gradients by the points of one query and head; `grad_value` is laid out as the item's values.
template <typename T>
INLINE void add_item(const Layout& x, const Item<T>& item, int64_t query, int64_t head, const Part& part,
                     const Gradients<T>& out, T* grad_value) {
  const int64_t point = (query * x.heads + head) * item.points, first = part.first_channel;
  for (int64_t p = 0; p < item.points; p += GROUP) {
    const Located<T> located(x, item, p, std::min(p + GROUP, item.points), grad_value + first);
    if (first == 0) differentiate(x, item, located, {nullptr, out.locations + 3 * point, out.weights + point});
    add_back(item.grad_output + first, located.corners, 8 * located.count, part.last_channel - first, grad_value + first);
  }
}

}  // namespace

template <typename T>
void sample(const Layout& x, const Operands<T>& in, int64_t begin, int64_t end, T* out) {
  std::fill(out + begin * x.heads * x.channels, out + end * x.heads * x.channels, T(0));
  for (int64_t query = begin; query < end; ++query) {
    for (int64_t head = 0; head < x.heads; ++head) {
      const Item<T> item(x, in, query, head);
      T* sums = out + (query * x.heads + head) * x.channels;
      for (int64_t p = 0; p < item.points; p += GROUP) {
        const Located<T> located(x, item, p, std::min(p + GROUP, item.points), nullptr);
        gather(item.value, located.corners, 8 * located.count, x.channels, sums);
      }
    }
  }
}

template <typename T>
void differentiate(const Layout& x, const Operands<T>& in, int64_t volume, const Part& part, const Gradients<T>& out) {
  const int64_t stride = x.heads * x.channels, start = volume * x.rows * stride;
  const int64_t first_query = volume * x.queries, last_query = first_query + x.queries;
  const bool is_large = 2 * x.rows * stride * static_cast<int64_t>(sizeof(T)) > CACHED;
  if (!is_large || x.queries * x.num_levels * x.points * 8 < PACKED_FROM * x.rows) {
    for (int64_t query = first_query; query < last_query; ++query) {
      for (int64_t head = part.first_head; head < part.last_head; ++head) {
        add_item(x, Item<T>(x, in, query, head), query, head, part, out, out.value + start + head * x.channels);
      }
    }
    return;
  }
  const int64_t first = part.first_channel, channels = part.last_channel - first;
  std::vector<T> rows(x.rows * x.channels), sums(rows.size());  // of a head: values, gradients
  for (int64_t head = part.first_head; head < part.last_head; ++head) {
    const int64_t offset = start + head * x.channels;
    for (int64_t r = 0; r < x.rows; ++r) std::copy_n(in.value + offset + r * stride, x.channels, &rows[r * x.channels]);
    std::fill(sums.begin(), sums.end(), T(0));
    for (int64_t query = first_query; query < last_query; ++query) {
      add_item(x, Item<T>(x, in, query, head, rows.data()), query, head, part, out, sums.data());
    }
    for (int64_t r = 0; r < x.rows; ++r) {
      std::copy_n(&sums[r * x.channels + first], channels, out.value + offset + r * stride + first);
    }
  }
}

template void sample(const Layout&, const Operands<float>&, int64_t, int64_t, float*);
template void sample(const Layout&, const Operands<double>&, int64_t, int64_t, double*);
template void differentiate(const Layout&, const Operands<float>&, int64_t, const Part&, const Gradients<float>&);
template void differentiate(const Layout&, const Operands<double>&, int64_t, const Part&, const Gradients<double>&);

}  // namespace dinov2::msda::KERNELS
