// CAGrad's weights, exactly. Liu, Liu, Jin, Stone, Liu: Conflict-Averse Gradient Descent for Multi-Task Learning.
// NeurIPS 2021, Algorithm 1 and equation 4.
//
// With the mean gradient g_0 = G^T e, e = 1 / T, and kappa = c |g_0|, the paper's dual problem is
//   min over the simplex of  e^T M w + kappa |g_w|,   g_w = G^T w,     and then d = g_0 + kappa / |g_w| g_w.
// As |g| is the least of (|g|^2 / t + t) / 2 over t > 0, at t = |g|, its solution is that of a quadratic problem,
//   w(theta) = argmin 1/2 |g_w + theta g_0|^2     (bounded_min_norm.h with the bounds theta e),
// at the theta with q(theta) = |g_w(theta)|^2 = (kappa theta)^2. q is continuous and does not fall, q / theta^2 does
// not rise. As long as the support of w stays, w = a + theta b, a the point of smallest norm of the support's affine
// hull, so that q = |G^T a|^2 + theta^2 |G^T b|^2: from one solution and the slope |G^T b|^2, which the tableau has,
// follows the theta of its support in closed form. Newton's steps of this kind, held within a bracket, end after
// finitely many: 2 to 6 on random problems.
//
// Where 0 lies in the convex hull, theta may go to 0: g_w = 0 is optimal, and any d in the ball that conflicts with
// nobody. It is then the one nearest to g_0, the limit of theta -> 0: the projection of g_0 onto the dual cone
// (dual_cone.h).
//
// Cost: that of bounded_min_norm.h for each theta.
#pragma once
#include "bounded_min_norm.h"
#include "dual_cone.h"

