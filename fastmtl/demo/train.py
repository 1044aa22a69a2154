"""Trains the same net from the same start by each method, in turns, and measures quality, cost and conflict."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

import fastmtl

from . import measures
from .dataset import Dataset
from .methods import METHODS, Settings, Trainer
from .model import task_losses
from .yardstick import Yardstick, steps_per_epoch, train_single_tasks

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
        gramians: per probe the inner products of the tasks' gradients of the trunk [T, T], float64.
        losses: per probe the held-out losses [T].
        auc: at the end, on the held-out rows [T].
        log_loss: the same.
    """

    label: str
    trained: bool
    turns: dict[int, float] = field(default_factory=dict)
    weights: list[Tensor] = field(default_factory=list)
    gramians: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    auc: Tensor | None = None
    log_loss: Tensor | None = None

    def score(self, logits: Tensor, labels: Tensor) -> None:
        """Takes the quality from logits and labels of the held-out rows [N, T]."""
        self.auc, self.log_loss = measures.auc(logits, labels), task_losses(logits, labels)

    def step_time(self) -> float:
        """Returns the median time of a step in seconds."""
        return statistics.median(self.turns.values())

    def cost(self, plain: Record) -> float:
        """Returns the median over the turns of this method's step time over the plain step's in the same turn."""
        return statistics.median(time / plain.turns[turn] for turn, time in self.turns.items())

    def mean_weights(self) -> Tensor:
        """Returns the tasks' mean weights over all steps [T]."""
        return torch.stack(self.weights).mean(dim=0)

    def mean_over_training(self, measure: Callable[[Tensor], float]) -> float:
        """Returns the mean of a measure of the gradients' inner products over the probes after the start."""
        return statistics.fmean(measure(gramian) for gramian in self.gramians[1:])

    def conflict(self) -> float:
        """Returns the share of task pairs whose gradients have a negative cosine, mean over training."""
        return self.mean_over_training(measures.conflicting_pairs)


@dataclass(frozen=True)
class Outcome:
    """All records of a run.

    Attributes:
        records: per method.
        probe_steps: the steps after which the methods were probed: first 0, last the end of training.
        yardstick: the single-task nets, where they were asked for.
    """

    records: dict[str, Record]
    probe_steps: list[int]
    yardstick: Yardstick | None = None

    def delta_m(self, record: Record) -> tuple[float, float] | None:
        """Returns the record's mean relative gain over the single-task nets in AUC and in log-loss."""
        single = self.records.get("single")
        if single is None or single.auc is None or single.log_loss is None:
            return None
        if record.auc is None or record.log_loss is None:
            return None
        return (
            measures.delta_m(record.auc, single.auc, higher_is_better=True),
            measures.delta_m(record.log_loss, single.log_loss, higher_is_better=False),
        )


def gramian(trainer: Trainer, inputs: Tensor, labels: Tensor) -> Tensor:
    """Returns the inner products [T, T], float64, of the tasks' gradients of the trunk on a batch."""
    params = list(trainer.model.trunk.parameters())
    losses = trainer.losses(inputs, labels)
    rows = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
    return fastmtl.ops.gram([torch.stack(grads) for grads in zip(*rows, strict=True)])[0]


def batches(rows: int, settings: Settings) -> Iterator[Tensor]:
    """Yields the row numbers of one batch after the other, every row at most once per epoch."""
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        yield from torch.randperm(rows, generator=generator)[: rows // settings.batch * settings.batch].split(
            settings.batch
        )


def total_steps(data: Dataset, settings: Settings) -> int:
    """Returns the number of steps that ``run`` will make, by all methods and the single-task nets together."""
    turns = [min(BLOCK, settings.steps - start) for start in range(0, settings.steps, BLOCK)]
    timed = sum(turns[turn] for turn in spread(settings.timed_turns, len(turns)))
    single = settings.single_epochs * steps_per_epoch(data, settings) if "single" in settings.methods else 0
    return single + sum(settings.steps if METHODS[name].trained else timed for name in settings.methods)


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
    generator = torch.Generator().manual_seed(settings.seed)
    probe = torch.randperm(len(data.train.labels), generator=generator)[:PROBE_ROWS]
    starts = list(range(0, settings.steps, BLOCK))
    probed = {starts[probe * len(starts) // settings.probes] for probe in range(settings.probes)}
    timed = spread(settings.timed_turns, len(starts))
    probe_steps: list[int] = []

    def look(step: int) -> None:
        probe_steps.append(step)
        for name, trainer in trainers.items():
            if METHODS[name].trained:
                with torch.no_grad():
                    records[name].losses.append(trainer.losses(data.held_out.inputs, data.held_out.labels))
                records[name].gramians.append(gramian(trainer, data.train.inputs[probe], data.train.labels[probe]))

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
                records[name].score(trainer.model(data.held_out.inputs), data.held_out.labels)
    yardstick = None
    if "single" in records:
        yardstick = train_single_tasks(data, settings, advance)
        records["single"].score(yardstick.logits, data.held_out.labels)
    return Outcome(records, probe_steps, yardstick)
