// The batched T x T solvers as the backends offer them: K independent problems, all pointers in the backend's memory.
//
// Common to all: gramian [K,T,T] is symmetric; only its entries among the tasks of the mask are read. mask [K,T] (null:
// all present): a task that is not present has weight 0. Where a present entry of M is not finite, all weights of that
// problem are NaN at once, and state passes through unchanged.
#pragma once
#include <cstdint>

namespace fastmtl {

struct Problems {
  int64_t count;          // K
  int32_t num_tasks;      // T
  const double* gramian;  // [K,T,T]
  const uint8_t* mask;    // [K,T] or null
  int64_t repeats = 1;    // so many problems in turn have one Gramian and mask, of which there are K / repeats
};

// In which order task i meets the others. `explicit_order` [T,T] or, if batched, [K,T,T]: row i is a permutation of
// 0..T-1. Without it: random: row i of problem k is drawn by Philox from (rng[0] = seed, rng[1] = step, k, i);
// shared: the draw of i = 0 for all i; fixed: 0, 1, .., T-1.
enum class OrderKind : int32_t { random = 0, fixed = 1, shared = 2 };
struct Order {
  OrderKind kind;
  const int64_t* explicit_order;
  bool batched;
  const int64_t* rng;  // [2]: seed, step; in the backend's memory; may be null for fixed and explicit orders
};

// argmin |sum_t w_t g_t|^2 on the simplex. gap [K]: |x|^2 - min_t (Mw)_t.
struct MinNorm {
  double* weights;
  double* gap;
};

// The same with w >= lower_bounds [K,T], which are not negative and sum to at most 1.
// gap [K]: sum_t (w_t - c_t) (Mw)_t - (1 - sum c) min_t (Mw)_t.
struct BoundedMinNorm {
  const double* lower_bounds;
  double* weights;
  double* gap;
};

// Frank-Wolfe steps towards the min-norm point, from equal weights or from the best pair; gap as for MinNorm.
struct FrankWolfe {
  int64_t max_iter;
  double tol;  // on the sum of the weights' changes
  bool pair_start;
  double* weights;
  double* gap;
};

// argmin |sum_t v_t g_t|^2 over v >= combinations [K,T]: the projection of sum_t u_t g_t onto the dual cone.
// gap [K]: see dual_cone.h.
struct DualCone {
  const double* combinations;
  double noise;
  double* weights;
  double* gap;
};

// argmax of objective^T w [K,T] over the simplex with M w >= bounds [K,T], and extra [K,T] w >= extra_bound [K]; a
// bound of -inf: none. gap [K]: 0; where there is no such w, by how much the w returned, the best one, misses.
struct SimplexLp {
  const double* objective;
  const double* bounds;
  const double* extra;
  const double* extra_bound;
  double* weights;
  double* gap;
};

struct PCGrad {
  Order order;
  bool include_self;
  bool mean;
  double* weights;
};

// targets [K,T,T]: the target cosines before; new_targets: after. ema_first: targets move before they are compared.
// ema_always: they move on every pair (paper), else only where a correction was made.
struct GradVac {
  Order order;
  double beta;
  bool ema_first;
  bool ema_always;
  const double* targets;
  double* new_targets;
  double* weights;
};

// (Mw)_t = (w_t / p_t)^(-1/alpha), w > 0: fair to the degree alpha. preference [T]: p; null: 1. gap [K]: the largest
// relative error of an equation, infinity where there is no solution (then all weights are 0).
struct FairGrad {
  double alpha;
  const double* preference;
  double* weights;
  double* gap;
};

// Weights by a function of the Gramian or the cosines (spectral.h). preference: [K,T] or null.
enum class SpectralRule : int32_t { aligned_min, aligned_median, aligned_rmse, projections, sum_to_one };
struct Spectral {
  SpectralRule rule;
  const double* preference;
  double* weights;
};

// CAGrad: the direction within c |g_0| of the mean gradient g_0 whose least gain is largest. gap [K]: how much larger
// it could be.
struct CAGrad {
  double c;
  double* weights;
  double* gap;
};

// Equal weights for the `num_selected` tasks that lie closest to their neighbours, 0 for the others (krum.h).
struct Krum {
  int64_t num_byzantine;
  int64_t num_selected;
  bool euclidean;  // distances; else their squares
  double* weights;
};

// Steps towards argmin of 1/2 w^T A w + pull^T A^T w on the simplex (projected_gradient.h). The problems have T tasks;
// their Gramian and mask are those below, of B batches: [K, B T, B T] and [K, B T]. A: the block of the first batch's
// rows and the second's columns, or the Gramian of the only one. A task is present if it is in all batches.
struct ProjectedGradient {
  const double* gramian;
  const uint8_t* mask;  // or null
  int32_t batches;
  const double* start;  // [K,T]
  const double* pull;   // [K,T] or null
  const double* rate;   // one number that multiplies lr, or null
  double lr;
  double momentum;
  double ridge;
  int64_t num_steps;
  bool scale_free;  // divide A by the square of the mean norm
  double* weights;
};

// Random weights of sum 1 (random_weights.h); the problems' Gramian is not read, and may be null.
enum class Distribution : int32_t { normal, uniform, dirichlet, bernoulli, constrained_bernoulli };
struct RandomWeights {
  Distribution distribution;
  const int64_t* rng;  // [2]: seed, step
  double* weights;
};

void min_norm_cpu(const Problems&, const MinNorm&);
void bounded_min_norm_cpu(const Problems&, const BoundedMinNorm&);
void frank_wolfe_cpu(const Problems&, const FrankWolfe&);
void dual_cone_cpu(const Problems&, const DualCone&);
void simplex_lp_cpu(const Problems&, const SimplexLp&);
void pcgrad_cpu(const Problems&, const PCGrad&);
void gradvac_cpu(const Problems&, const GradVac&);
void fairgrad_cpu(const Problems&, const FairGrad&);
void cagrad_cpu(const Problems&, const CAGrad&);
void spectral_cpu(const Problems&, const Spectral&);
void krum_cpu(const Problems&, const Krum&);
void projected_gradient_cpu(const Problems&, const ProjectedGradient&);
void random_weights_cpu(const Problems&, const RandomWeights&);

}  // namespace fastmtl
