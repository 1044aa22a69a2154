// Vectors of FASTMTL_VECTOR_BYTES bytes, written with the vector extensions of GCC and clang. Included by each_target.h
// once per instruction set, inside its namespace: no include guard, no #include.

#define FASTMTL_INLINE static inline __attribute__((always_inline))

constexpr int kVectorBytes = FASTMTL_VECTOR_BYTES;
constexpr int kFloats = kVectorBytes / 4;
constexpr int kDoubles = kVectorBytes / 8;

typedef float VecF __attribute__((vector_size(FASTMTL_VECTOR_BYTES)));
typedef double VecD __attribute__((vector_size(FASTMTL_VECTOR_BYTES)));
typedef double WideD __attribute__((vector_size(2 * FASTMTL_VECTOR_BYTES)));  // as many lanes as VecF
typedef uint32_t VecU __attribute__((vector_size(FASTMTL_VECTOR_BYTES)));
typedef uint16_t HalfU __attribute__((vector_size(FASTMTL_VECTOR_BYTES / 2)));  // as many lanes as VecF
// The same in memory: aligned as their elements only.
typedef float VecFMem __attribute__((vector_size(FASTMTL_VECTOR_BYTES), aligned(4), may_alias));
typedef double VecDMem __attribute__((vector_size(FASTMTL_VECTOR_BYTES), aligned(8), may_alias));
typedef double WideDMem __attribute__((vector_size(2 * FASTMTL_VECTOR_BYTES), aligned(8), may_alias));
typedef uint16_t HalfUMem __attribute__((vector_size(FASTMTL_VECTOR_BYTES / 2), aligned(2), may_alias));

// The vector in which elements of type E are computed, and its number of lanes.
template <class A>
struct VectorOf {
  typedef VecF Type;
};
template <>
struct VectorOf<double> {
  typedef VecD Type;
};
template <class E>
using Vec = typename VectorOf<typename Arithmetic<E>::Type>::Type;
template <class E>
constexpr int kLanes = kVectorBytes / int(sizeof(typename Arithmetic<E>::Type));

FASTMTL_INLINE VecF broadcast(float x) { return VecF{} + x; }
FASTMTL_INLINE VecD broadcast(double x) { return VecD{} + x; }
FASTMTL_INLINE VecU bits_of(VecF x) { return (VecU)x; }
FASTMTL_INLINE VecF float_of(VecU x) { return (VecF)x; }

