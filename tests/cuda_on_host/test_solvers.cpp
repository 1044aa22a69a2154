// The solvers on the device: PCGrad, GradVac, Frank-Wolfe, Krum and projected gradients against the papers' loops,
// min-norm by its optimality conditions, FairGrad and the spectral weights by their equations.
#include "../../csrc/cuda/cuda.h"
#include "../../csrc/solvers/order.h"
#include "../../csrc/solvers/simplex_lp.h"
#include "check.h"
#include "suites.h"

namespace {

using fastmtl::BoundedMinNorm;
using fastmtl::CAGrad;
using fastmtl::Distribution;
using fastmtl::DualCone;
using fastmtl::FairGrad;
using fastmtl::FrankWolfe;
using fastmtl::GradVac;
using fastmtl::Krum;
using fastmtl::MinNorm;
using fastmtl::Order;
using fastmtl::OrderKind;
using fastmtl::PCGrad;
using fastmtl::Problems;
using fastmtl::ProjectedGradient;
using fastmtl::RandomWeights;
using fastmtl::SimplexLp;
using fastmtl::Spectral;
using fastmtl::SpectralRule;
using Matrix = std::vector<std::vector<double>>;

// K Gramians of random gradients in `dimension` dimensions, many of them in conflict, and masks.
struct RandomProblems {
  RandomProblems(int64_t count, int num_tasks, int dimension, bool masked)
      : t(num_tasks), gramian(count * t * t), mask(count * t) {
    std::mt19937 random(num_tasks);
    std::normal_distribution<double> normal;
    for (int64_t k = 0; k < count; ++k) {
      Matrix gradients(t, std::vector<double>(dimension));
      for (int i = 0; i < t; ++i) {
        for (double& x : gradients[i]) x = normal(random) * (1 + i % 3);
        mask[k * t + i] = !masked || (i + k) % 4 != 1;
      }
      for (int i = 0; i < t; ++i) {
        for (int j = 0; j < t; ++j) {
          double sum = 0;
          for (int d = 0; d < dimension; ++d) sum += gradients[i][d] * gradients[j][d];
          // What belongs to an absent task may be anything.
          at(k, i, j) = present(k, i) && present(k, j) ? sum : NAN;
        }
      }
    }
    problems = {count, num_tasks, gramian.get(), masked ? mask.get() : nullptr};
  }
  double& at(int64_t k, int i, int j) const { return gramian[(k * t + i) * t + j]; }
  bool present(int64_t k, int i) const { return mask[k * t + i]; }

  int64_t t;
  check::Exact<double> gramian;
  check::Exact<uint8_t> mask;
  Problems problems;
};

// The ways to order, one after another.
struct TestOrder {
  TestOrder(int way, int64_t count, int num_tasks)
      : given(count * num_tasks * num_tasks), rng(std::vector<int64_t>{(int64_t{1} << 40) + 7, 3}) {
    std::mt19937 random(way);
    for (int64_t row = 0; row < count * num_tasks; ++row) {
      int64_t* order = given.get() + row * num_tasks;
      for (int j = 0; j < num_tasks; ++j) order[j] = j;
      std::shuffle(order, order + num_tasks, random);
    }
    const OrderKind kKinds[] = {OrderKind::random, OrderKind::fixed, OrderKind::shared};
    const bool is_explicit = way % 5 >= 3;
    order = {is_explicit ? OrderKind::random : kKinds[way % 5], is_explicit ? given.get() : nullptr, way % 5 == 4,
             is_explicit || way % 5 == 1 ? nullptr : rng.get()};
  }
  std::vector<int> of(int64_t k, int row, int num_tasks) const {
    std::vector<int32_t> scratch(fastmtl::order_scratch_words(num_tasks));
    fastmtl::visiting_order(fastmtl::HostTeam(), order, k, row, num_tasks, scratch.data());
    return {scratch.begin(), scratch.begin() + num_tasks};
  }
  check::Exact<int64_t> given;
  check::Exact<int64_t> rng;
  Order order;
};

double largest_difference(const check::Exact<double>& got, const std::vector<double>& expected) {
  double worst = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double error = std::abs(got[i] - expected[i]) / std::max(1.0, std::abs(expected[i]));
    worst = check::larger(worst, error);
  }
  return worst;
}

int count_finite(const double* values, size_t size) {
  int count = 0;
  for (size_t i = 0; i < size; ++i) count += std::isfinite(values[i]);
  return count;
}

// <sum_t c_t g_t, g_j>
double product(const RandomProblems& data, int64_t k, const std::vector<double>& c, int j) {
  double sum = 0;
  for (int t = 0; t < data.t; ++t) sum += c[t] != 0 ? c[t] * data.at(k, t, j) : 0;
  return sum;
}

std::vector<double> pcgrad_loop(const RandomProblems& data, const TestOrder& order, bool include_self, bool mean) {
  const int t = data.t;
  std::vector<double> weights(data.problems.count * t);
  for (int64_t k = 0; k < data.problems.count; ++k) {
    int num_present = 0;
    for (int i = 0; i < t; ++i) num_present += data.present(k, i);
    for (int i = 0; i < t; ++i) {
      if (!data.present(k, i)) continue;
      std::vector<double> c(t);
      c[i] = 1;
      for (int j : order.of(k, i, t)) {
        if ((j == i && !include_self) || !data.present(k, j) || data.at(k, j, j) == 0) continue;
        const double inner = product(data, k, c, j);
        if (inner < 0) c[j] -= inner / data.at(k, j, j);
      }
      for (int j = 0; j < t; ++j) weights[k * t + j] += c[j] / (mean ? num_present : 1);
    }
  }
  return weights;
}

struct VacResult {
  std::vector<double> weights, targets;
};

VacResult gradvac_loop(const RandomProblems& data, const TestOrder& order, const GradVac& args) {
  const int t = data.t;
  VacResult result;
  result.weights.resize(data.problems.count * t);
  result.targets.assign(args.targets, args.targets + data.problems.count * t * t);
  for (int64_t k = 0; k < data.problems.count; ++k) {
    for (int i = 0; i < t; ++i) {
      if (!data.present(k, i)) continue;
      std::vector<double> c(t);
      c[i] = 1;
      for (int j : order.of(k, i, t)) {
        if (j == i || !data.present(k, j)) continue;
        double squared = 0;
        for (int a = 0; a < t; ++a) squared += c[a] != 0 ? c[a] * product(data, k, c, a) : 0;
        const double norm = std::sqrt(squared), norm_j = std::sqrt(data.at(k, j, j));
        const double phi = product(data, k, c, j) / (norm * norm_j);
        double& stored = result.targets[(k * t + i) * t + j];
        const double moved = (1 - args.beta) * stored + args.beta * phi;
        double target = stored;
        if (args.ema_first && (args.ema_always || phi < stored)) target = moved;
        const bool correct = phi < target;
        if (args.ema_always || correct) stored = moved;
        if (!correct) continue;
        const double sine = std::sqrt(1 - phi * phi), target_sine = std::sqrt(1 - target * target);
        c[j] += norm * (target * sine - phi * target_sine) / (norm_j * target_sine);
      }
      for (int j = 0; j < t; ++j) result.weights[k * t + j] += c[j];
    }
  }
  return result;
}

