// Compiles the header FASTMTL_KERNELS once per instruction set, in the namespaces avx512, avx2 and portable, without
// flags for the file: functions, templates and lambdas between the pragmas get the target, while everything from std::
// stays baseline (a file-wide -mavx512f would leak such code into inline functions that the linker shares with others).
// Include after all other headers; what is defined here has internal linkage.
#include "vector_types.h"

#define FASTMTL_STRING(...) #__VA_ARGS__
#if defined(__clang__)
#define FASTMTL_TARGET_BEGIN(isa) \
  _Pragma(FASTMTL_STRING(clang attribute push(__attribute__((target(isa))), apply_to = function)))
#define FASTMTL_TARGET_END _Pragma("clang attribute pop")
#else
#define FASTMTL_TARGET_BEGIN(isa) _Pragma("GCC push_options") _Pragma(FASTMTL_STRING(GCC target(isa)))
#define FASTMTL_TARGET_END _Pragma("GCC pop_options")
// "The ABI for passing vectors has changed": no vector crosses a call here, all are inlined.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#if defined(__x86_64__)

FASTMTL_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define FASTMTL_VECTOR_BYTES 64
namespace fastmtl {
namespace {
namespace avx512 {
#include "vector.h"
#include FASTMTL_KERNELS
}  // namespace avx512
}  // namespace
}  // namespace fastmtl
#undef FASTMTL_VECTOR_BYTES
FASTMTL_TARGET_END

FASTMTL_TARGET_BEGIN("avx2,fma,f16c")
#define FASTMTL_VECTOR_BYTES 32
namespace fastmtl {
namespace {
namespace avx2 {
#include "vector.h"
#include FASTMTL_KERNELS
}  // namespace avx2
}  // namespace
}  // namespace fastmtl
#undef FASTMTL_VECTOR_BYTES
FASTMTL_TARGET_END

#endif  // x86-64

#define FASTMTL_VECTOR_BYTES 16
namespace fastmtl {
namespace {
namespace portable {
#include "vector.h"
#include FASTMTL_KERNELS
}  // namespace portable
}  // namespace
}  // namespace fastmtl
#undef FASTMTL_VECTOR_BYTES

#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif
