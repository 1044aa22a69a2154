// The floors. read_pass: reads n floats once, with vectors as wide as the machine has, and adds them up. Each thread
// reads its part from front to back (one stream), or from several places at once, which asks more of the memory.
// multiply_adds: fused multiply-adds on registers alone.
#include <cstdint>

namespace {

typedef float Vector __attribute__((vector_size(64)));
typedef float Loaded __attribute__((vector_size(64), aligned(4), may_alias));

template <int kStreams>
__attribute__((always_inline)) inline float sum(const float* data, int64_t n) {
  constexpr int kUnroll = 4, kLanes = 16;  // sums per stream: their latency must not be what is measured
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
template <int kStreams>
__attribute__((target("avx512f"))) float sum_avx512(const float* data, int64_t n) {
  return sum<kStreams>(data, n);
}
template <int kStreams>
__attribute__((target("avx2"))) float sum_avx2(const float* data, int64_t n) {
  return sum<kStreams>(data, n);
}
#endif

template <int kStreams>
float sum_range(const float* data, int64_t n) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return sum_avx512<kStreams>(data, n);
  if (__builtin_cpu_supports("avx2")) return sum_avx2<kStreams>(data, n);
#endif
  return sum<kStreams>(data, n);
}

#if defined(__x86_64__)
// 12 chains hide the latency of two units; the empty asm keeps each chain in its register.
#define MULTIPLY_ADDS(bytes, isa)                                             \
  __attribute__((target(isa))) float multiply_adds_##bytes(int64_t n) {       \
    typedef float V __attribute__((vector_size(bytes)));                      \
    V acc[12] = {}, a = V{} + 0.5f, b = V{} + 1.0f;                           \
    asm volatile("" : "+v"(a), "+v"(b));                                      \
    for (int64_t i = 0; i < n; i += 12 * bytes / 4) {                         \
      _Pragma("GCC unroll 12") for (int c = 0; c < 12; ++c) {                 \
        acc[c] = acc[c] * a + b;                                              \
        asm volatile("" : "+v"(acc[c]));                                      \
      }                                                                       \
    }                                                                         \
    float total = 0;                                                          \
    _Pragma("GCC unroll 12") for (int c = 0; c < 12; ++c) total += acc[c][0]; \
    return total;                                                             \
  }
MULTIPLY_ADDS(64, "avx512f")
MULTIPLY_ADDS(32, "avx2,fma")
#endif

}  // namespace

// OpenMP, as torch uses it: the same pool of threads, so none compete.
extern "C" float read_pass(const float* data, int64_t n, int threads, int streams) {
  const auto range = streams == 1 ? sum_range<1> : sum_range<8>;
  float total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total)
  for (int t = 0; t < threads; ++t) total += range(data + n / threads * t, n / threads);
  return total;
}

#if defined(__x86_64__)
// About n multiply-adds of floats in all, with vectors of 64 (AVX-512) or 32 bytes (AVX2).
extern "C" float multiply_adds(int64_t n, int threads, int bytes) {
  const auto work = bytes == 64 ? multiply_adds_64 : multiply_adds_32;
  float total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total)
  for (int t = 0; t < threads; ++t) total += work(n / threads);
  return total;
}
#endif
