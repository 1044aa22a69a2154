// The rows of a call, packed into tables that travel by value as a kernel parameter: nothing is copied from host memory
// and nothing has to outlive the launch, so a call can be captured in a CUDA graph.
//
// A table holds parameters of one scalar type, sorted by group. Their columns are cut into units of kUnit; every unit
// has a number, and block b of a launch owns the units [b * units_per_block, (b + 1) * units_per_block). A parameter
// that opens a group starts at the first unit of a block (the numbers skipped stand for nothing), so that a block only
// ever sees one group.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "../rows.h"

namespace fastmtl {

constexpr int64_t kUnit = 2048;  // columns; a multiple of what a block of 256 threads loads at once
constexpr int kMaxUnitsPerBlock = 256;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Table {
  static constexpr int kMaxParams = 320, kMaxRows = 2688;
  struct Entry {
    int64_t size;
    int64_t first_unit;
    void* out;  // combine only
    int32_t group;
    int32_t vector;  // every row (and out) is aligned to 16 bytes
  };
  int32_t num_tasks;
  int32_t num_params;
  Entry params[kMaxParams];
  const void* rows[kMaxRows];  // [num_params][num_tasks]
};
static_assert(sizeof(Table) <= 32000, "kernel parameters end at 32,764 bytes");

// Calls body(p, begin, end) for each parameter that a block meets, with the columns of it that the block owns.
template <class Body>
__device__ __forceinline__ void for_each_run(const Table& table, int64_t block, int64_t units_per_block, Body body) {
  const int64_t first = block * units_per_block, last = first + units_per_block;
  int low = 0, high = table.num_params;  // the last parameter that starts at or before `first`
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.params[middle].first_unit <= first ? low : high) = middle;
  }
  for (int p = low; p < table.num_params && table.params[p].first_unit < last; ++p) {
    const Table::Entry& param = table.params[p];
    const int64_t begin = max(first - param.first_unit, int64_t{0}) * kUnit;
    const int64_t end = min(param.size, (last - param.first_unit) * kUnit);
    if (begin < end) body(p, begin, end);
  }
}

// Packs the parameters of one type into as few tables as hold them and calls visit(table, first_block, num_blocks,
// units_per_block) for each; blocks are numbered through all tables. About target_blocks blocks, more where a block
// would exceed kMaxUnitsPerBlock. `out` is null, or tells where each parameter's result goes.
template <class Visit>
cudaError_t for_each_table(const Rows& rows, Scalar type, void* const* out, int target_blocks, Visit visit) {
  std::vector<int64_t> order;
  int64_t units = 0;
  for (int64_t p = 0; p < rows.num_params; ++p) {
    const Parameter& param = rows.params[p];
    if (param.type != type || param.size == 0) continue;
    order.push_back(p);
    units += ceil_div(param.size, kUnit);
  }
  if (order.empty()) return cudaSuccess;
  if (rows.num_tasks > Table::kMaxRows) return cudaErrorInvalidValue;
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return rows.params[a].group < rows.params[b].group; });
  const int64_t units_per_block = std::clamp<int64_t>(ceil_div(units, target_blocks), 1, kMaxUnitsPerBlock);

  Table table;
  table.num_tasks = rows.num_tasks;
  int64_t first_block = 0;
  for (size_t next = 0; next < order.size();) {
    int64_t unit = 0;
    int n = 0;
    for (; next < order.size() && n < Table::kMaxParams && (n + 1) * rows.num_tasks <= Table::kMaxRows; ++next, ++n) {
      const Parameter& param = rows.params[order[next]];
      if (n > 0 && param.group != table.params[n - 1].group) unit = ceil_div(unit, units_per_block) * units_per_block;
      void* const target = out ? out[order[next]] : nullptr;
      uintptr_t address_bits = reinterpret_cast<uintptr_t>(target);
      for (int t = 0; t < rows.num_tasks; ++t) {
        table.rows[n * rows.num_tasks + t] = param.rows[t];
        address_bits |= reinterpret_cast<uintptr_t>(param.rows[t]);
      }
      table.params[n] = {param.size, unit, target, param.group, address_bits % 16 == 0};
      unit += ceil_div(param.size, kUnit);
    }
    table.num_params = n;
    const int64_t num_blocks = ceil_div(unit, units_per_block);
    if (cudaError_t error = visit(table, first_block, num_blocks, units_per_block); error != cudaSuccess) return error;
    first_block += num_blocks;
  }
  return cudaSuccess;
}

}  // namespace fastmtl
