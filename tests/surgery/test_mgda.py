"""MGDA by its properties, and against SciPy's general-purpose solver. (The solver itself: tests/solvers.)"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

import fastmtl
from fastmtl import MGDA
from tests.asserts import (
    assert_invariant_under_permutation,
    assert_invariant_under_scaling,
    assert_non_conflicting,
    assert_on_simplex,
)


def jacobians() -> list[Tensor]:
    """Conflict, agreement, more tasks than dimensions, sizes far apart, a Pareto-stationary point, a duplicate."""
    g = torch.randn(6, 20, dtype=torch.float64)
    stationary = torch.cat([g[:5], -(torch.rand(5, dtype=torch.float64) @ g[:5]).unsqueeze(0)])
    sizes = torch.logspace(-3, 3, 6, dtype=torch.float64).unsqueeze(1)
    return [g, g.abs(), torch.randn(12, 3, dtype=torch.float64), g * sizes, stationary, torch.cat([g, g[:1]])]


@pytest.mark.parametrize("case", range(6))
def test_direction_conflicts_with_nobody(case: int) -> None:
    jacobian = jacobians()[case]
    out = fastmtl.aggregate(jacobian, MGDA())
    assert_on_simplex(out.weights)
    if case != 2 and case != 4:  # there the direction is 0 up to rounding
        assert_non_conflicting(jacobian, out.grads)
    products, square = jacobian @ out.grads, out.grads @ out.grads
    scale = jacobian.norm(dim=1).max() * jacobian.norm(dim=1).min()
    assert (products >= square - 1e-9 * scale).all()  # the optimality condition of the min-norm point


@pytest.mark.parametrize("case", range(6))
def test_not_longer_than_what_scipy_finds(case: int) -> None:
    jacobian = jacobians()[case]
    m = (jacobian @ jacobian.T).numpy()
    scale = np.diag(m).min()
    n = len(m)
    found = minimize(
        lambda w: w @ m @ w / scale,
        np.full(n, 1 / n),
        jac=lambda w: 2 * m @ w / scale,
        bounds=[(0, 1)] * n,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(n)},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    ours = MGDA()(torch.from_numpy(m)).numpy()
    assert ours @ m @ ours <= found.fun * scale + 1e-9 * scale


def test_properties() -> None:
    jacobian = jacobians()[0]
    gramian = jacobian @ jacobian.T
    assert_invariant_under_permutation(MGDA(), gramian, torch.randperm(6))
    for factor in (1e-6, 1e6):
        assert_invariant_under_scaling(MGDA(), gramian, factor)


def test_two_tasks_in_closed_form() -> None:
    for _ in range(20):
        a, b = torch.randn(2, 3, dtype=torch.float64)
        w = float(((b - a) @ b / (a - b).pow(2).sum()).clamp(0, 1))
        weights = fastmtl.aggregate(torch.stack([a, b]), MGDA()).weights
        torch.testing.assert_close(weights, torch.tensor([w, 1 - w], dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_a_zero_gradient_takes_all_the_weight() -> None:
    jacobian = torch.randn(4, 9, dtype=torch.float64)
    jacobian[2] = 0
    assert fastmtl.aggregate(jacobian, MGDA()).weights.tolist() == [0, 0, 1, 0]


def test_one_task_identical_tasks_masked_tasks() -> None:
    g = torch.randn(9, dtype=torch.float64)
    assert fastmtl.aggregate(g.unsqueeze(0), MGDA()).weights.tolist() == [1]
    out = fastmtl.aggregate(g.expand(3, 9), MGDA())
    assert_on_simplex(out.weights)
    torch.testing.assert_close(out.grads, g)
    gramian = torch.diag(torch.tensor([1.0, math.nan, 4.0], dtype=torch.float64))
    weights = MGDA()(gramian, mask=torch.tensor([True, False, True]))
    torch.testing.assert_close(weights, torch.tensor([0.8, 0.0, 0.2], dtype=torch.float64))


def test_it_has_no_state() -> None:
    assert not MGDA("frank_wolfe", normalization="loss+").state_dict()


# ---- options ---------------------------------------------------------------------------------------------------------

OPTIONS: list[dict] = [
    {},
    {"solver": "frank_wolfe"},
    {"solver": "frank_wolfe", "max_iter": 2},
    {"solver": "frank_wolfe", "tol": 0.2},
    {"solver": "frank_wolfe", "start": "pair"},
    {"normalization": "l2"},
    {"normalization": "loss"},
    {"normalization": "loss+"},
    {"normalization": "loss", "apply_to": "normalized"},
    {"normalization": "l2", "rescale": "sum_to_num_tasks"},
]


def test_every_option_makes_a_difference() -> None:
    jacobian = jacobians()[0] * torch.linspace(0.5, 2, 6, dtype=torch.float64).unsqueeze(1)
    losses = torch.linspace(3, 0.5, 6, dtype=torch.float64)
    found = [MGDA(**options)(jacobian @ jacobian.T, losses=losses) for options in OPTIONS]
    for i, a in enumerate(found):
        assert not any(torch.allclose(a, b, atol=1e-6) for b in found[:i]), OPTIONS[i]


def divided(jacobian: Tensor, losses: Tensor, normalization: str) -> Tensor:
    """The rows as the paper's code normalises them, literally."""
    rows = []
    for g, loss in zip(jacobian, losses, strict=True):
        gn = {"none": 1, "l2": g.norm(), "loss": loss, "loss+": loss * g.norm()}[normalization]
        rows.append(g / gn)
    return torch.stack(rows)


