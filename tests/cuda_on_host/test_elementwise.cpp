// grad_drop_cuda and trimmed_mean_cuda against the literal algorithms in fp64.
#include "../../csrc/cuda/cuda.h"
#include "../../csrc/grad_drop.h"
#include "outputs.h"
#include "suites.h"

namespace {

using check::Case;
using check::Layout;
using check::Outputs;
using check::rounding;
using check::Wide;
using fastmtl::Scalar;

const int64_t kRng[] = {0x1234567890abcdef, 0x100000007};

// The values of one element that take part, and their tasks.
struct Values {
  std::vector<double> x;
  std::vector<int> task;
  double size = 0;
};

Values values_of(const fastmtl::Parameter& param, int num_tasks, const double* weights, int64_t i) {
  Values v;
  for (int t = 0; t < num_tasks; ++t) {
    const double weight = weights[int64_t{param.group} * num_tasks + t];
    if (weight == 0 || !param.rows[t]) continue;
    v.x.push_back(weight * check::load(param.rows[t], param.type, i));
    v.task.push_back(t);
    v.size += std::abs(v.x.back());
  }
  return v;
}

// How far the outcome is from the nearest of the values allowed, in units of what rounding may cost.
double distance(double found, const std::vector<double>& allowed, double size, Scalar rows, Scalar out) {
  double nearest = INFINITY;
  for (double x : allowed) {
    const double bound =
        rounding(out) * std::abs(x) + (rows == Scalar::f64 ? 1e-15 : 1e-6) * size + (out == Scalar::f16 ? 0x1p-25 : 0);
    const double error = std::abs(found - x);
    if (std::isnan(found)) return NAN;
    nearest = std::min(nearest, error == 0 ? 0 : error / bound);
  }
  return nearest;
}

// Runs call(data, weights, out) and compares each element with what allowed(number, i, values) says it may be.
template <class Call, class Allowed>
void run(const std::string& what, const Case& c, Wide wide, Call call, Allowed allowed) {
  if (c.skipped()) return;
  ++check::num_cases;
  const check::RandomRows data(c);
  const Outputs out(data, c.layout, wide);
  check::Exact<double> weights(int64_t{c.num_groups} * c.num_tasks);
  for (size_t i = 0; i < weights.size(); ++i) weights[i] = i % 7 == 3 ? 0 : i % 5 == 2 ? 0.5 : 1;
  const std::string name = what + " " + c.name();
  check::succeeded(name, call(data.rows, weights.get(), out.get()));
  double worst = 0;
  for (size_t p = 0; p < data.params.size(); ++p) {
    const fastmtl::Parameter& param = data.params[p];
    for (int64_t i = 0; i < param.size; ++i) {
      const Values v = values_of(param, c.num_tasks, weights.get(), i);
      const double found = check::load(out[p].data, out[p].type, i);
      worst = check::larger(worst, distance(found, allowed(p, i, v), v.size, param.type, out[p].type));
    }
  }
  check::within(name, worst, 1);
}

void drop(const Case& c, bool leaky, Wide wide = Wide::none) {
  std::vector<double> leaks(c.num_tasks);
  for (int t = 0; t < c.num_tasks; ++t) leaks[t] = 0.1 + 0.8 * (t % 4) / 4;
  const check::Exact<double> leak(leaks);
  const check::Exact<int64_t> rng(std::vector<int64_t>{kRng[0], kRng[1]});
  run(
      leaky ? "grad_drop with leaks" : "grad_drop", c, wide,
      [&](const fastmtl::Rows& rows, const double* weights, const fastmtl::Output* out) {
        return fastmtl::grad_drop_cuda(rows, weights, rng.get(), leaky ? leak.get() : nullptr, out, nullptr);
      },
      [&](size_t p, int64_t i, const Values& v) {
        const fastmtl::Philox random = fastmtl::Draws::of(kRng, p).words(i / 4);
        const double uniform = ((random.word[i % 4] >> 9) + 0.5) / (1 << 23);
        double positive = 0, up = 0, down = 0;
        for (size_t n = 0; n < v.x.size(); ++n) {
          const double leaked = leaky ? leaks[v.task[n]] * v.x[n] : 0;
          positive += std::max(v.x[n], 0.0);
          up += v.x[n] > 0 ? v.x[n] : leaked;
          down += v.x[n] > 0 ? leaked : v.x[n];
        }
        const double purity = v.size > 0 ? positive / v.size : 0;
        if (std::abs(purity - uniform) < 1e-6) return std::vector<double>{up, down};
        return std::vector<double>{purity > uniform ? up : down};
      });
}

void trim(const Case& c, int number, Wide wide = Wide::none) {
  run(
      "trimmed_mean " + std::to_string(number), c, wide,
      [&](const fastmtl::Rows& rows, const double* weights, const fastmtl::Output* out) {
        return fastmtl::trimmed_mean_cuda(rows, weights, number, out, nullptr);
      },
      [&](size_t, int64_t, const Values& v) {
        std::vector<double> x = v.x;
        std::sort(x.begin(), x.end());
        const int n = static_cast<int>(x.size()), k = std::min(number, std::max(n - 1, 0) / 2);
        double sum = 0;
        for (int r = k; r < n - k; ++r) sum += x[r];
        return std::vector<double>{n ? sum / (n - 2 * k) : 0};
      });
}

// One element of one row is not finite; returns what comes out of it.
template <class Call>
double outcome_of(double value, Call call) {
  ++check::num_cases;
  const check::RandomRows data({11, {2100}});
  check::store(const_cast<void*>(data.row(0, 4)), Scalar::f32, 77, value);
  const Outputs out(data, Layout::aligned, Wide::none);
  const check::Exact<double> weights(std::vector<double>(11, 1.0));
  check::succeeded("one element not finite", call(data.rows, weights.get(), out.get()));
  int others = 0;
  for (int64_t i = 0; i < 2100; ++i) others += i != 77 && !std::isfinite(check::load(out[0].data, Scalar::f32, i));
  check::within("other elements that are not finite", others, 0);
  return check::load(out[0].data, Scalar::f32, 77);
}

const Scalar kTypes[] = {Scalar::f32, Scalar::bf16, Scalar::f64, Scalar::f16};

}  // namespace

