// Cuts the columns of all parameters, laid end to end, into jobs. The cuts depend on sizes and order alone, never on
// the number of threads: so do the results.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "../parallel.h"
#include "../rows.h"

namespace fastmtl {

// Elements from which on it pays to wake threads: some tens of microseconds of one thread's work.
constexpr int64_t kParallelWork = int64_t{1} << 19;

// A place between two columns: before element `column` of the parameter order[index].
struct Cut {
  int64_t index;
  int64_t column;
};

// jobs + 1 cuts; job j is [cuts[j], cuts[j + 1]).
inline std::vector<Cut> partition(const Rows& rows, const std::vector<int64_t>& order, int64_t jobs) {
  constexpr int64_t kOverhead = 64;    // what a parameter costs by itself, in columns
  constexpr int64_t kMultiple = 1024;  // cuts inside a parameter keep whole chunks and cache lines together
  int64_t total = 0;
  for (int64_t p = 0; p < rows.num_params; ++p) total += rows.params[p].size + kOverhead;

  std::vector<Cut> cuts{{0, 0}};
  cuts.reserve(jobs + 1);
  int64_t before = 0, index = 0;  // cost of the parameters in front of order[index]
  for (int64_t j = 1; j < jobs; ++j) {
    const int64_t target = total / jobs * j;
    while (before + rows.params[order[index]].size + kOverhead <= target) {
      before += rows.params[order[index++]].size + kOverhead;
    }
    const int64_t column = std::max<int64_t>(target - before - kOverhead, 0) / kMultiple * kMultiple;
    cuts.push_back({index, column});
  }
  cuts.push_back({rows.num_params, 0});
  return cuts;
}

// Runs job(worker, j) for all j < jobs. A worker is never in two jobs at once, so it can own scratch memory. Each takes
// the jobs of a range of its own in order, so that the columns follow one another, and then what is left of the
// others'. `workers` is at most num_threads(); one worker runs on the calling thread.
template <class Job>
void run_jobs(int64_t workers, int64_t jobs, const Job& job) {
  if (workers <= 1) {
    for (int64_t j = 0; j < jobs; ++j) job(0, j);
    return;
  }
  std::vector<std::atomic<int64_t>> next(workers);
  for (int64_t w = 0; w < workers; ++w) next[w] = jobs * w / workers;
  parallel_for(workers, [&](int64_t worker) {
    for (int64_t w = worker; w < worker + workers; ++w) {
      const int64_t owner = w % workers, stop = jobs * (owner + 1) / workers;
      for (int64_t j = next[owner]++; j < stop; j = next[owner]++) job(worker, j);
    }
  });
}

}  // namespace fastmtl
