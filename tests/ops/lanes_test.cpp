// Runs what the lanes of the CUDA kernels do (csrc/ms_deform_attn_3d/cuda/), lane by lane on the host, for a sanitizer to watch
// and the Python test to compare. Argument: 0 for lanes.h, or the queries of a run of vectors.h with channels by WIDTH.
// Standard input: B S M C Q L P, then H W D of each level, then value, locations, weights and grad_output; standard output: out
// and the gradients of value, locations and weights, each on a line.

#include <cstdio>
#include <iostream>
#include <string>
#include <vector>

#include "cuda/vectors.h"

using dinov2::msda::Layout;
using Operands = dinov2::msda::LaneOperands<double, double>;
using Gradients = dinov2::msda::LaneGradients<double>;

namespace {

struct HostGroup {
  void add(double* address, double x) const { *address += x; }
  void sum(double* address, double part) const { *address += part; }

  void sum(double* locations, double* weight, const double (&parts)[4], bool) const {  // what is written starts as zeros here
    for (int i = 0; i < 3; ++i) locations[i] += parts[i];
    *weight += parts[3];
  }

  template <int V>
  void add(double* address, const double (&x)[V]) const {
    ++additions;
    for (int v = 0; v < V; ++v) address[v] += x[v];
  }

  mutable int64_t additions = 0;
};

void run_lanes(const Layout& x, const Operands& in, double* out, const Gradients& gradients) {
  const int64_t items = x.batch * x.queries * x.heads, lanes = dinov2::msda::lanes_for(x.channels);
  for (int64_t thread = 0; thread < items * lanes; ++thread) {
    dinov2::msda::sample_lane(x, in, thread / lanes, thread % lanes, lanes, out);
    dinov2::msda::differentiate_lane(x, in, thread / lanes, thread % lanes, lanes, gradients, HostGroup{});
  }
}

void run_vectors(const Layout& x, const Operands& in, int64_t run, double* out, const Gradients& gradients) {
  const int64_t lanes = dinov2::msda::lanes_for((x.channels + WIDTH - 1) / WIDTH);
  const HostGroup group;
  for (int64_t head = 0; head < x.batch * x.heads * lanes; ++head) {
    const int64_t lane = head % lanes;
    const dinov2::msda::Head at{head / lanes / x.heads, head / lanes % x.heads};
    for (int64_t q = 0; q < x.queries; ++q) dinov2::msda::sample_query<WIDTH>(x, in, at, q, lane, lanes, out);
    for (int64_t q = 0; q < x.queries; q += run) {
      const int64_t count = x.queries - q < run ? x.queries - q : run;
      dinov2::msda::differentiate_run<WIDTH>(x, in, at, q, count, lane, lanes, gradients, group);
    }
  }
  std::fprintf(stderr, "%lld", static_cast<long long>(group.additions / lanes));
}

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

int main(int, char** argv) {
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
  const Operands in{value.data(), grad_output.data(), locations.data(), weights.data()};
  const Gradients gradients{grad_value.data(), grad_locations.data(), grad_weights.data()};
  if (const int64_t run = std::stoll(argv[1])) {
    run_vectors(x, in, run, out.data(), gradients);
  } else {
    run_lanes(x, in, out.data(), gradients);
  }
  write(out);
  write(grad_value);
  write(grad_locations);
  write(grad_weights);
}
