// Elements of rows: loads of N at once, widening to the type that sums are taken in, casts back.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "../rows.h"

namespace fastmtl {

template <class Element>
struct SumType {
  using type = float;
};
template <>
struct SumType<double> {
  using type = double;
};
template <class Element>
using Sum = typename SumType<Element>::type;

template <class Element>
constexpr int kVector = 16 / sizeof(Element);  // elements in the widest load

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <class Element>
__device__ __forceinline__ Element narrow(Sum<Element> x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}

// N consecutive elements: accesses of 16 bytes (N a multiple of kVector, from an aligned address) or of one element
// (N = 1).
template <class Element, int N>
struct Elements {
  static_assert(N == 1 || N % kVector<Element> == 0, "one element or a multiple of 16 bytes");
  static constexpr int kAccesses = sizeof(Element) * N / 16;
  Element x[N];

  __device__ __forceinline__ static Elements load(const Element* from) {
    Elements e;
    if constexpr (N == 1) {
      e.x[0] = *from;
    } else {
#pragma unroll
      for (int i = 0; i < kAccesses; ++i) {
        const uint4 bits = reinterpret_cast<const uint4*>(from)[i];
        memcpy(static_cast<void*>(e.x + i * kVector<Element>), &bits, sizeof(bits));
      }
    }
    return e;
  }
  __device__ __forceinline__ void store(Element* to) const {
    if constexpr (N == 1) {
      *to = x[0];
    } else {
#pragma unroll
      for (int i = 0; i < kAccesses; ++i) {
        uint4 bits;
        memcpy(&bits, x + i * kVector<Element>, sizeof(bits));
        reinterpret_cast<uint4*>(to)[i] = bits;
      }
    }
  }
  __device__ __forceinline__ static Elements zero() {
    Elements e;
    memset(static_cast<void*>(e.x), 0, sizeof(e.x));
    return e;
  }
};

// Calls f with a value of the element type that `type` names.
template <class F>
auto with_element(Scalar type, F f) {
  switch (type) {
    case Scalar::f32:
      return f(float());
    case Scalar::f64:
      return f(double());
    case Scalar::bf16:
      return f(__nv_bfloat16());
    default:
      return f(__half());
  }
}
constexpr Scalar kScalars[] = {Scalar::f32, Scalar::f64, Scalar::bf16, Scalar::f16};

}  // namespace fastmtl