// ---- 16-bit lanes <-> 32-bit lanes, binary16 <-> float ----
// By intrinsics: GCC 12 makes four instructions of __builtin_convertvector here. AVX-512 with a full mask: GCC 12 warns
// of an uninitialized variable inside the forms without one.
#if FASTMTL_VECTOR_BYTES == 64
FASTMTL_INLINE VecU extend(HalfU h) { return (VecU)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h); }
FASTMTL_INLINE HalfU truncate(VecU u) { return (HalfU)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)u); }
FASTMTL_INLINE VecF widen_half(HalfU h) { return (VecF)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h); }
FASTMTL_INLINE HalfU narrow_half(VecF x) {
  return (HalfU)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
}
#elif FASTMTL_VECTOR_BYTES == 32
FASTMTL_INLINE VecU extend(HalfU h) { return (VecU)_mm256_cvtepu16_epi32((__m128i)h); }
FASTMTL_INLINE HalfU truncate(VecU u) {  // of lanes below 2^16
  const __m256i packed = _mm256_packus_epi32((__m256i)u, (__m256i)u);
  return (HalfU)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
FASTMTL_INLINE VecF widen_half(HalfU h) { return (VecF)_mm256_cvtph_ps((__m128i)h); }
FASTMTL_INLINE HalfU narrow_half(VecF x) { return (HalfU)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#else
FASTMTL_INLINE VecU extend(HalfU h) { return __builtin_convertvector(h, VecU); }
FASTMTL_INLINE HalfU truncate(VecU u) { return __builtin_convertvector(u, HalfU); }
FASTMTL_INLINE VecF widen_half(HalfU h) {
  const VecU u = extend(h);
  const VecU sign = (u & 0x8000u) << 16, magnitude = (u & 0x7fffu) << 13;
  const VecU normal = magnitude + (112u << 23);                              // move the exponent's bias
  const VecU infinite = magnitude + (224u << 23);                            // to the exponent 255
  const VecU tiny = bits_of(float_of(magnitude + (113u << 23)) - 0x1p-14f);  // subnormal: 2^-14 * (1.m - 1)
  const VecU finite = magnitude < (31u << 23) ? normal : infinite;
  return float_of(sign | (magnitude < (1u << 23) ? tiny : finite));
}
FASTMTL_INLINE HalfU narrow_half(VecF x) {
  const VecU u = bits_of(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  const VecU normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;  // nearest, ties to even
  const VecU tiny = bits_of(float_of(magnitude) + 0.5f) - (126u << 23);  // the adder rounds: ulp(0.5) is 2^-24
  const VecU zero = {};
  const VecU large = magnitude > (255u << 23) ? zero + 0x7e00u : zero + 0x7c00u;  // NaN : infinity
  const VecU small = magnitude < (113u << 23) ? tiny : normal;
  return truncate(sign | (magnitude < (143u << 23) ? small : large));
}
#endif

// ---- bfloat16 <-> float ----
FASTMTL_INLINE VecF widen_bfloat(HalfU h) { return float_of(extend(h) << 16); }
FASTMTL_INLINE HalfU narrow_bfloat(VecF x) {
  const VecU u = bits_of(x);
  const VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // nearest, ties to even; overflows to infinity
  const VecU quiet_nan = (u >> 16) | 0x40u;
  return truncate(x == x ? rounded : quiet_nan);
}

// ---- load and store: any element type, any alignment ----
FASTMTL_INLINE VecF load(const float* p) { return *reinterpret_cast<const VecFMem*>(p); }
FASTMTL_INLINE VecD load(const double* p) { return *reinterpret_cast<const VecDMem*>(p); }
FASTMTL_INLINE VecF load(const BFloat16* p) { return widen_bfloat(*reinterpret_cast<const HalfUMem*>(p)); }
FASTMTL_INLINE VecF load(const Float16* p) { return widen_half(*reinterpret_cast<const HalfUMem*>(p)); }

FASTMTL_INLINE void store(float* p, VecF x) { *reinterpret_cast<VecFMem*>(p) = x; }
FASTMTL_INLINE void store(double* p, VecD x) { *reinterpret_cast<VecDMem*>(p) = x; }
FASTMTL_INLINE void store(BFloat16* p, VecF x) { *reinterpret_cast<HalfUMem*>(p) = narrow_bfloat(x); }
FASTMTL_INLINE void store(Float16* p, VecF x) { *reinterpret_cast<HalfUMem*>(p) = narrow_half(x); }

// The first n < lanes elements; the other lanes are zero, and their memory is not touched.
template <class E>
FASTMTL_INLINE Vec<E> load_first(const E* p, int64_t n) {
  E buffer[kLanes<E>] = {};
  std::memcpy(buffer, p, n * sizeof(E));
  return load(buffer);
}
template <class E>
FASTMTL_INLINE void store_first(E* p, int64_t n, Vec<E> x) {
  E buffer[kLanes<E>];
  store(buffer, x);
  std::memcpy(p, buffer, n * sizeof(E));
}

// Short visits to each of many rows defeat the hardware's prefetcher: ask for what comes so far behind. Reaching beyond
// the row's end does no harm.
constexpr int kPrefetchBytes = 1024;
template <int Bytes>
FASTMTL_INLINE void prefetch_ahead(const void* p) {
  const char* ahead = static_cast<const char*>(p) + kPrefetchBytes;
#pragma GCC unroll 16
  for (int line = 0; line < Bytes; line += 64) __builtin_prefetch(ahead + line);
}

// Stores past the caches, for p aligned to the stored bytes. To be followed by stream_end() in the same thread.
#if FASTMTL_VECTOR_BYTES == 64
FASTMTL_INLINE void stream(float* p, VecF x) { _mm512_stream_ps(p, (__m512)x); }
FASTMTL_INLINE void stream(double* p, VecD x) { _mm512_stream_pd(p, (__m512d)x); }
FASTMTL_INLINE void stream_half(void* p, HalfU x) { _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)x); }
#elif FASTMTL_VECTOR_BYTES == 32
FASTMTL_INLINE void stream(float* p, VecF x) { _mm256_stream_ps(p, (__m256)x); }
FASTMTL_INLINE void stream(double* p, VecD x) { _mm256_stream_pd(p, (__m256d)x); }
FASTMTL_INLINE void stream_half(void* p, HalfU x) { _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)x); }
#elif defined(__x86_64__)
FASTMTL_INLINE void stream(float* p, VecF x) { _mm_stream_ps(p, (__m128)x); }
FASTMTL_INLINE void stream(double* p, VecD x) { _mm_stream_pd(p, (__m128d)x); }
FASTMTL_INLINE void stream_half(void* p, HalfU x) {
  long long bits;
  std::memcpy(&bits, &x, sizeof bits);
  _mm_stream_si64(static_cast<long long*>(p), bits);
}
#else
FASTMTL_INLINE void stream(float* p, VecF x) { store(p, x); }
FASTMTL_INLINE void stream(double* p, VecD x) { store(p, x); }
FASTMTL_INLINE void stream_half(void* p, HalfU x) { *static_cast<HalfUMem*>(p) = x; }
#endif
FASTMTL_INLINE void stream(BFloat16* p, VecF x) { stream_half(p, narrow_bfloat(x)); }
FASTMTL_INLINE void stream(Float16* p, VecF x) { stream_half(p, narrow_half(x)); }
FASTMTL_INLINE void stream_end() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}
