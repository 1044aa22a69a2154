"""HTW against its paper's schedule and LBTW, written out in plain Python."""

from __future__ import annotations

import pytest

from fastmtl import HTW, LBTW
from tests.weighting.literal import assert_steps, htw, random_losses, step


@pytest.mark.parametrize("absent", [0.0, 0.4])
@pytest.mark.parametrize("ramp", ["article", "to_one"])
@pytest.mark.parametrize("total_steps", [50, 300, 25])  # the ramp ends within, is cut off, ends between two steps
def test_against_the_paper(total_steps: int, ramp: str, absent: float) -> None:
    data = random_losses(60 if total_steps != 300 else 20, absent=absent)
    expected = htw(data, len(data), 2, total_steps, ramp)
    assert_steps(HTW(4, 2, total_steps, ramp=ramp), data, expected)
    resetting = HTW(4, 2, total_steps, ramp=ramp, reset_each_epoch=True, steps_per_epoch=7)
    assert_steps(resetting, data, htw(data, 7, 2, total_steps, ramp))


def schedule(num_steps: int, **options: object) -> list[float]:
    weighting = HTW(2, 0, **options)
    return [step(weighting, [1.0, 1.0])[0] for _ in range(num_steps)]


def test_every_ramp() -> None:
    assert schedule(6, total_steps=8, warmup=0.5) == [0, 0.125, 0.25, 0.375, 1, 1]
    assert schedule(6, total_steps=8, warmup=0.5, ramp="to_one") == [0, 0.25, 0.5, 0.75, 1, 1]
    assert schedule(6, total_steps=8, warmup=0.5, ramp=(2.0, 0.0)) == [2, 1.5, 1, 0.5, 1, 1]
    assert schedule(3, total_steps=8, warmup=0.0) == [1, 1, 1]
    assert schedule(5, total_steps=4, warmup=1.0) == [0, 0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize("total_steps", [10, 30, 70, 90, 1000])
def test_the_warmup_is_a_tenth_of_the_steps_to_the_step(total_steps: int) -> None:
    found = schedule(total_steps // 10 + 1, total_steps=total_steps)
    assert found[-1] == 1
    assert max(found[:-1]) < 0.1


def test_the_schedule_goes_on_while_the_main_task_is_absent() -> None:
    weighting = HTW(2, 0, total_steps=40)
    for losses in ([1.0, 1.0], [None, 1.0], [None, 1.0]):
        step(weighting, losses)
    assert step(weighting, [1.0, 1.0])[0] == pytest.approx(3 / 40)
    assert step(weighting, [1.0, 1.0])[0] == 1


def test_options_of_lbtw() -> None:
    data = random_losses(12)
    options = {"alpha": 0.9, "reset_each_epoch": True, "steps_per_epoch": 5}
    weighting, auxiliary = HTW(4, 1, 12, warmup=0.0, **options), LBTW(4, **options)
    for losses in data:
        found, expected = step(weighting, losses), step(auxiliary, losses)
        assert found[1] == 1
        assert found[:1] + found[2:] == expected[:1] + expected[2:]


def test_normalize_counts_the_main_task() -> None:
    plain, one = HTW(4, 3, 30, ramp="to_one"), HTW(4, 3, 30, ramp="to_one", normalize="sum_to_one")
    for losses in random_losses(10):
        weights = step(plain, losses)
        assert step(one, losses) == pytest.approx([w / sum(weights) for w in weights], rel=1e-12)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"main": 2}, r"main: expected a whole number in 0\.\.1, found 2"),
        ({"main": -1}, "main: .*-1"),
        ({"total_steps": 0}, "total_steps: expected at least 1, found 0"),
        ({"warmup": 1.5}, "warmup: .*1.5"),
        ({"warmup": float("nan")}, "warmup: .*nan"),
        ({"ramp": "cosine"}, "ramp: .*'cosine'"),
        ({"ramp": (0.0, 1.0, 2.0)}, r"ramp: .*\(0.0, 1.0, 2.0\)"),
        ({"ramp": (-1.0, 1.0)}, "ramp's start: .*-1.0"),
        ({"ramp": (0.0, float("inf"))}, "ramp's end: .*inf"),
        ({"alpha": -1.0}, "alpha: .*-1.0"),
        ({"steps_per_epoch": 4}, "steps_per_epoch: 4 has no effect"),
        ({"normalize": "l2"}, "normalize: .*'l2'"),
    ],
)
def test_errors(options: dict, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        HTW(**{"num_tasks": 2, "main": 0, "total_steps": 10, **options})
