// The min-norm point of the convex hull: argmin |sum_t w_t g_t|^2 over w >= 0, sum_t w_t = 1 (MGDA), exactly.
//
// With m the smallest squared norm, the tasks scaled to correlations and c_i = sqrt(m / M_ii), the weights are
// w ~ c z for the z that solves the bound-constrained problem without the equality
//   min 1/2 z^T A z - c^T z,  z >= 0,     A = D^-1/2 M D^-1/2 + c c^T,  D = diag(M).
// A primal active set: from z = 0, the task with the largest decrease r_i^2 / d_i enters (r = c - A z; d_i the
// curvature left once the support follows), the ratio test makes tasks leave that would turn negative on the way. Both
// are one sweep, a symmetric rank-1 update of a tableau that holds, for the support S,
//   S,S: -A_SS^-1     rest,S: A_rest,S A_SS^-1     rest,rest: the Schur complement, whose diagonal is d
// and in an extra column q the solution z on S and the residuals r elsewhere. On random problems 1 to 2 sweeps per
// task.
//
// A task that depends linearly on the support has d = 0 up to rounding. It never divides by that d: it enters where
// another one leaves for it, or not at all.
// Rounding grows with the sweeps, so the duality gap is taken from the Gramian itself; where it does not confirm the
// solution, the tableau is built anew on the support found and the search goes on from there.
//
// Cost: T^2 / 2 multiply-adds per sweep, on a packed triangle of T (T+1) / 2 doubles.
#pragma once
#include <limits>

#include "problem.h"

