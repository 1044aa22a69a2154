"""GeometricMean against its formula."""

from __future__ import annotations

import math

import pytest
import torch

from fastmtl import GeometricMean
from tests.weighting.literal import leaves, random_losses, step


@pytest.mark.parametrize("absent", [0.0, 0.4])
def test_value_and_slopes(absent: float) -> None:
    weighting = GeometricMean(4)
    for losses in random_losses(10, absent=absent):
        present = [x for x in losses if x is not None]
        expected = math.prod(present) ** (1 / len(present))
        items = leaves(losses)
        total = weighting(items)
        total.backward()
        assert total.item() == pytest.approx(expected, rel=1e-12)
        for x, item in zip(losses, items, strict=True):
            assert x is None or item.grad.item() == pytest.approx(expected / (len(present) * x), rel=1e-12)


def test_units_do_not_matter() -> None:
    """Another unit of one loss scales all weighted losses alike."""
    a, b = step(GeometricMean(2), [2.0, 3.0]), step(GeometricMean(2), [2.0, 3000.0])
    assert b[0] * 2.0 / (a[0] * 2.0) == pytest.approx(b[1] * 3000 / (a[1] * 3), rel=1e-12)


def test_focus_multiplies_by_the_favoured_tasks_own_mean() -> None:
    total = GeometricMean(4, focus=[1, 3])(torch.tensor([2.0, 3.0, 5.0, 7.0], dtype=torch.float64))
    assert total.item() == pytest.approx((2 * 3 * 5 * 7) ** (1 / 4) * (3 * 7) ** (1 / 2), rel=1e-12)
    absent = GeometricMean(3, focus=[1])([torch.tensor(2.0), None, torch.tensor(8.0)])
    assert absent.item() == pytest.approx(4)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_loss_that_is_not_positive(value: float) -> None:
    assert math.isnan(step(GeometricMean(3), [1.0, value, 2.0])[1])


def test_errors() -> None:
    for focus, error in (
        (1, TypeError),
        ("ab", TypeError),
        ([3], ValueError),
        ([-1], ValueError),
        ([1, 1], ValueError),
    ):
        with pytest.raises(error, match="focus"):
            GeometricMean(3, focus=focus)
