"""PCD by the optimality conditions of its program, and what its paper promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastmtl
from fastmtl import PCD
from tests.asserts import assert_same_state, assert_untouched


def jacobian(num_tasks: int, dim: int = 0) -> Tensor:
    lengths = torch.logspace(-2, 2, num_tasks, dtype=torch.float64).unsqueeze(1)
    return lengths * torch.randn(num_tasks, dim or 2 * num_tasks + 3, dtype=torch.float64)


def assert_optimal(g: Tensor, weights: Tensor, tau: Tensor, main: int, scales: Tensor) -> None:
    """d = h_main + sum mu h is feasible, mu >= 0, and mu is 0 where a constraint is slack: sufficient and necessary."""
    h = scales.unsqueeze(1) * g
    mu = weights / scales
    mu = mu / mu[main]
    direction = mu @ h
    slack = h @ direction - tau * (h * h).sum(1)
    others = torch.arange(len(g)) != main
    assert (slack[others] >= -1e-8).all()
    assert (mu >= -1e-12).all()
    assert (mu * slack)[others].abs().max() <= 1e-7 * (1 + mu.max())
    torch.testing.assert_close((weights @ g).norm(), g[main].norm())


@pytest.mark.parametrize("tau", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("num_tasks", [2, 3, 8, 32])
def test_optimality(num_tasks: int, tau: float) -> None:
    for main in (0, num_tasks - 1):
        g = jacobian(num_tasks)
        weights = fastmtl.aggregate(g, PCD(main, tau, eps=0)).weights
        assert_optimal(g, weights, torch.full((num_tasks,), tau, dtype=torch.float64), main, 1 / g.norm(dim=1))


def test_a_share_per_task_and_the_average() -> None:
    tau, square = torch.tensor([0.3, 0.0, 0.9, 0.2], dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    method = PCD(1, tau.tolist(), beta=0.7, eps=1e-3)
    for n in range(1, 5):
        g = jacobian(4) * n
        square = 0.7 * square + 0.3 * g.square().sum(1)
        scales = (square / (1 - 0.7**n) + 1e-3).rsqrt()
        assert_optimal(g, fastmtl.aggregate(g, method).weights, tau, 1, scales)


def test_two_tasks_in_closed_form() -> None:
    for _ in range(20):
        a, b = torch.nn.functional.normalize(torch.randn(2, 3, dtype=torch.float64))
        expected = a + max(0.0, 0.1 - float(a @ b)) * b
        out = fastmtl.aggregate(torch.stack([5 * a, 0.2 * b]), PCD(tau=0.1, eps=0))
        torch.testing.assert_close(out.grads, 5 * expected / expected.norm())


def test_agreement_leaves_the_main_task_alone() -> None:
    g = torch.rand(4, 6, dtype=torch.float64) + 1
    torch.testing.assert_close(fastmtl.aggregate(g, PCD()).weights, torch.eye(4)[0].double())
    assert fastmtl.aggregate(g[:1], PCD()).weights.tolist() == pytest.approx([1])


def test_the_size_of_other_losses_does_not_matter() -> None:
    g, factors = jacobian(5), torch.tensor([1, 1e-2, 1e3, 7, 0.1], dtype=torch.float64).unsqueeze(1)
    one, other = PCD(eps=0), PCD(eps=0)
    for _ in range(3):
        torch.testing.assert_close(fastmtl.aggregate(g, one).grads, fastmtl.aggregate(factors * g, other).grads)
        g = jacobian(5)


def test_contradictions_and_zeros() -> None:
    a, b = torch.randn(2, 5, dtype=torch.float64)
    assert fastmtl.aggregate(torch.stack([a, b, -2 * b]), PCD()).weights.tolist() == pytest.approx([1, 0, 0])
    assert fastmtl.aggregate(torch.stack([0 * a, b]), PCD()).weights.tolist() == [0, 0]
    assert fastmtl.aggregate(torch.stack([a, 0 * b]), PCD()).weights.tolist() == pytest.approx([1, 0])
    assert fastmtl.aggregate(torch.stack([a, 0 * b]), PCD(eps=0)).weights.tolist() == pytest.approx([1, 0])


def test_absent_tasks_groups_and_what_is_not_finite() -> None:
    g = torch.randn(3, 4, 9, dtype=torch.float64)
    m, method = g @ g.mT, PCD(tau=0.5)
    mask = torch.tensor([[True] * 4, [True, False, True, True], [False, True, True, True]])
    m[1, 1] = m[1, :, 1] = float("nan")
    found = method(m, mask=mask)
    torch.testing.assert_close(found[0], PCD(tau=0.5)(m[0]))
    few = PCD(tau=0.5)(m[1][[0, 2, 3]][:, [0, 2, 3]])
    torch.testing.assert_close(found[1], torch.stack([few[0], few[0] * 0, few[1], few[2]]))
    assert found[2].tolist() == [0] * 4
    assert method.counts.tolist() == mask.double().tolist()
    with assert_untouched(method):
        found = method(m, mask=torch.ones_like(mask))
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


def test_state() -> None:
    method, m = PCD(), torch.eye(3)
    with assert_untouched(method.eval()):
        method(m)
    method.train()(m)
    other = PCD()
    other.load_state_dict(method.state_dict())
    assert_same_state(method, other)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"main": -1}, ValueError, "main: expected at least 0, found -1"),
        ({"tau": 1.1}, ValueError, r"tau: expected a number in \[0, 1\], found 1.1"),
        ({"tau": "a"}, TypeError, "tau: expected a number, or one per task, found 'a'"),
        ({"beta": 1.0}, ValueError, r"beta: expected a number in \[0, 1\), found 1.0"),
        ({"eps": -1e-8}, ValueError, "eps: expected a number .* found -1e-08"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PCD(**options)


def test_errors_at_the_first_step() -> None:
    with pytest.raises(ValueError, match="main: expected one of 2 tasks, found 3"):
        PCD(3)(torch.eye(2))
    with pytest.raises(ValueError, match="tau: one for each of 3 tasks, but this step has 2"):
        PCD(tau=[0, 0, 0])(torch.eye(2))
