// Lets a .cu source be compiled by g++ (-x c++ -include cuda_on_host.h) and its kernels run on the host.
//
// A thread of a block is a fiber; blocks run one after another; a barrier or a warp operation is a point where fibers
// wait for each other. What the hardware leaves undefined is reported and aborts: divergent barriers, lanes of a mask
// that have exited or stand at another instruction, shuffles from outside the mask, deadlock, invalid launches.
// Kernels keep to what is here: launches through cudaLaunchKernelEx, shared memory through the macros below, nothing
// from cooperative_groups, no atomics.
#pragma once
#define CUDA_ON_HOST 1
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <utility>

// Shared memory comes from the heap, exactly sized, one block of it per declaration and thread block, filled with 0xff
// (NaN): the address sanitizer sees its bounds and the race checker knows it. ptx.h has the macros' device side.
#define SHARED(type, name, ...)         \
  static char name##_key;               \
  using name##_type = type __VA_ARGS__; \
  name##_type& name = *static_cast<name##_type*>(cuda_on_host::shared(&name##_key, sizeof(name##_type)))
#define DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(cuda_on_host::shared(nullptr, 0))
#define GRID_CONSTANT(type) const type&
#undef __launch_bounds__
#define __launch_bounds__(...)
#define cudaLaunchKernelEx launch_on_host  // the runtime's own erases the types of the arguments
#define NO_TSAN __attribute__((no_sanitize("thread")))

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace cuda_on_host {

// Who runs, for the race checker.
struct Here {
  uint32_t launch, block;
  uint16_t thread, barriers, warp_syncs;  // the last two: passed so far
  bool in_kernel;
  char *stacks, *stacks_end;
};
extern Here here;
bool is_shared(const void* address);

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);
void* shared(const void* key, size_t bytes);  // key null: the dynamic shared memory
void barrier(int line);
int lane();

// Waits until every lane of `mask` has come here; the last one runs complete(lanes, mask), where lanes[l] is the
// `mine` of lane l. Without `complete` it is __syncwarp, the only one that orders memory.
using Complete = void (*)(void* const lanes[32], unsigned mask);
void warp_collective(unsigned mask, void* mine, Complete complete, int line);

// sums += a b by a warp: a 16 x 8 (tf32) or 16 x 16 (bf16, f16), b with 8 columns, the elements where the PTX ISA says.
enum class Factors { tf32, bf16, f16 };
void mma(Factors type, float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line);
// The same for 8 x 4 and 4 x 8 doubles.
void mma(double& sum0, double& sum1, double a, double b, int line);

template <class T>
NO_TSAN T shuffle(unsigned mask, T value, int source, int line) {
  struct Lane {
    T in, out;
    int source;
  } mine{value, value, source};
  auto complete = [](void* const lanes[32], unsigned mask) NO_TSAN {
    for (int l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      auto* to = static_cast<Lane*>(lanes[l]);
      if (!(mask >> to->source & 1)) {
        fail("lane %d shuffles from lane %d, which is not in the mask %08x", l, to->source, mask);
      }
      to->out = static_cast<Lane*>(lanes[to->source])->in;
    }
  };
  warp_collective(mask, &mine, complete, line);
  return mine.out;
}

}  // namespace cuda_on_host

inline void __syncthreads(int line = __builtin_LINE()) { cuda_on_host::barrier(line); }
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  int none = 0;
  cuda_on_host::warp_collective(mask, &none, nullptr, line);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int line = __builtin_LINE()) {
  return cuda_on_host::shuffle(mask, value, source & 31, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int line = __builtin_LINE()) {
  return cuda_on_host::shuffle(mask, value, cuda_on_host::lane() ^ distance, line);
}
NO_TSAN inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  struct Lane {
    int in;
    unsigned out;
  } mine{predicate, 0};
  auto complete = [](void* const lanes[32], unsigned mask) NO_TSAN {
    unsigned ballot = 0;
    for (int l = 0; l < 32; ++l) {
      if (mask >> l & 1 && static_cast<Lane*>(lanes[l])->in) ballot |= 1u << l;
    }
    for (int l = 0; l < 32; ++l) {
      if (mask >> l & 1) static_cast<Lane*>(lanes[l])->out = ballot;
    }
  };
  cuda_on_host::warp_collective(mask, &mine, complete, line);
  return mine.out;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
using std::max;
using std::min;

template <class T>
const T* in_global_memory(const T* pointer) {
  return pointer;
}

// The tensor cores of ptx.h.
NO_TSAN inline uint32_t round_to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}
inline void mma_tf32(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  cuda_on_host::mma(cuda_on_host::Factors::tf32, sums, a, b, line);
}
inline void mma_bf16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  cuda_on_host::mma(cuda_on_host::Factors::bf16, sums, a, b, line);
}
inline void mma_f16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  cuda_on_host::mma(cuda_on_host::Factors::f16, sums, a, b, line);
}
inline void mma_f64(double& sum0, double& sum1, double a, double b, int line = __builtin_LINE()) {
  cuda_on_host::mma(sum0, sum1, a, b, line);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  std::tuple<Parameters...> bound(std::forward<Arguments>(arguments)...);  // converted once, as a real launch does
  return cuda_on_host::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                              [&] { std::apply(kernel, bound); });
}