void pcgrad_case(const RandomProblems& data, int way) {
  ++check::num_cases;
  const Problems& problems = data.problems;
  const TestOrder order(way, problems.count, problems.num_tasks);
  const bool include_self = way % 2, mean = way % 3 == 1;
  const check::Exact<double> weights(problems.count * data.t);
  const check::Exact<char> scratch(fastmtl::pcgrad_cuda_scratch(problems));
  const std::string name = "pcgrad T=" + std::to_string(data.t) + " way " + std::to_string(way);
  const PCGrad args = {order.order, include_self, mean, weights.get()};
  check::succeeded(name, fastmtl::pcgrad_cuda(problems, args, scratch.get(), nullptr));
  check::within(name, largest_difference(weights, pcgrad_loop(data, order, include_self, mean)), 1e-9);
}

void gradvac_case(const RandomProblems& data, int way, bool in_place) {
  ++check::num_cases;
  const Problems& problems = data.problems;
  const size_t size = problems.count * data.t * data.t;
  const TestOrder order(way, problems.count, problems.num_tasks);
  check::Exact<double> targets(size), moved(size), weights(problems.count * data.t);
  for (size_t i = 0; i < size; ++i) targets[i] = 0.4 * std::sin(1.0 + i);
  const check::Exact<char> scratch(fastmtl::gradvac_cuda_scratch(problems));
  const std::string name = "gradvac T=" + std::to_string(data.t) + " way " + std::to_string(way);
  double* const new_targets = in_place ? targets.get() : moved.get();
  const GradVac args = {order.order, 0.1, way % 2 == 0, way % 3 != 0, targets.get(), new_targets, weights.get()};
  const VacResult expected = gradvac_loop(data, order, args);
  check::succeeded(name, fastmtl::gradvac_cuda(problems, args, scratch.get(), nullptr));
  check::within(name + " weights", largest_difference(weights, expected.weights), 1e-9);
  check::within(name + " targets", largest_difference(in_place ? targets : moved, expected.targets), 1e-9);
}

void min_norm_case(const RandomProblems& data, double tolerance) {
  ++check::num_cases;
  const Problems& problems = data.problems;
  const check::Exact<double> weights(problems.count * data.t), gap(problems.count);
  const check::Exact<char> scratch(fastmtl::min_norm_cuda_scratch(problems));
  const std::string name = "min_norm T=" + std::to_string(data.t);
  const MinNorm args = {weights.get(), gap.get()};
  check::succeeded(name, fastmtl::min_norm_cuda(problems, args, scratch.get(), nullptr));
  for (int64_t k = 0; k < problems.count; ++k) {
    const std::vector<double> w(weights.get() + k * data.t, weights.get() + (k + 1) * data.t);
    double sum = 0, lowest = 0, squared = 0, smallest = INFINITY, scale = INFINITY;
    for (int i = 0; i < data.t; ++i) {
      sum += w[i];
      lowest = w[i] >= lowest ? lowest : w[i];
      if (!data.present(k, i)) {
        check::within(name + " weight of an absent task", std::abs(w[i]), 0);
        continue;
      }
      const double inner = product(data, k, w, i);
      squared += w[i] * inner;
      smallest = std::min(smallest, inner);
      scale = std::min(scale, data.at(k, i, i));
    }
    if (scale == 0) scale = 1;
    check::within(name + " sum", std::abs(sum - 1), 1e-12);
    check::within(name + " negative weight", -lowest, 0);
    check::within(name + " gap", (squared - smallest) / scale, tolerance);
    check::within(name + " stated gap", std::abs(gap[k] - (squared - smallest)) / scale, tolerance);
  }
}

// Bounds that leave `slack` to a problem without a mask.
void bounded_min_norm_case(const RandomProblems& data, double slack, double tolerance) {
  ++check::num_cases;
  const Problems& problems = data.problems;
  const int64_t t = data.t, size = problems.count * t;
  const check::Exact<double> bounds(size), weights(size), gap(problems.count);
  for (int64_t i = 0; i < size; ++i) bounds[i] = (1 - slack) * 2 * ((i + i / t) % t + 1) / (t * (t + 1.0));
  const check::Exact<char> scratch(fastmtl::bounded_min_norm_cuda_scratch(problems));
  const std::string name = "bounded_min_norm T=" + std::to_string(t) + " slack " + std::to_string(slack);
  const BoundedMinNorm args = {bounds.get(), weights.get(), gap.get()};
  check::succeeded(name, fastmtl::bounded_min_norm_cuda(problems, args, scratch.get(), nullptr));
  for (int64_t k = 0; k < problems.count; ++k) {
    const std::vector<double> w(weights.get() + k * t, weights.get() + (k + 1) * t);
    double sum = 0, left = 0, below = 0, inner = 0, smallest = INFINITY, scale = 0;
    for (int i = 0; i < t; ++i) {
      sum += w[i];
      if (!data.present(k, i)) {
        check::within(name + " weight of an absent task", std::abs(w[i]), 0);
        continue;
      }
      const double c = bounds[k * t + i], product_i = product(data, k, w, i);
      left += c;
      if (!(w[i] >= c)) below = c - w[i];
      inner += (w[i] - c) * product_i;
      smallest = std::min(smallest, product_i);
      scale = std::max(scale, data.at(k, i, i));
    }
    left = 1 - left;
    check::within(name + " sum", std::abs(sum - 1), 1e-12);
    check::within(name + " weight below its bound", std::abs(below), 0);
    check::within(name + " gap", (inner - left * smallest) / scale, tolerance);
    check::within(name + " stated gap", std::abs(gap[k] - (inner - left * smallest)) / scale, tolerance);
  }
}

