// One of the K problems of solvers.h, as a solver sees it.
#pragma once
#include <cmath>
#include <cstdint>

#include "solvers.h"
#include "team.h"

namespace fastmtl {

struct Problem {
  int64_t index;          // k
  int num_tasks;          // T
  const double* gramian;  // [T,T]
  const uint8_t* mask;    // [T] or null

  FASTMTL_HD bool present(int task) const { return !mask || mask[task] != 0; }
  FASTMTL_HD const double* row(int task) const { return gramian + static_cast<int64_t>(task) * num_tasks; }
  FASTMTL_HD double squared_norm(int task) const { return row(task)[task]; }
};

FASTMTL_HD Problem problem_at(const Problems& problems, int64_t k) {
  const int64_t t = problems.num_tasks, m = problems.repeats == 1 ? k : k / problems.repeats;
  return {k, problems.num_tasks, problems.gramian + m * t * t, problems.mask ? problems.mask + m * t : nullptr};
}

// Whether all entries of one present row among the present tasks are finite. (x * 0 is 0 for finite x only, and a sum
// of such zeros needs no branch.)
template <class Team>
FASTMTL_HD bool row_is_finite(const Team& team, const Problem& problem, int task) {
  const double* row = problem.row(task);
  double zero = 0;
  for (int j = team.rank(); j < problem.num_tasks; j += team.size()) zero += problem.present(j) ? row[j] * 0.0 : 0.0;
  return team.sum(zero) == 0;
}

template <class Team>
FASTMTL_HD bool is_finite(const Team& team, const Problem& problem) {
  double zero = 0;
  for (int i = team.rank() / team.lanes(); i < problem.num_tasks; i += team.size() / team.lanes()) {
    if (!problem.present(i)) continue;
    const double* row = problem.row(i);
    for (int j = team.rank() % team.lanes(); j < problem.num_tasks; j += team.lanes()) {
      zero += problem.present(j) ? row[j] * 0.0 : 0.0;
    }
  }
  return team.sum(zero) == 0;
}

// The power of two that brings a squared norm near 1.
FASTMTL_HD double unit_of(double squared_norm) {
  const int exponent = squared_norm > 0 ? std::ilogb(squared_norm) : 0;
  return std::scalbn(1.0, exponent > -1022 ? (exponent < 1022 ? -exponent : -1022) : 1022);
}

}  // namespace fastmtl
