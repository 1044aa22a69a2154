// out[p][x] = (accumulate ? out[p][x] : 0) + sum_t weights[group(p)][t] * rows[p][t][x].
//
// Traffic: one read of every row of a weight other than 0, one write of out (and one read of it when accumulating).
// Geometry: blocks of 256 threads, each with its own range of columns (table.h), about 2,048 ranges; the last columns
//   come first, since they are what the Gramian has left in the L2 cache. Per parameter a block lists its rows of a
//   weight other than 0 in shared memory, then every thread walks that list, eight rows at once, for 16 bytes of
//   columns at a time.
// Accumulation: in task order, in fp64 for f64 rows and fp32 for the others, rounded to out's type once, on store:
//   that of the rows, or f32 where they are bf16 or f16.
// Limits: T <= Table::kMaxRows.
#include "cuda.h"
#include "element.h"
#include "launch.h"
#include "ptx.h"
#include "table.h"
#include "terms.h"

namespace fastmtl {
namespace {

constexpr int kThreads = 256;
constexpr Ranges kRanges = {2048, 256};

// Writes columns [begin, end) of out, N a thread and step. Returns the first column left over (fewer than N are).
template <int N, class Element, class Out>
__device__ __forceinline__ int64_t add_rows(const Term<Element>* terms, int num_terms, Out* out, bool accumulate,
                                            int64_t begin, int64_t end) {
  using Pack = Elements<Out, N>;
  for (int64_t i = begin + N * int(threadIdx.x); i + N <= end; i += N * kThreads) {
    Pack pack = accumulate ? Pack::load(out + i) : Pack::zero();
    Sum<Element> sums[N];
#pragma unroll
    for (int n = 0; n < N; ++n) sums[n] = widen(pack.x[n]);
    int k = 0;
    const auto add = [&](int, int n, Sum<Element> x) { sums[n] += x; };
    for (; k + 8 <= num_terms; k += 8) with_terms<8, N>(terms + k, i, add);
    if (num_terms & 4) with_terms<4, N>(terms + k, i, add), k += 4;
    if (num_terms & 2) with_terms<2, N>(terms + k, i, add), k += 2;
    if (num_terms & 1) with_terms<1, N>(terms + k, i, add);
#pragma unroll
    for (int n = 0; n < N; ++n) pack.x[n] = narrow<Out>(sums[n]);
    pack.store(out + i);
  }
  return end - (end - begin) % N;
}

template <class Element, class Out>
__global__ void __launch_bounds__(kThreads) combine_kernel(GRID_CONSTANT(Table) table, int64_t units_per_range,
                                                           const double* __restrict__ weights, bool accumulate) {
  DYNAMIC_SHARED(Term<Element>, terms);
  SHARED(int, num_terms, [1]);
  const int64_t range = gridDim.x - 1 - blockIdx.x;  // backwards
  for_each_run(table, range, units_per_range, [&](int p, int64_t begin, int64_t end) {
    __syncthreads();  // nobody reads the previous parameter's list any more
    list_terms(table, p, weights, terms, num_terms);
    __syncthreads();
    Out* const out = static_cast<Out*>(table.params[p].out);
    if (table.params[p].vector) {
      begin = add_rows<kVector<Element>>(terms, num_terms[0], out, accumulate, begin, end);
    }
    add_rows<1>(terms, num_terms[0], out, accumulate, begin, end);
  });
}

}  // namespace

cudaError_t combine_cuda(const Rows& rows, const double* weights, const Output* out, bool accumulate,
                         cudaStream_t stream) {
  return for_each_type([&](auto element, auto result, Scalar type, Scalar out_type) {
    using Element = decltype(element);
    using Out = decltype(result);
    return for_each_table(rows, type, out, out_type, kRanges, true,
                          [&](const Table& table, int64_t, int64_t num_ranges, int64_t units_per_range) {
                            return launch(combine_kernel<Element, Out>, dim3(num_ranges), kThreads,
                                          rows.num_tasks * sizeof(Term<Element>), stream, table, units_per_range,
                                          weights, accumulate);
                          });
  });
}

}  // namespace fastmtl
