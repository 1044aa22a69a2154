// Weights of alpha-fair gradients: (M w)_t = (w_t / p_t)^(-1/alpha), w > 0. Ban, Ji: Fair Resource Allocation in
// Multi-Task Learning. ICML 2024, equation 4; alpha = 1 is the Nash bargaining solution of Navon et al., ICML 2022,
// equation 2.
//
// It is where a strictly convex function, 1/2 w^T M w less a concave one of each w_t, is least: there is at most one
// solution, and one exactly where 0 is not in the convex hull of the gradients. In cosines C, with n_t = |g_t|, u = n
// w,
//   C u = s,     log s_t + (1/alpha) log u_t = (1/alpha) log p_t + (1/alpha - 1) log n_t,
// where u, s > 0 are both unknown. Newton's step for these two,
//   (C + diag(s / (alpha u))) du = s r - (C u - s),     ds = s r - s / (alpha u) du,     r: what the logarithms lack,
// goes at most nine tenths of the way to where an entry of u or s would be 0: a primal-dual interior-point method whose
// goal lies inside. From u = s = sqrt(p) it takes 4 to 8 steps for alpha = 1, from whose solution, found roughly, the
// other exponents start: C u = s then holds, and the steps only bring the logarithms to their goal.
//
// Gradients are in units of the longest, so scaling all by a power of 2 scales the weights, to the last bit but those
// of one power function.
//
// Without a solution u grows without bound while s falls: it ends when u^T s is below the rounding of u^T C u.
//
// Cost: per step T^3 / 6 multiply-adds, 2 T^2 for C u and its rounding, 2 T logarithms.
#pragma once
#include "active_set.h"
#include "cholesky.h"

namespace fastmtl {

// Doubles of scratch for one problem: the triangle and nine vectors.
FASTMTL_HD constexpr int64_t fairgrad_scratch(int num_tasks) {
  const int64_t t = num_tasks;
  return t * (t + 1) / 2 + 9 * t;
}

namespace detail {

constexpr int kNewtonSteps = 120;
constexpr double kToBorder = 0.9;      // of the way to the border, at most
constexpr double kRounding = 2.2e-16;  // of a product, relative to the terms that it is summed from
constexpr double kReached = 1e-12;     // of the logarithms, and of C u = s

// The unknowns and what they are to reach; all [T]. scale = 1 / n is 0 for tasks that take no part.
struct Fairness {
  Problem problem;
  double* triangle;
  double* u;
  double* s;
  double* scale;
  double* log_norm;
  double* log_preference;
  double* product;  // C u
  double* terms;    // |C| u
  double* step;
  double* column;

