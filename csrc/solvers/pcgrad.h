// PCGrad on the Gramian. Yu, Kumar, Gupta, Levine, Hausman, Finn: Gradient Surgery for Multi-Task Learning. NeurIPS
// 2020, Algorithm 1.
//
// Task i starts with g' = g_i and visits the others in its order; where <g', g_j> < 0, g' -= <g', g_j> / |g_j|^2 g_j,
// with the original g_j. As g' = sum_t c_t g_t, all it takes is c and v = M c, the inner products of g' with all tasks:
// v changes on a projection only, so a team looks for the next conflict at several positions at once.
//
// Rounding: after a projection the inner product with anything parallel to g_j is zero up to rounding, and its sign is
// noise. That is harmless: a projection moves g' by |<g', g_j>| / |g_j|, continuous through zero, so a spurious one
// moves it by about eps |g_i|, and no threshold is needed.
//
// Cost of a row: one pass over T entries per projection, at most T of them. A problem: <= T^3 multiply-adds.
#pragma once
#include "order.h"
#include "problem.h"

namespace fastmtl {

// Doubles of scratch for one row: v [T] and the order.
FASTMTL_HD constexpr int64_t pcgrad_row_scratch(int num_tasks) {
  return num_tasks + (order_scratch_words(num_tasks) + 1) / 2;
}

// coefficients [T] = c of the given row, zeros where it is absent; the weights are their sum over the rows (in the
// order of the rows), divided by the number of present tasks for the mean. The Gramian must be finite.
template <class Team>
FASTMTL_HD void pcgrad_row(const Team& team, const Problem& problem, const Order& order, bool include_self, int row,
                           double* scratch, double* coefficients) {
  const int num_tasks = problem.num_tasks;
  const bool present = problem.present(row);
  double* v = scratch;
  int32_t* visit = reinterpret_cast<int32_t*>(scratch + num_tasks);
  const double* gramian_row = problem.row(row);
  for (int j = team.rank(); j < num_tasks; j += team.size()) {
    coefficients[j] = present && j == row ? 1.0 : 0.0;
    v[j] = gramian_row[j];  // may be anything where j is absent: never used there
  }
  if (!present) {
    team.sync();
    return;
  }
  visiting_order(team, order, problem.index, row, num_tasks, visit);

  int position = 0;
  while (position < num_tasks) {
    const int mine = position + team.rank();
    bool conflict = false;
    if (mine < num_tasks) {
      const int j = visit[mine];
      conflict = v[j] < 0 && problem.present(j) && (include_self || j != row) && problem.squared_norm(j) > 0;
    }
    const int first = team.first(conflict);
    if (first == team.size()) {
      position += team.size();
      continue;
    }
    position += first;
    const int j = visit[position++];
    const double* gramian_j = problem.row(j);
    const double step = v[j] / gramian_j[j];
    team.sync();  // everyone has read v[j]
    for (int t = team.rank(); t < num_tasks; t += team.size()) v[t] -= step * gramian_j[t];
    if (team.rank() == 0) coefficients[j] -= step;
    team.sync();
  }
}

}  // namespace fastmtl
