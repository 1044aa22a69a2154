// gramian[k][a][b] = sum over the columns of group k of row_a * row_b, for T > 8: on the tensor cores.
//
// A Gramian multiplies rows by themselves: what a lane holds of eight rows as the second factor of a multiplication is
// half of what it holds of them as the first, and the order of the columns is free as long as all rows have the same.
// So one load of 16 bytes per eight rows feeds both factors; nothing passes through shared memory.
//
// Traffic: one read of the rows for T <= 56. Beyond, M is cut into tiles of 32 x 32, and ceil(T / 32) of them read each
//   row; they run side by side, so that all but one find it in the L2 cache. 8 bytes per range and entry of M's
//   triangle written.
// Geometry: blocks of 4 warps, each with its own range of columns (table.h) and tile of M, about 2,048 ranges. A warp
//   takes the columns of four 16-byte loads of every row at a time; next to the sums, the rows of its next step are
//   under way in registers.
// Arithmetic: f32 rows are split into two TF32 numbers, x = high + low, and x y = high high + high low + low high; what
//   is left out is 2^-22 of it. `fast`: high high alone (2^-11). bf16, f16: products are exact. f64: as in fp64.
// Accumulation: the tensor cores round fp32 sums toward zero, 2^-25 per multiplication on average: every sum is begun
//   anew for 8 columns (bf16, f16: 16) and added, rounded to nearest, to one of at most 4,096 terms, then to one in
//   fp64. The error found is 1e-7 to 5e-7 of the norms.
// Determinism: warps are added in a fixed order.
// Limits: as gram_registers.cu; an infinite element of f32 rows makes its row of M NaN.
#include <type_traits>

#include "element.h"
#include "gram_partials.h"
#include "launch.h"
#include "ptx.h"

namespace fastmtl {
namespace {

constexpr int kWarps = 4 /* as many as a lane has sums of a tile */, kThreads = 32 * kWarps;

constexpr int kTile = 32;  // of M, where the triangle of all rows does not fit into the registers: T > 56

// ---- the arithmetics ----
//
// One step of a warp is 16 bytes per lane and group of eight rows: row lane / 4 of the group, a quarter lane % 4 of the
// columns. It takes two multiplications, one for each half of the 16 bytes. Factor: a lane's part of a group's factor
// in one of them. add: sums of 16 x 8 products; the 16 rows are `top` and `bottom`, the 8 are `right`.

template <bool kFast>
struct SplitF32 {
  using Element = float;
  struct Factor {
    uint32_t high[2], low[2];
  };
  __device__ __forceinline__ static Factor factor(const float* x) {
    Factor f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      f.high[i] = round_to_tf32(x[i]);
      // The 12 bits that are left need no rounding: the tensor cores take 11 of them.
      f.low[i] = kFast ? 0 : __float_as_uint(x[i] - __uint_as_float(f.high[i]));
    }
    return f;
  }
  __device__ __forceinline__ static void add(float (&sums)[4], const Factor& top, const Factor& bottom,
                                             const Factor& right) {
    const uint32_t high[4] = {top.high[0], bottom.high[0], top.high[1], bottom.high[1]};
    float products[4] = {};
    if constexpr (!kFast) {
      const uint32_t low[4] = {top.low[0], bottom.low[0], top.low[1], bottom.low[1]};
      mma_tf32(products, low, right.high);
      mma_tf32(products, high, right.low);
    }
    mma_tf32(products, high, right.high);
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[e] += products[e];
  }
};

template <class Half>
struct Native {
  using Element = Half;
  struct Factor {
    uint32_t pairs[2];
  };
  __device__ __forceinline__ static Factor factor(const Half* x) {
    Factor f;
    memcpy(f.pairs, x, sizeof(f.pairs));
    return f;
  }
  __device__ __forceinline__ static void add(float (&sums)[4], const Factor& top, const Factor& bottom,
                                             const Factor& right) {
    const uint32_t left[4] = {top.pairs[0], bottom.pairs[0], top.pairs[1], bottom.pairs[1]};
    float products[4] = {};
    if constexpr (std::is_same_v<Half, __half>) {
      mma_f16(products, left, right.pairs);
    } else {
      mma_bf16(products, left, right.pairs);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[e] += products[e];
  }
};

struct F64 {
  using Element = double;
  struct Factor {
    double x;
  };
  __device__ __forceinline__ static Factor factor(const double* x) { return {*x}; }
  __device__ __forceinline__ static void add(double (&sums)[4], const Factor& top, const Factor& bottom,
                                             const Factor& right) {
    mma_f64(sums[0], sums[1], top.x, right.x);
    mma_f64(sums[2], sums[3], bottom.x, right.x);
  }
};

template <class Element, bool kFast>
using ArithmeticOf = std::conditional_t<std::is_same_v<Element, float>, SplitF32<kFast>,
                                        std::conditional_t<std::is_same_v<Element, double>, F64, Native<Element>>>;

// ---- one tile of M ----

// The sums of a warp are tiles of 16 x 8: rows of the groups 2m and 2m + 1, columns of the group n. Of kGroups groups
// of eight rows either the triangle is wanted, or the products of the first half with the second.
template <int kNumGroups, bool kTwoHalves>
struct Shape {
  static constexpr int kGroups = kNumGroups;
  static constexpr int kM = kTwoHalves ? kGroups / 4 : (kGroups + 1) / 2;
  __host__ __device__ static constexpr int first(int m) { return kTwoHalves ? kGroups / 2 : 2 * m; }
  static constexpr int kTiles = [] {
    int tiles = 0;
    for (int m = 0; m < kM; ++m) tiles += kGroups - first(m);
    return tiles;
  }();
};
template <int kGroups>
using Triangle = Shape<kGroups, false>;
template <int kGroups>
using Halves = Shape<kGroups, true>;

// What a lane holds of the rows in one step of its warp: 16 bytes of each group of eight.
template <class Element, int kGroups>
struct Step {
  static constexpr int kPack = kVector<Element>, kColumns = 4 * kPack;
  static_assert(kUnit % (kWarps * kColumns) == 0, "of whole units all warps get the same number of columns");
  Elements<Element, kPack> x[kGroups];

