"""IMTLG by what its paper promises, and against its closed form. (On all kinds of Gramians: tests/solvers.)"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastmtl
from fastmtl import IMTLG, ConFIG
from tests.asserts import assert_invariant_under_permutation, assert_invariant_under_scaling


def jacobian(num_tasks: int = 5, dim: int = 20) -> Tensor:
    lengths = torch.logspace(-0.5, 0.5, num_tasks, dtype=torch.float64).unsqueeze(1)
    return lengths * torch.randn(num_tasks, dim, dtype=torch.float64)


def papers_closed_form(g: Tensor) -> Tensor:
    """Section 3.1: alpha_2.. = g_1 U^T (D U^T)^-1, alpha_1 = 1 - their sum."""
    units = g / g.norm(dim=1, keepdim=True)
    d, u = g[:1] - g[1:], units[:1] - units[1:]
    rest = g[0] @ u.T @ torch.linalg.inv(d @ u.T)
    return torch.cat([1 - rest.sum().unsqueeze(0), rest])


@pytest.mark.parametrize("num_tasks", [2, 3, 8, 32, 128])
def test_the_papers_closed_form(num_tasks: int) -> None:
    for _ in range(5):
        g = jacobian(num_tasks, 2 * num_tasks + 5)
        out = fastmtl.aggregate(g, IMTLG())
        torch.testing.assert_close(out.weights, papers_closed_form(g), rtol=1e-7, atol=1e-9)
        projections = g @ out.grads / g.norm(dim=1)
        torch.testing.assert_close(projections, projections[:1].expand(num_tasks))
        torch.testing.assert_close(out.weights.sum().item(), 1.0)


def test_direction_is_configs_of_either_sign() -> None:
    signs = set()
    for seed in range(40):
        torch.manual_seed(seed)
        g = torch.logspace(-1, 1, 6, dtype=torch.float64).unsqueeze(1) * (torch.randn(6, 8).double() + 1)
        ours, config = fastmtl.aggregate(g, IMTLG()).grads, fastmtl.aggregate(g, ConFIG()).grads
        cosine = ours @ config / ours.norm() / config.norm()
        torch.testing.assert_close(cosine.abs().item(), 1.0)
        signs.add(float(cosine.sign()))
    assert signs == {1.0, -1.0}  # as the docstring says


def test_properties() -> None:
    g = jacobian()
    assert_invariant_under_permutation(IMTLG(), g @ g.T, torch.randperm(5))
    for factor in (1e-6, 1e6):
        assert_invariant_under_scaling(IMTLG(), g @ g.T, factor)
    assert not IMTLG().state_dict()


def test_identical_zero_and_opposite_gradients() -> None:
    one = torch.randn(7, dtype=torch.float64)
    torch.testing.assert_close(fastmtl.aggregate(torch.stack([one] * 4), IMTLG()).grads, one)
    assert fastmtl.aggregate(one.unsqueeze(0), IMTLG()).weights.tolist() == [1]
    with_zero = torch.stack([one, torch.zeros_like(one)])
    torch.testing.assert_close(fastmtl.aggregate(with_zero, IMTLG()).weights, torch.tensor([1, 0]).double())
    assert fastmtl.aggregate(0 * with_zero, IMTLG()).weights.tolist() == [0, 0]
    assert fastmtl.aggregate(torch.stack([one, -3 * one]), IMTLG()).weights.tolist() == [0, 0]


def test_a_multiple_of_another_gradient() -> None:
    """Singular, but with a solution: the projections are equal."""
    g = jacobian(4)
    g = torch.cat([g, 3 * g[:1]])
    out = fastmtl.aggregate(g, IMTLG())
    projections = g @ out.grads / g.norm(dim=1)
    torch.testing.assert_close(projections, projections[:1].expand(5))
    torch.testing.assert_close(out.weights.sum().item(), 1.0)


def test_groups_masks_and_what_is_not_finite() -> None:
    g = torch.randn(3, 4, 9, dtype=torch.float64)
    m = g @ g.mT
    mask = torch.tensor([[True] * 4, [True, False, True, True], [False] * 4])
    found = IMTLG()(m, mask=mask)
    torch.testing.assert_close(found[0], papers_closed_form(g[0]))
    few = papers_closed_form(g[1][[0, 2, 3]])
    torch.testing.assert_close(found[1], torch.stack([few[0], few[0] * 0, few[1], few[2]]))
    assert found[2].tolist() == [0] * 4
    m[0, 1, 1] = float("inf")
    assert IMTLG()(m, mask=mask)[0].isnan().all()
    assert IMTLG()(m, mask=mask)[1].isfinite().all()