  FASTMTL_HD bool takes_part(int i) const { return scale[i] > 0; }
  FASTMTL_HD double goal(int i, double exponent) const {
    return exponent * log_preference[i] + (exponent - 1) * log_norm[i];
  }
};

FASTMTL_HD Fairness make_fairness(const Problem& problem, double* scratch) {
  const int64_t t = problem.num_tasks;
  double* v = scratch + t * (t + 1) / 2;
  return {problem, scratch, v, v + t, v + 2 * t, v + 3 * t, v + 4 * t, v + 5 * t, v + 6 * t, v + 7 * t, v + 8 * t};
}

template <class Team>
FASTMTL_HD void multiply_cosines(const Team& team, const Fairness& f) {
  const int num_tasks = f.problem.num_tasks;
  for (int i = team.rank(); i < num_tasks; i += team.size()) f.product[i] = f.terms[i] = 0;
  for (int j = 0; j < num_tasks; ++j) {
    if (!f.takes_part(j)) continue;
    const double weight = f.u[j] * f.scale[j];
    const double* gramian = f.problem.row(j);
    for (int i = team.rank(); i < num_tasks; i += team.size()) {
      const double term = gramian[i] * f.scale[i] * weight;
      f.product[i] += term;
      f.terms[i] += std::fabs(term);
    }
  }
}

// The matrix of a step, and its Cholesky solution of f.step.
template <class Team>
FASTMTL_HD bool newton_step(const Team& team, const Fairness& f, double exponent) {
  const int num_tasks = f.problem.num_tasks;
  for (int i = team.rank() / team.lanes(); i < num_tasks; i += team.size() / team.lanes()) {
    const double* gramian = f.problem.row(i);
    double* row = triangle_row(f.triangle, i);
    const double scale = f.scale[i];
    for (int j = team.rank() % team.lanes(); j <= i; j += team.lanes()) {
      const bool both = scale > 0 && f.takes_part(j);
      row[j] = both ? gramian[j] * scale * f.scale[j] : i == j ? 1.0 : 0.0;
      if (both && i == j) row[j] += exponent * f.s[i] / f.u[i];
    }
  }
  team.sync();
  return solve_positive(team, num_tasks, f.triangle, f.step, f.column);
}

// u and s of the solution; false where there is none.
template <class Team>
FASTMTL_HD bool find_fair(const Team& team, const Fairness& f, double last_exponent) {
  const int num_tasks = f.problem.num_tasks;
  double exponent = 1;
  for (int iteration = 0; iteration < kNewtonSteps; ++iteration) {
    multiply_cosines(team, f);
    double lacking = 0, inexact = 0, squared = 0, rounding = 0;
    const double precision = exponent == last_exponent ? kReached : 1e-3;
    for (int i = team.rank(); i < num_tasks; i += team.size()) {
      f.step[i] = 0;
      if (!f.takes_part(i)) continue;
      const double u = f.u[i], s = f.s[i];
      const double lack = f.goal(i, exponent) - std::log(s) - exponent * std::log(u);
      const double difference = f.product[i] - s, noise = 2 * kRounding * f.terms[i];
      lacking = std::fmax(lacking, std::fabs(lack));
      inexact = std::fmax(inexact, std::fabs(difference) / std::fmax(precision * s, 2 * noise));
      squared += u * s;
      rounding += u * noise;
      f.product[i] = s * lack;
      f.step[i] = s * lack - difference;
    }
    lacking = team.max(lacking);
    inexact = team.max(inexact);
    squared = team.sum(squared);
    rounding = team.sum(rounding);
    if (!(squared > 4 * rounding)) return false;  // or something overflowed
    if (inexact <= 1 && exponent != last_exponent && lacking < 0.5) {
      exponent = last_exponent;
      continue;
    }
    if (inexact <= 1 && lacking <= kReached * std::fmax(exponent, 1.0)) return true;
    if (!newton_step(team, f, exponent)) return false;

    double most = 0;  // the largest share of an entry that a whole step takes away
    for (int i = team.rank(); i < num_tasks; i += team.size()) {
      if (!f.takes_part(i)) continue;
      const double u = f.u[i], s = f.s[i], du = f.step[i];
      f.product[i] -= exponent * s / u * du;  // ds
      most = std::fmax(most, std::fmax(-du / u, -f.product[i] / s));
    }
    most = team.max(most);
    const double length = most > kToBorder ? kToBorder / most : 1.0;
    for (int i = team.rank(); i < num_tasks; i += team.size()) {
      if (!f.takes_part(i)) continue;
      f.u[i] += length * f.step[i];
      f.s[i] += length * f.product[i];
    }
    team.sync();
  }
  return false;
}

}  // namespace detail

// weights [T], and the largest |(M w)_t - (w_t / p_t)^(-1/alpha)|, each relative to the sum of the absolute terms of
// (M w)_t; the same on every thread. Without a solution: zeros, and infinity. Nobody takes part (absent, or of
// preference 0): zeros, and 0. An entry that is not finite: NaN.
template <class Team>
FASTMTL_HD double fairgrad_problem(const Team& team, const Problem& problem, const FairGrad& args, double* scratch,
                                   double* weights) {
  const int num_tasks = problem.num_tasks;
  if (!is_finite(team, problem)) {
    detail::fill_weights(team, num_tasks, detail::kNan, weights);
    return detail::kNan;
  }
  const detail::Fairness f = detail::make_fairness(problem, scratch);
  const auto preference = [&](int i) { return !problem.present(i) ? 0.0 : args.preference ? args.preference[i] : 1.0; };
  double longest = 0, largest = 0, zeros = 0;
  for (int i = team.rank(); i < num_tasks; i += team.size()) {
    if (!(preference(i) > 0)) continue;
    longest = std::fmax(longest, problem.squared_norm(i));
    largest = std::fmax(largest, preference(i));
    zeros += !(problem.squared_norm(i) > 0);
  }
  longest = std::sqrt(team.max(longest));
  largest = team.max(largest);
  zeros = team.sum(zeros);
  detail::fill_weights(team, num_tasks, 0.0, weights);
  if (zeros > 0) return detail::kNever;
  if (largest == 0) return 0;
  for (int i = team.rank(); i < num_tasks; i += team.size()) {
    const double p = preference(i) / largest;
    const bool part = p > 0;
    const double norm = part ? std::sqrt(problem.squared_norm(i)) : 0.0;
    f.scale[i] = part ? 1 / norm : 0.0;
    f.log_norm[i] = part ? std::log(norm / longest) : 0.0;
    f.log_preference[i] = part ? std::log(p) : 0.0;
    f.u[i] = f.s[i] = std::sqrt(p);
  }
  team.sync();
  const double exponent = 1 / args.alpha;
  if (!detail::find_fair(team, f, exponent)) return detail::kNever;

  const double unit = std::exp((exponent * std::log(largest) + (exponent - 1) * std::log(longest)) / (1 + exponent));
  detail::multiply_cosines(team, f);
  double error = 0;
  for (int i = team.rank(); i < num_tasks; i += team.size()) {
    if (!f.takes_part(i)) continue;
    const double goal = std::exp(f.goal(i, exponent) - exponent * std::log(f.u[i]));
    error = std::fmax(error, std::fabs(f.product[i] - goal) / f.terms[i]);
    weights[i] = f.u[i] * f.scale[i] * unit;
  }
  error = team.max(error);
  team.sync();
  return error;
}

}  // namespace fastmtl
