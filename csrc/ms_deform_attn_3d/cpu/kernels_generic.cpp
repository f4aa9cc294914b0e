// The kernels for any processor.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.h"

#define KERNELS generic
#include "sampling.h"
