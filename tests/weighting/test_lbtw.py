"""LBTW against its paper's algorithm, written out in plain Python."""

from __future__ import annotations

import pytest

from fastmtl import LBTW
from tests.asserts import assert_same_state
from tests.weighting.literal import assert_steps, lbtw, random_losses, step


@pytest.mark.parametrize("absent", [0.0, 0.4])
@pytest.mark.parametrize("alpha", [0.5, 0.0, 1.0, 0.1])
def test_against_the_paper(alpha: float, absent: float) -> None:
    """The first batch of training, and of each epoch; the results differ."""
    data = random_losses(40, absent=absent)
    assert_steps(LBTW(4, alpha), data, lbtw(data, len(data), alpha))
    assert_steps(LBTW(4, alpha, reset_each_epoch=True, steps_per_epoch=7), data, lbtw(data, 7, alpha))
    assert alpha == 0 or [*lbtw(data, 40, alpha)] != [*lbtw(data, 7, alpha)]


def test_both_ways_to_end_an_epoch_are_one() -> None:
    by_itself, by_call = LBTW(3, reset_each_epoch=True, steps_per_epoch=4), LBTW(3, reset_each_epoch=True)
    for i, losses in enumerate(random_losses(21, 3, absent=0.3)):
        assert step(by_itself, losses) == step(by_call, losses)
        if i % 4 == 3:
            by_call.end_epoch()
    assert_same_state(by_itself, by_call)


def test_without_resetting_the_end_of_an_epoch_is_nothing() -> None:
    weighting = LBTW(2)
    step(weighting, [4.0, 9.0])
    weighting.end_epoch()
    assert step(weighting, [1.0, 1.0]) == pytest.approx([1 / 2, 1 / 3])


@pytest.mark.parametrize("absent", [0.0, 0.4])
def test_normalize(absent: float) -> None:
    data = random_losses(20, absent=absent)
    plain, one, count = (LBTW(4, normalize=n) for n in ("none", "sum_to_one", "sum_to_num_tasks"))
    differs = False
    for losses in data:
        weights = [w for w in step(plain, losses) if w is not None]
        for weighting, goal in ((one, 1), (count, len(weights))):
            found = [w for w in step(weighting, losses) if w is not None]
            assert sum(found) == pytest.approx(goal, rel=1e-12)
            assert found == pytest.approx([w * goal / sum(weights) for w in weights], rel=1e-12)
            differs |= found != pytest.approx(weights)
    assert differs


def test_a_task_that_comes_late_starts_with_its_own_first_loss() -> None:
    weighting = LBTW(2)
    step(weighting, [2.0, None])
    step(weighting, [1.0, 16.0])
    assert step(weighting, [0.5, 4.0]) == pytest.approx([1 / 2, 1 / 2])


@pytest.mark.parametrize("normalize", ["none", "sum_to_one"])
def test_guards(normalize: str) -> None:
    """Started at 0: weight 1. A changed sign, or a loss of 0: weight 0. Tiny at the start: no overflow."""
    weighting = LBTW(5, normalize=normalize)
    step(weighting, [0.0, 1.0, 1.0, 5e-324, -1.0])
    total = 3 if normalize == "sum_to_one" else 1
    assert step(weighting, [7.0, 0.0, -2.0, 1.0, -1.0]) == pytest.approx([1 / total, 0, 0, 1 / total, 1 / total])
    solved = LBTW(2, normalize=normalize)
    step(solved, [1.0, 1.0])
    assert step(solved, [0.0, 0.0]) == [0, 0]  # nothing to normalise


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"num_tasks": -1}, "num_tasks: expected at least 1, found -1"),
        ({"alpha": -0.5}, "alpha: .*-0.5"),
        ({"alpha": float("nan")}, "alpha: .*nan"),
        ({"alpha": float("inf")}, "alpha: .*inf"),
        ({"steps_per_epoch": 4}, "steps_per_epoch: 4 has no effect without reset_each_epoch=True"),
        ({"steps_per_epoch": 0, "reset_each_epoch": True}, "steps_per_epoch: expected at least 1, found 0"),
        ({"normalize": "softmax"}, "normalize: .*'softmax'"),
    ],
)
def test_errors(options: dict, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        LBTW(**{"num_tasks": 2, **options})


def test_ending_an_epoch_that_ends_by_itself() -> None:
    with pytest.raises(RuntimeError, match=r"LBTW.end_epoch: epochs end by themselves every 5 steps"):
        LBTW(2, reset_each_epoch=True, steps_per_epoch=5).end_epoch()
