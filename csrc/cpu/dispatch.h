// Which instruction set the CPU kernels use. Chosen once at run time; tests and benchmarks may lower it (see cpu.h).
#pragma once

namespace fastmtl {

enum class Capability { portable, avx2, avx512 };

Capability capability();

}  // namespace fastmtl
