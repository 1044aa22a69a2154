"""MoCo against its literal algorithm, and what tracking promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

import fastmtl
from fastmtl import MoCo


def nearest_on_simplex(x: np.ndarray) -> np.ndarray:
    """By bisection on the threshold."""
    low, high = x.min() - 1, x.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(x - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(x - low, 0)


def literal(jacobians: list[np.ndarray], losses: np.ndarray, options: dict[str, Any]) -> list[np.ndarray]:
    """The updates, step by step on the gradients."""
    o = {"beta": 0.5, "gamma": 0.1, "rho": 0.0, "beta_decay": 0.5, "gamma_decay": 0.5, **options}
    num_tasks = len(jacobians[0])
    y, w, out = np.zeros_like(jacobians[0]), np.full(num_tasks, 1 / num_tasks), []
    for k, g in enumerate(jacobians, 1):
        if options.get("gradients") == "normalized":
            g = g / np.linalg.norm(g, axis=1, keepdims=True) * losses[:, None]
        y = y - o["beta"] / k ** o["beta_decay"] * (y - g)
        moved = w - o["gamma"] / k ** o["gamma_decay"] * (y @ y.T + o["rho"] * np.eye(num_tasks)) @ w
        w = np.exp(moved) / np.exp(moved).sum() if options.get("simplex") == "softmax" else nearest_on_simplex(moved)
        out.append(w @ y)
    return out


@pytest.mark.parametrize("num_tasks", [1, 2, 5, 64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.9, "gamma": 0.01, "rho": 0.3, "beta_decay": 0.0, "gamma_decay": 1.0},
        {"simplex": "softmax", "gradients": "normalized"},
    ],
)
def test_literal(num_tasks: int, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(num_tasks)
    jacobians = [rng.normal(size=(num_tasks, 9)) for _ in range(6)]
    losses = rng.uniform(0.5, 2, num_tasks)
    method = MoCo(**options)
    for jacobian, expected in zip(jacobians, literal(jacobians, losses, options), strict=True):
        found = fastmtl.aggregate(torch.from_numpy(jacobian), method, losses=torch.from_numpy(losses))
        np.testing.assert_allclose(found.grads, expected, atol=1e-10)


def test_tends_to_the_min_norm_point_in_spite_of_noise() -> None:
    """What MGDA on single batches does not: its weights of noisy gradients are biased."""
    torch.manual_seed(0)
    mean = torch.tensor([[1.0, 0.0, 0.0], [0.0, 3.0, 0.0]], dtype=torch.float64)
    moco, mgda, tracked, at_once = MoCo(beta=1.0, beta_decay=0.7, gamma_decay=0.0), fastmtl.MGDA(), [], []
    for _ in range(800):
        noisy = mean + torch.randn(2, 3, dtype=torch.float64)
        tracked.append(fastmtl.aggregate(noisy, moco).weights)
        at_once.append(fastmtl.aggregate(noisy, mgda).weights)
    gramian = (mean @ mean.T).numpy()
    best = minimize(lambda a: np.array([a[0], 1 - a[0]]) @ gramian @ np.array([a[0], 1 - a[0]]), [0.5]).x[0]
    assert abs(float(torch.stack(tracked)[400:, 0].mean()) - best) < 0.05
    assert abs(float(torch.stack(at_once)[:, 0].mean()) - best) > 0.1


def test_absent_tasks_keep_theirs() -> None:
    a, b, c = torch.randn(3, 4, dtype=torch.float64).unbind()
    method = MoCo()
    fastmtl.aggregate([[a, b, c]], method)
    rows, weights = method.rows_0.clone(), method.weights.clone()
    out = fastmtl.aggregate([[b, None, a]], method)
    assert out.weights[1] == 0
    torch.testing.assert_close(out.weights.sum(), torch.ones((), dtype=torch.float64))
    assert torch.equal(method.rows_0[1], rows[1])
    assert not torch.equal(method.rows_0[0], rows[0])
    assert method.weights[0, 1] == weights[0, 1]
    torch.testing.assert_close(method.weights.sum(), torch.ones((), dtype=torch.float64))


def test_tasks_of_weight_0_alone() -> None:
    """They make the update by equal weights; what is kept stays."""
    x = torch.nn.Parameter(torch.ones(2))
    for simplex in ("projection", "softmax"):
        method = MoCo(beta=1.0, gamma=1.0, beta_decay=0.0, simplex=simplex)
        losses = [x[0] * 1.0, x[1] * 300.0, x.sum() * 300.0]
        assert fastmtl.backward(losses, method, [x]).weights.tolist() == [1, 0, 0]
        assert fastmtl.backward([None, x[1], None], method, [x]).weights.tolist() == [0, 1, 0]
        assert method.weights.tolist() == [[1, 0, 0]]
        method = MoCo(gamma=0.0)
        fastmtl.backward([x[0], x[1], x[1]], method, [x])
        method.weights.copy_(torch.tensor([[1, 0, 0]]))
        assert fastmtl.backward([None, x[0], x[1]], method, [x]).weights.tolist() == [0, 0.5, 0.5]
        assert fastmtl.backward([x[0], x[1], x[1]], method, [x]).weights.tolist() == [1, 0, 0]


def test_state_is_as_exact_as_the_gradients() -> None:
    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        method = MoCo()
        assert fastmtl.aggregate(torch.randn(2, 3).to(dtype), method).grads.dtype == dtype
        assert method.rows_0.dtype == kept


def test_other_parameters_or_tasks_are_refused() -> None:
    method = MoCo()
    fastmtl.aggregate([torch.ones(2, 3)], method)
    for grads, text in (
        ([torch.ones(2, 3), torch.ones(2, 3)], "state is of 1 parameters, this step has 2"),
        ([torch.ones(2, 4)], r"parameter 0 is of shape \[2, 3\], this step needs \[2, 4\]"),
        ([torch.ones(3, 3)], r"parameter 0 is of shape \[2, 3\], this step needs \[3, 3\]"),
    ):
        with pytest.raises(ValueError, match=text):
            fastmtl.aggregate(grads, method)


def test_sparse_gradients_are_refused() -> None:
    sparse = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (3, 2), check_invariants=False)
    with pytest.raises(ValueError, match="MoCo keeps dense gradients"):
        fastmtl.aggregate([[sparse, sparse]], MoCo())


@pytest.mark.parametrize(
    ("options", "text"),
    [({"beta": 2}, "beta"), ({"gamma": -1}, "gamma"), ({"simplex": "x"}, "simplex"), ({"gradients": "x"}, "gradients")],
)
def test_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        MoCo(**options)
