"""GradVac against Algorithm 1 on gradient vectors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import fastmtl
from fastmtl import GradVac, PCGrad, reference
from tests.asserts import assert_invariant_under_scaling, assert_same_state


def gradvac_on_vectors(
    jacobian: Tensor, order: Tensor, targets: Tensor, beta: float, ema_first: bool = False, ema_always: bool = True
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 with equation 3, to the letter: the sum of the g_i', and the moved targets."""
    targets = targets.clone()
    total = torch.zeros(jacobian.shape[1], dtype=jacobian.dtype)
    for i in range(len(jacobian)):
        g = jacobian[i].clone()
        for j in order[i].tolist():
            if j == i or not jacobian[j].any() or not g.any():
                continue
            h = jacobian[j]
            phi = float(g @ h / (g.norm() * h.norm()))
            moved = (1 - beta) * float(targets[i, j]) + beta * phi
            below = phi < targets[i, j]
            if ema_first and (ema_always or below):
                targets[i, j] = moved
            t = float(targets[i, j])
            corrected = phi < t
            if corrected:
                a = g.norm() * (t * math.sqrt(1 - phi**2) - phi * math.sqrt(1 - t**2))
                g = g + a / (h.norm() * math.sqrt(1 - t**2)) * h
            if not ema_first and (ema_always or corrected):
                targets[i, j] = moved
        total = total + g
    return total, targets


VARIANTS = [*itertools.product([False, True], [False, True])]


