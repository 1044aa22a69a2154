"""SDMGrad and MoDo: the papers' algorithms on gradient vectors, what they tend to, and how they are fed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

import fastmtl
from fastmtl import MGDA, GradientMethod, MoDo, SDMGrad
from fastmtl.simplex import project_onto_simplex
from tests import nets
from tests.asserts import assert_on_simplex, assert_same_state, assert_untouched
from tests.nets import assert_grads, task_gradients, weighted_sum

Floats = NDArray[np.float64]
BOTH = {"SDMGrad": SDMGrad, "MoDo": MoDo}


def nearest_on_simplex(x: Floats, total: float = 1.0) -> Floats:
    """By bisection on the threshold."""
    low, high = x.min() - total - 1, x.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(x - middle, 0).sum() > total else (low, middle)
    found: Floats = np.maximum(x - high, 0)
    return found


def sdmgrad_step(w: Floats, g: Floats, p: Floats, lam: float, lr: float, momentum: float, steps: int) -> Floats:
    """Algorithm 1's inner loop on gradients ``[2, T, P]``, with momentum."""
    velocity = np.zeros_like(w)
    for _ in range(steps):
        velocity = momentum * velocity + g[0] @ (g[1].T @ w + lam * (g[1].T @ p))
        w = nearest_on_simplex(w - lr * velocity)
    return w


def batches_of(num_tasks: int, num_batches: int, size: int = 9, groups: int | None = None) -> Tensor:
    shape = (num_batches, num_tasks, size) if groups is None else (groups, num_batches, num_tasks, size)
    mean = torch.randn(*shape[:-3], 1, num_tasks, size, dtype=torch.float64)
    return mean + 0.5 * torch.randn(shape, dtype=torch.float64)


def gramian_of(g: Tensor) -> Tensor:
    flat = g.flatten(-3, -2)
    return flat @ flat.mT


@pytest.mark.parametrize("num_tasks", [1, 2, 5, 32, 512])
def test_projection(num_tasks: int) -> None:
    x = 3 * torch.randn(4, num_tasks, dtype=torch.float64)
    total = torch.tensor([[1.0], [0.3], [5.0], [0.0]], dtype=torch.float64)
    present = torch.rand(4, num_tasks) < 0.7
    present[:, 0] = True
    found = project_onto_simplex(x, present, total)
    for k in range(4):
        expected = nearest_on_simplex(x[k][present[k]].numpy(), float(total[k]))
        np.testing.assert_allclose(found[k][present[k]], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        ([3e16, 1e16, 0.0], [1.0, 0.0, 0.0]),
        ([1e17, 1e17, -1e17], [0.5, 0.5, 0.0]),
        ([-1e17, -3e17, -2e17], [1.0, 0.0, 0.0]),
        ([1e9 + 0.25, 1e9, -1e9], [0.625, 0.375, 0.0]),
        ([1e9, 0.5, 0.25], [1.0, 0.0, 0.0]),
        ([1e300, 1e300, 1e300], [1 / 3] * 3),
    ],
)
def test_projection_of_large_entries(x: list[float], expected: list[float]) -> None:
    """Also beside larger and smaller ones that are absent."""
    far = torch.tensor([[1e305, *x, -1e305, math.nan]], dtype=torch.float64)
    present = torch.tensor([[False, True, True, True, False, False]])
    found = project_onto_simplex(far, present, torch.ones(1, 1, dtype=torch.float64))
    np.testing.assert_allclose(found[present], expected, rtol=1e-15)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 20])
@pytest.mark.parametrize("preference", [False, True])
def test_sdmgrad_is_its_algorithm(num_tasks: int, preference: bool) -> None:
    p = np.arange(1.0, num_tasks + 1) if preference else np.ones(num_tasks)
    options: dict[str, Any] = {"lam": 0.4, "lr": 0.05, "momentum": 0.3, "num_steps": 7}
    method = SDMGrad(num_tasks, **options, scale_free=False, preference=p.tolist() if preference else None)
    w, p = np.full(num_tasks, 1 / num_tasks), p / p.sum()
    for _ in range(3):
        g = batches_of(num_tasks, 3)
        out = fastmtl.aggregate(g.flatten(0, 1), method)
        w = sdmgrad_step(w, g.numpy(), p, 0.4, 0.05, 0.3, 7)
        np.testing.assert_allclose(out.weights, np.r_[np.zeros(2 * num_tasks), w + 0.4 * p], rtol=0, atol=1e-12)
        np.testing.assert_allclose(out.grads, g[2].numpy().T @ (w + 0.4 * p), rtol=1e-10, atol=1e-10)


