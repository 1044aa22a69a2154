// The min-norm point with lower bounds: argmin |sum_t w_t g_t|^2 over w >= c, sum_t w_t = 1 (PE-LTR), exactly.
//
// With s = 1 - sum c and w = c + s v this is, over the simplex,
//   min 1/2 v^T M v + b^T v,  v >= 0, sum_t v_t = 1,     b = M c / s.
// (v is the min-norm point of the points G^T c + s g_t; their Gramian would lose all but s^2 of the digits, the linear
// term does not.) The equality's multiplier is one more variable, free, of the tableau of active_set.h:
//   A = [M e; e^T 0],  right-hand side (-b, 1),
// which starts with the task k of least objective and the multiplier in the support, where it is known in closed form:
// outside, the Gramian of the differences g_i - g_k. Tasks are scaled by 1 / sqrt(M_ii + M_kk).
// The Gramian is multiplied by a power of two where it is read, which is exact: a Gramian's products never overflow.
#pragma once
#include "active_set.h"

namespace fastmtl {

// Doubles of scratch for one problem: the tableau of T + 1 variables, and b.
FASTMTL_HD constexpr int64_t bounded_min_norm_scratch(int num_tasks) {
  return tableau_scratch(int64_t{num_tasks} + 1) + num_tasks;
}

namespace detail {

struct Simplex {
  static constexpr bool kSimplex = true;
  Problem problem;
  Tableau tab;
  const double* bounds;  // c
  double* b;             // in the unit below, and such that the objective is 0 at the first start
  double unit;           // what the Gramian is multiplied by: a power of two
  double slack;          // s
  double shift;          // what was taken from b to that end
  double goal;           // a gap this small will do

  // Task k has all of v.
  template <class Team>
  FASTMTL_HD void start_at(const Team& team, int k) const {
    const int border = problem.num_tasks;
    const double* gramian_k = problem.row(k);
    const double own = gramian_k[k] * unit;
    for (int i = team.rank(); i < border; i += team.size()) {
      const bool present = tab.state[i] != kAbsent;
      const double squared = present ? problem.squared_norm(i) * unit + own : 0.0;
      tab.scale[i] = !present ? 0.0 : squared > 0 ? 1 / std::sqrt(squared) : 1.0;
    }
    team.sync();
    const double scale_k = tab.scale[k];
    for (int i = team.rank() / team.lanes(); i < border; i += team.size() / team.lanes()) {
      const double* gramian = problem.row(i);
      double* row = tab.row(i);
      for (int j = team.rank() % team.lanes(); j <= i; j += team.lanes()) {
        if (tab.state[i] == kAbsent || tab.state[j] == kAbsent) {
          row[j] = 0;
        } else if (i == k || j == k) {
          row[j] = i == j ? 0.0 : tab.scale[i == k ? j : i] / scale_k;
        } else {
          const double to_j = gramian[j] * unit - gramian_k[i] * unit;
          row[j] = (to_j + (own - gramian_k[j] * unit)) * tab.scale[i] * tab.scale[j];
        }
      }
    }
    double* last = tab.row(border);
    for (int i = team.rank(); i < border; i += team.size()) {
      const bool present = tab.state[i] != kAbsent;
      const double inner = present ? gramian_k[i] * unit : 0.0, linear = present ? b[i] : 0.0;
      last[i] = i == k ? -1 / scale_k : tab.scale[i] * (inner - own);
      tab.q[i] = i == k ? 1 / scale_k : tab.scale[i] * ((own - inner) + (b[k] - linear));
      tab.c[i] = -tab.scale[i] * linear;
      tab.noise[i] = 1e-15 * tab.scale[i] * (own + std::fabs(inner) + std::fabs(linear + shift) + std::fabs(shift));
    }
    if (team.rank() == 0) {
      last[border] = own;
      tab.q[border] = -(own + b[k]);
      tab.c[border] = 1;
      tab.state[border] = kFree;
    }
    team.sync();
  }

  // Starts at the shortest gradient of the support, next to which the others lose the fewest digits.
  template <class Team>
  FASTMTL_HD void fill(const Team& team) const {
    double smallest = kNever;
    int task = -1;
    for (int i = team.rank(); i < problem.num_tasks; i += team.size()) {
      if (tab.state[i] == kLeft && problem.squared_norm(i) < smallest) {
        smallest = problem.squared_norm(i);
        task = i;
      }
    }
    const int k = team.argmax(-smallest, task);
    team.sync();
    if (team.rank() == 0) tab.state[k] = kInside;
    team.sync();
    start_at(team, k);
  }

