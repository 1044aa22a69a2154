// The CPU backend: Gramian and combine over rows that lie in host memory.
#pragma once
#include "../rows.h"

namespace fastmtl {

// gramian[k][a][b] = sum over the parameters of group k of <row a, row b>, for all a, b (both triangles); [K,T,T],
// overwritten. A missing row counts as zeros. Bitwise the same for any number of threads.
void gram_cpu(const Rows& rows, double* gramian);

// out[p][x] = (accumulate ? out[p][x] : 0) + sum_t weights[group(p)][t] * rows[p][t][x]; weights [K,T].
// A row of weight 0 is not read (0 * inf is 0 here); a NaN weight gives NaN.
void combine_cpu(const Rows& rows, const double* weights, const Output* out, bool accumulate);

// GradDrop (grad_drop.cpp); rng: seed and step; leak: [T], or null for zeros. Bitwise the same for any number of
// threads.
void grad_drop_cpu(const Rows& rows, const double* weights, const int64_t* rng, const double* leak, const Output* out);

// The mean without the `trim` largest and the `trim` smallest values of each element (trimmed_mean.cpp).
void trimmed_mean_cpu(const Rows& rows, const double* weights, int64_t trim, const Output* out);

const char* cpu_capability();               // "avx512" | "avx2" | "portable": what the kernels above use
bool set_cpu_capability(const char* name);  // for tests and benchmarks; false where this CPU lacks it

}  // namespace fastmtl
