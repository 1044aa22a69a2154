// A linear program over the simplex: max q^T w over w >= 0, sum w = 1, M w >= b, e^T w >= f.
//
// The right-hand sides go into the matrix, since sum w = 1: (M - b 1^T) w >= 0. The primal simplex method on a
// dictionary: each basic variable as an affine function of the T that are not,
//   x_i = d_i + sum_k D_ik x_k         one row for sum w = 1, T for M w >= b, one for e^T w >= f, one for the objective
// where one variable more, v, is added to every inequality: it starts as the largest violation at the corner of largest
// q, and is minimised first. At v = 0 it leaves for good and the objective is maximised. Where v cannot reach 0 there
// is no such w, and the point of least violation is returned.
//
// Enters: the column of the largest slope; after pivots that did not move, the smallest variable (Bland's rule, which
// cannot cycle). Leaves: who reaches 0 first, among equals the largest pivot. Every inequality is scaled to entries of
// at most 1, as is the objective.
//
// Cost: T^2 multiply-adds per pivot, on T^2 doubles; about T pivots.
#pragma once
#include "active_set.h"

namespace fastmtl {

// Doubles of scratch for one problem: the dictionary with d as its last column, one column, and the variables (int32).
FASTMTL_HD constexpr int64_t simplex_lp_scratch(int num_tasks) {
  const int64_t t = num_tasks;
  return (t + 3) * (t + 1) + (t + 3) + (2 * t + 4) / 2;
}

namespace detail {

constexpr double kSlope = 1e-11;      // less does not count as a slope
constexpr double kPivot = 1e-10;      // nor as a pivot
constexpr double kInfeasible = 1e-9;  // of a scaled inequality

struct Dictionary {
  int num_tasks;
  double* entries;
  double* column;
  int32_t* row_variable;  // w_k: k, the slack of inequality j: T + j, of the last one: 2 T, v: 2 T + 1, none: -1
  int32_t* column_variable;

