// The trimmed mean's inner loops, from rows of E to an output of O. Included by each_target.h once per instruction set,
// after vector.h.
#include "columns.h"

template <class V>
FASTMTL_INLINE void sort_pair(V& low, V& high) {
  const V a = low, b = high;
  low = a < b ? a : b;
  high = a < b ? b : a;
}

// The K largest values so far in registers, the K smallest of the rest, and the sum of all others: a value that comes
// pushes the least of the largest out, which pushes the greatest of the smallest out, which is added to the sum. With
// fewer than K to be trimmed, the other places are held by infinities for good.
template <class E, class O, int K>
struct TrimmedMean {
  static constexpr int kVectors = kVectorBytes == 64 ? (K <= 2 ? 4 : 2) : (K <= 2 ? 2 : 1);
  using V = Vec<E>;
  using Number = typename Arithmetic<E>::Type;

  struct State {
    V largest[K], smallest[K];  // from the greatest down; from the least up
    V sum, nan;

    FASTMTL_INLINE State start(int trim) {
      const Number inf = std::numeric_limits<Number>::infinity();
      State s;
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        s.largest[k] = broadcast(k < K - trim ? inf : -inf);
        s.smallest[k] = broadcast(k < K - trim ? -inf : inf);
      }
      s.sum = s.nan = V{};
      return s;
    }
    // What the first values push out of the places that are still to be filled is no value.
    FASTMTL_INLINE void add(State& s, V x, bool fills_largest, bool fills_smallest) {
      s.nan = x == x ? s.nan : x;
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) sort_pair(x, s.largest[k]);
      if (fills_largest) return;
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) sort_pair(s.smallest[k], x);
      if (fills_smallest) return;
      s.sum += x;
    }
    FASTMTL_INLINE V mean(const State& s, Number num_left) { return s.sum / num_left + s.nan; }
  };

  template <int N, bool Stream>
  FASTMTL_INLINE void block(const TrimmedMeanCall& call, int64_t column) {
    constexpr int L = kLanes<E>;
    const auto* weights = static_cast<const Number*>(call.weights);
    O* out = static_cast<O*>(call.out) + column;
    State state[N];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) state[i] = State::start(call.trim);
    for (int r = 0; r < call.num_rows; ++r) {
      const E* row = static_cast<const E*>(call.rows[r]) + column;
      const V weight = broadcast(weights[r]);
      if (N > 1) prefetch_ahead<N * L* int(sizeof(E))>(row);
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) {
        State::add(state[i], weight * load(row + i * L), r < call.trim, r < 2 * call.trim);
      }
    }
    const auto num_left = Number(std::max(call.num_rows - 2 * call.trim, 1));
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) put<Stream>(out + i * L, State::mean(state[i], num_left));
  }

  FASTMTL_INLINE void first(const TrimmedMeanCall& call, int64_t column, int64_t n) {
    const auto* weights = static_cast<const Number*>(call.weights);
    State state = State::start(call.trim);
    for (int r = 0; r < call.num_rows; ++r) {
      const V x = broadcast(weights[r]) * load_first(static_cast<const E*>(call.rows[r]) + column, n);
      State::add(state, x, r < call.trim, r < 2 * call.trim);
    }
    const auto num_left = Number(std::max(call.num_rows - 2 * call.trim, 1));
    store_first(static_cast<O*>(call.out) + column, n, State::mean(state, num_left));
  }
};

// Any number to be trimmed: all values of a vector of columns are sorted, in scratch memory, by Batcher's odd-even
// merge sort.
template <class E, class O>
struct SortedMean {
  static constexpr int kVectors = 1;
  using V = Vec<E>;
  using Number = typename Arithmetic<E>::Type;

  FASTMTL_INLINE void sort(Number* values, int n) {
    constexpr int L = kLanes<E>;
    for (int p = 1; p < n; p *= 2) {
      for (int k = p; k >= 1; k /= 2) {
        for (int j = k % p; j + k < n; j += 2 * k) {
          for (int i = j; i < std::min(j + k, n - k); ++i) {
            if (i / (2 * p) != (i + k) / (2 * p)) continue;
            V low = load(values + i * L), high = load(values + (i + k) * L);
            sort_pair(low, high);
            store(values + i * L, low);
            store(values + (i + k) * L, high);
          }
        }
      }
    }
  }
  FASTMTL_INLINE V mean(const TrimmedMeanCall& call, V nan) {
    constexpr int L = kLanes<E>;
    Number* values = static_cast<Number*>(call.values);
    sort(values, call.num_rows);
    V sum = {};
    for (int r = call.trim; r < call.num_rows - call.trim; ++r) sum += load(values + r * L);
    return sum / Number(call.num_rows - 2 * call.trim) + nan;
  }
  // Row r's columns, into scratch memory.
  FASTMTL_INLINE void take(const TrimmedMeanCall& call, int r, V x, V& nan) {
    x *= broadcast(static_cast<const Number*>(call.weights)[r]);
    nan = x == x ? nan : x;
    store(static_cast<Number*>(call.values) + r * kLanes<E>, x);
  }

  template <int N, bool Stream>
  FASTMTL_INLINE void block(const TrimmedMeanCall& call, int64_t column) {
    static_assert(N == 1, "one vector at a time");
    V nan = {};
    for (int r = 0; r < call.num_rows; ++r) {
      const E* row = static_cast<const E*>(call.rows[r]) + column;
      prefetch_ahead<64>(row);
      take(call, r, load(row), nan);
    }
    put<Stream>(static_cast<O*>(call.out) + column, mean(call, nan));
  }
  FASTMTL_INLINE void first(const TrimmedMeanCall& call, int64_t column, int64_t n) {
    V nan = {};
    for (int r = 0; r < call.num_rows; ++r) {
      take(call, r, load_first(static_cast<const E*>(call.rows[r]) + column, n), nan);
    }
    store_first(static_cast<O*>(call.out) + column, n, mean(call, nan));
  }
};

template <class E, class O = E>
void trimmed_mean_columns(const TrimmedMeanCall& call) {
  if (call.trim <= 1) {
    walk_columns<TrimmedMean<E, O, 1>, E, O>(call, call.begin, call.end);
  } else if (call.trim == 2) {
    walk_columns<TrimmedMean<E, O, 2>, E, O>(call, call.begin, call.end);
  } else if (call.trim <= kMaxInRegisters) {
    walk_columns<TrimmedMean<E, O, kMaxInRegisters>, E, O>(call, call.begin, call.end);
  } else {
    walk_columns<SortedMean<E, O>, E, O>(call, call.begin, call.end);
  }
  if (call.stream) stream_end();
}

// By type of the rows; for an output of the same type, and for a wider one.
constexpr TrimmedMeanKernel kTrimmedMeanKernels[4][2] = {
    {trimmed_mean_columns<float>, nullptr},
    {trimmed_mean_columns<double>, nullptr},
    {trimmed_mean_columns<BFloat16>, trimmed_mean_columns<BFloat16, float>},
    {trimmed_mean_columns<Float16>, trimmed_mean_columns<Float16, float>}};