  template <class Team>
  FASTMTL_HD double solution(const Team& team, bool* good) const {
    const int num_tasks = problem.num_tasks;
    double sum = 0;
    for (int i = team.rank(); i < num_tasks; i += team.size()) {
      tab.weights[i] = tab.state[i] == kInside ? tab.scale[i] * std::fmax(tab.q[i], 0.0) : 0.0;
      sum += tab.weights[i];
    }
    const double factor = slack / team.sum(sum);
    for (int i = team.rank(); i < num_tasks; i += team.size()) {
      tab.column[i] = tab.weights[i] * factor;  // s v
      tab.weights[i] = tab.state[i] == kAbsent ? 0.0 : bounds[i] + tab.column[i];
    }
    team.sync();
    multiply(team, problem, tab.weights, tab.product, unit);
    double smallest = kNever, largest = 0, inner = 0;
    for (int i = team.rank(); i < num_tasks; i += team.size()) {
      if (tab.state[i] == kAbsent) continue;
      smallest = std::fmin(smallest, tab.product[i]);
      largest = std::fmax(largest, std::fabs(tab.product[i]));
      inner += tab.column[i] * tab.product[i];
    }
    inner = team.sum(inner);
    smallest = -team.max(-smallest);
    double gap = inner - slack * smallest;
    if (gap < 0) gap = 0;  // NaN stays
    *good = gap <= std::fmax(goal, 1e-15 * slack * team.max(largest));
    return gap;
  }
};

// The minimum over w = c + s v, v on the simplex, for any bounds c and slack s > 0. The tableau's states are kOutside
// or kAbsent, weights [T] holds the bounds of the present tasks, 0 for the others, and becomes w. Returns the gap;
// `unit` is what the tableau's Gramian was multiplied by. Afterwards the tableau is that of the solution, and b lies
// behind it.
template <class Team>
FASTMTL_HD double solve_simplex(const Team& team, const Problem& problem, const Tableau& tab, const double* bounds,
                                double slack, double* scratch, double* weights, double* last_unit) {
  const int num_tasks = problem.num_tasks;
  double* const b = scratch + tableau_scratch(num_tasks + 1);
  double longest = -kNever;
  for (int i = team.rank(); i < num_tasks; i += team.size()) {
    if (problem.present(i)) longest = std::fmax(longest, problem.squared_norm(i));
  }
  longest = team.max(longest);
  if (longest == -kNever) return 0;  // nobody is present
  const double first_unit = unit_of(longest);
  multiply(team, problem, weights, b, first_unit);
  team.sync();

  // The task to start at, and the unit, near its squared norm.
  double least = kNever;
  int task = -1;
  for (int i = team.rank(); i < num_tasks; i += team.size()) {
    if (!problem.present(i)) continue;
    b[i] /= slack;
    const double value = 0.5 * first_unit * problem.squared_norm(i) + b[i];
    if (value < least) {
      least = value;
      task = i;
    }
  }
  const int k = team.argmax(-least, task);
  least = -team.max(-least);
  if (least == kNever) {  // overflow
    fill_weights(team, num_tasks, kNan, weights);
    return kNan;
  }
  const double smallest_normal = std::numeric_limits<double>::min();
  const double about = std::fmax(problem.squared_norm(k), std::fmax(1e-30 * longest, smallest_normal));
  const double unit = longest > 0 ? unit_of(about) : 1.0;
  const double ratio = unit / first_unit;
  *last_unit = unit;
  for (int i = team.rank(); i < num_tasks; i += team.size()) b[i] = problem.present(i) ? (b[i] - least) * ratio : 0.0;
  if (team.rank() == 0) tab.state[k] = kInside;
  team.sync();

  const double goal = 1e-10 * slack * slack * (problem.squared_norm(k) * unit);
  const Simplex form = {problem, tab, bounds, b, unit, slack, least * ratio, goal};
  form.start_at(team, k);
  return solve(team, form, num_tasks, weights) / unit;
}

}  // namespace detail

// weights [T] and the duality gap <x, x - u> >= 0 of x = sum_t w_t g_t against the u = sum_t u_t g_t within the bounds
// that makes it largest: sum_t (w_t - c_t) (Mw)_t - s min_t (Mw)_t, the same on every thread. bounds: c [T] >= 0; those
// of absent tasks count as 0. No slack left (sum c >= 1): the bounds themselves. No task present: zeros. An entry or
// bound that is not finite, or products that overflow: NaN.
template <class Team>
FASTMTL_HD double bounded_min_norm_problem(const Team& team, const Problem& problem, const double* bounds,
                                           double* scratch, double* weights) {
  const int num_tasks = problem.num_tasks;
  double sum = 0;
  for (int i = team.rank(); i < num_tasks; i += team.size()) sum += problem.present(i) ? bounds[i] : 0.0;
  sum = team.sum(sum);
  if (!(sum * 0.0 == 0) || !is_finite(team, problem)) {
    detail::fill_weights(team, num_tasks, detail::kNan, weights);
    return detail::kNan;
  }
  const detail::Tableau tab = detail::make_tableau(num_tasks + 1, scratch);
  for (int i = team.rank(); i < num_tasks; i += team.size()) {
    tab.state[i] = problem.present(i) ? detail::kOutside : detail::kAbsent;
    weights[i] = problem.present(i) ? bounds[i] : 0.0;
  }
  team.sync();
  const double slack = 1 - sum;
  if (!(slack > 0)) return 0;
  double unit;
  return detail::solve_simplex(team, problem, tab, bounds, slack, scratch, weights, &unit);
}

}  // namespace fastmtl
