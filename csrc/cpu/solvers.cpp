// The T x T solvers on the host: problems are independent, so they are spread over threads where they are worth it.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>

#include "../parallel.h"
#include "../solvers/bounded_min_norm.h"
#include "../solvers/cagrad.h"
#include "../solvers/dual_cone.h"
#include "../solvers/fairgrad.h"
#include "../solvers/frank_wolfe.h"
#include "../solvers/gradvac.h"
#include "../solvers/krum.h"
#include "../solvers/min_norm.h"
#include "../solvers/pcgrad.h"
#include "../solvers/projected_gradient.h"
#include "../solvers/random_weights.h"
#include "../solvers/simplex_lp.h"
#include "../solvers/spectral.h"
#include "dispatch.h"

namespace fastmtl {
namespace {

struct SolverKernels {
  double (*min_norm)(const Problem&, double* scratch, double* weights);
  double (*bounded_min_norm)(const Problem&, const double* bounds, double* scratch, double* weights);
  double (*frank_wolfe)(const Problem&, const FrankWolfe&, double* scratch, double* weights);
  double (*dual_cone)(const Problem&, const double* combination, double noise, double* scratch, double* weights);
  double (*simplex_lp)(const Problem&, const SimplexLp&, double* scratch, double* weights);
  void (*pcgrad_row)(const Problem&, const PCGrad&, int row, double* scratch, double* coefficients);
  void (*gradvac_row)(const Problem&, const GradVac&, int row, const double* targets, double* new_targets,
                      double* scratch, double* coefficients);
  double (*fairgrad)(const Problem&, const FairGrad&, double* scratch, double* weights);
  double (*cagrad)(const Problem&, double c, double* scratch, double* weights);
  void (*spectral)(const Problem&, const Spectral&, double* scratch, double* weights);
  void (*krum)(const Problem&, const Krum&, double* scratch, double* weights);
  void (*projected_gradient)(const Problem&, const ProjectedGradient&, double* scratch, double* weights);
};

}  // namespace
}  // namespace fastmtl

#define FASTMTL_KERNELS "solver_kernels.h"
#include "each_target.h"

