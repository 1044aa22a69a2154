"""MConFIG against its literal algorithm, and what its averages promise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastmtl
from fastmtl import ConFIG, MConFIG
from tests.asserts import assert_untouched
from tests.nets import mlp, task_gradients


class Literal:
    """The paper's algorithm on vectors, without the second moment."""

    def __init__(self, num_tasks: int, dim: int, beta: float, preference: np.ndarray | None = None) -> None:
        self.beta, self.goal = beta, np.ones(num_tasks) if preference is None else preference
        self.averages, self.counts = np.zeros((num_tasks, dim)), np.zeros(num_tasks, int)

    def step(self, grads: list[np.ndarray | None]) -> np.ndarray:
        for t, g in enumerate(grads):
            if g is not None:
                self.counts[t] += 1
                self.averages[t] = self.beta * self.averages[t] + (1 - self.beta) * g
        seen = self.counts > 0
        y = self.averages[seen] / (1 - self.beta ** self.counts[seen])[:, None]
        along = np.linalg.pinv(y / np.linalg.norm(y, axis=1, keepdims=True)) @ self.goal[seen]
        along /= np.linalg.norm(along)
        return (y @ along).sum() * along


def step(grads: list[np.ndarray | None], method: MConFIG) -> np.ndarray:
    given = [None if g is None else torch.from_numpy(g) for g in grads]
    (found,) = fastmtl.aggregate([given], method).grads
    return found.numpy()


@pytest.mark.parametrize("num_tasks", [1, 2, 5, 32])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_literal(num_tasks: int, beta: float, share: float) -> None:
    """With all tasks in each step, and with some in turn: those absent take part by their averages."""
    rng, preference = np.random.default_rng(num_tasks), np.linspace(1, 2, num_tasks)
    method, literal = MConFIG(beta, preference), Literal(num_tasks, 50, beta, preference)
    for k in range(8):
        there = rng.random(num_tasks) < share
        there[k % num_tasks] = True
        grads = [rng.normal(size=50) * 2.0**t if there[t] else None for t in range(num_tasks)]
        np.testing.assert_allclose(step(grads, method), literal.step(grads), rtol=1e-8, atol=1e-8)
    assert method.counts.tolist() == literal.counts.tolist()


def test_without_a_memory_it_is_config() -> None:
    method = MConFIG(beta=0.0)
    for _ in range(3):
        g = torch.randn(4, 9, dtype=torch.float64)
        torch.testing.assert_close(fastmtl.aggregate(g, method).grads, fastmtl.aggregate(g, ConFIG()).grads)


def test_equal_cosines_with_the_averages() -> None:
    method = MConFIG()
    for _ in range(4):
        found = fastmtl.aggregate(torch.randn(3, 8, dtype=torch.float64), method)
    y = method.rows_0
    cosines = y @ found.grads / y.norm(dim=1) / found.grads.norm()
    torch.testing.assert_close(cosines, cosines[:1].expand(3))
    assert cosines[0] > 0


@pytest.mark.parametrize("groups", [None, "layer"])
@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "raise", "drop_task"])
def test_one_task_per_step_in_training(nonfinite: str, groups: str | None) -> None:
    """The paper's way, at the cost of one backward pass; heads get the gradients that there are."""
    torch.manual_seed(0)
    net, method = mlp(3), MConFIG(beta=0.8)
    trunk = [*net.trunk.parameters()]
    parts = [range(4)] if groups is None else [range(2), range(2, 4)]
    literal = [Literal(3, sum(trunk[p].numel() for p in part), 0.8) for part in parts]
    for k in range(7):
        net.zero_grad()
        losses: list[Any] = [None] * 3
        losses[k % 3] = net.losses(torch.randn(8, 5, dtype=torch.float64))[k % 3]
        (rows,) = task_gradients([losses[k % 3]], trunk)
        head = torch.autograd.grad(losses[k % 3], [*net.heads[k % 3].parameters()], retain_graph=True)
        fastmtl.backward(losses, method, net.trunk, nonfinite=nonfinite, groups=groups)
        for part, paper in zip(parts, literal, strict=True):
            grads: list[np.ndarray | None] = [None] * 3
            grads[k % 3] = torch.cat([rows[p].flatten() for p in part]).numpy()
            found = torch.cat([trunk[p].grad.flatten() for p in part]).numpy()
            np.testing.assert_allclose(found, paper.step(grads), rtol=1e-8, atol=1e-10)
        for p, wanted in zip(net.heads[k % 3].parameters(), head, strict=True):
            torch.testing.assert_close(p.grad, wanted)


def test_a_loss_that_is_not_finite_is_still_found() -> None:
    method, x = MConFIG(), torch.nn.Parameter(torch.ones(3))

    def losses(factor: float) -> list[Tensor | None]:
        return [x[0] * factor, None, x[1]]

    fastmtl.backward(losses(1.0), method, [x])
    with assert_untouched(method):
        assert fastmtl.backward(losses(float("nan")), method, [x]).weights.isnan().all()
        with pytest.raises(FloatingPointError, match="not finite: task 0"):
            fastmtl.backward(losses(float("nan")), method, [x], nonfinite="raise")
    weights = fastmtl.backward(losses(float("nan")), method, [x], nonfinite="drop_task").weights
    assert weights.tolist()[:2] == [0, 0]
    assert method.counts.tolist() == [1, 0, 2]


def test_a_normalization_by_losses_is_of_those_that_are_known() -> None:
    method = MConFIG(normalization="loss")
    grads, losses = torch.randn(3, 4, dtype=torch.float64), torch.tensor([1.0, 2.0, 3.0])
    fastmtl.aggregate(grads, method, losses=losses)
    out = fastmtl.aggregate([[grads[0], None, grads[2]]], method, losses=[losses[0], None, losses[2]])
    assert out.weights[1] == 0
    assert out.weights.isfinite().all()


def test_zero_and_identical_gradients() -> None:
    g = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]])
    out = fastmtl.aggregate(g, MConFIG())
    assert out.weights[2] == 0
    torch.testing.assert_close(out.grads, 2 * g[0])
    assert not fastmtl.aggregate(torch.zeros(2, 3), MConFIG()).grads.any()


def test_state_is_as_exact_as_the_gradients() -> None:
    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        method = MConFIG()
        assert fastmtl.aggregate(torch.randn(2, 3).to(dtype), method).grads.dtype == dtype
        assert method.rows_0.dtype == kept


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"beta": 1}, ValueError, r"beta: expected a number in \[0, 1\), found 1"),
        ({"beta": -0.1}, ValueError, "beta: .*-0.1"),
        ({"beta": "a"}, TypeError, "beta: expected a number, found 'a'"),
        ({"preference": [1, -1]}, ValueError, "preference of task 1"),
    ],
)
def test_refused(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        MConFIG(**options)
    with pytest.raises(ValueError, match="preference: one for each of 2 tasks, but this step has 3"):
        fastmtl.aggregate(torch.eye(3), MConFIG(preference=[1, 2]))
