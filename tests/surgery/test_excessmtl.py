"""ExcessMTL against its literal algorithm, and what excess risks promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastmtl
from fastmtl import ExcessMTL
from tests.nets import mlp


@pytest.mark.parametrize("num_tasks", [1, 2, 5, 64])
@pytest.mark.parametrize("step_size", [1.0, 0.01])
def test_literal(num_tasks: int, step_size: float) -> None:
    rng = np.random.default_rng(num_tasks)
    method, sums, weights = ExcessMTL(step_size), np.zeros((num_tasks, 9)), np.full(num_tasks, 1 / num_tasks)
    initial = None
    for _ in range(6):
        jacobian = rng.normal(size=(num_tasks, 9))
        sums = sums + jacobian**2
        excess = np.array([g @ np.diag(1 / np.sqrt(s + 1e-7)) @ g for g, s in zip(jacobian, sums, strict=True)])
        if initial is None:
            initial = excess
        else:
            weights = weights * np.exp(step_size * excess / initial)
            weights = weights / weights.sum()
        found = fastmtl.aggregate(torch.from_numpy(jacobian), method)
        np.testing.assert_allclose(found.weights, weights, rtol=1e-9)
        np.testing.assert_allclose(found.grads, weights @ jacobian, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found.gramian, jacobian @ jacobian.T, rtol=1e-9, atol=1e-12)


def test_a_converged_task_loses_weight() -> None:
    """Whatever the size of its loss: noise that cannot be learned has no gradient."""
    method = ExcessMTL(0.1)
    for k in range(20):
        jacobian = torch.randn(2, 50) * torch.tensor([[1.0], [0.5**k]])
        weights = fastmtl.aggregate(jacobian, method, losses=torch.tensor([0.1, 100.0])).weights
    assert weights[0] > 0.6


def test_absent_tasks_keep_theirs() -> None:
    rows = torch.randn(5, 3, 4, dtype=torch.float64)
    method = ExcessMTL()
    for g in rows[:2]:
        fastmtl.aggregate([list(g)], method)
    kept = method.logs.exp()
    out = fastmtl.aggregate([[rows[2, 0], None, rows[2, 2]]], method)
    assert out.weights[1] == 0
    assert method.logs.exp()[1] == kept[1]
    torch.testing.assert_close(method.logs.exp().sum(), torch.ones((), dtype=torch.float64))
    assert (method.logs.exp()[[0, 2]] != kept[[0, 2]]).all()


def test_weights_too_small_for_a_number() -> None:
    """A task far behind takes part alone, and catches up again, as its logarithm says."""
    method, e = ExcessMTL(step_size=2000.0), torch.eye(2, dtype=torch.float64)
    fastmtl.aggregate([list(e)], method)
    for factor in (0.0, 1.0):
        for _ in range(3):
            assert fastmtl.aggregate([[e[0], factor * e[1] / 100]], method).weights.tolist() == [1, 0]
    logs = method.logs.clone()
    assert logs[1] < -800
    assert fastmtl.aggregate([[None, e[1]]], method).weights.tolist() == [0, 1]
    torch.testing.assert_close(method.logs, logs)
    for _ in range(100):
        weights = fastmtl.aggregate([[e[0] * 0, e[1]]], method).weights
    assert weights.tolist() == [0, 1]


def test_weights_multiply_the_heads_too() -> None:
    net, method = mlp(2), ExcessMTL()
    for _ in range(2):
        net.zero_grad()
        losses = net.losses(torch.randn(8, 5, dtype=torch.float64))
        plain = [torch.autograd.grad(x, h.weight, retain_graph=True)[0] for x, h in zip(losses, net.heads, strict=True)]
        weights = fastmtl.backward(losses, method, net.trunk).weights
    for head, w, g in zip(net.heads, weights, plain, strict=True):
        torch.testing.assert_close(head.weight.grad, w * g)