// All tasks but every fourth one by one, and a random combination: `count` of them in turn. Of more teams than have
// scratch of their own only the first and the last ones have anything to do.
void dual_cone_case(const RandomProblems& data, int64_t count, double noise, double tolerance) {
  ++check::num_cases;
  const int64_t t = data.t, size = data.problems.count * count;
  const check::Exact<double> combinations(size * t), weights(size * t), gap(size);
  std::mt19937 random(t);
  std::uniform_real_distribution<double> uniform;
  for (int64_t n = 0; n < size; ++n) {
    const bool idle = size > 256 && n > 2 && n < 256;
    for (int i = 0; i < t; ++i) combinations[n * t + i] = idle ? 0 : n % 4 == 3 ? uniform(random) : n % t == i;
  }
  Problems problems = data.problems;
  problems.count = size;
  problems.repeats = count;
  const check::Exact<char> scratch(fastmtl::dual_cone_cuda_scratch(problems));
  const std::string name = "dual_cone T=" + std::to_string(t) + " noise " + std::to_string(noise);
  const DualCone args = {combinations.get(), noise, weights.get(), gap.get()};
  check::succeeded(name, fastmtl::dual_cone_cuda(problems, args, scratch.get(), nullptr));
  for (int64_t n = 0; n < size; ++n) {
    const int64_t k = n / count;
    const std::vector<double> v(weights.get() + n * t, weights.get() + (n + 1) * t);
    std::vector<double> u(t);
    for (int i = 0; i < t; ++i) u[i] = data.present(k, i) ? combinations[n * t + i] : 0;
    double squared = 0, conflict = 0, added = 0, below = 0;
    for (int i = 0; i < t; ++i) {
      if (!data.present(k, i)) {
        check::within(name + " weight of an absent task", std::abs(v[i]), 0);
        continue;
      }
      const double inner = product(data, k, v, i), norm = std::sqrt(data.at(k, i, i));
      squared += u[i] * product(data, k, u, i);
      conflict = std::max(conflict, norm > 0 ? -inner / norm : 0);
      added += (v[i] - u[i]) * std::abs(inner);
      if (!(v[i] >= u[i])) below = u[i] - v[i];
    }
    if (squared == 0) squared = 1;
    const double found = std::max(added, conflict * std::sqrt(squared));
    check::within(name + " weight below its bound", std::abs(below), 0);
    check::within(name + " gap", found / squared, tolerance);
    check::within(name + " stated gap", std::abs(gap[n] - found) / squared, tolerance);
  }
}

std::vector<double> frank_wolfe_loop(const RandomProblems& data, int64_t k, int max_iter, double tol, bool pair_start) {
  const int t = data.t;
  const auto inner = [&](const std::vector<double>& a, const std::vector<double>& b) {
    double sum = 0;
    for (int i = 0; i < t; ++i) sum += a[i] != 0 ? a[i] * product(data, k, b, i) : 0;
    return sum;
  };
  const auto shortest = [&](std::vector<double> a, const std::vector<double>& b) {
    const double aa = inner(a, a), ab = inner(a, b), bb = inner(b, b);
    const double step = ab >= aa ? 0 : ab >= bb ? 1 : (aa - ab) / (aa + bb - 2 * ab);
    for (int i = 0; i < t; ++i) a[i] += step * (b[i] - a[i]);
    return a;
  };
  const auto vertex = [&](int i) {
    std::vector<double> e(t);
    e[i] = 1;
    return e;
  };
  std::vector<double> w(t);
  int num_present = 0;
  for (int i = 0; i < t; ++i) num_present += data.present(k, i);
  for (int i = 0; i < t; ++i) w[i] = data.present(k, i) ? 1.0 / num_present : 0;
  if (pair_start) {
    double best = INFINITY;
    for (int i = 0; i < t; ++i) {
      for (int j = i + 1; j < t; ++j) {
        if (!data.present(k, i) || !data.present(k, j)) continue;
        const std::vector<double> pair = shortest(vertex(i), vertex(j));
        if (inner(pair, pair) < best) {
          best = inner(pair, pair);
          w = pair;
        }
      }
    }
  }
  for (int n = 0; n < max_iter; ++n) {
    int task = -1;
    for (int i = 0; i < t; ++i) {
      if (data.present(k, i) && (task < 0 || product(data, k, w, i) < product(data, k, w, task))) task = i;
    }
    const std::vector<double> moved = shortest(w, vertex(task));
    double change = 0;
    for (int i = 0; i < t; ++i) change += std::abs(moved[i] - w[i]);
    w = moved;
    if (change < tol) break;
  }
  return w;
}

void frank_wolfe_case(const RandomProblems& data, int max_iter, bool pair_start) {
  ++check::num_cases;
  const Problems& problems = data.problems;
  const check::Exact<double> weights(problems.count * data.t), gap(problems.count);
  const check::Exact<char> scratch(fastmtl::frank_wolfe_cuda_scratch(problems));
  const std::string name = "frank_wolfe T=" + std::to_string(data.t);
  const FrankWolfe args = {max_iter, 1e-4, pair_start, weights.get(), gap.get()};
  check::succeeded(name, fastmtl::frank_wolfe_cuda(problems, args, scratch.get(), nullptr));
  std::vector<double> expected;
  for (int64_t k = 0; k < problems.count; ++k) {
    const std::vector<double> w = frank_wolfe_loop(data, k, max_iter, 1e-4, pair_start);
    expected.insert(expected.end(), w.begin(), w.end());
    double squared = 0, smallest = INFINITY;
    for (int i = 0; i < data.t; ++i) {
      if (!data.present(k, i)) continue;
      squared += w[i] * product(data, k, w, i);
      smallest = std::min(smallest, product(data, k, w, i));
    }
    check::within(name + " gap", std::abs(gap[k] - (squared - smallest)), 1e-9);
  }
  check::within(name, largest_difference(weights, expected), 1e-9);
}

