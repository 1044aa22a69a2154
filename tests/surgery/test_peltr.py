"""PELTR: exact by its properties and SciPy, relaxed against the article's construction. (The solver: tests/solvers.)"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize, nnls
from torch import Tensor

import fastmtl
from fastmtl import MGDA, PELTR
from tests.asserts import (
    assert_invariant_under_permutation,
    assert_invariant_under_scaling,
    assert_on_simplex,
    assert_untouched,
)
from tests.samplers import FULL_RANK, SAMPLERS, Sampler, nearly_parallel, random, rank_deficient, with_norms

SOLVERS = ["exact", "relaxed"]
BOUNDS = {2: (0.7, 0.2), 3: (0.1, 0.0, 0.6), 5: (0.05, 0.3, 0.0, 0.1, 0.1)}


def gramian_of(sampler: Sampler, num_tasks: int, seed: int = 0, spread: float = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    g = with_norms(rng, sampler(rng, num_tasks), spread)
    return torch.from_numpy((g @ g.T + (g @ g.T).T) / 2)


def article(m: NDArray[np.float64], c: NDArray[np.float64]) -> NDArray[np.float64]:
    """PECsolver as published: the optimality system by its normal equations, then the projection by SciPy."""
    n = len(m)
    m = m / m.max()  # for the normal equations' sake
    system = np.block([[m, np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]])
    right = np.append(-m @ c, 1 - c.sum())
    relaxed = np.linalg.solve(system.T @ system, system.T @ right)[:n]
    found = minimize(
        lambda x: ((x - relaxed) ** 2).sum(),
        nnls(np.eye(n), relaxed)[0],
        jac=lambda x: 2 * (x - relaxed),
        bounds=[(0, None)] * n,
        constraints={"type": "eq", "fun": lambda x: x.sum() - (1 - c.sum()), "jac": lambda x: np.ones(n)},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    projected: NDArray[np.float64] = found.x + c
    return projected


@pytest.mark.parametrize("num_tasks", BOUNDS)
@pytest.mark.parametrize("sampler", [f for f in FULL_RANK.values() if f.__name__ != "nearly_parallel"])
def test_relaxed_is_the_article(sampler: Sampler, num_tasks: int) -> None:
    bounds = BOUNDS[num_tasks]
    for seed in range(8):
        m = gramian_of(sampler, num_tasks, seed)
        found = PELTR(bounds, "relaxed")(m)
        np.testing.assert_allclose(found, article(m.numpy(), np.array(bounds)), rtol=0, atol=1e-5)


def test_for_two_tasks_both_agree() -> None:
    for sampler in SAMPLERS.values():
        if sampler is nearly_parallel:  # below
            continue
        for seed in range(5):
            m = gramian_of(sampler, 2, seed)
            exact, relaxed = (PELTR((0.1, 0.3), solver)(m) for solver in SOLVERS)
            square = [float(w @ m @ w) for w in (exact, relaxed)]
            assert square[0] == pytest.approx(square[1], rel=1e-9, abs=1e-12 * float(m.trace()))
            if sampler is random:
                torch.testing.assert_close(exact, relaxed, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("num_tasks", "size"), [(3, 1), (5, 3), (64, 32), (512, 100)])
def test_relaxed_does_not_invert_the_rounding_of_float32(num_tasks: int, size: int) -> None:
    method = PELTR(0.5 / num_tasks, "relaxed")
    for spread in (0, 2):
        norms = 10 ** (spread * torch.rand(num_tasks, 1))
        g = norms * torch.randn(num_tasks, size)
        few, many = method(g @ g.T), method(g.double() @ g.double().T)
        torch.testing.assert_close(few, many, rtol=1e-4, atol=1e-4 / num_tasks)


def test_relaxed_is_optimal_where_one_gradient_lies_between_two() -> None:
    for dtype in (torch.float32, torch.float64):
        g = torch.randn(2, 1000, dtype=dtype)
        g = torch.cat([g, g.mean(0, keepdim=True)])
        found, best = (fastmtl.aggregate(g, PELTR(0.1, solver)) for solver in ("relaxed", "exact"))
        assert (found.weights > 0.1 + 1e-3).all()  # no bound is active
        torch.testing.assert_close(found.grads, best.grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("angle", [1e-8, 1e-4, 1e-3, 3e-3, 0.1])
def test_relaxed_of_nearly_parallel_gradients(angle: float) -> None:
    """What the cutoff costs: as much of the norm as the gradients differ by, and no more than 0.002."""
    for difference in (0.0, angle, 3 * angle, 1.0):
        x, y = (1 + difference) * math.cos(angle), (1 + difference) * math.sin(angle)
        g = torch.tensor([[1, 0], [x, y]], dtype=torch.float64)
        exact, relaxed = (float((PELTR((0.1, 0.2), solver)(g @ g.T) @ g).norm()) for solver in SOLVERS)
        assert relaxed == pytest.approx(exact, rel=min(2 * angle, 2e-3) if angle < 2e-3 else 1e-9)


def test_relaxed_of_very_different_norms() -> None:
    squared = torch.tensor([1, 1e-20, 4e-20], dtype=torch.float64)
    assert PELTR(0, "relaxed")(squared.diag()).tolist() == pytest.approx([0, 0.8, 0.2], abs=1e-12)
    squared = torch.tensor([1e300, 0, 1e-300], dtype=torch.float64)
    assert PELTR(0.1, "relaxed")(squared.diag()).tolist() == pytest.approx([0.1, 0.8, 0.1], abs=1e-12)


def test_for_more_tasks_relaxed_is_longer() -> None:
    shorter = 0
    for sampler in SAMPLERS.values():
        for num_tasks, bounds in BOUNDS.items():
            for spread in (0, 2):
                m = gramian_of(sampler, num_tasks, 1, spread)
                exact, relaxed = (float(w @ m @ w) for w in (PELTR(bounds, solver)(m) for solver in SOLVERS))
                assert exact <= relaxed + 1e-12 * float(m.diagonal().max())
                shorter += exact < 0.99 * relaxed
    assert shorter > 10


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_no_task_below_its_bound(sampler: Sampler, solver: str) -> None:
    for num_tasks, bounds in BOUNDS.items():
        for spread in (0, 4):
            weights = PELTR(bounds, solver)(gramian_of(sampler, num_tasks, 2, spread))
            assert_on_simplex(weights)
            assert (weights >= torch.tensor(bounds, dtype=torch.float64) - 1e-15).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_properties(solver: str) -> None:
    method = PELTR(0.1, solver)
    samples = [gramian_of(random, 5)]
    if solver == "relaxed":  # whose weights are unique also for dependent gradients
        dependent = gramian_of(rank_deficient, 5, spread=2)
        dependent[2] = dependent[:, 2] = 0
        samples += [dependent, dependent.float().double()]
    for m in samples:
        assert_invariant_under_permutation(method, m, torch.randperm(5))
        for factor in (1e-9, 1e6):
            assert_invariant_under_scaling(method, m, factor)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 6])
def test_identical_zero_and_opposite_gradients(num_tasks: int, solver: str) -> None:
    """Where the article's system is singular."""
    g = torch.randn(7, dtype=torch.float64)
    signs = torch.ones(num_tasks, dtype=torch.float64)
    signs[1::2] = -1
    for jacobian in (g.expand(num_tasks, 7), torch.zeros(num_tasks, 7), signs.unsqueeze(1) * g):
        weights = fastmtl.aggregate(jacobian, PELTR(0.5 / num_tasks, solver)).weights
        assert_on_simplex(weights)
        assert (weights >= 0.5 / num_tasks - 1e-15).all()
    opposite = fastmtl.aggregate(signs.unsqueeze(1) * g, PELTR(0.5 / num_tasks, solver))
    if num_tasks > 1:
        assert opposite.grads.norm() <= 1e-12
    same = fastmtl.aggregate(g.expand(num_tasks, 7), PELTR(0.5 / num_tasks, solver))
    torch.testing.assert_close(same.grads, g)


