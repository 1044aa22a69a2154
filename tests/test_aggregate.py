"""Gradients at hand: every form of them, one result."""

from __future__ import annotations

import math

import pytest
import torch

import fastmtl
from fastmtl import MGDA, GradNorm, GradVac, PCGrad, UncertaintyWeighting
from tests.asserts import assert_non_conflicting, assert_on_simplex, assert_untouched

METHODS = [PCGrad, GradVac, MGDA]


@pytest.mark.parametrize("method", METHODS)
def test_every_form_of_gradients(method: type) -> None:
    a, b = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    jacobian = torch.cat([a.flatten(1), b], 1)
    found = []
    for grads in (jacobian, [a, b], [[*a], [*b]], [a, [*b]]):
        torch.manual_seed(5)
        out = fastmtl.aggregate(grads, method())
        total = out.grads if isinstance(grads, torch.Tensor) else torch.cat([g.flatten() for g in out.grads])
        torch.testing.assert_close(total, out.weights @ jacobian, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(out.gramian, jacobian @ jacobian.T, rtol=1e-12, atol=1e-12)
        found.append(out.weights)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-12)


def test_missing_rows_and_groups() -> None:
    a, b = torch.randn(3, 4), torch.randn(3, 5)
    grads = [[a[0], None, a[2]], [*b], [None] * 3]
    out = fastmtl.aggregate(grads, MGDA(), groups=[0, 1, 1])
    assert out.weights.shape == (2, 3)
    assert out.weights[0, 1] == 0
    assert_on_simplex(out.weights)
    assert out.grads[2] is None
    torch.testing.assert_close(out.grads[0], (out.weights[0].float() @ a))
    torch.testing.assert_close(out.grads[1], (out.weights[1].float() @ b))
    assert_non_conflicting(b.double(), out.grads[1].double(), rtol=1e-5)


def test_losses_for_methods_that_need_them() -> None:
    grads, method = torch.randn(2, 5), GradNorm()
    with assert_untouched(method), pytest.raises(ValueError, match="GradNorm needs the values"):
        fastmtl.aggregate(grads, method)
    with assert_untouched(method), pytest.raises(ValueError, match="expected 2 tasks, found 3"):
        fastmtl.aggregate(grads, method, losses=torch.ones(3))
    assert fastmtl.aggregate(grads, method, losses=torch.ones(2)).weights.tolist() == [1, 1]


def test_a_task_without_a_loss_is_absent() -> None:
    out = fastmtl.aggregate(torch.randn(3, 5), GradNorm(), losses=[torch.tensor(1.0), None, torch.tensor(2.0)])
    assert out.weights.tolist() == [1, 0, 1]


def test_a_loss_weighting() -> None:
    grads, weighting = torch.randn(2, 5), UncertaintyWeighting(2, "regression")
    out = fastmtl.aggregate(grads, weighting, losses=torch.tensor([3.0, 4.0]))
    assert out.weights.tolist() == [0.5, 0.5]
    assert out.gramian is None
    torch.testing.assert_close(out.grads, grads.mean(0))
    torch.testing.assert_close(weighting.s.grad, torch.tensor([-1.0, -1.5]))  # -L/2 + 1/2
    with pytest.raises(ValueError, match="UncertaintyWeighting needs the values"):
        fastmtl.aggregate(grads, weighting)


def test_not_finite_gives_nan() -> None:
    grads = torch.randn(3, 5)
    grads[1, 2] = math.inf
    for method in METHODS:
        out = fastmtl.aggregate(grads, method())
        assert out.weights.isnan().all()
        assert out.grads.isnan().all()


def test_input_is_not_written_and_no_graph_is_kept() -> None:
    grads = torch.randn(3, 5, requires_grad=True)
    before = grads.detach().clone()
    out = fastmtl.aggregate(grads, MGDA())
    assert torch.equal(grads, before)
    assert not out.weights.requires_grad


def test_errors() -> None:
    with pytest.raises(TypeError, match="construct it"):
        fastmtl.aggregate(torch.ones(2, 3), MGDA)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one index per parameter"):
        fastmtl.aggregate([torch.ones(2, 3)], MGDA(), groups=[0, 1])
