// The trimmed mean: of the n values weights[group][t] * rows[p][t][x], weights other than 0, the k largest and the k
// smallest are left out and the others averaged; k = min(trim, (n - 1) / 2).
//
// Traffic: one read of every row of a weight other than 0, one write of out.
// Geometry: as combine.cu. For trim <= kMaxTrimInRegisters a thread keeps the k largest, the k smallest of the rest and
//   the sum of all others of each of its columns in registers: about 2 k n comparisons. Above that a block takes some
//   columns into shared memory, as many as fit, and sorts them by Batcher's odd-even merge sort: n log^2(n) / 4.
// Accumulation: in fp64 for f64 rows and fp32 for the others, rounded to out's type once, on store.
// Limits: T <= Table::kMaxRows; T <= kMaxTasksSorted where it sorts.
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
constexpr int kMaxColumns = 32;            // of a tile that is sorted
constexpr size_t kSharedBytes = 47 << 10;  // of it and of the list of rows

__device__ __forceinline__ int trimmed(int trim, int num_terms) { return min(trim, max(num_terms - 1, 0) / 2); }

template <class Number>
__device__ __forceinline__ void sort_pair(Number& low, Number& high) {
  const Number a = low, b = high;
  low = a < b ? a : b;
  high = a < b ? b : a;
}

// Of N columns. With fewer than K to be trimmed, the other places are held by infinities for good.
template <int N, int K, class Number>
struct Trimmed {
  Number largest[N][K], smallest[N][K];  // from the greatest down; from the least up
  Number sum[N], nan[N];

  __device__ __forceinline__ explicit Trimmed(int trim) {
    const Number inf = static_cast<Number>(INFINITY);
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        largest[n][k] = k < K - trim ? inf : -inf;
        smallest[n][k] = k < K - trim ? -inf : inf;
      }
      sum[n] = nan[n] = 0;
    }
  }
  // What the first values push out of the places that are still to be filled is no value.
  __device__ __forceinline__ void add(int n, Number x, bool fills_largest, bool fills_smallest) {
    if (!(x == x)) nan[n] = x;
#pragma unroll
    for (int k = 0; k < K; ++k) sort_pair(x, largest[n][k]);
    if (fills_largest) return;
#pragma unroll
    for (int k = 0; k < K; ++k) sort_pair(smallest[n][k], x);
    if (!fills_smallest) sum[n] += x;
  }
};

// Writes columns [begin, end) of out, N a thread and step. Returns the first column left over (fewer than N are).
template <int N, int K, class Element, class Out>
__device__ __forceinline__ int64_t average(const Term<Element>* terms, int num_terms, int trim, Out* out, int64_t begin,
                                           int64_t end) {
  using Number = Sum<Element>;
  const Number num_left = max(num_terms - 2 * trim, 1);
  for (int64_t i = begin + N * int(threadIdx.x); i + N <= end; i += N * kThreads) {
    Trimmed<N, K, Number> state(trim);
    int r = 0;
    const auto add = [&](int term, int n, Number x) { state.add(n, x, r + term < trim, r + term < 2 * trim); };
    for (; r + 4 <= num_terms; r += 4) with_terms<4, N>(terms + r, i, add);
    if (num_terms & 2) with_terms<2, N>(terms + r, i, add), r += 2;
    if (num_terms & 1) with_terms<1, N>(terms + r, i, add);
    Elements<Out, N> pack;
#pragma unroll
    for (int n = 0; n < N; ++n) pack.x[n] = narrow<Out>(state.sum[n] / num_left + state.nan[n]);
    pack.store(out + i);
  }
  return end - (end - begin) % N;
}

template <class Element, class Out, int K>
__global__ void __launch_bounds__(kThreads, 1) trimmed_mean_kernel(GRID_CONSTANT(Table) table, int64_t units_per_range,
                                                                   const double* __restrict__ weights, int trim) {
  // Two vectors of 16-bit columns at once would not fit in registers for the largest K.
  constexpr int N = kVector<Element>;
  DYNAMIC_SHARED(Term<Element>, terms);
  SHARED(int, num_terms, [1]);
  const int64_t range = gridDim.x - 1 - blockIdx.x;  // backwards, as combine
  for_each_run(table, range, units_per_range, [&](int p, int64_t begin, int64_t end) {
    __syncthreads();  // nobody reads the previous parameter's list any more
    list_terms(table, p, weights, terms, num_terms);
    __syncthreads();
    Out* const out = static_cast<Out*>(table.params[p].out);
    const int k = trimmed(trim, num_terms[0]);
    if (table.params[p].vector) begin = average<N, K>(terms, num_terms[0], k, out, begin, end);
    average<1, K>(terms, num_terms[0], k, out, begin, end);
  });
}