void grad_drop() {
  for (int t = 1; t <= 40; ++t) {
    drop({t, {37, 300, 8}, Layout(t % 3), t % 2 == 0, 1 + t % 2, {kTypes[t % 4]}}, t % 5 < 2,
         t % 8 < 4 ? Wide::none : Wide::all);
  }
  for (Scalar type : kTypes) {
    for (int t : {1, 4, 33}) {
      drop({t, {4097, 2048, 1}, Layout::aligned, false, 2, {type}}, t == 4);
      drop({t, {1023, 2055}, Layout::misaligned, true, 1, {type}}, t != 4, Wide::every_other);
    }
  }
  std::vector<int64_t> tiny(2300);
  for (size_t p = 0; p < tiny.size(); ++p) tiny[p] = p % 11 == 3 ? 0 : 1 + p % 5;
  drop({3, tiny, Layout::aligned, false, 2, {Scalar::f32, Scalar::f64, Scalar::bf16}}, true);
  drop({512, {9, 2, 3, 1, 4, 1, 2, 2, 0, 1, 3, 2}, Layout::aligned, true, 2}, true);
  const check::Exact<int64_t> rng(std::vector<int64_t>{kRng[0], kRng[1]});
  for (double value : {NAN, INFINITY, -INFINITY}) {
    const double found = outcome_of(value, [&](const auto& rows, const double* weights, const fastmtl::Output* out) {
      return fastmtl::grad_drop_cuda(rows, weights, rng.get(), nullptr, out, nullptr);
    });
    check::within("an element not finite became finite", std::isfinite(found), 0);
  }
}

void trimmed_mean() {
  for (int t = 1; t <= 40; ++t) {
    trim({t, {37, 300, 8}, Layout(t % 3), t % 2 == 0, 1 + t % 2, {kTypes[t % 4]}}, t % 6,
         t % 8 < 4 ? Wide::none : Wide::all);
  }
  for (Scalar type : kTypes) {
    for (int number : {1, 2, 3, 4, 5}) {
      trim({12, {2049, 1}, Layout::aligned, false, 2, {type}}, number);
      trim({33, {123, 255}, Layout::misaligned, true, 1, {type}}, number, Wide::every_other);
    }
  }
  std::vector<int64_t> tiny(700);
  for (size_t p = 0; p < tiny.size(); ++p) tiny[p] = p % 11 == 3 ? 0 : 1 + p % 5;
  trim({5, tiny, Layout::aligned, false, 2, {Scalar::f32, Scalar::f64, Scalar::bf16}}, 1);
  trim({13, tiny, Layout::misaligned, true, 2, {Scalar::f32, Scalar::f64, Scalar::f16}}, 6);
  trim({512, {9, 2, 40, 1}, Layout::aligned, true, 2, {Scalar::f32, Scalar::f64}}, 100);
  trim({700, {9, 2, 40, 1}, Layout::aligned, true, 2, {Scalar::f32, Scalar::f64}}, 4);
  for (int number : {1, 4, 5}) {
    for (double value : {NAN, INFINITY, -INFINITY}) {
      const double found = outcome_of(value, [&](const auto& rows, const double* weights, const fastmtl::Output* out) {
        return fastmtl::trimmed_mean_cuda(rows, weights, number, out, nullptr);
      });
      check::within("NaN did not stay, or infinity was not trimmed", std::isnan(found) != std::isnan(value), 0);
    }
  }
}
