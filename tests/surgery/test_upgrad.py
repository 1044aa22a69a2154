"""UPGrad: what its paper promises beyond what tests/surgery/test_dual_cone.py has."""

from __future__ import annotations

import pytest
import torch

import fastmtl
from fastmtl import UPGrad
from tests.samplers import SAMPLERS, Sampler, random
from tests.surgery.test_dual_cone import jacobian_of


@pytest.mark.parametrize("num_tasks", [2, 5, 24])
def test_linear_under_scaling(num_tasks: int) -> None:
    """A(diag(c) J) is linear in c > 0: each gradient has an influence proportional to its length."""
    jacobian = jacobian_of(random, num_tasks, 1)
    a, b = (torch.rand(num_tasks, 1, dtype=torch.float64) + 0.01 for _ in range(2))
    of_a, of_b, of_both = (fastmtl.aggregate(c * jacobian, UPGrad()).grads for c in (a, b, 2 * a + 3 * b))
    torch.testing.assert_close(of_both, 2 * of_a + 3 * of_b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_weighted_sum_of_tasks_taken_one_by_one(sampler: Sampler) -> None:
    jacobian = jacobian_of(sampler, 6, 2)
    single = torch.stack([fastmtl.aggregate(jacobian, UPGrad(torch.eye(6)[t])).grads for t in range(6)])
    torch.testing.assert_close(fastmtl.aggregate(jacobian, UPGrad()).grads, single.mean(0))
    preference = torch.rand(6, dtype=torch.float64)
    torch.testing.assert_close(fastmtl.aggregate(jacobian, UPGrad(preference)).grads, preference @ single)


def test_two_tasks_in_closed_form() -> None:
    """Each gradient loses what opposes the other, as PCGrad's does; and the mean of both is taken."""
    for seed in range(8):
        jacobian = jacobian_of(random, 2, seed)
        a, b = jacobian
        less = torch.clamp(-(a @ b), min=0)
        expected = (a + less / (b @ b) * b + b + less / (a @ a) * a) / 2
        torch.testing.assert_close(fastmtl.aggregate(jacobian, UPGrad()).grads, expected)
        pcgrad = fastmtl.aggregate(jacobian, fastmtl.PCGrad(reduction="mean")).weights
        torch.testing.assert_close(fastmtl.aggregate(jacobian, UPGrad()).weights, pcgrad)


@pytest.mark.parametrize("num_tasks", [128, 256])
def test_many_tasks(num_tasks: int) -> None:
    jacobian = jacobian_of(random, num_tasks, 3)
    direction = fastmtl.aggregate(jacobian, UPGrad()).grads
    assert ((jacobian @ direction) >= -1e-11 * jacobian.norm(dim=1) * direction.norm()).all()
