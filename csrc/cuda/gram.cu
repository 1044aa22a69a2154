// gramian[k][a][b] = sum over the columns of group k of row_a * row_b.
//
// Traffic: one read of the rows for T <= 64 (beyond, one per tile of M in each of its block rows and columns), and
//   8 bytes per block and entry of M's triangle, written and read once.
// Geometry: blocks of 256 threads, each with its own range of columns (table.h), about 1,024 of them; for T > 8 times
//   the tiles of M's triangle.
//   T <= 8: each thread keeps the whole triangle of M for its columns in registers.
//   T > 8: tiles of M, 16, 32 or 64 wide; the columns of both row groups pass through shared memory.
// Accumulation: f32, bf16 and f16 rows in fp32, at most 4,096 terms per lane (1,024 for T > 8), then fp64; f64 rows in
// fp64. Determinism: each block writes its fp64 partial sums; a second kernel adds them in a fixed order. Limits: T <=
// Table::kMaxRows. Elements below about 1e-19 or above 1e19 under- or overflow in fp32 products.
#include <cmath>

#include "cuda.h"
#include "element.h"
#include "launch.h"
#include "ptx.h"
#include "table.h"

namespace fastmtl {
namespace {

constexpr int kThreads = 256, kTargetBlocks = 1024;
constexpr int kMaxTerms = 4096;   // of a sum in fp32
constexpr int kTileTerms = 1024;  // of a sum in fp32 where flushing it to fp64 costs next to nothing

constexpr int64_t num_pairs(int64_t num_tasks) { return num_tasks * (num_tasks + 1) / 2; }

// ---- T <= 8: the triangle in registers ----

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

// A lane meets at most kMaxUnitsPerBlock * (kUnit / kThreads columns + one of a ragged end): its fp32 sums are within
// kMaxTerms for the whole block.
static_assert(kMaxUnitsPerBlock * (kUnit / kThreads + 1) <= kMaxTerms);

template <class Element, int T>
__global__ void __launch_bounds__(kThreads, min_blocks<Element>(T))
    gram_registers_kernel(GRID_CONSTANT(Table) table, int64_t units_per_block, double* __restrict__ partials) {
  constexpr int kPairs = num_pairs(T), kWarps = kThreads / 32;
  Sum<Element> sums[kPairs] = {};
  for_each_run(table, blockIdx.x, units_per_block, [&](int p, int64_t begin, int64_t end) {
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

// ---- T > 8: tiles through shared memory ----

template <class Element, int kTile>
struct Tile {
  static constexpr int kPack = kVector<Sum<Element>>;
  static constexpr int kDepth = 8192 / int(sizeof(Sum<Element>)) / kTile;  // columns at a time
  static constexpr int kStride = kDepth + kPack;                           // consecutive rows start 4 banks apart
  static constexpr int kFactors = kTile < 64 ? 1 : 2;         // one tile is all of M: its second factor is the first
  static constexpr int kSide = kTile / 4;                     // a thread owns 4 x 4 entries of the tile, kSide apart
  static constexpr int kSlices = kThreads / (kSide * kSide);  // threads that share an entry split the columns
};

// Copies columns [begin, begin + kDepth) of kTile rows into shared memory, widened, with zeros for what is beyond `end`
// and for missing rows. N elements per load.
template <int N, class Element, int kTile, int kStride>
__device__ __forceinline__ void load_tile(const Element* const (&rows)[kTile], int64_t begin, int64_t end,
                                          Sum<Element> (&tile)[kTile][kStride]) {
  constexpr int kPack = kVector<Sum<Element>>, kLoads = Tile<Element, kTile>::kDepth / N;
  for (int i = threadIdx.x; i < kTile * kLoads; i += kThreads) {
    const int r = i / kLoads, c = i % kLoads * N;
    const Element* const row = rows[r];
    const int64_t k = begin + c;
    auto x = Elements<Element, N>::zero();
    if (row && k + N <= end) {
      x = Elements<Element, N>::load(row + k);
    } else if (row) {
      for (int n = 0; n < N && k + n < end; ++n) x.x[n] = row[k + n];
    }
    if constexpr (N == 1) {
      tile[r][c] = widen(x.x[0]);
    } else {
#pragma unroll
      for (int n = 0; n < N; n += kPack) {
        Elements<Sum<Element>, kPack> wide;
#pragma unroll
        for (int m = 0; m < kPack; ++m) wide.x[m] = widen(x.x[n + m]);
        wide.store(&tile[r][c + n]);
      }
    }
  }
}

// Block (x, y): the column range x, the y-th tile of M's lower triangle of tiles.
template <class Element, int kTile>
__global__ void __launch_bounds__(kThreads, sizeof(Sum<Element>) == 4 ? 2 : 1)
    gram_tiled_kernel(GRID_CONSTANT(Table) table, int64_t units_per_block, double* __restrict__ partials) {
  using Geometry = Tile<Element, kTile>;
  constexpr int kDepth = Geometry::kDepth, kSide = Geometry::kSide, kSlices = Geometry::kSlices;
  constexpr int kPack = Geometry::kPack, kFactors = Geometry::kFactors;
  using Pack = Elements<Sum<Element>, kPack>;
  const int num_tasks = table.num_tasks;
  int tile_row = 0, tile_column = blockIdx.y;
  while (tile_column > tile_row) tile_column -= ++tile_row;

  SHARED(const Element*, rows, [kFactors][kTile]);
  SHARED(Sum<Element>, tiles, [kFactors][kTile][Geometry::kStride]);
  const int other = tile_row == tile_column ? 0 : 1;  // a tile on the diagonal is its own second factor
  const int slice = threadIdx.x / (kSide * kSide);
  const int y = threadIdx.x % (kSide * kSide) / kSide, x = threadIdx.x % kSide;

  Sum<Element> sums[4][4] = {};
  double totals[4][4] = {};
  int terms = 0;
  auto flush = [&] {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        totals[i][j] += sums[i][j];
        sums[i][j] = 0;
      }
    }
    terms = 0;
  };

  for_each_run(table, blockIdx.x, units_per_block, [&](int p, int64_t begin, int64_t end) {
    if (threadIdx.x < kFactors * kTile) {
      const int half = threadIdx.x / kTile, r = threadIdx.x % kTile;
      const int task = (half ? tile_column : tile_row) * kTile + r;
      rows[half][r] =
          task < num_tasks ? static_cast<const Element*>(table.rows[int64_t(p) * num_tasks + task]) : nullptr;
    }
    __syncthreads();
    for (int64_t k = begin; k < end; k += kDepth) {
      for (int half = 0; half <= other; ++half) {
        if (table.params[p].vector) {
          load_tile<kVector<Element>>(rows[half], k, end, tiles[half]);
        } else {
          load_tile<1>(rows[half], k, end, tiles[half]);
        }
      }
      __syncthreads();
      for (int c = slice * kPack; c < kDepth; c += kSlices * kPack) {
        Pack a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = Pack::load(&tiles[0][y + i * kSide][c]);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Pack b = Pack::load(&tiles[other][x + j * kSide][c]);
#pragma unroll
          for (int n = 0; n < kPack; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[i][j] += a[i].x[n] * b.x[n];
          }
        }
      }
      terms += kDepth;
      if (terms + kDepth > kTileTerms) flush();
      __syncthreads();
    }
  });
  flush();

  if constexpr (kSlices > 1) {
    SHARED(double, slice_sums, [kTile][kTile]);
    for (int s = 0; s < kSlices; ++s) {
      if (slice == s) {
        for (int i = 0; i < 4; ++i) {
          for (int j = 0; j < 4; ++j) {
            double& sum = slice_sums[y + i * kSide][x + j * kSide];
            sum = totals[i][j] += s > 0 ? sum : 0.0;
          }
        }
      }
      __syncthreads();
    }
    if (slice != kSlices - 1) return;
  }
  double* const triangle = partials + int64_t(blockIdx.x) * num_pairs(num_tasks);
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) {
      const int a = tile_row * kTile + y + i * kSide, b = tile_column * kTile + x + j * kSide;
      if (b <= a && a < num_tasks) triangle[num_pairs(a) + b] = totals[i][j];
    }
  }
}

