// Weights that are a function of the Gramian M or of the cosines C between the gradients, by spectrum.h; b the
// preference, n the number of present tasks, D the gradients' norms:
//   aligned_*                w = sqrt(scale) (M^+)^1/2 b, b = 1/n by default; scale: the smallest, the median or the
//   mean
//                            eigenvalue. Senushkin, Patakin, Kuznetsov, Konushin: Independent Component Alignment for
//                            Multi-Task Learning. CVPR 2023, Algorithm 1
//   projections, sum_to_one  w ~ D^-1 C^+ b, b = 1 by default: the cosines of sum_t w_t g_t with the gradients go as b.
//                            With projections its length is the sum of the gradients' projections onto it (Liu, Chu,
//                            Thuerey: ConFIG. ICLR 2025, equations 2 and 3), else the weights sum to 1 (Liu et al.:
//                            Towards Impartial Multi-task Learning. ICLR 2021)
// Eigenvalues of C up to 1e-6 of the largest count as 0, since products taken in float32 cannot tell them from 0; of M
// up to n 2^-23 of the largest, as in the public code of that method, which computes in float32.
//
// Cosines whose inverse proves that no eigenvalue is that small (1 / trace C^-1 is a lower bound) need no eigenvalues:
// n^3 / 2 multiply-adds, by all of the team, and no sequence of rotations.
#pragma once
#include "active_set.h"
#include "spectrum.h"

