// A primal active-set search on a tableau: min 1/2 z^T A z - c^T z over z >= 0, or with some entries of z free.
//
// The task with the largest decrease r_i^2 / d_i enters the support (r = c - A z; d_i the curvature left once the
// support follows), the ratio test makes tasks leave that would turn negative on the way. Both are one sweep, a
// symmetric rank-1 update of a tableau that holds, for the support S,
//   S,S: -A_SS^-1     rest,S: A_rest,S A_SS^-1     rest,rest: the Schur complement, whose diagonal is d
// and in an extra column q the solution z on S and the residuals r elsewhere.
//
// A task that depends linearly on the support has d = 0 up to rounding. It never divides by that d: it enters where
// another one leaves for it, or not at all. Rounding grows with the sweeps, so the duality gap is taken from the
// Gramian itself; where it does not confirm the solution, the tableau is built anew on the support found and the search
// goes on from there.
//
// What the tableau is made of is a Form:
//   form.tab                      the tableau
//   form.fill(team)               builds it; what was in the support counts as kLeft and may be taken in at once
//   Form::kSimplex                z lies on a simplex: the support cannot be empty, and the last one in it is replaced
//   by form.start_at(team, task)     which builds the tableau with that task alone in the support; state is left alone
//   form.solution(team, &good)    writes tab.weights, returns their duality gap, and whether that will do
//
// Cost: n^2 / 2 multiply-adds per sweep, on a packed triangle of n (n+1) / 2 doubles. On random problems 1 to 2 sweeps
// per task.
#pragma once
#include <limits>

#include "problem.h"

