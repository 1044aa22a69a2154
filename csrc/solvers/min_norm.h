// The min-norm point of the convex hull: argmin |sum_t w_t g_t|^2 over w >= 0, sum_t w_t = 1 (MGDA), exactly.
//
// With m the smallest squared norm, the tasks scaled to correlations and c_i = sqrt(m / M_ii), the weights are
// w ~ c z for the z that solves the bound-constrained problem without the equality
//   min 1/2 z^T A z - c^T z,  z >= 0,     A = D^-1/2 M D^-1/2 + c c^T,  D = diag(M),
// by the active set of active_set.h, from z = 0.
#pragma once
#include "active_set.h"

namespace fastmtl {

// Doubles of scratch for one problem.
FASTMTL_HD constexpr int64_t min_norm_scratch(int num_tasks) { return tableau_scratch(num_tasks); }

namespace detail {

constexpr double kGapGoal = 1e-10;  // of m

struct Cone {
  static constexpr bool kSimplex = false;
  Problem problem;
  Tableau tab;
  double goal;  // a gap this small will do

  template <class Team>
  FASTMTL_HD void start_at(const Team&, int) const {}

  template <class Team>
  FASTMTL_HD void fill(const Team& team) const {
    for (int i = team.rank() / team.lanes(); i < tab.size; i += team.size() / team.lanes()) {
      const double* gramian = problem.row(i);
      double* row = tab.row(i);
      const bool present = tab.state[i] != kAbsent;
      for (int j = team.rank() % team.lanes(); j <= i; j += team.lanes()) {
        const bool both = present && tab.state[j] != kAbsent;
        row[j] = both ? gramian[j] * tab.scale[i] * tab.scale[j] + tab.c[i] * tab.c[j] : 0.0;
      }
    }
    for (int i = team.rank(); i < tab.size; i += team.size()) tab.q[i] = tab.c[i];
    team.sync();
  }

  template <class Team>
  FASTMTL_HD double solution(const Team& team, bool* good) const {
    double sum = 0;
    for (int i = team.rank(); i < tab.size; i += team.size()) {
      tab.weights[i] = tab.state[i] == kInside ? tab.scale[i] * std::fmax(tab.q[i], 0.0) : 0.0;
      sum += tab.weights[i];
    }
    sum = team.sum(sum);
    for (int i = team.rank(); i < tab.size; i += team.size()) tab.weights[i] /= sum;
    team.sync();
    multiply(team, problem, tab.weights, tab.product);
    double squared_norm = 0, smallest = kNever;
    for (int i = team.rank(); i < tab.size; i += team.size()) {
      if (tab.state[i] == kAbsent) continue;
      squared_norm += tab.weights[i] != 0 ? tab.weights[i] * tab.product[i] : 0.0;
      smallest = std::fmin(smallest, tab.product[i]);
    }
    squared_norm = team.sum(squared_norm);
    smallest = -team.max(-smallest);
    const double gap = std::fmax(squared_norm - smallest, 0.0);
    *good = gap <= goal;
    return gap;
  }
};

}  // namespace detail

// weights [T] and the duality gap |x|^2 - min_t <g_t, x> >= 0 of x = sum_t w_t g_t (the same on every thread).
// An exact zero gradient: the first such task alone. No task present: zeros. An entry that is not finite, or products
// that overflow: NaN.
template <class Team>
FASTMTL_HD double min_norm_problem(const Team& team, const Problem& problem, double* scratch, double* weights) {
  const int num_tasks = problem.num_tasks;
  if (!is_finite(team, problem)) {
    detail::fill_weights(team, num_tasks, detail::kNan, weights);
    return detail::kNan;
  }
  const detail::Tableau tab = detail::make_tableau(num_tasks, scratch);
  double smallest = detail::kNever;  // m
  int shortest = -1;
  for (int i = team.rank(); i < num_tasks; i += team.size()) {
    tab.state[i] = problem.present(i) ? detail::kOutside : detail::kAbsent;
    const double squared_norm = problem.present(i) ? std::fmax(problem.squared_norm(i), 0.0) : detail::kNever;
    if (squared_norm < smallest) {
      smallest = squared_norm;
      shortest = i;
    }
  }
  const int first_shortest = team.argmax(-smallest, shortest);
  smallest = -team.max(-smallest);
  detail::fill_weights(team, num_tasks, 0.0, weights);
  if (smallest == detail::kNever) return 0;
  if (smallest == 0) {
    if (team.rank() == 0) weights[first_shortest] = 1;
    team.sync();
    return 0;
  }
  for (int i = team.rank(); i < num_tasks; i += team.size()) {
    const bool present = tab.state[i] != detail::kAbsent;
    tab.scale[i] = present ? 1 / std::sqrt(problem.squared_norm(i)) : 0.0;
    tab.c[i] = present ? std::sqrt(smallest / problem.squared_norm(i)) : 0.0;
    tab.noise[i] = 1e-15 + 1e-11 * tab.c[i];
  }
  team.sync();
  const detail::Cone form = {problem, tab, detail::kGapGoal * smallest};
  form.fill(team);
  return detail::solve(team, form, num_tasks, weights);
}

}  // namespace fastmtl