namespace fastmtl {

// Doubles of scratch for one problem.
FASTMTL_HD constexpr int64_t spectral_scratch(int num_tasks) { return spectrum_scratch(num_tasks); }

namespace detail {

constexpr double kNothing = 1e-12;  // of a sum's terms: is rounding
constexpr double kNoise = 1e-6;     // of the largest eigenvalue
constexpr double kAlignedNoise = 1.0 / (1 << 23);

FASTMTL_HD bool is_aligned(SpectralRule rule) { return rule <= SpectralRule::aligned_rmse; }

// Lists the tasks that make the matrix, by length, ascending: the present ones, of cosines those with a direction.
template <class Team>
FASTMTL_HD Spectrum list_tasks(const Team& team, const Problem& problem, bool cosines, double* scratch) {
  Spectrum s = make_spectrum(problem.num_tasks, 0, scratch);
  const auto takes_part = [&](int i) { return problem.present(i) && (!cosines || problem.squared_norm(i) > 0); };
  double count = 0;
  for (int i = team.rank(); i < problem.num_tasks; i += team.size()) {
    if (!takes_part(i)) continue;
    const double mine = problem.squared_norm(i);
    int place = 0;
    for (int j = 0; j < problem.num_tasks; ++j) {
      const double other = problem.squared_norm(j);
      place += takes_part(j) && (other < mine || (other == mine && j < i));
    }
    s.tasks[place] = i;
    count += 1;
  }
  s.size = static_cast<int>(team.sum(count));
  return s;
}

FASTMTL_HD double cosine(const Problem& problem, const Spectrum& s, int r, int c) {
  return r == c ? 1.0 : problem.row(s.tasks[r])[s.tasks[c]] / s.norms[r] / s.norms[c];
}

// x = C^-1 b by the sweeps of active_set.h, and b^T x; or 0, and b as it was, where C may have an eigenvalue of up to
// kNoise times the largest.
template <class Team>
FASTMTL_HD double solve_definite(const Team& team, const Problem& problem, const Spectrum& s) {
  const Tableau tab = make_tableau(s.size, s.log);
  for (int i = team.rank() / team.lanes(); i < s.size; i += team.size() / team.lanes()) {
    for (int j = team.rank() % team.lanes(); j <= i; j += team.lanes()) tab.row(i)[j] = cosine(problem, s, i, j);
  }
  for (int i = team.rank(); i < s.size; i += team.size()) tab.q[i] = s.x[i];
  team.sync();
  for (int k = 0; k < s.size; ++k) {
    load_column(team, tab, k);
    if (!(tab.column[k] > kNoise)) return 0;  // the Schur complement is at least the smallest eigenvalue
    sweep(team, tab, k, kInside);
  }
  double trace = 0, square = 0;
  for (int i = team.rank(); i < s.size; i += team.size()) {
    trace -= tab.row(i)[i];
    square += s.x[i] * tab.q[i];
  }
  trace = team.sum(trace);
  square = team.sum(square);
  if (!(trace * kNoise * s.size < 1)) return 0;  // n is the trace of C, and no eigenvalue is larger
  for (int i = team.rank(); i < s.size; i += team.size()) s.x[i] = tab.q[i];
  return square;
}

// From the coordinates of b those of f(A) b. Returns b^T A^+ b, or 0 where b has no part in what counts.
template <class Team>
FASTMTL_HD double apply_function(const Team& team, const Spectrum& s, const Spectral& args) {
  double largest = 0;
  for (int i = team.rank(); i < s.size; i += team.size()) largest = std::fmax(largest, s.values[i]);
  const double cutoff = team.max(largest) * (is_aligned(args.rule) ? s.size * kAlignedNoise : kNoise);
  const auto counts = [&](int i) { return s.values[i] > cutoff; };
  double count = 0, mean = 0, smallest = kNever;
  for (int i = team.rank(); i < s.size; i += team.size()) {
    if (!counts(i)) continue;
    count += 1;
    mean += s.values[i];
    smallest = std::fmin(smallest, s.values[i]);
  }
  count = team.sum(count);
  double scale = 0;
  if (args.rule == SpectralRule::aligned_min) {
    scale = -team.max(-smallest);
  } else if (args.rule == SpectralRule::aligned_rmse) {
    scale = team.sum(mean) / count;
  } else if (args.rule == SpectralRule::aligned_median) {
    for (int i = team.rank(); i < s.size; i += team.size()) {
      if (!counts(i)) continue;
      double place = 0;
      for (int j = 0; j < s.size; ++j) {
        if (counts(j)) place += s.values[j] < s.values[i] || (s.values[j] == s.values[i] && j < i);
      }
      if (place == std::floor((count - 1) / 2)) scale = s.values[i];
    }
    scale = team.max(scale);
  }
  double square = 0, part = 0, all = 0;
  for (int i = team.rank(); i < s.size; i += team.size()) {
    const double x = s.x[i];
    all += x * x;
    if (!counts(i)) {
      s.x[i] = 0;
      continue;
    }
    part += x * x;
    square += x * x / s.values[i];
    s.x[i] = is_aligned(args.rule) ? x * std::sqrt(scale / s.values[i]) : x / s.values[i];
  }
  square = team.sum(square);
  part = team.sum(part);
  all = team.sum(all);
  return part > kNothing * all ? square : 0.0;
}

// x = f(A) b for the matrix and the b in s, and b^T A^+ b, or 0. NaN if the log does not suffice, which was never seen.
template <class Team>
FASTMTL_HD double apply_to_spectrum(const Team& team, const Spectral& args, Spectrum s) {
  tridiagonalize(team, s);
  double used = 0;  // exact below 2^53
  if (team.rank() == 0) used = static_cast<double>(diagonalize(s, rotation_capacity(s.size)));
  used = team.sum(used);
  if (used < 0) {
    for (int i = team.rank(); i < s.size; i += team.size()) s.x[i] = kNan;
    return kNan;
  }
  const double square = apply_function(team, s, args);
  transform_back(team, s, static_cast<int64_t>(used));
  return square;
}

}  // namespace detail

// weights [T]; absent tasks, and those without a direction where cosines count, have 0. All zeros: where all gradients
// are; where no direction has cosines that go as b, or the weights that should sum to 1 sum to 0. An entry that is not
// finite: NaN.
template <class Team>
FASTMTL_HD void spectral_problem(const Team& team, const Problem& problem, const Spectral& args, double* scratch,
                                 double* weights) {
  const int num_tasks = problem.num_tasks;
  const bool finite = is_finite(team, problem);
  for (int i = team.rank(); i < num_tasks; i += team.size()) {
    weights[i] = finite ? 0.0 : detail::kNan;
  }
  if (!finite) return;
  const bool cosines = !detail::is_aligned(args.rule);
  detail::Spectrum s = detail::list_tasks(team, problem, cosines, scratch);
  if (s.size == 0) return;
  const double* const preference = args.preference ? args.preference + problem.index * num_tasks : nullptr;
  for (int i = team.rank(); i < s.size; i += team.size()) {
    s.norms[i] = std::sqrt(problem.squared_norm(s.tasks[i]));
    s.x[i] = preference ? preference[s.tasks[i]] : cosines ? 1.0 : 1.0 / s.size;
  }
  team.sync();
  double square = cosines ? detail::solve_definite(team, problem, s) : 0.0;
  if (square == 0) {
    const double unit = unit_of(problem.squared_norm(s.tasks[s.size - 1]));
    for (int r = team.rank() / team.lanes(); r < s.size; r += team.size() / team.lanes()) {
      const double* const gramian = problem.row(s.tasks[r]);
      for (int c = team.rank() % team.lanes(); c < s.size; c += team.lanes()) {
        s.row(r)[c] = cosines ? detail::cosine(problem, s, r, c) : gramian[s.tasks[c]] * unit;
      }
    }
    team.sync();
    square = detail::apply_to_spectrum(team, args, s);
  }
  if (!cosines) {
    for (int i = team.rank(); i < s.size; i += team.size()) weights[s.tasks[i]] = s.x[i];
    return;
  }
  if (square == 0) return;
  double sum = 0, magnitude = 0;
  for (int i = team.rank(); i < s.size; i += team.size()) {
    const double weight = s.x[i] / s.norms[i];
    weights[s.tasks[i]] = weight;
    sum += weight;
    magnitude += std::fabs(weight);
  }
  sum = team.sum(sum);
  magnitude = team.sum(magnitude);
  double factor = std::fabs(sum) > detail::kNothing * magnitude ? 1 / sum : 0.0;
  if (args.rule == SpectralRule::projections) {
    double projections = 0;  // of the gradients, on the direction times its length
    for (int t = 0; t < s.size; ++t) {
      const double* const row = problem.row(s.tasks[t]);
      for (int i = team.rank(); i < s.size; i += team.size()) projections += row[s.tasks[i]] * weights[s.tasks[i]];
    }
    factor = team.sum(projections) / square;
  }
  for (int i = team.rank(); i < s.size; i += team.size()) weights[s.tasks[i]] *= factor;
}

}  // namespace fastmtl
