// The weighted sum's inner loop, from rows of E to an output of O. Included by each_target.h once per instruction set,
// after vector.h.

FASTMTL_INLINE VecF broadcast(float x) { return VecF{} + x; }
FASTMTL_INLINE VecD broadcast(double x) { return VecD{} + x; }

// So short visits to each row defeat the hardware's prefetcher. Reaching beyond the row's end does no harm.
constexpr int kPrefetchBytes = 1024;

// One block of N vectors: all rows pass through the same N accumulators.
template <class E, class O, int N, bool Stream>
FASTMTL_INLINE void combine_block(const CombineCall& call, int64_t column) {
  constexpr int L = kLanes<E>;
  const auto* weights = static_cast<const typename Arithmetic<E>::Type*>(call.weights);
  O* out = static_cast<O*>(call.out) + column;
  Vec<E> acc[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) acc[i] = Vec<E>{};
  for (int r = 0; r < call.num_rows; ++r) {
    const E* row = static_cast<const E*>(call.rows[r]) + column;
    const Vec<E> weight = broadcast(weights[r]);
    const char* ahead = reinterpret_cast<const char*>(row) + kPrefetchBytes;
#pragma GCC unroll 16
    for (int line = 0; N > 1 && line < N * L * int(sizeof(E)); line += 64) __builtin_prefetch(ahead + line);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) acc[i] += weight * load(row + i * L);
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) {
    if (Stream) {
      stream(out + i * L, acc[i]);
    } else {
      store(out + i * L, call.accumulate ? load(out + i * L) + acc[i] : acc[i]);
    }
  }
}

// The same for fewer columns than a vector has.
template <class E, class O>
FASTMTL_INLINE void combine_first(const CombineCall& call, int64_t column, int64_t n) {
  const auto* weights = static_cast<const typename Arithmetic<E>::Type*>(call.weights);
  O* out = static_cast<O*>(call.out) + column;
  Vec<E> acc = {};
  for (int r = 0; r < call.num_rows; ++r) {
    acc += broadcast(weights[r]) * load_first(static_cast<const E*>(call.rows[r]) + column, n);
  }
  store_first(out, n, call.accumulate ? load_first(out, n) + acc : acc);
}

// Any number of columns, vector by vector.
template <class E, class O>
FASTMTL_INLINE void combine_few(const CombineCall& call, int64_t begin, int64_t end) {
  int64_t column = begin;
  for (; column + kLanes<E> <= end; column += kLanes<E>) combine_block<E, O, 1, false>(call, column);
  if (column < end) combine_first<E, O>(call, column, end - column);
}

template <class E, class O = E>
void combine_columns(const CombineCall& call) {
  constexpr int kVectors = kVectorBytes == 64 ? 16 : 8;  // half of the registers
  constexpr int64_t kBlock = kVectors * kLanes<E>;
  int64_t column = call.begin;
  if (call.stream) {
    const auto address = reinterpret_cast<uintptr_t>(static_cast<O*>(call.out) + column);
    const int64_t aligned = column + int64_t((64 - address % 64) % 64 / sizeof(O));
    if (aligned + kBlock <= call.end) {
      combine_few<E, O>(call, column, aligned);
      for (column = aligned; column + kBlock <= call.end; column += kBlock) {
        combine_block<E, O, kVectors, true>(call, column);
      }
      stream_end();
    }
  }
  for (; column + kBlock <= call.end; column += kBlock) combine_block<E, O, kVectors, false>(call, column);
  combine_few<E, O>(call, column, call.end);
}

// By type of the rows; for an output of the same type, and for a wider one.
constexpr CombineKernel kCombineKernels[4][2] = {{combine_columns<float>, nullptr},
                                                 {combine_columns<double>, nullptr},
                                                 {combine_columns<BFloat16>, combine_columns<BFloat16, float>},
                                                 {combine_columns<Float16>, combine_columns<Float16, float>}};
