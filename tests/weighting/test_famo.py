"""FAMO against its paper's algorithms, and what they promise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastmtl import FAMO
from fastmtl.weighting.base import UNCHANGED_CALLS
from tests.asserts import assert_same_state, assert_untouched
from tests.weighting.literal import leaves, random_losses, step

LR, DECAY = 0.1, 0.01


class Literal:
    """Algorithm 1, or with Adam 2: autograd and torch's optimizers on the logits of all tasks."""

    def __init__(self, num_tasks: int, optimizer: str) -> None:
        self.logits = torch.zeros(num_tasks, dtype=torch.float64, requires_grad=True)
        kind = torch.optim.Adam if optimizer == "adam" else torch.optim.SGD
        self.optimizer = kind([self.logits], lr=LR, weight_decay=DECAY)

    def weights(self, losses: Tensor) -> Tensor:
        z = torch.softmax(self.logits.detach(), 0) / losses
        return z / z.sum()

    def update(self, before: Tensor, after: Tensor) -> None:
        z = torch.softmax(self.logits, 0)
        (self.logits.grad,) = torch.autograd.grad(z, self.logits, before.log() - after.log())
        self.optimizer.step()


@pytest.mark.parametrize("floor", [0.0, [0.1, -0.2, 0.05, 0.0]])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_against_the_paper(optimizer: str, floor: float | list[float]) -> None:
    weighting = FAMO(4, LR, DECAY, optimizer, floor, eps=0.0)
    literal, low = Literal(4, optimizer), torch.tensor(floor, dtype=torch.float64)
    data = [torch.tensor(x, dtype=torch.float64) for x in random_losses(40)]
    for before, after in zip(data[::2], data[1::2], strict=True):
        found = step(weighting, (before + low).tolist())
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), literal.weights(before), rtol=1e-9, atol=0)
        weighting.update(after + low)
        literal.update(before, after)
        torch.testing.assert_close(weighting.logits, literal.logits.detach(), rtol=1e-9, atol=1e-12)


def test_the_next_batch_in_place_of_the_same() -> None:
    by_call, by_itself = FAMO(3, LR), FAMO(3, LR, after="next_batch")
    for losses in random_losses(10, 3, absent=0.3):
        by_call.update([None if x is None else torch.tensor(x, dtype=torch.float64) for x in losses])
        assert step(by_call, losses) == step(by_itself, losses)
    assert_same_state(by_call, by_itself)


def test_all_losses_come_to_fall_at_the_same_rate() -> None:
    """The logarithm of ``exp(b x)`` falls by ``z b^2`` per unit of time: z tends to ``1 / b^2``, scaled to sum to 1."""
    b = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    weighting = FAMO(3, lr=20.0, decay=0.0, optimizer="sgd")
    for _ in range(600):
        x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        weighting((b * x).exp()).backward()
        weighting.update((b * (x - 0.01 * x.grad)).exp())
    torch.testing.assert_close(weighting.weights, b**-2 / (b**-2).sum(), rtol=1e-3, atol=0)


def test_the_worst_task_gains_weight() -> None:
    weighting = FAMO(3)
    assert step(weighting, [1.0, 1.0, 1.0]) == pytest.approx([1 / 3] * 3)
    weighting.update(torch.tensor([0.5, 0.9, 1.1]))
    weights = step(weighting, [1.0, 1.0, 1.0])
    assert weights[0] < weights[1] < weights[2]
    assert sum(weights) == pytest.approx(1)


@pytest.mark.parametrize("absent", ["before", "after"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_task_that_was_absent_learns_nothing(optimizer: str, absent: str) -> None:
    weighting = FAMO(3, optimizer=optimizer)
    step(weighting, [1.0, 2.0, 3.0])
    weighting.update(torch.tensor([0.9, 1.0, 2.9]))
    logits, moments = weighting.logits.clone(), weighting.moments.clone()
    step(weighting, [1.0, None if absent == "before" else 2.0, 3.0])
    weighting.update([torch.tensor(0.2), torch.tensor(1.0) if absent == "before" else None, torch.tensor(2.9)])
    assert weighting.logits[1] == logits[1]
    assert torch.equal(weighting.moments[:, 1], moments[:, 1])
    assert (weighting.logits != logits).tolist() == [True, False, True]


def test_updates_that_move_nothing() -> None:
    """Before the first step, twice, in evaluation mode, of losses that are not finite or not above the floor."""
    weighting = FAMO(2)
    losses = torch.tensor([0.5, 0.7])
    with assert_untouched(weighting):
        weighting.update(losses)
    step(weighting, [1.0, 2.0])
    with assert_untouched(weighting):
        weighting.update(torch.tensor([0.5, math.inf]))
        weighting.update(torch.tensor([0.5, math.nan]))
        weighting.update(torch.tensor([0.5, -0.1]))
        weighting.eval()
        weighting.update(losses)
        weighting.train()
    weighting.update(losses)
    with assert_untouched(weighting):
        weighting.update(losses)


def test_losses_below_the_floor() -> None:
    assert all(math.isnan(x) for x in step(FAMO(2), [1.0, -1.0]))
    assert step(FAMO(2, min_losses=-2.0, eps=0.0), [1.0, -1.0]) == pytest.approx([1 / 4, 3 / 4])


def test_compiled_update_follows_the_eager_one() -> None:
    torch.compiler.reset()
    eager, weighting = FAMO(3), FAMO(3)
    compiled = torch.compile(lambda module, x: module(x), fullgraph=True, backend="aot_eager")
    for before in random_losses(4, 3):
        x = torch.tensor(before, dtype=torch.float64, requires_grad=True)
        torch.testing.assert_close(compiled(weighting, x), eager(x))
        for each in (weighting, eager):
            each.update(x.detach() * torch.tensor([0.5, 0.9, 0.7]))
    assert_same_state(weighting, eager)


def test_errors() -> None:
    for options, text in (
        ({"lr": -1}, "lr: .*-1"),
        ({"decay": -1}, "decay: .*-1"),
        ({"optimizer": "lion"}, "optimizer: .*'lion'"),
        ({"after": "batch"}, "after: .*'batch'"),
        ({"min_losses": [0.0, 1.0]}, r"min_losses: expected one number per task \(3\), found 2"),
        ({"eps": -1}, "eps: .*-1"),
    ):
        with pytest.raises(ValueError, match=text):
            FAMO(3, **options)
    weighting = FAMO(3)
    weighting({"a": torch.tensor(1.0), "b": torch.tensor(1.0), "c": torch.tensor(1.0)})
    with assert_untouched(weighting):
        with pytest.raises(ValueError, match="losses: expected 3 tasks, found 2"):
            weighting.update(torch.ones(2))
        with pytest.raises(ValueError, match="FAMO goes by the order of the tasks"):
            weighting.update({"a": torch.tensor(1.0), "c": torch.tensor(1.0), "b": torch.tensor(1.0)})
    with pytest.raises(RuntimeError, match=r"FAMO.update: the next call's losses tell"):
        FAMO(3, after="next_batch").update(torch.ones(3))


def test_warns_once_if_update_is_forgotten() -> None:
    weighting = FAMO(2)
    for _ in range(UNCHANGED_CALLS - 1):
        weighting(leaves([1.0, 2.0])).backward()
    with pytest.warns(UserWarning, match=r"FAMO: 100 steps without update\(losses\)"):
        weighting(leaves([1.0, 2.0])).backward()
    weighting(leaves([1.0, 2.0])).backward()  # once is enough: warnings are errors here
