// Symmetric positive definite systems: A = L D L^T without square roots, in place on a packed lower triangle.
//
// Column after column is taken from the rows below it (right-looking): along a row the entries are contiguous, and the
// rows are independent of each other. The right-hand side goes along as one more row.
//
// Cost: n^3 / 6 multiply-adds, n^2 for the right-hand side.
#pragma once
#include <cstdint>

#include "team.h"

namespace fastmtl {
namespace detail {

FASTMTL_HD double* triangle_row(double* triangle, int i) { return triangle + static_cast<int64_t>(i) * (i + 1) / 2; }

// x [n], the right-hand side, becomes the solution; the triangle and column [n] are used up. False, with x undefined,
// where A is not positive definite. All threads have written the triangle and x before (team.sync()).
template <class Team>
FASTMTL_HD bool solve_positive(const Team& team, int n, double* triangle, double* x, double* column) {
  for (int k = 0; k < n; ++k) {
    const double pivot = triangle_row(triangle, k)[k];
    if (!(pivot > 0)) return false;
    const double inverse = 1 / pivot, value = x[k];
    for (int i = k + 1 + team.rank(); i < n; i += team.size()) {
      column[i] = triangle_row(triangle, i)[k];
      x[i] -= column[i] * (inverse * value);
    }
    team.sync();
    for (int i = k + 1 + team.rank() / team.lanes(); i < n; i += team.size() / team.lanes()) {
      const double factor = column[i] * inverse;
      double* row = triangle_row(triangle, i);
      for (int j = k + 1 + team.rank() % team.lanes(); j <= i; j += team.lanes()) row[j] -= factor * column[j];
    }
    team.sync();
  }
  for (int i = n - 1; i >= 0; --i) {
    const double* row = triangle_row(triangle, i);
    const double value = x[i] / row[i];
    team.sync();  // everyone has read x[i]
    for (int j = team.rank(); j < i; j += team.size()) x[j] -= row[j] * value;
    if (team.rank() == 0) x[i] = value;
    team.sync();
  }
  return true;
}

}  // namespace detail
}  // namespace fastmtl