def test_options() -> None:
    m = gramian_of(random, 3)
    bounds = BOUNDS[3]
    assert PELTR()(m).tolist() == MGDA()(m).tolist()
    assert PELTR(0.2)(m).tolist() == PELTR((0.2, 0.2, 0.2))(m).tolist()
    assert PELTR(torch.tensor([0.25, 0.5, 0.0]))(m).tolist() == PELTR((0.25, 0.5, 0.0))(m).tolist()
    assert PELTR((0.25, 0.5, 0.25))(m).tolist() == [0.25, 0.5, 0.25]  # nothing left
    torch.testing.assert_close(PELTR(bounds, rescale="sum_to_num_tasks")(m), 3 * PELTR(bounds)(m))
    m = gramian_of(random, 5, spread=2)
    found = [PELTR(BOUNDS[5])(m), PELTR(BOUNDS[5], "relaxed")(m), PELTR(0.15)(m), PELTR()(m)]
    for i, a in enumerate(found):
        assert not any(torch.allclose(a, b, atol=1e-3) for b in found[:i])


@pytest.mark.parametrize("solver", SOLVERS)
def test_absent_tasks_drop_their_bound(solver: str) -> None:
    m, mask = gramian_of(random, 5), torch.tensor([True, False, True, True, False])
    rest = mask.nonzero().flatten()
    bounds = torch.tensor(BOUNDS[5], dtype=torch.float64)
    alone = PELTR(bounds[rest], solver)(m[rest][:, rest])
    m[~mask] = m[:, ~mask] = math.nan
    weights = PELTR(bounds, solver)(m, mask=mask)
    assert (weights[~mask] == 0).all()
    torch.testing.assert_close(weights[rest], alone, rtol=0, atol=1e-12)
    groups = PELTR(bounds, solver)(torch.stack([m, gramian_of(random, 5)]), mask=torch.stack([mask, mask | True]))
    torch.testing.assert_close(groups[0], weights, rtol=0, atol=1e-12)
    assert_on_simplex(groups)
    assert PELTR(bounds, solver)(m, mask=mask & False).tolist() == [0] * 5


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_gives_nan(bad: float, solver: str) -> None:
    m = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    m[0, 1, 1] = bad
    weights = PELTR(0.1, solver)(m)
    assert weights[0].isnan().all()
    assert_on_simplex(weights[1])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gramians_and_gradients_of_few_digits(dtype: torch.dtype, solver: str) -> None:
    m = gramian_of(random, 5)
    rounded = m.to(dtype)
    torch.testing.assert_close(PELTR(0.1, solver)(rounded), PELTR(0.1, solver)(rounded.double()))
    jacobian = torch.randn(5, 300).to(dtype)
    wide = jacobian.double()
    found = fastmtl.aggregate(jacobian, PELTR(0.1, solver)).weights
    torch.testing.assert_close(found, PELTR(0.1, solver)(wide @ wide.T), rtol=0, atol=1e-5)


