"""PBI against its geometry."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastmtl import PBI
from tests.weighting.literal import leaves, random_losses, step


def literal(losses: list[float], direction: list[float], theta: float) -> float:
    """The distances to a line through 0, by projection."""
    f, d = np.array(losses), np.array(direction) / np.linalg.norm(direction)
    foot = np.dot(f, d) * d
    return np.linalg.norm(foot) * np.sign(np.dot(f, d)) + theta * np.linalg.norm(f - foot)


@pytest.mark.parametrize("absent", [0.0, 0.4])
@pytest.mark.parametrize("theta", [0.0, 0.1, 5.0])
def test_value(theta: float, absent: float) -> None:
    preference, ideal = [1, 2, 3, 0.5], [0.1, -0.2, 0.0, 0.05]
    weighting = PBI(4, theta, preference, ideal)
    for losses in random_losses(10, absent=absent):
        there = [t for t, x in enumerate(losses) if x is not None]
        expected = literal([losses[t] - ideal[t] for t in there], [preference[t] for t in there], theta)
        assert weighting(leaves(losses)).item() == pytest.approx(expected, rel=1e-12)


def test_its_minimum_lies_where_the_direction_meets_the_front() -> None:
    """Of losses ``x^2`` and ``(1 - x)^2``: where ``x / (1 - x)`` is the root of the preference's quotient."""
    for a, b in ((1.0, 1.0), (4.0, 1.0), (1.0, 9.0)):
        x, weighting = torch.tensor(0.3, dtype=torch.float64, requires_grad=True), PBI(2, preference=[a, b])
        for i in range(300):
            (grad,) = torch.autograd.grad(weighting([x**2, (1 - x) ** 2]), x)
            x.data -= 0.05 * 0.97**i * grad
        assert x.item() / (1 - x.item()) == pytest.approx((a / b) ** 0.5, rel=1e-2)


def test_a_graph_keeps_its_preference() -> None:
    weighting, losses = PBI(2), torch.tensor([1.0, 2.0], requires_grad=True)
    total = weighting(losses)
    expected = weighting.weights.float()
    weighting.prefer([1, 3])
    total.backward()
    torch.testing.assert_close(losses.grad, expected)


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_in_the_direction_itself_only_the_distance_along_counts(size: float) -> None:
    direction = torch.tensor([1.0, 2.0, 0.3], dtype=torch.float64)
    found = step(PBI(3, preference=direction.tolist()), (size * direction).tolist())
    assert found == pytest.approx((direction / direction.norm()).tolist(), rel=1e-9)


def test_a_running_ideal_point_is_the_least_so_far() -> None:
    data, running = random_losses(20, 3, absent=0.3), PBI(3, ideal="running")
    least = [np.inf] * 3
    for losses in data:
        least = [low if x is None else min(low, x) for low, x in zip(least, losses, strict=True)]
        known = PBI(3, ideal=[0.0 if np.isinf(x) else x for x in least])
        assert step(running, losses) == step(known, losses)
    assert running.ideal_point.tolist() == least


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"theta": -1}, r"theta: .*-1"),
        ({"ideal": "least"}, r"ideal: .*'least'"),
        ({"ideal": [0.0]}, r"ideal: expected one number per task \(3\), found 1"),
        ({"ideal": [0.0, 1.0, float("inf")]}, r"ideal of task 2: .*inf"),
    ],
)
def test_errors(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        PBI(3, **options)
