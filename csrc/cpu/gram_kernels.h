// The Gramian's inner loops. Included by each_target.h once per instruction set, after vector.h.
//
// tile: R x C dot products over n columns (a few hundred that lie in L1 or L2), one vector accumulator in a register
// for each. At the end the accumulators' lanes are summed, many at a time, and added to fp64 sums in memory; so a lane
// never adds more than n / lanes terms in fp32.
//
// While it computes, a tile prefetches: spread evenly like this, requests to memory neither pause nor pile up before
// what the tile itself loads.

// Sums of neighbouring lanes: a0+a1, a2+a3, .., b0+b1, ..
template <class V, int... I>
FASTMTL_INLINE V add_neighbours(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, 2 * I...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
}

FASTMTL_INLINE void add_to(double* out, VecF x) {
  *reinterpret_cast<WideDMem*>(out) += __builtin_convertvector(x, WideD);
}
FASTMTL_INLINE void add_to(double* out, VecD x) { *reinterpret_cast<VecDMem*>(out) += x; }

// out[i] += sum of the lanes of acc[i], i < N. `out` has room for N rounded up to whole vectors.
template <class A, int N>
FASTMTL_INLINE void add_lane_sums(const Vec<A>* acc, double* out) {
  constexpr int L = kLanes<A>;
#pragma GCC unroll 16
  for (int base = 0; base < N; base += L) {
    Vec<A> v[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) v[i] = base + i < N ? acc[base + i] : Vec<A>{};
    int live = N - base < L ? N - base : L;  // v[live..] are zero
#pragma GCC unroll 16
    for (int pairs = L / 2; pairs > 0; pairs /= 2) {
#pragma GCC unroll 16
      for (int i = 0; i < pairs; ++i) {
        v[i] = 2 * i < live ? add_neighbours(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, L>()) : Vec<A>{};
      }
      live = (live + 1) / 2;
    }
    add_to(out + base, v[0]);
  }
}

// Prefetches the elements that go with one vector of the tile.
template <class E>
FASTMTL_INLINE void fetch(Ahead& ahead) {
  for (const char*& place : ahead.place) {
    __builtin_prefetch(place);
    place += kLanes<E> * ahead.element;
  }
}

// out[r * C + c] += sum_k a[r][k] * b[c][k] over k < n, where n is a multiple of the lanes.
template <class E, int R, int C>
void tile(const void* const* a, const void* const* b, int64_t n, Ahead ahead, double* out) {
  Vec<E> acc[R * C];
  const E* x[R];
  const E* y[C];
#pragma GCC unroll 64
  for (int q = 0; q < R * C; ++q) acc[q] = Vec<E>{};
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) x[r] = static_cast<const E*>(a[r]);
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c) y[c] = static_cast<const E*>(b[c]);
  for (int64_t k = 0; k < n; k += kLanes<E>) {
    if (ahead.element) fetch<E>(ahead);
    Vec<E> column[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) column[c] = load(y[c] + k);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<E> row = load(x[r] + k);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) acc[r * C + c] += row * column[c];
    }
  }
  add_lane_sums<typename Arithmetic<E>::Type, R * C>(acc, out);
}

// The same for b = a: the lower triangle only, packed by rows.
template <class E, int R>
void triangle(const void* const* a, int64_t n, Ahead ahead, double* out) {
  Vec<E> acc[R * (R + 1) / 2];
  const E* x[R];
#pragma GCC unroll 64
  for (int q = 0; q < R * (R + 1) / 2; ++q) acc[q] = Vec<E>{};
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) x[r] = static_cast<const E*>(a[r]);
  for (int64_t k = 0; k < n; k += kLanes<E>) {
    if (ahead.element) fetch<E>(ahead);
    Vec<E> row[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      row[r] = load(x[r] + k);
#pragma GCC unroll 16
      for (int c = 0; c <= r; ++c) acc[r * (r + 1) / 2 + c] += row[r] * row[c];
    }
  }
  add_lane_sums<typename Arithmetic<E>::Type, R*(R + 1) / 2>(acc, out);
}

// Copies n elements into fp32 (fp64 for double). Writes whole vectors: `to` has room for n rounded up to them.
template <class E>
void widen(const void* from, int64_t n, void* to) {
  const E* source = static_cast<const E*>(from);
  auto* target = static_cast<typename Arithmetic<E>::Type*>(to);
  int64_t k = 0;
  for (; k + kLanes<E> <= n; k += kLanes<E>) store(target + k, load(source + k));
  if (k < n) store(target + k, load_first(source + k, n - k));
}

// The largest squares of accumulators whose operands still fit into the registers.
constexpr int kBlock = kVectorBytes == 64 ? 5 : 3;       // 25 + 5 + 1 of 32; 9 + 3 + 1 of 16
constexpr int kSmallBlock = kVectorBytes == 64 ? 4 : 3;  // 8 and 16 rows without a remainder

template <class E, int B, int... I>
constexpr TileSet tile_set(std::integer_sequence<int, I...>) {
  return {B, (B * B + kFloats - 1) / kFloats * kFloats, {tile<E, I + 1, B>...}, {triangle<E, I + 1>...}};
}
template <class E, int B>
constexpr TileSet tile_set() {
  return tile_set<E, B>(std::make_integer_sequence<int, B>());
}

// constexpr: an initializer that runs would run on every CPU.
constexpr GramKernels kGramKernels = {kFloats,
                                      {tile_set<float, kSmallBlock>(), tile_set<double, kSmallBlock>(),
                                       tile_set<BFloat16, kSmallBlock>(), tile_set<Float16, kSmallBlock>()},
                                      {tile_set<float, kBlock>(), tile_set<double, kBlock>()},
                                      {widen<float>, widen<double>, widen<BFloat16>, widen<Float16>}};
