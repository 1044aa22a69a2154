// Weighted sum of the rows on the CPU: out[p] (+)= sum_t weights[group(p)][t] * rows[p][t].
//
// Traffic: one read of the rows with a weight other than 0, one write of the output (a read more if accumulating). All
// rows pass through a block of accumulators in registers, in fp32 (fp64 for fp64), rounded once when stored; not at
// all where the output of 16-bit rows is fp32. Where the whole output is too large to stay in the last-level cache, it
// is written past the caches: else each line would be read before it is overwritten.
#include <cstdint>

#include "cpu.h"
#include "dispatch.h"
#include "terms.h"

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

}  // namespace

void combine_cpu(const Rows& rows, const double* weights, const Output* out, bool accumulate) {
  for_each_run(
      rows, weights, out, accumulate, [](int64_t) {},
      [&](int64_t, const Run& run, const Terms& terms) {
        if (terms.size == 0 && accumulate) return;
        const Scalar type = rows.params[run.param].type;
        combine_kernel(type, out[run.param].type)({terms.rows.data(), terms.weights_for(type), terms.size,
                                                   out[run.param].data, run.begin, run.end, accumulate, run.stream});
      });
}

}  // namespace fastmtl