@pytest.mark.parametrize("solver", ["exact", "frank_wolfe"])
@pytest.mark.parametrize("normalization", ["none", "l2", "loss", "loss+"])
def test_normalized_gradients_are_what_is_solved(normalization: str, solver: str) -> None:
    for jacobian in jacobians()[:4]:
        losses = torch.rand(len(jacobian), dtype=torch.float64) + 0.1
        rows = divided(jacobian, losses, normalization)
        expected = MGDA(solver)(rows @ rows.T)
        raw = MGDA(solver, normalization=normalization)(jacobian @ jacobian.T, losses=losses)
        torch.testing.assert_close(raw @ rows, expected @ rows, rtol=0, atol=1e-9 * float(rows.norm()))
        if normalization == "none":
            continue
        scaled = MGDA(solver, normalization=normalization, apply_to="normalized")
        found = scaled(jacobian @ jacobian.T, losses=losses)
        torch.testing.assert_close(found @ jacobian, expected @ rows, rtol=0, atol=1e-9 * float(rows.norm()))


@pytest.mark.parametrize("normalization", ["l2", "loss+"])
def test_normalizing_by_the_norm_forgets_it(normalization: str) -> None:
    jacobian, sizes = jacobians()[0], torch.logspace(-3, 3, 6, dtype=torch.float64).unsqueeze(1)
    method, losses = MGDA(normalization=normalization), torch.linspace(1, 2, 6, dtype=torch.float64)
    before, after = (method(g @ g.T, losses=losses) for g in (jacobian, jacobian * sizes))
    torch.testing.assert_close(before, after, rtol=0, atol=1e-9)


@pytest.mark.parametrize("apply_to", ["raw", "normalized"])
@pytest.mark.parametrize("normalization", ["l2", "loss", "loss+"])
def test_zeros_negative_losses_and_absent_tasks(normalization: str, apply_to: str) -> None:
    method = MGDA(normalization=normalization, apply_to=apply_to)
    jacobian = torch.randn(4, 9, dtype=torch.float64)
    losses = torch.tensor([1.0, 0.0, -2.0, 3.0], dtype=torch.float64)
    ones = torch.tensor([1.0, 1.0, 2.0, 3.0])  # a loss of 0 does not divide
    positive = method(jacobian @ jacobian.T, losses=ones)
    assert positive.isfinite().all()
    torch.testing.assert_close(method(jacobian @ jacobian.T, losses=losses), positive)
    jacobian[2] = 0
    weights = method(jacobian @ jacobian.T, losses=losses)
    assert weights.isfinite().all()
    assert (weights > 0).tolist() == [False, False, True, False]
    rest, mask = [0, 2, 3], torch.tensor([True, False, True, True])
    jacobian[2] = 1
    gramian = jacobian @ jacobian.T
    alone = method(gramian[rest][:, rest], losses=losses[rest])
    gramian[1] = gramian[:, 1] = losses[1] = math.nan
    weights = method(gramian, losses=losses, mask=mask)
    assert weights[1] == 0
    torch.testing.assert_close(weights[rest], alone)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("normalization", ["l2", "loss", "loss+"])
