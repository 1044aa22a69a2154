"""DBMTL against its literal algorithm, and its invariances."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastmtl
from fastmtl import DBMTL
from tests.nets import mlp


@pytest.mark.parametrize("num_tasks", [1, 2, 5, 64])
@pytest.mark.parametrize(("beta", "decay"), [(0.9, 0.5), (0.3, 0.0), (0.0, 0.5)])
def test_literal(num_tasks: int, beta: float, decay: float) -> None:
    rng = np.random.default_rng(num_tasks)
    method, y = DBMTL(beta, decay), np.zeros((num_tasks, 9))
    for k in range(1, 7):
        jacobian, losses = rng.normal(size=(num_tasks, 9)), rng.uniform(0.1, 5, num_tasks)
        rate = beta / k**decay
        y = rate * y + (1 - rate) * jacobian / (losses[:, None] + 1e-8)
        norms = np.linalg.norm(y, axis=1)
        expected = norms.max() * (y / norms[:, None]).sum(0)
        found = fastmtl.aggregate(torch.from_numpy(jacobian), method, losses=torch.from_numpy(losses))
        np.testing.assert_allclose(found.grads, expected, rtol=1e-9, atol=1e-12)


def test_units_of_a_loss_do_not_matter() -> None:
    factors = torch.tensor([1.0, 1000.0, 1e-3], dtype=torch.float64)
    a, b = DBMTL(eps=0.0), DBMTL(eps=0.0)
    for _ in range(3):
        jacobian, losses = torch.randn(3, 7, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.1
        plain = fastmtl.aggregate(jacobian, a, losses=losses).grads
        torch.testing.assert_close(
            fastmtl.aggregate(factors[:, None] * jacobian, b, losses=factors * losses).grads, plain
        )


def test_heads_get_the_gradients_of_the_logarithms() -> None:
    x = torch.randn(8, 5, dtype=torch.float64)
    for scale_heads in (True, False):
        net = mlp(3)
        losses = net.losses(x)
        heads = [*net.heads.parameters()]
        logs = sum((loss + 1e-8).log() if scale_heads else loss for loss in losses)
        expected = torch.autograd.grad(logs, heads, retain_graph=True)
        fastmtl.backward(losses, DBMTL(scale_heads=scale_heads), net.trunk)
        for p, wanted in zip(heads, expected, strict=True):
            torch.testing.assert_close(p.grad, wanted)


def test_all_move_alike() -> None:
    out = fastmtl.aggregate(torch.randn(4, 5).double(), DBMTL(), losses=torch.rand(4))
    shares = out.weights * out.gramian.diagonal().sqrt()
    torch.testing.assert_close(shares, shares.max().expand(4))


def test_zero_gradient_and_loss_that_has_no_logarithm() -> None:
    jacobian = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert fastmtl.aggregate(jacobian, DBMTL(), losses=torch.ones(2)).grads.isfinite().all()
    method = DBMTL()
    assert fastmtl.aggregate(jacobian, method, losses=torch.tensor([-1.0, 1.0])).grads.isnan().all()
    assert not method.rows_0.any()


def test_losses_are_needed() -> None:
    with pytest.raises(ValueError, match="losses: DBMTL needs the values of the losses"):
        fastmtl.aggregate(torch.randn(2, 3), DBMTL())