  // Columns i.. of the rows, each of which begins at this lane's first column; zeros for rows that are not there: bit r
  // of `present` tells. `left`: that many columns are there, the others are zeros.
  __device__ __forceinline__ void load(const Element* const (&rows)[kGroups], unsigned present, int64_t i) {
#pragma unroll
    for (int r = 0; r < kGroups; ++r) {
      x[r] = Elements<Element, kPack>::zero();
      if (present >> r & 1) x[r] = Elements<Element, kPack>::load(rows[r] + i);
    }
  }
  __device__ __forceinline__ void load(const Element* const (&rows)[kGroups], unsigned present, int64_t i,
                                       int64_t left) {
#pragma unroll
    for (int r = 0; r < kGroups; ++r) {
      x[r] = Elements<Element, kPack>::zero();
#pragma unroll
      for (int n = 0; n < kPack; ++n) {
        if (present >> r & 1 && n < left) x[r].x[n] = rows[r][i + n];
      }
    }
  }
  // Moves the second half to the first.
  __device__ __forceinline__ void shift() {
#pragma unroll
    for (int r = 0; r < kGroups; ++r) {
#pragma unroll
      for (int n = 0; n < kPack / 2; ++n) x[r].x[n] = x[r].x[kPack / 2 + n];
    }
  }
};

template <class Arithmetic, class Shape>
struct Factors {
  using Element = typename Arithmetic::Element;
  typename Arithmetic::Factor of[Shape::kGroups];