def test_sdmgrad_in_the_unit_of_the_mean_norm() -> None:
    g = batches_of(4, 3)
    norms = (g[0] * g[1]).sum(1).clamp(min=0).sqrt()
    found = SDMGrad(4)(gramian_of(g))
    plain = SDMGrad(4, scale_free=False)
    torch.testing.assert_close(found, plain(gramian_of(g) / norms.mean() ** 2))
    for factor in (1e-8, 1e8):
        torch.testing.assert_close(SDMGrad(4)(gramian_of(g) * factor), found)


@pytest.mark.parametrize("factor", [1e-200, 1e-156, 1e-4, 1.0, 1e4])
def test_sdmgrad_stays_where_no_norm_is_known(factor: float) -> None:
    """As in any unit: of noise, where no product of a gradient with itself is above 0, or of hardly any gradient."""
    g = batches_of(4, 3)
    start = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    if factor > 1e-100:
        g[1] = -g[0]
    mask = torch.ones(12, dtype=torch.bool)
    for absent, present in ((False, None), (False, mask), (True, mask)):
        mask[1] = not absent
        g[0, 1] = g[1, 1] if absent else g[0, 1]  # of this task it would be known
        method, there = SDMGrad(4), mask[:4]
        method.state("weights", g, (1, 4), 0.25).copy_(start)
        weights = method(gramian_of(g * factor), mask=present)
        torch.testing.assert_close(weights[8:], there * (start[0] / start[0, there].sum() + 0.3 / there.sum()))
        torch.testing.assert_close(method.weights, start)


