// gramian[k][a][b] = sum over the columns of group k of row_a * row_b.
//
// First every range of columns gets its own triangle of partial sums: gram_registers.cu for T <= 8,
// gram_tensor_cores.cu beyond. This file launches them and adds the triangles up.
//
// Traffic: besides the rows, 8 bytes per range and entry of M's triangle, written and read once, which is also the
//   scratch memory: at T = 512 and 2,048 ranges 2.1 GB.
// Geometry of the sum: blocks of 256 threads, for 8 entries of the triangle of one group each.
// Accumulation: fp64, in a fixed order. Determinism: no atomics; the ranges depend on the sizes alone.
// Launches: two, and one more for every further table (table.h) and two for every further scalar type.
// Limits: T <= Table::kMaxRows.
#include <cmath>

#include "cuda.h"
#include "element.h"
#include "gram_partials.h"
#include "launch.h"
#include "ptx.h"
#include "table.h"

namespace fastmtl {
namespace {

// Where the ranges of each group begin; group g owns the ranges [first[g], first[g + 1]).
struct GroupRanges {
  static constexpr int kMaxGroups = 2048;
  int32_t first[kMaxGroups + 1];
};

constexpr int kThreads = 256, kPairs = 8, kLanes = kThreads / kPairs;

// Block (x, y): kPairs entries of the triangle of group y; kLanes threads share an entry's partial sums.
__global__ void __launch_bounds__(kThreads)
    gram_reduce_kernel(GRID_CONSTANT(GroupRanges) ranges, int num_tasks, bool accumulate,
                       const double* __restrict__ partials, double* __restrict__ gramian) {
  SHARED(double, lane_sums, [kLanes][kPairs]);
  const int64_t pairs = num_pairs(num_tasks);
  const int lane = threadIdx.x / kPairs;
  const int64_t q = int64_t(blockIdx.x) * kPairs + threadIdx.x % kPairs;
  double sum = 0;
  if (q < pairs) {
#pragma unroll 8
    for (int r = ranges.first[blockIdx.y] + lane; r < ranges.first[blockIdx.y + 1]; r += kLanes) {
      sum += partials[r * pairs + q];
    }
  }
  lane_sums[lane][threadIdx.x % kPairs] = sum;
  __syncthreads();
  if (lane > 0 || q >= pairs) return;

  for (int l = 1; l < kLanes; ++l) sum += lane_sums[l][threadIdx.x];
  int a = static_cast<int>((sqrt(8.0 * q + 1.0) - 1.0) / 2.0);
  while (num_pairs(a) > q) --a;
  while (num_pairs(a + 1) <= q) ++a;
  const int b = static_cast<int>(q - num_pairs(a));
  double* const matrix = gramian + int64_t(blockIdx.y) * num_tasks * num_tasks;
  if (accumulate) sum += matrix[int64_t(a) * num_tasks + b];
  matrix[int64_t(a) * num_tasks + b] = sum;
  matrix[int64_t(b) * num_tasks + a] = sum;
}

// first: the K + 1 ranges at which the groups begin. GroupRanges::kMaxGroups groups a launch.
cudaError_t launch_reduce(const Rows& rows, const std::vector<int32_t>& first, bool accumulate, const double* partials,
                          double* gramian, cudaStream_t stream) {
  const int64_t entries = int64_t{rows.num_tasks} * rows.num_tasks;
  for (int group = 0; group < rows.num_groups; group += GroupRanges::kMaxGroups) {
    const int count = std::min(rows.num_groups - group, GroupRanges::kMaxGroups);
    GroupRanges ranges;
    std::copy_n(first.begin() + group, count + 1, ranges.first);
    const dim3 grid(ceil_div(num_pairs(rows.num_tasks), kPairs), count);
    cudaError_t error = launch(gram_reduce_kernel, grid, kThreads, 0, stream, ranges, rows.num_tasks, accumulate,
                               partials, gramian + group * entries);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// The partial sums of a range are 2 T / columns of its rows' traffic: no more than an eighth, where the columns allow.
Ranges ranges_for(int num_tasks) {
  if (num_tasks <= kMaxTasksInRegisters) return kRegisterRanges;
  Ranges ranges = kTensorCoreRanges;
  ranges.min_units = std::clamp<int64_t>(ceil_div(16 * num_tasks, kUnit), 1, ranges.max_units);
  return ranges;
}

}  // namespace

size_t gram_cuda_scratch(const Rows& rows) {
  int64_t most_ranges = 0;
  for (Scalar type : kScalars) {
    for_each_table(rows, type, nullptr, type, ranges_for(rows.num_tasks), false,
                   [&](const Table&, int64_t first_range, int64_t num_ranges, int64_t) {
                     most_ranges = std::max(most_ranges, first_range + num_ranges);
                     return cudaSuccess;
                   });
  }
  return most_ranges * num_pairs(rows.num_tasks) * sizeof(double);
}

// One pass per scalar type that occurs; the passes share the scratch, and each adds to the Gramian of those before it.
cudaError_t gram_cuda(const Rows& rows, void* scratch, double* gramian, cudaStream_t stream, bool fast) {
  double* const triangles = static_cast<double*>(scratch);
  const int64_t pairs = num_pairs(rows.num_tasks);
  bool written = false;
  for (Scalar type : kScalars) {
    std::vector<int32_t> first(rows.num_groups + 1, 0);
    auto visit = [&](const Table& table, int64_t first_range, int64_t num_ranges, int64_t units_per_range) {
      for (int p = 0; p < table.num_params; ++p) {
        const Table::Entry& param = table.params[p];
        const int64_t end = param.first_unit + ceil_div(param.size, kUnit);
        first[param.group + 1] = static_cast<int32_t>(first_range + ceil_div(end, units_per_range));
      }
      const Partials partials = {table, num_ranges, units_per_range, triangles + first_range * pairs, stream};
      return rows.num_tasks <= kMaxTasksInRegisters ? gram_registers(type, partials)
                                                    : gram_tensor_cores(type, fast, partials);
    };
    cudaError_t error = for_each_table(rows, type, nullptr, type, ranges_for(rows.num_tasks), false, visit);
    if (error != cudaSuccess) return error;
    for (int group = 0; group < rows.num_groups; ++group) first[group + 1] = std::max(first[group], first[group + 1]);
    if (first.back() == 0) continue;
    error = launch_reduce(rows, first, written, triangles, gramian, stream);
    if (error != cudaSuccess) return error;
    written = true;
  }
  if (written) return cudaSuccess;
  return launch_reduce(rows, std::vector<int32_t>(rows.num_groups + 1, 0), false, triangles, gramian, stream);
}

}  // namespace fastmtl
