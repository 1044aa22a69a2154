// The pybind11 module fastmtl._C: what this binary is, and the T x T solvers on NumPy arrays. No torch in here.
// fastmtl/solvers.py validates arguments and documents the solvers; the checks below only keep a wrong call from
// reading outside of the arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "cpu/cpu.h"
#include "parallel.h"
#include "solvers/order.h"
#include "solvers/philox.h"
#include "solvers/solvers.h"

namespace fastmtl {
namespace {

namespace py = pybind11;
using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;
using Longs = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using Bools = py::array_t<bool, py::array::c_style | py::array::forcecast>;
using Sizes = std::vector<py::ssize_t>;

template <class Array>
Sizes sizes_of(const Array& array) {
  return Sizes(array.shape(), array.shape() + array.ndim());
}

void require(bool condition, const char* message) {
  if (!condition) throw py::value_error(message);
}

Problems problems_of(const Doubles& gramian, const std::optional<Bools>& mask) {
  require(gramian.ndim() == 3 && gramian.shape(1) == gramian.shape(2), "gramian: expected shape [K, T, T]");
  require(gramian.shape(1) <= 65536, "gramian: at most 65536 tasks");
  if (mask) {
    require(sizes_of(*mask) == Sizes{gramian.shape(0), gramian.shape(1)}, "mask: expected shape [K, T]");
  }
  return {gramian.shape(0), static_cast<int32_t>(gramian.shape(1)), gramian.data(),
          mask ? reinterpret_cast<const uint8_t*>(mask->data()) : nullptr};
}

Order order_of(const Doubles& gramian, int kind, const std::optional<Longs>& order, const int64_t* rng) {
  require(kind >= 0 && kind <= 2, "order_kind: expected 0, 1 or 2");
  Order result{static_cast<OrderKind>(kind), nullptr, false, rng};
  if (order) {
    const Sizes batched = sizes_of(gramian);
    result.batched = order->ndim() == 3;
    require(sizes_of(*order) == (result.batched ? batched : Sizes{batched[1], batched[2]}),
            "order: expected shape [T, T] or [K, T, T]");
    result.explicit_order = order->data();
  }
  return result;
}

Doubles new_weights(const Doubles& gramian) { return Doubles(Sizes{gramian.shape(0), gramian.shape(1)}); }

py::tuple min_norm(const Doubles& gramian, const std::optional<Bools>& mask,
                   const std::optional<Doubles>& lower_bounds) {
  const Problems problems = problems_of(gramian, mask);
  Doubles weights = new_weights(gramian);
  if (lower_bounds) require(sizes_of(*lower_bounds) == sizes_of(weights), "lower_bounds: expected shape [K, T]");
  Doubles gap(Sizes{gramian.shape(0)});
  double *w = weights.mutable_data(), *gaps = gap.mutable_data();
  {
    py::gil_scoped_release release;
    if (lower_bounds) {
      bounded_min_norm_cpu(problems, {lower_bounds->data(), w, gaps});
    } else {
      min_norm_cpu(problems, {w, gaps});
    }
  }
  return py::make_tuple(weights, gap);
}

py::tuple frank_wolfe(const Doubles& gramian, const std::optional<Bools>& mask, int64_t max_iter, double tol,
                      bool pair_start) {
  const Problems problems = problems_of(gramian, mask);
  Doubles weights = new_weights(gramian);
  Doubles gap(Sizes{gramian.shape(0)});
  const FrankWolfe method{max_iter, tol, pair_start, weights.mutable_data(), gap.mutable_data()};
  {
    py::gil_scoped_release release;
    frank_wolfe_cpu(problems, method);
  }
  return py::make_tuple(weights, gap);
}

py::tuple dual_cone(const Doubles& gramian, const std::optional<Bools>& mask, const Doubles& combinations,
                    double noise) {
  Problems problems = problems_of(gramian, mask);
  const Sizes sizes = sizes_of(combinations);
  require(sizes.size() == 3 && sizes[0] == gramian.shape(0) && sizes[2] == gramian.shape(1),
          "combinations: expected shape [K, R, T]");
  problems.count *= sizes[1];
  problems.repeats = sizes[1];
  Doubles weights(sizes), gap(Sizes{sizes[0], sizes[1]});
  const DualCone method{combinations.data(), noise, weights.mutable_data(), gap.mutable_data()};
  {
    py::gil_scoped_release release;
    dual_cone_cpu(problems, method);
  }
  return py::make_tuple(weights, gap);
}

Doubles pcgrad(const Doubles& gramian, const std::optional<Bools>& mask, int order_kind,
               const std::optional<Longs>& order, int64_t seed, int64_t step, bool include_self, bool mean) {
  const Problems problems = problems_of(gramian, mask);
  const int64_t rng[2] = {seed, step};
  Doubles weights = new_weights(gramian);
  const PCGrad method{order_of(gramian, order_kind, order, rng), include_self, mean, weights.mutable_data()};
  py::gil_scoped_release release;
  pcgrad_cpu(problems, method);
  return weights;
}

py::tuple gradvac(const Doubles& gramian, const Doubles& targets, const std::optional<Bools>& mask, int order_kind,
                  const std::optional<Longs>& order, int64_t seed, int64_t step, double beta, bool ema_first,
                  bool ema_always) {
  const Problems problems = problems_of(gramian, mask);
  require(sizes_of(targets) == sizes_of(gramian), "targets: expected the shape of the gramian");
  const int64_t rng[2] = {seed, step};
  Doubles weights = new_weights(gramian);
  Doubles new_targets(sizes_of(gramian));
  const GradVac method{order_of(gramian, order_kind, order, rng),
                       beta,
                       ema_first,
                       ema_always,
                       targets.data(),
                       new_targets.mutable_data(),
                       weights.mutable_data()};
  {
    py::gil_scoped_release release;
    gradvac_cpu(problems, method);
  }
  return py::make_tuple(weights, new_targets);
}

py::tuple cagrad(const Doubles& gramian, const std::optional<Bools>& mask, double c) {
  const Problems problems = problems_of(gramian, mask);
  Doubles weights = new_weights(gramian);
  Doubles gap(Sizes{gramian.shape(0)});
  const CAGrad method{c, weights.mutable_data(), gap.mutable_data()};
  {
    py::gil_scoped_release release;
    cagrad_cpu(problems, method);
  }
  return py::make_tuple(weights, gap);
}

py::tuple fairgrad(const Doubles& gramian, const std::optional<Bools>& mask, const std::optional<Doubles>& preference,
                   double alpha) {
  const Problems problems = problems_of(gramian, mask);
  if (preference) require(sizes_of(*preference) == Sizes{gramian.shape(1)}, "preference: expected shape [T]");
  Doubles weights = new_weights(gramian);
  Doubles gap(Sizes{gramian.shape(0)});
  const FairGrad method{alpha, preference ? preference->data() : nullptr, weights.mutable_data(), gap.mutable_data()};
  {
    py::gil_scoped_release release;
    fairgrad_cpu(problems, method);
  }
  return py::make_tuple(weights, gap);
}

Doubles spectral(const Doubles& gramian, const std::optional<Bools>& mask, const std::optional<Doubles>& preference,
                 int rule) {
  const Problems problems = problems_of(gramian, mask);
  Doubles weights = new_weights(gramian);
  if (preference) require(sizes_of(*preference) == sizes_of(weights), "preference: expected shape [K, T]");
  require(rule >= 0 && rule <= static_cast<int>(SpectralRule::sum_to_one), "rule: expected 0 to 4");
  const Spectral method{static_cast<SpectralRule>(rule), preference ? preference->data() : nullptr,
                        weights.mutable_data()};
  py::gil_scoped_release release;
  spectral_cpu(problems, method);
  return weights;
}

py::tuple simplex_lp(const Doubles& gramian, const std::optional<Bools>& mask, const Doubles& objective,
                     const Doubles& bounds, const Doubles& extra, const Doubles& extra_bound) {
  const Problems problems = problems_of(gramian, mask);
  Doubles weights = new_weights(gramian);
  Doubles violation(Sizes{gramian.shape(0)});
  for (const Doubles* each : {&objective, &bounds, &extra}) {
    require(sizes_of(*each) == sizes_of(weights), "objective, bounds, extra: expected shape [K, T]");
  }
  require(sizes_of(extra_bound) == sizes_of(violation), "extra_bound: expected shape [K]");
  const SimplexLp method{objective.data(),   bounds.data(),          extra.data(),
                         extra_bound.data(), weights.mutable_data(), violation.mutable_data()};
  {
    py::gil_scoped_release release;
    simplex_lp_cpu(problems, method);
  }
  return py::make_tuple(weights, violation);
}

Doubles krum(const Doubles& gramian, const std::optional<Bools>& mask, int64_t num_byzantine, int64_t num_selected,
             bool euclidean) {
  const Problems problems = problems_of(gramian, mask);
  require(num_byzantine >= 0 && num_selected >= 1, "expected num_byzantine >= 0 and num_selected >= 1");
  Doubles weights = new_weights(gramian);
  const Krum method{num_byzantine, num_selected, euclidean, weights.mutable_data()};
  py::gil_scoped_release release;
  krum_cpu(problems, method);
  return weights;
}

Doubles projected_gradient(const Doubles& gramian, const std::optional<Bools>& mask, const Doubles& start,
                           const std::optional<Doubles>& pull, double lr, double momentum, double ridge,
                           int64_t num_steps, bool scale_free) {
  const Problems whole = problems_of(gramian, mask);
  require(start.ndim() == 2 && start.shape(0) == whole.count, "start: expected shape [K, T]");
  const int32_t t = static_cast<int32_t>(start.shape(1));
  require(t == 0 ? whole.num_tasks == 0 : whole.num_tasks > 0 && whole.num_tasks % t == 0,
          "start: expected shape [K, T] for B T rows");
  if (pull) require(sizes_of(*pull) == sizes_of(start), "pull: expected shape [K, T]");
  Doubles weights(sizes_of(start));
  const ProjectedGradient method{whole.gramian,
                                 whole.mask,
                                 t == 0 ? 1 : whole.num_tasks / t,
                                 start.data(),
                                 pull ? pull->data() : nullptr,
                                 nullptr,
                                 lr,
                                 momentum,
                                 ridge,
                                 num_steps,
                                 scale_free,
                                 weights.mutable_data()};
  py::gil_scoped_release release;
  projected_gradient_cpu({whole.count, t, nullptr, nullptr}, method);
  return weights;
}

Doubles random_weights(const Bools& present, int64_t seed, int64_t step, int distribution) {
  require(present.ndim() == 2, "present: expected shape [K, T]");
  require(distribution >= 0 && distribution <= 4, "distribution: expected 0 to 4");
  const int64_t rng[2] = {seed, step};
  Doubles weights(sizes_of(present));
  const RandomWeights method{static_cast<Distribution>(distribution), rng, weights.mutable_data()};
  random_weights_cpu({present.shape(0), static_cast<int32_t>(present.shape(1)), nullptr,
                      reinterpret_cast<const uint8_t*>(present.data())},
                     method);
  return weights;
}

// The random orders [T,T] of one problem.
Longs random_orders(int num_tasks, int64_t seed, int64_t step, int64_t problem) {
  require(num_tasks >= 0 && num_tasks <= 65536, "num_tasks: expected 0 to 65536");
  const int64_t rng[2] = {seed, step};
  const Order order{OrderKind::random, nullptr, false, rng};
  std::vector<int32_t> scratch(static_cast<size_t>(order_scratch_words(num_tasks)));
  Longs orders(Sizes{num_tasks, num_tasks});
  for (int row = 0; row < num_tasks; ++row) {
    visiting_order(HostTeam(), order, problem, row, num_tasks, scratch.data());
    std::copy(scratch.begin(), scratch.begin() + num_tasks, orders.mutable_data(row));
  }
  return orders;
}

py::tuple philox_words(const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
  const Philox random = philox({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  return py::make_tuple(random.word[0], random.word[1], random.word[2], random.word[3]);
}

py::dict build_info() {
  py::dict info;
  info["version"] = FASTMTL_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
#ifdef TORCH_TARGET_VERSION
  constexpr uint64_t kTorch = TORCH_TARGET_VERSION;
  info["torch_target"] = std::to_string(kTorch >> 56) + "." + std::to_string(kTorch >> 48 & 0xff);
#else
  info["torch_target"] = py::none();
#endif
#ifdef WITH_CUDA
  info["cuda"] = true;
  info["cuda_archs"] = FASTMTL_CUDA_ARCHS;
#else
  info["cuda"] = false;
  info["cuda_archs"] = "";
#endif
  info["cpu_capability"] = cpu_capability();
  info["num_threads"] = num_threads();
  return info;
}

}  // namespace
}  // namespace fastmtl

PYBIND11_MODULE(_C, m) {
  using namespace pybind11::literals;
  m.doc() = "The compiled part of fastmtl.";
  m.def("build_info", &fastmtl::build_info, "How this binary was built, and what it uses on this machine.");
  m.def("set_cpu_capability", &fastmtl::set_cpu_capability, "name"_a,
        "Lowers (or restores) the instruction set of the CPU kernels; False where this CPU lacks it.");
  m.def("philox", &fastmtl::philox_words, "counter"_a, "key"_a, "Philox4x32-10.");
  m.def("visiting_order", &fastmtl::random_orders, "num_tasks"_a, "seed"_a, "step"_a, "problem"_a,
        "The random orders [T,T] of one problem (csrc/solvers/order.h).");
  m.def("min_norm", &fastmtl::min_norm, "gramian"_a, "mask"_a.none(true), "lower_bounds"_a.none(true));
  m.def("frank_wolfe", &fastmtl::frank_wolfe, "gramian"_a, "mask"_a.none(true), "max_iter"_a, "tol"_a, "pair_start"_a);
  m.def("dual_cone", &fastmtl::dual_cone, "gramian"_a, "mask"_a.none(true), "combinations"_a, "noise"_a);
  m.def("pcgrad", &fastmtl::pcgrad, "gramian"_a, "mask"_a.none(true), "order_kind"_a, "order"_a.none(true), "seed"_a,
        "step"_a, "include_self"_a, "mean"_a);
  m.def("gradvac", &fastmtl::gradvac, "gramian"_a, "targets"_a, "mask"_a.none(true), "order_kind"_a,
        "order"_a.none(true), "seed"_a, "step"_a, "beta"_a, "ema_first"_a, "ema_always"_a);
  m.def("simplex_lp", &fastmtl::simplex_lp, "gramian"_a, "mask"_a.none(true), "objective"_a, "bounds"_a, "extra"_a,
        "extra_bound"_a);
  m.def("krum", &fastmtl::krum, "gramian"_a, "mask"_a.none(true), "num_byzantine"_a, "num_selected"_a, "euclidean"_a);
  m.def("projected_gradient", &fastmtl::projected_gradient, "gramian"_a, "mask"_a.none(true), "start"_a,
        "pull"_a.none(true), "lr"_a, "momentum"_a, "ridge"_a, "num_steps"_a, "scale_free"_a);
  m.def("random_weights", &fastmtl::random_weights, "present"_a, "seed"_a, "step"_a, "distribution"_a);
  m.def("cagrad", &fastmtl::cagrad, "gramian"_a, "mask"_a.none(true), "c"_a);
  m.def("fairgrad", &fastmtl::fairgrad, "gramian"_a, "mask"_a.none(true), "preference"_a.none(true), "alpha"_a);
  m.def("spectral", &fastmtl::spectral, "gramian"_a, "mask"_a.none(true), "preference"_a.none(true), "rule"_a);
}
