// GradDrop's random numbers, the same on every device: a pure function of (seed, step, parameter, element).
//
// Element i of the parameter with number p (among those of the call), i counted as the elements lie in memory, has
// word i % 4 of Philox4x32-10 with
//   key     = (seed & 0xffffffff, seed >> 32)                                    seed, step as unsigned 64-bit
//   counter = ((i / 4) & 0xffffffff, p & 0xffffffff, step & 0xffffffff, step >> 32)
// and of its upper 23 bits k the number (k + 1/2) / 2^23: exact in float32, above 0 and below 1.
#pragma once
#include <cstdint>

#include "solvers/philox.h"

namespace fastmtl {

struct Draws {
  uint32_t key0, key1, step0, step1, param;

  FASTMTL_HD static Draws of(const int64_t* rng, int64_t param) {  // rng: seed, step
    const uint64_t seed = static_cast<uint64_t>(rng[0]), step = static_cast<uint64_t>(rng[1]);
    return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(step),
            static_cast<uint32_t>(step >> 32), static_cast<uint32_t>(param)};
  }
  // The words of the elements 4 * block .. 4 * block + 3.
  FASTMTL_HD Philox words(int64_t block) const {
    return philox({{static_cast<uint32_t>(block), param, step0, step1}}, key0, key1);
  }
};

FASTMTL_HD float uniform_of(uint32_t word) { return (static_cast<float>(word >> 9) + 0.5f) * 0x1p-23f; }

}  // namespace fastmtl
