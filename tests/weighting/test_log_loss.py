"""LogLoss against its formula."""

from __future__ import annotations

import math

import pytest

from fastmtl import GeometricMean, LogLoss
from tests.weighting.literal import leaves, random_losses, step


@pytest.mark.parametrize("absent", [0.0, 0.4])
def test_value_and_slopes(absent: float) -> None:
    weighting = LogLoss(4)
    for losses in random_losses(10, absent=absent):
        items = leaves(losses)
        total = weighting(items)
        total.backward()
        assert total.item() == pytest.approx(sum(math.log(x) for x in losses if x is not None), rel=1e-12)
        for x, item in zip(losses, items, strict=True):
            assert x is None or item.grad.item() == pytest.approx(1 / x, rel=1e-12)


def test_units_change_no_gradient() -> None:
    """The weighted gradient of ``c L`` is that of ``L``: its weight is 1/c."""
    a, b = step(LogLoss(2), [2.0, 3.0]), step(LogLoss(2), [2.0, 3e6])
    assert b == pytest.approx([a[0], a[1] / 1e6], rel=1e-12)


def test_in_proportion_to_the_geometric_mean() -> None:
    losses = [0.5, 4.0, 1.5]
    a, b = step(LogLoss(3), losses), step(GeometricMean(3), losses)
    mean = math.prod(losses) ** (1 / 3)
    assert a == pytest.approx([3 / mean * x for x in b], rel=1e-12)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_loss_that_is_not_positive(value: float) -> None:
    assert all(math.isnan(x) for x in step(LogLoss(3), [1.0, value, 2.0]))
