// The floor: reads n floats once, with vectors as wide as the machine has, and adds them up.
#include <cstdint>

namespace {

typedef float Vector __attribute__((vector_size(64)));
typedef float Loaded __attribute__((vector_size(64), aligned(4), may_alias));

// Eight streams, so that neither the latency of the additions nor that of the memory is what is measured.
__attribute__((always_inline)) inline float sum(const float* data, int64_t n) {
  constexpr int kStreams = 8, kUnroll = 4, kLanes = 16;
  const int64_t length = n / (kStreams * kUnroll * kLanes) * (kUnroll * kLanes);
  Vector sums[kStreams][kUnroll] = {};
  for (int64_t k = 0; k < length; k += kUnroll * kLanes) {
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s) {
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) {
        sums[s][u] += *reinterpret_cast<const Loaded*>(data + s * length + k + u * kLanes);
      }
    }
  }
  Vector total = {};
  for (auto& stream : sums) {
    for (auto& part : stream) total += part;
  }
  float result = 0;
  for (int lane = 0; lane < kLanes; ++lane) result += total[lane];
  for (int64_t k = kStreams * length; k < n; ++k) result += data[k];
  return result;
}

#if defined(__x86_64__)
__attribute__((target("avx512f"))) float sum_avx512(const float* data, int64_t n) { return sum(data, n); }
__attribute__((target("avx2"))) float sum_avx2(const float* data, int64_t n) { return sum(data, n); }
#endif

float sum_range(const float* data, int64_t n) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return sum_avx512(data, n);
  if (__builtin_cpu_supports("avx2")) return sum_avx2(data, n);
#endif
  return sum(data, n);
}

}  // namespace

// OpenMP, as torch uses it: the same pool of threads, so none compete.
extern "C" float read_pass(const float* data, int64_t n, int threads) {
  float total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total)
  for (int t = 0; t < threads; ++t) total += sum_range(data + n / threads * t, n / threads);
  return total;
}