// ---- the sum over blocks ----

// Where the blocks of each group begin; group g owns the blocks [first[g], first[g + 1]).
struct GroupBlocks {
  static constexpr int kMaxGroups = 2048;
  int32_t first[kMaxGroups + 1];
};

constexpr int kReducePairs = 8, kReduceLanes = kThreads / kReducePairs;

// Block (x, y): kReducePairs entries of the triangle of group y; kReduceLanes threads share an entry's partial sums.
__global__ void __launch_bounds__(kThreads)
    gram_reduce_kernel(GRID_CONSTANT(GroupBlocks) blocks, int num_tasks, bool accumulate,
                       const double* __restrict__ partials, double* __restrict__ gramian) {
  SHARED(double, lane_sums, [kReduceLanes][kReducePairs]);
  const int64_t pairs = num_pairs(num_tasks);
  const int lane = threadIdx.x / kReducePairs;
  const int64_t q = int64_t(blockIdx.x) * kReducePairs + threadIdx.x % kReducePairs;
  double sum = 0;
  if (q < pairs) {
#pragma unroll 4
    for (int b = blocks.first[blockIdx.y] + lane; b < blocks.first[blockIdx.y + 1]; b += kReduceLanes) {
      sum += partials[b * pairs + q];
    }
  }
  lane_sums[lane][threadIdx.x % kReducePairs] = sum;
  __syncthreads();
  if (lane > 0 || q >= pairs) return;

  for (int l = 1; l < kReduceLanes; ++l) sum += lane_sums[l][threadIdx.x];
  int a = static_cast<int>((sqrt(8.0 * q + 1.0) - 1.0) / 2.0);
  while (num_pairs(a) > q) --a;
  while (num_pairs(a + 1) <= q) ++a;
  const int b = static_cast<int>(q - num_pairs(a));
  double* const matrix = gramian + int64_t(blockIdx.y) * num_tasks * num_tasks;
  if (accumulate) sum += matrix[int64_t(a) * num_tasks + b];
  matrix[int64_t(a) * num_tasks + b] = sum;
  matrix[int64_t(b) * num_tasks + a] = sum;
}