# ---- the ways in -----------------------------------------------------------------------------------------------------


def test_heads_are_scaled() -> None:
    x, trunk = torch.randn(5, 3), torch.nn.Linear(3, 4)
    heads = torch.nn.ModuleList(torch.nn.Linear(4, 1) for _ in range(3))

    def losses() -> list[Tensor]:
        return [head(trunk(x)).pow(2).mean() for head in heads]

    for scale_heads in (True, False):
        torch.nn.ModuleList([trunk, heads]).zero_grad()
        out = fastmtl.backward(losses(), PELTR(BOUNDS[3], scale_heads=scale_heads), shared_params=trunk)
        weights = out.weights.float() if scale_heads else torch.ones(3)
        for w, head, loss in zip(weights, heads, losses(), strict=True):
            (plain,) = torch.autograd.grad(loss, head.weight)
            torch.testing.assert_close(head.weight.grad, w * plain)
    assert PELTR().scale_heads


@pytest.mark.parametrize("solver", SOLVERS)
def test_in_the_layer(solver: str) -> None:
    with pytest.raises(ValueError, match="scale_heads=False"):
        fastmtl.FeatureSurgery(PELTR(0.1), num_tasks=3)
    method = PELTR(BOUNDS[3], solver, scale_heads=False)
    surgery = fastmtl.FeatureSurgery(method, num_tasks=3)
    z, heads = torch.randn(5, 4, requires_grad=True), torch.randn(3, 4)
    surgery.total([(zt * h).sum().pow(2) for zt, h in zip(surgery(z), heads, strict=True)]).backward()
    rows = torch.stack([torch.autograd.grad((z * h).sum().pow(2), z)[0].flatten() for h in heads]).double()
    expected = method(rows @ rows.T) @ rows
    torch.testing.assert_close(z.grad, expected.float().view(5, 4), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_batch_per_task(solver: str) -> None:
    model, rows = torch.nn.Linear(4, 1), fastmtl.TaskGradients
    store, jacobian = rows(model, num_tasks=3), []
    for t in range(3):
        x = torch.randn(6, 4)
        store.backward(t, model(x).pow(2).mean())
        grads = torch.autograd.grad(model(x).pow(2).mean(), list(model.parameters()))
        jacobian.append(torch.cat([g.flatten() for g in grads]).double())
    method = PELTR(BOUNDS[3], solver, scale_heads=False)
    store.combine(method)
    g = torch.stack(jacobian)
    expected = (method(g @ g.T) @ g).float()
    torch.testing.assert_close(
        torch.cat([p.grad.flatten() for p in model.parameters()]), expected, rtol=1e-4, atol=1e-5
    )


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((0.1, -0.2), r"lower_bounds of task 1: expected a number in \[0, 1\], found -0.2"),
        (-0.1, r"lower_bounds: expected a number in \[0, 1\], found -0.1$"),
        ((math.nan, 0.0), "lower_bounds of task 0: .* found nan"),
        ([], r"lower_bounds: expected a number, or one per task, found \[\]"),
        ((0.5, 0.6), r"lower_bounds: expected a sum of at most 1, found 1.1 for 2 tasks"),
    ],
)
def test_wrong_bounds(bounds: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PELTR(bounds)


def test_bounds_that_do_not_fit_the_tasks() -> None:
    m = torch.eye(3)
    for method, message in (
        (PELTR((0.1, 0.2)), "lower_bounds: one for each of 2 tasks, but this step has 3"),
        (PELTR(0.4), r"expected a sum of at most 1, found 1.2 for 3 tasks"),
    ):
        for _ in range(2):
            with pytest.raises(ValueError, match=message), assert_untouched(method):
                method(m)
    assert PELTR(1 / 3)(m).tolist() == pytest.approx([1 / 3] * 3)
    with pytest.raises(ValueError, match="solver: expected 'exact' or 'relaxed', found 'nnls'"):
        PELTR(0.1, "nnls")


def test_it_has_no_state() -> None:
    method = PELTR(0.1)
    method(torch.eye(3))
    assert not method.state_dict()
