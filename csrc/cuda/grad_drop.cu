// GradDrop: with x_t = weights[group][t] * rows[p][t] and U uniform on (0, 1), element by element,
//   P = sum_t max(x_t, 0) / sum_t |x_t|,  out = sum_t (x_t if (x_t > 0) == (P > U) else leak_t * x_t).
//
// Traffic: one read of every row of a weight other than 0, one write of out. The random numbers are made from the
//   element's place (../grad_drop.h): one Philox counter per four columns.
// Geometry: as combine.cu.
// Accumulation: in task order, in fp64 for f64 rows and fp32 for the others, rounded to out's type once, on store.
// Limits: T <= Table::kMaxRows; with leaks T <= kMaxTasksLeaky.
#include "../grad_drop.h"
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

// Of N columns, N = 1 or whole vectors.
template <int N, class Number, bool kLeaky>
struct Sums {
  Number positive[N] = {}, negative[N] = {};                  // of the elements above 0, and of the others and NaN
  Number up[kLeaky ? N : 1] = {}, down[kLeaky ? N : 1] = {};  // the outcome if those are kept

  __device__ __forceinline__ void add(int n, Number x, Number leak) {
    const bool above = x > 0;
    positive[n] += above ? x : 0;
    negative[n] += above ? 0 : x;
    if constexpr (kLeaky) {
      const Number leaked = leak * x;
      up[n] += above ? x : leaked;
      down[n] += above ? leaked : x;
    }
  }
  // total * 0: NaN where the sums are not finite.
  __device__ __forceinline__ Number outcome(int n, float uniform) const {
    const Number total = positive[n] - negative[n];
    const bool keeps_positive = positive[n] / total > uniform;
    if constexpr (kLeaky) return (keeps_positive ? up[n] : down[n]) + total * 0;
    return (keeps_positive ? positive[n] : negative[n]) + total * 0;
  }
};

// The uniform numbers of columns i .. i + N - 1; i is a multiple of N.
template <int N>
__device__ __forceinline__ void draw(const Draws& draws, int64_t i, float (&uniform)[N]) {
  if constexpr (N >= 4) {
#pragma unroll
    for (int block = 0; block < N / 4; ++block) {
      const Philox random = draws.words(i / 4 + block);
#pragma unroll
      for (int n = 0; n < 4; ++n) uniform[4 * block + n] = uniform_of(random.word[n]);
    }
  } else {
    const Philox random = draws.words(i / 4);
    const bool second = i & 2;
    const uint32_t even = second ? random.word[2] : random.word[0], odd = second ? random.word[3] : random.word[1];
    if constexpr (N == 2) {
      uniform[0] = uniform_of(even);
      uniform[1] = uniform_of(odd);
    } else {
      uniform[0] = uniform_of(i & 1 ? odd : even);
    }
  }
}

// Writes columns [begin, end) of out, N a thread and step. Returns the first column left over (fewer than N are).
template <int N, bool kLeaky, class Element, class Out>
__device__ __forceinline__ int64_t drop(const Term<Element>* terms, const Sum<Element>* leaks, int num_terms,
                                        const Draws& draws, Out* out, int64_t begin, int64_t end) {
  using Number = Sum<Element>;
  for (int64_t i = begin + N * int(threadIdx.x); i + N <= end; i += N * kThreads) {
    Sums<N, Number, kLeaky> sums;
    int k = 0;
    const auto add = [&](int term, int n, Number x) { sums.add(n, x, kLeaky ? leaks[k + term] : 0); };
    for (; k + 4 <= num_terms; k += 4) with_terms<4, N>(terms + k, i, add);
    if (num_terms & 2) with_terms<2, N>(terms + k, i, add), k += 2;
    if (num_terms & 1) with_terms<1, N>(terms + k, i, add);
    float uniform[N];
    draw<N>(draws, i, uniform);
    Elements<Out, N> pack;
#pragma unroll
    for (int n = 0; n < N; ++n) pack.x[n] = narrow<Out>(sums.outcome(n, uniform[n]));
    pack.store(out + i);
  }
  return end - (end - begin) % N;
}

template <class Element, class Out, bool kLeaky>
__global__ void __launch_bounds__(kThreads, 1)
    grad_drop_kernel(GRID_CONSTANT(Table) table, int64_t units_per_range, const double* __restrict__ weights,
                     const int64_t* __restrict__ rng, const double* __restrict__ leak) {
  DYNAMIC_SHARED(Term<Element>, terms);
  Sum<Element>* const leaks = reinterpret_cast<Sum<Element>*>(terms + table.num_tasks);
  SHARED(int, num_terms, [1]);
  const int64_t range = gridDim.x - 1 - blockIdx.x;  // backwards, as combine
  for_each_run(table, range, units_per_range, [&](int p, int64_t begin, int64_t end) {
    __syncthreads();  // nobody reads the previous parameter's list any more
    select_terms<Element>(table, p, weights, num_terms, [&](int place, int task, const Element* row, double weight) {
      terms[place] = {row, static_cast<Sum<Element>>(weight)};
      if constexpr (kLeaky) leaks[place] = static_cast<Sum<Element>>(leak[task]);
    });
    __syncthreads();
    Out* const out = static_cast<Out*>(table.params[p].out);
    const Draws draws = Draws::of(rng, table.params[p].number);
    if (table.params[p].vector) {
      begin = drop<kVector<Element>, kLeaky>(terms, leaks, num_terms[0], draws, out, begin, end);
    }
    drop<1, kLeaky>(terms, leaks, num_terms[0], draws, out, begin, end);
  });
}

}  // namespace

cudaError_t grad_drop_cuda(const Rows& rows, const double* weights, const int64_t* rng, const double* leak,
                           const Output* out, cudaStream_t stream) {
  return for_each_type([&](auto element, auto result, Scalar type, Scalar out_type) {
    using Element = decltype(element);
    using Out = decltype(result);
    const auto kernel = leak ? grad_drop_kernel<Element, Out, true> : grad_drop_kernel<Element, Out, false>;
    const size_t shared = rows.num_tasks * (sizeof(Term<Element>) + (leak ? sizeof(Sum<Element>) : 0));
    return for_each_table(rows, type, out, out_type, kRanges, true,
                          [&](const Table& table, int64_t, int64_t num_ranges, int64_t units_per_range) {
                            return launch(kernel, dim3(num_ranges), kThreads, shared, stream, table, units_per_range,
                                          weights, rng, leak);
                          });
  });
}

}  // namespace fastmtl
