// Kernels are compiled twice, into namespaces `generic` and `avx2`; KERNEL(name, ...) calls the one that the processor can run.
#pragma once

#include <cstdlib>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define DINOV2_HAS_AVX2_KERNELS
#endif

namespace dinov2 {

#ifdef DINOV2_HAS_AVX2_KERNELS
inline bool has_avx2() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          std::getenv("DINOV2_GENERIC_KERNELS") == nullptr;  // set: what other processors run, for tests
  return has;
}
#define KERNEL(name, ...) (has_avx2() ? avx2::name(__VA_ARGS__) : generic::name(__VA_ARGS__))
#else
#define KERNEL(name, ...) generic::name(__VA_ARGS__)
#endif

}  // namespace dinov2
