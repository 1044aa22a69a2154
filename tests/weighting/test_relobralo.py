"""ReLoBRaLo against its paper's formulas, written out in plain Python."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from fastmtl import ReLoBRaLo
from fastmtl.random import uniforms
from tests.weighting.literal import Losses, assert_steps, random_losses, step


def literal(
    data: list[Losses], seed: int, alpha: float, temperature: float, lookback: float, start: str
) -> Iterator[list[float]]:
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    weights = [1.0] * len(data[0])

    def balance(losses: dict[int, float], earlier: dict[int, float]) -> dict[int, float]:
        powers = {t: math.exp(x / (temperature * earlier[t] + 1e-12)) for t, x in losses.items()}
        return {t: len(losses) * x / sum(powers.values()) for t, x in powers.items()}

    for i, step_losses in enumerate(data):
        losses = {t: x for t, x in enumerate(step_losses) if x is not None}
        for t, x in losses.items():
            first.setdefault(t, x)
            last.setdefault(t, x)
        rho = float(uniforms(torch.tensor([seed, i]), 1, 1)[0, 0]) < lookback
        since_first, since_last = balance(losses, first), balance(losses, last)
        for t, x in losses.items():
            history = weights[t] if rho else since_first[t]
            weights[t] = alpha * history + (1 - alpha) * since_last[t]
            if start == "balance" and i == 1:
                weights[t] = since_last[t]
            last[t] = x
        yield [weights[t] if t in losses else 0.0 for t in range(len(weights))]


@pytest.mark.parametrize("absent", [0.0, 0.4])
@pytest.mark.parametrize("start", ["history", "balance"])
@pytest.mark.parametrize(("alpha", "temperature", "lookback"), [(0.999, 0.1, 0.99), (0.5, 2.0, 0.5), (0.9, 1.0, 0.0)])
def test_against_the_paper(alpha: float, temperature: float, lookback: float, start: str, absent: float) -> None:
    data = random_losses(40, absent=absent)
    weighting = ReLoBRaLo(4, alpha, temperature, lookback, start, torch.Generator().manual_seed(2))
    assert_steps(weighting, data, literal(data, int(weighting.rng[0]), alpha, temperature, lookback, start))


def test_weights_sum_to_the_number_of_tasks() -> None:
    weighting = ReLoBRaLo(4, 0.9, 0.5, 0.7)
    assert step(weighting, [3.0, 1.0, 0.1, 7.0]) == pytest.approx([1] * 4)
    for losses in random_losses(20):
        assert sum(step(weighting, losses)) == pytest.approx(4)


@pytest.mark.parametrize("lookback", [0.2, 0.9])
def test_lookbacks_are_as_frequent_as_told(lookback: float) -> None:
    """With alpha = 1 the weights are the last ones, or those of a look back."""
    weighting, count = ReLoBRaLo(2, 1.0, 1.0, lookback), 400
    step(weighting, [1.0, 1.0])
    seen = [tuple(step(weighting, [1.0, 1 / (2 + i)])) for i in range(count)]
    kept = sum(a == b for a, b in zip(seen, [(1.0, 1.0), *seen], strict=False))
    assert abs(kept - count * lookback) < 5 * math.sqrt(count * lookback * (1 - lookback))


def test_a_loss_that_was_0() -> None:
    weighting = ReLoBRaLo(2)
    step(weighting, [0.0, 1.0])
    assert all(math.isfinite(x) for x in step(weighting, [1.0, 0.0]))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"alpha": 1.1}, "alpha: .*1.1"),
        ({"temperature": 0}, "temperature: .*0"),
        ({"lookback": -0.1}, "lookback: .*-0.1"),
        ({"start": "warm"}, "start: .*'warm'"),
    ],
)
def test_errors(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ReLoBRaLo(2, **options)
