// Projected gradient steps on the simplex: w <- the nearest point of the simplex to w - lr v, where
//   v <- momentum v + scale A (w + pull) + ridge w,    v = 0 at first,
// n times; the weights keep their sum. A is the Gramian, or the products of the gradients on one batch of data with
// those on another: the Gramian of B T rows then has the T tasks on the first batch first, then those on the second.
//
// The projection is max(x - tau, 0): tau from all that exceed a lower bound of it, until none of those falls below it,
// which needs no sorting. Michelot: A Finite Algorithm for Finding the Projection of a Point onto the Canonical Simplex
// of R^n. Journal of Optimization Theory and Applications 50, 1986. A pass costs T operations; there are a few.
//
// Cost of a step: T^2 multiply-adds. A is read by columns, which are rows of the Gramian's transposed block.
#pragma once
#include "active_set.h"

namespace fastmtl {

// Doubles of scratch for one problem: v and x [T], and who is present.
FASTMTL_HD constexpr int64_t projected_gradient_scratch(int num_tasks) { return 3 * static_cast<int64_t>(num_tasks); }

namespace detail {

// tau of the shifted values x_i - shift, whose largest is 0. total: above 0.
template <class Team>
FASTMTL_HD double simplex_threshold(const Team& team, const double* x, double shift, int size, double total) {
  double tau = -total, count = -1;
  while (true) {
    double sum = 0, above = 0;
    for (int i = team.rank(); i < size; i += team.size()) {
      const double value = x[i] - shift;
      if (!(value > tau)) continue;
      sum += value;
      above += 1;
    }
    sum = team.sum(sum);
    above = team.sum(above);
    if (above == count || above == 0) return tau;
    count = above;
    tau = std::fmax(tau, (sum - total) / count);  // rounding must not bring anyone back
  }
}

}  // namespace detail

// weights [T]: those after the steps; absent tasks keep what they have in `start`, and the others share the rest. NaN
// where anything that takes part is not finite. problem: of T tasks; its gramian and mask are not read.
template <class Team>
FASTMTL_HD void projected_gradient_problem(const Team& team, const Problem& problem, const ProjectedGradient& method,
                                           double* scratch, double* weights) {
  const int t = problem.num_tasks;
  const int64_t width = static_cast<int64_t>(t) * method.batches, first = problem.index * t;
  const double* columns = method.gramian + problem.index * width * width + (method.batches > 1 ? t * width : 0);
  const uint8_t* mask = method.mask ? method.mask + problem.index * width : nullptr;
  const double* pull = method.pull ? method.pull + first : nullptr;
  double *velocity = scratch, *x = velocity + t, *present = x + t;
  double total = 0, norms = 0, count = 0;
  for (int i = team.rank(); i < t; i += team.size()) {
    present[i] = 1;
    for (int b = 0; mask && b < method.batches; ++b) present[i] = mask[b * t + i] ? present[i] : 0;
    weights[i] = method.start[first + i];
    velocity[i] = 0;
    if (present[i] == 0) continue;
    total += weights[i];
    norms += std::sqrt(std::fmax(columns[i * width + i], 0.0));
    count += 1;
  }
  total = team.sum(total);
  norms = team.sum(norms);
  count = team.sum(count);
  const double mean = method.scale_free && norms > 0 ? norms / count : 1;
  const double scale = 1 / (mean * mean);
  const double lr = method.lr * (method.rate ? *method.rate : 1.0);
  for (int64_t step = 0; step < method.num_steps; ++step) {
    team.sync();
    for (int i = team.rank(); i < t; i += team.size()) x[i] = 0;
    for (int j = 0; j < t; ++j) {
      if (present[j] == 0) continue;
      const double share = weights[j] + (pull ? pull[j] : 0.0);
      const double* column = columns + j * width;
      for (int i = team.rank(); i < t; i += team.size()) x[i] += share * column[i];
    }
    double zero = total * 0.0, largest = -detail::kNever;
    for (int i = team.rank(); i < t; i += team.size()) {
      if (present[i] == 0) {
        x[i] = -detail::kNever;
        continue;
      }
      velocity[i] = method.momentum * velocity[i] + (scale * x[i] + method.ridge * weights[i]);
      x[i] = weights[i] - lr * velocity[i];
      zero += x[i] * 0.0;
      largest = std::fmax(largest, x[i]);
    }
    if (team.sum(zero) != 0) {
      detail::fill_weights(team, t, detail::kNan, weights);
      return;
    }
    largest = team.max(largest);
    if (total <= 0) continue;  // nothing to share
    const double tau = detail::simplex_threshold(team, x, largest, t, total);
    for (int i = team.rank(); i < t; i += team.size()) {
      if (present[i] != 0) weights[i] = std::fmax(x[i] - largest - tau, 0.0);
    }
  }
  team.sync();
}

}  // namespace fastmtl
