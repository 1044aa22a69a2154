// The threads that solve one T x T problem together. A solver is written once, for a Team:
//   team.rank(), team.size()           this thread, how many
//   team.lanes()                       how many consecutive ranks share a matrix row: 32 on the device, 1 on the host
//   team.sync()                        all writes to the problem's memory before it are seen after it
//   team.sum(x), team.max(x)           over the team's threads, the same result on each
//   team.argmax(value, index)          the index of the largest value, the smallest index among equals
//   team.first(hit)                    the smallest rank whose hit is true, size() if there is none
// All operations but rank, size and lanes order memory as sync() does.
// On the host a team is one thread (below); on the device it is a warp or a block (cuda/solvers.cu). Loops are written
//   for (int i = team.rank(); i < n; i += team.size())
// and no thread may leave a solver, or skip a team operation, alone.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define FASTMTL_HD __host__ __device__ __forceinline__
#else
#define FASTMTL_HD inline
#endif

namespace fastmtl {

struct HostTeam {
  static FASTMTL_HD constexpr int rank() { return 0; }
  static FASTMTL_HD constexpr int size() { return 1; }
  static FASTMTL_HD constexpr int lanes() { return 1; }
  FASTMTL_HD void sync() const {}
  template <class T>
  FASTMTL_HD T sum(T x) const {
    return x;
  }
  template <class T>
  FASTMTL_HD T max(T x) const {
    return x;
  }
  FASTMTL_HD int argmax(double, int index) const { return index; }
  FASTMTL_HD int first(bool hit) const { return hit ? 0 : 1; }
};

}  // namespace fastmtl
