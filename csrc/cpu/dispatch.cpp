#include "dispatch.h"

#include <atomic>
#include <cstring>

#include "cpu.h"

namespace fastmtl {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512"};

Capability best_capability() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx2 && avx512 ? Capability::avx512 : avx2 ? Capability::avx2 : Capability::portable;
#else
  return Capability::portable;
#endif
}

std::atomic<Capability>& current() {
  static std::atomic<Capability> value{best_capability()};
  return value;
}

}  // namespace

Capability capability() { return current().load(std::memory_order_relaxed); }

const char* cpu_capability() { return kNames[static_cast<int>(capability())]; }

bool set_cpu_capability(const char* name) {
  for (int i = 0; i <= static_cast<int>(best_capability()); ++i) {
    if (std::strcmp(name, kNames[i]) != 0) continue;
    current().store(static_cast<Capability>(i), std::memory_order_relaxed);
    return true;
  }
  return false;
}

}  // namespace fastmtl
