// The weighted sum's inner loop, from rows of E to an output of O. Included by each_target.h once per instruction set,
// after vector.h.
#include "columns.h"

template <class E, class O>
struct Combine {
  static constexpr int kVectors = kVectorBytes == 64 ? 16 : 8;  // half of the registers

  // All rows pass through the same N accumulators.
  template <int N, bool Stream>
  FASTMTL_INLINE void block(const CombineCall& call, int64_t column) {
    constexpr int L = kLanes<E>;
    const auto* weights = static_cast<const typename Arithmetic<E>::Type*>(call.weights);
    O* out = static_cast<O*>(call.out) + column;
    Vec<E> acc[N];
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) acc[i] = Vec<E>{};
    for (int r = 0; r < call.num_rows; ++r) {
      const E* row = static_cast<const E*>(call.rows[r]) + column;
      const Vec<E> weight = broadcast(weights[r]);
      if (N > 1) prefetch_ahead<N * L* int(sizeof(E))>(row);
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) acc[i] += weight * load(row + i * L);
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      put<Stream>(out + i * L, !Stream && call.accumulate ? load(out + i * L) + acc[i] : acc[i]);
    }
  }

  FASTMTL_INLINE void first(const CombineCall& call, int64_t column, int64_t n) {
    const auto* weights = static_cast<const typename Arithmetic<E>::Type*>(call.weights);
    O* out = static_cast<O*>(call.out) + column;
    Vec<E> acc = {};
    for (int r = 0; r < call.num_rows; ++r) {
      acc += broadcast(weights[r]) * load_first(static_cast<const E*>(call.rows[r]) + column, n);
    }
    store_first(out, n, call.accumulate ? load_first(out, n) + acc : acc);
  }
};

template <class E, class O = E>
void combine_columns(const CombineCall& call) {
  walk_columns<Combine<E, O>, E, O>(call, call.begin, call.end);
  if (call.stream) stream_end();
}

// By type of the rows; for an output of the same type, and for a wider one.
constexpr CombineKernel kCombineKernels[4][2] = {{combine_columns<float>, nullptr},
                                                 {combine_columns<double>, nullptr},
                                                 {combine_columns<BFloat16>, combine_columns<BFloat16, float>},
                                                 {combine_columns<Float16>, combine_columns<Float16, float>}};
