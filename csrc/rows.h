// The per-task gradients of one step as every backend sees them: pointers, sizes, types, groups. No torch in here.
//
// Parameter p holds num_tasks rows of `size` elements each. The elements of a row are contiguous in memory, in an order
// that is the same for all rows of the parameter (and for its output in combine), so a row is just a flat array.
// Rows need no alignment beyond that of their element. They are never written.
#pragma once
#include <cstdint>

namespace fastmtl {

enum class Scalar : int32_t { f32, f64, bf16, f16 };

constexpr int64_t element_size(Scalar s) { return s == Scalar::f64 ? 8 : s == Scalar::f32 ? 4 : 2; }

struct Parameter {
  const void* const* rows;  // num_tasks pointers; null: this task does not reach the parameter
  int64_t size;             // elements per row; may be 0
  Scalar type;
  int32_t group;  // 0 <= group < num_groups
};

// Where combine writes a parameter's sum: elements of the rows' type, or f32 ones where the rows are bf16 or f16.
struct Output {
  void* data;
  Scalar type;
};

struct Rows {
  int32_t num_tasks;   // T
  int32_t num_groups;  // K
  int64_t num_params;
  const Parameter* params;
};

}  // namespace fastmtl
