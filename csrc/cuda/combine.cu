// out[p][x] = (accumulate ? out[p][x] : 0) + sum_t weights[group(p)][t] * rows[p][t][x].
//
// Traffic: one read of every row of a weight other than 0, one write of out (and one read of it when accumulating).
// Geometry: blocks of 256 threads, each with its own range of columns (table.h); per parameter a block lists its rows
//   of a weight other than 0 in shared memory, then every thread walks that list for 16 bytes of columns at a time.
// Accumulation: in task order, in fp64 for f64 rows and fp32 for the others, rounded to the rows' type once, on store.
// Limits: T <= Table::kMaxRows.
#include "cuda.h"
#include "element.h"
#include "launch.h"
#include "ptx.h"
#include "table.h"

namespace fastmtl {
namespace {

constexpr int kThreads = 256, kTargetBlocks = 2048;

template <class Element>
struct Term {
  const Element* row;
  Sum<Element> weight;
};

// Warp 0 lists the rows that are there and whose weight is not 0 (NaN is not), in task order.
template <class Element>
__device__ __forceinline__ void list_terms(const Table& table, int p, const double* weights, Term<Element>* terms,
                                           int* num_terms) {
  if (threadIdx.x >= 32) return;
  const int num_tasks = table.num_tasks, lane = threadIdx.x;
  int count = 0;
  for (int base = 0; base < num_tasks; base += 32) {
    const int task = base + lane;
    const Element* row = nullptr;
    double weight = 0;
    if (task < num_tasks) {
      row = static_cast<const Element*>(table.rows[int64_t(p) * num_tasks + task]);
      weight = weights[int64_t(table.params[p].group) * num_tasks + task];
    }
    const bool counts = row && weight != 0;
    const unsigned ballot = __ballot_sync(~0u, counts);
    if (counts) terms[count + __popc(ballot & ((1u << lane) - 1))] = {row, static_cast<Sum<Element>>(weight)};
    count += __popc(ballot);
  }
  if (lane == 0) *num_terms = count;
}

// Writes columns [begin, end) of out, N a thread and step. Returns the first column left over (fewer than N are).
template <int N, class Element>
__device__ __forceinline__ int64_t add_terms(const Term<Element>* terms, int num_terms, Element* out, bool accumulate,
                                             int64_t begin, int64_t end) {
  using Pack = Elements<Element, N>;
  for (int64_t i = begin + N * int(threadIdx.x); i + N <= end; i += N * kThreads) {
    Pack pack = accumulate ? Pack::load(out + i) : Pack::zero();
    Sum<Element> sums[N];
#pragma unroll
    for (int n = 0; n < N; ++n) sums[n] = widen(pack.x[n]);
#pragma unroll 4
    for (int k = 0; k < num_terms; ++k) {
      const Term<Element> term = terms[k];
      const Pack row = Pack::load(term.row + i);
#pragma unroll
      for (int n = 0; n < N; ++n) sums[n] += term.weight * widen(row.x[n]);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) pack.x[n] = narrow<Element>(sums[n]);
    pack.store(out + i);
  }
  return end - (end - begin) % N;
}

template <class Element>
__global__ void __launch_bounds__(kThreads) combine_kernel(GRID_CONSTANT(Table) table, int64_t units_per_block,
                                                           const double* __restrict__ weights, bool accumulate) {
  DYNAMIC_SHARED(Term<Element>, terms);
  SHARED(int, num_terms, [1]);
  for_each_run(table, blockIdx.x, units_per_block, [&](int p, int64_t begin, int64_t end) {
    __syncthreads();  // nobody reads the previous parameter's list any more
    list_terms(table, p, weights, terms, num_terms);
    __syncthreads();
    Element* const out = static_cast<Element*>(table.params[p].out);
    if (table.params[p].vector) {
      begin = add_terms<kVector<Element>>(terms, num_terms[0], out, accumulate, begin, end);
    }
    add_terms<1>(terms, num_terms[0], out, accumulate, begin, end);
  });
}

}  // namespace

cudaError_t combine_cuda(const Rows& rows, const double* weights, void* const* out, bool accumulate,
                         cudaStream_t stream) {
  for (Scalar type : kScalars) {
    cudaError_t error = for_each_table(
        rows, type, out, kTargetBlocks, [&](const Table& table, int64_t, int64_t num_blocks, int64_t units_per_block) {
          return with_element(type, [&](auto element) {
            using Element = decltype(element);
            return launch(combine_kernel<Element>, dim3(num_blocks), kThreads, rows.num_tasks * sizeof(Term<Element>),
                          stream, table, units_per_block, weights, accumulate);
          });
        });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace fastmtl