def test_what_is_not_finite_gives_nan(normalization: str, bad: float) -> None:
    method, gramian = MGDA(normalization=normalization), torch.eye(3, dtype=torch.float64)
    if method.needs_losses:
        assert method(gramian, losses=torch.tensor([1.0, bad, 1.0])).isnan().all()
    gramian[0, 0] = bad
    assert method(gramian, losses=torch.ones(3)).isnan().all()


def test_losses_only_where_they_are_needed() -> None:
    gramian = torch.eye(2)
    for normalization in ("none", "l2"):
        assert MGDA(normalization=normalization)(gramian).isfinite().all()
    for normalization in ("loss", "loss+"):
        with pytest.raises(ValueError, match="losses: MGDA needs the values"):
            MGDA(normalization=normalization)(gramian)


@pytest.mark.parametrize("normalization", ["none", "loss+"])
def test_scaled_heads(normalization: str) -> None:
    """Each head's gradient is multiplied by its task's weight, as if sum w_t L_t were the loss."""
    x, trunk = torch.randn(5, 3), torch.nn.Linear(3, 4)
    heads = torch.nn.ModuleList(torch.nn.Linear(4, 1) for _ in range(3))

    def losses() -> list[Tensor]:
        return [head(trunk(x)).pow(2).mean() for head in heads]

    for scale_heads in (False, True):
        torch.nn.ModuleList([trunk, heads]).zero_grad()
        method = MGDA(normalization=normalization, scale_heads=scale_heads)
        out = fastmtl.backward(losses(), method, shared_params=trunk)
        weights = out.weights.float() if scale_heads else torch.ones(3)
        for w, head, loss in zip(weights, heads, losses(), strict=True):
            (plain,) = torch.autograd.grad(loss, head.weight)
            torch.testing.assert_close(head.weight.grad, w * plain)
    with pytest.raises(ValueError, match="scale_heads=False"):
        fastmtl.FeatureSurgery(MGDA(scale_heads=True), num_tasks=3)


def test_ub_with_losses_in_the_layer() -> None:
    """On the representation, flattened over the batch, and with the losses handed on."""
    z, method = torch.randn(5, 4, requires_grad=True), MGDA("frank_wolfe", normalization="loss+")
    surgery = fastmtl.FeatureSurgery(method, num_tasks=2)
    heads = torch.randn(2, 4)
    surgery.total([(zt * h).sum().pow(2) for zt, h in zip(surgery(z), heads, strict=True)]).backward()
    losses = [(z * h).sum().pow(2) for h in heads]
    rows = torch.stack([torch.autograd.grad(loss, z)[0].flatten() for loss in losses]).double()
    weights = method(rows @ rows.T, losses=torch.stack(losses).detach().double())
    torch.testing.assert_close(z.grad, (weights @ rows).float().view(5, 4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "slsqp"}, "solver: expected 'exact' or 'frank_wolfe', found 'slsqp'"),
        ({"solver": "frank_wolfe", "max_iter": -1}, "max_iter: expected at least 0, found -1"),
        ({"solver": "frank_wolfe", "tol": -1.0}, r"tol: expected a number in \[0, inf\), found -1.0"),
        ({"solver": "frank_wolfe", "tol": math.inf}, "tol: .* found inf"),
        ({"solver": "frank_wolfe", "start": "random"}, "start: expected 'uniform' or 'pair', found 'random'"),
        ({"normalization": "l1"}, "normalization: expected 'none', 'l2', 'loss' or 'loss[+]', found 'l1'"),
        ({"apply_to": "both"}, "apply_to: expected 'raw' or 'normalized', found 'both'"),
        ({"max_iter": 250}, "max_iter: 250 has no effect without solver='frank_wolfe'"),
        ({"tol": 0.0}, "tol: 0.0 has no effect without solver='frank_wolfe'"),
        ({"start": "uniform"}, "start: 'uniform' has no effect without solver='frank_wolfe'"),
        ({"apply_to": "normalized"}, "apply_to: 'normalized' has no effect without a normalization"),
    ],
)
def test_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MGDA(**options)


def test_defaults_of_frank_wolfe() -> None:
    jacobian = jacobians()[0]
    gramian = jacobian @ jacobian.T
    written = MGDA("frank_wolfe", max_iter=250, tol=1e-5, start="uniform")
    assert MGDA("frank_wolfe")(gramian).tolist() == written(gramian).tolist()
