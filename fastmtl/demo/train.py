"""Trains the same net from the same start by each method, in turns, and measures quality, cost and conflict."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastmtl

from .data import Dataset
from .model import Net, auc, multi_task_net, single_task_nets, task_losses
from .pair_loop import pcgrad_by_pairs

BLOCK = 8  # steps that one method makes before the next has its turn
PROBE_ROWS = 512


@dataclass(frozen=True)
class Settings:
    """What one run of the demo is to do."""

    methods: tuple[str, ...]
    steps: int
    seed: int
    batch: int = 256
    lr: float = 5e-3
    probes: int = 12
    timed_turns: int = 8  # of a method that is only timed


class Trainer:
    """One method with its own net and optimizer: Adam, its learning rate falling linearly to zero.

    Args:
        data: tasks and rows.
        settings: steps, seed and learning rate.
    """

    shared = True  # the net has a trunk that all tasks share
    trained = True  # makes all steps; otherwise only a few, to be timed

    def __init__(self, data: Dataset, settings: Settings) -> None:
        torch.manual_seed(settings.seed)
        self.num_tasks = len(data.tasks)
        self.model = self.make_model(data.train.inputs.shape[1])
        groups = [{"params": list(self.model.parameters())}, *self.method_parameters()]
        self.optimizer = torch.optim.Adam(groups, lr=settings.lr)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 - step / settings.steps)

    def make_model(self, num_inputs: int) -> Net:
        """Returns the net to train."""
        return multi_task_net(num_inputs, self.num_tasks)

    def method_parameters(self) -> list[dict[str, Any]]:
        """Returns parameter groups for the optimizer that belong to the method itself."""
        return []

    def losses(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Returns the tasks' losses [T] on a batch."""
        return task_losses(self.model(inputs), labels)

    def backward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Fills ``.grad`` and returns the weights [T] that the losses or gradients got. Here: one each."""
        self.losses(inputs, labels).sum().backward()
        return torch.ones(self.num_tasks)

    def step(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Makes one training step and returns the weights [T]."""
        self.optimizer.zero_grad()
        weights = self.backward(inputs, labels)
        self.optimizer.step()
        self.schedule.step()
        return weights


class SingleTasks(Trainer):
    """One small net per task."""

    shared = False

    def make_model(self, num_inputs: int) -> Net:
        """See `Trainer.make_model`."""
        return single_task_nets(num_inputs, self.num_tasks)


class ParameterLevel(Trainer):
    """A gradient method on the T gradients of the trunk's parameters: T backward passes."""

    def __init__(self, make_method: Callable[[], fastmtl.GradientMethod], data: Dataset, settings: Settings) -> None:
        super().__init__(data, settings)
        self.method = make_method()

    def backward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """See `Trainer.backward`."""
        losses = self.losses(inputs, labels)
        return fastmtl.backward(losses, self.method, shared_params=self.model.trunk).weights


class LastLayerNorms(ParameterLevel):
    """GradNorm, whose paper takes the norms over the last shared layer: T short backward passes and a whole one."""

    def __init__(self, data: Dataset, settings: Settings) -> None:
        super().__init__(fastmtl.GradNorm, data, settings)

    def backward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """See `Trainer.backward`."""
        losses, trunk = self.losses(inputs, labels), self.model.trunk
        last_layer = trunk[-2]  # a ReLU comes after it
        return fastmtl.backward(losses, self.method, shared_params=trunk, gramian_params=last_layer).weights


class FeatureLevel(Trainer):
    """A gradient method as a layer behind the trunk: one backward pass."""

    def __init__(self, make_method: Callable[[], fastmtl.GradientMethod], data: Dataset, settings: Settings) -> None:
        super().__init__(data, settings)
        self.surgery = fastmtl.FeatureSurgery(make_method(), num_tasks=self.num_tasks)

    def backward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """See `Trainer.backward`."""
        features = self.surgery(self.model.trunk(inputs))
        losses = task_losses(self.model.heads(torch.stack(features, dim=1)), labels)
        self.surgery.total(losses).backward()
        assert self.surgery.result is not None  # of the backward pass just made
        return self.surgery.result.weights