// ---- launches ----

int64_t tile_size(int num_tasks) { return num_tasks <= 16 ? 16 : num_tasks <= 32 ? 32 : 64; }

int target_blocks(int num_tasks) {
  if (num_tasks <= 8) return kTargetBlocks;
  return std::max<int>(kTargetBlocks / num_pairs(ceil_div(num_tasks, tile_size(num_tasks))), 16);
}

template <class Element>
cudaError_t launch_partials(const Table& table, int64_t num_blocks, int64_t units_per_block, double* partials,
                            cudaStream_t stream) {
  const int64_t tiles = num_pairs(ceil_div(table.num_tasks, tile_size(table.num_tasks)));
  auto registers = [&](auto kernel) {
    return launch(kernel, dim3(num_blocks), kThreads, 0, stream, table, units_per_block, partials);
  };
  auto tiled = [&](auto kernel) {
    return launch(kernel, dim3(num_blocks, tiles), kThreads, 0, stream, table, units_per_block, partials);
  };
  switch (table.num_tasks) {
    case 1:
      return registers(gram_registers_kernel<Element, 1>);
    case 2:
      return registers(gram_registers_kernel<Element, 2>);
    case 3:
      return registers(gram_registers_kernel<Element, 3>);
    case 4:
      return registers(gram_registers_kernel<Element, 4>);
    case 5:
      return registers(gram_registers_kernel<Element, 5>);
    case 6:
      return registers(gram_registers_kernel<Element, 6>);
    case 7:
      return registers(gram_registers_kernel<Element, 7>);
    case 8:
      return registers(gram_registers_kernel<Element, 8>);
  }
  if (table.num_tasks <= 16) return tiled(gram_tiled_kernel<Element, 16>);
  if (table.num_tasks <= 32) return tiled(gram_tiled_kernel<Element, 32>);
  return tiled(gram_tiled_kernel<Element, 64>);
}