// The objective of a team of one, whose results tests/solvers compare with SciPy, and the inequalities.
void simplex_lp_case(const RandomProblems& data, bool bounded, bool extra) {
  ++check::num_cases;
  const Problems& problems = data.problems;
  const int64_t t = data.t, size = problems.count * t;
  const check::Exact<double> q(size), b(size), e(size), f(problems.count), weights(size), gap(problems.count);
  std::mt19937 random(t);
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < size; ++i) {
    const bool present = data.present(i / t, i % t);
    q[i] = present ? normal(random) : NAN;
    e[i] = present ? normal(random) : NAN;
    b[i] = !present ? NAN : bounded ? 0.0 : -INFINITY;
  }
  for (int64_t k = 0; k < problems.count; ++k) f[k] = extra ? 0.1 : -INFINITY;
  const SimplexLp args = {q.get(), b.get(), e.get(), f.get(), weights.get(), gap.get()};
  const check::Exact<char> scratch(fastmtl::simplex_lp_cuda_scratch(problems));
  const std::string name = "simplex_lp T=" + std::to_string(t);
  check::succeeded(name, fastmtl::simplex_lp_cuda(problems, args, scratch.get(), nullptr));
  std::vector<double> memory(fastmtl::simplex_lp_scratch(t)), alone(t);
  for (int64_t k = 0; k < problems.count; ++k) {
    const fastmtl::Problem problem = fastmtl::problem_at(problems, k);
    const double missed = fastmtl::simplex_lp_problem(fastmtl::HostTeam(), problem, args, memory.data(), alone.data());
    check::within(name + " violation", std::abs(gap[k] - missed), 1e-9);
    const std::vector<double> w(weights.get() + k * t, weights.get() + (k + 1) * t);
    double sum = 0, lowest = 0, reached = 0, expected = 0, along = 0;
    for (int i = 0; i < t; ++i) {
      sum += w[i];
      lowest = w[i] >= lowest ? lowest : w[i];
      if (!data.present(k, i)) {
        check::within(name + " weight of an absent task", std::abs(w[i]), 0);
        continue;
      }
      reached += q[k * t + i] * w[i];
      expected += q[k * t + i] * alone[i];
      along += e[k * t + i] * w[i];
      if (bounded && missed == 0) check::within(name + " bound", -product(data, k, w, i), 1e-7);
    }
    check::within(name + " sum", std::abs(sum - 1), 1e-12);
    check::within(name + " negative weight", -lowest, 0);
    if (missed > 0) continue;
    check::within(name + " objective", std::abs(reached - expected), 1e-8);
    if (extra) check::within(name + " last bound", 0.1 - along, 1e-8);
  }
}

// The direction is in the ball, and its least gain is as large as the paper's dual problem says that it may be.
void cagrad_case(const RandomProblems& data, double c) {
  ++check::num_cases;
  const Problems& problems = data.problems;
  const check::Exact<double> weights(problems.count * data.t), gap(problems.count);
  const check::Exact<char> scratch(fastmtl::cagrad_cuda_scratch(problems));
  const std::string name = "cagrad T=" + std::to_string(data.t) + " c " + std::to_string(c);
  const CAGrad args = {c, weights.get(), gap.get()};
  check::succeeded(name, fastmtl::cagrad_cuda(problems, args, scratch.get(), nullptr));
  for (int64_t k = 0; k < problems.count; ++k) {
    std::vector<double> mean(data.t), d(data.t), moved(data.t), w(data.t);
    int num_present = 0;
    for (int i = 0; i < data.t; ++i) num_present += data.present(k, i);
    double sum = 0;
    for (int i = 0; i < data.t; ++i) {
      d[i] = weights[k * data.t + i];
      if (!data.present(k, i)) check::within(name + " weight of an absent task", std::abs(d[i]), 0);
      mean[i] = data.present(k, i) ? 1.0 / num_present : 0;
      moved[i] = d[i] - mean[i];
      sum += moved[i];
    }
    double squared = 0, radius = 0, dual = 0, length = 0, least = INFINITY, scale = 0;
    for (int i = 0; i < data.t; ++i) {
      if (!data.present(k, i)) continue;
      w[i] = sum > 0 ? moved[i] / sum : 0;
      squared += moved[i] * product(data, k, moved, i);
      radius += mean[i] * product(data, k, mean, i);
      least = std::min(least, product(data, k, d, i));
      scale = std::max(scale, data.at(k, i, i));
    }
    for (int i = 0; i < data.t; ++i) {
      if (!data.present(k, i)) continue;
      dual += w[i] * product(data, k, mean, i);
      length += w[i] * product(data, k, w, i);
    }
    dual += c * std::sqrt(radius * std::max(length, 0.0));
    check::within(name + " outside of the ball", (squared - c * c * radius) / scale, 1e-9);
    check::within(name + " gap", std::abs(dual - least) / scale, 1e-8);
    check::within(name + " stated gap", gap[k] / scale, 1e-8);
  }
}

void krum_case(const RandomProblems& data, int f, int selected, bool euclidean) {
  ++check::num_cases;
  const Problems& problems = data.problems;
  const int t = data.t;
  const check::Exact<double> weights(problems.count * t);
  const check::Exact<char> scratch(fastmtl::krum_cuda_scratch(problems));
  const std::string name = "krum T=" + std::to_string(t);
  const Krum args = {f, selected, euclidean, weights.get()};
  check::succeeded(name, fastmtl::krum_cuda(problems, args, scratch.get(), nullptr));
  for (int64_t k = 0; k < problems.count; ++k) {
    std::vector<std::pair<double, int>> scores;
    std::vector<double> expected(t);
    int present = 0;
    for (int i = 0; i < t; ++i) present += data.present(k, i);
    for (int i = 0; i < t; ++i) {
      if (!data.present(k, i)) continue;
      std::vector<double> distances;
      for (int j = 0; j < t; ++j) {
        if (j == i || !data.present(k, j)) continue;
        const double squared = data.at(k, i, i) + data.at(k, j, j) - 2 * data.at(k, i, j);
        distances.push_back(euclidean ? std::sqrt(squared) : squared);
      }
      std::sort(distances.begin(), distances.end());
      distances.resize(std::min<size_t>(distances.size(), std::max(present - f - 2, 1)));
      double score = 0;
      for (double distance : distances) score += distance;
      scores.push_back({score, i});
    }
    std::sort(scores.begin(), scores.end());
    const int chosen = std::min(selected, present);
    for (int n = 0; n < chosen; ++n) expected[scores[n].second] = 1.0 / chosen;
    for (int i = 0; i < t; ++i) check::within(name, std::abs(weights[k * t + i] - expected[i]), 0);
  }
}

// The nearest point of a simplex, by bisection for the threshold.
void project(std::vector<double>& x, double total) {
  double low = -1e9, high = 1e9;
  for (int n = 0; n < 200; ++n) {
    const double middle = (low + high) / 2;
    double sum = 0;
    for (double value : x) sum += std::max(value - middle, 0.0);
    (sum > total ? low : high) = middle;
  }
  for (double& value : x) value = std::max(value - high, 0.0);
}

