// The CUDA backend. No torch: raw pointers, sizes, a stream. All calls are asynchronous and free of host syncs.
// `rows` is a host table of device pointers; the other pointers are device memory. `scratch` is device memory of the
// size that the function of that name tells, owned by the caller until the stream has passed the call.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>

#include "../rows.h"
#include "../solvers/solvers.h"

namespace fastmtl {

constexpr int kMaxTasksCuda = 2688;  // of gram_cuda and combine_cuda

size_t gram_cuda_scratch(const Rows& rows);
// fast: f32 rows of more than 8 tasks are rounded to TF32 (an error of up to about 1e-3 of the norms, not 5e-7).
cudaError_t gram_cuda(const Rows& rows, void* scratch, double* gramian, cudaStream_t stream, bool fast = false);

// As combine_cpu. out: a host table of device pointers. No scratch.
cudaError_t combine_cuda(const Rows& rows, const double* weights, const Output* out, bool accumulate,
                         cudaStream_t stream);

// As grad_drop_cpu. rng, leak: device memory.
constexpr int kMaxTasksLeaky = 2000;
cudaError_t grad_drop_cuda(const Rows& rows, const double* weights, const int64_t* rng, const double* leak,
                           const Output* out, cudaStream_t stream);

// As trimmed_mean_cpu.
constexpr int kMaxTrimInRegisters = 4;  // for more at most kMaxTasksSorted tasks
constexpr int kMaxTasksSorted = 512;
cudaError_t trimmed_mean_cuda(const Rows& rows, const double* weights, int64_t trim, const Output* out,
                              cudaStream_t stream);

size_t min_norm_cuda_scratch(const Problems&);
cudaError_t min_norm_cuda(const Problems&, const MinNorm&, void* scratch, cudaStream_t stream);
size_t bounded_min_norm_cuda_scratch(const Problems&);
cudaError_t bounded_min_norm_cuda(const Problems&, const BoundedMinNorm&, void* scratch, cudaStream_t stream);
size_t frank_wolfe_cuda_scratch(const Problems&);
cudaError_t frank_wolfe_cuda(const Problems&, const FrankWolfe&, void* scratch, cudaStream_t stream);
size_t dual_cone_cuda_scratch(const Problems&);
cudaError_t dual_cone_cuda(const Problems&, const DualCone&, void* scratch, cudaStream_t stream);
size_t simplex_lp_cuda_scratch(const Problems&);
cudaError_t simplex_lp_cuda(const Problems&, const SimplexLp&, void* scratch, cudaStream_t stream);
size_t pcgrad_cuda_scratch(const Problems&);
cudaError_t pcgrad_cuda(const Problems&, const PCGrad&, void* scratch, cudaStream_t stream);
size_t gradvac_cuda_scratch(const Problems&);
cudaError_t gradvac_cuda(const Problems&, const GradVac&, void* scratch, cudaStream_t stream);
size_t cagrad_cuda_scratch(const Problems&);
cudaError_t cagrad_cuda(const Problems&, const CAGrad&, void* scratch, cudaStream_t stream);
size_t fairgrad_cuda_scratch(const Problems&);
cudaError_t fairgrad_cuda(const Problems&, const FairGrad&, void* scratch, cudaStream_t stream);
size_t spectral_cuda_scratch(const Problems&);
cudaError_t spectral_cuda(const Problems&, const Spectral&, void* scratch, cudaStream_t stream);
size_t krum_cuda_scratch(const Problems&);
cudaError_t krum_cuda(const Problems&, const Krum&, void* scratch, cudaStream_t stream);
size_t projected_gradient_cuda_scratch(const Problems&);
cudaError_t projected_gradient_cuda(const Problems&, const ProjectedGradient&, void* scratch, cudaStream_t stream);
size_t random_weights_cuda_scratch(const Problems&);
cudaError_t random_weights_cuda(const Problems&, const RandomWeights&, void* scratch, cudaStream_t stream);

}  // namespace fastmtl
