// The batched T x T solvers: csrc/solvers/ run by warps and blocks.
//
// PCGrad, GradVac: one warp per problem and row i, K * T warps; then the rows' coefficients are added, in order.
// Min-norm, with and without bounds, Frank-Wolfe, dual cone, FairGrad, spectral: one warp (T <= 32) or one block per
// problem. What a solver works on lies in shared memory where it fits, else in the caller's scratch; blocks that need
// scratch take several problems each where there are many.
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
#include "cuda.h"
#include "launch.h"
#include "ptx.h"
#include "teams.h"

namespace fastmtl {
namespace {

constexpr int kWarp = 32, kBlock = 256;
constexpr int64_t kSharedBytes = 40 << 10;  // of the 48 KB that need no opt-in
constexpr int64_t kTeamsInScratch = 256;

bool fits_shared(int64_t doubles) { return doubles * int64_t{sizeof(double)} <= kSharedBytes; }
size_t shared_bytes(int64_t doubles) { return fits_shared(doubles) ? doubles * sizeof(double) : 0; }
size_t scratch_bytes(int64_t doubles, int64_t count) {
  return fits_shared(doubles) ? 0 : doubles * count * sizeof(double);
}

// The memory of this block's solver: `doubles` of shared memory where scratch is null, else of scratch.
__device__ __forceinline__ double* solver_memory(double* scratch, int64_t doubles) {
  if (scratch) return scratch + blockIdx.x * doubles;
  DYNAMIC_SHARED(double, memory);
  return memory;
}

// ---- PCGrad and GradVac ----

__device__ __forceinline__ void fill_row(double value, int num_tasks, double* row) {
  for (int j = threadIdx.x; j < num_tasks; j += kWarp) row[j] = value;
}

__global__ void __launch_bounds__(kWarp)
    pcgrad_rows_kernel(Problems problems, PCGrad args, double* scratch, double* coefficients) {
  const int num_tasks = problems.num_tasks, row = blockIdx.x % num_tasks;
  const Problem problem = problem_at(problems, blockIdx.x / num_tasks);
  double* const mine = coefficients + int64_t{blockIdx.x} * num_tasks;
  const WarpTeam team;
  if (!is_finite(team, problem)) {
    fill_row(nan(""), num_tasks, mine);
    return;
  }
  pcgrad_row(team, problem, args.order, args.include_self, row, solver_memory(scratch, pcgrad_row_scratch(num_tasks)),
             mine);
}

__global__ void __launch_bounds__(kWarp)
    gradvac_rows_kernel(Problems problems, GradVac args, double* scratch, double* coefficients) {
  const int num_tasks = problems.num_tasks, row = blockIdx.x % num_tasks;
  const Problem problem = problem_at(problems, blockIdx.x / num_tasks);
  const int64_t first = int64_t{blockIdx.x} * num_tasks;
  const WarpTeam team;
  if (!is_finite(team, problem)) {
    fill_row(nan(""), num_tasks, coefficients + first);
    for (int j = threadIdx.x; j < num_tasks; j += kWarp) args.new_targets[first + j] = args.targets[first + j];
    return;
  }
  gradvac_row(team, problem, args.order, GradVacRule{args.beta, args.ema_first, args.ema_always}, row,
              args.targets + first, args.new_targets + first, solver_memory(scratch, gradvac_row_scratch(num_tasks)),
              coefficients + first);
}

// weights[k][j] = sum_i coefficients[k][i][j], over the number of present tasks for the mean. Block (x, k).
__global__ void __launch_bounds__(kBlock)
    sum_rows_kernel(Problems problems, bool mean, const double* __restrict__ coefficients,
                    double* __restrict__ weights) {
  const int num_tasks = problems.num_tasks;
  const int64_t index = int64_t{blockIdx.x} * kBlock + threadIdx.x;
  if (index >= problems.count * num_tasks) return;
  const int64_t k = index / num_tasks;
  const Problem problem = problem_at(problems, k);
  const double* column = coefficients + k * num_tasks * num_tasks + index % num_tasks;
  double sum = 0;
  int present = 0;
  for (int i = 0; i < num_tasks; ++i) {
    sum += column[int64_t{i} * num_tasks];
    present += problem.present(i);
  }
  weights[index] = mean && present > 0 ? sum / present : sum;
}

// scratch: coefficients [K,T,T], then the solvers' memory where it is too large for shared memory.
int64_t num_coefficients(const Problems& problems) { return problems.count * problems.num_tasks * problems.num_tasks; }

size_t rows_scratch(const Problems& problems, int64_t doubles) {
  return num_coefficients(problems) * sizeof(double) + scratch_bytes(doubles, problems.count * problems.num_tasks);
}

template <class Args>
cudaError_t launch_rows(void (*kernel)(Problems, Args, double*, double*), const Problems& problems, const Args& args,
                        bool mean, int64_t doubles, void* scratch, cudaStream_t stream) {
  const int64_t num_rows = problems.count * problems.num_tasks;
  if (num_rows == 0) return cudaSuccess;
  double* const coefficients = static_cast<double*>(scratch);
  double* const memory = fits_shared(doubles) ? nullptr : coefficients + num_coefficients(problems);
  cudaError_t error =
      launch(kernel, dim3(num_rows), kWarp, shared_bytes(doubles), stream, problems, args, memory, coefficients);
  if (error != cudaSuccess) return error;
  return launch(sum_rows_kernel, dim3((num_rows + kBlock - 1) / kBlock), kBlock, 0, stream, problems, mean,
                coefficients, args.weights);
}

// ---- min-norm, Frank-Wolfe, dual cone, FairGrad: one team per problem ----

int64_t team_doubles(const MinNorm&, int num_tasks) { return min_norm_scratch(num_tasks); }
int64_t team_doubles(const BoundedMinNorm&, int num_tasks) { return bounded_min_norm_scratch(num_tasks); }
int64_t team_doubles(const DualCone&, int num_tasks) { return dual_cone_scratch(num_tasks); }
int64_t team_doubles(const FrankWolfe&, int num_tasks) { return frank_wolfe_scratch(num_tasks); }
int64_t team_doubles(const Spectral&, int num_tasks) { return spectral_scratch(num_tasks); }
int64_t team_doubles(const FairGrad&, int num_tasks) { return fairgrad_scratch(num_tasks); }
int64_t team_doubles(const CAGrad&, int num_tasks) { return cagrad_scratch(num_tasks); }
int64_t team_doubles(const SimplexLp&, int num_tasks) { return simplex_lp_scratch(num_tasks); }
int64_t team_doubles(const Krum&, int num_tasks) { return krum_scratch(num_tasks); }
int64_t team_doubles(const ProjectedGradient&, int num_tasks) { return projected_gradient_scratch(num_tasks); }
int64_t team_doubles(const RandomWeights&, int) { return 1; }  // none, but a launch has some

template <class Team>
__device__ __forceinline__ double solve(const Team& team, const Problem& problem, const SimplexLp& args, double* memory,
                                        double* weights) {
  return simplex_lp_problem(team, problem, args, memory, weights);
}

template <class Team>
__device__ __forceinline__ double solve(const Team& team, const Problem& problem, const MinNorm&, double* memory,
                                        double* weights) {
  return min_norm_problem(team, problem, memory, weights);
}

template <class Team>
__device__ __forceinline__ double solve(const Team& team, const Problem& problem, const BoundedMinNorm& args,
                                        double* memory, double* weights) {
  return bounded_min_norm_problem(team, problem, args.lower_bounds + problem.index * problem.num_tasks, memory,
                                  weights);
}

template <class Team>
__device__ __forceinline__ double solve(const Team& team, const Problem& problem, const FrankWolfe& args,
                                        double* memory, double* weights) {
  return frank_wolfe_problem(team, problem, args, memory, weights);
}

template <class Team>
__device__ __forceinline__ double solve(const Team& team, const Problem& problem, const FairGrad& args, double* memory,
                                        double* weights) {
  return fairgrad_problem(team, problem, args, memory, weights);
}

template <class Team>
__device__ __forceinline__ double solve(const Team& team, const Problem& problem, const CAGrad& args, double* memory,
                                        double* weights) {
  return cagrad_problem(team, problem, args.c, memory, weights);
}

template <class Team>
__device__ __forceinline__ double solve(const Team& team, const Problem& problem, const Spectral& args, double* memory,
                                        double* weights) {
  spectral_problem(team, problem, args, memory, weights);
  return 0;
}

template <class Team>
__device__ __forceinline__ double solve(const Team& team, const Problem& problem, const DualCone& args, double* memory,
                                        double* weights) {
  if (is_finite(team, problem)) {
    return dual_cone_problem(team, problem, args.combinations + problem.index * problem.num_tasks, args.noise, memory,
                             weights);
  }
  detail::fill_weights(team, problem.num_tasks, detail::kNan, weights);
  return detail::kNan;
}

template <class Team>
__device__ __forceinline__ double solve(const Team& team, const Problem& problem, const Krum& args, double* memory,
                                        double* weights) {
  krum_problem(team, problem, args, memory, weights);
  return 0;
}

template <class Team>
__device__ __forceinline__ double solve(const Team& team, const Problem& problem, const ProjectedGradient& args,
                                        double* memory, double* weights) {
  projected_gradient_problem(team, problem, args, memory, weights);
  return 0;
}

template <class Team>
__device__ __forceinline__ double solve(const Team& team, const Problem& problem, const RandomWeights& args, double*,
                                        double* weights) {
  random_weights_problem(team, problem, args, weights);
  return 0;
}

template <class Args>
__device__ __forceinline__ void store_gap(const Args& args, int64_t problem, double gap) {
  args.gap[problem] = gap;
}
__device__ __forceinline__ void store_gap(const Spectral&, int64_t, double) {}  // has none
__device__ __forceinline__ void store_gap(const Krum&, int64_t, double) {}
__device__ __forceinline__ void store_gap(const ProjectedGradient&, int64_t, double) {}
__device__ __forceinline__ void store_gap(const RandomWeights&, int64_t, double) {}

template <class Team, class Args>
__device__ __forceinline__ void solve_problem(const Team& team, const Problems& problems, const Args& args,
                                              double* scratch, int64_t doubles) {
  double* const memory = solver_memory(scratch, doubles);
  for (int64_t k = blockIdx.x; k < problems.count; k += gridDim.x) {
    const Problem problem = problem_at(problems, k);
    const double gap = solve(team, problem, args, memory, args.weights + k * problem.num_tasks);
    if (team.rank() == 0) store_gap(args, k, gap);
    team.sync();
  }
}

template <class Args>
__global__ void __launch_bounds__(kWarp, 1)
    warp_kernel(Problems problems, Args args, double* scratch, int64_t doubles) {
  solve_problem(WarpTeam(), problems, args, scratch, doubles);
}

template <class Args>
__global__ void __launch_bounds__(kBlock, 1)
    block_kernel(Problems problems, Args args, double* scratch, int64_t doubles) {
  SHARED(BlockTeam<kBlock>::Memory, memory, [1]);
  solve_problem(BlockTeam<kBlock>(memory), problems, args, scratch, doubles);
}

int64_t num_teams(const Problems& problems, int64_t doubles) {
  return fits_shared(doubles) || problems.count < kTeamsInScratch ? problems.count : kTeamsInScratch;
}

template <class Args>
size_t team_scratch(const Problems& problems) {
  const int64_t doubles = team_doubles(Args(), problems.num_tasks);
  return scratch_bytes(doubles, num_teams(problems, doubles));
}

template <class Args>
cudaError_t launch_teams(const Problems& problems, const Args& args, void* scratch, cudaStream_t stream) {
  if (problems.count == 0) return cudaSuccess;
  const int64_t doubles = team_doubles(args, problems.num_tasks);
  double* const memory = fits_shared(doubles) ? nullptr : static_cast<double*>(scratch);
  const bool warp = problems.num_tasks <= kWarp;
  return launch(warp ? warp_kernel<Args> : block_kernel<Args>, dim3(num_teams(problems, doubles)),
                warp ? kWarp : kBlock, shared_bytes(doubles), stream, problems, args, memory, doubles);
}

}  // namespace

size_t pcgrad_cuda_scratch(const Problems& problems) {
  return rows_scratch(problems, pcgrad_row_scratch(problems.num_tasks));
}

cudaError_t pcgrad_cuda(const Problems& problems, const PCGrad& args, void* scratch, cudaStream_t stream) {
  return launch_rows(pcgrad_rows_kernel, problems, args, args.mean, pcgrad_row_scratch(problems.num_tasks), scratch,
                     stream);
}

size_t gradvac_cuda_scratch(const Problems& problems) {
  return rows_scratch(problems, gradvac_row_scratch(problems.num_tasks));
}

cudaError_t gradvac_cuda(const Problems& problems, const GradVac& args, void* scratch, cudaStream_t stream) {
  return launch_rows(gradvac_rows_kernel, problems, args, false, gradvac_row_scratch(problems.num_tasks), scratch,
                     stream);
}

size_t min_norm_cuda_scratch(const Problems& problems) { return team_scratch<MinNorm>(problems); }

cudaError_t min_norm_cuda(const Problems& problems, const MinNorm& args, void* scratch, cudaStream_t stream) {
  return launch_teams(problems, args, scratch, stream);
}

size_t bounded_min_norm_cuda_scratch(const Problems& problems) { return team_scratch<BoundedMinNorm>(problems); }

cudaError_t bounded_min_norm_cuda(const Problems& problems, const BoundedMinNorm& args, void* scratch,
                                  cudaStream_t stream) {
  return launch_teams(problems, args, scratch, stream);
}

size_t dual_cone_cuda_scratch(const Problems& problems) { return team_scratch<DualCone>(problems); }

cudaError_t dual_cone_cuda(const Problems& problems, const DualCone& args, void* scratch, cudaStream_t stream) {
  return launch_teams(problems, args, scratch, stream);
}

size_t simplex_lp_cuda_scratch(const Problems& problems) { return team_scratch<SimplexLp>(problems); }

cudaError_t simplex_lp_cuda(const Problems& problems, const SimplexLp& args, void* scratch, cudaStream_t stream) {
  return launch_teams(problems, args, scratch, stream);
}

size_t frank_wolfe_cuda_scratch(const Problems& problems) { return team_scratch<FrankWolfe>(problems); }

cudaError_t frank_wolfe_cuda(const Problems& problems, const FrankWolfe& args, void* scratch, cudaStream_t stream) {
  return launch_teams(problems, args, scratch, stream);
}

size_t cagrad_cuda_scratch(const Problems& problems) { return team_scratch<CAGrad>(problems); }

cudaError_t cagrad_cuda(const Problems& problems, const CAGrad& args, void* scratch, cudaStream_t stream) {
  return launch_teams(problems, args, scratch, stream);
}

size_t fairgrad_cuda_scratch(const Problems& problems) { return team_scratch<FairGrad>(problems); }

cudaError_t fairgrad_cuda(const Problems& problems, const FairGrad& args, void* scratch, cudaStream_t stream) {
  return launch_teams(problems, args, scratch, stream);
}

size_t spectral_cuda_scratch(const Problems& problems) { return team_scratch<Spectral>(problems); }

cudaError_t spectral_cuda(const Problems& problems, const Spectral& args, void* scratch, cudaStream_t stream) {
  return launch_teams(problems, args, scratch, stream);
}

size_t krum_cuda_scratch(const Problems& problems) { return team_scratch<Krum>(problems); }

cudaError_t krum_cuda(const Problems& problems, const Krum& args, void* scratch, cudaStream_t stream) {
  return launch_teams(problems, args, scratch, stream);
}

size_t projected_gradient_cuda_scratch(const Problems& problems) { return team_scratch<ProjectedGradient>(problems); }

cudaError_t projected_gradient_cuda(const Problems& problems, const ProjectedGradient& args, void* scratch,
                                    cudaStream_t stream) {
  return launch_teams(problems, args, scratch, stream);
}

size_t random_weights_cuda_scratch(const Problems& problems) { return team_scratch<RandomWeights>(problems); }

cudaError_t random_weights_cuda(const Problems& problems, const RandomWeights& args, void* scratch,
                                cudaStream_t stream) {
  return launch_teams(problems, args, scratch, stream);
}

}  // namespace fastmtl