// data: of all batches.
void projected_gradient_case(const RandomProblems& data, int batches, int64_t steps, bool pulled) {
  ++check::num_cases;
  const int t = data.t / batches, from = batches > 1 ? t : 0;
  const int64_t count = data.problems.count;
  const double lr = 0.5 / data.t, momentum = 0.4, ridge = 0.1;
  const check::Exact<double> start(count * t), pull(count * t), weights(count * t), rate(1);
  for (int64_t i = 0; i < count * t; ++i) {
    start[i] = 1.0 / t;
    pull[i] = 0.2 * (i % 3);
  }
  rate[0] = 0.5;
  const Problems problems = {count, t, nullptr, nullptr};
  const check::Exact<char> scratch(fastmtl::projected_gradient_cuda_scratch(problems));
  const std::string name = "projected_gradient T=" + std::to_string(t) + " B=" + std::to_string(batches);
  const double* pulls = pulled ? pull.get() : nullptr;
  const ProjectedGradient args = {data.gramian.get(),
                                  data.problems.mask,
                                  batches,
                                  start.get(),
                                  pulls,
                                  rate.get(),
                                  lr,
                                  momentum,
                                  ridge,
                                  steps,
                                  pulled,
                                  weights.get()};
  check::succeeded(name, fastmtl::projected_gradient_cuda(problems, args, scratch.get(), nullptr));
  for (int64_t k = 0; k < count; ++k) {
    std::vector<int> tasks;
    for (int i = 0; i < t; ++i) {
      bool present = true;
      for (int b = 0; b < batches; ++b) present &= data.present(k, b * t + i);
      if (present) tasks.push_back(i);
      if (!present) check::within(name + " absent", std::abs(weights[k * t + i] - 1.0 / t), 0);
    }
    const size_t n = tasks.size();
    double mean = 0;
    for (int i : tasks) mean += std::sqrt(std::max(data.at(k, i, from + i), 0.0)) / n;
    const double unit = pulled && mean > 0 ? mean * mean : 1;
    std::vector<double> w(n, 1.0 / t), velocity(n);
    for (int64_t step = 0; step < steps; ++step) {
      std::vector<double> moved(n);
      for (size_t a = 0; a < n; ++a) {
        double slope = ridge * w[a];
        for (size_t b = 0; b < n; ++b) {
          const double share = w[b] + (pulled ? pull[k * t + tasks[b]] : 0);
          slope += data.at(k, tasks[a], from + tasks[b]) * share / unit;
        }
        velocity[a] = momentum * velocity[a] + slope;
        moved[a] = w[a] - 0.5 * lr * velocity[a];
      }
      project(moved, static_cast<double>(n) / t);
      w = moved;
    }
    for (size_t a = 0; a < n; ++a) check::within(name, std::abs(weights[k * t + tasks[a]] - w[a]), 1e-9);
  }
}

// The definitions in random_weights.h and fastmtl/random.py, word by word.
void random_weights_case(int64_t count, int t, bool masked, Distribution distribution) {
  ++check::num_cases;
  const check::Exact<uint8_t> mask(count * t);
  for (int64_t i = 0; i < count * t; ++i) mask[i] = !masked || i % 3 != 1;
  const check::Exact<int64_t> rng(2);
  rng[0] = (int64_t{5} << 32) + 3;
  rng[1] = (int64_t{9} << 32) + t;
  const check::Exact<double> weights(count * t);
  const Problems problems = {count, t, nullptr, mask.get()};
  const std::string name = "random_weights T=" + std::to_string(t);
  const check::Exact<char> scratch(fastmtl::random_weights_cuda_scratch(problems));
  const RandomWeights args = {distribution, rng.get(), weights.get()};
  check::succeeded(name, fastmtl::random_weights_cuda(problems, args, scratch.get(), nullptr));
  for (int64_t k = 0; k < count; ++k) {
    std::vector<double> u, expected(t);
    for (uint32_t block = 0; u.size() < size_t(t) + 2; ++block) {
      const fastmtl::Philox words =
          fastmtl::philox({{block, static_cast<uint32_t>(k), static_cast<uint32_t>(t), 9}}, 3, 5);
      for (uint32_t word : words.word) u.push_back((word + 0.5) / 4294967296.0);
    }
    double sum = 0;
    int largest = -1;
    for (int i = 0; i < t; ++i) {
      if (!mask[k * t + i]) continue;
      const double radius = std::sqrt(-2 * std::log(u[i / 2 * 2])), angle = 2 * M_PI * u[i / 2 * 2 + 1];
      if (distribution == Distribution::normal)
        expected[i] = std::exp(radius * (i % 2 == 0 ? std::cos(angle) : std::sin(angle)));
      if (distribution == Distribution::uniform) expected[i] = std::exp(u[i]);
      if (distribution == Distribution::dirichlet) expected[i] = -std::log(u[i]);
      if (largest < 0 || u[i] > u[largest]) largest = i;
      sum += expected[i];
    }
    double total = 0;
    for (int i = 0; i < t; ++i) total += weights[k * t + i];
    if (largest >= 0) check::within(name + " sum", std::abs(total - 1), 1e-12);
    if (distribution == Distribution::bernoulli) continue;
    if (distribution == Distribution::constrained_bernoulli && largest >= 0) expected[largest] = sum = 1;
    for (int i = 0; i < t; ++i) {
      check::within(name, std::abs(weights[k * t + i] - (sum > 0 ? expected[i] / sum : 0)), 1e-12);
    }
  }
}

// preference: of task i, i % 3 / 2, and so 0 for every third.
void fairgrad_case(const RandomProblems& data, double alpha, bool weighted) {
  ++check::num_cases;
  const Problems& problems = data.problems;
  const check::Exact<double> weights(problems.count * data.t), gap(problems.count), preference(data.t);
  for (int i = 0; i < data.t; ++i) preference[i] = weighted ? (i + 1) % 3 / 2.0 : 1;
  const check::Exact<char> scratch(fastmtl::fairgrad_cuda_scratch(problems));
  const std::string name = "fairgrad T=" + std::to_string(data.t) + " alpha " + std::to_string(alpha);
  const FairGrad args = {alpha, weighted ? preference.get() : nullptr, weights.get(), gap.get()};
  check::succeeded(name, fastmtl::fairgrad_cuda(problems, args, scratch.get(), nullptr));
  for (int64_t k = 0; k < problems.count; ++k) {
    const std::vector<double> w(weights.get() + k * data.t, weights.get() + (k + 1) * data.t);
    double worst = 0;
    for (int i = 0; i < data.t; ++i) {
      if (!data.present(k, i) || preference[i] == 0) {
        check::within(name + " weight of a task that takes no part", std::abs(w[i]), 0);
        continue;
      }
      const double gain = product(data, k, w, i), expected = std::pow(w[i] / preference[i], -1 / alpha);
      worst = check::larger(worst, std::abs(gain - expected) / expected);
    }
    check::within(name, worst, 1e-9);
    check::within(name + " stated error", gap[k], 1e-11);
  }
}