class Uncertainty(Trainer):
    """Loss weights that are learned with the net: one backward pass."""

    def method_parameters(self) -> list[dict[str, Any]]:
        """See `Trainer.method_parameters`."""
        self.weighting = fastmtl.UncertaintyWeighting(num_tasks=self.num_tasks, kind="classification")
        return [self.weighting.parameter_group()]

    def backward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """See `Trainer.backward`."""
        losses = self.losses(inputs, labels)
        losses.retain_grad()
        self.weighting(losses).backward()
        assert losses.grad is not None  # it was retained
        return losses.grad  # the derivative of the weighted sum by each loss


class PassesOnly(Trainer):
    """T backward passes whose gradients are merely added: what parameter level costs before any surgery."""

    trained = False

    def backward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """See `Trainer.backward`."""
        losses = self.losses(inputs, labels)
        for loss in losses:
            loss.backward(retain_graph=True)
        return torch.ones(self.num_tasks)


class PairLoop(Trainer):
    """PCGrad by a Python loop over pairs."""

    trained = False

    def backward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """See `Trainer.backward`."""
        losses = self.losses(inputs, labels)
        heads = list(self.model.heads.parameters())
        for param, grad in zip(heads, torch.autograd.grad(losses.sum(), heads, retain_graph=True), strict=True):
            param.grad = grad
        pcgrad_by_pairs(list(losses), list(self.model.trunk.parameters()))
        return torch.full((self.num_tasks,), math.nan)


@dataclass(frozen=True)
class Entry:
    """One line of the closing table: its label, and what makes its trainer."""

    label: str
    make: Callable[[Dataset, Settings], Trainer]


METHODS = {
    "sum": Entry("summed loss", Trainer),
    "uncertainty": Entry("UncertaintyWeighting", Uncertainty),
    "gradnorm": Entry("GradNorm", LastLayerNorms),
    "pcgrad": Entry("PCGrad", partial(ParameterLevel, fastmtl.PCGrad)),
    "gradvac": Entry("GradVac", partial(ParameterLevel, fastmtl.GradVac)),
    "mgda": Entry("MGDA", partial(ParameterLevel, fastmtl.MGDA)),
    "pcgrad-features": Entry("PCGrad (features)", partial(FeatureLevel, fastmtl.PCGrad)),
    "mgda-features": Entry("MGDA (features)", partial(FeatureLevel, fastmtl.MGDA)),
    "single": Entry("one net per task", SingleTasks),
    "passes": Entry("T backwards, no surgery", PassesOnly),
    "pair-loop": Entry("PCGrad (pair loop)", PairLoop),
}


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
    """Yields the row numbers of one batch after the other, every row once per epoch."""
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        yield from torch.randperm(rows, generator=generator)[: rows // settings.batch * settings.batch].split(
            settings.batch
        )


def total_steps(settings: Settings) -> int:
    """Returns the number of steps that ``run`` will make, by all methods together."""
    turns = [min(BLOCK, settings.steps - start) for start in range(0, settings.steps, BLOCK)]
    timed = sum(turns[turn] for turn in spread(settings.timed_turns, len(turns)))
    return sum(
        settings.steps if METHODS[name].make not in (PassesOnly, PairLoop) else timed for name in settings.methods
    )


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
    records = {name: Record(METHODS[name].label, trainers[name].trained) for name in settings.methods}
    stream = batches(len(data.train.labels), settings)
    probe = slice(0, PROBE_ROWS)
    starts = list(range(0, settings.steps, BLOCK))
    probed = {starts[turn] for turn in spread(settings.probes, len(starts))}
    timed = spread(settings.timed_turns, len(starts))
    probe_steps: list[int] = []

    def look(step: int) -> None:
        probe_steps.append(step)
        for name, trainer in trainers.items():
            if trainer.trained:
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
            if not trainers[name].trained and turn not in timed:
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
        if trainer.trained:
            with torch.no_grad():
                records[name].auc = auc(trainer.model(data.held_out.inputs), data.held_out.labels)
    return Outcome(records, probe_steps)
