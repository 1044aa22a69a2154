// combine_cuda against sums in fp64.
#include "../../csrc/cuda/cuda.h"
#include "outputs.h"
#include "suites.h"

namespace {

using check::Case;
using check::Layout;
using check::Outputs;
using check::rounding;
using check::Wide;
using fastmtl::Scalar;

void run(const Case& c, bool accumulate, Wide wide = Wide::none) {
  if (c.skipped()) return;
  ++check::num_cases;
  check::RandomRows data(c);
  const Outputs out(data, c.layout, wide);
  check::Exact<double> weights(int64_t{c.num_groups} * c.num_tasks);
  for (size_t i = 0; i < weights.size(); ++i) weights[i] = i % 4 == 2 ? 0 : std::cos(1.0 + i);
  // Rows of weight 0 are not read: any access to this address ends the process.
  void* const kPoison = reinterpret_cast<void*>(uintptr_t{64});
  for (size_t p = 0; p < data.params.size(); ++p) {
    const fastmtl::Parameter& param = data.params[p];
    for (int t = 0; t < c.num_tasks; ++t) {
      const void*& row = data.pointers[p * c.num_tasks + t];
      if (weights[param.group * c.num_tasks + t] == 0 && row) row = kPoison;
    }
    for (int64_t i = 0; accumulate && i < param.size; ++i) check::store(out[p].data, out[p].type, i, 0.5 * (i % 5));
  }
  const std::string name = std::string(accumulate ? "combine into " : "combine ") +
                           (wide == Wide::none  ? ""
                            : wide == Wide::all ? "f32 "
                                                : "some f32 ") +
                           c.name();
  check::succeeded(name, fastmtl::combine_cuda(data.rows, weights.get(), out.get(), accumulate, nullptr));

  double worst = 0;  // in units of what rounding may cost
  for (size_t p = 0; p < data.params.size(); ++p) {
    const fastmtl::Parameter& param = data.params[p];
    for (int64_t i = 0; i < param.size; ++i) {
      double expected = accumulate ? 0.5 * (i % 5) : 0, size = expected;
      for (int t = 0; t < c.num_tasks; ++t) {
        const double weight = weights[param.group * c.num_tasks + t];
        if (weight == 0 || !param.rows[t]) continue;
        const double term = weight * check::load(param.rows[t], param.type, i);
        expected += term;
        size += std::abs(term);
      }
      // Sums in fp32 round with respect to their terms, the store with respect to the result.
      const double allowed = rounding(out[p].type) * std::abs(expected) +
                             (param.type == Scalar::f64 ? 1e-15 : 1e-6) * size +
                             (out[p].type == Scalar::f16 ? 0x1p-25 : 0);  // half of what its smallest numbers differ by
      const double error = std::abs(check::load(out[p].data, out[p].type, i) - expected);
      const double ratio = error == 0 ? 0 : error / allowed;
      worst = check::larger(worst, ratio);
    }
  }
  check::within(name, worst, 1);
}

void nan_weight() {
  ++check::num_cases;
  const check::RandomRows data({3, {2100}});
  const Outputs out(data, Layout::aligned, Wide::none);
  check::Exact<double> weights(std::vector<double>{1, NAN, 0});
  check::succeeded("combine", fastmtl::combine_cuda(data.rows, weights.get(), out.get(), false, nullptr));
  int finite = 0;
  for (int64_t i = 0; i < 2100; ++i) finite += !std::isnan(check::load(out[0].data, Scalar::f32, i));
  check::within("elements that a NaN weight left finite", finite, 0);
}

}  // namespace

void combine() {
  const Scalar kTypes[] = {Scalar::f32, Scalar::bf16, Scalar::f64, Scalar::f16};
  for (int t = 1; t <= 72; ++t) {
    run({t, {37, 300, 8}, Layout(t % 3), t % 2 == 0, 1 + t % 2, {kTypes[t % 4]}}, t % 5 < 2,
        t % 8 < 4 ? Wide::none : Wide::all);
  }
  for (Scalar type : kTypes) {
    for (int t : {1, 4, 33}) {
      run({t, {4097, 2048, 1}, Layout::aligned, false, 2, {type}}, true);
      run({t, {1023, 2055}, Layout::misaligned, true, 1, {type}}, false);
    }
  }
  for (Scalar type : {Scalar::bf16, Scalar::f16}) {
    for (int t : {1, 4, 33}) {
      run({t, {4097, 2048, 1, 2056}, Layout::aligned, false, 2, {type}}, t == 4, Wide::every_other);
      run({t, {1023, 2055}, Layout::misaligned, true, 1, {type}}, t != 4, Wide::all);
      run({t, {1023, 16, 3}, Layout::stacked, false, 1, {type}}, t != 4, Wide::all);
    }
  }
  std::vector<int64_t> tiny(2300);
  for (size_t p = 0; p < tiny.size(); ++p) tiny[p] = p % 11 == 3 ? 0 : 1 + p % 5;
  run({2, tiny, Layout::misaligned, true, 3}, false);
  run({3, tiny, Layout::aligned, false, 2, {Scalar::f32, Scalar::f64, Scalar::bf16}}, true);
  run({3, tiny, Layout::misaligned, true, 2, {Scalar::f16, Scalar::f64, Scalar::bf16}}, false, Wide::every_other);
  run({512, {9, 2, 3, 1, 4, 1, 2, 2, 0, 1, 3, 2}, Layout::aligned, true, 2}, true);
  nan_weight();
}
