// The augmentation operators for torch on the CPU: checks and threads.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <vector>

#include "../../instruction_set.h"
#include "kernels.h"

namespace dinov2 {
namespace {

constexpr int64_t GRAIN = 65536;  // voxels a thread takes at least
static_assert(GRAIN % NOISE_GROUP == 0, "noise parts start at whole groups");

struct ResizeTable {
  std::vector<int32_t> low, high;
  std::vector<float> weight;
  int64_t source_stride, output_stride;

  ResizeAxis axis() const {
    bool is_dense = true;
    for (size_t i = 0; i + 8 <= low.size(); i += 8) is_dense = is_dense && std::abs(low[i + 7] - low[i]) < 16;
    return {low.data(), high.data(), weight.data(), source_stride, output_stride, is_dense};
  }
};

// align_corners=False, as torch's interpolate.
ResizeTable make_table(int64_t box_size, int64_t size, bool flipped, int64_t source_stride, int64_t output_stride) {
  ResizeTable table{{}, {}, {}, source_stride, output_stride};
  const float scale = static_cast<float>(box_size) / static_cast<float>(size);
  for (int64_t i = 0; i < size; ++i) {
    const int64_t k = flipped ? size - 1 - i : i;
    const float place = std::max((k + 0.5f) * scale - 0.5f, 0.0f);
    const int64_t low = std::min(static_cast<int64_t>(place), box_size - 1);
    table.low.push_back(static_cast<int32_t>(low));
    table.high.push_back(static_cast<int32_t>(std::min(low + 1, box_size - 1)));
    table.weight.push_back(std::min(std::max(place - static_cast<float>(low), 0.0f), 1.0f));
  }
  return table;
}

// The integral of a Gaussian over each voxel, cut at four standard deviations (MONAI's "erf" kernel).
std::vector<float> gaussian(double sigma) {
  const float s = static_cast<float>(sigma), t = 0.70710678f / s;
  const int64_t tail = static_cast<int64_t>(std::max(s * 4.0f, 0.5f) + 0.5f);
  std::vector<float> weights;
  for (int64_t k = 0; k <= tail; ++k) {
    weights.push_back(std::max(0.5f * (std::erf(t * (k + 0.5f)) - std::erf(t * (k - 0.5f))), 0.0f));
  }
  return weights;
}

void check_crop(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.size(0) == 1 && x.numel() > 0, "crop must be [1, H, W, D], got ", x.sizes());
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat, "crop must be float32, got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.is_contiguous(), "crop must be contiguous, its strides are ", x.strides());
}

// Calls body(pointer, first voxel, count) for parts of a crop.
template <typename Body>
void for_parts(const at::Tensor& x, const Body& body) {
  float* data = x.data_ptr<float>();
  const int64_t n = x.numel();
  at::parallel_for(0, (n + GRAIN - 1) / GRAIN, 1, [&](int64_t first, int64_t last) {
    const int64_t begin = first * GRAIN, end = std::min(n, last * GRAIN);
    body(data + begin, begin, end - begin);
  });
}

std::pair<float, float> range_of(const at::Tensor& x) {
  const int64_t parts = (x.numel() + GRAIN - 1) / GRAIN;
  const float inf = std::numeric_limits<float>::infinity();
  std::vector<float> low(parts, inf), high(parts, -inf);
  for_parts(
      x, [&](float* part, int64_t begin, int64_t n) { KERNEL(min_max, part, n, &low[begin / GRAIN], &high[begin / GRAIN]); });
  return {*std::min_element(low.begin(), low.end()), *std::max_element(high.begin(), high.end())};
}

at::Tensor crop_resize(const at::Tensor& volume, at::IntArrayRef start, at::IntArrayRef stop, int64_t size,
                       at::IntArrayRef source_axes, at::IntArrayRef flipped, double scale) {
  TORCH_CHECK_VALUE(volume.dim() == 4 && volume.size(0) == 1, "volume must be [1, H, W, D], got ", volume.sizes());
  const bool is_i16 = volume.scalar_type() == at::kShort;
  TORCH_CHECK_VALUE(is_i16 || volume.scalar_type() == at::kFloat, "volume must be int16 or float32, got ",
                    volume.scalar_type());
  TORCH_CHECK_VALUE(volume.stride(3) == 1, "volume's last axis must be contiguous, its strides are ", volume.strides());
  TORCH_CHECK_VALUE(start.size() == 3 && stop.size() == 3 && source_axes.size() == 3 && flipped.size() == 3,
                    "start, stop, source_axes and flipped must have three numbers each");
  TORCH_CHECK_VALUE(size >= 1, "size must be at least 1, got ", size);
  const std::array<int64_t, 3> output_strides{size * size, size, 1};
  std::array<bool, 3> seen{};
  std::array<ResizeTable, 3> tables;  // by source axis
  for (int64_t i = 0; i < 3; ++i) {
    const int64_t s = source_axes[i];
    TORCH_CHECK_VALUE(s >= 0 && s < 3 && !seen[s], "source_axes must be a permutation of 0, 1, 2, got ", source_axes);
    seen[s] = true;
    TORCH_CHECK_VALUE(0 <= start[s] && start[s] < stop[s] && stop[s] <= volume.size(s + 1), "box from ", start, " to ", stop,
                      " is empty or leaves the volume ", volume.sizes());
    tables[s] = make_table(stop[s] - start[s], size, flipped[i] != 0, volume.stride(s + 1), output_strides[i]);
  }
  at::Tensor out = at::empty({1, size, size, size}, volume.options().dtype(at::kFloat));
  // the axis whose outputs are neighbours in memory runs inside, so that written cache lines are filled before they leave
  const bool swap = tables[0].output_stride == 1;
  const ResizeAxis outer = tables[swap ? 1 : 0].axis(), inner = tables[swap ? 0 : 1].axis(), last = tables[2].axis();
  const int64_t box_last = stop[2] - start[2];
  const int64_t first = start[0] * volume.stride(1) + start[1] * volume.stride(2) + start[2];
  const auto resize = [&](const auto* voxels) {
    at::parallel_for(0, size, std::max<int64_t>(1, GRAIN / (size * size)), [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(box_last + RESIZE_MARGIN + TILE * size);
      KERNEL(resize_rows, voxels + first, outer, inner, last, box_last, size, static_cast<float>(scale), begin, end,
             scratch.data(), out.data_ptr<float>());
    });
  };
  if (is_i16) {
    resize(volume.const_data_ptr<int16_t>());
  } else {
    resize(volume.const_data_ptr<float>());
  }
  return out;
}

void adjust_gamma_(at::Tensor& x, double gamma) {
  check_crop(x);
  TORCH_CHECK_VALUE(gamma > 0, "gamma must be positive, got ", gamma);
  const auto range = range_of(x);
  for_parts(x, [&](float* part, int64_t, int64_t n) {
    KERNEL(adjust_gamma, part, n, range.first, range.second, static_cast<float>(gamma));
  });
}

void shift_histogram_(at::Tensor& x, at::ArrayRef<double> points) {
  check_crop(x);
  TORCH_CHECK_VALUE(points.size() >= 2, "points must have at least 2 numbers, got ", points.size());
  const auto range = range_of(x);
  if (!(range.second > range.first)) return;
  const double extent = static_cast<double>(range.second) - range.first;
  const int64_t segments = static_cast<int64_t>(points.size()) - 1;
  std::vector<float> rises(segments);
  for (int64_t i = 0; i < segments; ++i) rises[i] = static_cast<float>((points[i + 1] - points[i]) * extent);
  const float first = static_cast<float>(range.first + points[0] * extent),
              segments_per_unit = static_cast<float>(segments / extent);
  for_parts(x, [&](float* part, int64_t, int64_t n) {
    KERNEL(add_ramps, part, n, range.first, segments_per_unit, first, rises.data(), segments);
  });
}

void add_gaussian_noise_(at::Tensor& x, double std, int64_t seed) {
  check_crop(x);
  for_parts(x, [&](float* part, int64_t begin, int64_t n) {
    KERNEL(add_gaussian_noise, part, begin, n, static_cast<float>(std), static_cast<uint64_t>(seed));
  });
}

// x smoothed; or, with alpha, x + alpha (x - x smoothed).
void smooth(at::Tensor& x, at::ArrayRef<double> sigma, const double* alpha) {
  check_crop(x);
  TORCH_CHECK_VALUE(sigma.size() == 3, "sigma must have three numbers (voxels), got ", sigma.size());
  for (const double s : sigma) TORCH_CHECK_VALUE(s > 0, "sigma must be positive, got ", sigma);
  const CropLayout layout(x.size(1), x.size(2), x.size(3));
  const std::vector<float> gaussians[3] = {gaussian(sigma[0]), gaussian(sigma[1]), gaussian(sigma[2])};
  const auto weights = [&](int axis) {
    return Weights{gaussians[axis].data(), static_cast<int64_t>(gaussians[axis].size()) - 1};
  };
  const int64_t margin = weights(0).tail * layout.plane;
  at::Tensor buffer = at::empty({layout.height * layout.plane + 2 * margin}, x.options());
  buffer.narrow(0, 0, margin).zero_();
  buffer.narrow(0, buffer.size(0) - margin, margin).zero_();
  float *planes = buffer.data_ptr<float>() + margin, *data = x.data_ptr<float>();
  at::parallel_for(0, layout.height, std::max<int64_t>(1, GRAIN / layout.plane), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(layout.scratch_size(weights(1), weights(2)), 0.0f);
    KERNEL(smooth_planes, data, layout, weights(1), weights(2), begin, end, scratch.data(), planes);
  });
  const int64_t rows_each = std::max<int64_t>(1, GRAIN / (layout.height * layout.row));
  const float* blurred = alpha ? data : nullptr;
  const float strength = alpha ? static_cast<float>(*alpha) : 0.0f;
  at::parallel_for(0, layout.width, rows_each, [&](int64_t begin, int64_t end) {
    std::vector<float> result(layout.row);
    KERNEL(smooth_across, planes, layout, weights(0), begin, end, blurred, strength, result.data(), data);
  });
}

void gaussian_smooth_(at::Tensor& x, at::ArrayRef<double> sigma) { smooth(x, sigma, nullptr); }

void gaussian_sharpen_(at::Tensor& x, at::ArrayRef<double> sigma1, at::ArrayRef<double> sigma2, double alpha) {
  smooth(x, sigma1, nullptr);
  smooth(x, sigma2, &alpha);
}

}  // namespace

TORCH_LIBRARY_IMPL(dinov2, CPU, m) {
  m.impl("crop_resize", &crop_resize);
  m.impl("adjust_gamma_", &adjust_gamma_);
  m.impl("shift_histogram_", &shift_histogram_);
  m.impl("add_gaussian_noise_", &add_gaussian_noise_);
  m.impl("gaussian_smooth_", &gaussian_smooth_);
  m.impl("gaussian_sharpen_", &gaussian_sharpen_);
}

}  // namespace dinov2
