// The rows of a call, packed into tables that travel by value as a kernel parameter: nothing is copied from host memory
// and nothing has to outlive the launch, so a call can be captured in a CUDA graph.
//
// A table holds parameters of one scalar type, sorted by group. Their columns are cut into units of kUnit; every unit
// has a number, and range b owns the units [b * units_per_range, (b + 1) * units_per_range): the work of one block. A
// parameter that opens a group starts at the first unit of a range (the numbers skipped stand for nothing), so that a
// range only ever meets one group.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "../rows.h"
#include "cuda.h"

namespace fastmtl {

constexpr int64_t kUnit = 2048;  // columns; a multiple of what a block of 256 threads loads at once

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Table {
  static constexpr int kMaxParams = 320, kMaxRows = kMaxTasksCuda;
  struct Entry {
    int64_t size;
    int64_t first_unit;
    void* out;  // not for the Gramian
    int32_t group;
    uint32_t vector : 1;   // every row (and out) is aligned to 16 bytes
    uint32_t number : 31;  // of the parameter, in the call
  };
  int32_t num_tasks;
  int32_t num_params;
  Entry params[kMaxParams];
  const void* rows[kMaxRows];  // [num_params][num_tasks]
};
static_assert(sizeof(Table) <= 32000, "kernel parameters end at 32,764 bytes");

// How to cut the columns of a call: into about `target` ranges of min_units to max_units units.
struct Ranges {
  int target;
  int64_t max_units;
  int64_t min_units = 1;
};

// Calls body(p, begin, end) for each parameter that a range meets, with the columns of it that the range owns.
template <class Body>
__device__ __forceinline__ void for_each_run(const Table& table, int64_t range, int64_t units_per_range, Body body) {
  const int64_t first = range * units_per_range, last = first + units_per_range;
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

// Packs the parameters of one type into as few tables as hold them and calls visit(table, first_range, num_ranges,
// units_per_range) for each, ranges numbered through all tables; the last table comes first if `backwards`, and ranges
// are numbered in that order. `out` is null, or tells where each parameter's result goes; then only the parameters
// whose result is of out_type count.
template <class Visit>
cudaError_t for_each_table(const Rows& rows, Scalar type, const Output* out, Scalar out_type, Ranges ranges,
                           bool backwards, Visit visit) {
  std::vector<int64_t> order;
  int64_t units = 0;
  for (int64_t p = 0; p < rows.num_params; ++p) {
    const Parameter& param = rows.params[p];
    if (param.type != type || (out && out[p].type != out_type) || param.size == 0) continue;
    order.push_back(p);
    units += ceil_div(param.size, kUnit);
  }
  if (order.empty()) return cudaSuccess;
  if (rows.num_tasks > Table::kMaxRows) return cudaErrorInvalidValue;
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return rows.params[a].group < rows.params[b].group; });
  const int64_t units_per_range = std::clamp(ceil_div(units, ranges.target), ranges.min_units, ranges.max_units);

  Table table;
  table.num_tasks = rows.num_tasks;
  const int64_t num_params = order.size();
  const int64_t params_per_table = std::min(Table::kMaxParams, Table::kMaxRows / rows.num_tasks);
  const int64_t num_tables = ceil_div(num_params, params_per_table);
  int64_t first_range = 0;
  for (int64_t i = 0; i < num_tables; ++i) {
    const int64_t first_param = (backwards ? num_tables - 1 - i : i) * params_per_table;
    table.num_params = static_cast<int32_t>(std::min(params_per_table, num_params - first_param));
    int64_t unit = 0;
    for (int n = 0; n < table.num_params; ++n) {
      const Parameter& param = rows.params[order[first_param + n]];
      if (n > 0 && param.group != table.params[n - 1].group) unit = ceil_div(unit, units_per_range) * units_per_range;
      void* const target = out ? out[order[first_param + n]].data : nullptr;
      uintptr_t address_bits = reinterpret_cast<uintptr_t>(target);
      for (int t = 0; t < rows.num_tasks; ++t) {
        table.rows[n * rows.num_tasks + t] = param.rows[t];
        address_bits |= reinterpret_cast<uintptr_t>(param.rows[t]);
      }
      const auto number = static_cast<uint32_t>(order[first_param + n]);
      table.params[n] = {param.size, unit, target, param.group, address_bits % 16 == 0, number};
      unit += ceil_div(param.size, kUnit);
    }
    const int64_t num_ranges = ceil_div(unit, units_per_range);
    if (cudaError_t error = visit(table, first_range, num_ranges, units_per_range); error != cudaSuccess) return error;
    first_range += num_ranges;
  }
  return cudaSuccess;
}

}  // namespace fastmtl
