"""PCGrad and GradVac as their papers state them: pair by pair, on the gradients themselves, in extended precision."""

from collections.abc import Iterator

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
