"""The demo's nets: a shared trunk with one head per task, and for comparison one small net per task."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Heads(nn.Module):
    """One linear head per task, all computed in one product, so that the plain step is as fast as can be."""

    def __init__(self, num_tasks: int, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tasks, num_features))
        self.bias = nn.Parameter(torch.zeros(num_tasks))
        nn.init.uniform_(self.weight, -1 / math.sqrt(num_features), 1 / math.sqrt(num_features))

    def forward(self, features: Tensor) -> Tensor:
        """Returns logits [B, T] from features [B, D] shared by all tasks, or [B, T, D]: each task has its own."""
        if features.ndim == 2:
            return nn.functional.linear(features, self.weight, self.bias)
        return (features * self.weight).sum(dim=-1) + self.bias


class Net(nn.Module):
    """A trunk, and the heads behind it."""

    def __init__(self, trunk: nn.Sequential, heads: Heads) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = heads

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns logits [B, T] from inputs [B, D]."""
        logits: Tensor = self.heads(self.trunk(inputs))
        return logits


def multi_task_net(num_inputs: int, num_tasks: int, widths: Sequence[int] = (64, 32)) -> Net:
    """Returns a net whose hidden layers are shared by the heads of all tasks."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(num_inputs, width), nn.ReLU()]
        num_inputs = width
    return Net(nn.Sequential(*layers), Heads(num_tasks, num_inputs))


def single_task_nets(num_inputs: int, num_tasks: int, width: int = 16) -> Net:
    """Returns one net with a hidden layer of its own per task, all side by side.

    They share no parameter, and Adam treats each parameter by itself: training them by the sum of their losses is
    training each of them alone.
    """
    hidden = nn.Linear(num_inputs, num_tasks * width)
    return Net(nn.Sequential(hidden, nn.ReLU(), nn.Unflatten(1, (num_tasks, width))), Heads(num_tasks, width))


def task_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns each task's mean binary cross-entropy [T] from logits and labels [B, T]."""
    return nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(dim=0)
