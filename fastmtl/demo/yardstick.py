"""The yardstick of the demo: one net per task, each as trained at its own best epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .dataset import Dataset
from .methods import Settings
from .model import single_task_nets, task_losses

LR = 3e-3  # small enough that the best epoch is not the first, large enough that it is not the last


@dataclass(frozen=True)
class Yardstick:
    """The single-task nets' work.

    Attributes:
        logits: on the held-out rows, each task's at its own best epoch [N, T].
        epochs: that epoch, from 1 [T].
        history: after each epoch the losses on the validation rows [T].
    """

    logits: Tensor
    epochs: Tensor
    history: list[Tensor]


def steps_per_epoch(data: Dataset, settings: Settings) -> int:
    """Returns the number of steps of one epoch; the last batch may be smaller."""
    return -(-len(data.train.labels) // settings.batch)


@torch.no_grad()
def evaluate(model: torch.nn.Module, data: Dataset) -> tuple[Tensor, Tensor]:
    """Returns the losses on the validation rows [T] and the logits of the held-out rows [N, T]."""
    return task_losses(model(data.validation.inputs), data.validation.labels), model(data.held_out.inputs)


def train_single_tasks(
    data: Dataset, settings: Settings, advance: Callable[[int], object] = lambda steps: None
) -> Yardstick:
    """Trains one small net per task, each up to its own best epoch.

    Adam at a constant learning rate. After each epoch every task whose loss on the validation rows is the lowest so far
    takes its net as it is now; the held-out rows play no part in that choice.

    Args:
        data: tasks and rows.
        settings: seed, batch size and number of epochs.
        advance: called with the number of steps done since the last call.
    """
    torch.manual_seed(settings.seed)
    model = single_task_nets(data.train.inputs.shape[1], len(data.tasks))
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    history: list[Tensor] = []
    lowest = torch.full((len(data.tasks),), torch.inf)
    epochs = torch.zeros(len(data.tasks), dtype=torch.int64)
    logits = torch.zeros_like(data.held_out.labels)
    for epoch in range(1, settings.single_epochs + 1):
        for rows in torch.randperm(len(data.train.labels)).split(settings.batch):
            optimizer.zero_grad()
            task_losses(model(data.train.inputs[rows]), data.train.labels[rows]).sum().backward()
            optimizer.step()
            advance(1)
        losses, now = evaluate(model, data)
        history.append(losses)
        better = losses < lowest
        lowest[better], epochs[better], logits[:, better] = losses[better], epoch, now[:, better]
    return Yardstick(logits, epochs, history)
