// gramian[k][a][b] = sum over the columns of group k of row_a * row_b, for T <= 8: the triangle in registers.
//
// Traffic: one read of the rows; 8 bytes per block and entry of M's triangle written.
// Geometry: blocks of 256 threads, each with its own range of columns (table.h), about 1,024 of them. A thread takes 16
//   bytes of columns of every row at a time and keeps the whole triangle of M for its columns.
// Accumulation: f32, bf16 and f16 rows in fp32, at most 4,096 terms per lane, then fp64; f64 rows in fp64.
// Determinism: lanes, then warps, are added in a fixed order.
// Limits: elements below about 1e-19 or above 1e19 under- or overflow in fp32 products.
#include "element.h"
#include "gram_partials.h"
#include "launch.h"
#include "ptx.h"

namespace fastmtl {
namespace {

constexpr int kThreads = 256;

// Adds the products of columns [begin, end) to the triangle `sums`, N columns a thread and step. Returns the first
// column left over (fewer than N are).
template <int N, class Element, int T>
__device__ __forceinline__ int64_t add_products(const Element* const (&rows)[T], int64_t begin, int64_t end,
                                                Sum<Element>* sums) {
  for (int64_t i = begin + N * int(threadIdx.x); i + N <= end; i += N * kThreads) {
    Elements<Element, N> x[T];
#pragma unroll
    for (int t = 0; t < T; ++t) {
      x[t] = rows[t] ? Elements<Element, N>::load(rows[t] + i) : Elements<Element, N>::zero();
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      Sum<Element> column[T];
#pragma unroll
      for (int t = 0; t < T; ++t) column[t] = widen(x[t].x[n]);
#pragma unroll
      for (int a = 0; a < T; ++a) {
#pragma unroll
        for (int b = 0; b <= a; ++b) sums[a * (a + 1) / 2 + b] += column[a] * column[b];
      }
    }
  }
  return end - (end - begin) % N;
}

// Blocks per multiprocessor that the registers of the kernel leave room for.
template <class Element>
constexpr int min_blocks(int num_tasks) {
  return (num_tasks <= 4 ? 4 : 2) / (sizeof(Sum<Element>) == 4 ? 1 : 2);
}

// A lane meets at most kUnit / kThreads columns a unit, and one of a ragged end: its fp32 sums are within kMaxTerms for
// the whole block.
static_assert(kRegisterRanges.max_units * (kUnit / kThreads + 1) <= kMaxTerms);

template <class Element, int T>
__global__ void __launch_bounds__(kThreads, min_blocks<Element>(T))
    gram_registers_kernel(GRID_CONSTANT(Table) table, int64_t units_per_range, double* __restrict__ partials) {
  constexpr int kPairs = num_pairs(T), kWarps = kThreads / 32;
  Sum<Element> sums[kPairs] = {};
  for_each_run(table, blockIdx.x, units_per_range, [&](int p, int64_t begin, int64_t end) {
    const Element* rows[T];
#pragma unroll
    for (int t = 0; t < T; ++t) rows[t] = static_cast<const Element*>(table.rows[p * T + t]);
    if (table.params[p].vector) begin = add_products<kVector<Element>>(rows, begin, end, sums);
    add_products<1>(rows, begin, end, sums);
  });

  SHARED(double, warp_sums, [kWarps][kPairs]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int q = 0; q < kPairs; ++q) {
    double sum = sums[q];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (lane == 0) warp_sums[warp][q] = sum;
  }
  __syncthreads();
  for (int q = threadIdx.x; q < kPairs; q += kThreads) {
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += warp_sums[w][q];
    partials[int64_t(blockIdx.x) * kPairs + q] = sum;
  }
}

template <class Element>
cudaError_t launch_for(const Partials& p) {
  auto with = [&](auto kernel) {
    return launch(kernel, dim3(p.num_ranges), kThreads, 0, p.stream, p.table, p.units_per_range, p.partials);
  };
  switch (p.table.num_tasks) {
    case 1:
      return with(gram_registers_kernel<Element, 1>);
    case 2:
      return with(gram_registers_kernel<Element, 2>);
    case 3:
      return with(gram_registers_kernel<Element, 3>);
    case 4:
      return with(gram_registers_kernel<Element, 4>);
    case 5:
      return with(gram_registers_kernel<Element, 5>);
    case 6:
      return with(gram_registers_kernel<Element, 6>);
    case 7:
      return with(gram_registers_kernel<Element, 7>);
    case 8:
      return with(gram_registers_kernel<Element, 8>);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t gram_registers(Scalar type, const Partials& partials) {
  return with_element(type, [&](auto element) { return launch_for<decltype(element)>(partials); });
}

}  // namespace fastmtl
