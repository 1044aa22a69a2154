// Random weights that sum to 1 over the present tasks (RandomGradWeights, RLW).
//
// Task t of group k has word t % 4 of Philox4x32-10 with key = (low, high word of the seed), counter = (t / 4, k, low,
// high word of the step); u = (word + 1/2) / 2^32. Two tasks share the two numbers of a normal draw (Box and Muller).
// fastmtl/random.py says what the distributions are, and is the same in PyTorch.
#pragma once
#include "philox.h"
#include "problem.h"

namespace fastmtl {

namespace detail {

FASTMTL_HD Philox words_of(const int64_t* rng, int64_t group, int block) {
  const uint64_t seed = static_cast<uint64_t>(rng[0]), step = static_cast<uint64_t>(rng[1]);
  const Philox counter = {{static_cast<uint32_t>(block), static_cast<uint32_t>(group), static_cast<uint32_t>(step),
                           static_cast<uint32_t>(step >> 32)}};
  return philox(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

FASTMTL_HD double uniform(uint32_t word) { return (word + 0.5) * (1.0 / 4294967296.0); }

FASTMTL_HD double uniform_of(const int64_t* rng, int64_t group, int n) {
  const Philox random = words_of(rng, group, n / 4);
  const uint32_t pair[] = {n % 4 < 2 ? random.word[0] : random.word[2], n % 4 < 2 ? random.word[1] : random.word[3]};
  return uniform(n % 2 == 0 ? pair[0] : pair[1]);  // an index would put the words on the stack
}

// The cosine or sine of a part of a full turn, from 0 to 1.
FASTMTL_HD double turned(double part, bool cosine) {
#if defined(__CUDA_ARCH__)
  return cosine ? cospi(2 * part) : sinpi(2 * part);  // without the stack that large angles take
#else
  const double angle = 6.283185307179586 * part;
  return cosine ? std::cos(angle) : std::sin(angle);
#endif
}

FASTMTL_HD double normal_of(const int64_t* rng, int64_t group, int n) {
  const Philox random = words_of(rng, group, n / 4);
  const bool front = n % 4 < 2;
  const double radius = std::sqrt(-2 * std::log(uniform(front ? random.word[0] : random.word[2])));
  return radius * turned(uniform(front ? random.word[1] : random.word[3]), n % 2 == 0);
}

// The first present task that has a coin of 1, all 0 being left out: its place among them is a geometric law cut off.
FASTMTL_HD int first_one(const Problem& problem, double u) {
  int count = 0, place = 0, task = 0;
  for (int i = 0; i < problem.num_tasks; ++i) count += problem.present(i);
  const double reach = u * (1 - std::ldexp(1.0, -count));
  for (; task < problem.num_tasks; ++task) {
    place += problem.present(task);
    if (problem.present(task) && reach < 1 - std::ldexp(1.0, -place)) break;
  }
  return task;
}

}  // namespace detail

// weights [T], 0 for absent tasks. No scratch.
template <class Team>
FASTMTL_HD void random_weights_problem(const Team& team, const Problem& problem, const RandomWeights& method,
                                       double* weights) {
  const int num_tasks = problem.num_tasks;
  const bool one = method.distribution == Distribution::constrained_bernoulli;
  int first = -1;
  if (method.distribution == Distribution::bernoulli) {
    first = detail::first_one(problem, detail::uniform_of(method.rng, problem.index, num_tasks));
  }
  double sum = 0, largest = -1;
  int task = num_tasks;
  for (int i = team.rank(); i < num_tasks; i += team.size()) {
    weights[i] = 0;
    if (!problem.present(i)) continue;
    const bool normal = method.distribution == Distribution::normal;
    const double x =
        normal ? detail::normal_of(method.rng, problem.index, i) : detail::uniform_of(method.rng, problem.index, i);
    if (normal || method.distribution == Distribution::uniform) weights[i] = std::exp(x);
    if (method.distribution == Distribution::dirichlet) weights[i] = -std::log(x);
    if (first >= 0) weights[i] = i == first || (i > first && x < 0.5) ? 1.0 : 0.0;
    sum += weights[i];
    if (x > largest) {
      largest = x;
      task = i;
    }
  }
  if (one) {
    task = team.argmax(largest, task);
    sum = 1;
  } else {
    sum = team.sum(sum);
  }
  for (int i = team.rank(); i < num_tasks; i += team.size()) {
    weights[i] = one ? (i == task ? 1.0 : 0.0) : sum > 0 ? weights[i] / sum : 0.0;
  }
  team.sync();
}

}  // namespace fastmtl
