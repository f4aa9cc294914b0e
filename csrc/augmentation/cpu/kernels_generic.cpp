// The kernels for any processor.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#define KERNELS generic
#include "intensity.h"
#include "resize.h"
#include "smooth.h"
