"""DualProj: what sets it apart from UPGrad. (The rest: tests/surgery/test_dual_cone.py.)"""

from __future__ import annotations

import pytest
import torch

import fastmtl
from fastmtl import DualProj
from tests.samplers import SAMPLERS, Sampler, random
from tests.surgery.test_dual_cone import jacobian_of


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_the_mean_where_it_conflicts_with_no_task_although_they_conflict(sampler: Sampler) -> None:
    jacobian = jacobian_of(sampler, 4, 1)
    jacobian = torch.cat([jacobian, 100 * jacobian.norm(dim=1, keepdim=True).max() * torch.ones(4, 1)], dim=1)
    gramian = jacobian @ jacobian.T
    assert (gramian.mean(1) >= 0).all()
    torch.testing.assert_close(DualProj()(gramian), torch.full((4,), 0.25, dtype=torch.float64))


def test_nearest_to_the_mean_of_all_that_do_not_conflict() -> None:
    """No other non-conflicting direction is nearer: the cone's points x have <x - d, d - mean> >= 0, and d itself 0."""
    for num_tasks in (2, 5, 20):
        jacobian = jacobian_of(random, num_tasks, 2)
        direction, mean = fastmtl.aggregate(jacobian, DualProj()).grads, jacobian.mean(0)
        inside = torch.linalg.pinv(jacobian) @ torch.rand(num_tasks, 50, dtype=torch.float64)
        assert (jacobian @ inside > -1e-12).all()
        assert ((inside - direction.unsqueeze(1)).T @ (direction - mean) >= -1e-10).all()
        assert abs(direction @ (direction - mean)) <= 1e-12 * float(mean @ mean)


def test_not_linear_under_scaling() -> None:
    """Unlike UPGrad's: a task that is long enough has its way."""
    jacobian = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    first, second = (
        fastmtl.aggregate(c * jacobian, DualProj()).grads
        for c in (torch.tensor([[1.0], [0.1]]), torch.tensor([[0.1], [1.0]]))
    )
    both = fastmtl.aggregate(1.1 * jacobian, DualProj()).grads
    assert not torch.allclose(first + second, both, atol=1e-2)