namespace fastmtl {
namespace {

const SolverKernels& solver_kernels() {
#if defined(__x86_64__)
  if (capability() == Capability::avx512) return avx512::kSolverKernels;
  if (capability() == Capability::avx2) return avx2::kSolverKernels;
#endif
  return portable::kSolverKernels;
}

// A problem of fewer tasks than this, times its number, is not worth waking a thread for.
constexpr int64_t kParallelCube = 1 << 15;

// Calls solve(k, scratch) for every problem, with `scratch_size` doubles.
void for_each_problem(const Problems& problems, int64_t scratch_size,
                      const std::function<void(int64_t, double*)>& solve) {
  const int64_t t = problems.num_tasks;
  const int64_t work = problems.count * t * t * t;
  const int64_t chunks = work < kParallelCube ? 1 : std::min<int64_t>(problems.count, num_threads());
  const std::unique_ptr<double[]> scratch(new double[static_cast<size_t>(chunks * scratch_size)]);
  const auto run = [&](int64_t chunk) {
    for (int64_t k = chunk; k < problems.count; k += chunks) solve(k, scratch.get() + chunk * scratch_size);
  };
  if (chunks <= 1) {
    if (problems.count > 0) run(0);
  } else {
    parallel_for(chunks, run);
  }
}

int count_present(const Problem& problem) {
  int count = 0;
  for (int t = 0; t < problem.num_tasks; ++t) count += problem.present(t);
  return count;
}

}  // namespace

void min_norm_cpu(const Problems& problems, const MinNorm& method) {
  const int64_t t = problems.num_tasks;
  const SolverKernels& kernels = solver_kernels();
  for_each_problem(problems, min_norm_scratch(problems.num_tasks), [&](int64_t k, double* scratch) {
    method.gap[k] = kernels.min_norm(problem_at(problems, k), scratch, method.weights + k * t);
  });
}

void bounded_min_norm_cpu(const Problems& problems, const BoundedMinNorm& method) {
  const int64_t t = problems.num_tasks;
  const SolverKernels& kernels = solver_kernels();
  for_each_problem(problems, bounded_min_norm_scratch(problems.num_tasks), [&](int64_t k, double* scratch) {
    method.gap[k] =
        kernels.bounded_min_norm(problem_at(problems, k), method.lower_bounds + k * t, scratch, method.weights + k * t);
  });
}

void frank_wolfe_cpu(const Problems& problems, const FrankWolfe& method) {
  const int64_t t = problems.num_tasks;
  const SolverKernels& kernels = solver_kernels();
  for_each_problem(problems, frank_wolfe_scratch(problems.num_tasks), [&](int64_t k, double* scratch) {
    method.gap[k] = kernels.frank_wolfe(problem_at(problems, k), method, scratch, method.weights + k * t);
  });
}

void dual_cone_cpu(const Problems& problems, const DualCone& method) {
  const int64_t t = problems.num_tasks;
  const SolverKernels& kernels = solver_kernels();
  std::vector<char> finite;
  for (int64_t k = 0; k < problems.count; k += problems.repeats) {
    finite.push_back(is_finite(HostTeam(), problem_at(problems, k)));
  }
  for_each_problem(problems, dual_cone_scratch(problems.num_tasks), [&](int64_t k, double* scratch) {
    double* weights = method.weights + k * t;
    if (finite[k / problems.repeats]) {
      method.gap[k] =
          kernels.dual_cone(problem_at(problems, k), method.combinations + k * t, method.noise, scratch, weights);
    } else {
      std::fill(weights, weights + t, method.gap[k] = std::numeric_limits<double>::quiet_NaN());
    }
  });
}

void simplex_lp_cpu(const Problems& problems, const SimplexLp& method) {
  const int64_t t = problems.num_tasks;
  const SolverKernels& kernels = solver_kernels();
  for_each_problem(problems, simplex_lp_scratch(problems.num_tasks), [&](int64_t k, double* scratch) {
    method.gap[k] = kernels.simplex_lp(problem_at(problems, k), method, scratch, method.weights + k * t);
  });
}

void pcgrad_cpu(const Problems& problems, const PCGrad& method) {
  const int64_t t = problems.num_tasks;
  const SolverKernels& kernels = solver_kernels();
  for_each_problem(problems, t + pcgrad_row_scratch(problems.num_tasks), [&](int64_t k, double* scratch) {
    const Problem problem = problem_at(problems, k);
    double* weights = method.weights + k * t;
    if (!is_finite(HostTeam(), problem)) {
      std::fill(weights, weights + t, std::numeric_limits<double>::quiet_NaN());
      return;
    }
    std::fill(weights, weights + t, 0.0);
    double* coefficients = scratch;
    for (int row = 0; row < t; ++row) {
      if (!problem.present(row)) continue;
      kernels.pcgrad_row(problem, method, row, scratch + t, coefficients);
      for (int64_t j = 0; j < t; ++j) weights[j] += coefficients[j];
    }
    if (!method.mean) return;
    const double count = std::max(count_present(problem), 1);
    for (int64_t j = 0; j < t; ++j) weights[j] /= count;
  });
}

void gradvac_cpu(const Problems& problems, const GradVac& method) {
  const int64_t t = problems.num_tasks;
  const SolverKernels& kernels = solver_kernels();
  for_each_problem(problems, t + gradvac_row_scratch(problems.num_tasks), [&](int64_t k, double* scratch) {
    const Problem problem = problem_at(problems, k);
    double* weights = method.weights + k * t;
    const double* targets = method.targets + k * t * t;
    double* new_targets = method.new_targets + k * t * t;
    if (!is_finite(HostTeam(), problem)) {
      std::fill(weights, weights + t, std::numeric_limits<double>::quiet_NaN());
      if (new_targets != targets) std::copy(targets, targets + t * t, new_targets);
      return;
    }
    std::fill(weights, weights + t, 0.0);
    double* coefficients = scratch;
    for (int row = 0; row < t; ++row) {
      kernels.gradvac_row(problem, method, row, targets + row * t, new_targets + row * t, scratch + t, coefficients);
      for (int64_t j = 0; j < t; ++j) weights[j] += coefficients[j];
    }
  });
}

void cagrad_cpu(const Problems& problems, const CAGrad& method) {
  const int64_t t = problems.num_tasks;
  const SolverKernels& kernels = solver_kernels();
  for_each_problem(problems, cagrad_scratch(problems.num_tasks), [&](int64_t k, double* scratch) {
    method.gap[k] = kernels.cagrad(problem_at(problems, k), method.c, scratch, method.weights + k * t);
  });
}

void fairgrad_cpu(const Problems& problems, const FairGrad& method) {
  const int64_t t = problems.num_tasks;
  const SolverKernels& kernels = solver_kernels();
  for_each_problem(problems, fairgrad_scratch(problems.num_tasks), [&](int64_t k, double* scratch) {
    method.gap[k] = kernels.fairgrad(problem_at(problems, k), method, scratch, method.weights + k * t);
  });
}

void spectral_cpu(const Problems& problems, const Spectral& method) {
  const int64_t t = problems.num_tasks;
  const SolverKernels& kernels = solver_kernels();
  for_each_problem(problems, spectral_scratch(problems.num_tasks), [&](int64_t k, double* scratch) {
    kernels.spectral(problem_at(problems, k), method, scratch, method.weights + k * t);
  });
}

void krum_cpu(const Problems& problems, const Krum& method) {
  const int64_t t = problems.num_tasks;
  const SolverKernels& kernels = solver_kernels();
  for_each_problem(problems, krum_scratch(problems.num_tasks), [&](int64_t k, double* scratch) {
    kernels.krum(problem_at(problems, k), method, scratch, method.weights + k * t);
  });
}

void projected_gradient_cpu(const Problems& problems, const ProjectedGradient& method) {
  const int64_t t = problems.num_tasks;
  const SolverKernels& kernels = solver_kernels();
  for_each_problem(problems, projected_gradient_scratch(problems.num_tasks), [&](int64_t k, double* scratch) {
    kernels.projected_gradient(problem_at(problems, k), method, scratch, method.weights + k * t);
  });
}

void random_weights_cpu(const Problems& problems, const RandomWeights& method) {
  for (int64_t k = 0; k < problems.count; ++k) {
    random_weights_problem(HostTeam(), problem_at(problems, k), method, method.weights + k * problems.num_tasks);
  }
}

}  // namespace fastmtl
