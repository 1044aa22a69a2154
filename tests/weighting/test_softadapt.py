"""SoftAdapt against its paper's formulas, written out in plain Python."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from fastmtl import SoftAdapt
from fastmtl.weighting.softadapt import backward_difference
from tests.weighting.literal import Losses, assert_steps, random_losses, step


def literal(data: list[Losses], beta: float, normalized: bool, loss_weighted: bool) -> Iterator[list[float]]:
    """Differences of successive losses; an unknown rate is 0."""
    seen: list[list[float]] = [[] for _ in data[0]]
    for losses in data:
        for values, x in zip(seen, losses, strict=True):
            if x is not None:
                values.append(x)
        present = [t for t, x in enumerate(losses) if x is not None]
        rates = {t: seen[t][-1] - seen[t][-2] if len(seen[t]) > 1 else 0.0 for t in present}
        if normalized and any(rates.values()):
            size = sum(map(abs, rates.values()))
            rates = {t: x / size for t, x in rates.items()}
        powers = {t: math.exp(beta * x) for t, x in rates.items()}
        if loss_weighted:
            powers = {t: x * sum(seen[t][-2:]) / len(seen[t][-2:]) for t, x in powers.items()}
        yield [powers[t] / sum(powers.values()) if t in present else 0.0 for t in range(len(losses))]


@pytest.mark.parametrize("absent", [0.0, 0.4])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("loss_weighted", [False, True])
@pytest.mark.parametrize("beta", [0.1, 20.0, -3.0])
def test_against_the_paper(beta: float, loss_weighted: bool, normalized: bool, absent: float) -> None:
    data = random_losses(20, absent=absent)
    assert_steps(SoftAdapt(4, beta, normalized, loss_weighted), data, literal(data, beta, normalized, loss_weighted))


@pytest.mark.parametrize("order", range(1, 9))
def test_a_difference_of_order_n_is_exact_for_polynomials_of_degree_n(order: int) -> None:
    coefficients = backward_difference(order)
    assert len(coefficients) == order + 1
    for degree in range(order + 1):
        found = sum(c * (3.0 - k) ** degree for k, c in enumerate(coefficients))
        assert found == pytest.approx(degree * 3.0 ** max(degree - 1, 0), rel=1e-9, abs=1e-9)


def test_a_rate_of_higher_order() -> None:
    """Losses 1, 4, 9 and 3, 2, 1 fall at rates 6 and -1 at the third step: of second order, exactly."""
    weighting = SoftAdapt(2, beta=0.5, order=2)
    for losses in ([1.0, 3.0], [4.0, 2.0]):
        assert step(weighting, losses) == [0.5, 0.5]
    powers = math.exp(3.0), math.exp(-0.5)
    assert step(weighting, [9.0, 1.0]) == pytest.approx([x / sum(powers) for x in powers], rel=1e-12)


def test_normalized_is_of_no_unit() -> None:
    data = random_losses(8, 3)
    plain, scaled = SoftAdapt(3, 2.0, normalized=True), SoftAdapt(3, 2.0, normalized=True)
    for losses in data:
        assert step(plain, losses) == pytest.approx(step(scaled, [1e6 * x for x in losses]), rel=1e-9)


def test_standing_still_and_large_rates() -> None:
    weighting = SoftAdapt(2, normalized=True)
    assert step(weighting, [1.0, 2.0]) == step(weighting, [1.0, 2.0]) == [0.5, 0.5]
    steep = SoftAdapt(2, beta=10.0)
    step(steep, [1.0, 1.0])
    assert step(steep, [1e6, 1.0]) == [1, 0]


def test_errors() -> None:
    for options, text in (({"beta": math.nan}, "beta: .*nan"), ({"order": 0}, "order: .*0"), ({"order": 9}, "order")):
        with pytest.raises(ValueError, match=text):
            SoftAdapt(2, **options)
