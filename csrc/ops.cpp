// The torch operators of fastmtl: schemas, validation, and the call into the backend of the tensors' device.
// Stable ABI only: one binary serves every torch >= 2.10. What the operators compute is documented in fastmtl/ops.py.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "cpu/cpu.h"
#include "parallel.h"
#include "solvers/solvers.h"
#include "tensor_rows.h"
#ifdef WITH_CUDA
#include <dlfcn.h>

#include "cuda/cuda.h"
#endif

namespace fastmtl {

int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

void parallel_for(int64_t n, const std::function<void(int64_t)>& body) {
  if (n <= 1 || num_threads() == 1) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

namespace {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;
using OptionalInts = std::optional<std::vector<int64_t>>;

Tensor new_double(std::vector<int64_t> sizes, Device device) {
  return torch::stable::empty(sizes, ScalarType::Double, std::nullopt, device);
}

#ifdef WITH_CUDA
// The stream of torch's CUDA, found at run time: the same binary must also load where torch has no CUDA.
cudaStream_t current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  if (!get || get(device, &stream) != 0) throw std::runtime_error("fastmtl: torch gives no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// Device, stream and scratch memory of one call into the CUDA backend.
struct CudaCall {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
  Device device;
  std::optional<Tensor> memory;

  explicit CudaCall(int32_t index) : guard(index), stream(current_stream(index)), device(DeviceType::CUDA, index) {}
  void* scratch(size_t bytes) {
    if (bytes == 0) return nullptr;
    memory = torch::stable::empty({static_cast<int64_t>(bytes)}, ScalarType::Byte, std::nullopt, device);
    return memory->mutable_data_ptr();
  }
  static void check(cudaError_t e, const char* op) {
    if (e != cudaSuccess) throw std::runtime_error(std::string("fastmtl::") + op + ": " + cudaGetErrorString(e));
  }
};
#endif

#ifdef WITH_CUDA
void check_tasks_on_cuda(const Rows& rows) {
  if (rows.num_tasks > kMaxTasksCuda)
    throw std::invalid_argument("num_tasks: on CUDA at most " + std::to_string(kMaxTasksCuda) + ", found " +
                                std::to_string(rows.num_tasks));
}
#endif

// ---- gram and combine -------------------------------------------------------------------------------------------

Tensor gram(const TensorRows& rows, [[maybe_unused]] bool fast) {
  const auto& r = rows.rows();
  Tensor gramian = new_double({r.num_groups, r.num_tasks, r.num_tasks}, rows.device());
  double* out = gramian.mutable_data_ptr<double>();
#ifdef WITH_CUDA
  if (rows.is_cuda()) {
    check_tasks_on_cuda(r);
    CudaCall call(rows.device().index());
    CudaCall::check(gram_cuda(r, call.scratch(gram_cuda_scratch(r)), out, call.stream, fast), "gram");
    return gramian;
  }
#endif
  gram_cpu(r, out);  // fp32 products are no faster there for being less exact
  return gramian;
}

void combine_into(const TensorRows& rows, const Tensor& weights, const std::vector<Tensor>& tensors, bool accumulate) {
  const auto& r = rows.rows();
  std::vector<Output> out;
  for (const Tensor& t : tensors) {
    const TensorView v(t.get());
    out.push_back({v.data, scalar_of(v.dtype).value()});
  }
  check_double(weights, {r.num_groups, r.num_tasks}, rows.device(), "weights");
  const double* w = weights.const_data_ptr<double>();
#ifdef WITH_CUDA
  if (rows.is_cuda()) {
    check_tasks_on_cuda(r);
    CudaCall call(rows.device().index());
    CudaCall::check(combine_cuda(r, w, out.data(), accumulate, call.stream), "combine");
    return;
  }
#endif
  combine_cpu(r, w, out.data(), accumulate);
}

// gram(Tensor?[] rows, int num_tasks, bool stacked, int[]? groups, int num_groups, bool fast=False) -> Tensor
void gram_boxed(StableIValue* stack, uint64_t, uint64_t) {
  TensorList list(stack[0]);
  auto num_tasks = to<int64_t>(stack[1]);
  auto stacked = to<bool>(stack[2]);
  auto groups = to<OptionalInts>(stack[3]);
  auto num_groups = to<int64_t>(stack[4]);
  auto fast = to<bool>(stack[5]);
  TensorRows rows("gram", list, num_tasks, stacked, groups, num_groups);
  stack[0] = from(gram(rows, fast));
}

// combine(Tensor?[] rows, int num_tasks, bool stacked, int[]? groups, Tensor weights, bool widen=False) -> Tensor[]
void combine_boxed(StableIValue* stack, uint64_t, uint64_t) {
  TensorList list(stack[0]);
  auto num_tasks = to<int64_t>(stack[1]);
  auto stacked = to<bool>(stack[2]);
  auto groups = to<OptionalInts>(stack[3]);
  auto weights = to<Tensor>(stack[4]);
  auto widen = to<bool>(stack[5]);
  TensorRows rows("combine", list, num_tasks, stacked, groups, num_groups_of(weights));
  std::vector<Tensor> out = rows.new_outputs(widen);
  combine_into(rows, weights, out, false);
  stack[0] = from(out);
}

// combine_(Tensor?[] rows, int num_tasks, bool stacked, int[]? groups, Tensor weights, Tensor(a!)[] out) -> ()
void combine_inplace_boxed(StableIValue* stack, uint64_t, uint64_t) {
  TensorList list(stack[0]);
  auto num_tasks = to<int64_t>(stack[1]);
  auto stacked = to<bool>(stack[2]);
  auto groups = to<OptionalInts>(stack[3]);
  auto weights = to<Tensor>(stack[4]);
  auto out = to<std::vector<Tensor>>(stack[5]);
  OutputTensors targets(out);
  TensorRows rows("combine_", list, num_tasks, stacked, groups, num_groups_of(weights), &targets.dense());
  combine_into(rows, weights, targets.dense(), true);
  targets.write_back();
}

// ---- elementwise methods ----------------------------------------------------------------------------------------

struct ElementwiseArgs {
  const double* weights;
  std::vector<Tensor> tensors;
  std::vector<Output> out;
};

ElementwiseArgs elementwise_args(const TensorRows& rows, const Tensor& weights, bool widen) {
  check_double(weights, {rows.rows().num_groups, rows.rows().num_tasks}, rows.device(), "weights");
  ElementwiseArgs args{weights.const_data_ptr<double>(), rows.new_outputs(widen), {}};
  for (const Tensor& t : args.tensors) {
    const TensorView v(t.get());
    args.out.push_back({v.data, scalar_of(v.dtype).value()});
  }
  return args;
}

// grad_drop(Tensor?[] rows, int num_tasks, bool stacked, int[]? groups, Tensor weights, Tensor rng, Tensor? leak,
//           bool widen=False) -> Tensor[]
void grad_drop_boxed(StableIValue* stack, uint64_t, uint64_t) {
  TensorList list(stack[0]);
  auto num_tasks = to<int64_t>(stack[1]);
  auto stacked = to<bool>(stack[2]);
  auto groups = to<OptionalInts>(stack[3]);
  auto weights = to<Tensor>(stack[4]);
  auto rng = to<Tensor>(stack[5]);
  auto leak = to<std::optional<Tensor>>(stack[6]);
  auto widen = to<bool>(stack[7]);
  TensorRows rows("grad_drop", list, num_tasks, stacked, groups, num_groups_of(weights));
  check_tensor(rng, ScalarType::Long, {2}, rows.device(), "rng");
  if (leak) check_double(*leak, {num_tasks}, rows.device(), "leak");
  auto args = elementwise_args(rows, weights, widen);
  const auto* seed_and_step = rng.const_data_ptr<int64_t>();
  const double* leaks = leak ? leak->const_data_ptr<double>() : nullptr;
#ifdef WITH_CUDA
  if (rows.is_cuda()) {
    check_tasks_on_cuda(rows.rows());
    if (leak && num_tasks > kMaxTasksLeaky)
      throw std::invalid_argument("leak: on CUDA for at most " + std::to_string(kMaxTasksLeaky) + " tasks, found " +
                                  std::to_string(num_tasks));
    CudaCall call(rows.device().index());
    CudaCall::check(grad_drop_cuda(rows.rows(), args.weights, seed_and_step, leaks, args.out.data(), call.stream),
                    "grad_drop");
    stack[0] = from(args.tensors);
    return;
  }
#endif
  grad_drop_cpu(rows.rows(), args.weights, seed_and_step, leaks, args.out.data());
  stack[0] = from(args.tensors);
}

// trimmed_mean(Tensor?[] rows, int num_tasks, bool stacked, int[]? groups, Tensor weights, int trim,
//              bool widen=False) -> Tensor[]
void trimmed_mean_boxed(StableIValue* stack, uint64_t, uint64_t) {
  TensorList list(stack[0]);
  auto num_tasks = to<int64_t>(stack[1]);
  auto stacked = to<bool>(stack[2]);
  auto groups = to<OptionalInts>(stack[3]);
  auto weights = to<Tensor>(stack[4]);
  auto trim = to<int64_t>(stack[5]);
  auto widen = to<bool>(stack[6]);
  if (trim < 0) throw std::invalid_argument("trim: expected at least 0, found " + std::to_string(trim));
  TensorRows rows("trimmed_mean", list, num_tasks, stacked, groups, num_groups_of(weights));
  auto args = elementwise_args(rows, weights, widen);
#ifdef WITH_CUDA
  if (rows.is_cuda()) {
    check_tasks_on_cuda(rows.rows());
    if (trim > kMaxTrimInRegisters && num_tasks > kMaxTasksSorted)
      throw std::invalid_argument("trim: on CUDA at most " + std::to_string(kMaxTrimInRegisters) + " for more than " +
                                  std::to_string(kMaxTasksSorted) + " tasks, found " + std::to_string(trim));
    CudaCall call(rows.device().index());
    CudaCall::check(trimmed_mean_cuda(rows.rows(), args.weights, trim, args.out.data(), call.stream), "trimmed_mean");
    stack[0] = from(args.tensors);
    return;
  }
#endif
  trimmed_mean_cpu(rows.rows(), args.weights, trim, args.out.data());
  stack[0] = from(args.tensors);
}

// ---- solvers ----------------------------------------------------------------------------------------------------

struct GramianArgs {
  Problems problems;
  std::vector<int64_t> sizes;
  Device device;
};

GramianArgs problems_of(const Tensor& gramian, const std::optional<Tensor>& mask) {
  if (gramian.dim() != 3 || gramian.size(1) != gramian.size(2))
    throw std::invalid_argument("gramian: expected shape [K, T, T], found " + shape_text(gramian));
  int64_t groups = gramian.size(0), tasks = gramian.size(1);
  check_double(gramian, {groups, tasks, tasks}, gramian.device(), "gramian");
  const uint8_t* m = nullptr;
  if (mask) {
    check_tensor(*mask, ScalarType::Bool, {groups, tasks}, gramian.device(), "mask");
    m = reinterpret_cast<const uint8_t*>(mask->const_data_ptr());
  }
  return {
      {groups, static_cast<int32_t>(tasks), gramian.const_data_ptr<double>(), m}, {groups, tasks}, gramian.device()};
}

Order order_of(const GramianArgs& g, const std::optional<Tensor>& order, const std::optional<Tensor>& rng,
               int64_t kind) {
  int64_t groups = g.sizes[0], tasks = g.sizes[1];
  Order o{static_cast<OrderKind>(kind), nullptr, false, nullptr};
  if (kind < 0 || kind > 2)
    throw std::invalid_argument("order_kind: expected 0, 1 or 2, found " + std::to_string(kind));
  if (order) {
    o.batched = order->dim() == 3;
    auto sizes = o.batched ? std::vector<int64_t>{groups, tasks, tasks} : std::vector<int64_t>{tasks, tasks};
    check_tensor(*order, ScalarType::Long, sizes, g.device, "order");
    o.explicit_order = order->const_data_ptr<int64_t>();
  } else if (o.kind != OrderKind::fixed) {
    if (!rng) throw std::invalid_argument("rng: a random order needs the tensor [seed, step]");
    check_tensor(*rng, ScalarType::Long, {2}, g.device, "rng");
    o.rng = rng->const_data_ptr<int64_t>();
  }
  return o;
}

#ifdef WITH_CUDA
#define FASTMTL_SOLVE(name, g, args)                                                                                 \
  do {                                                                                                               \
    if ((g).device.type() == DeviceType::CUDA) {                                                                     \
      CudaCall call((g).device.index());                                                                             \
      CudaCall::check(name##_cuda((g).problems, args, call.scratch(name##_cuda_scratch((g).problems)), call.stream), \
                      #name);                                                                                        \
    } else {                                                                                                         \
      name##_cpu((g).problems, args);                                                                                \
    }                                                                                                                \
  } while (false)
#else
#define FASTMTL_SOLVE(name, g, args) name##_cpu((g).problems, args)
#endif

std::tuple<Tensor, Tensor> min_norm(const Tensor& gramian, std::optional<Tensor> mask,
                                    std::optional<Tensor> lower_bounds) {
  auto g = problems_of(gramian, mask);
  if (lower_bounds) check_double(*lower_bounds, g.sizes, g.device, "lower_bounds");
  Tensor weights = new_double(g.sizes, g.device), gap = new_double({g.sizes[0]}, g.device);
  double *w = weights.mutable_data_ptr<double>(), *gaps = gap.mutable_data_ptr<double>();
  if (lower_bounds) {
    BoundedMinNorm args{lower_bounds->const_data_ptr<double>(), w, gaps};
    FASTMTL_SOLVE(bounded_min_norm, g, args);
  } else {
    MinNorm args{w, gaps};
    FASTMTL_SOLVE(min_norm, g, args);
  }
  return {weights, gap};
}

std::tuple<Tensor, Tensor> frank_wolfe(const Tensor& gramian, std::optional<Tensor> mask, int64_t max_iter, double tol,
                                       bool pair_start) {
  auto g = problems_of(gramian, mask);
  Tensor weights = new_double(g.sizes, g.device), gap = new_double({g.sizes[0]}, g.device);
  FrankWolfe args{max_iter, tol, pair_start, weights.mutable_data_ptr<double>(), gap.mutable_data_ptr<double>()};
  FASTMTL_SOLVE(frank_wolfe, g, args);
  return {weights, gap};
}

std::tuple<Tensor, Tensor> dual_cone(const Tensor& gramian, std::optional<Tensor> mask, const Tensor& combinations,
                                     double noise) {
  auto g = problems_of(gramian, mask);
  const int64_t count = combinations.dim() == 3 ? combinations.size(1) : 0;
  check_double(combinations, {g.sizes[0], count, g.sizes[1]}, g.device, "combinations");
  Tensor weights = new_double({g.sizes[0], count, g.sizes[1]}, g.device);
  Tensor gap = new_double({g.sizes[0], count}, g.device);
  g.problems.count *= count;
  g.problems.repeats = count;
  DualCone args{combinations.const_data_ptr<double>(), noise, weights.mutable_data_ptr<double>(),
                gap.mutable_data_ptr<double>()};
  FASTMTL_SOLVE(dual_cone, g, args);
  return {weights, gap};
}

std::tuple<Tensor, Tensor> simplex_lp(const Tensor& gramian, std::optional<Tensor> mask, const Tensor& objective,
                                      const Tensor& bounds, const Tensor& extra, const Tensor& extra_bound) {
  auto g = problems_of(gramian, mask);
  check_double(objective, g.sizes, g.device, "objective");
  check_double(bounds, g.sizes, g.device, "bounds");
  check_double(extra, g.sizes, g.device, "extra");
  check_double(extra_bound, {g.sizes[0]}, g.device, "extra_bound");
  Tensor weights = new_double(g.sizes, g.device), violation = new_double({g.sizes[0]}, g.device);
  SimplexLp args{objective.const_data_ptr<double>(), bounds.const_data_ptr<double>(),
                 extra.const_data_ptr<double>(),     extra_bound.const_data_ptr<double>(),
                 weights.mutable_data_ptr<double>(), violation.mutable_data_ptr<double>()};
  FASTMTL_SOLVE(simplex_lp, g, args);
  return {weights, violation};
}

Tensor pcgrad(const Tensor& gramian, std::optional<Tensor> mask, std::optional<Tensor> order, std::optional<Tensor> rng,
              int64_t order_kind, bool include_self, bool mean) {
  auto g = problems_of(gramian, mask);
  Tensor weights = new_double(g.sizes, g.device);
  PCGrad args{order_of(g, order, rng, order_kind), include_self, mean, weights.mutable_data_ptr<double>()};
  FASTMTL_SOLVE(pcgrad, g, args);
  return weights;
}

std::tuple<Tensor, Tensor> gradvac(const Tensor& gramian, std::optional<Tensor> mask, std::optional<Tensor> order,
                                   std::optional<Tensor> rng, int64_t order_kind, const Tensor& targets, double beta,
                                   bool ema_first, bool ema_always) {
  auto g = problems_of(gramian, mask);
  check_double(targets, {g.sizes[0], g.sizes[1], g.sizes[1]}, g.device, "targets");
  Tensor weights = new_double(g.sizes, g.device);
  Tensor moved = new_double({g.sizes[0], g.sizes[1], g.sizes[1]}, g.device);
  GradVac args{order_of(g, order, rng, order_kind),
               beta,
               ema_first,
               ema_always,
               targets.const_data_ptr<double>(),
               moved.mutable_data_ptr<double>(),
               weights.mutable_data_ptr<double>()};
  FASTMTL_SOLVE(gradvac, g, args);
  return {weights, moved};
}

std::tuple<Tensor, Tensor> cagrad(const Tensor& gramian, std::optional<Tensor> mask, double c) {
  auto g = problems_of(gramian, mask);
  Tensor weights = new_double(g.sizes, g.device), gap = new_double({g.sizes[0]}, g.device);
  CAGrad args{c, weights.mutable_data_ptr<double>(), gap.mutable_data_ptr<double>()};
  FASTMTL_SOLVE(cagrad, g, args);
  return {weights, gap};
}

std::tuple<Tensor, Tensor> fairgrad(const Tensor& gramian, std::optional<Tensor> mask, std::optional<Tensor> preference,
                                    double alpha) {
  auto g = problems_of(gramian, mask);
  if (preference) check_double(*preference, {g.sizes[1]}, g.device, "preference");
  Tensor weights = new_double(g.sizes, g.device), gap = new_double({g.sizes[0]}, g.device);
  FairGrad args{alpha, preference ? preference->const_data_ptr<double>() : nullptr, weights.mutable_data_ptr<double>(),
                gap.mutable_data_ptr<double>()};
  FASTMTL_SOLVE(fairgrad, g, args);
  return {weights, gap};
}

Tensor spectral(const Tensor& gramian, std::optional<Tensor> mask, std::optional<Tensor> preference, int64_t rule) {
  auto g = problems_of(gramian, mask);
  if (preference) check_double(*preference, g.sizes, g.device, "preference");
  if (rule < 0 || rule > static_cast<int64_t>(SpectralRule::sum_to_one))
    throw std::invalid_argument("rule: expected 0 to 4, found " + std::to_string(rule));
  Tensor weights = new_double(g.sizes, g.device);
  Spectral args{static_cast<SpectralRule>(rule), preference ? preference->const_data_ptr<double>() : nullptr,
                weights.mutable_data_ptr<double>()};
  FASTMTL_SOLVE(spectral, g, args);
  return weights;
}

Tensor krum(const Tensor& gramian, std::optional<Tensor> mask, int64_t num_byzantine, int64_t num_selected,
            bool euclidean) {
  auto g = problems_of(gramian, mask);
  if (num_byzantine < 0 || num_selected < 1)
    throw std::invalid_argument("krum: expected num_byzantine >= 0 and num_selected >= 1");
  Tensor weights = new_double(g.sizes, g.device);
  Krum args{num_byzantine, num_selected, euclidean, weights.mutable_data_ptr<double>()};
  FASTMTL_SOLVE(krum, g, args);
  return weights;
}

Tensor projected_gradient(const Tensor& gramian, std::optional<Tensor> mask, const Tensor& start,
                          std::optional<Tensor> pull, std::optional<Tensor> rate, double lr, double momentum,
                          double ridge, int64_t num_steps, bool scale_free) {
  auto g = problems_of(gramian, mask);
  const int64_t groups = g.sizes[0], rows = g.sizes[1], t = start.dim() == 2 ? start.size(1) : 0;
  if (t == 0 ? rows != 0 : rows == 0 || rows % t != 0)
    throw std::invalid_argument("start: expected [K, T] for " + std::to_string(rows) + " rows, found " +
                                shape_text(start));
  check_double(start, {groups, t}, g.device, "start");
  if (pull) check_double(*pull, {groups, t}, g.device, "pull");
  if (rate) check_double(*rate, {1}, g.device, "rate");
  Tensor weights = new_double({groups, t}, g.device);
  ProjectedGradient args{g.problems.gramian,
                         g.problems.mask,
                         static_cast<int32_t>(t == 0 ? 1 : rows / t),
                         start.const_data_ptr<double>(),
                         pull ? pull->const_data_ptr<double>() : nullptr,
                         rate ? rate->const_data_ptr<double>() : nullptr,
                         lr,
                         momentum,
                         ridge,
                         num_steps,
                         scale_free,
                         weights.mutable_data_ptr<double>()};
  g.problems = {groups, static_cast<int32_t>(t), nullptr, nullptr};
  FASTMTL_SOLVE(projected_gradient, g, args);
  return weights;
}

Tensor random_weights(const Tensor& present, const Tensor& rng, int64_t distribution) {
  if (present.dim() != 2) throw std::invalid_argument("present: expected shape [K, T], found " + shape_text(present));
  if (distribution < 0 || distribution > static_cast<int64_t>(Distribution::constrained_bernoulli))
    throw std::invalid_argument("distribution: expected 0 to 4, found " + std::to_string(distribution));
  const std::vector<int64_t> sizes = {present.size(0), present.size(1)};
  check_tensor(present, ScalarType::Bool, sizes, present.device(), "present");
  check_tensor(rng, ScalarType::Long, {2}, present.device(), "rng");
  const auto* mask = reinterpret_cast<const uint8_t*>(present.const_data_ptr());
  GramianArgs g{{sizes[0], static_cast<int32_t>(sizes[1]), nullptr, mask}, sizes, present.device()};
  Tensor weights = new_double(sizes, g.device);
  RandomWeights args{static_cast<Distribution>(distribution), rng.const_data_ptr<int64_t>(),
                     weights.mutable_data_ptr<double>()};
  FASTMTL_SOLVE(random_weights, g, args);
  return weights;
}

// Whether a matrix may be a Gramian: symmetric up to the rounding of float32. What is not finite does not count.
bool is_symmetric(const Tensor& gramian) {
  const GramianArgs g = problems_of(gramian, std::nullopt);
  const int64_t tasks = g.sizes[1];
  for (int64_t k = 0; k < g.sizes[0]; ++k) {
    const double* m = g.problems.gramian + k * tasks * tasks;
    const auto differs = [&](int64_t i, int64_t j) {
      const double difference = std::fabs(m[i * tasks + j] - m[j * tasks + i]);
      return difference > 0 && difference < std::numeric_limits<double>::infinity() &&
             difference > 1e-5 * std::sqrt(std::fabs(m[i * tasks + i])) * std::sqrt(std::fabs(m[j * tasks + j]));
    };
    constexpr int64_t kTile = 16;  // a column's cache lines serve the whole tile
    for (int64_t top = 0; top < tasks; top += kTile) {
      for (int64_t left = 0; left <= top; left += kTile) {
        for (int64_t i = top; i < std::min(top + kTile, tasks); ++i) {
          for (int64_t j = left; j < std::min(left + kTile, i); ++j) {
            if (differs(i, j)) return false;
          }
        }
      }
    }
  }
  return true;
}

template <class Library>
void implement(Library& m) {
  m.impl("gram", &gram_boxed);
  m.impl("combine", &combine_boxed);
  m.impl("combine_", &combine_inplace_boxed);
  m.impl("grad_drop", &grad_drop_boxed);
  m.impl("trimmed_mean", &trimmed_mean_boxed);
  m.impl("min_norm", TORCH_BOX(&min_norm));
  m.impl("frank_wolfe", TORCH_BOX(&frank_wolfe));
  m.impl("dual_cone", TORCH_BOX(&dual_cone));
  m.impl("simplex_lp", TORCH_BOX(&simplex_lp));
  m.impl("pcgrad", TORCH_BOX(&pcgrad));
  m.impl("gradvac", TORCH_BOX(&gradvac));
  m.impl("spectral", TORCH_BOX(&spectral));
  m.impl("cagrad", TORCH_BOX(&cagrad));
  m.impl("krum", TORCH_BOX(&krum));
  m.impl("projected_gradient", TORCH_BOX(&projected_gradient));
  m.impl("random_weights", TORCH_BOX(&random_weights));
  m.impl("fairgrad", TORCH_BOX(&fairgrad));
}

}  // namespace
}  // namespace fastmtl

STABLE_TORCH_LIBRARY(fastmtl, m) {
  m.def("gram(Tensor?[] rows, int num_tasks, bool stacked, int[]? groups, int num_groups, bool fast=False) -> Tensor");
  m.def(
      "combine(Tensor?[] rows, int num_tasks, bool stacked, int[]? groups, Tensor weights, bool widen=False)"
      " -> Tensor[]");
  m.def("combine_(Tensor?[] rows, int num_tasks, bool stacked, int[]? groups, Tensor weights, Tensor(a!)[] out) -> ()");
  m.def(
      "grad_drop(Tensor?[] rows, int num_tasks, bool stacked, int[]? groups, Tensor weights, Tensor rng, Tensor? leak,"
      " bool widen=False) -> Tensor[]");
  m.def(
      "trimmed_mean(Tensor?[] rows, int num_tasks, bool stacked, int[]? groups, Tensor weights, int trim,"
      " bool widen=False) -> Tensor[]");
  m.def("min_norm(Tensor gramian, Tensor? mask, Tensor? lower_bounds=None) -> (Tensor, Tensor)");
  m.def("frank_wolfe(Tensor gramian, Tensor? mask, int max_iter, float tol, bool pair_start) -> (Tensor, Tensor)");
  m.def("dual_cone(Tensor gramian, Tensor? mask, Tensor combinations, float noise) -> (Tensor, Tensor)");
  m.def(
      "simplex_lp(Tensor gramian, Tensor? mask, Tensor objective, Tensor bounds, Tensor extra, Tensor extra_bound)"
      " -> (Tensor, Tensor)");
  m.def(
      "pcgrad(Tensor gramian, Tensor? mask, Tensor? order, Tensor? rng, int order_kind, bool include_self, bool mean)"
      " -> Tensor");
  m.def(
      "gradvac(Tensor gramian, Tensor? mask, Tensor? order, Tensor? rng, int order_kind, Tensor targets, float beta,"
      " bool ema_first, bool ema_always) -> (Tensor, Tensor)");
  m.def("krum(Tensor gramian, Tensor? mask, int num_byzantine, int num_selected, bool euclidean) -> Tensor");
  m.def(
      "projected_gradient(Tensor gramian, Tensor? mask, Tensor start, Tensor? pull, Tensor? rate, float lr,"
      " float momentum, float ridge, int num_steps, bool scale_free) -> Tensor");
  m.def("random_weights(Tensor present, Tensor rng, int distribution) -> Tensor");
  m.def("cagrad(Tensor gramian, Tensor? mask, float c) -> (Tensor, Tensor)");
  m.def("fairgrad(Tensor gramian, Tensor? mask, Tensor? preference, float alpha) -> (Tensor, Tensor)");
  m.def("is_symmetric(Tensor gramian) -> bool");
  m.def("spectral(Tensor gramian, Tensor? mask, Tensor? preference, int rule) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  fastmtl::implement(m);
  m.impl("is_symmetric", TORCH_BOX(&fastmtl::is_symmetric));
}
#ifdef WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastmtl, CUDA, m) { fastmtl::implement(m); }
#endif
