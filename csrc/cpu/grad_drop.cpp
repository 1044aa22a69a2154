// GradDrop on the CPU: with x_t = weights[group][t] * rows[p][t] and U uniform on (0, 1), element by element,
//   P = sum_t max(x_t, 0) / sum_t |x_t|,  out = sum_t (x_t if (x_t > 0) == (P > U) else leak_t * x_t).
//
// Traffic: one read of the rows with a weight other than 0, one write of out. Sums in fp32 (fp64 for fp64), in task
// order. The random numbers are drawn for 1,024 columns at once into the first cache (../grad_drop.h).
#include "../grad_drop.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu.h"
#include "dispatch.h"
#include "terms.h"

namespace fastmtl {
namespace {

constexpr int64_t kDrawn = 1024;
constexpr int64_t kSpare = 32;  // floats that the widest vectors may write behind the end

// The elements [begin, end) of one parameter, of the types for which the kernel was made.
struct GradDropCall {
  const void* const* rows;  // num_rows pointers to the parameter's element 0
  const void* weights;      // num_rows floats, or doubles where the elements are doubles
  const void* leaks;        // likewise, or null
  int num_rows;
  void* out;
  int64_t begin, end;
  bool stream;
  Draws draws;
  float* uniform;  // [kDrawn + kSpare] of scratch memory
};

using GradDropKernel = void (*)(GradDropCall&);

}  // namespace
}  // namespace fastmtl

#define FASTMTL_KERNELS "grad_drop_kernels.h"
#include "each_target.h"

namespace fastmtl {
namespace {

GradDropKernel grad_drop_kernel(Scalar type, Scalar out, bool leaky) {
  const bool wider = out != type;
#if defined(__x86_64__)
  if (capability() == Capability::avx512) return avx512::kGradDropKernels[int(type)][wider][leaky];
  if (capability() == Capability::avx2) return avx2::kGradDropKernels[int(type)][wider][leaky];
#endif
  return portable::kGradDropKernels[int(type)][wider][leaky];
}

struct Scratch {
  explicit Scratch(int num_tasks) : floats(num_tasks), doubles(num_tasks), uniform(kDrawn + kSpare) {}

  // The leaks of the rows that take part.
  const void* leaks_for(Scalar type, const double* leak, const Terms& terms) {
    for (int r = 0; r < terms.size; ++r) {
      doubles[r] = leak[terms.tasks[r]];
      floats[r] = static_cast<float>(doubles[r]);
    }
    return type == Scalar::f64 ? static_cast<const void*>(doubles.data()) : floats.data();
  }

  std::vector<float> floats;
  std::vector<double> doubles;
  std::vector<float> uniform;
};

}  // namespace

void grad_drop_cpu(const Rows& rows, const double* weights, const int64_t* rng, const double* leak, const Output* out) {
  std::vector<Scratch> scratch;
  for_each_run(
      rows, weights, out, false, [&](int64_t workers) { scratch.assign(workers, Scratch(rows.num_tasks)); },
      [&](int64_t worker, const Run& run, const Terms& terms) {
        const Scalar type = rows.params[run.param].type;
        const void* leaks = leak ? scratch[worker].leaks_for(type, leak, terms) : nullptr;
        GradDropCall call = {terms.rows.data(),
                             terms.weights_for(type),
                             leaks,
                             terms.size,
                             out[run.param].data,
                             run.begin,
                             run.end,
                             run.stream,
                             Draws::of(rng, run.param),
                             scratch[worker].uniform.data()};
        grad_drop_kernel(type, out[run.param].type, leak != nullptr)(call);
      });
}

}  // namespace fastmtl
