// Functions of a symmetric matrix, applied to a vector: x = V f(L) V^T b, with A = V L V^T. No iteration on matrices,
// no eigenvectors: A = Q (tridiagonal) Q^T by Householder reflections, the tridiagonal is made diagonal by implicit QL
// sweeps with Wilkinson's shift, and b goes through both: forwards, scaled by f, and backwards. The sweeps' rotations
// are logged for the way back, so they cost a few operations each in place of n.
//
// The matrix is reduced from its last row up, and swept from its first row down: with rows in ascending order of size,
// that keeps what is small in matrices of graded sizes. Else errors are a few 1e-16 of the largest eigenvalue.
//
// Cost: 2 n^3 multiply-adds for the reflections, spread over the team; then about 0.8 n^2 rotations one after the
// other, by one thread: on a device, slow above some 100 tasks.
#pragma once
#include <limits>

#include "problem.h"

namespace fastmtl {

// Pairs of doubles for the log of the rotations. Sweeps take 0.6 n^2 to 0.9 n^2 in all.
FASTMTL_HD constexpr int64_t rotation_capacity(int64_t n) { return 2 * n * n + 32 * n; }

// Doubles of scratch for one problem: the matrix, seven vectors, the tasks (int32), the log.
FASTMTL_HD constexpr int64_t spectrum_scratch(int64_t n) {
  return n * n + 7 * n + (n + 1) / 2 + 2 * rotation_capacity(n);
}

namespace detail {

struct Spectrum {
  int size;         // n
  double* matrix;   // [n,n]; then row i holds the reflection that made row i tridiagonal
  double* values;   // the diagonal; then the eigenvalues
  double* beside;   // [i]: couples i and i + 1
  double* tau;      // reflection i is 1 - tau_i v_i v_i^T
  double* x;        // b; then its coordinates; then the result
  double* product;  // matrix v
  double* update;   // w: a reflection takes v w^T + w v^T from the matrix
  double* norms;
  int32_t* tasks;  // which ones the rows are of
  double* log;     // rotations (cosine, sine); after each sweep (the last index, the first index)

