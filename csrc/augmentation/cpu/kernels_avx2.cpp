// The same kernels compiled for x86 processors with AVX2 and FMA; binding.cpp asks the processor before it calls them.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#ifdef DINOV2_HAS_AVX2_KERNELS
#pragma GCC target("avx2,fma")  // after the standard headers: what others may share stays plain

#define KERNELS avx2
#define KERNELS_AVX2
#include "intensity.h"
#include "resize.h"
#include "smooth.h"
#endif
