// Weighted sum of the rows on the CPU: out[p] (+)= sum_t weights[group(p)][t] * rows[p][t].
//
// Traffic: one read of the rows with a weight other than 0, one write of the output (a read more if accumulating). All
// rows pass through a block of accumulators in registers, in fp32 (fp64 for fp64), rounded once when stored; not at
// all where the output of 16-bit rows is fp32. Where the whole output is too large to stay in the last-level cache, it
// is written past the caches: else each line would be read before it is overwritten.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu.h"
#include "dispatch.h"
#include "partition.h"

namespace fastmtl {
namespace {

// The elements [begin, end) of one parameter, of the types for which the kernel was made.
struct CombineCall {
  const void* const* rows;  // num_rows pointers to the parameter's element 0
  const void* weights;      // num_rows floats, or doubles where the elements are doubles
  int num_rows;
  void* out;
  int64_t begin, end;
  bool accumulate;
  bool stream;  // write past the caches; not together with accumulate
};

// Outputs above this size bypass the caches: a quarter of a common last-level cache, which the rows want too. Not asked
// of the system, which in virtual machines reports that of the whole host.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

using CombineKernel = void (*)(const CombineCall&);

}  // namespace
}  // namespace fastmtl

#define FASTMTL_KERNELS "combine_kernels.h"
#include "each_target.h"

namespace fastmtl {
namespace {

CombineKernel combine_kernel(Scalar type, Scalar out) {
  const bool wider = out != type;
#if defined(__x86_64__)
  if (capability() == Capability::avx512) return avx512::kCombineKernels[int(type)][wider];
  if (capability() == Capability::avx2) return avx2::kCombineKernels[int(type)][wider];
#endif
  return portable::kCombineKernels[int(type)][wider];
}

// The rows of one parameter that take part, and their weights. Scratch memory of one worker.
struct Terms {
  explicit Terms(int num_tasks) : rows(num_tasks), floats(num_tasks), doubles(num_tasks) {}

  int select(const Parameter& parameter, const double* weights, int num_tasks) {
    int n = 0;
    for (int t = 0; t < num_tasks; ++t) {
      if (parameter.rows[t] == nullptr || weights[t] == 0.0) continue;
      rows[n] = parameter.rows[t];
      floats[n] = static_cast<float>(weights[t]);
      doubles[n++] = weights[t];
    }
    return n;
  }

  std::vector<const void*> rows;
  std::vector<float> floats;
  std::vector<double> doubles;
};

}  // namespace

void combine_cpu(const Rows& rows, const double* weights, const Output* out, bool accumulate) {
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

  // Last columns first: they are what a Gramian before this has left in the caches.
  run_jobs(num_workers, jobs, [&](int64_t worker, int64_t index) {
    const int64_t j = jobs - 1 - index;
    const Cut begin = cuts[j], end = cuts[j + 1];
    Terms& terms = workers[worker];
    for (int64_t p = begin.index; p <= end.index && p < rows.num_params; ++p) {
      const Parameter& parameter = rows.params[p];
      CombineCall call;
      call.begin = p == begin.index ? begin.column : 0;
      call.end = p == end.index ? end.column : parameter.size;
      if (call.begin >= call.end) continue;
      call.num_rows = terms.select(parameter, weights + int64_t{parameter.group} * rows.num_tasks, rows.num_tasks);
      if (call.num_rows == 0 && accumulate) continue;
      call.rows = terms.rows.data();
      call.weights =
          parameter.type == Scalar::f64 ? static_cast<const void*>(terms.doubles.data()) : terms.floats.data();
      call.out = out[p].data;
      call.accumulate = accumulate;
      call.stream = stream;
      combine_kernel(parameter.type, out[p].type)(call);
    }
  });
}

}  // namespace fastmtl
