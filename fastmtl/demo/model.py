"""The demo's nets: a shared trunk with one head per task, and for comparison one small net per task."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

TRUNK_WIDTHS = (64, 32)
SINGLE_WIDTH = 16


class Heads(nn.Module):
    """One linear head per task, all computed in one matrix product, so that the plain step is as fast as can be."""

    def __init__(self, num_tasks: int, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tasks, num_features))
        self.bias = nn.Parameter(torch.zeros(num_tasks))
        nn.init.uniform_(self.weight, -1 / math.sqrt(num_features), 1 / math.sqrt(num_features))

    def forward(self, features: Tensor) -> Tensor:
        """Returns logits [T, B] from features [B, D] shared by all tasks, or [T, B, D] with each task's own."""
        if features.ndim == 2:
            return torch.addmm(self.bias[:, None], self.weight, features.t())
        return torch.baddbmm(self.bias[:, None, None], features, self.weight[:, :, None]).squeeze(-1)


class MultiTaskNet(nn.Module):
    """A trunk of two hidden layers, shared by the heads of all tasks."""

    def __init__(self, num_inputs: int, num_tasks: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in TRUNK_WIDTHS:
            layers += [nn.Linear(num_inputs, width), nn.ReLU()]
            num_inputs = width
        self.trunk = nn.Sequential(*layers)
        self.heads = Heads(num_tasks, num_inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns logits [T, B] from inputs [B, D]."""
        logits: Tensor = self.heads(self.trunk(inputs))
        return logits


class SingleTaskNets(nn.Module):
    """One net with a hidden layer of its own per task, all side by side.

    They share no parameter, and Adam treats each parameter by itself: training them by the sum of their losses is
    training each of them alone.
    """

    def __init__(self, num_inputs: int, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.hidden = nn.Linear(num_inputs, num_tasks * SINGLE_WIDTH)
        self.heads = Heads(num_tasks, SINGLE_WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns logits [T, B] from inputs [B, D]."""
        hidden = torch.relu(self.hidden(inputs)).unflatten(1, (self.num_tasks, SINGLE_WIDTH)).transpose(0, 1)
        logits: Tensor = self.heads(hidden)
        return logits


def task_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns each task's mean binary cross-entropy [T] from logits [T, B] and labels [B, T]."""
    losses = nn.functional.binary_cross_entropy_with_logits(logits, labels.t(), reduction="none")
    return losses.mean(dim=1)


def auc(scores: Tensor, labels: Tensor) -> Tensor:
    """Returns each task's area under the ROC curve [T], float64, from scores [T, N] and labels [N, T].

    It is the share of (positive, negative) pairs that the score ranks rightly; a tie counts half.
    """
    positive = labels.t() > 0.5
    result = torch.empty(len(scores), dtype=torch.float64)
    for task, score in enumerate(scores):
        _, place, count = torch.unique(score, return_inverse=True, return_counts=True)
        mean_rank = (count.cumsum(0) - (count - 1) / 2).double()[place]
        ours = positive[task]
        pairs = ours.sum() * (~ours).sum()
        result[task] = (mean_rank[ours].sum() - ours.sum() * (ours.sum() + 1) / 2) / pairs
    return result