// By the conditions that define the weights.
void spectral_case(const RandomProblems& data, SpectralRule rule, bool weighted, double tolerance) {
  ++check::num_cases;
  const Problems& problems = data.problems;
  const int t = data.t;
  const check::Exact<double> weights(problems.count * t), preference(problems.count * t);
  for (int64_t i = 0; i < problems.count * t; ++i) preference[i] = 0.5 + i % 3;
  const check::Exact<char> scratch(fastmtl::spectral_cuda_scratch(problems));
  const std::string name = "spectral rule " + std::to_string(static_cast<int>(rule)) + " T=" + std::to_string(t);
  const Spectral args = {rule, weighted ? preference.get() : nullptr, weights.get()};
  check::succeeded(name, fastmtl::spectral_cuda(problems, args, scratch.get(), nullptr));
  for (int64_t k = 0; k < problems.count; ++k) {
    const std::vector<double> w(weights.get() + k * t, weights.get() + (k + 1) * t);
    int present = 0;
    for (int i = 0; i < t; ++i) {
      present += data.present(k, i);
      if (!data.present(k, i)) check::within(name + " weight of an absent task", std::abs(w[i]), 0);
    }
    // aligned: w^T M w = scale b^T b at full rank; else all <g_i, d> / (|g_i| b_i) are the same, and |d| is the sum of
    // the <g_i, d> / |d|, or the weights sum to 1.
    double square = 0, goal = 0, sum = 0, inner = 0, first = 0, worst = 0;
    for (int i = 0; i < t; ++i) {
      if (!data.present(k, i)) continue;
      const double b = weighted ? preference[k * t + i] : 1;
      const double product_i = product(data, k, w, i);
      square += w[i] * product_i;
      goal += b * b;
      sum += w[i];
      inner += product_i;
      const double share = product_i / std::sqrt(data.at(k, i, i)) / b;
      if (first == 0) first = share;
      worst = check::larger(worst, std::abs(share / first - 1));
    }
    if (rule == SpectralRule::aligned_rmse) {
      double trace = 0;
      for (int i = 0; i < t; ++i) trace += data.present(k, i) ? data.at(k, i, i) : 0;
      const double scale = trace / present * goal / (weighted ? 1 : double(present) * present);
      check::within(name + " square", std::abs(square / scale - 1), tolerance);
      continue;
    }
    check::within(name + " cosines", worst, tolerance);
    const double length = rule == SpectralRule::sum_to_one ? sum - 1 : inner / square - 1;
    check::within(name + " length", std::abs(length), tolerance);
  }
}

}  // namespace

void pcgrad() {
  for (int t = 1; t <= 40; ++t) pcgrad_case(RandomProblems(2, t, t + 10, t % 2 == 0), t);
  for (int way = 0; way < 6; ++way) pcgrad_case(RandomProblems(3, 33 + way, 80, way % 2 == 1), way);
  pcgrad_case(RandomProblems(1, 72, 100, true), 3);

  const RandomProblems data(2, 9, 20, true);
  for (int j = 0; j < 9; ++j) data.at(0, 4, j) = data.at(0, j, 4) = data.present(0, j) ? 0 : NAN;
  pcgrad_case(data, 1);  // a zero gradient
  data.at(1, 3, 2) = INFINITY;
  check::Exact<double> weights(2 * 9);
  const check::Exact<char> scratch(fastmtl::pcgrad_cuda_scratch(data.problems));
  const PCGrad args = {{OrderKind::fixed, nullptr, false, nullptr}, false, false, weights.get()};
  check::succeeded("pcgrad", fastmtl::pcgrad_cuda(data.problems, args, scratch.get(), nullptr));
  check::within("pcgrad: finite weights of a finite problem", 9 - count_finite(weights.get(), 9), 0);
  check::within("pcgrad: finite weights although M is not", count_finite(weights.get() + 9, 9), 0);
}

void gradvac() {
  for (int t = 1; t <= 40; ++t) gradvac_case(RandomProblems(2, t, t + 10, t % 2 == 0), t, t % 4 < 2);
  for (int way = 0; way < 6; ++way) gradvac_case(RandomProblems(3, 33 + way, 80, way % 2 == 1), way, way < 3);

  const RandomProblems data(1, 5, 20, false);
  data.at(0, 3, 4) = NAN;
  check::Exact<double> targets(25), moved(25), weights(5);
  for (int i = 0; i < 25; ++i) targets[i] = 0.01 * i;
  const check::Exact<char> scratch(fastmtl::gradvac_cuda_scratch(data.problems));
  const Order order = {OrderKind::fixed, nullptr, false, nullptr};
  const GradVac args = {order, 0.1, false, true, targets.get(), moved.get(), weights.get()};
  check::succeeded("gradvac", fastmtl::gradvac_cuda(data.problems, args, scratch.get(), nullptr));
  check::within("gradvac: finite weights although M is not", count_finite(weights.get(), 5), 0);
  check::within("gradvac: targets that moved although M is not finite", memcmp(targets.get(), moved.get(), 200) != 0,
                0);
}

void min_norm() {
  for (int t = 1; t <= 40; ++t) min_norm_case(RandomProblems(2, t, t + 20, t % 2 == 0), 1e-9);
  for (int t : {5, 20, 48}) min_norm_case(RandomProblems(2, t, 3, false), 1e-8);  // dependent gradients
  min_norm_case(RandomProblems(1, 72, 100, true), 1e-9);
  min_norm_case(RandomProblems(2, 110, 150, false), 1e-9);  // too large for shared memory

  const RandomProblems data(2, 7, 20, false);
  for (int j = 0; j < 7; ++j) data.at(0, 4, j) = data.at(0, j, 4) = 0;
  data.at(1, 2, 2) = NAN;
  const check::Exact<double> weights(2 * 7), gap(2);
  const check::Exact<char> scratch(fastmtl::min_norm_cuda_scratch(data.problems));
  const MinNorm args = {weights.get(), gap.get()};
  check::succeeded("min_norm", fastmtl::min_norm_cuda(data.problems, args, scratch.get(), nullptr));
  for (int i = 0; i < 7; ++i) check::within("min_norm: vertex of a zero gradient", std::abs(weights[i] - (i == 4)), 0);
  check::within("min_norm: finite weights although M is not", count_finite(weights.get() + 7, 7), 0);
}