// Sorts each of num_columns columns of n values; values[r * num_columns + c]. All threads of the block take part.
template <class Number>
__device__ __forceinline__ void sort_columns(Number* values, int n, int num_columns) {
  for (int p = 1; p < n; p *= 2) {
    for (int k = p; k >= 1; k /= 2) {
      for (int job = threadIdx.x; job < (n - k) * num_columns; job += kThreads) {
        const int low = job / num_columns, offset = low - k % p;
        if (offset < 0 || offset % (2 * k) >= k || low / (2 * p) != (low + k) / (2 * p)) continue;
        sort_pair(values[job], values[job + k * num_columns]);
      }
      __syncthreads();
    }
  }
}

template <class Element, class Out>
__global__ void __launch_bounds__(kThreads, 1)
    sorted_mean_kernel(GRID_CONSTANT(Table) table, int64_t units_per_range, const double* __restrict__ weights,
                       int trim, int num_columns) {
  using Number = Sum<Element>;
  DYNAMIC_SHARED(Term<Element>, terms);
  Number* const values = reinterpret_cast<Number*>(terms + table.num_tasks);
  SHARED(int, num_terms, [1]);
  const int64_t range = gridDim.x - 1 - blockIdx.x;  // backwards, as combine
  for_each_run(table, range, units_per_range, [&](int p, int64_t begin, int64_t end) {
    __syncthreads();  // nobody reads the previous parameter's list any more
    list_terms(table, p, weights, terms, num_terms);
    __syncthreads();
    Out* const out = static_cast<Out*>(table.params[p].out);
    const int n = num_terms[0], k = trimmed(trim, n);
    for (int64_t first = begin; first < end; first += num_columns) {
      for (int job = threadIdx.x; job < n * num_columns; job += kThreads) {
        const Term<Element> term = terms[job / num_columns];
        const int64_t column = first + job % num_columns;
        values[job] = column < end ? term.weight * widen(in_global_memory(term.row)[column]) : Number(0);
      }
      __syncthreads();
      sort_columns(values, n, num_columns);
      const int64_t column = first + threadIdx.x;
      if (int(threadIdx.x) < num_columns && column < end) {
        Number sum = 0, nan = 0;
        for (int r = 0; r < n; ++r) {
          const Number x = values[r * num_columns + threadIdx.x];
          if (r >= k && r < n - k) sum += x;
          if (!(x == x)) nan = x;
        }
        out[column] = narrow<Out>(sum / Number(max(n - 2 * k, 1)) + nan);
      }
      __syncthreads();  // the values have been read
    }
  });
}

// The kernel for that many on each side, as many as it was made for.
template <class Element, class Out>
auto kernel_for(int trim) {
  return trim <= 1   ? trimmed_mean_kernel<Element, Out, 1>
         : trim == 2 ? trimmed_mean_kernel<Element, Out, 2>
                     : trimmed_mean_kernel<Element, Out, kMaxTrimInRegisters>;
}

}  // namespace

cudaError_t trimmed_mean_cuda(const Rows& rows, const double* weights, int64_t trim_wanted, const Output* out,
                              cudaStream_t stream) {
  const int trim = static_cast<int>(std::min<int64_t>(trim_wanted, rows.num_tasks));
  if (trim > kMaxTrimInRegisters && rows.num_tasks > kMaxTasksSorted) return cudaErrorInvalidValue;
  return for_each_type([&](auto element, auto result, Scalar type, Scalar out_type) {
    using Element = decltype(element);
    using Out = decltype(result);
    const size_t list = rows.num_tasks * sizeof(Term<Element>), column = rows.num_tasks * sizeof(Sum<Element>);
    int num_columns = kMaxColumns;
    while (list + num_columns * column > kSharedBytes && num_columns > 1) num_columns /= 2;
    return for_each_table(rows, type, out, out_type, kRanges, true,
                          [&](const Table& table, int64_t, int64_t num_ranges, int64_t units_per_range) {
                            if (trim > kMaxTrimInRegisters) {
                              return launch(sorted_mean_kernel<Element, Out>, dim3(num_ranges), kThreads,
                                            list + num_columns * column, stream, table, units_per_range, weights, trim,
                                            num_columns);
                            }
                            return launch(kernel_for<Element, Out>(trim), dim3(num_ranges), kThreads, list, stream,
                                          table, units_per_range, weights, trim);
                          });
  });
}

}  // namespace fastmtl