namespace fastmtl {

// Doubles of scratch for a tableau of n variables: the triangle, seven vectors, and the states (int32).
FASTMTL_HD constexpr int64_t tableau_scratch(int64_t n) { return n * (n + 1) / 2 + 7 * n + (n + 1) / 2; }

namespace detail {

// Where a task is. `left`: outside, and has left since the objective last fell: it may not come back before it does.
// `free`: in the support for good, of either sign. kDropped + n: outside, the n-th task to leave for the one that is
// entering.
enum State : int32_t { kOutside, kInside, kLeft, kAbsent, kFree, kDropped };

constexpr double kSmallestPivot = 1e-13;    // less is rounding noise: entries of A are at most 2
constexpr double kSmallestExchange = 1e-6;  // what a dependent task must move another one by, to replace it
constexpr int kAttempts = 4;
constexpr double kNever = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct Tableau {
  int size;          // n
  double* triangle;  // packed lower triangle
  double* q;
  double* column;  // the pivot's column, before its sweep
  double* c;
  double* noise;  // what a residual must exceed
  double* scale;  // what z is multiplied by to become a weight
  double* weights;
  double* product;  // M w
  int32_t* state;

  FASTMTL_HD double* row(int i) const { return triangle + static_cast<int64_t>(i) * (i + 1) / 2; }
  FASTMTL_HD double& at(int i, int j) const { return i > j ? row(i)[j] : row(j)[i]; }
};

FASTMTL_HD Tableau make_tableau(int size, double* scratch) {
  const int64_t n = size;
  double* vectors = scratch + n * (n + 1) / 2;
  return {size,
          scratch,
          vectors,
          vectors + n,
          vectors + 2 * n,
          vectors + 3 * n,
          vectors + 4 * n,
          vectors + 5 * n,
          vectors + 6 * n,
          reinterpret_cast<int32_t*>(vectors + 7 * n)};
}

template <class Team>
FASTMTL_HD void load_column(const Team& team, const Tableau& tab, int k) {
  for (int i = team.rank(); i < tab.size; i += team.size()) tab.column[i] = tab.at(i, k);
  team.sync();
}

// Moves task k, whose column is loaded, into the support (pivot > 0) or out of it (pivot < 0).
template <class Team>
FASTMTL_HD void sweep(const Team& team, const Tableau& tab, int k, int32_t new_state) {
  const double inverse = 1 / tab.column[k];
  const double step = tab.q[k] * inverse;
  team.sync();  // everyone has read q[k]
  for (int i = team.rank() / team.lanes(); i < tab.size; i += team.size() / team.lanes()) {
    const double factor = tab.column[i] * inverse;
    if (factor == 0) continue;
    double* row = tab.row(i);
    for (int j = team.rank() % team.lanes(); j <= i; j += team.lanes()) row[j] -= factor * tab.column[j];
  }
  team.sync();
  const double sign = new_state == kInside ? inverse : -inverse;
  for (int i = team.rank(); i < tab.size; i += team.size()) {
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
  for (int i = team.rank(); i < tab.size; i += team.size()) {
    if (tab.state[i] != kOutside || !(tab.q[i] > tab.noise[i])) continue;
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
  for (int j = team.rank(); j < tab.size; j += team.size()) {
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
    for (int i = team.rank(); i < tab.size; i += team.size()) {
      if (tab.state[i] == kDropped + n) task = i;
    }
    const int j = team.argmax(task, task);
    load_column(team, tab, j);
    sweep(team, tab, j, kInside);
  }
}

template <class Team>
FASTMTL_HD bool is_alone(const Team& team, const Tableau& tab) {
  double count = 0;
  for (int i = team.rank(); i < tab.size; i += team.size()) count += tab.state[i] == kInside;
  return team.sum(count) == 1;
}

// Brings task k into the support and returns the number of sweeps. Where it depends on the support and none can leave
// for it, the support stays as it was, and k counts as one that has left.
template <class Team, class Form>
FASTMTL_HD int enter(const Team& team, const Form& form, int k) {
  const Tableau& tab = form.tab;
  int dropped = 0;
  while (true) {
    load_column(team, tab, k);
    const double pivot = tab.column[k];
    const bool independent = pivot > kSmallestPivot;
    double growth;
    const int j = leaving(team, tab, independent ? 0.0 : kSmallestExchange, &growth);
    bool enters = independent && (j < 0 || tab.q[k] <= growth * pivot);
    team.sync();  // everyone has read the column
    if (!enters && j >= 0) {
      if (Form::kSimplex && is_alone(team, tab)) {
        if (team.rank() == 0) {
          tab.state[j] = kLeft;
          tab.state[k] = kInside;
        }
        team.sync();
        form.start_at(team, k);
        enters = true;
      } else {
        load_column(team, tab, j);
        sweep(team, tab, j, kDropped + dropped++);
        continue;
      }
    } else if (enters) {
      sweep(team, tab, k, kInside);
    } else {
      undo_drops(team, tab, dropped);
    }
    for (int i = team.rank(); i < tab.size; i += team.size()) {
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
  for (int i = team.rank(); i < tab.size; i += team.size()) {
    sum += tab.state[i] == kInside || tab.state[i] == kFree ? tab.c[i] * tab.q[i] : 0.0;
  }
  return team.sum(sum);
}

// The active-set search from the tableau's support on. After `limit` sweeps it stops where it is.
template <class Team, class Form>
FASTMTL_HD void search(const Team& team, const Form& form, int limit) {
  const Tableau& tab = form.tab;
  double reached = objective(team, tab);
  int sweeps = 0;
  while (sweeps < limit) {
    const int k = entering(team, tab);
    if (k < 0) return;
    sweeps += enter(team, form, k);
    const double now = objective(team, tab);
    if (now > reached + 1e-14) {
      reached = now;
      for (int i = team.rank(); i < tab.size; i += team.size()) {
        if (tab.state[i] == kLeft) tab.state[i] = kOutside;
      }
      team.sync();
    }
  }
}

// product = unit M w.
template <class Team>
FASTMTL_HD void multiply(const Team& team, const Problem& problem, const double* w, double* product, double unit = 1) {
  const int num_tasks = problem.num_tasks;
  for (int i = team.rank(); i < num_tasks; i += team.size()) product[i] = 0;
  for (int j = 0; j < num_tasks; ++j) {
    const double weight = w[j];
    if (weight == 0) continue;
    const double* gramian = problem.row(j);
    for (int i = team.rank(); i < num_tasks; i += team.size()) product[i] += weight * (gramian[i] * unit);
  }
}

// Builds the tableau anew on its support, largest pivots first. Leaves out who depends on the others by rounding, and
// who turns negative.
template <class Team, class Form>
FASTMTL_HD void rebuild(const Team& team, const Form& form) {
  const Tableau& tab = form.tab;
  for (int i = team.rank(); i < tab.size; i += team.size()) {
    if (tab.state[i] != kAbsent && tab.state[i] != kFree) tab.state[i] = tab.state[i] == kInside ? kLeft : kOutside;
  }
  team.sync();
  form.fill(team);
  while (true) {
    double best = kSmallestPivot;
    int task = -1;
    for (int i = team.rank(); i < tab.size; i += team.size()) {
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
    for (int i = team.rank(); i < tab.size; i += team.size()) {
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

// Solves from the form's tableau on; returns the gap of the weights [num_tasks], which are NaN if nothing was found.
template <class Team, class Form>
FASTMTL_HD double solve(const Team& team, const Form& form, int num_tasks, double* weights) {
  double best = kNever;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    if (attempt > 0) rebuild(team, form);
    search(team, form, 4 * num_tasks + 20);
    bool good;
    const double gap = form.solution(team, &good);
    const bool stalled = !(gap < 0.5 * best);
    if (gap < best) {
      best = gap;
      for (int i = team.rank(); i < num_tasks; i += team.size()) weights[i] = form.tab.weights[i];
      team.sync();
    }
    if (good || stalled) break;
  }
  if (best == kNever) {
    best = kNan;
    fill_weights(team, num_tasks, best, weights);
  }
  return best;
}

}  // namespace detail
}  // namespace fastmtl
