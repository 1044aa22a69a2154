// GradDrop's inner loop, from rows of E to an output of O. Included by each_target.h once per instruction set, after
// vector.h.
#include "columns.h"

typedef uint64_t VecW __attribute__((vector_size(FASTMTL_VECTOR_BYTES)));

// The product of the lower halves of each lane.
FASTMTL_INLINE VecW multiply_low(VecW x, uint32_t y) {
#if FASTMTL_VECTOR_BYTES == 64
  return (VecW)_mm512_maskz_mul_epu32(0xff, (__m512i)x, _mm512_set1_epi64(y));
#elif FASTMTL_VECTOR_BYTES == 32
  return (VecW)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(y));
#elif defined(__x86_64__)
  return (VecW)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(y));
#else
  return (x & 0xffffffffu) * y;
#endif
}
// Of each pair of lanes the first, or the second, of x and then of y.
FASTMTL_INLINE VecU first_lanes(VecW x, VecW y) {
#if FASTMTL_VECTOR_BYTES == 64
  return (VecU)_mm512_maskz_unpacklo_epi64(0xff, (__m512i)x, (__m512i)y);
#elif FASTMTL_VECTOR_BYTES == 32
  return (VecU)_mm256_unpacklo_epi64((__m256i)x, (__m256i)y);
#else
  return (VecU)(VecW{x[0], y[0]});
#endif
}
FASTMTL_INLINE VecU second_lanes(VecW x, VecW y) {
#if FASTMTL_VECTOR_BYTES == 64
  return (VecU)_mm512_maskz_unpackhi_epi64(0xff, (__m512i)x, (__m512i)y);
#elif FASTMTL_VECTOR_BYTES == 32
  return (VecU)_mm256_unpackhi_epi64((__m256i)x, (__m256i)y);
#else
  return (VecU)(VecW{x[1], y[1]});
#endif
}

// uniform_of() of 23 of a word's bits.
FASTMTL_INLINE void store_uniform(float* to, VecU words) {
  const VecU fraction = (words >> 9) | 0x3f800000u;  // 1 + k / 2^23
  store(to, float_of(fraction) - (1.0f - 0x1p-24f));
}

// uniform[i] belongs to element 4 * block + i of the parameter. One Philox counter in each 64-bit lane: what the
// products leave in the upper halves harms nobody. Writes up to 4 * kDoubles - 4 elements more than it was asked for.
FASTMTL_INLINE void draw_uniform(const Draws& draws, int64_t block, int64_t blocks, float* uniform) {
  constexpr int L = kDoubles;
  constexpr uint64_t kLow = 0xffffffffu;
  VecW lane;  // in the order in which first_lanes and second_lanes put counters one after another
  for (int l = 0; l < L; ++l) lane[l] = uint64_t(l % 2 * (L / 2) + l / 2);
  for (int64_t done = 0; done < blocks; done += L, block += L) {
    uint32_t key0 = draws.key0, key1 = draws.key1;
    VecW x0 = (lane + uint64_t(block)) & kLow, x1 = VecW{} + draws.param;
    VecW x2 = VecW{} + draws.step0, x3 = VecW{} + draws.step1;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const VecW product0 = multiply_low(x0, 0xD2511F53), product1 = multiply_low(x2, 0xCD9E8D57);
      x0 = (product1 >> 32) ^ x1 ^ uint64_t(key0);
      x1 = product1;
      x2 = (product0 >> 32) ^ x3 ^ uint64_t(key1);
      x3 = product0;
      key0 += 0x9E3779B9;
      key1 += 0xBB67AE85;
    }
    const VecW words01 = (x0 & kLow) | (x1 << 32), words23 = (x2 & kLow) | (x3 << 32);
    store_uniform(uniform + 4 * done, first_lanes(words01, words23));
    store_uniform(uniform + 4 * done + kFloats, second_lanes(words01, words23));
  }
}

// Uniform numbers in the arithmetic of E.
FASTMTL_INLINE VecF uniform_as(VecF, const float* p) { return load(p); }
FASTMTL_INLINE VecD uniform_as(VecD, const float* p) {
  typedef float HalfF __attribute__((vector_size(FASTMTL_VECTOR_BYTES / 2)));
  HalfF half;
  std::memcpy(&half, p, sizeof half);
  return __builtin_convertvector(half, VecD);
}

