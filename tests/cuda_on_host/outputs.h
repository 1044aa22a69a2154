// Where kernels that make one row of many write.
#pragma once
#include "check.h"

namespace check {

inline double rounding(Scalar type) {
  return type == Scalar::f64 ? 1e-15 : type == Scalar::f32 ? 1e-6 : type == Scalar::bf16 ? 1.0 / 256 : 1.0 / 2048;
}

// Which outputs of 16-bit rows are f32.
enum class Wide { none, all, every_other };

struct Outputs {
  explicit Outputs(const RandomRows& data, Layout layout, Wide wide) {
    for (size_t p = 0; p < data.params.size(); ++p) {
      const Scalar rows = data.params[p].type;
      const bool widen = wide == Wide::all || (wide == Wide::every_other && p % 2 == 0);
      const Scalar type = widen && fastmtl::element_size(rows) == 2 ? Scalar::f32 : rows;
      const int64_t width = fastmtl::element_size(type);
      const int64_t shift = layout == Layout::misaligned && p % 3 == 0 ? width : 0;
      memory.emplace_back(data.params[p].size * width + shift);
      outputs.push_back({memory.back().get() + shift, type});
    }
  }
  const fastmtl::Output* get() const { return outputs.data(); }
  const fastmtl::Output& operator[](size_t p) const { return outputs[p]; }

  std::vector<Exact<char>> memory;
  std::vector<fastmtl::Output> outputs;
};

}  // namespace check
