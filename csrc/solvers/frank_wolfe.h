// Frank-Wolfe steps towards the min-norm point. Sener, Koltun: Multi-Task Learning as Multi-Objective Optimization.
// NeurIPS 2018, Algorithm 2.
//
// From equal weights: t = argmin (Mw)_t, the task that opposes x most; w moves to the shortest point between w and e_t,
//   gamma = (w^T M w - (Mw)_t) / (w^T M w - 2 (Mw)_t + M_tt), held in [0, 1],
// until the weights change by less than tol in sum, or max_iter steps. The paper's code starts at the shortest point
// between two of the tasks instead.
//
// Cost: T operations a step: Mw follows w. The gap is taken from the Gramian at the end.
#pragma once
#include "active_set.h"

namespace fastmtl {

// Doubles of scratch for one problem.
FASTMTL_HD constexpr int64_t frank_wolfe_scratch(int num_tasks) { return 2 * static_cast<int64_t>(num_tasks); }

namespace detail {

// How far to go from a point to another, to the shortest point between: squares of both, and their inner product.
FASTMTL_HD double step_to_shortest(double from, double inner, double to) {
  if (!(inner < from)) return 0;
  if (!(inner < to)) return 1;
  return (from - inner) / ((from - inner) + (to - inner));
}

// The weights of the shortest point between two tasks, over all pairs; one task alone keeps what it has.
template <class Team>
FASTMTL_HD void start_at_pair(const Team& team, const Problem& problem, double* squared_norm, double* partner,
                              double* weights) {
  double best = kNever;
  int task = -1;
  for (int i = team.rank(); i < problem.num_tasks; i += team.size()) {
    squared_norm[i] = kNever;
    if (!problem.present(i)) continue;
    const double* gramian = problem.row(i);
    for (int j = i + 1; j < problem.num_tasks; ++j) {
      if (!problem.present(j)) continue;
      const double step = step_to_shortest(gramian[i], gramian[j], problem.squared_norm(j));
      const double value = gramian[i] - step * (gramian[i] - gramian[j]);
      if (value < squared_norm[i]) {
        squared_norm[i] = value;
        partner[i] = j;
      }
    }
    if (squared_norm[i] < best) {
      best = squared_norm[i];
      task = i;
    }
  }
  const int i = team.argmax(-best, task);
  if (team.max(-best) == -kNever) return;
  team.sync();
  const int j = static_cast<int>(partner[i]);
  const double step = step_to_shortest(problem.squared_norm(i), problem.row(i)[j], problem.squared_norm(j));
  for (int n = team.rank(); n < problem.num_tasks; n += team.size()) {
    weights[n] = n == i ? 1 - step : n == j ? step : 0.0;
  }
  team.sync();
}

}  // namespace detail

// weights [T] and the duality gap |x|^2 - min_t <g_t, x> of x = sum_t w_t g_t, the same on every thread. No task
// present: zeros. An entry that is not finite: NaN.
template <class Team>
FASTMTL_HD double frank_wolfe_problem(const Team& team, const Problem& problem, const FrankWolfe& method,
                                      double* scratch, double* weights) {
  const int num_tasks = problem.num_tasks;
  if (!is_finite(team, problem)) {
    detail::fill_weights(team, num_tasks, detail::kNan, weights);
    return detail::kNan;
  }
  double count = 0;
  for (int i = team.rank(); i < num_tasks; i += team.size()) count += problem.present(i);
  count = team.sum(count);
  for (int i = team.rank(); i < num_tasks; i += team.size()) weights[i] = problem.present(i) ? 1 / count : 0.0;
  if (count == 0) return 0;
  team.sync();
  double* product = scratch;
  if (method.pair_start) detail::start_at_pair(team, problem, product, scratch + num_tasks, weights);
  detail::multiply(team, problem, weights, product);

  for (int64_t iteration = 0;; ++iteration) {
    double least = detail::kNever, sum = 0;
    int task = num_tasks;
    for (int i = team.rank(); i < num_tasks; i += team.size()) {
      if (!problem.present(i)) continue;
      sum += weights[i] * product[i];
      if (product[i] < least) {
        least = product[i];
        task = i;
      }
    }
    const double squared = team.sum(sum);
    const int t = team.argmax(-least, task);
    const double lowest = -team.max(-least);
    if (iteration == method.max_iter || t == num_tasks) break;
    const double* gramian = problem.row(t);
    const double step = detail::step_to_shortest(squared, lowest, gramian[t]);
    const double change = 2 * step * (1 - weights[t]);
    team.sync();  // everyone has read weights[t]
    for (int i = team.rank(); i < num_tasks; i += team.size()) {
      weights[i] = (1 - step) * weights[i] + (i == t ? step : 0.0);
      product[i] += step * (gramian[i] - product[i]);
    }
    team.sync();
    if (change < method.tol || step == 0) break;
  }
  detail::multiply(team, problem, weights, product);
  double least = detail::kNever, sum = 0;
  for (int i = team.rank(); i < num_tasks; i += team.size()) {
    if (!problem.present(i)) continue;
    sum += weights[i] * product[i];
    least = std::fmin(least, product[i]);
  }
  return std::fmax(team.sum(sum) + team.max(-least), 0.0);
}

}  // namespace fastmtl
