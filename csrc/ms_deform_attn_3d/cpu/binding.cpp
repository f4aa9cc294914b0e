// The operators for torch on the CPU. Half precision is computed in float32. Results do not depend on the number of threads.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "kernels.h"

namespace dinov2::msda {
namespace {

constexpr int64_t GRAIN = 8192;  // points a thread takes at least

int64_t queries_each(const Layout& x) {
  return std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, x.heads * x.num_levels * x.points));
}

// As many parts as there are threads: ranges of heads; where these are too few, also ranges of channels.
std::vector<Part> divide(const Layout& x) {
  const int64_t wanted = (at::get_num_threads() + x.batch - 1) / x.batch, head_parts = std::min(wanted, x.heads);
  const int64_t steps = (x.channels + CHANNEL_STEP - 1) / CHANNEL_STEP;
  const int64_t channel_parts = std::min((wanted + head_parts - 1) / head_parts, steps);
  std::vector<Part> parts;
  for (int64_t i = 0; i < head_parts; ++i) {
    for (int64_t j = 0; j < channel_parts; ++j) {
      parts.push_back({i * x.heads / head_parts, (i + 1) * x.heads / head_parts, j * steps / channel_parts * CHANNEL_STEP,
                       std::min((j + 1) * steps / channel_parts * CHANNEL_STEP, x.channels)});
    }
  }
  return parts;
}

template <typename T>
void differentiate_all(const Layout& x, const Operands<T>& in, const Gradients<T>& out) {
  if (x.batch == 0) return;
  const std::vector<Part> parts = divide(x);
  const int64_t count = static_cast<int64_t>(parts.size());
  at::parallel_for(0, x.batch * count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) KERNEL(differentiate, x, in, task / count, parts[task % count], out);
  });
}

at::Tensor forward(const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& sampling_locations,
                   const at::Tensor& attention_weights) {
  const Layout x = check_arguments(value, spatial_shapes, sampling_locations, attention_weights);
  const at::ScalarType dtype = sampling_locations.scalar_type();
  const at::Tensor v = value.to(dtype).contiguous(), l = sampling_locations.contiguous(), w = attention_weights.contiguous();
  at::Tensor out = at::empty({x.batch, x.queries, x.heads * x.channels}, v.options());
  AT_DISPATCH_FLOATING_TYPES(dtype, "ms_deform_attn_3d", [&] {
    const Operands<scalar_t> in{v.const_data_ptr<scalar_t>(), l.const_data_ptr<scalar_t>(), w.const_data_ptr<scalar_t>(),
                                nullptr};
    scalar_t* sums = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, x.batch * x.queries, queries_each(x),
                     [&](int64_t begin, int64_t end) { KERNEL(sample, x, in, begin, end, sums); });
  });
  return out.to(value.scalar_type());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad_output, const at::Tensor& value,
                                                        at::IntArrayRef spatial_shapes, const at::Tensor& sampling_locations,
                                                        const at::Tensor& attention_weights) {
  const Layout x = check_arguments(value, spatial_shapes, sampling_locations, attention_weights);
  check_grad_output(grad_output, value, x);
  const at::ScalarType dtype = sampling_locations.scalar_type();
  const at::Tensor v = value.to(dtype).contiguous(), l = sampling_locations.contiguous(), w = attention_weights.contiguous();
  const at::Tensor g = grad_output.to(dtype).contiguous();
  const auto zeros = [](const at::Tensor& like) { return at::zeros_like(like, at::MemoryFormat::Contiguous); };
  at::Tensor grad_value = zeros(v), grad_locations = zeros(l), grad_weights = zeros(w);
  AT_DISPATCH_FLOATING_TYPES(dtype, "ms_deform_attn_3d_backward", [&] {
    const Operands<scalar_t> in{v.const_data_ptr<scalar_t>(), l.const_data_ptr<scalar_t>(), w.const_data_ptr<scalar_t>(),
                                g.const_data_ptr<scalar_t>()};
    const Gradients<scalar_t> out{grad_value.mutable_data_ptr<scalar_t>(), grad_locations.mutable_data_ptr<scalar_t>(),
                                  grad_weights.mutable_data_ptr<scalar_t>()};
    differentiate_all(x, in, out);
  });
  return {grad_value.to(value.scalar_type()), grad_locations, grad_weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(dinov2, CPU, m) {
  m.impl("ms_deform_attn_3d", &forward);
  m.impl("ms_deform_attn_3d_backward", &backward);
}

}  // namespace dinov2::msda
