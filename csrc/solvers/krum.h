// Krum. Blanchard, El Mhamdi, Guerraoui, Stainer: Machine Learning with Adversaries: Byzantine Tolerant Gradient
// Descent. NeurIPS 2017.
//
// The score of a task is the sum of the distances to its nearest others, of which there are n - f - 2: one thread takes
// the f + 1 largest out of a heap and adds up the rest. Who is among the first by score is counted, not sorted.
//
// Cost: T (T + f log T) operations, on T^2 doubles.
#pragma once
#include "active_set.h"

namespace fastmtl {

// Doubles of scratch for one problem: per task its score and the distances to the others.
FASTMTL_HD constexpr int64_t krum_scratch(int num_tasks) { return static_cast<int64_t>(num_tasks) * (num_tasks + 1); }

namespace detail {

constexpr double kDistanceNoise = 1e-14;  // of a squared distance, relative to the squared norms that it comes from

// Lets the value at `top` of a heap whose largest comes first sink to its place.
FASTMTL_HD void sink(double* heap, int size, int top) {
  const double value = heap[top];
  for (int child = 2 * top + 1; child < size; child = 2 * top + 1) {
    if (child + 1 < size && heap[child + 1] > heap[child]) ++child;
    if (!(heap[child] > value)) break;
    heap[top] = heap[child];
    top = child;
  }
  heap[top] = value;
}

// The sum of the n smallest values, which are moved; rounded once, so that equal scores are equal in whatever order
// they were added up.
FASTMTL_HD double sum_of_smallest(double* values, int size, int n) {
  for (int top = size / 2 - 1; top >= 0 && n < size; --top) sink(values, size, top);
  for (; size > n; --size) {
    values[0] = values[size - 1];
    sink(values, size - 1, 0);
  }
  double sum = 0, rest = 0;
  for (int i = 0; i < n; ++i) {
    const double next = sum + values[i];
    const double added = next - sum;
    rest += (sum - (next - added)) + (values[i] - added);
    sum = next;
  }
  return rest * 0.0 == 0 ? sum + rest : sum;  // not where the sum overflowed
}

}  // namespace detail

// weights [T]: equal for those of the smallest scores, of equal ones the first, and 0 for the others; all NaN where M
// is not finite.
template <class Team>
FASTMTL_HD void krum_problem(const Team& team, const Problem& problem, const Krum& method, double* scratch,
                             double* weights) {
  const int num_tasks = problem.num_tasks;
  double *scores = scratch, *distances = scratch + num_tasks;
  if (!is_finite(team, problem)) {
    detail::fill_weights(team, num_tasks, detail::kNan, weights);
    return;
  }
  int count = 0;
  for (int j = 0; j < num_tasks; ++j) count += problem.present(j);
  const int64_t wanted = count - method.num_byzantine - 2;
  const int neighbours = static_cast<int>(wanted > 1 ? wanted : count > 1 ? 1 : 0);
  for (int i = team.rank(); i < num_tasks; i += team.size()) {
    scores[i] = 0;
    if (!problem.present(i)) continue;
    const double *row = problem.row(i), own = row[i];
    double* mine = distances + static_cast<int64_t>(i) * num_tasks;
    int others = 0;
    for (int j = 0; j < num_tasks; ++j) {
      if (j == i || !problem.present(j)) continue;
      const double sum = own + problem.squared_norm(j), distance = sum - 2 * row[j];
      mine[others++] = distance > detail::kDistanceNoise * sum ? distance : 0.0;
    }
    for (int j = 0; method.euclidean && j < others; ++j) mine[j] = std::sqrt(mine[j]);
    scores[i] = detail::sum_of_smallest(mine, others, neighbours);
  }
  team.sync();
  const int64_t selected = method.num_selected < count ? method.num_selected : count;
  for (int i = team.rank(); i < num_tasks; i += team.size()) {
    int64_t before = 0;
    for (int j = 0; j < num_tasks; ++j) {
      before += problem.present(j) && (scores[j] < scores[i] || (scores[j] == scores[i] && j < i));
    }
    weights[i] = problem.present(i) && before < selected ? 1.0 / static_cast<double>(selected) : 0.0;
  }
  team.sync();
}

}  // namespace fastmtl
