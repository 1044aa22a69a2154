"""DWA against its paper and its public variant, written out in plain Python."""

from __future__ import annotations

import pytest
import torch

from fastmtl import DWA
from tests.asserts import assert_same_state, assert_untouched
from tests.weighting.literal import assert_steps, dwa, dwa_window, random_losses, step


@pytest.mark.parametrize("absent", [0.0, 0.4])
@pytest.mark.parametrize("temperature", [2.0, 0.3])
def test_against_the_paper(temperature: float, absent: float) -> None:
    data = random_losses(47, absent=absent)
    assert_steps(DWA(4, temperature, steps_per_epoch=5), data, dwa(data, 5, temperature))


@pytest.mark.parametrize("absent", [0.0, 0.4])
@pytest.mark.parametrize("window", [1, 3, 10])
def test_against_the_variant_with_a_window(window: int, absent: float) -> None:
    data = random_losses(40, absent=absent)
    assert_steps(DWA(4, window=window), data, dwa_window(data, window))


def test_both_ways_to_end_an_epoch_are_one() -> None:
    by_itself, by_call = DWA(3, steps_per_epoch=4), DWA(3)
    for i, losses in enumerate(random_losses(21, 3, absent=0.3)):
        assert step(by_itself, losses) == step(by_call, losses)
        if i % 4 == 3:
            by_call.eval()  # after validation
            by_call.end_epoch()
            by_call.train()
    assert_same_state(by_itself, by_call)


def test_epochs_of_different_lengths() -> None:
    weighting = DWA(2)
    for epoch in ([[1.0, 5.0]], [[4.0, 1.0], [8.0, 1.0], [0.0, 1.0]]):
        for losses in epoch:
            step(weighting, losses)
        weighting.end_epoch()
    rates = torch.tensor([4.0 / 1.0, 1.0 / 5.0], dtype=torch.float64)
    torch.testing.assert_close(
        torch.tensor(step(weighting, [1.0, 1.0]), dtype=torch.float64), 2 * torch.softmax(rates / 2, 0)
    )


def test_published_numbers() -> None:
    weighting = DWA(3, steps_per_epoch=2)
    for losses in ([3.0, 0.5, 4.0], [1.0, 1.5, 4.0], [1.0, 0.8, 2.0], [1.0, 1.0, 4.0]):  # means (2, 1, 4), (1, .9, 3)
        assert step(weighting, losses) == [1, 1, 1]
    assert step(weighting, [1.0, 1.0, 1.0]) == pytest.approx([0.894307, 1.092310, 1.013383], abs=5e-7)


def test_reduction() -> None:
    """The mean is over the tasks that are present."""
    data = random_losses(20, absent=0.4)
    summed, meant = DWA(4, steps_per_epoch=3), DWA(4, steps_per_epoch=3, reduction="mean")
    for losses in data:
        weights = [w for w in step(summed, losses) if w is not None]
        found = [w for w in step(meant, losses) if w is not None]
        assert found == pytest.approx([w / len(weights) for w in weights], rel=1e-14)


def test_the_slower_task_weighs_more() -> None:
    weighting = DWA(2, steps_per_epoch=1)
    for losses in ([1.0, 1.0], [0.9, 0.3]):
        step(weighting, losses)
    slow, fast = step(weighting, [0.8, 0.1])
    assert slow > fast
    assert slow + fast == pytest.approx(2)


@pytest.mark.parametrize("window", [None, 1])
def test_rates_that_are_unknown_count_as_one(window: int | None) -> None:
    """A mean of 0, and a task absent for an epoch, of two tasks; the third is at rate 1/2."""
    weighting = DWA(3, window=window, steps_per_epoch=None if window else 1)
    for losses in ([9.0, 9.0, 9.0], [0.0, None, 1.0], [1.0, 1.0, 0.5]):
        found = step(weighting, losses)
    if window is None:  # its weights follow the epoch
        found = step(weighting, [1.0, 1.0, 1.0])
    rates = torch.tensor([1, 1, 0.5], dtype=torch.float64)
    assert found == pytest.approx((3 * torch.softmax(rates / 2, 0)).tolist())


def test_with_a_window_the_end_of_an_epoch_is_nothing() -> None:
    weighting = DWA(2, window=1)
    for losses in random_losses(3, 2):
        step(weighting, losses)
    with assert_untouched(weighting):
        weighting.end_epoch()


def test_an_epoch_without_a_step_is_none() -> None:
    weighting, other = DWA(2), DWA(2)
    for losses in ([1.0, 2.0], [3.0, 2.0]):
        for w in (weighting, other):
            step(w, losses)
            w.end_epoch()
        weighting.end_epoch()
    assert_same_state(weighting, other)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"num_tasks": 0}, "num_tasks: expected at least 1, found 0"),
        ({"temperature": 0.0}, "temperature.*0.0"),
        ({"temperature": float("nan")}, "temperature.*nan"),
        ({"temperature": float("inf")}, "temperature.*inf"),
        ({"steps_per_epoch": 0}, "steps_per_epoch: expected at least 1, found 0"),
        ({"window": 0}, "window: expected at least 1, found 0"),
        ({"window": 2, "steps_per_epoch": 7}, "window: knows no epochs; drop steps_per_epoch=7"),
        ({"reduction": "max"}, "reduction: .*'max'"),
    ],
)
def test_errors(options: dict, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        DWA(**{"num_tasks": 2, **options})


def test_ending_an_epoch_that_ends_by_itself() -> None:
    with pytest.raises(RuntimeError, match=r"DWA.end_epoch: epochs end by themselves every 5 steps"):
        DWA(2, steps_per_epoch=5).end_epoch()
