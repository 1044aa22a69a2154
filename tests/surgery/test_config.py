"""ConFIG by what its paper promises. (On all kinds of Gramians: tests/solvers/test_spectral.py.)"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastmtl
from fastmtl import ConFIG
from tests.asserts import (
    assert_invariant_under_permutation,
    assert_invariant_under_scaling,
    assert_non_conflicting,
)


def jacobian(num_tasks: int = 5, dim: int = 20) -> Tensor:
    lengths = torch.logspace(-2, 2, num_tasks, dtype=torch.float64).unsqueeze(1)
    return lengths * torch.randn(num_tasks, dim, dtype=torch.float64)


def cosines(g: Tensor, direction: Tensor) -> Tensor:
    return g @ direction / g.norm(dim=1) / direction.norm()


@pytest.mark.parametrize("num_tasks", [1, 2, 8, 32, 128])
def test_equal_cosines_and_the_length_of_the_paper(num_tasks: int) -> None:
    g = jacobian(num_tasks, 2 * num_tasks + 5)
    direction = fastmtl.aggregate(g, ConFIG()).grads
    found = cosines(g, direction)
    torch.testing.assert_close(found, found[:1].expand(num_tasks))
    assert_non_conflicting(g, direction)
    torch.testing.assert_close(direction.norm(), (g @ direction / direction.norm()).sum())


def test_cosines_go_as_the_preference() -> None:
    g, preference = jacobian(), torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0], dtype=torch.float64)
    found = cosines(g, fastmtl.aggregate(g, ConFIG(preference)).grads)
    torch.testing.assert_close(found, found[0] * preference, rtol=1e-9, atol=1e-12)


def test_two_tasks_as_the_papers_formula() -> None:
    """The sum of what each has at right angles to the other, in units of its length."""
    for _ in range(20):
        a, b = torch.randn(2, 4, dtype=torch.float64) * torch.tensor([[1.0], [7.0]])
        across_a, across_b = a - (a @ b) / (b @ b) * b, b - (a @ b) / (a @ a) * a
        along = across_a / across_a.norm() + across_b / across_b.norm()
        along = along / along.norm()
        found = fastmtl.aggregate(torch.stack([a, b]), ConFIG()).grads
        torch.testing.assert_close(found, (a @ along + b @ along) * along)


def test_properties() -> None:
    g = jacobian()
    assert_invariant_under_permutation(ConFIG(), g @ g.T, torch.randperm(5), atol=1e-7)
    for factor in (1e-6, 1e6):
        assert_invariant_under_scaling(ConFIG(), g @ g.T, factor, atol=1e-7)
    assert not ConFIG().state_dict()


def test_lengths_of_the_gradients_leave_the_direction_alone() -> None:
    g = jacobian()
    one = fastmtl.aggregate(g, ConFIG()).grads
    other = fastmtl.aggregate(g * torch.logspace(3, -3, 5, dtype=torch.float64).unsqueeze(1), ConFIG()).grads
    torch.testing.assert_close(one / one.norm(), other / other.norm())


def test_identical_zero_and_opposite_gradients() -> None:
    one = torch.randn(7, dtype=torch.float64)
    out = fastmtl.aggregate(torch.stack([one] * 4), ConFIG())
    torch.testing.assert_close(out.weights, torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(fastmtl.aggregate(one.unsqueeze(0), ConFIG()).grads, one)
    with_zero = torch.stack([one, torch.zeros_like(one)])
    torch.testing.assert_close(fastmtl.aggregate(with_zero, ConFIG()).weights, torch.tensor([1, 0]).double())
    assert fastmtl.aggregate(0 * with_zero, ConFIG()).weights.tolist() == [0, 0]
    assert fastmtl.aggregate(torch.stack([one, -3 * one]), ConFIG()).weights.tolist() == [0, 0]


def test_least_squares_where_cosines_cannot_be_equal() -> None:
    """Three directions of a plane; the direction of the smallest sum of squared deviations, by PyTorch's lstsq."""
    for _ in range(20):
        g = torch.randn(3, 2, dtype=torch.float64) @ torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64)).Q.T
        units = g / g.norm(dim=1, keepdim=True)
        along = torch.linalg.lstsq(units, torch.ones(3, 1, dtype=torch.float64), driver="gelsd").solution.squeeze(1)
        along = along / along.norm()
        torch.testing.assert_close(fastmtl.aggregate(g, ConFIG()).grads, (g @ along).sum() * along)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dependent_gradients_of_few_bits(dtype: torch.dtype) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        g = torch.randn(3, 3000).to(dtype)
        g = torch.cat([g, 2 * g[:1], 4 * g[1:2]])
        exact = g.double()
        along = torch.linalg.pinv(exact / exact.norm(dim=1, keepdim=True), rtol=1e-6) @ torch.ones(5).double()
        expected = (exact @ along).sum() / along.square().sum() * along
        out = fastmtl.aggregate(g, ConFIG()).grads.double()
        assert (out - expected).norm() <= (0.02 if dtype == torch.bfloat16 else 1e-4) * expected.norm()


def test_groups_masks_and_what_is_not_finite() -> None:
    g = torch.randn(3, 4, 9, dtype=torch.float64)
    m = g @ g.mT
    mask = torch.tensor([[True] * 4, [True, False, True, True], [False] * 4])
    method = ConFIG([1, 2, 3, 4])
    found = method(m, mask=mask)
    torch.testing.assert_close(found[0], method(m[0]))
    few = ConFIG([1, 3, 4])(m[1][[0, 2, 3]][:, [0, 2, 3]])
    torch.testing.assert_close(found[1], torch.stack([few[0], few[0] * 0, few[1], few[2]]))
    assert found[2].tolist() == [0] * 4
    m[0, 1, 1] = float("inf")
    assert method(m, mask=mask)[0].isnan().all()
    assert method(m, mask=mask)[1].isfinite().all()


def test_errors() -> None:
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"preference": 1.0}, TypeError, "preference: expected one number per task, found 1.0"),
        ({"preference": [0, 0]}, ValueError, "preference: expected a task that counts"),
    ]
    for options, error, message in bad:
        with pytest.raises(error, match=message):
            ConFIG(**options)
    with pytest.raises(ValueError, match="preference: one for each of 3 tasks, but this step has 2"):
        ConFIG([1, 1, 1])(torch.eye(2))
