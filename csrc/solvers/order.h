// In which order task i meets the others.
//
// A random order is a Fisher-Yates shuffle whose draws are a pure function of (seed, step, problem k, row i), the same
// on every device and easy to repeat elsewhere. With T tasks, and all arithmetic in unsigned 32-bit words unless noted:
//   key     = (seed & 0xffffffff, seed >> 32)                                       seed, step as unsigned 64-bit
//   counter = (block | i << 16,  k & 0xffffffff,  step & 0xffffffff,  step >> 32)   block = 0, 1, 2, ..
//   u[4 * block + 0..3] = the four words of Philox4x32-10(counter, key), in their order
//   order = [0, 1, .., T-1]
//   for n = 0, 1, .., T-2:
//     m = T-1-n                             the last position that is not settled
//     r = (u[n] * (m+1)) >> 32              64-bit product: uniform on 0..m up to (m+1) / 2^32
//     swap order[m], order[r]
// Task i visits order[0], order[1], ... The order is over all T tasks, whatever the mask: who is absent (or is i
// itself, where a method leaves it out) is passed over. A shared order is that of i = 0 for all rows. T <= 65536.
#pragma once
#include <cstdint>

#include "philox.h"
#include "solvers.h"
#include "team.h"

namespace fastmtl {

// int32 words: the order [T], and the shuffle's draws [T] behind it.
FASTMTL_HD constexpr int64_t order_scratch_words(int num_tasks) { return 2 * static_cast<int64_t>(num_tasks); }

namespace detail {

// target[n] = r of step n above, for n < T-1.
template <class Team>
FASTMTL_HD void draw_targets(const Team& team, int64_t seed, int64_t step, int64_t problem, int row, int num_tasks,
                             int32_t* target) {
  const uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  const uint32_t step0 = static_cast<uint32_t>(step), step1 = static_cast<uint32_t>(static_cast<uint64_t>(step) >> 32);
  const int draws = num_tasks - 1;
  for (int block = team.rank(); 4 * block < draws; block += team.size()) {
    const uint32_t where = static_cast<uint32_t>(block) | static_cast<uint32_t>(row) << 16;
    const Philox random = philox({{where, static_cast<uint32_t>(problem), step0, step1}}, key0, key1);
    for (int word = 0; word < 4; ++word) {
      const int n = 4 * block + word;
      if (n < draws) {
        target[n] = static_cast<int32_t>(static_cast<uint64_t>(random.word[word]) * (num_tasks - n) >> 32);
      }
    }
  }
}

}  // namespace detail

// Writes the order of one row of one problem to scratch[0..T-1]. An explicit order is taken as it is, but an index that
// is no task becomes `row`, which visits nobody new, so that a wrong one cannot reach outside of the arrays.
template <class Team>
FASTMTL_HD void visiting_order(const Team& team, const Order& order, int64_t problem, int row, int num_tasks,
                               int32_t* scratch) {
  if (order.explicit_order) {
    const int64_t t = num_tasks;
    const int64_t* given = order.explicit_order + ((order.batched ? problem * t : 0) + row) * t;
    for (int p = team.rank(); p < num_tasks; p += team.size()) {
      scratch[p] = given[p] >= 0 && given[p] < t ? static_cast<int32_t>(given[p]) : row;
    }
    team.sync();
    return;
  }
  for (int p = team.rank(); p < num_tasks; p += team.size()) scratch[p] = p;
  if (order.kind == OrderKind::fixed) {
    team.sync();
    return;
  }
  int32_t* target = scratch + num_tasks;
  const int drawn_row = order.kind == OrderKind::shared ? 0 : row;
  detail::draw_targets(team, order.rng[0], order.rng[1], problem, drawn_row, num_tasks, target);
  team.sync();
  if (team.rank() == 0) {
    for (int m = num_tasks - 1; m > 0; --m) {
      const int r = target[num_tasks - 1 - m];
      const int32_t task = scratch[m];
      scratch[m] = scratch[r];
      scratch[r] = task;
    }
  }
  team.sync();
}

}  // namespace fastmtl