  FASTMTL_HD double* row(int i) const { return matrix + static_cast<int64_t>(i) * size; }
};

FASTMTL_HD Spectrum make_spectrum(int num_tasks, int size, double* scratch) {
  const int64_t n = num_tasks;
  double* const vectors = scratch + n * n;
  double* const places = vectors + 7 * n;
  return {size,
          scratch,
          vectors,
          vectors + n,
          vectors + 2 * n,
          vectors + 3 * n,
          vectors + 4 * n,
          vectors + 5 * n,
          vectors + 6 * n,
          reinterpret_cast<int32_t*>(places),
          places + (n + 1) / 2};
}

// row -= a w + b v, and product += factor row
FASTMTL_HD void update_and_multiply(int begin, int end, int stride, double a, double b, double factor,
                                    const double* __restrict__ v, const double* __restrict__ w,
                                    double* __restrict__ row, double* __restrict__ product) {
  for (int k = begin; k < end; k += stride) {
    row[k] -= a * w[k] + b * v[k];
    product[k] += factor * row[k];
  }
}

// To tridiagonal form, from the last row up. A reflection's rank-2 update is made while the next one's product with the
// matrix is taken: one pass over the matrix for each.
template <class Team>
FASTMTL_HD void tridiagonalize(const Team& team, Spectrum& s) {
  const int n = s.size;
  for (int k = team.rank(); k < n; k += team.size()) s.update[k] = 0;
  for (int i = n - 1; i >= 0; --i) {
    double* const row = s.row(i);
    const double* const before = s.row(i < n - 1 ? i + 1 : i);  // the reflection before; at first its update is 0
    if (i < n - 1) {
      const double a = before[i], b = s.update[i];
      for (int k = team.rank(); k <= i; k += team.size()) row[k] -= a * s.update[k] + b * before[k];
    }
    team.sync();
    if (team.rank() == 0) s.values[i] = row[i];
    if (i == 0) break;

    double rest = 0;
    for (int k = team.rank(); k < i - 1; k += team.size()) rest += row[k] * row[k];
    rest = team.sum(rest);
    const double x = row[i - 1];
    const bool reflects = rest > 1e-290;
    const double length = std::sqrt(x * x + rest);
    const double image = !reflects ? x : x > 0 ? -length : length;
    const double tau = reflects ? 2 / (rest + (x - image) * (x - image)) : 0.0;
    team.sync();  // everyone has read x
    for (int k = team.rank(); k < i; k += team.size()) {
      row[k] = !reflects ? 0.0 : k == i - 1 ? x - image : row[k];
      s.product[k] = 0;
    }
    if (team.rank() == 0) {
      s.beside[i - 1] = image;
      s.tau[i] = tau;
    }
    team.sync();
    for (int j = 0; j < i; ++j) {
      update_and_multiply(team.rank(), i, team.size(), i < n - 1 ? before[j] : 0.0, s.update[j], row[j], before,
                          s.update, s.row(j), s.product);
    }
    double inner = 0, along = 0;
    for (int k = team.rank(); k < i; k += team.size()) {
      inner += row[k] * s.product[k];
      along += row[k] * s.x[k];
    }
    inner = team.sum(inner);
    along = tau * team.sum(along);
    for (int k = team.rank(); k < i; k += team.size()) {
      s.product[k] = tau * (s.product[k] - 0.5 * tau * inner * row[k]);
      s.x[k] -= along * row[k];
    }
    double* const update = s.product;
    s.product = s.update;
    s.update = update;
    team.sync();
  }
}

// The eigenvalues of the tridiagonal, and x in coordinates of its eigenvectors; one thread. The number of log entries,
// or -1 if they do not suffice.
FASTMTL_HD int64_t diagonalize(const Spectrum& s, int64_t capacity) {
  const int n = s.size;
  constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
  double *const d = s.values, *const e = s.beside, *const x = s.x;
  e[n - 1] = 0;
  int64_t used = 0;
  for (int first = 0; first < n; ++first) {
    while (true) {
      int last = first;
      while (last < n - 1 && !(std::fabs(e[last]) <= kEpsilon * (std::fabs(d[last]) + std::fabs(d[last + 1])))) ++last;
      if (last == first) break;
      if (used + (last - first) + 1 > capacity) return -1;
      const double half = (d[first + 1] - d[first]) / (2 * e[first]);
      const double root = std::sqrt(half * half + 1);
      double g = d[last] - d[first] + e[first] / (half + (half < 0 ? -root : root));
      double sine = 1, cosine = 1, shift = 0;
      int i = last - 1;
      for (; i >= first; --i) {
        const double f = sine * e[i], b = cosine * e[i];
        double r = std::sqrt(f * f + g * g);
        e[i + 1] = r;
        if (r == 0) {  // underflow
          d[i + 1] -= shift;
          break;
        }
        sine = f / r;
        cosine = g / r;
        g = d[i + 1] - shift;
        r = (d[i] - g) * sine + 2 * cosine * b;
        shift = sine * r;
        d[i + 1] = g + shift;
        g = cosine * r - b;
        const double upper = x[i], lower = x[i + 1];
        x[i + 1] = sine * upper + cosine * lower;
        x[i] = cosine * upper - sine * lower;
        s.log[2 * used] = cosine;
        s.log[2 * used++ + 1] = sine;
      }
      if (i < first) {
        d[first] -= shift;
        e[first] = g;
      }
      e[last] = 0;
      s.log[2 * used] = i + 1;
      s.log[2 * used++ + 1] = last;
    }
  }
  return used;
}

// From coordinates of the eigenvectors back.
template <class Team>
FASTMTL_HD void transform_back(const Team& team, const Spectrum& s, int64_t used) {
  if (team.rank() == 0) {
    double* const x = s.x;
    while (used > 0) {
      const int end = static_cast<int>(s.log[2 * --used + 1]);
      for (int i = static_cast<int>(s.log[2 * used]); i < end; ++i) {
        const double* const rotation = s.log + 2 * --used;
        const double upper = x[i], lower = x[i + 1];
        x[i] = rotation[0] * upper + rotation[1] * lower;
        x[i + 1] = rotation[0] * lower - rotation[1] * upper;
      }
    }
  }
  team.sync();
  for (int i = 1; i < s.size; ++i) {
    const double* const row = s.row(i);
    double along = 0;
    for (int k = team.rank(); k < i; k += team.size()) along += row[k] * s.x[k];
    along = s.tau[i] * team.sum(along);
    for (int k = team.rank(); k < i; k += team.size()) s.x[k] -= along * row[k];
    team.sync();
  }
}

}  // namespace detail
}  // namespace fastmtl