template <class E, class O, bool Leaky>
struct GradDrop {
  static constexpr int kVectors = (kVectorBytes == 64 ? 8 : 4) / (Leaky ? 2 : 1);
  using V = Vec<E>;
  using Number = typename Arithmetic<E>::Type;

  struct Sums {
    V positive, negative;            // of the elements above 0, and of the others and NaN
    V kept_positive, kept_negative;  // the outcome if those are kept

    FASTMTL_INLINE void add(Sums& s, V x, V leak) {
      const V zero = {};
      s.positive += x > zero ? x : zero;
      s.negative += x > zero ? zero : x;
      if (!Leaky) return;
      const V leaked = leak * x;
      s.kept_positive += x > zero ? x : leaked;
      s.kept_negative += x > zero ? leaked : x;
    }
    // total * 0: NaN where the sums are not finite.
    FASTMTL_INLINE V outcome(const Sums& s, V uniform) {
      const V total = s.positive - s.negative, purity = s.positive / total;
      const V up = Leaky ? s.kept_positive : s.positive, down = Leaky ? s.kept_negative : s.negative;
      return (purity > uniform ? up : down) + total * Number(0);
    }
  };

  template <int N, bool Stream>
  FASTMTL_INLINE void block(const GradDropCall& call, int64_t column) {
    constexpr int L = kLanes<E>;
    const auto* weights = static_cast<const Number*>(call.weights);
    const auto* leaks = static_cast<const Number*>(call.leaks);
    O* out = static_cast<O*>(call.out) + column;
    Sums sums[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) sums[i] = Sums{};
    for (int r = 0; r < call.num_rows; ++r) {
      const E* row = static_cast<const E*>(call.rows[r]) + column;
      const V weight = broadcast(weights[r]), leak = Leaky ? broadcast(leaks[r]) : V{};
      if (N > 1) prefetch_ahead<N * L* int(sizeof(E))>(row);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) Sums::add(sums[i], weight * load(row + i * L), leak);
    }
    const float* uniform = call.uniform + column % kDrawn;
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) put<Stream>(out + i * L, Sums::outcome(sums[i], uniform_as(V{}, uniform + i * L)));
  }

  FASTMTL_INLINE void first(const GradDropCall& call, int64_t column, int64_t n) {
    const auto* weights = static_cast<const Number*>(call.weights);
    const auto* leaks = static_cast<const Number*>(call.leaks);
    Sums sums{};
    for (int r = 0; r < call.num_rows; ++r) {
      const V x = load_first(static_cast<const E*>(call.rows[r]) + column, n);
      Sums::add(sums, broadcast(weights[r]) * x, Leaky ? broadcast(leaks[r]) : V{});
    }
    const V uniform = uniform_as(V{}, call.uniform + column % kDrawn);
    store_first(static_cast<O*>(call.out) + column, n, Sums::outcome(sums, uniform));
  }
};

// Stretches of kDrawn columns, for which the random numbers are drawn at once.
template <class E, class O, bool Leaky>
void grad_drop_columns(GradDropCall& call) {
  for (int64_t begin = call.begin; begin < call.end;) {
    const int64_t stretch = begin / kDrawn * kDrawn, end = std::min(stretch + kDrawn, call.end);
    draw_uniform(call.draws, stretch / 4, (end - stretch + 3) / 4, call.uniform);
    walk_columns<GradDrop<E, O, Leaky>, E, O>(call, begin, end);
    begin = end;
  }
  if (call.stream) stream_end();
}

#define FASTMTL_ROW(E, O) {grad_drop_columns<E, O, false>, grad_drop_columns<E, O, true>}
// By type of the rows; for an output of the same type, and for a wider one; without and with leaks.
constexpr GradDropKernel kGradDropKernels[4][2][2] = {{FASTMTL_ROW(float, float), {nullptr, nullptr}},
                                                      {FASTMTL_ROW(double, double), {nullptr, nullptr}},
                                                      {FASTMTL_ROW(BFloat16, BFloat16), FASTMTL_ROW(BFloat16, float)},
                                                      {FASTMTL_ROW(Float16, Float16), FASTMTL_ROW(Float16, float)}};
#undef FASTMTL_ROW
