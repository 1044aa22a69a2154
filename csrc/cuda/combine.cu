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

namespace fastmtl {
namespace {

constexpr int kThreads = 256;
constexpr Ranges kRanges = {2048, 256};

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

// Adds kTerms rows' columns i.. to the sums; all loads are under way before the first is used.
template <int kTerms, int N, class Element>
__device__ __forceinline__ void add_terms(const Term<Element>* terms, int64_t i, Sum<Element> (&sums)[N]) {
  Elements<Element, N> rows[kTerms];
#pragma unroll
  for (int k = 0; k < kTerms; ++k) rows[k] = Elements<Element, N>::load(in_global_memory(terms[k].row) + i);
#pragma unroll
  for (int k = 0; k < kTerms; ++k) {
#pragma unroll
    for (int n = 0; n < N; ++n) sums[n] += terms[k].weight * widen(rows[k].x[n]);
  }
}

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
    for (; k + 8 <= num_terms; k += 8) add_terms<8>(terms + k, i, sums);
    if (num_terms & 4) add_terms<4>(terms + k, i, sums), k += 4;
    if (num_terms & 2) add_terms<2>(terms + k, i, sums), k += 2;
    if (num_terms & 1) add_terms<1>(terms + k, i, sums);
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

// One launch per table of the parameters of the two types.
template <class Element, class Out>
cudaError_t combine_tables(const Rows& rows, Scalar type, const double* weights, const Output* out, Scalar out_type,
                           bool accumulate, cudaStream_t stream) {
  return for_each_table(rows, type, out, out_type, kRanges, true,
                        [&](const Table& table, int64_t, int64_t num_ranges, int64_t units_per_range) {
                          return launch(combine_kernel<Element, Out>, dim3(num_ranges), kThreads,
                                        rows.num_tasks * sizeof(Term<Element>), stream, table, units_per_range, weights,
                                        accumulate);
                        });
}

}  // namespace

cudaError_t combine_cuda(const Rows& rows, const double* weights, const Output* out, bool accumulate,
                         cudaStream_t stream) {
  for (Scalar type : kScalars) {
    const cudaError_t error = with_element(type, [&](auto element) {
      using Element = decltype(element);
      cudaError_t error = combine_tables<Element, Element>(rows, type, weights, out, type, accumulate, stream);
      if constexpr (sizeof(Element) == 2) {
        if (error == cudaSuccess) {
          error = combine_tables<Element, float>(rows, type, weights, out, Scalar::f32, accumulate, stream);
        }
      }
      return error;
    });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace fastmtl
