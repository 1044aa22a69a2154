// gram_cuda against sums in fp64.
#include "../../csrc/cuda/cuda.h"
#include "check.h"
#include "suites.h"

namespace {

using check::Case;
using check::Layout;
using fastmtl::Scalar;

std::vector<double> reference(const check::RandomRows& data) {
  const int t = data.rows.num_tasks;
  std::vector<double> gramian(int64_t{data.rows.num_groups} * t * t);
  for (size_t p = 0; p < data.params.size(); ++p) {
    const fastmtl::Parameter& param = data.params[p];
    std::vector<std::vector<double>> rows(t);
    for (int a = 0; a < t; ++a) {
      if (!param.rows[a]) continue;
      for (int64_t i = 0; i < param.size; ++i) rows[a].push_back(check::load(param.rows[a], param.type, i));
    }
    double* matrix = gramian.data() + int64_t{param.group} * t * t;
    for (int a = 0; a < t; ++a) {
      for (int b = 0; b < t; ++b) {
        if (rows[a].empty() || rows[b].empty()) continue;
        for (int64_t i = 0; i < param.size; ++i) matrix[a * t + b] += rows[a][i] * rows[b][i];
      }
    }
  }
  return gramian;
}

// What the error may be, of the product of the two norms: f64 rows in fp64; the products of bf16 and f16 rows are
// exact; f32 rows are rounded to fp32, by `fast` to TF32 where the tensor cores take them.
double bound(const Case& c, bool fast) {
  const bool only_f64 = c.types == std::vector{Scalar::f64};
  return only_f64 ? 1e-14 : fast && c.num_tasks > 8 ? 1e-3 : 1e-6;
}

void run(const Case& c, double tolerance = 0, bool fast = false) {
  if (c.skipped()) return;
  ++check::num_cases;
  const check::RandomRows data(c);
  const check::Exact<char> scratch(fastmtl::gram_cuda_scratch(data.rows));
  const int64_t t = c.num_tasks;
  const check::Exact<double> gramian(c.num_groups * t * t);
  const std::string name = (fast ? "fast gram " : "gram ") + c.name();
  check::succeeded(name, fastmtl::gram_cuda(data.rows, scratch.get(), gramian.get(), nullptr, fast));

  const std::vector<double> expected = reference(data);
  double worst = 0;
  for (int64_t i = 0; i < c.num_groups * t * t; ++i) {
    const double* matrix = &expected[i / (t * t) * t * t];
    const double scale = std::sqrt(matrix[i / t % t * (t + 1)] * matrix[i % t * (t + 1)]);
    const double error = std::abs(gramian[i] - expected[i]) / (scale > 0 ? scale : 1);
    worst = check::larger(worst, error);
  }
  check::within(name, worst, tolerance == 0 ? bound(c, fast) : tolerance);
}

}  // namespace

void gram_registers() {
  for (int t = 1; t <= 8; ++t) {
    for (Scalar type : {Scalar::f32, Scalar::f64, Scalar::bf16, Scalar::f16}) {
      run({t, {5, 1023, 2048}, Layout::misaligned, true, 1, {type}});
      run({t, {1, 4099}, Layout::stacked, false, 1, {type}});
      run({t, {64, 2055}, Layout::aligned, t % 2 == 0, 1, {type}});
    }
  }
}

void gram_tensor_cores() {
  const Scalar kTypes[] = {Scalar::bf16, Scalar::f64, Scalar::f16};
  for (int t = 9; t <= 72; ++t) {
    run({t, {37, 3}, Layout(t % 3), t % 2 == 0, 1 + t % 2}, 0, t % 8 < 2);
    run({t, {3, 37}, Layout((t + 1) % 3), t % 2 == 1, 1, {kTypes[t % 3]}});
  }
  for (Scalar type : {Scalar::f32, Scalar::bf16, Scalar::f64, Scalar::f16}) {
    for (int t : {9, 24, 57}) {
      run({t, {t < 57 ? 2048 + 77 : 170, 7}, Layout::stacked, false, 1, {type}});
      run({t, {129}, Layout::misaligned, true, 1, {type}});
      run({t, {256, 31}, Layout::aligned, true, 1, {type}});
    }
  }
  run({40, {500}, Layout::aligned, false}, 0, true);
  run({130, {33, 1, 65}, Layout::stacked, false, 2});
}

void gram_tables() {
  // More parameters than a table holds, more units than blocks, groups that share no block.
  std::vector<int64_t> tiny(1300);
  for (size_t p = 0; p < tiny.size(); ++p) tiny[p] = p % 7 == 3 ? 0 : 1 + p % 5;
  run({2, tiny, Layout::misaligned, true, 3, {Scalar::f32, Scalar::bf16, Scalar::f32, Scalar::f64}});
  run({3, tiny, Layout::aligned, false, 4});
  run({1, {1, 2, 3}, Layout::aligned, false, 2100});                              // most groups have no parameter
  run({200, {9, 2, 3, 1, 4, 1, 2, 2, 0, 1, 3, 2, 5, 1}, Layout::aligned, true});  // 13 fill a table
  run({12, {100, 3000, 17}, Layout::misaligned, false, 3, {Scalar::f16, Scalar::f64, Scalar::f32}});
  run({4, {}, Layout::aligned, false, 2});  // no parameter: zeros
  run({4, {0, 0}, Layout::aligned, false, 1});
}

void gram_long() {
  // Sums of equal terms, whose rounding errors add up: what is lost is bounded by the number of terms per lane. Says
  // most where a build has few ranges.
  run({40, {16384}, Layout::aligned, false, 1, {Scalar::f32}, 0.3f}, 2e-6);
  run({9, {40000}, Layout::aligned, false, 1, {Scalar::f32}, 0.3f}, 2e-6);
  run({2, {200000}, Layout::aligned, false, 1, {Scalar::f32}, 0.3f}, 5e-6);
}
