// Threads for the CPU backend. Implemented once, by the module that links to torch (its pool, its thread count).
#pragma once
#include <cstdint>
#include <functional>

namespace fastmtl {

int num_threads();

// Calls body(i) once for every i in [0, n), in any order, on up to num_threads() threads. `body` must not throw.
// Results must not depend on which thread runs which i.
void parallel_for(int64_t n, const std::function<void(int64_t)>& body);

}  // namespace fastmtl
