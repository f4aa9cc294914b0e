// Runs what the lanes of the CUDA kernels do (csrc/ms_deform_attn_3d/cuda/lanes.h), lane by lane on the host, for a sanitizer
// to watch and the Python test to compare. Standard input: B S M C Q L P, then H W D of each level, then value, locations,
// weights and grad_output; standard output: out and the gradients of value, locations and weights, each on a line.

#include "cuda/lanes.h"

#include <cstdio>
#include <iostream>
#include <string>
#include <vector>

using dinov2::msda::Layout;

namespace {

struct HostGroup {
  void add(double* address, double x) const { *address += x; }
  void sum(double* address, double part) const { *address += part; }
};

std::vector<double> read(int64_t count) {
  std::vector<double> numbers(count);
  for (double& x : numbers) {
    std::string word;  // ">>" reads no nan
    std::cin >> word;
    x = std::stod(word);
  }
  return numbers;
}

void write(const std::vector<double>& numbers) {
  for (const double x : numbers) std::printf("%.17g ", x);
  std::printf("\n");
}

}  // namespace

int main() {
  Layout x{};
  std::cin >> x.batch >> x.rows >> x.heads >> x.channels >> x.queries >> x.num_levels >> x.points;
  int64_t start = 0;
  for (int64_t l = 0; l < x.num_levels; ++l) {
    auto& [size, first] = x.levels[l];
    std::cin >> size[0] >> size[1] >> size[2];
    first = start;
    start += size[0] * size[1] * size[2];
  }
  const int64_t items = x.batch * x.queries * x.heads, points = items * x.num_levels * x.points;
  const std::vector<double> value = read(x.batch * x.rows * x.heads * x.channels), locations = read(3 * points);
  const std::vector<double> weights = read(points), grad_output = read(items * x.channels);
  std::vector<double> out(grad_output.size(), -1.0), grad_value(value.size()), grad_locations(locations.size());
  std::vector<double> grad_weights(weights.size());
  const int64_t lanes = dinov2::msda::lanes_for(x.channels);
  for (int64_t thread = 0; thread < items * lanes; ++thread) {
    const int64_t item = thread / lanes, lane = thread % lanes;
    const dinov2::msda::LaneOperands<double, double> in{value.data(), grad_output.data(), locations.data(), weights.data()};
    dinov2::msda::sample_lane(x, in, item, lane, lanes, out.data());
    dinov2::msda::differentiate_lane(
        x, in, item, lane, lanes,
        dinov2::msda::LaneGradients<double>{grad_value.data(), grad_locations.data(), grad_weights.data()}, HostGroup{});
  }
  write(out);
  write(grad_value);
  write(grad_locations);
  write(grad_weights);
}
