"""Projected gradient steps on the simplex, against NumPy loops over the block of the Gramian that they are about."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq

from fastmtl import ops, reference, solvers

Floats = NDArray[np.float64]
BOTH = {"kernels": ops.projected_gradient, "reference": reference.projected_gradient}


def project(x: Floats, total: float) -> Floats:
    """By root finding for the threshold."""
    x = x - x.max()
    tau = brentq(lambda tau: np.maximum(x - tau, 0).sum() - total, -total, 0, xtol=1e-300, rtol=1e-15, maxiter=1000)
    found: Floats = np.maximum(x - tau, 0)
    return found


def steps_on(a: Floats, w: Floats, pull: Floats, lr: float, momentum: float, ridge: float, n: int) -> Floats:
    velocity, total = np.zeros_like(w), w.sum()
    for _ in range(n):
        velocity = momentum * velocity + a @ (w + pull) + ridge * w
        w = project(w - lr * velocity, total)
    return w


@pytest.mark.parametrize("solve", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("batches", [1, 2, 3])
@pytest.mark.parametrize("num_tasks", [1, 2, 5, 32, 200])
def test_steps(solve: Any, batches: int, num_tasks: int) -> None:
    rng = np.random.default_rng(num_tasks)
    mean = rng.standard_normal((2, 1, num_tasks, 12))
    g = (mean + rng.standard_normal((2, batches, num_tasks, 12))).reshape(2, -1, 12)
    m = g @ g.transpose(0, 2, 1)
    m = (m + m.transpose(0, 2, 1)) / 2
    start, pull = rng.random((2, num_tasks)), rng.random((2, num_tasks))
    mask = rng.random((2, batches * num_tasks)) < 0.8
    present = mask.reshape(2, batches, num_tasks).all(1)
    start[:, 0], present[:, 0] = 1, True
    mask.reshape(2, batches, num_tasks)[:, :, 0] = True
    m[~(mask[:, :, None] & mask[:, None])] = np.nan
    for scale_free, n, rate in ((False, 1, None), (True, 20, 0.5)):
        lr = 0.05 if scale_free else 0.3 / num_tasks
        arguments = [torch.from_numpy(x) for x in (m, start, mask, pull)]
        factor = None if rate is None else torch.tensor([rate], dtype=torch.float64)
        found = solve(*arguments, lr, 0.4, 0.2, n, scale_free, factor)
        for k in range(2):
            tasks = np.flatnonzero(present[k])
            a = m[k][np.ix_(tasks, tasks + (num_tasks if batches > 1 else 0))]
            if scale_free:
                a = a / (np.sqrt(a.diagonal().clip(0)).mean() ** 2 or 1)
            expected = start[k].copy()
            expected[tasks] = steps_on(a, start[k, tasks], pull[k, tasks], lr * (rate or 1), 0.4, 0.2, n)
            np.testing.assert_allclose(found[k], expected, rtol=0, atol=1e-10)
        if solve is ops.projected_gradient and rate is None:
            entry = solvers.projected_gradient(m, start, mask, pull, lr, 0.4, 0.2, n, scale_free)
            np.testing.assert_array_equal(entry, found)


@pytest.mark.parametrize("solve", BOTH.values(), ids=BOTH)
def test_extremes(solve: Any) -> None:
    one, eye = torch.ones(1, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)[None]
    assert solve(eye, 0 * one).eq(0).all()  # nothing to share
    assert torch.equal(solve(eye, one, num_steps=0), one)
    far = solve(torch.diag(torch.tensor([1.0, 1e200, 1e250], dtype=torch.float64))[None], one)
    torch.testing.assert_close(far, torch.tensor([[3.0, 0, 0]]).double())
    for bad in (torch.nan, torch.inf):
        assert solve(eye * bad, one).isnan().all()
        assert solve(eye, one * bad).isnan().all()
    absent = torch.tensor([[True, False, True]])
    torch.testing.assert_close(solve(eye * torch.tensor([1.0, torch.nan, 1]), one, absent), one)
    assert solve(eye[:, :0, :0], one[:, :0]).shape == (1, 0)


def test_shapes_that_do_not_fit() -> None:
    m, one = torch.eye(4, dtype=torch.float64)[None], torch.ones(1, 3, dtype=torch.float64)
    for solve in BOTH.values():
        with pytest.raises((ValueError, RuntimeError), match="start: expected"):
            solve(m, one)
    with pytest.raises(ValueError, match="start: expected"):
        solvers.projected_gradient(m[0].numpy(), one[0].numpy())
    with pytest.raises(ValueError, match=r"pull: expected shape \[2\], found \[3\]"):
        solvers.projected_gradient(m[0].numpy(), one[0, :2].numpy(), pull=one[0].numpy())
