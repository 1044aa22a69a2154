"""STCH against its formula and its authors' algorithm, and what it promises."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from fastmtl import STCH, EqualWeighting, LossWeighting
from tests.weighting.literal import Losses, assert_steps, leaves, random_losses, step


@pytest.mark.parametrize("absent", [0.0, 0.4])
@pytest.mark.parametrize("ideal", [0.0, [0.1, -0.3, 0.2, 0.0]])
@pytest.mark.parametrize("preference", [None, [1, 2, 3, 4]])
def test_value_and_slopes(preference: list[float] | None, ideal: float | list[float], absent: float) -> None:
    weighting, mu = STCH(4, 0.3, preference, ideal), 0.3
    p = [1 / 4] * 4 if preference is None else [x / 10 for x in preference]
    low = [ideal] * 4 if isinstance(ideal, float) else ideal
    for losses in random_losses(10, absent=absent):
        powers = [0.0 if x is None else math.exp(p[t] * (x - low[t]) / mu) for t, x in enumerate(losses)]
        items = leaves(losses)
        total = weighting(items)
        total.backward()
        assert total.item() == pytest.approx(mu * math.log(sum(powers)), rel=1e-12)
        for t, item in enumerate(items):
            assert item is None or item.grad.item() == pytest.approx(p[t] * powers[t] / sum(powers), rel=1e-12)


@pytest.mark.parametrize("mu", [1e-9, 0.01, 1.0, 1e6])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e9])
def test_between_the_maximum_and_a_bound(mu: float, size: float) -> None:
    """Paper, proposition: above the maximum by at most ``mu log T``; no overflow."""
    losses = size * torch.rand(8, dtype=torch.float64)
    total, largest = STCH(8, mu)(losses).item(), losses.max().item() / 8
    assert largest <= total * (1 + 1e-12) + 1e-300
    assert total <= (largest + mu * math.log(8)) * (1 + 1e-12)


def minimum(weighting: LossWeighting) -> float:
    """By gradient descent from 0.2: of two losses whose front is concave, each least at the other's end."""
    x = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    for _ in range(400):
        total = weighting([1 - torch.exp(-((x - 1) ** 2)), 1 - torch.exp(-((x + 1) ** 2))])
        (grad,) = torch.autograd.grad(total, x)
        x.data -= 0.2 * grad
    return x.item()


def test_reaches_the_middle_of_a_concave_front() -> None:
    assert abs(minimum(STCH(2, 0.05))) < 1e-3
    assert minimum(EqualWeighting(2)) > 0.5


def literal(data: list[Losses], epoch: int, warmup: int, mu: float) -> Iterator[list[float]]:
    """The authors' code for multi-task learning, without its 1e-20; slopes by hand."""
    num_tasks = len(data[0])
    sums, counts = [0.0] * num_tasks, [0] * num_tasks
    for i, losses in enumerate(data):
        present = [t for t, x in enumerate(losses) if x is not None]
        if i // epoch <= warmup:
            if i // epoch == warmup:
                for t in present:
                    sums[t] += losses[t]
                    counts[t] += 1
            yield [1 / losses[t] if t in present else 0.0 for t in range(num_tasks)]
            continue
        nadir = [s / n if n else 1.0 for s, n in zip(sums, counts, strict=True)]
        powers = {t: math.exp(math.log(losses[t] / nadir[t]) / mu) for t in present}
        total = sum(powers.values())
        yield [num_tasks * powers[t] / total / losses[t] if t in present else 0.0 for t in range(num_tasks)]


@pytest.mark.parametrize("absent", [0.0, 0.4])
@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("mu", [1.0, 0.2])
def test_against_the_authors_code(mu: float, warmup: int, absent: float) -> None:
    data = random_losses(30, absent=absent)
    weighting = STCH(4, mu, variant="log", warmup_epochs=warmup, steps_per_epoch=5)
    assert_steps(weighting, data, literal(data, 5, warmup, mu))


def test_both_ways_to_end_an_epoch_are_one() -> None:
    by_itself, by_call = (STCH(3, variant="log", warmup_epochs=1, steps_per_epoch=n) for n in (3, None))
    for i, losses in enumerate(random_losses(12, 3, absent=0.3)):
        assert step(by_itself, losses) == step(by_call, losses)
        if i % 3 == 2:
            by_call.end_epoch()
    assert by_call.epoch == 4


def test_a_nadir_that_is_given() -> None:
    losses, nadir = [0.5, 3.0], [1.0, 2.0]
    powers = [0.5**2, 1.5**2]
    expected = [2 * p / sum(powers) / x for p, x in zip(powers, losses, strict=True)]
    assert step(STCH(2, 0.5, variant="log", nadir=nadir), losses) == pytest.approx(expected)
    powers = [0.5**3, 1.5]
    expected = [2 * 1.5 * powers[0] / sum(powers) / 0.5, 2 * 0.5 * powers[1] / sum(powers) / 3]
    assert step(STCH(2, 0.5, [3, 1], variant="log", nadir=nadir), losses) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mu": 0}, r"mu: .*0"),
        ({"variant": "smooth"}, r"variant: .*'smooth'"),
        ({"ideal": [0.0]}, r"ideal: expected one number per task \(3\), found 1"),
        ({"warmup_epochs": 2}, r"warmup_epochs: variant='paper' knows none, found 2"),
        ({"nadir": [1, 1, 1]}, r"nadir: variant='paper' knows none"),
        ({"steps_per_epoch": 3}, r"steps_per_epoch: variant='paper' knows none"),
        ({"variant": "log", "ideal": 0.0}, r"ideal: variant='log' knows none"),
        ({"variant": "log", "warmup_epochs": -1}, r"warmup_epochs: .*-1"),
        ({"variant": "log", "nadir": [1, 1, 0]}, r"nadir: expected one number above 0 per task"),
        ({"variant": "log", "nadir": [1, 1]}, r"nadir: expected one number per task \(3\), found 2"),
        ({"variant": "log", "nadir": [1, 1, 1], "steps_per_epoch": 3}, r"steps_per_epoch: variant='log' with a nadir"),
        ({"variant": "log", "nadir": [1, 1, 1], "warmup_epochs": 3}, r"warmup_epochs: variant='log' with a nadir"),
    ],
)
def test_errors(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        STCH(3, **options)
