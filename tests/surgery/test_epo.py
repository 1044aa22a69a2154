"""EPO: each step against SciPy's linear programs, and where it goes on the paper's example."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import linprog
from torch import Tensor

import fastmtl
from fastmtl import EPO
from tests.asserts import assert_invariant_under_scaling, assert_on_simplex
from tests.samplers import SAMPLERS, Sampler

Floats = NDArray[np.float64]


def literal(m: Floats, losses: Floats, r: Floats, relaxed: bool) -> tuple[Any, Floats, str]:
    """Equation 24 by SciPy: its solution, the objective, and which step it is."""
    t, scale = len(m), np.abs(m).max() or 1.0
    m = m / scale
    share = r * losses / (r * losses).sum()
    mu = (share * np.log(t * share)).sum()
    a = r * (np.log(t * share) - mu)
    ca = m @ a
    rows, right = m, np.zeros(t)
    if mu > 1e-4:
        objective = ca
        if (ca > 0).any():
            right = np.where(ca > 0, -np.inf, ca)
            right[r * losses == (r * losses).max()] = 0
    else:
        objective = m.sum(0)
        if not relaxed:
            rows, right = np.vstack([m, ca]), np.append(right, min(0.0, ca.max()))
    held = right > -np.inf
    rows, right = rows[held], right[held]
    size = np.abs(rows - right[:, None]).max(1, initial=0.0, keepdims=True)  # for its tolerances' sake
    size[size == 0] = 1
    rows, right = rows / size, right / size[:, 0]
    objective = objective / (np.abs(objective).max() or 1.0)
    found = linprog(-objective, A_ub=-rows, b_ub=-right, A_eq=np.ones((1, t)), b_eq=[1], bounds=(0, None))
    return found, objective, "balance" if mu > 1e-4 else "descend"


@pytest.mark.parametrize("relaxed", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_each_step_is_the_papers_linear_program(sampler: Sampler, relaxed: bool) -> None:
    for num_tasks in (1, 2, 3, 7, 20):
        for seed in range(2):
            rng = np.random.default_rng(seed)
            g = sampler(rng, num_tasks)
            m = (g @ g.T + (g @ g.T).T) / 2
            r = rng.uniform(0.5, 2, num_tasks)
            for losses in (rng.uniform(0.1, 2, num_tasks), (1 + 1e-4 * rng.standard_normal(num_tasks)) / r):
                method = EPO(r.tolist(), relaxed)
                w = method(torch.from_numpy(m), losses=torch.from_numpy(losses))
                assert_on_simplex(w)
                expected, objective, _ = literal(m, losses, r, relaxed)
                if expected.status == 2:
                    torch.testing.assert_close(w, torch.from_numpy(r / r.sum()))
                    continue
                assert objective @ w.numpy() >= -expected.fun - 1e-8


def paper_example(x: Tensor) -> list[Tensor]:
    """The paper's two objectives, whose Pareto front is not convex."""
    shift = 1 / math.sqrt(len(x))
    return [1 - (-((x - shift) ** 2).sum()).exp(), 1 - (-((x + shift) ** 2).sum()).exp()]


@pytest.mark.parametrize("preference", [(1.0, 1.0), (1.0, 3.0), (5.0, 1.0)])
@pytest.mark.parametrize("start", range(2))
def test_it_finds_the_point_of_the_front_that_is_asked_for(preference: tuple[float, float], start: int) -> None:
    torch.manual_seed(start)
    x = torch.nn.Parameter(0.3 * torch.randn(5, dtype=torch.float64))
    method, optimizer = EPO(preference), torch.optim.SGD([x], lr=0.2)
    for _ in range(150):
        optimizer.zero_grad()
        fastmtl.backward(paper_example(x), method, [x])
        optimizer.step()
    first, second = (float(loss) for loss in paper_example(x.detach()))
    assert first * preference[0] == pytest.approx(second * preference[1], rel=0.1)
    assert float((x - x.mean()).detach().norm()) < 0.05  # the front is where all entries are equal ...
    assert abs(float(x.detach().mean())) < 1 / math.sqrt(5)  # ... and between the two minima


def test_descent_raises_no_loss() -> None:
    """And where the balance asks for a rise, the worst loss does not rise."""
    for seed in range(20):
        g = torch.from_numpy(np.random.default_rng(seed).standard_normal((5, 9)))
        out = fastmtl.aggregate(g, EPO(relaxed=True), losses=torch.ones(5))
        assert (g @ out.grads >= -1e-9).all()
        losses = torch.rand(5, dtype=torch.float64) + 0.1
        out = fastmtl.aggregate(g, EPO(), losses=losses)
        assert (g @ out.grads)[losses.argmax()] >= -1e-9


def test_absent_tasks_and_groups() -> None:
    """As if they were not there."""
    g = torch.randn(2, 5, 8, dtype=torch.float64)
    gramian, losses = g @ g.mT, torch.rand(5, dtype=torch.float64) + 0.1
    mask = torch.tensor([[True, True, False, True, True], [True] * 5])
    gramian[0, 2] = gramian[0, :, 2] = math.nan
    r = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    found = EPO(r)(gramian, losses, mask)
    rest = [0, 1, 3, 4]
    alone = EPO(r[rest])(gramian[0][rest][:, rest], losses[rest])
    torch.testing.assert_close(found[0, rest], alone)
    assert found[0, 2] == 0
    torch.testing.assert_close(found[1], EPO(r)(gramian[1], losses))
    assert EPO(r)(gramian, losses, torch.zeros(2, 5, dtype=torch.bool)).tolist() == [[0.0] * 5] * 2


def test_units_do_not_matter() -> None:
    g, losses = torch.randn(4, 6, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.1
    for factor in (1e-6, 1e6):
        assert_invariant_under_scaling(lambda m: EPO([1, 2, 3, 4])(m, losses), g @ g.T, factor)
        torch.testing.assert_close(
            EPO([1, 2, 3, 4])(g @ g.T, losses * factor), EPO([1, 2, 3, 4])(g @ g.T, losses), rtol=0, atol=1e-9
        )


@pytest.mark.parametrize("num_tasks", [1, 2, 32, 128])
def test_degenerate_gradients_and_losses(num_tasks: int) -> None:
    losses = torch.rand(num_tasks) + 0.1
    for gramian in (torch.zeros(num_tasks, num_tasks), torch.ones(num_tasks, num_tasks), torch.eye(num_tasks)):
        for each in (losses, torch.zeros(num_tasks), torch.eye(num_tasks)[0]):
            assert_on_simplex(EPO()(gramian, each))


def test_what_is_not_finite_or_negative() -> None:
    m, losses = torch.eye(3, dtype=torch.float64), torch.tensor([1.0, 2.0, 3.0])
    for bad in (math.nan, math.inf, -1.0):
        assert EPO()(m, torch.tensor([1.0, bad, 2.0])).isnan().all()
    m[1, 1] = math.nan
    assert EPO()(m, losses).isnan().all()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"preference": [1, 0]}, ValueError, "preference of task 1: expected a number above 0, found 0"),
        ({"preference": 1.0}, TypeError, "preference: expected one number per task"),
        ({"eps": -1}, ValueError, "eps: .* found -1"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        EPO(**options)


def test_another_number_of_tasks() -> None:
    with pytest.raises(ValueError, match="preference: one for each of 2 tasks, but this step has 3"):
        EPO([1, 2])(torch.eye(3), torch.ones(3))
