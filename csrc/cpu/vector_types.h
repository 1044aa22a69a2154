// What vector.h needs and must not define three times: the system's headers and the 16-bit element types.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastmtl {

struct BFloat16 {
  uint16_t bits;  // the upper half of a float
};

struct Float16 {
  uint16_t bits;  // IEEE 754 binary16
};

// The type in which elements of type E are multiplied and added.
template <class E>
struct Arithmetic {
  using Type = float;
};
template <>
struct Arithmetic<double> {
  using Type = double;
};

}  // namespace fastmtl