void bounded_min_norm() {
  for (int t = 1; t <= 40; ++t) bounded_min_norm_case(RandomProblems(2, t, t + 20, t % 2 == 0), 1 - 0.02 * t, 1e-12);
  for (double slack : {1.0, 1e-3, 1e-9, 0.0}) bounded_min_norm_case(RandomProblems(2, 6, 3, true), slack, 1e-12);
  bounded_min_norm_case(RandomProblems(2, 48, 3, false), 0.7, 1e-12);  // dependent gradients
  bounded_min_norm_case(RandomProblems(1, 72, 100, true), 0.3, 1e-12);
  bounded_min_norm_case(RandomProblems(2, 110, 150, false), 0.5, 1e-12);  // too large for shared memory

  const RandomProblems data(2, 7, 20, false);
  data.at(1, 2, 2) = NAN;
  const check::Exact<double> bounds(2 * 7), weights(2 * 7), gap(2);
  for (int i = 0; i < 14; ++i) bounds[i] = i == 3 ? NAN : 0;
  const check::Exact<char> scratch(fastmtl::bounded_min_norm_cuda_scratch(data.problems));
  const BoundedMinNorm args = {bounds.get(), weights.get(), gap.get()};
  check::succeeded("bounded_min_norm", fastmtl::bounded_min_norm_cuda(data.problems, args, scratch.get(), nullptr));
  check::within("bounded_min_norm: finite weights although M or c is not", count_finite(weights.get(), 14), 0);
}

void dual_cone() {
  for (int t = 1; t <= 40; ++t) dual_cone_case(RandomProblems(2, t, t + 20, t % 2 == 0), 1 + t % 6, 0, 1e-11);
  dual_cone_case(RandomProblems(3, 6, 20, true), 6, 1e-12, 1e-11);  // the noise has no effect
  dual_cone_case(RandomProblems(2, 5, 5, false), 5, 1e-3, 0.5);     // and here it has
  dual_cone_case(RandomProblems(2, 48, 3, false), 2, 0, 1e-8);      // dependent gradients
  dual_cone_case(RandomProblems(1, 72, 100, true), 3, 0, 1e-11);
  dual_cone_case(RandomProblems(2, 110, 150, false), 2, 0, 1e-11);   // too large for shared memory
  dual_cone_case(RandomProblems(1, 95, 120, false), 259, 0, 1e-11);  // more teams than have scratch

  const RandomProblems data(3, 7, 20, false);
  for (int j = 0; j < 7; ++j) data.at(0, 4, j) = data.at(0, j, 4) = 0;
  data.at(1, 2, 2) = NAN;
  const check::Exact<double> combinations(3 * 7), weights(3 * 7), gap(3);
  for (int i = 0; i < 3 * 7; ++i) combinations[i] = i == 15 ? INFINITY : 1;
  const check::Exact<char> scratch(fastmtl::dual_cone_cuda_scratch(data.problems));
  const DualCone args = {combinations.get(), 0, weights.get(), gap.get()};
  check::succeeded("dual_cone", fastmtl::dual_cone_cuda(data.problems, args, scratch.get(), nullptr));
  check::within("dual_cone: weight of a zero gradient", std::abs(weights[4] - 1), 0);
  check::within("dual_cone: finite weights although M or u is not", count_finite(weights.get() + 7, 14), 0);
}

void frank_wolfe() {
  for (int t = 1; t <= 40; ++t) frank_wolfe_case(RandomProblems(2, t, t + 20, t % 2 == 0), t, t % 3 == 0);
  frank_wolfe_case(RandomProblems(1, 72, 100, true), 20, true);
  frank_wolfe_case(RandomProblems(3, 33, 100, false), 0, false);

  const RandomProblems data(1, 7, 20, false);
  data.at(0, 2, 2) = NAN;
  const check::Exact<double> weights(7), gap(1);
  const check::Exact<char> scratch(fastmtl::frank_wolfe_cuda_scratch(data.problems));
  const FrankWolfe args = {250, 1e-5, false, weights.get(), gap.get()};
  check::succeeded("frank_wolfe", fastmtl::frank_wolfe_cuda(data.problems, args, scratch.get(), nullptr));
  check::within("frank_wolfe: finite weights although M is not", count_finite(weights.get(), 7), 0);
}

void fairgrad() {
  for (int t = 1; t <= 40; ++t) fairgrad_case(RandomProblems(2, t, 2 * t + 20, t % 2 == 0), 1 + t % 3, t % 5 == 1);
  fairgrad_case(RandomProblems(1, 72, 200, true), 0.5, false);
  fairgrad_case(RandomProblems(2, 104, 250, false), 1, true);  // too large for shared memory

  const RandomProblems data(3, 7, 20, false);
  for (int j = 0; j < 7; ++j) data.at(0, 4, j) = data.at(0, j, 4) = 0;
  for (int i = 0; i < 7; ++i) {
    for (int j = 0; j < 7; ++j) data.at(1, i, j) = i == j ? 1 : -0.25;  // no gradients have this Gramian
  }
  data.at(2, 2, 2) = NAN;
  const check::Exact<double> weights(3 * 7), gap(3);
  const check::Exact<char> scratch(fastmtl::fairgrad_cuda_scratch(data.problems));
  const FairGrad args = {1, nullptr, weights.get(), gap.get()};
  check::succeeded("fairgrad", fastmtl::fairgrad_cuda(data.problems, args, scratch.get(), nullptr));
  for (int i = 0; i < 14; ++i) check::within("fairgrad: weights without a solution", std::abs(weights[i]), 0);
  check::within("fairgrad: finite error without a solution", count_finite(gap.get(), 2), 0);
  check::within("fairgrad: finite weights although M is not", count_finite(weights.get() + 14, 7), 0);
}

