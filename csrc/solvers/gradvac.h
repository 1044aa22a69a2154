// GradVac on the Gramian. Wang, Tsvetkov, Firat, Cao: Gradient Vaccine. ICLR 2021, Algorithm 1 and equation 3.
//
// As PCGrad's loop (pcgrad.h), but against a target cosine t = target[i][j] for every pair: with phi = cos(g', g_j),
//   where phi < t:  g' += |g'| (t sqrt(1 - phi^2) - phi sqrt(1 - t^2)) / (|g_j| sqrt(1 - t^2)) g_j,   so cos becomes t
//   and always:     target[i][j] = (1 - beta) t + beta phi,                            phi from before the correction
// With targets of 0 it is PCGrad.
//
// Rounding: |g'|^2 changes by a (2 <g', g_j> + a |g_j|^2) in a correction by a g_j. That is as accurate as computing
// c^T M c anew (compared, against vectors), as all terms are bounded by what g' was made of, parts = sum_t |c_t| |g_t|.
// Where g' has become much smaller, its direction is rounding noise: below kVanished * parts it counts as zero. What is
// zero has no cosine: it is not corrected and leaves its targets alone. So do tasks of zero norm.
// A target next to 1 asks for an unbounded multiple of g_j, and is never reached by two parallel gradients whose cosine
// is 1 up to rounding. So targets count as at most kLargestTarget, which bounds the multiple by about 700 |g'| / |g_j|;
// their average is kept as it is.
#pragma once
#include "order.h"
#include "problem.h"

namespace fastmtl {

// Doubles of scratch for one row: v [T], |g_j| [T] and the order.
FASTMTL_HD constexpr int64_t gradvac_row_scratch(int num_tasks) {
  return 2 * static_cast<int64_t>(num_tasks) + (order_scratch_words(num_tasks) + 1) / 2;
}

struct GradVacRule {
  double beta;
  bool ema_first;
  bool ema_always;
};

namespace detail {

constexpr double kVanished = 1e-6;
constexpr double kLargestTarget = 1 - 1e-6;

FASTMTL_HD double cosine(double product, double norm, double norm_j) {
  return std::fmin(1.0, std::fmax(-1.0, product / (norm * norm_j)));
}

struct CosineStep {
  bool correct;   // phi is below its target
  double target;  // what it is compared with
  double moved;   // the target's next value, if it moves
};

FASTMTL_HD CosineStep compare_cosine(const GradVacRule& rule, double phi, double old) {
  CosineStep step;
  step.moved = (1 - rule.beta) * old + rule.beta * phi;
  step.target = rule.ema_first ? step.moved : old;
  if (step.target > kLargestTarget) step.target = kLargestTarget;
  step.correct = phi < step.target;
  return step;
}

// How much of g_j turns g', with cosine phi, to cosine `target`.
FASTMTL_HD double cosine_correction(double norm, double norm_j, double phi, double target) {
  const double sine = std::sqrt(std::fmax(0.0, 1 - phi * phi));
  const double target_sine = std::sqrt(1 - target * target);  // target > phi >= -1, and at most kLargestTarget
  return norm * (target * sine - phi * target_sine) / (norm_j * target_sine);
}

}  // namespace detail

// coefficients [T] as in pcgrad_row. targets and new_targets [T]: the given row's; they may be the same array.
template <class Team>
FASTMTL_HD void gradvac_row(const Team& team, const Problem& problem, const Order& order, const GradVacRule& rule,
                            int row, const double* targets, double* new_targets, double* scratch,
                            double* coefficients) {
  const int num_tasks = problem.num_tasks;
  const bool present = problem.present(row);
  double* v = scratch;
  double* norms = scratch + num_tasks;
  int32_t* visit = reinterpret_cast<int32_t*>(scratch + 2 * static_cast<int64_t>(num_tasks));
  const double* gramian_row = problem.row(row);
  for (int j = team.rank(); j < num_tasks; j += team.size()) {
    coefficients[j] = present && j == row ? 1.0 : 0.0;
    new_targets[j] = targets[j];
    v[j] = gramian_row[j];  // may be anything where j is absent: never used there
    norms[j] = present && problem.present(j) ? std::sqrt(std::fmax(0.0, problem.squared_norm(j))) : 0.0;
  }
  if (!present) {
    team.sync();
    return;
  }
  visiting_order(team, order, problem.index, row, num_tasks, visit);

  double norm = norms[row];  // |g'|
  double squared_norm = norm * norm;
  double parts = norm;  // at least sum_t |c_t| |g_t|
  int position = 0;
  while (position < num_tasks && norm > 0) {
    const int mine = position + team.rank();
    const int j_mine = mine < num_tasks ? visit[mine] : row;
    const bool meets = j_mine != row && norms[j_mine] > 0;  // an absent task has norm 0 here
    detail::CosineStep step = {false, 0, 0};
    if (meets) step = detail::compare_cosine(rule, detail::cosine(v[j_mine], norm, norms[j_mine]), targets[j_mine]);
    const int first = team.first(step.correct);
    const bool correct = first < team.size();
    const int j = correct ? visit[position + first] : row;
    const double v_j = v[j], target_j = targets[j];
    team.sync();  // everyone has read v and the targets
    if (meets && team.rank() <= first && (rule.ema_always || step.correct)) new_targets[j_mine] = step.moved;
    position += correct ? first + 1 : team.size();
    if (!correct) continue;

    const double phi = detail::cosine(v_j, norm, norms[j]);
    const double target = detail::compare_cosine(rule, phi, target_j).target;
    const double amount = detail::cosine_correction(norm, norms[j], phi, target);
    const double* gramian_j = problem.row(j);
    for (int t = team.rank(); t < num_tasks; t += team.size()) v[t] += amount * gramian_j[t];
    if (team.rank() == 0) coefficients[j] += amount;
    parts += amount * norms[j];
    squared_norm += amount * (2 * v_j + amount * gramian_j[j]);
    const double vanished = detail::kVanished * parts;
    norm = squared_norm > vanished * vanished ? std::sqrt(squared_norm) : 0.0;
    team.sync();
  }
}

}  // namespace fastmtl
