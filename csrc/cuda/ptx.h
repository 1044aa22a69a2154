// What plain CUDA C++ cannot say on both sides: declarations that tests/cuda_on_host/ replaces in order to run the
// kernels on the host. Inline PTX belongs here and nowhere else; there is none so far.
#pragma once

#ifndef CUDA_ON_HOST

// SHARED(float, tile, [16][20]) declares a static array in shared memory, aligned to 16 bytes.
#define SHARED(type, name, ...) __shared__ __align__(16) type name __VA_ARGS__

// DYNAMIC_SHARED(float, tile) names the memory whose size the launch gives.
#define DYNAMIC_SHARED(type, name)                              \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* const name = reinterpret_cast<type*>(name##_bytes)

// A large kernel parameter that stays in constant memory: no thread gets a copy of it.
#define GRID_CONSTANT(type) const __grid_constant__ type

#endif