void spectral() {
  constexpr SpectralRule kRules[] = {SpectralRule::aligned_rmse, SpectralRule::projections, SpectralRule::sum_to_one};
  for (int t = 1; t <= 40; ++t)
    spectral_case(RandomProblems(2, t, 2 * t + 20, t % 2 == 0), kRules[t % 3], t % 5 < 2, 1e-9);
  spectral_case(RandomProblems(1, 72, 200, true), SpectralRule::aligned_rmse, false, 1e-9);
  spectral_case(RandomProblems(1, 72, 200, true), SpectralRule::projections, true, 1e-9);

  // Every gradient twice: no inverse of the cosines, but a direction of equal cosines.
  for (int t : {6, 40}) {
    const RandomProblems data(1, t, 2 * t, false);
    for (int i = 0; i < t; ++i) {
      for (int j = 0; j < t; ++j) data.at(0, i, j) = data.at(0, i / 2 * 2, j / 2 * 2);
    }
    spectral_case(data, SpectralRule::projections, false, 1e-9);
  }
  // Orthogonal gradients: the median and the smallest eigenvalue are those of a diagonal.
  for (SpectralRule rule : {SpectralRule::aligned_min, SpectralRule::aligned_median}) {
    const RandomProblems data(1, 9, 20, false);
    for (int i = 0; i < 9; ++i) {
      for (int j = 0; j < 9; ++j) data.at(0, i, j) = i == j ? 1 + (i * 4) % 9 : 0;
    }
    const check::Exact<double> weights(9);
    const check::Exact<char> scratch(fastmtl::spectral_cuda_scratch(data.problems));
    const Spectral args = {rule, nullptr, weights.get()};
    check::succeeded("spectral", fastmtl::spectral_cuda(data.problems, args, scratch.get(), nullptr));
    const double scale = rule == SpectralRule::aligned_min ? 1 : 5;
    for (int i = 0; i < 9; ++i) {
      check::within("spectral of a diagonal", std::abs(9 * weights[i] - std::sqrt(scale / data.at(0, i, i))), 1e-12);
    }
  }

  const RandomProblems data(2, 7, 20, false);
  for (int j = 0; j < 7; ++j) data.at(0, 4, j) = data.at(0, j, 4) = 0;
  data.at(1, 2, 2) = NAN;
  const check::Exact<double> weights(2 * 7);
  const check::Exact<char> scratch(fastmtl::spectral_cuda_scratch(data.problems));
  for (SpectralRule rule : kRules) {
    const Spectral args = {rule, nullptr, weights.get()};
    check::succeeded("spectral", fastmtl::spectral_cuda(data.problems, args, scratch.get(), nullptr));
    check::within("spectral: weight of a zero gradient", std::abs(weights[4]), 1e-12);
    check::within("spectral: finite weights of a finite problem", 7 - count_finite(weights.get(), 7), 0);
    check::within("spectral: finite weights although M is not", count_finite(weights.get() + 7, 7), 0);
  }
}

void simplex_lp() {
  for (int t = 1; t <= 40; ++t) simplex_lp_case(RandomProblems(2, t, t + 20, t % 2 == 0), t % 5 != 0, t % 3 == 0);
  for (int t : {5, 20, 40}) simplex_lp_case(RandomProblems(2, t, 3, false), true, false);  // dependent gradients
  simplex_lp_case(RandomProblems(1, 72, 100, true), true, true);  // too large for shared memory

  const RandomProblems data(1, 7, 20, false);
  data.at(0, 2, 2) = NAN;
  const check::Exact<double> zeros(7), weights(7), gap(1);
  for (int i = 0; i < 7; ++i) zeros[i] = 0;
  const check::Exact<char> scratch(fastmtl::simplex_lp_cuda_scratch(data.problems));
  const SimplexLp args = {zeros.get(), zeros.get(), zeros.get(), zeros.get(), weights.get(), gap.get()};
  check::succeeded("simplex_lp", fastmtl::simplex_lp_cuda(data.problems, args, scratch.get(), nullptr));
  check::within("simplex_lp: finite weights although M is not", count_finite(weights.get(), 7), 0);
}

void cagrad() {
  for (int t = 1; t <= 40; ++t) cagrad_case(RandomProblems(2, t, 2 * t + 20, t % 2 == 0), 0.2 * (1 + t % 4));
  cagrad_case(RandomProblems(1, 72, 200, true), 0.4);
  cagrad_case(RandomProblems(2, 104, 250, false), 0.4);  // too large for shared memory

  const RandomProblems data(2, 3, 20, false);
  const double stationary[3][3] = {{1, -3, 0}, {-3, 9, 0}, {0, 0, 9}};  // 0 is in the hull
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) data.at(0, i, j) = stationary[i][j];
  }
  data.at(1, 2, 2) = NAN;
  const check::Exact<double> weights(2 * 3), gap(2);
  const check::Exact<char> scratch(fastmtl::cagrad_cuda_scratch(data.problems));
  const CAGrad args = {1, weights.get(), gap.get()};
  check::succeeded("cagrad", fastmtl::cagrad_cuda(data.problems, args, scratch.get(), nullptr));
  check::within("cagrad: the mean freed of its conflict", std::abs(weights[0] - 3 * weights[1]), 1e-12);
  check::within("cagrad: gap where no gain is possible", gap[0], 1e-12);
  check::within("cagrad: finite weights although M is not", count_finite(weights.get() + 3, 3), 0);
}

void krum() {
  for (int t = 1; t <= 40; ++t) krum_case(RandomProblems(2, t, t + 20, t % 2 == 0), t % 4, 1 + t % 3, t % 3 == 0);
  krum_case(RandomProblems(1, 72, 100, true), 70, 80, false);  // too large for shared memory
  krum_case(RandomProblems(2, 72, 100, true), 0, 1, true);

  const RandomProblems data(2, 7, 20, false);
  for (int i = 0; i < 7; ++i) {
    for (int j = 0; j < 7; ++j) data.at(0, i, j) = i == j;  // all scores are equal
  }
  data.at(1, 2, 2) = NAN;
  const check::Exact<double> weights(2 * 7);
  const check::Exact<char> scratch(fastmtl::krum_cuda_scratch(data.problems));
  const Krum args = {1, 1, true, weights.get()};
  check::succeeded("krum", fastmtl::krum_cuda(data.problems, args, scratch.get(), nullptr));
  check::within("krum: not the first of equal scores", std::abs(weights[0] - 1), 0);
  check::within("krum: finite weights although M is not", count_finite(weights.get() + 7, 7), 0);
}

void projected_gradient() {
  for (int t = 1; t <= 40; ++t) {
    projected_gradient_case(RandomProblems(2, t, t + 20, t % 2 == 0), 1, 1 + t % 5, t % 3 == 0);
  }
  for (int batches : {2, 3}) {
    for (int t : {1, 5, 20, 33})
      projected_gradient_case(RandomProblems(2, batches * t, 9, t % 2 == 0), batches, 6, t > 9);
  }
  const RandomProblems data(1, 14, 20, false);
  data.at(0, 8, 2) = NAN;
  const check::Exact<double> start(7), weights(7);
  for (int i = 0; i < 7; ++i) start[i] = 1;
  const Problems problems = {1, 7, nullptr, nullptr};
  const check::Exact<char> scratch(fastmtl::projected_gradient_cuda_scratch(problems));
  const ProjectedGradient args = {data.gramian.get(), nullptr, 2, start.get(), nullptr, nullptr, 0.1, 0, 0, 1, false,
                                  weights.get()};
  check::succeeded("projected_gradient", fastmtl::projected_gradient_cuda(problems, args, scratch.get(), nullptr));
  check::within("projected_gradient: finite weights although M is not", count_finite(weights.get(), 7), 0);
}

void random_weights() {
  for (int t : {1, 2, 3, 4, 5, 31, 32, 33, 70}) {
    for (int way = 0; way < 5; ++way) random_weights_case(3, t, (t + way) % 2 == 0, static_cast<Distribution>(way));
  }
}