namespace fastmtl {

// Doubles of scratch for one problem.
FASTMTL_HD constexpr int64_t cagrad_scratch(int num_tasks) {
  return bounded_min_norm_scratch(num_tasks) + 4 * int64_t{num_tasks};
}

namespace detail {

constexpr int kThetas = 60;
constexpr double kVanishing = 1e-14;     // of what a squared norm is summed from: it counts as 0
constexpr double kSmallestTheta = 1e-9;  // what is lost by taking 0 for it, in units of c (1 + c) |g_0|^2

// |G^T b|^2 of the support's w = a + theta b, times the tableau's unit.
template <class Team>
FASTMTL_HD double slope_of_support(const Team& team, const Tableau& tab, const double* linear, double theta) {
  const int num_tasks = tab.size - 1;
  double sum = 0;
  for (int i = team.rank(); i < num_tasks; i += team.size()) {
    if (tab.state[i] != kInside) continue;
    double inner = 0;
    for (int j = 0; j < num_tasks; ++j) {
      if (tab.state[j] == kInside) inner += tab.at(i, j) * tab.scale[j] * linear[j];
    }
    sum -= tab.scale[i] * linear[i] * inner;
  }
  return std::fmax(team.sum(sum), 0.0) / (theta * theta);
}

}  // namespace detail

// weights [T] = e + kappa / |g_w| w, and the duality gap: the dual objective less min_t <g_t, d>, the same on every
// thread. c = 0, or g_0 = 0: e. No task present: zeros. An entry that is not finite, or products that overflow: NaN.
template <class Team>
FASTMTL_HD double cagrad_problem(const Team& team, const Problem& problem, double c, double* scratch, double* weights) {
  const int num_tasks = problem.num_tasks;
  if (!is_finite(team, problem)) {
    detail::fill_weights(team, num_tasks, detail::kNan, weights);
    return detail::kNan;
  }
  const detail::Tableau tab = detail::make_tableau(num_tasks + 1, scratch);
  double* const linear = scratch + tableau_scratch(num_tasks + 1);  // of the quadratic problem, in the tableau's unit
  double* const mean = linear + num_tasks;                          // e
  double* const products = mean + num_tasks;                        // M e
  double* const bounds = products + num_tasks;                      // theta e
  double* const v = bounds + num_tasks;                             // w(theta)
  double count = 0, longest = 0;
  for (int i = team.rank(); i < num_tasks; i += team.size()) {
    count += problem.present(i);
    if (problem.present(i)) longest = std::fmax(longest, problem.squared_norm(i));
  }
  count = team.sum(count);
  const double unit = unit_of(team.max(longest));  // of all that follows, but for the tableau
  for (int i = team.rank(); i < num_tasks; i += team.size()) {
    mean[i] = weights[i] = problem.present(i) ? 1 / count : 0.0;
  }
  team.sync();
  if (count == 0 || c == 0) return 0;
  detail::multiply(team, problem, mean, products, unit);
  double squared = 0, length = 0;
  for (int i = team.rank(); i < num_tasks; i += team.size()) {
    if (!problem.present(i)) continue;
    squared += mean[i] * products[i];
    length += mean[i] * std::sqrt(std::fmax(problem.squared_norm(i), 0.0) * unit);
  }
  squared = team.sum(squared);
  length = team.sum(length);
  if (!(squared > detail::kVanishing * length * length)) return 0;
  const double kappa = c * std::sqrt(squared);

  double theta = 1 / c, low = 0, high = detail::kNever, norm = 0;
  for (int iteration = 0; iteration < detail::kThetas; ++iteration) {
    for (int i = team.rank(); i < num_tasks; i += team.size()) {
      tab.state[i] = problem.present(i) ? detail::kOutside : detail::kAbsent;
      bounds[i] = weights[i] = theta * mean[i];
    }
    team.sync();
    double tableau_unit;
    const double gap = detail::solve_simplex(team, problem, tab, bounds, 1.0, scratch, weights, &tableau_unit);
    if (!(gap * 0.0 == 0)) {
      detail::fill_weights(team, num_tasks, detail::kNan, weights);
      return detail::kNan;
    }
    double size = 0, q = 0;
    for (int i = team.rank(); i < num_tasks; i += team.size()) {
      v[i] = problem.present(i) ? std::fmax(weights[i] - bounds[i], 0.0) : 0.0;
      if (v[i] > 0) size += v[i] * std::sqrt(std::fmax(problem.squared_norm(i), 0.0) * unit);
    }
    team.sync();
    detail::multiply(team, problem, v, tab.product, unit);
    for (int i = team.rank(); i < num_tasks; i += team.size()) q += v[i] > 0 ? v[i] * tab.product[i] : 0.0;
    size = team.sum(size);
    q = std::fmax(team.sum(q), 0.0);
    const bool vanishes = !(q > detail::kVanishing * size * size) || theta < detail::kSmallestTheta;
    norm = vanishes ? 0.0 : std::sqrt(q);
    if (vanishes) break;
    if (norm > kappa * theta) {
      low = theta;
    } else {
      high = theta;
    }
    const double slope = detail::slope_of_support(team, tab, linear, theta) * (unit / tableau_unit);
    const double nearest = q - slope * theta * theta, steepness = kappa * kappa - slope;
    double next = nearest > 0 && steepness > 0 ? std::sqrt(nearest / steepness) : 0.0;
    if (std::fabs(next - theta) <= 1e-13 * theta) break;
    if (!(next > low && next < high)) {
      next = high == detail::kNever ? 4 * theta : low == 0 ? high / 8 : std::sqrt(low * high);
    }
    if (high < detail::kNever && high - low <= 1e-15 * high) break;
    theta = next;
  }

  bool in_hull = norm == 0;
  if (in_hull) {
    dual_cone_problem(team, problem, mean, 0.0, scratch, weights);
    for (int i = team.rank(); i < num_tasks; i += team.size()) v[i] = weights[i] - mean[i];
    team.sync();
    detail::multiply(team, problem, v, products, unit);
    double moved = 0;
    for (int i = team.rank(); i < num_tasks; i += team.size()) moved += v[i] != 0 ? v[i] * products[i] : 0.0;
    moved = team.sum(moved);
    if (!(moved <= kappa * kappa * (1 + 1e-9))) {
      // Nothing gets that far but rounding.
      const double shrink = moved > 0 ? kappa / std::sqrt(moved) : 0.0;
      for (int i = team.rank(); i < num_tasks; i += team.size()) weights[i] = mean[i] + shrink * v[i];
    }
  } else {
    for (int i = team.rank(); i < num_tasks; i += team.size()) weights[i] = mean[i] + kappa / norm * v[i];
  }
  team.sync();
  double objective = 0, least = detail::kNever;
  if (!in_hull) {
    for (int i = team.rank(); i < num_tasks; i += team.size()) objective += v[i] > 0 ? v[i] * products[i] : 0.0;
    objective = team.sum(objective) + kappa * norm;
  }
  detail::multiply(team, problem, weights, tab.product, unit);
  for (int i = team.rank(); i < num_tasks; i += team.size()) {
    if (problem.present(i)) least = std::fmin(least, tab.product[i]);
  }
  return std::fmax(objective + team.max(-least), 0.0) / unit;
}

}  // namespace fastmtl
