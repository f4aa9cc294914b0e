// Eight floats at a time, in plain C++: the compiler turns them into AVX2, SSE or NEON instructions.
#pragma once

#define INLINE inline __attribute__((always_inline))

namespace dinov2::KERNELS {

constexpr int64_t LANES = 8;
typedef float F8 __attribute__((vector_size(32)));
typedef int16_t S8 __attribute__((vector_size(16)));
typedef int32_t I8 __attribute__((vector_size(32)));
typedef uint32_t U8 __attribute__((vector_size(32)));
typedef uint64_t U4 __attribute__((vector_size(32)));

INLINE F8 load(const float* p) {
  F8 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
INLINE void store(float* p, F8 v) { std::memcpy(p, &v, sizeof v); }
INLINE F8 splat(float x) { return F8{x, x, x, x, x, x, x, x}; }
INLINE F8 as_float(I8 v) { return reinterpret_cast<F8>(v); }
INLINE I8 as_int(F8 v) { return reinterpret_cast<I8>(v); }
INLINE F8 min8(F8 a, F8 b) { return a < b ? a : b; }
INLINE F8 max8(F8 a, F8 b) { return a > b ? a : b; }

// Rows to columns.
INLINE void transpose8(F8 r[LANES]) {
  const I8 low1 = {0, 8, 1, 9, 4, 12, 5, 13}, high1 = {2, 10, 3, 11, 6, 14, 7, 15};
  const I8 low2 = {0, 1, 8, 9, 4, 5, 12, 13}, high2 = {2, 3, 10, 11, 6, 7, 14, 15};
  const I8 low3 = {0, 1, 2, 3, 8, 9, 10, 11}, high3 = {4, 5, 6, 7, 12, 13, 14, 15};
  F8 s[LANES], t[LANES];
  for (int64_t j = 0; j < 4; ++j) {
    s[2 * j] = __builtin_shuffle(r[2 * j], r[2 * j + 1], low1);
    s[2 * j + 1] = __builtin_shuffle(r[2 * j], r[2 * j + 1], high1);
  }
  for (int64_t j = 0; j < 2; ++j) {
    t[4 * j] = __builtin_shuffle(s[4 * j], s[4 * j + 2], low2);
    t[4 * j + 1] = __builtin_shuffle(s[4 * j], s[4 * j + 2], high2);
    t[4 * j + 2] = __builtin_shuffle(s[4 * j + 1], s[4 * j + 3], low2);
    t[4 * j + 3] = __builtin_shuffle(s[4 * j + 1], s[4 * j + 3], high2);
  }
  for (int64_t j = 0; j < 4; ++j) {
    r[j] = __builtin_shuffle(t[j], t[j + 4], low3);
    r[j + 4] = __builtin_shuffle(t[j], t[j + 4], high3);
  }
}

// The 64-bit products of the even lanes of a and b, and square roots: the two that GCC finds no instruction for by itself.
#ifdef KERNELS_AVX2
INLINE U4 multiply_even(U8 a, U8 b) {
  return reinterpret_cast<U4>(__builtin_ia32_pmuludq256(reinterpret_cast<I8>(a), reinterpret_cast<I8>(b)));
}
INLINE F8 sqrt8(F8 x) { return __builtin_ia32_sqrtps256(x); }
#else
INLINE U4 multiply_even(U8 a, U8 b) {
  return (reinterpret_cast<U4>(a) & 0xffffffffull) * (reinterpret_cast<U4>(b) & 0xffffffffull);
}
INLINE F8 sqrt8(F8 x) {
  for (int64_t l = 0; l < LANES; ++l) x[l] = __builtin_sqrtf(x[l]);
  return x;
}
#endif

// log2 of positive normal numbers: exponent + 2 atanh((m-1)/(m+1)) / ln 2 with m in [sqrt(1/2), sqrt(2)), five terms.
INLINE F8 log2_8(F8 x) {
  const I8 bits = as_int(x) - 0x3f3504f3;  // sqrt(1/2), so that the mantissa is centred on 1
  const I8 exponent = bits >> 23;
  const F8 m = as_float((bits & 0x007fffff) + 0x3f3504f3);
  const F8 z = (m - 1.0f) / (m + 1.0f), zz = z * z;
  const F8 series = z * (1.0f + zz * (1.0f / 3 + zz * (1.0f / 5 + zz * (1.0f / 7 + zz * (1.0f / 9)))));
  return __builtin_convertvector(exponent, F8) + series * 2.8853900818f;  // 2 / ln 2
}

// 2^x for x <= 0 (below -126: 0): Taylor series of the fraction in [-1/2, 1/2], the whole part as exponent.
INLINE F8 exp2_8(F8 x) {
  const F8 kept = max8(x, splat(-126.0f));
  const F8 whole = (kept + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: rounds to the nearest whole number
  const F8 y = (kept - whole) * 0.6931471806f;
  const F8 high = 1.0f / 24 + y * (1.0f / 120 + y * (1.0f / 720 + y * (1.0f / 5040)));
  const F8 power = 1.0f + y * (1.0f + y * (1.0f / 2 + y * (1.0f / 6 + y * high)));
  const I8 exponent = (__builtin_convertvector(whole, I8) + 127) << 23;
  return x < -126.0f ? splat(0.0f) : power * as_float(exponent);
}

// sin and cos of pi * x for x in [-1/2, 1/2], Taylor series to the eleventh and twelfth power.
INLINE void sincospi_8(F8 x, F8* sine, F8* cosine) {
  const F8 y = x * 3.1415926536f, q = y * y;
  const F8 odd = 1.0f / 120 - q * (1.0f / 5040 - q * (1.0f / 362880 - q * (1.0f / 39916800)));
  const F8 even = 1.0f / 24 - q * (1.0f / 720 - q * (1.0f / 40320 - q * (1.0f / 3628800 - q * (1.0f / 479001600))));
  *sine = y * (1.0f - q * (1.0f / 6 - q * odd));
  *cosine = 1.0f - q * (1.0f / 2 - q * even);
}

}  // namespace dinov2::KERNELS