  __device__ __forceinline__ explicit Factors(const Step<Element, Shape::kGroups>& step) {
#pragma unroll
    for (int r = 0; r < Shape::kGroups; ++r) of[r] = Arithmetic::factor(step.x[r].x);
  }
  __device__ __forceinline__ void add_products(Sum<Element> (&sums)[Shape::kTiles][4]) const {
    int q = 0;
#pragma unroll
    for (int m = 0; m < Shape::kM; ++m) {
      const typename Arithmetic::Factor none = {};
#pragma unroll
      for (int n = Shape::first(m); n < Shape::kGroups; ++n) {
        Arithmetic::add(sums[q++], of[2 * m], 2 * m + 1 < Shape::kGroups ? of[2 * m + 1] : none, of[n]);
      }
    }
  }
};

// Sums the range's columns into its triangle. Row r of the shape is task(r) of the table, if there is such a task.
template <class Arithmetic, class Shape, class Task>
__device__ __forceinline__ void sum_range(const Table& table, int64_t range, int64_t units_per_range, Task task,
                                          double* triangle) {
  using Element = typename Arithmetic::Element;
  using Columns = Step<Element, Shape::kGroups>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Sum<Element> sums[Shape::kTiles][4] = {};
  for_each_run(table, range, units_per_range, [&](int p, int64_t begin, int64_t end) {
    constexpr int64_t kStride = kWarps * Columns::kColumns;
    const int64_t first = begin + warp * Columns::kColumns, shift = Columns::kPack * (lane % 4);
    const Element* rows[Shape::kGroups];
    unsigned present = 0;
#pragma unroll
    for (int r = 0; r < Shape::kGroups; ++r) {
      const int t = task(8 * r + lane / 4);
      rows[r] = t < table.num_tasks ? static_cast<const Element*>(table.rows[p * table.num_tasks + t]) : nullptr;
      if (!rows[r]) continue;
      rows[r] += shift;
      present |= 1u << r;
    }
    const bool vector = table.params[p].vector;
    Columns step;
    step.load(rows, present, first, end - first - shift);
    for (int64_t i = first; i < end;) {
#pragma unroll 1  // interleaved, the halves would not fit into the registers
      for (int half = 0; half < 2; ++half) {
        const Factors<Arithmetic, Shape> factors(step);
        const bool whole = vector && i + kStride + Columns::kColumns <= end;
        if (half == 0) {
          step.shift();
        } else if (whole) {
          step.load(rows, present, i + kStride);  // under way while the products are taken
        }
        factors.add_products(sums);
        if (half == 1 && !whole) step.load(rows, present, i + kStride, end - i - kStride - shift);
      }
      i += kStride;
    }
  });

  // One tile at a time: every warp writes its sums, then every thread adds the four of one entry.
  SHARED(double, warp_sums, [kWarps][4][32]);
  int q = 0;
#pragma unroll
  for (int m = 0; m < Shape::kM; ++m) {
#pragma unroll
    for (int n = Shape::first(m); n < Shape::kGroups; ++n, ++q) {
#pragma unroll
      for (int e = 0; e < 4; ++e) warp_sums[warp][e][lane] = sums[q][e];
      __syncthreads();
      double total = 0;
      for (int w = 0; w < kWarps; ++w) total += warp_sums[w][warp][lane];
      const int b = task(16 * m + 8 * (warp / 2) + lane / 4), a = task(8 * n + 2 * (lane % 4) + warp % 2);
      if (b <= a && a < table.num_tasks) triangle[num_pairs(a) + b] = total;
      __syncthreads();
    }
  }
}

// Blocks per multiprocessor that the registers of the kernel leave room for.
constexpr int min_blocks(int groups) { return groups <= 5 ? 3 : 2; }

// T <= 56. Block x: the range x.
template <class Arithmetic, int kGroups>
__global__ void __launch_bounds__(kThreads, min_blocks(kGroups))
    gram_triangle_kernel(GRID_CONSTANT(Table) table, int64_t units_per_range, double* __restrict__ partials) {
  auto task = [](int row) { return row; };
  double* const triangle = partials + blockIdx.x * num_pairs(table.num_tasks);
  sum_range<Arithmetic, Triangle<kGroups>>(table, blockIdx.x, units_per_range, task, triangle);
}

// T > 56. Block x: the range x / tiles, the tile x % tiles of M's lower triangle of tiles.
template <class Arithmetic>
__global__ void __launch_bounds__(kThreads, 2)
    gram_tiles_kernel(GRID_CONSTANT(Table) table, int tiles, int64_t units_per_range, double* __restrict__ partials) {
  const int range = blockIdx.x / tiles;
  int tile_row = 0, tile_column = blockIdx.x % tiles;
  while (tile_column > tile_row) tile_column -= ++tile_row;
  double* const triangle = partials + range * num_pairs(table.num_tasks);
  if (tile_row == tile_column) {
    auto task = [=](int row) { return kTile * tile_row + row; };
    sum_range<Arithmetic, Triangle<kTile / 8>>(table, range, units_per_range, task, triangle);
  } else {
    auto task = [=](int row) { return row < kTile ? kTile * tile_column + row : kTile * (tile_row - 1) + row; };
    sum_range<Arithmetic, Halves<kTile / 4>>(table, range, units_per_range, task, triangle);
  }
}

// A unit gives every warp kUnit / kWarps columns at most: its fp32 sums are within kMaxTerms for the whole range.
static_assert(kTensorCoreRanges.max_units * kUnit / kWarps <= kMaxTerms);

template <class Arithmetic>
cudaError_t launch_for(const Partials& p) {
  auto triangle = [&](auto kernel) {
    return launch(kernel, dim3(p.num_ranges), kThreads, 0, p.stream, p.table, p.units_per_range, p.partials);
  };
  switch (ceil_div(p.table.num_tasks, 8)) {
    case 1:
    case 2:
      return triangle(gram_triangle_kernel<Arithmetic, 2>);
    case 3:
      return triangle(gram_triangle_kernel<Arithmetic, 3>);
    case 4:
      return triangle(gram_triangle_kernel<Arithmetic, 4>);
    case 5:
      return triangle(gram_triangle_kernel<Arithmetic, 5>);
    case 6:
      return triangle(gram_triangle_kernel<Arithmetic, 6>);
    case 7:
      return triangle(gram_triangle_kernel<Arithmetic, 7>);
  }
  const int tiles = static_cast<int>(num_pairs(ceil_div(p.table.num_tasks, kTile)));
  return launch(gram_tiles_kernel<Arithmetic>, dim3(p.num_ranges * tiles), kThreads, 0, p.stream, p.table, tiles,
                p.units_per_range, p.partials);
}

}  // namespace

cudaError_t gram_tensor_cores(Scalar type, bool fast, const Partials& partials) {
  return with_element(type, [&](auto element) {
    using Element = decltype(element);
    return fast ? launch_for<ArithmeticOf<Element, true>>(partials)
                : launch_for<ArithmeticOf<Element, false>>(partials);
  });
}

}  // namespace fastmtl
