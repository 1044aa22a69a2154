"""GradDrop's promises. (Its algorithm, literally, for every layout: tests/test_elementwise_ops.py.)"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

import fastmtl
from fastmtl import GradDrop


def test_one_sign_of_each_element() -> None:
    grads = torch.randn(5, 10_000, dtype=torch.float64)
    found = fastmtl.aggregate(grads, GradDrop()).grads
    up, down = grads.clamp(min=0).sum(0), grads.clamp(max=0).sum(0)
    assert (torch.minimum((found - up).abs(), (found - down).abs()) < 1e-12).all()


def test_what_all_agree_on_stays() -> None:
    grads = torch.rand(4, 1000, dtype=torch.float64) * torch.tensor([1.0, -1.0]).repeat(500)
    grads[2] = 0
    torch.testing.assert_close(fastmtl.aggregate(grads, GradDrop()).grads, grads.sum(0))


@pytest.mark.parametrize("purity", [0.1, 0.5, 0.8])
def test_the_positive_sign_survives_as_often_as_it_is_pure(purity: float) -> None:
    size = 40_000
    grads = torch.tensor([[purity], [purity - 1]]).expand(2, size)
    kept = (fastmtl.aggregate(grads, GradDrop()).grads > 0).double().mean()
    assert abs(kept - purity) < 5 * math.sqrt(purity * (1 - purity) / size)
    method = GradDrop()
    over_steps = torch.stack([fastmtl.aggregate(grads[:, :40], method).grads > 0 for _ in range(1000)]).double().mean()
    assert abs(over_steps - purity) < 5 * math.sqrt(purity * (1 - purity) / size)


def test_each_parameter_draws_its_own_numbers() -> None:
    grads = torch.tensor([[1.0], [-1.0]]).expand(2, 2000)
    a, b = fastmtl.aggregate([grads, grads], GradDrop()).grads
    assert 800 < (a == b).sum() < 1200


def test_leak() -> None:
    grads = torch.randn(3, 400, dtype=torch.float64)
    torch.testing.assert_close(fastmtl.aggregate(grads, GradDrop(leak=1)).grads, grads.sum(0))
    torch.manual_seed(0)
    none = fastmtl.aggregate(grads, GradDrop()).grads
    torch.manual_seed(0)
    some = fastmtl.aggregate(grads, GradDrop(leak=[0.0, 1.0, 0.25])).grads
    dropped = torch.where((grads > 0) == (none > 0), 0.0, grads)
    torch.testing.assert_close(some, none + torch.tensor([0.0, 1.0, 0.25]).double() @ dropped)


def test_f_is_compared_with_the_same_numbers() -> None:
    grads = torch.randn(3, 3, 77, dtype=torch.float64)
    torch.manual_seed(1)
    plain = fastmtl.aggregate([*grads], GradDrop()).grads
    torch.manual_seed(1)
    by_hand = fastmtl.aggregate([*grads], GradDrop(f=lambda p: p)).grads
    for a, b in zip(plain, by_hand, strict=True):
        torch.testing.assert_close(a, b)
    sure = fastmtl.aggregate(grads[0], GradDrop(f=lambda p: (p > 0.5).to(p))).grads
    total = grads[0].sum(0)
    assert ((sure > 0) == (total > 0)).all()


def test_same_seed_same_numbers_and_the_next_step_others() -> None:
    grads = torch.randn(4, 300)
    a, b = (GradDrop(generator=torch.Generator().manual_seed(3)) for _ in range(2))
    first = fastmtl.aggregate(grads, a).grads
    assert torch.equal(first, fastmtl.aggregate(grads, b).grads)
    second = fastmtl.aggregate(grads, a).grads
    assert not torch.equal(first, second)
    resumed = GradDrop()
    resumed.load_state_dict(b.state_dict())
    assert torch.equal(second, fastmtl.aggregate(grads, resumed).grads)


def test_absent_tasks_are_as_if_they_were_not() -> None:
    grads = torch.randn(4, 300)
    a = GradDrop()
    b = copy.deepcopy(a)
    absent = [[*grads[:2], None, grads[3]]]
    assert torch.equal(fastmtl.aggregate(absent, a).grads[0], fastmtl.aggregate([[*grads[:2], grads[3]]], b).grads[0])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"leak": 1.5}, ValueError, "leak: expected a number in"),
        ({"leak": [0.1, -1]}, ValueError, "leak of task 1"),
        ({"leak": "a"}, TypeError, "leak"),
        ({"f": 3}, TypeError, "f: expected a function"),
        ({"generator": 3}, TypeError, "generator"),
    ],
)
def test_refused(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        GradDrop(**options)


def test_leak_of_another_number_of_tasks() -> None:
    with pytest.raises(ValueError, match="leak: one for each of 3 tasks, but this step has 2"):
        fastmtl.aggregate(torch.randn(2, 3), GradDrop(leak=[0.1, 0.2, 0.3]))