namespace fastmtl {

// Doubles of scratch for one problem: the triangle, six vectors, and the states (int32) of the tasks.
FASTMTL_HD constexpr int64_t min_norm_scratch(int num_tasks) {
  const int64_t t = num_tasks;
  return t * (t + 1) / 2 + 6 * t + (t + 1) / 2;
}

namespace detail {

// Where a task is. `left`: outside, and has left since the objective last fell: it may not come back before it does.
// kDropped + n: outside, the n-th task to leave for the one that is entering.
enum State : int32_t { kOutside, kInside, kLeft, kAbsent, kDropped };

constexpr double kSmallestPivot = 1e-13;    // less is rounding noise: entries of A are at most 2
constexpr double kSmallestExchange = 1e-6;  // what a dependent task must move another one by, to replace it
constexpr double kGapGoal = 1e-10;          // of m
constexpr int kAttempts = 4;
constexpr double kNever = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct Tableau {
  int num_tasks;
  double* triangle;  // packed lower triangle
  double* q;
  double* column;  // the pivot's column, before its sweep
  double* c;
  double* scale;  // 1 / |g_i|
  double* weights;
  double* product;  // M w
  int32_t* state;

  FASTMTL_HD double* row(int i) const { return triangle + static_cast<int64_t>(i) * (i + 1) / 2; }
  FASTMTL_HD double& at(int i, int j) const { return i > j ? row(i)[j] : row(j)[i]; }
};

FASTMTL_HD Tableau make_tableau(int num_tasks, double* scratch) {
  const int64_t t = num_tasks;
  double* vectors = scratch + t * (t + 1) / 2;
  return {num_tasks,       scratch,         vectors,
          vectors + t,     vectors + 2 * t, vectors + 3 * t,
          vectors + 4 * t, vectors + 5 * t, reinterpret_cast<int32_t*>(vectors + 6 * t)};
}

template <class Team>
FASTMTL_HD void fill_tableau(const Team& team, const Problem& problem, const Tableau& tab) {
  for (int i = team.rank() / team.lanes(); i < tab.num_tasks; i += team.size() / team.lanes()) {
    const double* gramian = problem.row(i);
    double* row = tab.row(i);
    const bool present = tab.state[i] != kAbsent;
    for (int j = team.rank() % team.lanes(); j <= i; j += team.lanes()) {
      const bool both = present && tab.state[j] != kAbsent;
      row[j] = both ? gramian[j] * tab.scale[i] * tab.scale[j] + tab.c[i] * tab.c[j] : 0.0;
    }
  }
  for (int i = team.rank(); i < tab.num_tasks; i += team.size()) tab.q[i] = tab.c[i];
  team.sync();
}

template <class Team>
FASTMTL_HD void load_column(const Team& team, const Tableau& tab, int k) {
  for (int i = team.rank(); i < tab.num_tasks; i += team.size()) tab.column[i] = tab.at(i, k);
  team.sync();
}

// Moves task k, whose column is loaded, into the support (pivot > 0) or out of it (pivot < 0).
template <class Team>
FASTMTL_HD void sweep(const Team& team, const Tableau& tab, int k, int32_t new_state) {
  const double inverse = 1 / tab.column[k];
  const double step = tab.q[k] * inverse;
  team.sync();  // everyone has read q[k]
  for (int i = team.rank() / team.lanes(); i < tab.num_tasks; i += team.size() / team.lanes()) {
    const double factor = tab.column[i] * inverse;
    if (factor == 0) continue;
    double* row = tab.row(i);
    for (int j = team.rank() % team.lanes(); j <= i; j += team.lanes()) row[j] -= factor * tab.column[j];
  }
  team.sync();
  const double sign = new_state == kInside ? inverse : -inverse;
  for (int i = team.rank(); i < tab.num_tasks; i += team.size()) {
    if (i == k) {
      tab.q[k] = new_state == kInside ? step : -step;
      tab.at(k, k) = -inverse;
      tab.state[k] = new_state;
    } else {
      tab.q[i] -= tab.column[i] * step;
      tab.at(i, k) = tab.column[i] * sign;
    }
  }
  team.sync();
}

// The task outside with the largest decrease of the objective, or -1.
template <class Team>
FASTMTL_HD int entering(const Team& team, const Tableau& tab) {
  double best = 0;
  int task = -1;
  for (int i = team.rank(); i < tab.num_tasks; i += team.size()) {
    if (tab.state[i] != kOutside || !(tab.q[i] > 1e-15 + 1e-11 * tab.c[i])) continue;
    const double decrease = tab.q[i] * tab.q[i] / std::fmax(tab.at(i, i), kSmallestPivot);
    if (decrease > best) {
      best = decrease;
      task = i;
    }
  }
  const double largest = team.max(best);
  return largest > 0 ? team.argmax(best, task) : -1;
}

// The task of the support that reaches 0 first as the task of the loaded column grows, or -1; and where it does so.
template <class Team>
FASTMTL_HD int leaving(const Team& team, const Tableau& tab, double smallest, double* growth) {
  double first = kNever;
  int task = -1;
  for (int j = team.rank(); j < tab.num_tasks; j += team.size()) {
    if (tab.state[j] != kInside || !(tab.column[j] > smallest)) continue;
    const double ratio = std::fmax(tab.q[j], 0.0) / tab.column[j];
    if (ratio < first) {
      first = ratio;
      task = j;
    }
  }
  *growth = -team.max(-first);
  return *growth < kNever ? team.argmax(-first, task) : -1;
}

// Brings the last n dropped tasks back, in reverse order.
template <class Team>
FASTMTL_HD void undo_drops(const Team& team, const Tableau& tab, int n) {
  while (n-- > 0) {
    int task = -1;
    for (int i = team.rank(); i < tab.num_tasks; i += team.size()) {
      if (tab.state[i] == kDropped + n) task = i;
    }
    const int j = team.argmax(task, task);
    load_column(team, tab, j);
    sweep(team, tab, j, kInside);
  }
}

// Brings task k into the support and returns the number of sweeps. Where it depends on the support and none can leave
// for it, the support stays as it was, and k counts as one that has left.
template <class Team>
FASTMTL_HD int enter(const Team& team, const Tableau& tab, int k) {
  int dropped = 0;
  while (true) {
    load_column(team, tab, k);
    const double pivot = tab.column[k];
    const bool independent = pivot > kSmallestPivot;
    double growth;
    const int j = leaving(team, tab, independent ? 0.0 : kSmallestExchange, &growth);
    const bool enters = independent && (j < 0 || tab.q[k] <= growth * pivot);
    team.sync();  // everyone has read the column
    if (!enters && j >= 0) {
      load_column(team, tab, j);
      sweep(team, tab, j, kDropped + dropped++);
      continue;
    }
    if (enters) {
      sweep(team, tab, k, kInside);
    } else {
      undo_drops(team, tab, dropped);
    }
    for (int i = team.rank(); i < tab.num_tasks; i += team.size()) {
      if (tab.state[i] >= kDropped || (i == k && !enters)) tab.state[i] = kLeft;
    }
    team.sync();
    return enters ? dropped + 1 : 2 * dropped;
  }
}

// Twice the negative objective, c^T z on the support.
template <class Team>
FASTMTL_HD double objective(const Team& team, const Tableau& tab) {
  double sum = 0;
  for (int i = team.rank(); i < tab.num_tasks; i += team.size()) {
    sum += tab.state[i] == kInside ? tab.c[i] * tab.q[i] : 0.0;
  }
  return team.sum(sum);
}

// The active-set search from the tableau's support on. After `limit` sweeps it stops where it is.
template <class Team>
FASTMTL_HD void search(const Team& team, const Tableau& tab, int limit) {
  double reached = objective(team, tab);
  int sweeps = 0;
  while (sweeps < limit) {
    const int k = entering(team, tab);
    if (k < 0) return;
    sweeps += enter(team, tab, k);
    const double now = objective(team, tab);
    if (now > reached + 1e-14) {
      reached = now;
      for (int i = team.rank(); i < tab.num_tasks; i += team.size()) {
        if (tab.state[i] == kLeft) tab.state[i] = kOutside;
      }
      team.sync();
    }
  }
}

// product = M w.
template <class Team>
FASTMTL_HD void multiply(const Team& team, const Problem& problem, const double* w, double* product) {
  const int num_tasks = problem.num_tasks;
  for (int i = team.rank(); i < num_tasks; i += team.size()) product[i] = 0;
  for (int j = 0; j < num_tasks; ++j) {
    const double weight = w[j];
    if (weight == 0) continue;
    const double* gramian = problem.row(j);
    for (int i = team.rank(); i < num_tasks; i += team.size()) product[i] += weight * gramian[i];
  }
}

// Writes the weights of the solution on the tableau's support, and returns its duality gap.
template <class Team>
FASTMTL_HD double solution(const Team& team, const Problem& problem, const Tableau& tab) {
  double sum = 0;
  for (int i = team.rank(); i < tab.num_tasks; i += team.size()) {
    tab.weights[i] = tab.state[i] == kInside ? tab.scale[i] * std::fmax(tab.q[i], 0.0) : 0.0;
    sum += tab.weights[i];
  }
  sum = team.sum(sum);
  for (int i = team.rank(); i < tab.num_tasks; i += team.size()) tab.weights[i] /= sum;
  team.sync();
  multiply(team, problem, tab.weights, tab.product);
  double squared_norm = 0, smallest = kNever;
  for (int i = team.rank(); i < tab.num_tasks; i += team.size()) {
    if (tab.state[i] == kAbsent) continue;
    squared_norm += tab.weights[i] != 0 ? tab.weights[i] * tab.product[i] : 0.0;
    smallest = std::fmin(smallest, tab.product[i]);
  }
  squared_norm = team.sum(squared_norm);
  smallest = -team.max(-smallest);
  return std::fmax(squared_norm - smallest, 0.0);
}

// Builds the tableau anew on its support, largest pivots first. Leaves out who depends on the others by rounding, and
// who turns negative.
template <class Team>
FASTMTL_HD void rebuild(const Team& team, const Problem& problem, const Tableau& tab) {
  for (int i = team.rank(); i < tab.num_tasks; i += team.size()) {
    tab.state[i] = tab.state[i] == kInside ? kLeft : tab.state[i] == kAbsent ? kAbsent : kOutside;
  }
  team.sync();
  fill_tableau(team, problem, tab);
  while (true) {
    double best = kSmallestPivot;
    int task = -1;
    for (int i = team.rank(); i < tab.num_tasks; i += team.size()) {
      if (tab.state[i] == kLeft && tab.at(i, i) > best) {
        best = tab.at(i, i);
        task = i;
      }
    }
    if (!(team.max(best) > kSmallestPivot)) break;
    const int k = team.argmax(best, task);
    load_column(team, tab, k);
    sweep(team, tab, k, kInside);
  }
  while (true) {
    double worst = 0;
    int task = -1;
    for (int i = team.rank(); i < tab.num_tasks; i += team.size()) {
      if (tab.state[i] == kLeft) tab.state[i] = kOutside;
      if (tab.state[i] == kInside && -tab.q[i] > worst) {
        worst = -tab.q[i];
        task = i;
      }
    }
    if (!(team.max(worst) > 0)) break;
    const int k = team.argmax(worst, task);
    load_column(team, tab, k);
    sweep(team, tab, k, kOutside);
  }
  team.sync();
}

template <class Team>
FASTMTL_HD void fill_weights(const Team& team, int num_tasks, double value, double* weights) {
  for (int i = team.rank(); i < num_tasks; i += team.size()) weights[i] = value;
  team.sync();
}

}  // namespace detail

// weights [T] and the duality gap |x|^2 - min_t <g_t, x> >= 0 of x = sum_t w_t g_t (the same on every thread).
// An exact zero gradient: the first such task alone. No task present: zeros. An entry that is not finite, or products
// that overflow: NaN.
template <class Team>
FASTMTL_HD double min_norm_problem(const Team& team, const Problem& problem, double* scratch, double* weights) {
  const int num_tasks = problem.num_tasks;
  if (!is_finite(team, problem)) {
    detail::fill_weights(team, num_tasks, detail::kNan, weights);
    return detail::kNan;
  }
  const detail::Tableau tab = detail::make_tableau(num_tasks, scratch);
  double smallest = detail::kNever;  // m
  int shortest = -1;
  for (int i = team.rank(); i < num_tasks; i += team.size()) {
    tab.state[i] = problem.present(i) ? detail::kOutside : detail::kAbsent;
    const double squared_norm = problem.present(i) ? std::fmax(problem.squared_norm(i), 0.0) : detail::kNever;
    if (squared_norm < smallest) {
      smallest = squared_norm;
      shortest = i;
    }
  }
  const int first_shortest = team.argmax(-smallest, shortest);
  smallest = -team.max(-smallest);
  detail::fill_weights(team, num_tasks, 0.0, weights);
  if (smallest == detail::kNever) return 0;
  if (smallest == 0) {
    if (team.rank() == 0) weights[first_shortest] = 1;
    team.sync();
    return 0;
  }
  for (int i = team.rank(); i < num_tasks; i += team.size()) {
    const bool present = tab.state[i] != detail::kAbsent;
    tab.scale[i] = present ? 1 / std::sqrt(problem.squared_norm(i)) : 0.0;
    tab.c[i] = present ? std::sqrt(smallest / problem.squared_norm(i)) : 0.0;
  }
  team.sync();

  detail::fill_tableau(team, problem, tab);
  double best = detail::kNever;
  for (int attempt = 0; attempt < detail::kAttempts; ++attempt) {
    if (attempt > 0) detail::rebuild(team, problem, tab);
    detail::search(team, tab, 4 * num_tasks + 20);
    const double gap = detail::solution(team, problem, tab);
    const bool stalled = !(gap < 0.5 * best);
    if (gap < best) {
      best = gap;
      for (int i = team.rank(); i < num_tasks; i += team.size()) weights[i] = tab.weights[i];
      team.sync();
    }
    if (best <= detail::kGapGoal * smallest || stalled) break;
  }
  if (best == detail::kNever) {
    best = detail::kNan;
    detail::fill_weights(team, num_tasks, best, weights);
  }
  return best;
}

}  // namespace fastmtl
