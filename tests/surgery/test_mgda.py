"""MGDA by its properties, and against SciPy's general-purpose solver. (The solver itself: tests/solvers.)"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

import fastmtl
from fastmtl import MGDA
from tests.asserts import (
    assert_invariant_under_permutation,
    assert_invariant_under_scaling,
    assert_non_conflicting,
    assert_on_simplex,
)


def jacobians() -> list[Tensor]:
    """Conflict, agreement, more tasks than dimensions, sizes far apart, a Pareto-stationary point, a duplicate."""
    g = torch.randn(6, 20, dtype=torch.float64)
    stationary = torch.cat([g[:5], -(torch.rand(5, dtype=torch.float64) @ g[:5]).unsqueeze(0)])
    sizes = torch.logspace(-3, 3, 6, dtype=torch.float64).unsqueeze(1)
    return [g, g.abs(), torch.randn(12, 3, dtype=torch.float64), g * sizes, stationary, torch.cat([g, g[:1]])]


@pytest.mark.parametrize("case", range(6))
def test_direction_conflicts_with_nobody(case: int) -> None:
    jacobian = jacobians()[case]
    out = fastmtl.aggregate(jacobian, MGDA())
    assert_on_simplex(out.weights)
    if case != 2 and case != 4:  # there the direction is 0 up to rounding
        assert_non_conflicting(jacobian, out.grads)
    products, square = jacobian @ out.grads, out.grads @ out.grads
    scale = jacobian.norm(dim=1).max() * jacobian.norm(dim=1).min()
    assert (products >= square - 1e-9 * scale).all()  # the optimality condition of the min-norm point


@pytest.mark.parametrize("case", range(6))
def test_not_longer_than_what_scipy_finds(case: int) -> None:
    jacobian = jacobians()[case]
    m = (jacobian @ jacobian.T).numpy()
    scale = np.diag(m).min()
    n = len(m)
    found = minimize(
        lambda w: w @ m @ w / scale,
        np.full(n, 1 / n),
        jac=lambda w: 2 * m @ w / scale,
        bounds=[(0, 1)] * n,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(n)},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    ours = MGDA()(torch.from_numpy(m)).numpy()
    assert ours @ m @ ours <= found.fun * scale + 1e-9 * scale


def test_properties() -> None:
    jacobian = jacobians()[0]
    gramian = jacobian @ jacobian.T
    assert_invariant_under_permutation(MGDA(), gramian, torch.randperm(6))
    for factor in (1e-6, 1e6):
        assert_invariant_under_scaling(MGDA(), gramian, factor)


def test_two_tasks_in_closed_form() -> None:
    for _ in range(20):
        a, b = torch.randn(2, 3, dtype=torch.float64)
        w = float(((b - a) @ b / (a - b).pow(2).sum()).clamp(0, 1))
        weights = fastmtl.aggregate(torch.stack([a, b]), MGDA()).weights
        torch.testing.assert_close(weights, torch.tensor([w, 1 - w], dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_a_zero_gradient_takes_all_the_weight() -> None:
    jacobian = torch.randn(4, 9, dtype=torch.float64)
    jacobian[2] = 0
    assert fastmtl.aggregate(jacobian, MGDA()).weights.tolist() == [0, 0, 1, 0]


def test_one_task_identical_tasks_masked_tasks() -> None:
    g = torch.randn(9, dtype=torch.float64)
    assert fastmtl.aggregate(g.unsqueeze(0), MGDA()).weights.tolist() == [1]
    out = fastmtl.aggregate(g.expand(3, 9), MGDA())
    assert_on_simplex(out.weights)
    torch.testing.assert_close(out.grads, g)
    gramian = torch.diag(torch.tensor([1.0, math.nan, 4.0], dtype=torch.float64))
    weights = MGDA()(gramian, mask=torch.tensor([True, False, True]))
    torch.testing.assert_close(weights, torch.tensor([0.8, 0.0, 0.2], dtype=torch.float64))


def test_it_has_no_state() -> None:
    assert not MGDA().state_dict()
