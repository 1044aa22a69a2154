// The projection of p = sum_t u_t g_t onto the gradients' dual cone {x : <g_t, x> >= 0 for all t} (UPGrad, DualProj):
//   argmin |sum_t v_t g_t|^2 over v >= u, exactly.
// With D = diag(M) and v = u + |p| D^-1/2 z this is
//   min 1/2 z^T A z - c^T z,  z >= 0,     A = D^-1/2 M D^-1/2,  c = -D^-1/2 M u / |p|  (minus the cosines of p),
// by the active set of active_set.h, from z = 0: no sweep where p is in the cone.
//
// Noise: where the cone is narrow, gradients nearly cancel under large weights, and what is left of them is in the
// digits of M that rounding in float32 takes. M + E with |E_ij| <= noise |g_i| |g_j| tells |x|^2 to noise sum_t (v_t
// |g_t|)^2 or so. Where that is more than 1e-2 |p|^2, or where the search finds no end because M + E is not positive
// semidefinite, A gets noise T added to its diagonal, which makes it so whatever E is: x then conflicts by at most
// sqrt(noise T) |p|.
#pragma once
#include "active_set.h"

namespace fastmtl {

// Doubles of scratch for one problem.
FASTMTL_HD constexpr int64_t dual_cone_scratch(int num_tasks) { return tableau_scratch(num_tasks); }

namespace detail {

constexpr double kProjectionGoal = 1e-10;  // of |p|^2
constexpr double kNoiseGoal = 1e-2;        // of |p|^2

struct Projection {
  static constexpr bool kSimplex = false;
  Problem problem;
  Tableau tab;                // scale: 1 / |g_t|, 0 for a zero gradient
  const double* combination;  // u
  double unit;                // |p|
  double goal;                // a gap this small will do
  double ridge;               // on A's diagonal

  FASTMTL_HD double bound(int i) const { return tab.state[i] != kAbsent ? combination[i] : 0.0; }
  FASTMTL_HD double norm_of(int i) const { return tab.scale[i] > 0 ? 1 / tab.scale[i] : 0.0; }

  template <class Team>
  FASTMTL_HD void start_at(const Team&, int) const {}

  template <class Team>
  FASTMTL_HD void fill(const Team& team) const {
    for (int i = team.rank() / team.lanes(); i < tab.size; i += team.size() / team.lanes()) {
      const double* gramian = problem.row(i);
      double* row = tab.row(i);
      const bool present = tab.state[i] != kAbsent;
      for (int j = team.rank() % team.lanes(); j <= i; j += team.lanes()) {
        row[j] = present && tab.state[j] != kAbsent ? gramian[j] * tab.scale[i] * tab.scale[j] : 0.0;
        if (i == j) row[j] += ridge;
      }
    }
    for (int i = team.rank(); i < tab.size; i += team.size()) tab.q[i] = tab.c[i];
    team.sync();
  }

  // How far the weights are from optimal, for the problem with the ridge or without.
  template <class Team>
  FASTMTL_HD double gap_of(const Team& team, const double* weights, double added_ridge) const {
    multiply(team, problem, weights, tab.product);
    double conflict = 0, slackness = 0;
    for (int i = team.rank(); i < tab.size; i += team.size()) {
      if (tab.state[i] == kAbsent) continue;
      const double excess = weights[i] - bound(i), norm = norm_of(i);
      const double slope = tab.product[i] + added_ridge * excess * norm * norm;
      conflict = std::fmax(conflict, -slope * tab.scale[i]);
      slackness += excess * std::fabs(slope);
    }
    slackness = team.sum(slackness);
    conflict = unit * team.max(conflict);
    return slackness < conflict ? conflict : slackness;  // NaN stays
  }

