"""Trains the same net from the same start by each method, in turns, and measures quality, cost and conflict."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

import fastmtl

from .data import Dataset
from .methods import METHODS, Settings, Trainer
from .model import auc

BLOCK = 8  # steps that one method makes before the next has its turn
PROBE_ROWS = 512


@dataclass
class Record:
    """What was measured of one method.

    Attributes:
        label: the method's name in table and plots.
        trained: False for a method that was only timed.
        turns: per turn of its own the median time of a step in seconds.
        weights: per step the tasks' weights [T].
        cosines: per probe the cosines between the tasks' gradients of the trunk [T, T], NaN for a zero gradient.
        losses: per probe the held-out losses [T].
        auc: at the end, on the held-out rows [T].
    """

    label: str
    trained: bool
    turns: dict[int, float] = field(default_factory=dict)
    weights: list[Tensor] = field(default_factory=list)
    cosines: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    auc: Tensor | None = None

    def step_time(self) -> float:
        """Returns the median time of a step in seconds."""
        return statistics.median(self.turns.values())

    def cost(self, plain: Record) -> float:
        """Returns the median over the turns of this method's step time over the plain step's in the same turn."""
        return statistics.median(time / plain.turns[turn] for turn, time in self.turns.items())

    def mean_weights(self) -> Tensor:
        """Returns the tasks' mean weights over all steps [T]."""
        return torch.stack(self.weights).mean(dim=0)

    def conflict(self) -> float:
        """Returns the share of task pairs with a negative cosine, over all probes."""
        pairs = torch.stack(self.cosines)
        upper = torch.ones(pairs.shape[1:], dtype=torch.bool).triu(1)
        cosines = pairs[:, upper]
        return (cosines < 0).sum().item() / (~cosines.isnan()).sum().item()


@dataclass(frozen=True)
class Outcome:
    """All records of a run, and the steps after which the methods were probed."""

    records: dict[str, Record]
    probe_steps: list[int]


def cosines(trainer: Trainer, inputs: Tensor, labels: Tensor) -> Tensor:
    """Returns the cosines [T, T], float64, between the tasks' gradients of the trunk on a batch."""
    params = list(trainer.model.trunk.parameters())
    losses = trainer.losses(inputs, labels)
    rows = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
    gramian = fastmtl.ops.gram([torch.stack(grads) for grads in zip(*rows, strict=True)])[0]
    norms = gramian.diagonal().sqrt()
    return gramian / (norms[:, None] * norms)


def batches(rows: int, settings: Settings) -> Iterator[Tensor]:
    """Yields the row numbers of one batch after the other, every row at most once per epoch."""
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        yield from torch.randperm(rows, generator=generator)[: rows // settings.batch * settings.batch].split(
            settings.batch
        )


def total_steps(settings: Settings) -> int:
    """Returns the number of steps that ``run`` will make, by all methods together."""
    turns = [min(BLOCK, settings.steps - start) for start in range(0, settings.steps, BLOCK)]
    timed = sum(turns[turn] for turn in spread(settings.timed_turns, len(turns)))
    return sum(settings.steps if METHODS[name].trained else timed for name in settings.methods)


def spread(count: int, size: int) -> set[int]:
    """Returns ``count`` numbers (or fewer), evenly spread over 0..size-1."""
    return {(2 * i + 1) * size // (2 * count) for i in range(count)}


def run(data: Dataset, settings: Settings, advance: Callable[[int], object] = lambda steps: None) -> Outcome:
    """Trains by every method and returns what was measured.

    The methods take turns of ``BLOCK`` steps on the same batches, beginning with another one each time, so that a
    busy machine slows all of them. The first step of a turn, which finds cold caches, is not timed.

    Args:
        data: tasks and rows.
        settings: what to do.
        advance: called with the number of steps done since the last call.
    """
    trainers = {name: METHODS[name].make(data, settings) for name in settings.methods}
    records = {name: Record(METHODS[name].label, METHODS[name].trained) for name in settings.methods}
    stream = batches(len(data.train.labels), settings)
    probe = slice(0, PROBE_ROWS)
    starts = list(range(0, settings.steps, BLOCK))
    probed = {starts[turn] for turn in spread(settings.probes, len(starts))}
    timed = spread(settings.timed_turns, len(starts))
    probe_steps: list[int] = []

    def look(step: int) -> None:
        probe_steps.append(step)
        for name, trainer in trainers.items():
            if METHODS[name].trained:
                with torch.no_grad():
                    records[name].losses.append(trainer.losses(data.held_out.inputs, data.held_out.labels))
                if trainer.shared:
                    records[name].cosines.append(cosines(trainer, data.train.inputs[probe], data.train.labels[probe]))

    for turn, start in enumerate(starts):
        if start in probed:
            look(start)
        rows = [next(stream) for _ in range(min(BLOCK, settings.steps - start))]
        block = [(data.train.inputs[row], data.train.labels[row]) for row in rows]
        first = turn % len(trainers)
        for name in [*settings.methods[first:], *settings.methods[:first]]:
            if not METHODS[name].trained and turn not in timed:
                continue
            times = []
            for inputs, labels in block:
                begin = time.perf_counter()
                weights = trainers[name].step(inputs, labels)
                times.append(time.perf_counter() - begin)
                records[name].weights.append(weights.double())
            records[name].turns[turn] = statistics.median(times[1:] or times)
            advance(len(block))
    look(settings.steps)
    for name, trainer in trainers.items():
        if METHODS[name].trained:
            with torch.no_grad():
                records[name].auc = auc(trainer.model(data.held_out.inputs), data.held_out.labels)
    return Outcome(records, probe_steps)