// first: the K + 1 block numbers at which the groups begin. GroupBlocks::kMaxGroups groups a launch.
cudaError_t launch_reduce(const Rows& rows, const std::vector<int32_t>& first, bool accumulate, const double* partials,
                          double* gramian, cudaStream_t stream) {
  const int64_t entries = int64_t{rows.num_tasks} * rows.num_tasks;
  for (int group = 0; group < rows.num_groups; group += GroupBlocks::kMaxGroups) {
    const int count = std::min(rows.num_groups - group, GroupBlocks::kMaxGroups);
    GroupBlocks blocks;
    std::copy_n(first.begin() + group, count + 1, blocks.first);
    const dim3 grid(ceil_div(num_pairs(rows.num_tasks), kReducePairs), count);
    cudaError_t error = launch(gram_reduce_kernel, grid, kThreads, 0, stream, blocks, rows.num_tasks, accumulate,
                               partials, gramian + group * entries);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

size_t gram_cuda_scratch(const Rows& rows) {
  int64_t most_blocks = 0;
  for (Scalar type : kScalars) {
    for_each_table(rows, type, nullptr, target_blocks(rows.num_tasks),
                   [&](const Table&, int64_t first_block, int64_t num_blocks, int64_t) {
                     most_blocks = std::max(most_blocks, first_block + num_blocks);
                     return cudaSuccess;
                   });
  }
  return most_blocks * num_pairs(rows.num_tasks) * sizeof(double);
}

// One pass per scalar type that occurs; the passes share the scratch, and each adds to the Gramian of those before it.
cudaError_t gram_cuda(const Rows& rows, void* scratch, double* gramian, cudaStream_t stream) {
  double* const partials = static_cast<double*>(scratch);
  const int64_t pairs = num_pairs(rows.num_tasks);
  cudaError_t error = cudaSuccess;
  bool written = false;
  for (Scalar type : kScalars) {
    std::vector<int32_t> first(rows.num_groups + 1, 0);
    error = for_each_table(rows, type, nullptr, target_blocks(rows.num_tasks),
                           [&](const Table& table, int64_t first_block, int64_t num_blocks, int64_t units_per_block) {
                             for (int p = 0; p < table.num_params; ++p) {
                               const Table::Entry& param = table.params[p];
                               const int64_t end = param.first_unit + ceil_div(param.size, kUnit);
                               first[param.group + 1] =
                                   static_cast<int32_t>(first_block + ceil_div(end, units_per_block));
                             }
                             return with_element(type, [&](auto element) {
                               return launch_partials<decltype(element)>(table, num_blocks, units_per_block,
                                                                         partials + first_block * pairs, stream);
                             });
                           });
    if (error != cudaSuccess) return error;
    for (int group = 0; group < rows.num_groups; ++group) first[group + 1] = std::max(first[group], first[group + 1]);
    if (first.back() == 0) continue;
    error = launch_reduce(rows, first, written, partials, gramian, stream);
    if (error != cudaSuccess) return error;
    written = true;
  }
  if (!written)
    error = launch_reduce(rows, std::vector<int32_t>(rows.num_groups + 1, 0), false, partials, gramian, stream);
  return error;
}

}  // namespace fastmtl
