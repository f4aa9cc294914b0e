// The same kernels compiled for x86 processors with AVX2 and FMA; binding.cpp asks the processor before it calls them.

#include <math.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../../instruction_set.h"

#ifdef DINOV2_HAS_AVX2_KERNELS
#pragma GCC target("avx2,fma")  // after the standard headers: what others may share stays plain

#include "kernels.h"

#define KERNELS avx2
#include "sampling.h"
#endif
