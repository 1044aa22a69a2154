// The trimmed mean on the CPU: of the n values weights[group][t] * rows[p][t][x], weights other than 0, the k largest
// and the k smallest are left out and the others averaged; k = min(trim, (n - 1) / 2).
//
// Traffic: one read of those rows, one write of out. Work per element: about 2 k n comparisons up to k = 4, all in
// registers; n log^2(n) / 4 for more, which sorts in the first cache (the second for T > 500). In fp32 (fp64 for fp64).
#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu.h"
#include "dispatch.h"
#include "terms.h"

namespace fastmtl {
namespace {

constexpr int kMaxInRegisters = 4;

// The elements [begin, end) of one parameter, of the types for which the kernel was made.
struct TrimmedMeanCall {
  const void* const* rows;  // num_rows pointers to the parameter's element 0
  const void* weights;      // num_rows floats, or doubles where the elements are doubles
  int num_rows;
  int trim;  // k
  void* out;
  int64_t begin, end;
  bool stream;
  void* values;  // scratch memory: num_rows of the widest vectors
};

using TrimmedMeanKernel = void (*)(const TrimmedMeanCall&);

}  // namespace
}  // namespace fastmtl

#define FASTMTL_KERNELS "trimmed_mean_kernels.h"
#include "each_target.h"

namespace fastmtl {
namespace {

TrimmedMeanKernel trimmed_mean_kernel(Scalar type, Scalar out) {
  const bool wider = out != type;
#if defined(__x86_64__)
  if (capability() == Capability::avx512) return avx512::kTrimmedMeanKernels[int(type)][wider];
  if (capability() == Capability::avx2) return avx2::kTrimmedMeanKernels[int(type)][wider];
#endif
  return portable::kTrimmedMeanKernels[int(type)][wider];
}

}  // namespace

void trimmed_mean_cpu(const Rows& rows, const double* weights, int64_t trim, const Output* out) {
  constexpr int kWidest = 64 / sizeof(double);
  std::vector<std::vector<double>> values;
  for_each_run(
      rows, weights, out, false,
      [&](int64_t workers) { values.assign(workers, std::vector<double>(int64_t{rows.num_tasks} * kWidest)); },
      [&](int64_t worker, const Run& run, const Terms& terms) {
        const Scalar type = rows.params[run.param].type;
        const int k = static_cast<int>(std::min<int64_t>(trim, std::max(terms.size - 1, 0) / 2));
        trimmed_mean_kernel(
            type, out[run.param].type)({terms.rows.data(), terms.weights_for(type), terms.size, k, out[run.param].data,
                                        run.begin, run.end, run.stream, values[worker].data()});
      });
}

}  // namespace fastmtl
