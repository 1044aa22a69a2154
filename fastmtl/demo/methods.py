"""The methods that the demo compares: each has a net of its own and makes its training steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastmtl

from .dataset import Dataset
from .model import Net, multi_task_net, single_task_nets, task_losses
from .pair_loop import pcgrad_by_pairs


@dataclass(frozen=True)
class Settings:
    """What one run of the demo is to do."""

    methods: tuple[str, ...]
    steps: int
    seed: int
    batch: int = 256
    lr: float = 1e-2
    probes: int = 12
    timed_turns: int = 8  # of a method that is only timed
    single_epochs: int = 16  # at most, of the single-task nets


class Trainer:
    """One method with its own net and optimizer: Adam, its learning rate falling linearly to zero.

    Args:
        data: tasks and rows.
        settings: steps, seed and learning rate.
    """

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
    """One small net per task. Only timed here: `yardstick.train_single_tasks` trains such nets."""

    def make_model(self, num_inputs: int) -> Net:
        """See `Trainer.make_model`."""
        return single_task_nets(num_inputs, self.num_tasks)


class LossWeighting(Trainer):
    """Loss values to one weighted sum: one backward pass."""

    def __init__(
        self, make_weighting: Callable[[Dataset, Settings], fastmtl.LossWeighting], data: Dataset, settings: Settings
    ) -> None:
        self.weighting = make_weighting(data, settings)
        super().__init__(data, settings)

    def method_parameters(self) -> list[dict[str, Any]]:
        """See `Trainer.method_parameters`."""
        learned = list(self.weighting.parameters())
        return [{"params": learned, "weight_decay": 0.0}] if learned else []

    def backward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """See `Trainer.backward`."""
        losses = self.losses(inputs, labels)
        losses.retain_grad()
        self.weighting(losses).backward()
        assert losses.grad is not None  # it was retained
        return losses.grad  # the derivative of the weighted sum by each loss


class ParameterLevel(Trainer):
    """A gradient method on the T gradients of the trunk's parameters: T backward passes."""

    def __init__(self, make_method: Callable[[int], fastmtl.GradientMethod], data: Dataset, settings: Settings) -> None:
        super().__init__(data, settings)
        self.method = make_method(self.num_tasks)

    def backward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """See `Trainer.backward`."""
        losses = self.losses(inputs, labels)
        return fastmtl.backward(losses, self.method, shared_params=self.model.trunk).weights


class LastLayerNorms(ParameterLevel):
    """GradNorm, whose paper takes the norms over the last shared layer: T short backward passes and a whole one."""

    def backward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """See `Trainer.backward`."""
        losses, trunk = self.losses(inputs, labels), self.model.trunk
        last_layer = trunk[-2]  # a ReLU comes after it
        return fastmtl.backward(losses, self.method, shared_params=trunk, gramian_params=last_layer).weights


class FeatureLevel(Trainer):
    """A gradient method as a layer behind the trunk: one backward pass."""

    def __init__(self, make_method: Callable[[int], fastmtl.GradientMethod], data: Dataset, settings: Settings) -> None:
        super().__init__(data, settings)
        self.surgery = fastmtl.FeatureSurgery(make_method(self.num_tasks), num_tasks=self.num_tasks)

    def backward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """See `Trainer.backward`."""
        features = self.surgery(self.model.trunk(inputs))
        losses = task_losses(self.model.heads(torch.stack(features, dim=1)), labels)
        self.surgery.total(losses).backward()
        assert self.surgery.result is not None  # of the backward pass just made
        return self.surgery.result.weights


class PassesOnly(Trainer):
    """T backward passes whose gradients are merely added: what parameter level costs before any surgery."""

    def backward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """See `Trainer.backward`."""
        losses = self.losses(inputs, labels)
        for loss in losses:
            loss.backward(retain_graph=True)
        return torch.ones(self.num_tasks)


class PairLoop(Trainer):
    """PCGrad by a Python loop over pairs."""

    def backward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """See `Trainer.backward`."""
        losses = self.losses(inputs, labels)
        heads = list(self.model.heads.parameters())
        for param, grad in zip(heads, torch.autograd.grad(losses.sum(), heads, retain_graph=True), strict=True):
            param.grad = grad
        pcgrad_by_pairs(list(losses), list(self.model.trunk.parameters()))
        return torch.full((self.num_tasks,), math.nan)


def uncertainty(data: Dataset, settings: Settings) -> fastmtl.LossWeighting:
    """Makes UncertaintyWeighting for cross-entropies."""
    return fastmtl.UncertaintyWeighting(len(data.tasks), kind="classification")


def dwa(data: Dataset, settings: Settings) -> fastmtl.LossWeighting:
    """Makes DWA, whose epochs are those of the training rows."""
    return fastmtl.DWA(len(data.tasks), steps_per_epoch=max(1, len(data.train.labels) // settings.batch))


def lbtw(data: Dataset, settings: Settings) -> fastmtl.LossWeighting:
    """Makes LBTW."""
    return fastmtl.LBTW(len(data.tasks))


def htw(data: Dataset, settings: Settings) -> fastmtl.LossWeighting:
    """Makes HTW for the main task of the data set."""
    return fastmtl.HTW(len(data.tasks), main=data.main, total_steps=settings.steps)


def peltr(num_tasks: int, scale_heads: bool = True) -> fastmtl.GradientMethod:
    """Makes PE-LTR, which gives every task at least half of an equal share of the weight."""
    return fastmtl.PELTR(lower_bounds=0.5 / num_tasks, scale_heads=scale_heads)


@dataclass(frozen=True)
class Entry:
    """One line of the closing table.

    Attributes:
        label: the method's name.
        make: makes its trainer.
        trained: False: it makes only a few steps, to be timed.
    """

    label: str
    make: Callable[[Dataset, Settings], Trainer]
    trained: bool = True


METHODS = {
    "sum": Entry("summed loss", Trainer),
    "uncertainty": Entry("UncertaintyWeighting", partial(LossWeighting, uncertainty)),
    "dwa": Entry("DWA", partial(LossWeighting, dwa)),
    "lbtw": Entry("LBTW", partial(LossWeighting, lbtw)),
    "htw": Entry("HTW", partial(LossWeighting, htw)),
    "gradnorm": Entry("GradNorm", partial(LastLayerNorms, lambda _: fastmtl.GradNorm())),
    "pcgrad": Entry("PCGrad", partial(ParameterLevel, lambda _: fastmtl.PCGrad())),
    "gradvac": Entry("GradVac", partial(ParameterLevel, lambda _: fastmtl.GradVac())),
    "mgda": Entry("MGDA", partial(ParameterLevel, lambda _: fastmtl.MGDA())),
    "peltr": Entry("PE-LTR", partial(ParameterLevel, peltr)),
    "pcgrad-features": Entry("PCGrad (features)", partial(FeatureLevel, lambda _: fastmtl.PCGrad())),
    "gradvac-features": Entry("GradVac (features)", partial(FeatureLevel, lambda _: fastmtl.GradVac())),
    "mgda-features": Entry("MGDA (features)", partial(FeatureLevel, lambda _: fastmtl.MGDA())),
    "peltr-features": Entry("PE-LTR (features)", partial(FeatureLevel, partial(peltr, scale_heads=False))),
    "single": Entry("one net per task", SingleTasks, trained=False),
    "passes": Entry("T backwards, no surgery", PassesOnly, trained=False),
    "pair-loop": Entry("PCGrad (pair loop)", PairLoop, trained=False),
}
