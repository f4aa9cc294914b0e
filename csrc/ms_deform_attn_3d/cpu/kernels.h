// The CPU kernels on plain memory, declared for two instruction sets; binding.cpp spreads their parts over threads.
#pragma once

#include "../../instruction_set.h"
#include "../trilinear.h"

namespace dinov2::msda {

// Contiguous operands, as Layout says. grad_output and out are [batch, queries, heads, channels].
template <typename T>
struct Operands {
  const T *value, *locations, *weights, *grad_output;
};

template <typename T>
struct Gradients {
  T *value, *locations, *weights;
};

// Heads and channels of each; first_channel is a multiple of CHANNEL_STEP, so that vectors do not depend on the sharing out.
struct Part {
  int64_t first_head, last_head, first_channel, last_channel;
};
constexpr int64_t CHANNEL_STEP = 8;

namespace generic {
#include "kernels.inc"
}
namespace avx2 {
#include "kernels.inc"
}

}  // namespace dinov2::msda
