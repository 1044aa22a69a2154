// The first of the Gramian's two steps: every block sums the products of its own range of columns (table.h) and writes
// M's lower triangle of them, row by row, in fp64. gram.cu adds the blocks' triangles up.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "table.h"

namespace fastmtl {

constexpr int64_t kMaxTerms = 4096;  // of a sum in fp32

__host__ __device__ constexpr int64_t num_pairs(int64_t num_tasks) { return num_tasks * (num_tasks + 1) / 2; }

// One table's triangles. partials: [ranges][num_pairs(T)], device memory.
struct Partials {
  const Table& table;
  int64_t num_ranges, units_per_range;
  double* partials;
  cudaStream_t stream;
};

// T <= 8.
inline constexpr int kMaxTasksInRegisters = 8;
constexpr Ranges kRegisterRanges = {1024, 128};
cudaError_t gram_registers(Scalar type, const Partials& partials);

// T > 8. `fast`: f32 rows in one TF32 product instead of three.
constexpr Ranges kTensorCoreRanges = {2048, 8};
cudaError_t gram_tensor_cores(Scalar type, bool fast, const Partials& partials);

}  // namespace fastmtl
