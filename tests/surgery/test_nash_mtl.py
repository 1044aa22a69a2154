"""NashMTL: what the bargain promises, beyond what it shares with FairGrad."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

import fastmtl
from fastmtl import Amortized, NashMTL
from tests.asserts import assert_non_conflicting


@pytest.fixture
def jacobian() -> Tensor:
    return torch.randn(4, 9, dtype=torch.float64)


def test_equal_shares(jacobian: Tensor) -> None:
    out = fastmtl.aggregate(jacobian, NashMTL())
    assert_non_conflicting(jacobian, out.grads)
    torch.testing.assert_close(out.weights * (jacobian @ out.grads), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(out.grads.norm(), torch.tensor(2.0, dtype=torch.float64))  # sqrt(T)


def test_shares_by_bargaining_power(jacobian: Tensor) -> None:
    power = torch.tensor([1.0, 0.25, 3.0, 2.0], dtype=torch.float64)
    out = fastmtl.aggregate(jacobian, NashMTL(preference=power))
    torch.testing.assert_close(out.weights * (jacobian @ out.grads), power)
    torch.testing.assert_close(out.grads.norm(), power.sum().sqrt())


@pytest.mark.parametrize("num_tasks", [2, 3, 5])
def test_no_direction_has_a_larger_product_of_gains(num_tasks: int) -> None:
    jacobian = torch.randn(num_tasks, 8, dtype=torch.float64)
    ours = fastmtl.aggregate(jacobian, NashMTL()).grads.numpy()
    g = jacobian.numpy()

    def loss(d):
        gains = g @ d / (d @ d) ** 0.5
        return -float(torch.from_numpy(gains).clamp(min=1e-12).log().sum())

    found = minimize(loss, ours + 0.01, method="BFGS", options={"gtol": 1e-9})
    assert loss(ours) <= found.fun + 1e-12


def test_the_scale_of_a_loss_does_not_matter(jacobian: Tensor) -> None:
    factors = torch.tensor([1e-6, 1.0, 30.0, 1e8], dtype=torch.float64)
    plain = fastmtl.aggregate(jacobian, NashMTL())
    scaled = fastmtl.aggregate(jacobian * factors.unsqueeze(1), NashMTL())
    torch.testing.assert_close(scaled.grads, plain.grads, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scaled.weights * factors, plain.weights, rtol=1e-9, atol=0)


@pytest.mark.parametrize("size", [100.0, 1e-3])
def test_the_steps_of_the_public_code(jacobian: Tensor, size: float) -> None:
    """It solves for M / |M|, and clips the shared gradient to norm 1. (The head's weights are clipped with it here.)"""
    trunk, head = nn.Parameter(torch.zeros(9, dtype=torch.float64)), nn.Parameter(torch.ones(4, dtype=torch.float64))
    losses = [size * g @ trunk + h for g, h in zip(jacobian, head, strict=True)]
    fastmtl.backward(losses, NashMTL(unit="gramian", scale_heads=True), [trunk], max_norm=1.0)
    rows = size * jacobian
    m = rows @ rows.T
    alpha = NashMTL()(m / m.norm())
    update = alpha @ rows
    clipped = alpha / max(1.0, float(update.norm()))
    torch.testing.assert_close(trunk.grad, clipped @ rows)
    torch.testing.assert_close(head.grad, clipped)
    assert (update.norm() > 1) == (size > 1)


def test_update_every(jacobian: Tensor) -> None:
    method, m = Amortized(NashMTL(), update_every=3), jacobian @ jacobian.T
    first = method(m)
    assert torch.equal(method(4 * m), first)
    assert torch.equal(method(9 * m), first)
    torch.testing.assert_close(method(16 * m), first / 4)


def test_repr_and_errors() -> None:
    assert "unit='gramian'" in repr(NashMTL(unit="gramian"))
    with pytest.raises(ValueError, match="unit: expected 'paper' or 'gramian', found 'one'"):
        NashMTL(unit="one")
    with pytest.raises(TypeError, match="alpha"):
        NashMTL(alpha=2.0)  # type: ignore[call-arg]
