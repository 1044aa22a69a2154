"""The methods as their papers state them, or by brute force in exact arithmetic.

PCGrad and GradVac pair by pair, on the gradients themselves, in extended precision.
"""

from collections.abc import Iterator
from fractions import Fraction
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from fastmtl import solvers
from tests.samplers import Jacobian

Array = NDArray[np.float64]
Orders = NDArray[np.int64]


def random_orders(rng: np.random.Generator, num_tasks: int) -> Orders:
    return np.array([rng.permutation(num_tasks) for _ in range(num_tasks)])


def norm(x: Array) -> float:
    return np.sqrt(x @ x)


def pcgrad(jacobian: Jacobian, orders: Orders, include_self: bool = False) -> Array:
    """The projected gradient of every task."""
    g = jacobian.astype(np.longdouble)
    projected = g.copy()
    for i, order in enumerate(orders):
        for j in order:
            if (include_self or j != i) and g[j].any():
                projected[i] -= min(0, projected[i] @ g[j]) / (g[j] @ g[j]) * g[j]
    return projected


def gradvac(
    jacobian: Jacobian,
    orders: Orders,
    targets: Array,
    beta: float = 0.01,
    ema_first: bool = False,
    ema_always: bool = True,
) -> tuple[Array, Array]:
    """The corrected gradient of every task, and the targets after the step."""
    g = jacobian.astype(np.longdouble)
    turned, after = g.copy(), targets.astype(np.longdouble)
    for i, order in enumerate(orders):
        parts = norm(g[i])
        for j in order:
            if j == i or not g[j].any() or norm(turned[i]) <= 1e-6 * parts:
                continue
            phi = np.clip(turned[i] @ g[j] / (norm(turned[i]) * norm(g[j])), -1, 1)
            moved = (1 - beta) * after[i, j] + beta * phi
            target = moved if ema_first else after[i, j]
            target = min(target, 1 - 1e-6)
            if phi < target:
                sine, target_sine = np.sqrt(1 - phi**2), np.sqrt(1 - target**2)
                amount = norm(turned[i]) * (target * sine - phi * target_sine) / (norm(g[j]) * target_sine)
                turned[i] += amount * g[j]
                parts += amount * norm(g[j])
            if ema_always or phi < target:
                after[i, j] = moved
    return turned, after


def every_order(jacobian: Jacobian) -> Iterator[tuple[dict[str, object], Orders]]:
    """The ways to ask for an order, and the order that each means."""
    num_tasks = len(jacobian)
    identity = np.tile(np.arange(num_tasks), (num_tasks, 1))
    drawn = solvers.visiting_order(num_tasks, seed=7, step=11)
    explicit = random_orders(np.random.default_rng(num_tasks), num_tasks)
    yield {"seed": 7, "step": 11}, drawn
    yield {"order": "random", "seed": 7, "step": 11}, drawn
    yield {"order": "shared", "seed": 7, "step": 11}, np.tile(drawn[0], (num_tasks, 1))
    yield {"order": "fixed"}, identity
    yield {"order": explicit}, explicit


def assert_same_direction(weights: Array, jacobian: Jacobian, rows: Array, tolerance: float) -> None:
    """The weighted gradients against the sum of `rows`, to a fraction of the lengths involved."""
    expected = rows.sum(0)
    scale = max(np.sqrt((jacobian**2).sum(1)).max(), np.sqrt((rows**2).sum(1)).max())
    np.testing.assert_allclose(weights @ jacobian.astype(np.longdouble), expected, rtol=0, atol=tolerance * scale)


def bounded_min_norm(gramian: Array, bounds: Array) -> Array:
    """The weights, rounded once: every support tried, its optimality conditions solved and checked in rationals."""
    m = [[Fraction(float(x)) for x in row] for row in gramian]
    c = [Fraction(float(x)) for x in bounds]
    tasks = range(len(c))
    left = 1 - sum(c)
    if left <= 0:
        return bounds
    pull = [sum(m[i][j] * c[j] for j in tasks) for i in tasks]
    for size in range(1, len(c) + 1):
        for support in combinations(tasks, size):
            rows = [[*(m[i][j] for j in support), Fraction(1), -pull[i]] for i in support]
            rows.append([*(Fraction(1) for _ in support), Fraction(0), left])
            solution = solve_exactly(rows)
            if solution is None or min(solution[:-1]) < 0:
                continue
            w = c.copy()
            for i, share in zip(support, solution, strict=False):
                w[i] += share
            if all(sum(m[i][j] * w[j] for j in tasks) + solution[-1] >= 0 for i in tasks):
                return np.array([float(x) for x in w])
    raise AssertionError("no support is optimal: the Gramian is not positive semidefinite")


def solve_exactly(rows: list[list[Fraction]]) -> list[Fraction] | None:
    """Gauss-Jordan on ``[A b]``; None where A is singular."""
    for i in range(len(rows)):
        pivot = next((r for r in range(i, len(rows)) if rows[r][i] != 0), None)
        if pivot is None:
            return None
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for r in range(len(rows)):
            if r != i and rows[r][i] != 0:
                factor = rows[r][i] / rows[i][i]
                rows[r] = [x - factor * y for x, y in zip(rows[r], rows[i], strict=True)]
    return [row[-1] / row[i] for i, row in enumerate(rows)]


def frank_wolfe(m: Array, max_iter: int, tol: float, start: str) -> Array:
    """Sener and Koltun's Algorithm 2; ``start="pair"``: the start of their code, `MinNormSolver`."""

    def between(v1: Array, v2: Array) -> Array:
        """Algorithm 1: the shortest point between two, as weights."""
        v1v1, v1v2, v2v2 = v1 @ m @ v1, v1 @ m @ v2, v2 @ m @ v2
        if v1v2 >= v1v1:
            gamma = 1.0
        elif v1v2 >= v2v2:
            gamma = 0.0
        else:
            gamma = (v2v2 - v1v2) / (v1v1 + v2v2 - 2 * v1v2)
        return gamma * v1 + (1 - gamma) * v2

    n = len(m)
    unit = np.eye(n)
    alpha = np.full(n, 1 / n)
    if start == "pair" and n > 1:
        alpha = min((between(unit[i], unit[j]) for i, j in combinations(range(n), 2)), key=lambda a: a @ m @ a)
    for _ in range(max_iter):
        new = between(alpha, unit[np.argmin(m @ alpha)])
        change = np.abs(new - alpha).sum()
        alpha = new
        if change < tol:
            break
    return alpha
