// What plain CUDA C++ cannot say on both sides: declarations that tests/cuda_on_host/ replaces in order to run the
// kernels on the host. Inline PTX is here and nowhere else.
#pragma once

#ifndef CUDA_ON_HOST
#include <cstdint>

// SHARED(float, tile, [16][20]) declares a static array in shared memory, aligned to 16 bytes.
#define SHARED(type, name, ...) __shared__ __align__(16) type name __VA_ARGS__

// DYNAMIC_SHARED(float, tile) names the memory whose size the launch gives.
#define DYNAMIC_SHARED(type, name)                              \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* const name = reinterpret_cast<type*>(name##_bytes)

// A large kernel parameter that stays in constant memory: no thread gets a copy of it.
#define GRID_CONSTANT(type) const __grid_constant__ type

namespace fastmtl {

// A pointer that has come through shared memory, of which the compiler no longer knows that it points to global memory.
template <class T>
__device__ __forceinline__ const T* in_global_memory(const T* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

// The nearest TF32 number, ties away from zero. The tensor cores themselves cut the low 13 bits off.
__device__ __forceinline__ uint32_t round_to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// sums += a b by a warp, a 16 x k and b k x 8; the PTX ISA says which lane holds which elements. fp32 sums are rounded
// toward zero.
#define FASTMTL_MMA(name, shape_and_types)                                                                 \
  __device__ __forceinline__ void name(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned." shape_and_types                                                       \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                        \
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                      \
  }
FASTMTL_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
FASTMTL_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
FASTMTL_MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32")
#undef FASTMTL_MMA

// The same for a of 8 x 4 and b of 4 x 8 doubles, rounded to nearest.
__device__ __forceinline__ void mma_f64(double& sum0, double& sum1, double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(sum0), "+d"(sum1)
               : "d"(a), "d"(b));
}

}  // namespace fastmtl

#endif