  FASTMTL_HD int rows() const { return num_tasks + 2; }  // without the objective, which is the last one
  FASTMTL_HD double* row(int i) const { return entries + static_cast<int64_t>(i) * (num_tasks + 1); }
  FASTMTL_HD double& value(int i) const { return row(i)[num_tasks]; }
  FASTMTL_HD int violation() const { return 2 * num_tasks + 1; }
};

// Column c enters for row r.
template <class Team>
FASTMTL_HD void pivot(const Team& team, const Dictionary& dict, int r, int c) {
  const int width = dict.num_tasks + 1, height = dict.rows() + 1;
  team.sync();
  for (int i = team.rank(); i < height; i += team.size()) dict.column[i] = dict.row(i)[c];
  team.sync();
  const double inverse = 1 / dict.column[r];
  double* entering = dict.row(r);
  for (int k = team.rank(); k < width; k += team.size()) entering[k] = k == c ? inverse : -entering[k] * inverse;
  team.sync();
  for (int i = team.rank() / team.lanes(); i < height; i += team.size() / team.lanes()) {
    const double factor = dict.column[i];
    if (i == r || factor == 0) continue;
    double* row = dict.row(i);
    for (int k = team.rank() % team.lanes(); k < width; k += team.lanes()) {
      row[k] = k == c ? factor * inverse : row[k] + factor * entering[k];
    }
  }
  if (team.rank() == 0) {
    const int32_t variable = dict.row_variable[r];
    dict.row_variable[r] = dict.column_variable[c];
    dict.column_variable[c] = variable;
  }
  team.sync();
}

// The column that raises row `objective` (lowers it with sign -1), or -1. Never v.
template <class Team>
FASTMTL_HD int entering_column(const Team& team, const Dictionary& dict, int objective, double sign, bool bland) {
  const double* slopes = dict.row(objective);
  double best = -kNever;
  int column = dict.num_tasks;
  for (int k = team.rank(); k < dict.num_tasks; k += team.size()) {
    const int variable = dict.column_variable[k];
    const double slope = sign * slopes[k];
    if (variable < 0 || variable == dict.violation() || !(slope > kSlope)) continue;
    const double merit = bland ? -static_cast<double>(variable) : slope;
    if (merit > best) {
      best = merit;
      column = k;
    }
  }
  return team.max(best) > -kNever ? team.argmax(best, column) : -1;
}

// The row that reaches 0 first as column c grows, or -1, and how far that is. v goes first among equals.
template <class Team>
FASTMTL_HD int leaving_row(const Team& team, const Dictionary& dict, int c, bool bland, double* growth) {
  double first = kNever;
  for (int i = team.rank(); i < dict.rows(); i += team.size()) {
    const double slope = dict.row(i)[c];
    if (dict.row_variable[i] < 0 || !(slope < -kPivot)) continue;
    first = std::fmin(first, std::fmax(dict.value(i), 0.0) / -slope);
  }
  *growth = first = -team.max(-first);
  double best = -kNever;
  int row = dict.rows();
  for (int i = team.rank(); i < dict.rows(); i += team.size()) {
    const double slope = dict.row(i)[c];
    const int variable = dict.row_variable[i];
    if (variable < 0 || !(slope < -kPivot) || !(std::fmax(dict.value(i), 0.0) / -slope <= first * (1 + 1e-12)))
      continue;
    const double merit = variable == dict.violation() ? kNever : bland ? -static_cast<double>(variable) : -slope;
    if (merit > best) {
      best = merit;
      row = i;
    }
  }
  return first < kNever ? team.argmax(best, row) : -1;
}

// Pivots until row `objective` is at its largest (smallest with sign -1), or `stop` is no basic variable any more.
template <class Team>
FASTMTL_HD void climb(const Team& team, const Dictionary& dict, int objective, double sign, int stop, int* left) {
  int standing = 0;
  while ((*left)-- > 0) {
    if (stop >= 0 && dict.row_variable[objective] != stop) return;
    const bool bland = standing > dict.num_tasks;
    const int c = entering_column(team, dict, objective, sign, bland);
    if (c < 0) return;
    double growth;
    const int r = leaving_row(team, dict, c, bland, &growth);
    if (r < 0) return;  // by rounding only
    pivot(team, dict, r, c);
    standing = growth > 1e-14 ? 0 : standing + 1;
  }
}

// Entry k of inequality j < T, or of the last one, with its right-hand side taken in.
FASTMTL_HD double inequality(const Problem& problem, const SimplexLp& lp, int j, int k) {
  const int64_t t = problem.num_tasks;
  return j < t ? problem.row(j)[k] - lp.bounds[problem.index * t + j]
               : lp.extra[problem.index * t + k] - lp.extra_bound[problem.index];
}

FASTMTL_HD bool is_active(const Problem& problem, const SimplexLp& lp, int j) {
  const int t = problem.num_tasks;
  if (j == t) return lp.extra_bound[problem.index] > -kNever;
  return problem.present(j) && lp.bounds[problem.index * t + j] > -kNever;
}

// Builds the dictionary at corner `start`.
template <class Team>
FASTMTL_HD void fill_dictionary(const Team& team, const Dictionary& dict, const Problem& problem, const SimplexLp& lp,
                                int start) {
  const int t = dict.num_tasks;
  for (int k = team.rank(); k < t; k += team.size()) {
    const bool takes_part = problem.present(k) && k != start;
    dict.column_variable[k] = k == start ? dict.violation() : takes_part ? k : -1;
    dict.row(0)[k] = takes_part ? -1.0 : 0.0;
  }
  if (team.rank() == 0) {
    dict.row_variable[0] = start;
    dict.value(0) = 1;
  }
  for (int j = team.rank() / team.lanes(); j <= t; j += team.size() / team.lanes()) {
    const bool active = is_active(problem, lp, j);
    double largest = 0;
    for (int k = 0; active && k < t; ++k) {
      if (problem.present(k)) largest = std::fmax(largest, std::fabs(inequality(problem, lp, j, k)));
    }
    double* row = dict.row(1 + j);
    const double scale = largest > 0 ? 1 / largest : 0, corner = largest > 0 ? inequality(problem, lp, j, start) : 0;
    for (int k = team.rank() % team.lanes(); k < t; k += team.lanes()) {
      const bool takes_part = largest > 0 && problem.present(k);
      row[k] = !takes_part ? 0.0 : k == start ? 1.0 : (inequality(problem, lp, j, k) - corner) * scale;
    }
    if (team.rank() % team.lanes() == 0) {
      row[t] = corner * scale;
      dict.row_variable[1 + j] = largest > 0 ? t + j : -1;
    }
  }
  const double* q = lp.objective + problem.index * t;
  double largest = 0;
  for (int k = team.rank(); k < t; k += team.size()) {
    if (problem.present(k)) largest = std::fmax(largest, std::fabs(q[k]));
  }
  largest = team.max(largest);
  double* objective = dict.row(dict.rows());
  for (int k = team.rank(); k < t; k += team.size()) {
    objective[k] = largest > 0 && problem.present(k) ? (q[k] - q[start]) / largest : 0.0;
  }
  if (team.rank() == 0) objective[t] = 0;
  team.sync();
}

}  // namespace detail

// weights [T], and by how much the worst inequality is violated, in units of its largest entry: 0 where it can be, the
// same on every thread. No task present: zeros. Anything that takes part and is not finite: NaN; but a bound of -inf
// takes its inequality away.
template <class Team>
FASTMTL_HD double simplex_lp_problem(const Team& team, const Problem& problem, const SimplexLp& lp, double* scratch,
                                     double* weights) {
  const int t = problem.num_tasks;
  const double* q = lp.objective + problem.index * t;
  double zero = 0, best = -detail::kNever;
  int corner = t;
  for (int k = team.rank(); k < t; k += team.size()) {
    if (!problem.present(k)) continue;
    const double bound = lp.bounds[problem.index * t + k];
    zero += q[k] * 0.0 + (bound == -detail::kNever ? 0.0 : bound * 0.0);
    zero += detail::is_active(problem, lp, t) ? lp.extra[problem.index * t + k] * 0.0 : 0.0;
    if (q[k] > best) {
      best = q[k];
      corner = k;
    }
  }
  const double extra_bound = lp.extra_bound[problem.index];
  const bool fine = team.sum(zero) == 0 && (extra_bound == -detail::kNever || extra_bound * 0.0 == 0);
  if (!is_finite(team, problem) || !fine) {
    detail::fill_weights(team, t, detail::kNan, weights);
    return detail::kNan;
  }
  const int start = team.argmax(best, corner);
  detail::fill_weights(team, t, 0.0, weights);
  if (team.max(best) == -detail::kNever) return 0;

  double* const vectors = scratch + static_cast<int64_t>(t + 3) * (t + 1);
  int32_t* const variables = reinterpret_cast<int32_t*>(vectors + t + 3);
  const detail::Dictionary dict = {t, scratch, vectors, variables, variables + t + 2};
  detail::fill_dictionary(team, dict, problem, lp, start);

  double least = 0;
  int worst = 0;
  for (int i = team.rank(); i < dict.rows(); i += team.size()) {
    if (dict.row_variable[i] >= t && dict.value(i) < least) {
      least = dict.value(i);
      worst = i;
    }
  }
  const double violated = team.max(-least);
  const int row = team.argmax(-least, worst);
  int left = 100 * (t + 2);
  double violation = 0;
  if (violated > 0) {
    detail::pivot(team, dict, row, start);  // v enters
    detail::climb(team, dict, row, -1, dict.violation(), &left);
    if (dict.row_variable[row] == dict.violation()) {
      violation = std::fmax(dict.value(row), 0.0);
      if (violation <= detail::kInfeasible) {  // 0, but for rounding: out with it, if anything takes its place
        violation = 0;
        double largest = detail::kPivot;
        int column = -1;
        for (int k = team.rank(); k < t; k += team.size()) {
          if (dict.column_variable[k] >= 0 && std::fabs(dict.row(row)[k]) > largest) {
            largest = std::fabs(dict.row(row)[k]);
            column = k;
          }
        }
        const int c = team.argmax(largest, column);
        if (team.max(largest) > detail::kPivot) detail::pivot(team, dict, row, c);
      }
    }
  }
  if (violation == 0) detail::climb(team, dict, dict.rows(), 1, -1, &left);
  double sum = 0;
  for (int i = team.rank(); i < dict.rows(); i += team.size()) {
    if (dict.row_variable[i] >= 0 && dict.row_variable[i] < t) sum += std::fmax(dict.value(i), 0.0);
  }
  sum = team.sum(sum);
  for (int i = team.rank(); i < dict.rows(); i += team.size()) {
    const int k = dict.row_variable[i];
    if (k >= 0 && k < t) weights[k] = std::fmax(dict.value(i), 0.0) / sum;
  }
  team.sync();
  return violation;
}

}  // namespace fastmtl