@pytest.mark.parametrize("batches", [2, 3])
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 20])
def test_modo_is_its_algorithm(num_tasks: int, batches: int) -> None:
    method, w = MoDo(num_tasks, gamma=0.02, rho=0.3), np.full(num_tasks, 1 / num_tasks)
    for _ in range(4):
        g = batches_of(num_tasks, batches)
        out = fastmtl.aggregate(g.flatten(0, 1), method)
        w = nearest_on_simplex(w - 0.02 * (g[0].numpy() @ (g[1].numpy().T @ w) + 0.3 * w))
        used = g[2].numpy().T @ w if batches == 3 else g.numpy().mean(0).T @ w
        np.testing.assert_allclose(out.grads, used, rtol=1e-10, atol=1e-10)
        expected = [np.zeros(2 * num_tasks), w] if batches == 3 else [w / 2, w / 2]
        np.testing.assert_allclose(out.weights, np.concatenate(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_sdmgrad_without_noise_finds_the_nearest_direction(lam: float) -> None:
    """Equal batches: argmin |sum w_t g_t + lam g_0|^2 on the simplex; for lam = 0 MGDA."""
    for seed in range(5):
        torch.manual_seed(seed)
        g = torch.randn(1, 5, 8, dtype=torch.float64).expand(3, -1, -1)
        method = SDMGrad(5, lam=lam, num_steps=2000)
        w = method(gramian_of(g))[10:] - lam / 5
        m = g[0].numpy() @ g[0].numpy().T
        p = np.full(5, 0.2)

        def square(w: Floats, m: Floats = m, p: Floats = p) -> float:
            return float((w + lam * p) @ m @ (w + lam * p))

        best = minimize(
            square,
            p,
            bounds=[(0, None)] * 5,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert square(w.numpy()) <= best.fun * (1 + 1e-6) + 1e-9
        if lam == 0:
            torch.testing.assert_close(w, MGDA()(torch.from_numpy(m)), rtol=0, atol=1e-6)


def test_modo_without_noise_tends_to_mgda() -> None:
    g = torch.randn(1, 4, 8, dtype=torch.float64).expand(3, -1, -1)
    method = MoDo(4, gamma=0.02, rho=0.0)
    for _ in range(4000):
        weights = method(gramian_of(g))
    torch.testing.assert_close(weights[8:], MGDA()(g[0] @ g[0].T), rtol=0, atol=1e-6)


def test_a_large_lam_is_the_weighted_sum() -> None:
    weights = SDMGrad(2, lam=1e9, preference=[3, 1])(gramian_of(batches_of(2, 3)))
    torch.testing.assert_close(weights[4:] / 1e9, torch.tensor([0.75, 0.25], dtype=torch.float64))


def test_rescale_is_of_the_tasks_of_one_batch() -> None:
    m = gramian_of(batches_of(3, 3))
    plain = SDMGrad(3)(m)
    torch.testing.assert_close(SDMGrad(3, rescale="sum_to_one")(m), plain / 1.3)
    torch.testing.assert_close(SDMGrad(3, rescale="sum_to_num_tasks")(m), plain * 3 / 1.3)
    assert float(MoDo(3, rescale="sum_to_num_tasks")(m[:6, :6]).sum()) == pytest.approx(3)


# ---- absent tasks, groups, what is not finite ------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda n: SDMGrad(n, preference=range(1, n + 1)), MoDo], ids=BOTH)
def test_absent_tasks(make: Any) -> None:
    """As if they were not there; they keep their weights, and the others share the rest."""
    g = batches_of(4, 3)
    gramian = gramian_of(g)
    gramian[5], gramian[:, 5] = math.nan, math.inf  # task 1 is absent from the second batch only
    mask = torch.ones(12, dtype=torch.bool)
    mask[5] = False
    method, rest = make(4), [0, 2, 3]
    weights = method(gramian, mask=mask)
    method.weights.copy_(torch.tensor([[0.1, 0.4, 0.2, 0.3]], dtype=torch.float64))
    weights = method(gramian, mask=mask)
    assert method.weights[0, 1] == 0.4
    assert float(method.weights.sum()) == pytest.approx(1)
    assert weights[9] == 0
    assert (weights[:8] == 0).all()
    few = SDMGrad(3, preference=[1, 3, 4]) if isinstance(method, SDMGrad) else MoDo(3)
    few.state("weights", gramian, (1, 3), 1 / 3)
    few.weights.copy_(torch.tensor([[0.1, 0.2, 0.3]], dtype=torch.float64) / 0.6)
    expected = few(gramian_of(g[:, rest]))
    torch.testing.assert_close(weights[8:][rest], expected[6:])
    torch.testing.assert_close(method.weights[0, rest], 0.6 * few.weights[0])
    assert method(gramian, mask=torch.zeros(12, dtype=torch.bool)).tolist() == [0.0] * 12


@pytest.mark.parametrize(("make", "total"), [(SDMGrad, 1.3), (MoDo, 1.0)])
def test_tasks_of_weight_0_alone(make: Any, total: float) -> None:
    """They make the update all the same, with weights of the usual sum; what is kept stays."""
    method, mask = make(3), torch.tensor([False, True, False]).repeat(3)
    method(gramian_of(batches_of(3, 3)))
    kept = torch.tensor([[0.25, 0.0, 0.75]], dtype=torch.float64)
    method.weights.copy_(kept)
    for _ in range(2):
        weights = method(gramian_of(batches_of(3, 3)), mask=mask)
        torch.testing.assert_close(weights, torch.tensor([0.0] * 7 + [total, 0.0], dtype=torch.float64))
        assert torch.equal(method.weights, kept)
    method.weights.copy_(torch.tensor([[0.0, 1.0, 0.0]]))
    weights = method(torch.zeros(9, 9), mask=~mask)
    torch.testing.assert_close(weights[6:], torch.tensor([total / 2, 0.0, total / 2], dtype=torch.float64))


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_groups_are_apart(make: Any) -> None:
    several, alone = make(3), [make(3), make(3)]
    for _ in range(3):
        m = gramian_of(batches_of(3, 3, groups=2))
        found = several(m)
        for k in range(2):
            torch.testing.assert_close(found[k], alone[k](m[k]))
    assert several.weights.shape == (2, 3)


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_zero_and_identical_gradients(make: Any) -> None:
    for g in (torch.zeros(3, 4, 2), torch.ones(3, 4, 2), torch.eye(4).expand(3, 4, 4) * 1e-200):
        method = make(4)
        weights = method(gramian_of(g.double()))
        torch.testing.assert_close(weights[8:], torch.full((4,), float(weights[8:].sum()) / 4, dtype=torch.float64))
        assert_on_simplex(method.weights)


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_state(make: Any) -> None:
    method, fresh = make(3), make(3)
    m = gramian_of(batches_of(3, 3))
    method(m)
    before = method.weights.clone()
    m[7, 7] = math.nan
    assert method(m).isnan().any()
    assert torch.equal(method.weights, before)
    fresh.load_state_dict(method.state_dict())
    m = gramian_of(batches_of(3, 3))
    method.eval()
    with assert_untouched(method):
        shown = method(m)
    method.train()
    assert torch.equal(method(m), shown)
    assert torch.equal(fresh(m), shown)
    assert_same_state(fresh, method)


# ---- ways in ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_heads", [True, False])
@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_training(make: Any, scale_heads: bool) -> None:
    """`backward` and `TaskGradients` alike: the third batch's gradients, weighted; the others' are not in it."""
    model = nets.mlp()
    methods = [make(3, scale_heads=scale_heads) for _ in range(4)]
    trunk, heads = [*model.trunk.parameters()], [*model.heads.parameters()]
    for _ in range(3):
        x = torch.randn(3, 6, 5, dtype=torch.float64)
        losses = [loss for batch in x for loss in model.losses(batch)]
        rows = task_gradients(losses, trunk)
        flat = torch.stack([torch.cat([g.flatten() for g in row if g is not None]) for row in rows if row is not None])
        weights = methods[0](flat @ flat.T)
        assert (weights[:6] == 0).all()
        factors = weights if scale_heads else torch.ones(9)
        expected = weighted_sum(rows, weights), weighted_sum(task_gradients(losses, heads), factors)

        model.zero_grad()
        out = fastmtl.backward([loss for batch in x for loss in model.losses(batch)], methods[1], model.trunk)
        torch.testing.assert_close(out.weights, weights, rtol=1e-9, atol=1e-12)
        assert_grads(trunk, expected[0], rtol=1e-9)
        assert_grads(heads, expected[1], rtol=1e-9)

        model.zero_grad()
        collected = fastmtl.TaskGradients(model.trunk, 9, heads=model.heads)
        for b, batch in enumerate(x):
            for t, loss in enumerate(model.losses(batch)):
                collected.backward(3 * b + t, loss, retain_graph=True)
        collected.combine(methods[2])
        assert_grads(trunk, expected[0], rtol=1e-9)
        assert_grads(heads, expected[1], rtol=1e-9)


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_the_layer_refuses(make: Any) -> None:
    for options in ({}, {"scale_heads": False}):
        with pytest.raises(ValueError, match=rf"{make.__name__}: needs the gradients of several batches.*backward"):
            fastmtl.FeatureSurgery(make(2, **options), 6)


@pytest.mark.parametrize(
    ("method", "found"), [(SDMGrad(2), 4), (SDMGrad(2), 7), (MoDo(2), 2), (MoDo(2), 8), (MoDo(3), 7)]
)
def test_another_number_of_losses(method: GradientMethod, found: int) -> None:
    with assert_untouched(method), pytest.raises(ValueError, match=rf"several batches.*: .*3 x [23], found {found}"):
        method(torch.eye(found))


@pytest.mark.parametrize(
    ("make", "options", "error", "text"),
    [
        (SDMGrad, {"num_tasks": 0}, ValueError, "num_tasks: expected at least 1, found 0"),
        (SDMGrad, {"num_tasks": 2, "lam": -1}, ValueError, "lam: .* found -1"),
        (SDMGrad, {"num_tasks": 2, "lr": 0}, ValueError, "lr: .* found 0"),
        (SDMGrad, {"num_tasks": 2, "momentum": 1}, ValueError, r"momentum: expected a number in \[0, 1\), found 1"),
        (SDMGrad, {"num_tasks": 2, "num_steps": 0}, ValueError, "num_steps: expected at least 1, found 0"),
        (SDMGrad, {"num_tasks": 2, "preference": [1, 2, 3]}, ValueError, "preference: expected 2 numbers, found 3"),
        (SDMGrad, {"num_tasks": 2, "preference": [1, -2]}, ValueError, "preference of task 1"),
        (MoDo, {"num_tasks": 2, "gamma": 0}, ValueError, "gamma: .* found 0"),
        (MoDo, {"num_tasks": 2, "rho": "1"}, TypeError, "rho: expected a number, found '1'"),
    ],
)
def test_errors(make: Any, options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make(**options)
