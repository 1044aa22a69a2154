// The teams of solvers/team.h on the device: a warp, or a block. Sums are taken in a fixed order. Shuffles and ballots
// do not order memory, so each operation of a warp begins with __syncwarp().
#pragma once
#include <cstdint>

#include "../solvers/team.h"

namespace fastmtl {

struct WarpTeam {
  __device__ static int rank() { return threadIdx.x % 32; }
  __device__ static constexpr int size() { return 32; }
  __device__ static constexpr int lanes() { return 32; }
  __device__ void sync() const { __syncwarp(); }

  __device__ double sum(double x) const {
    __syncwarp();
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
  }
  __device__ double max(double x) const {
    __syncwarp();
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      const double other = __shfl_xor_sync(~0u, x, distance);
      x = x < other ? other : x;
    }
    return x;
  }
  __device__ int argmax(double value, int index) const {
    __syncwarp();
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      const double other_value = __shfl_xor_sync(~0u, value, distance);
      const int other_index = __shfl_xor_sync(~0u, index, distance);
      if (other_value > value || (other_value == value && other_index < index)) {
        value = other_value;
        index = other_index;
      }
    }
    return index;
  }
  __device__ int first(bool hit) const {
    __syncwarp();
    const unsigned hits = __ballot_sync(~0u, hit);
    return hits == 0 ? 32 : __ffs(static_cast<int>(hits)) - 1;
  }
};

// kThreads threads: all of the block.
template <int kThreads>
class BlockTeam {
 public:
  static constexpr int kWarps = kThreads / 32;
  struct Memory {  // shared
    double values[kWarps];
    int indices[kWarps];
  };

  __device__ explicit BlockTeam(Memory* memory) : memory_(memory) {}
  __device__ static int rank() { return threadIdx.x; }
  __device__ static constexpr int size() { return kThreads; }
  __device__ static constexpr int lanes() { return 32; }
  __device__ void sync() const { __syncthreads(); }

  __device__ double sum(double x) const {
    exchange(warp_.sum(x), 0);
    double total = 0;
    for (int w = 0; w < kWarps; ++w) total += memory_->values[w];
    return total;
  }
  __device__ double max(double x) const {
    exchange(warp_.max(x), 0);
    double largest = memory_->values[0];
    for (int w = 1; w < kWarps; ++w) largest = largest < memory_->values[w] ? memory_->values[w] : largest;
    return largest;
  }
  __device__ int argmax(double value, int index) const {
    exchange(warp_.max(value), warp_.argmax(value, index));
    int best = 0;
    for (int w = 1; w < kWarps; ++w) {
      const bool tie = memory_->values[w] == memory_->values[best] && memory_->indices[w] < memory_->indices[best];
      if (memory_->values[w] > memory_->values[best] || tie) best = w;
    }
    return memory_->indices[best];
  }
  __device__ int first(bool hit) const {
    exchange(0, warp_.first(hit));
    for (int w = 0; w < kWarps; ++w) {
      if (memory_->indices[w] < 32) return 32 * w + memory_->indices[w];
    }
    return kThreads;
  }

 private:
  // Every warp's value and index to all threads.
  __device__ void exchange(double value, int index) const {
    __syncthreads();  // all have read what the previous operation left
    if (threadIdx.x % 32 == 0) {
      memory_->values[threadIdx.x / 32] = value;
      memory_->indices[threadIdx.x / 32] = index;
    }
    __syncthreads();
  }

  WarpTeam warp_;
  Memory* memory_;
};

}  // namespace fastmtl