@pytest.mark.parametrize(("ema_first", "ema_always"), VARIANTS)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 9, 25])
def test_against_vectors_over_several_steps(num_tasks: int, ema_first: bool, ema_always: bool) -> None:
    order = torch.stack([torch.randperm(num_tasks) for _ in range(num_tasks)])
    method = GradVac(beta=0.2, init=0.1, order=order, ema_first=ema_first, ema_always=ema_always)
    targets = torch.full((num_tasks, num_tasks), 0.1, dtype=torch.float64)
    common = torch.randn(num_tasks + 8, dtype=torch.float64)
    for _ in range(4):
        jacobian = torch.randn(num_tasks, num_tasks + 8, dtype=torch.float64) + 0.5 * common
        expected, targets = gradvac_on_vectors(jacobian, order, targets, 0.2, ema_first, ema_always)
        out = fastmtl.aggregate(jacobian, method)
        torch.testing.assert_close(out.grads, expected, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(method.targets[0], targets, rtol=1e-9, atol=1e-10)


def test_a_correction_reaches_the_target() -> None:
    """By equation 3 the cosine after it is the target."""
    jacobian = torch.randn(2, 5, dtype=torch.float64)
    for target in (-0.5, 0.0, 0.4, 0.9):
        method = GradVac(beta=0.0, init=target, order="fixed")
        weights = method(jacobian @ jacobian.T)
        cosine = float(torch.nn.functional.cosine_similarity(*jacobian, dim=0))
        if cosine >= target:
            assert weights.tolist() == [1, 1]
            continue
        first = jacobian[0] + (weights[1] - 1) * jacobian[1]
        assert float(torch.nn.functional.cosine_similarity(first, jacobian[1], dim=0)) == pytest.approx(target)


def test_the_first_step_is_pcgrads() -> None:
    jacobian = torch.randn(7, 4, dtype=torch.float64)
    a, b = (make(generator=torch.Generator().manual_seed(8)) for make in (GradVac, PCGrad))
    torch.testing.assert_close(fastmtl.aggregate(jacobian, a).weights, fastmtl.aggregate(jacobian, b).weights)
    second = (fastmtl.aggregate(jacobian, a).weights, fastmtl.aggregate(jacobian, b).weights)
    assert not torch.allclose(*second)


def test_every_option_makes_a_difference() -> None:
    """A test of the variants that agree would prove nothing."""
    common = torch.randn(9, dtype=torch.float64)
    jacobians = [torch.randn(6, 9, dtype=torch.float64) + common for _ in range(5)]
    results = []
    for options in ({}, {"ema_first": True}, {"ema_always": False}, {"beta": 0.5}, {"init": 0.3}):
        method = GradVac(**{"beta": 0.2, "order": "fixed", **options})
        results.append(torch.stack([fastmtl.aggregate(j, method).weights for j in jacobians]))
    for a, b in itertools.combinations(results, 2):
        assert not torch.allclose(a, b)


def test_groups_have_their_own_targets() -> None:
    parts = [torch.randn(4, 6, dtype=torch.float64) for _ in range(2)]
    method, alone = GradVac(order="fixed"), [GradVac(order="fixed") for _ in range(2)]
    for _ in range(3):
        out = fastmtl.aggregate(parts, method, groups=[0, 1])
        for k in range(2):
            torch.testing.assert_close(out.weights[k], fastmtl.aggregate(parts[k], alone[k]).weights)
    for k in range(2):
        torch.testing.assert_close(method.targets[k], alone[k].targets[0])
    with pytest.raises(ValueError, match=r"GradVac.targets.*one method object per set"):
        fastmtl.aggregate(parts, method)


def test_absent_tasks_and_zero_gradients_leave_their_targets_alone() -> None:
    jacobian = torch.randn(4, 6, dtype=torch.float64)
    jacobian[3] = 0
    method = GradVac(init=0.2, beta=0.3)
    mask = torch.tensor([True, False, True, True])
    gramian = jacobian @ jacobian.T
    gramian[1] = gramian[:, 1] = math.nan
    weights = method(gramian, mask=mask)
    assert weights[1] == 0
    moved = method.targets[0] != 0.2
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[0, 2] = expected[2, 0] = True
    assert torch.equal(moved, expected)


def test_parallel_and_opposed_gradients() -> None:
    g = torch.randn(5, dtype=torch.float64)
    method = GradVac(beta=0.5)
    for _ in range(40):  # targets tend to 1 and -1
        out = fastmtl.aggregate(torch.stack([g, 2 * g, -g]), method)
        assert out.weights.isfinite().all()
        assert method.targets.abs().max() <= 1


def test_scaling_all_gradients_changes_nothing() -> None:
    jacobian = torch.randn(6, 4, dtype=torch.float64)
    for factor in (1e-6, 1e6):
        assert_invariant_under_scaling(
            lambda m: GradVac(init=0.4, order="fixed")(m), jacobian @ jacobian.T, factor, atol=1e-7
        )


def test_drawn_orders_are_used_by_the_algorithm() -> None:
    jacobian, method = torch.randn(6, 8, dtype=torch.float64), GradVac(init=0.2, beta=0.0)
    targets = torch.full((6, 6), 0.2, dtype=torch.float64)
    for _ in range(3):
        order = reference.visiting_order(1, 6, "random", method.rng)[0]
        expected, _ = gradvac_on_vectors(jacobian, order, targets, 0.0)
        torch.testing.assert_close(fastmtl.aggregate(jacobian, method).grads, expected, rtol=1e-9, atol=1e-9)


# ---- state -----------------------------------------------------------------------------------------------------------


def train(method: GradVac, steps: range) -> list[list[float]]:
    out = []
    for step in steps:
        g = torch.Generator().manual_seed(step)
        out.append(fastmtl.aggregate(torch.randn(5, 4, dtype=torch.float64, generator=g), method).weights.tolist())
    return out


def test_a_fresh_object_resumes_bitwise() -> None:
    method = GradVac(beta=0.3)
    assert method.state_dict()["targets"].numel() == 0  # also before the first step
    GradVac().load_state_dict(method.state_dict(), strict=True)
    train(method, range(3))
    fresh = GradVac(beta=0.3)
    fresh.load_state_dict(method.state_dict(), strict=True)
    assert train(fresh, range(3, 6)) == train(method, range(3, 6))
    assert_same_state(fresh, method)


def test_loading_does_not_share_memory() -> None:
    method = GradVac(beta=0.3)
    train(method, range(2))
    saved = {name: x.clone() for name, x in method.state_dict().items()}
    fresh = GradVac(beta=0.3)
    fresh.load_state_dict(method.state_dict())
    train(fresh, range(2))
    for name, x in method.state_dict().items():
        assert torch.equal(x, saved[name])


def test_casting_the_model_keeps_the_state() -> None:
    for cast in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.float()):
        model = torch.nn.ModuleDict({"method": GradVac(beta=0.3), "trunk": torch.nn.Linear(2, 2)})
        train(model["method"], range(2))
        before = model["method"].targets.clone()
        cast(model)
        assert model["trunk"].weight.dtype != torch.float64
        assert model["method"].targets.dtype == torch.float64
        assert torch.equal(model["method"].targets, before)
        train(model["method"], range(2))


def test_a_step_that_is_not_finite_moves_nothing() -> None:
    method = GradVac(beta=0.3)
    train(method, range(2))
    before = {name: x.clone() for name, x in method.state_dict().items()}
    gramian = torch.eye(5, dtype=torch.float64)
    gramian[4, 4] = math.nan
    assert method(gramian).isnan().all()
    for name, x in method.state_dict().items():
        assert torch.equal(x, before[name])


@pytest.mark.parametrize(("options", "error"), [({"beta": 1.5}, "beta.*1.5"), ({"init": 1.0}, "init.*1.0")])
def test_errors(options: dict, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        GradVac(**options)
