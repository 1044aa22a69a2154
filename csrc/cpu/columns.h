// How a kernel that makes one row out of many walks along the columns. Included by kernels after vector.h, once per
// instruction set: no include guard, no #include.
//
// A Kernel has, for rows of E and an output of O:
//   kVectors                               vectors of columns in a block
//   block<N, Stream>(call, column)         writes N vectors of columns; Stream: past the caches
//   first(call, column, n)                 writes fewer columns than a vector has

// Any number of columns, vector by vector.
template <class Kernel, class E, class Call>
FASTMTL_INLINE void walk_few(const Call& call, int64_t begin, int64_t end) {
  int64_t column = begin;
  for (; column + kLanes<E> <= end; column += kLanes<E>) Kernel::template block<1, false>(call, column);
  if (column < end) Kernel::first(call, column, end - column);
}

// Writes columns [begin, end). To be followed by stream_end() in the same thread if call.stream.
template <class Kernel, class E, class O, class Call>
FASTMTL_INLINE void walk_columns(const Call& call, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = Kernel::kVectors * kLanes<E>;
  int64_t column = begin;
  if (call.stream) {
    const auto address = reinterpret_cast<uintptr_t>(static_cast<O*>(call.out) + column);
    const int64_t aligned = column + int64_t((64 - address % 64) % 64 / sizeof(O));
    if (aligned + kBlock <= end) {
      walk_few<Kernel, E>(call, column, aligned);
      for (column = aligned; column + kBlock <= end; column += kBlock) {
        Kernel::template block<Kernel::kVectors, true>(call, column);
      }
    }
  }
  for (; column + kBlock <= end; column += kBlock) Kernel::template block<Kernel::kVectors, false>(call, column);
  walk_few<Kernel, E>(call, column, end);
}

template <bool Stream, class O, class V>
FASTMTL_INLINE void put(O* to, V x) {
  if (Stream) {
    stream(to, x);
  } else {
    store(to, x);
  }
}
