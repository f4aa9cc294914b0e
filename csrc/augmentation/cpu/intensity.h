// Gamma, histogram shift and noise, in place, eight voxels at a time; the last voxels of a part go through a padded copy.

#pragma once

#include "simd.h"

namespace dinov2::KERNELS {
namespace {

INLINE F8 load_some(const float* p, int64_t n) {  // n < LANES; the rest repeats the last
  F8 v = splat(p[n - 1]);
  std::memcpy(&v, p, n * sizeof(float));
  return v;
}

// x[i] = f(x[i]) for n voxels
template <typename Function>
INLINE void map(float* x, int64_t n, const Function& f) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(x + i, f(load(x + i)));
  if (i < n) {
    const F8 v = f(load_some(x + i, n - i));
    std::memcpy(x + i, &v, (n - i) * sizeof(float));
  }
}

// The high and low words of a * b, lane by lane, through 64-bit products of the even and the odd lanes.
INLINE void multiply(uint32_t a, U8 b, U8* high, U8* low) {
  const U8 factor = U8{} + a, odd = reinterpret_cast<U8>(reinterpret_cast<U4>(b) >> 32);
  const U4 p = multiply_even(factor, b), q = multiply_even(factor, odd);
  *low = reinterpret_cast<U8>((p & 0xffffffffull) | (q << 32));
  *high = reinterpret_cast<U8>((p >> 32) | (q & 0xffffffff00000000ull));
}

// Philox 4x32, ten rounds, of eight counters (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
INLINE void philox(uint64_t first_counter, uint64_t seed, U8 words[4]) {
  U8 c0, c1, c2 = {}, c3 = {};
  for (int64_t l = 0; l < LANES; ++l) {
    c0[l] = static_cast<uint32_t>(first_counter + l);
    c1[l] = static_cast<uint32_t>((first_counter + l) >> 32);
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    U8 high0, low0, high2, low2;
    multiply(0xD2511F53u, c0, &high0, &low0);
    multiply(0xCD9E8D57u, c2, &high2, &low2);
    c0 = high2 ^ c1 ^ k0;
    c1 = low2;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// Two words each to two normal numbers (Box-Muller).
INLINE void two_normals(U8 a, U8 b, F8* x, F8* y) {
  const F8 u = (__builtin_convertvector(reinterpret_cast<I8>(a >> 8), F8) + 1.0f) * 5.9604645e-08f;  // (0, 1], steps of 2^-24
  const F8 v = __builtin_convertvector(reinterpret_cast<I8>(b >> 8), F8) * 5.9604645e-08f - 0.5f;    // [-1/2, 1/2)
  const F8 square = max8(log2_8(u) * -1.3862943611f, splat(0.0f));                                   // -2 ln u
  const F8 radius = sqrt8(square);
  F8 sine, cosine;
  sincospi_8(v, &sine, &cosine);
  *x = radius * (cosine * cosine - sine * sine);  // the angle is 2 pi v
  *y = radius * (2.0f * sine * cosine);
}

}  // namespace

void min_max(const float* x, int64_t n, float* low, float* high) {
  F8 a = splat(*low), b = splat(*high);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const F8 v = load(x + i);
    a = min8(v, a);  // in this order a NaN does not replace what was found
    b = max8(v, b);
  }
  if (i < n) {
    const F8 v = load_some(x + i, n - i);
    a = min8(v, a);
    b = max8(v, b);
  }
  for (int64_t l = 0; l < LANES; ++l) {
    *low = std::min(*low, a[l]);
    *high = std::max(*high, b[l]);
  }
}

void adjust_gamma(float* x, int64_t n, float low, float high, float gamma) {
  const float range = high - low, inverse = 1.0f / (range + 1e-7f);
  const F8 zero = splat(0.0f), tiny = splat(1.1754944e-38f);
  map(x, n, [=](F8 v) __attribute__((always_inline)) {
    const F8 t = (v - low) * inverse;
    const F8 power = exp2_8(log2_8(max8(t, tiny)) * gamma);
    return (t > 0.0f ? power : zero) * range + low;
  });
}

void add_ramps(float* x, int64_t n, float low, float segments_per_unit, float first, const float* rises, int64_t num_rises) {
  const F8 zero = splat(0.0f), one = splat(1.0f);
  map(x, n, [=](F8 v) __attribute__((always_inline)) {
    const F8 u = (v - low) * segments_per_unit;
    F8 sum = splat(first);
    for (int64_t k = 0; k < num_rises; ++k) sum += rises[k] * max8(min8(u - static_cast<float>(k), one), zero);
    return sum;
  });
}

void add_gaussian_noise(float* x, int64_t begin, int64_t n, float std, uint64_t seed) {
  for (int64_t i = 0; i < n; i += NOISE_GROUP) {
    U8 words[4];
    philox(static_cast<uint64_t>((begin + i) / 4), seed, words);
    F8 normal[4];
    two_normals(words[0], words[1], &normal[0], &normal[1]);
    two_normals(words[2], words[3], &normal[2], &normal[3]);
    for (int64_t part = 0; part < 4 && i + part * LANES < n; ++part) {
      float* at = x + i + part * LANES;
      const F8 noise = std * normal[part];
      map(at, std::min(LANES, n - i - part * LANES), [=](F8 v) __attribute__((always_inline)) { return v + noise; });
    }
  }
}

}  // namespace dinov2::KERNELS
