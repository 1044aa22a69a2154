"""The weightings as their papers write them, in plain Python: lists, loops and floats."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastmtl import LossWeighting

Losses = list[float | None]
"""One step's losses; None: absent."""
Literal = Callable[[list[Losses], int], Iterator[list[float]]]
"""From all steps' losses and the steps of an epoch to each step's weights."""


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def dwa(data: list[Losses], epoch: int, temperature: float = 2.0) -> Iterator[list[float]]:
    """Liu et al., CVPR 2019, equation 7; an unknown rate is 1."""
    num_tasks = len(data[0])
    averages: list[list[float | None]] = []
    for start in range(0, len(data), epoch):
        if len(averages) < 2:
            weights = [1.0] * num_tasks
        else:
            last, before = averages[-1], averages[-2]
            rates = [
                a / b if a is not None and b is not None and b != 0 else 1.0 for a, b in zip(last, before, strict=True)
            ]
            powers = [math.exp(r / temperature) for r in rates]
            weights = [num_tasks * p / sum(powers) for p in powers]
        batches = data[start : start + epoch]
        yield from [weights] * len(batches)
        averages.append([mean([b[t] for b in batches if b[t] is not None]) for t in range(num_tasks)])


def dwa_window(data: list[Losses], window: int, temperature: float = 2.0) -> Iterator[list[float]]:
    """The variant with a window of iterations: costs start as ones, weights move after ``window`` iterations."""
    num_tasks = len(data[0])
    costs: list[Losses] = [[1.0] * num_tasks for _ in range(2 * window)]
    weights = [1.0] * num_tasks
    for iteration, losses in enumerate(data):
        costs = [*costs[1:], losses]
        if iteration > window:
            powers = []
            for t in range(num_tasks):
                new = mean([c[t] for c in costs[window:] if c[t] is not None])
                old = mean([c[t] for c in costs[:window] if c[t] is not None])
                powers.append(math.exp((1.0 if new is None or not old else new / old) / temperature))
            weights = [num_tasks * p / sum(powers) for p in powers]
        yield weights


def lbtw(data: list[Losses], epoch: int, alpha: float = 0.5) -> Iterator[list[float]]:
    """Liu, Liang, Gitter, AAAI 2019, Algorithm 1; ``epoch = len(data)``: the first batch of training counts."""
    num_tasks = len(data[0])
    first: Losses = []
    for step, losses in enumerate(data):
        if step % epoch == 0:
            first = [None] * num_tasks
        first = [x if f is None else f for f, x in zip(first, losses, strict=True)]
        yield [0.0 if x is None else (x / f) ** alpha for x, f in zip(losses, first, strict=True)]


def htw(data: list[Losses], epoch: int, main: int, total_steps: int, ramp: str = "article") -> Iterator[list[float]]:
    """Kongyoung et al., 2020: the Abridged Linear Schedule over the first 10 % of the steps, and LBTW."""
    for step, weights in enumerate(lbtw(data, epoch)):
        if 10 * step >= total_steps:
            schedule = 1.0
        else:
            schedule = step / total_steps if ramp == "article" else step / (0.1 * total_steps)
        yield [schedule if t == main else w for t, w in enumerate(weights)]


def random_losses(num_steps: int, num_tasks: int = 4, absent: float = 0.0) -> list[Losses]:
    """Falling losses, each at its own speed, of which some are absent, but never all."""
    step = torch.arange(num_steps).unsqueeze(1)
    values = torch.exp(-step * torch.logspace(-3, -1, num_tasks)) * (0.5 + torch.rand(num_steps, num_tasks))
    gone = torch.rand(num_steps, num_tasks) < absent
    gone[:, -1] &= ~gone[:, :-1].all(1)
    return [
        [None if g else v for v, g in zip(vs, gs, strict=True)]
        for vs, gs in zip(values.double().tolist(), gone.tolist(), strict=True)
    ]


def leaves(losses: Losses) -> list[Tensor | None]:
    return [None if x is None else torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in losses]


def step(weighting: LossWeighting, losses: Losses) -> list[float | None]:
    """One training step: the weights as they arrive at the losses."""
    items = leaves(losses)
    weighting(items).backward()
    return [None if x is None else x.grad.item() for x in items]


def assert_steps(weighting: LossWeighting, data: list[Losses], expected: Iterator[list[float]]) -> None:
    """Every step's weights are as expected, to rounding of float64."""
    for losses, weights in zip(data, expected, strict=True):
        found = step(weighting, losses)
        for x, f, w in zip(losses, found, weights, strict=True):
            assert (f is None) == (x is None)
            assert f is None or math.isclose(f, w, rel_tol=1e-12, abs_tol=1e-15), (f, w)