  template <class Team>
  FASTMTL_HD double solution(const Team& team, bool* good) const {
    double length = 0;  // of what is summed
    for (int i = team.rank(); i < tab.size; i += team.size()) {
      const double excess = tab.state[i] == kInside ? tab.scale[i] * (unit * std::fmax(tab.q[i], 0.0)) : 0.0;
      tab.weights[i] = bound(i) + excess;
      length += std::fabs(tab.weights[i]) * norm_of(i);
    }
    length = team.sum(length);
    const double gap = gap_of(team, tab.weights, ridge);
    *good = gap <= std::fmax(goal, 1e-15 * length * length);
    return gap;
  }
};

}  // namespace detail

// weights v [T], and how far they are from optimal (the same on every thread): the larger of
//   sum_t (v_t - u_t) |<g_t, x>|     and     |p| max_t -<g_t, x> / |g_t|     for x = sum_t v_t g_t.
// combination: u [T]; absent tasks count as 0, and have weight 0. The entries of M must be finite; a u that is not, or
// products that overflow: NaN.
template <class Team>
FASTMTL_HD double dual_cone_problem(const Team& team, const Problem& problem, const double* combination, double noise,
                                    double* scratch, double* weights) {
  const int num_tasks = problem.num_tasks;
  const detail::Tableau tab = detail::make_tableau(num_tasks, scratch);
  double length = 0;
  for (int i = team.rank(); i < num_tasks; i += team.size()) {
    const bool present = problem.present(i);
    const double squared_norm = present ? problem.squared_norm(i) : 0.0;
    const double norm = squared_norm > 0 ? std::sqrt(squared_norm) : 0.0;
    tab.state[i] = present ? detail::kOutside : detail::kAbsent;
    tab.scale[i] = norm > 0 ? 1 / norm : 0.0;
    weights[i] = present ? combination[i] : 0.0;
    length += std::fabs(weights[i]) * norm;
  }
  length = team.sum(length);
  if (length == 0) return 0;  // nothing but zero gradients
  detail::multiply(team, problem, weights, tab.product);
  double squared = 0;
  for (int i = team.rank(); i < num_tasks; i += team.size()) {
    squared += weights[i] != 0 ? weights[i] * tab.product[i] : 0.0;
  }
  squared = team.sum(squared);
  if (!(squared * 0.0 == 0)) {
    detail::fill_weights(team, num_tasks, detail::kNan, weights);
    return detail::kNan;
  }
  // Less than 1e-8 of what it was summed from is rounding.
  const double unit = std::fmax(std::sqrt(std::fmax(squared, 0.0)), 1e-8 * length);
  double conflict = 0;
  bool conflicts = false;
  for (int i = team.rank(); i < num_tasks; i += team.size()) {
    tab.noise[i] = 1e-12 + 1e-15 * (length / unit);
    tab.c[i] = tab.state[i] != detail::kAbsent ? -tab.product[i] * tab.scale[i] / unit : 0.0;
    conflict = std::fmax(conflict, tab.c[i]);
    conflicts |= tab.c[i] > tab.noise[i];
  }
  if (team.first(conflicts) == team.size()) return unit * unit * team.max(conflict);

  detail::Projection form = {problem, tab, combination, unit, detail::kProjectionGoal * unit * unit, 0};
  form.fill(team);
  const double gap = detail::solve(team, form, num_tasks, weights);
  double spread = 0, present = 0;
  for (int i = team.rank(); i < num_tasks; i += team.size()) {
    const double part = weights[i] * form.norm_of(i) / unit;
    spread += part * part;
    present += tab.state[i] != detail::kAbsent;
  }
  const bool settled = noise * team.sum(spread) <= detail::kNoiseGoal && gap <= noise * unit * unit;
  if (noise == 0 || settled) return gap;
  for (int i = team.rank(); i < num_tasks; i += team.size()) {
    if (tab.state[i] != detail::kAbsent) tab.state[i] = detail::kOutside;
  }
  team.sync();
  form.ridge = noise * team.sum(present);
  form.fill(team);
  const double ridge_gap = detail::solve(team, form, num_tasks, weights);
  return ridge_gap * 0.0 == 0 ? form.gap_of(team, weights, 0) : ridge_gap;
}

}  // namespace fastmtl
