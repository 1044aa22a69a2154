// What the kernels that make one row out of T have in common: which rows take part, and how the columns are cut.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "partition.h"

namespace fastmtl {

// The rows of one parameter that take part, in task order, and their weights. Scratch memory of one worker.
struct Terms {
  explicit Terms(int num_tasks) : rows(num_tasks), tasks(num_tasks), floats(num_tasks), doubles(num_tasks) {}

  void select(const Parameter& parameter, const double* weights, int num_tasks) {
    size = 0;
    for (int t = 0; t < num_tasks; ++t) {
      if (parameter.rows[t] == nullptr || weights[t] == 0.0) continue;
      rows[size] = parameter.rows[t];
      tasks[size] = t;
      floats[size] = static_cast<float>(weights[t]);
      doubles[size++] = weights[t];
    }
  }
  // Floats, or doubles for rows of doubles.
  const void* weights_for(Scalar type) const {
    return type == Scalar::f64 ? static_cast<const void*>(doubles.data()) : floats.data();
  }

  int size = 0;
  std::vector<const void*> rows;
  std::vector<int> tasks;
  std::vector<float> floats;
  std::vector<double> doubles;
};

// A piece of one parameter's columns.
struct Run {
  int64_t param;
  int64_t begin, end;
  bool stream;  // write past the caches; not together with accumulate
};

// Outputs above this size bypass the caches: a quarter of a common last-level cache, which the rows want too. Not asked
// of the system, which in virtual machines reports that of the whole host.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

// Calls body(worker, run, terms) for pieces that together are all columns, in parallel. A worker is never in two calls
// at once; `workers_made(n)` is told how many there are before.
template <class Prepare, class Body>
void for_each_run(const Rows& rows, const double* weights, const Output* out, bool accumulate, Prepare workers_made,
                  const Body& body) {
  int64_t columns = 0, bytes = 0;
  std::vector<int64_t> order(rows.num_params);
  for (int64_t p = 0; p < rows.num_params; ++p) {
    order[p] = p;
    columns += rows.params[p].size;
    bytes += rows.params[p].size * element_size(out[p].type);
  }
  if (columns == 0) return;
  const bool stream = !accumulate && bytes > kStreamBytes;

  // About half a million elements a job, but four or more, and one where threads would cost more than they bring.
  const int64_t work = columns * (rows.num_tasks + 1);
  const int64_t jobs = work < kParallelWork ? 1 : std::clamp<int64_t>(work >> 19, 4, 1024);
  const std::vector<Cut> cuts = partition(rows, order, jobs);
  const int64_t num_workers = std::min<int64_t>(jobs, num_threads());
  std::vector<Terms> workers(num_workers, Terms(rows.num_tasks));
  workers_made(num_workers);

  // Last columns first: they are what a Gramian before this has left in the caches.
  run_jobs(num_workers, jobs, [&](int64_t worker, int64_t index) {
    const int64_t j = jobs - 1 - index;
    const Cut begin = cuts[j], end = cuts[j + 1];
    Terms& terms = workers[worker];
    for (int64_t p = begin.index; p <= end.index && p < rows.num_params; ++p) {
      const Parameter& parameter = rows.params[p];
      const Run run = {p, p == begin.index ? begin.column : 0, p == end.index ? end.column : parameter.size, stream};
      if (run.begin >= run.end) continue;
      terms.select(parameter, weights + int64_t{parameter.group} * rows.num_tasks, rows.num_tasks);
      body(worker, run, terms);
    }
  });
}

}  // namespace fastmtl
