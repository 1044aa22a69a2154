"""What UPGrad and DualProj promise alike. (The solver: tests/solvers.)"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

import fastmtl
from fastmtl import DualProj, UPGrad, reference
from tests.asserts import (
    assert_invariant_under_permutation,
    assert_invariant_under_scaling,
    assert_non_conflicting,
    assert_untouched,
)
from tests.samplers import SAMPLERS, Sampler, random, with_norms

METHODS = [UPGrad, DualProj]
Projecting = type[UPGrad] | type[DualProj]


def jacobian_of(sampler: Sampler, num_tasks: int, seed: int = 0, spread: float = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(with_norms(rng, sampler(rng, num_tasks), spread))


def project(jacobian: Tensor, point: Tensor) -> Tensor:
    """The nearest direction that conflicts with none of the rows, by SciPy's general solver."""
    rows, p = jacobian.numpy(), point.numpy()
    found = minimize(
        lambda x: ((x - p) ** 2).sum(),
        p,
        jac=lambda x: 2 * (x - p),
        constraints={"type": "ineq", "fun": lambda x: rows @ x, "jac": lambda x: rows},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert (rows @ found.x).min() >= -1e-6  # it may stop for want of digits, but there
    return torch.from_numpy(found.x)


def literally(method: Projecting, jacobian: Tensor, preference: Sequence[float]) -> Tensor:
    """The papers' definitions on the gradients themselves."""
    shares = torch.tensor(preference, dtype=torch.float64)
    if method is DualProj:
        return project(jacobian, shares @ jacobian)
    return shares @ torch.stack([project(jacobian, g) for g in jacobian])


@pytest.mark.parametrize("num_tasks", [2, 3, 6])
@pytest.mark.parametrize("method", METHODS)
def test_its_definition(method: Projecting, num_tasks: int) -> None:
    for seed in range(4):
        jacobian = jacobian_of(random, num_tasks, seed)
        preference = torch.rand(num_tasks).tolist()
        for found, shares in ((method(), [1 / num_tasks] * num_tasks), (method(preference), preference)):
            direction = fastmtl.aggregate(jacobian, found).grads
            torch.testing.assert_close(direction, literally(method, jacobian, shares), rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_tasks", [1, 2, 8, 32])
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("method", METHODS)
def test_never_conflicts(method: Projecting, sampler: Sampler, num_tasks: int) -> None:
    """Relative to the gradients: where the cone is narrow, next to nothing is left of them."""
    for spread in (0, 3):
        jacobian = jacobian_of(sampler, num_tasks, 3, spread)
        out = fastmtl.aggregate(jacobian, method(noise=0))
        assert (out.weights >= 0).all()
        norms = jacobian.norm(dim=1).clamp(min=1e-300)
        conflict = -(jacobian @ out.grads) / norms
        assert conflict.max() <= 1e-12 * (out.weights @ norms + norms.max()) ** 2 / norms.max()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_tasks", [2, 32, 100])
def test_never_conflicts_at_all_where_rank_is_full(method: Projecting, num_tasks: int) -> None:
    jacobian = jacobian_of(random, num_tasks, 4, 2)
    assert_non_conflicting(jacobian, fastmtl.aggregate(jacobian, method()).grads, 1e-11)


@pytest.mark.parametrize("num_tasks", [1, 2, 32, 512])
@pytest.mark.parametrize("method", METHODS)
def test_without_conflict_it_is_the_mean(method: Projecting, num_tasks: int) -> None:
    jacobian = torch.rand(num_tasks, 20, dtype=torch.float64)
    out = fastmtl.aggregate(jacobian, method())
    assert out.weights.tolist() == [1 / num_tasks] * num_tasks
    preference = torch.rand(num_tasks, dtype=torch.float64)
    assert fastmtl.aggregate(jacobian, method(preference)).weights.tolist() == preference.tolist()


@pytest.mark.parametrize("method", METHODS)
def test_linear_in_the_preference_of_one_task(method: Projecting) -> None:
    jacobian = jacobian_of(random, 5, 5)
    for t in range(5):
        alone = torch.eye(5)[t].tolist()
        one, three = (fastmtl.aggregate(jacobian, method([c * x for x in alone])).weights for c in (1.0, 3.0))
        torch.testing.assert_close(three, 3 * one)
        torch.testing.assert_close(one @ jacobian, project(jacobian, jacobian[t]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_permutation_and_scale(method: Projecting) -> None:
    for num_tasks in (2, 7, 40):
        jacobian = jacobian_of(random, num_tasks, 6)
        gramian = jacobian @ jacobian.T
        assert_invariant_under_permutation(method(), gramian, torch.randperm(num_tasks))
        for factor in (1e-6, 1e6):
            assert_invariant_under_scaling(method(), gramian, factor)


@pytest.mark.parametrize("method", METHODS)
def test_one_task_identical_opposite_and_zero_gradients(method: Projecting) -> None:
    g = torch.randn(9, dtype=torch.float64)
    assert fastmtl.aggregate(g.unsqueeze(0), method()).weights.tolist() == [1]
    for num_tasks in (2, 3, 8):
        torch.testing.assert_close(fastmtl.aggregate(g.expand(num_tasks, 9), method()).grads, g)
    torch.testing.assert_close(fastmtl.aggregate(torch.stack([g, -2 * g]), method()).grads, 0 * g)
    torch.testing.assert_close(fastmtl.aggregate(torch.stack([g, 0 * g]), method()).grads, g / 2)
    assert fastmtl.aggregate(torch.zeros(3, 4), method()).grads.tolist() == [0] * 4


@pytest.mark.parametrize("preference", [None, (1.0, 2.0, 0.0, 4.0)])
@pytest.mark.parametrize("method", METHODS)
def test_absent_tasks_and_groups(method: Projecting, preference: tuple | None) -> None:
    stack = torch.stack([jacobian_of(random, 4, seed) for seed in range(3)])
    gramians = stack @ stack.mT
    mask = torch.tensor([[True, True, True, True], [True, False, True, True], [False] * 4])
    gramians[1, 1] = gramians[1, :, 1] = math.nan
    gramians[2] = math.nan
    weights = method(preference)(gramians, mask=mask)
    torch.testing.assert_close(weights[0], method(preference)(gramians[0]))
    rest = [0, 2, 3]
    alone = method(None if preference is None else [preference[t] for t in rest])(gramians[1][rest][:, rest])
    torch.testing.assert_close(weights[1, rest], alone)
    assert weights[1, 1] == 0
    assert weights[2].tolist() == [0] * 4


@pytest.mark.parametrize("method", METHODS)
def test_not_finite(method: Projecting) -> None:
    gramians = torch.stack([torch.eye(3)] * 2)
    gramians[1, 0, 2] = gramians[1, 2, 0] = math.inf
    weights = method()(gramians)
    assert weights[0].isfinite().all()
    assert weights[1].isnan().all()


@pytest.mark.parametrize("method", METHODS)
def test_without_the_extension(method: Projecting, monkeypatch: pytest.MonkeyPatch) -> None:
    jacobian = torch.stack([jacobian_of(random, 6, seed) for seed in range(2)])
    gramians, mask = jacobian @ jacobian.mT, torch.tensor([[True] * 6, [True, False] * 3])
    expected = method()(gramians, mask=mask)
    monkeypatch.setattr(fastmtl.ops._extension, "kernels_on", lambda device: False)
    monkeypatch.setattr(torch.ops.fastmtl, "dual_cone", None)
    torch.testing.assert_close(method()(gramians, mask=mask), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_in_float32_that_depend_on_each_other(method: Projecting) -> None:
    """The rounding of their products is not taken for directions of its own, as it is with ``noise=0``."""
    worst = {0.0: 0.0, 5e-7: 0.0}
    for seed in range(30):
        rng = np.random.default_rng(seed)
        few = torch.from_numpy(rng.standard_normal((3, 1000)))
        jacobian = torch.from_numpy(rng.standard_normal((8, 3))) @ few
        gramian = reference.gram(jacobian.float())[0]
        rounded = gramian + torch.randn(8, 8, dtype=torch.float64).triu() * 1e-7 * gramian.diagonal().mean()
        rounded = rounded.triu() + rounded.triu(1).T
        for noise in worst:
            direction = method(noise=noise)(rounded) @ jacobian
            conflicts = -(jacobian @ direction) / jacobian.norm(dim=1)
            worst[noise] = max(worst[noise], float(conflicts.max() / jacobian.norm(dim=1).mean()))
    assert worst[5e-7] <= 2e-3  # the square root of 8 * 5e-7
    assert worst[5e-7] <= worst[0.0]


@pytest.mark.parametrize("method", METHODS)
def test_no_state(method: Projecting) -> None:
    found = method([1, 2, 3])
    assert not found.state_dict()
    with assert_untouched(found):
        found(torch.eye(3))
    with pytest.raises(ValueError, match="preference: one for each of 3 tasks, but this step has 2"):
        found(torch.eye(2))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"preference": 0.5}, TypeError, "preference: expected one number per task, found 0.5"),
        ({"preference": [1, -1]}, ValueError, "preference of task 1: .* found -1"),
        ({"preference": [0, 0]}, ValueError, "preference: expected a task that counts"),
        ({"noise": -1e-7}, ValueError, r"noise: expected a number in \[0, 1\], found -1e-07"),
        ({"noise": None}, TypeError, "noise: expected a number, found None"),
        ({"rescale": "all"}, ValueError, "rescale"),
    ],
)
def test_errors(method: Projecting, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        method(**options)
