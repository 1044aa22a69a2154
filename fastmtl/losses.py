"""The losses of one step: names, presence, values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LossesLike = Sequence[Tensor | None] | Mapping[str, Tensor | None] | Tensor
"""T scalar losses: a sequence, a mapping from task name, or one 1-D tensor; None: the task is absent. A mapping's order
is the order of the tasks; methods that tell tasks apart (by state or options) refuse another order later."""


@dataclass(frozen=True)
class Losses:
    """T checked losses.

    Attributes:
        names: One per task, for errors and plots.
        items: One scalar tensor per task, or None where it is absent.
    """

    names: tuple[str, ...]
    items: tuple[Tensor | None, ...]

    def __len__(self) -> int:
        return len(self.items)

    @property
    def present(self) -> list[Tensor]:
        """The losses that are there, at least one."""
        return [x for x in self.items if x is not None]

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self.present[0].device

    def values(self) -> Tensor:
        """``[T]`` float64, detached, NaN for absent tasks."""
        with torch.no_grad():
            values = stack_scalars(self.present).to(torch.float64)
        if len(values) == len(self):
            return values
        return spread(values, [t for t, x in enumerate(self.items) if x is not None], len(self))


def numbered(num_tasks: int) -> tuple[str, ...]:
    """Names of tasks that have none."""
    return tuple(f"task {t}" for t in range(num_tasks))


def stack_scalars(scalars: Sequence[Tensor]) -> Tensor:
    """``[n]`` from n scalars, in their common dtype, float32 or wider."""
    dtypes = {x.dtype for x in scalars}
    if len(dtypes) == 1 and dtypes <= {torch.float32, torch.float64}:
        return torch.stack(list(scalars))
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    return torch.stack([x.to(wide) for x in scalars])


def spread(values: Tensor, tasks: Sequence[int], num_tasks: int, fill: float = float("nan")) -> Tensor:
    """``[T]`` from the values of some tasks, ``fill`` for the others; sends no index tensor to the device."""
    parts = [values.new_full((), fill)] * num_tasks
    for t, value in zip(tasks, values.unbind(0), strict=True):
        parts[t] = value
    return torch.stack(parts)


def parse_losses(losses: LossesLike, differentiable: bool = True, empty: bool = False) -> Losses:
    """Check what a user passed as losses.

    Args:
        losses: See `LossesLike`.
        differentiable: Insist on a graph behind each loss.
        empty: All tasks may be absent.

    Raises:
        TypeError: A loss is not a tensor, or a `DTensor`.
        ValueError: No losses, none present, a loss that is not a floating scalar, that has no graph, or that lies on
            another device; the text names the task.
    """
    if isinstance(losses, Tensor):
        if losses.dim() != 1:
            raise ValueError(
                f"losses: expected one scalar per task, found a tensor of shape {list(losses.shape)}; "
                "pass the losses themselves, not their sum"
            )
        items: list[Tensor | None] = list(losses.unbind(0))
        names = numbered(len(items))
    elif isinstance(losses, Mapping):
        items, names = list(losses.values()), tuple(map(str, losses))
    elif isinstance(losses, Sequence) and not isinstance(losses, str):
        items = list(losses)
        names = numbered(len(items))
    else:
        raise TypeError(f"losses: expected a sequence, a mapping or a 1-D tensor, found {type(losses).__name__}")
    device = None
    for i, (name, x) in enumerate(zip(names, items, strict=True)):
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(
                f"loss of {name}: expected a tensor, or None if the task is absent from this batch, "
                f"found {type(x).__name__}"
            )
        if hasattr(x, "full_tensor"):
            raise TypeError(f"loss of {name}: expected a plain tensor, found a DTensor; pass its full_tensor()")
        if x.numel() != 1:
            raise ValueError(f"loss of {name}: expected a scalar, found shape {list(x.shape)}; reduce it first")
        if not x.is_floating_point():
            raise ValueError(f"loss of {name}: expected a floating dtype, found {x.dtype}")
        if differentiable and not x.requires_grad:
            raise ValueError(
                f"loss of {name}: it has no graph (requires_grad is False), so it has no gradient; "
                "pass None if the task is absent from this batch"
            )
        if device is not None and x.device != device:
            raise ValueError(f"loss of {name}: on {x.device}, the others on {device}")
        device = x.device
        if x.dim() != 0:
            items[i] = x.reshape(())
    if device is None and not empty:
        raise ValueError(f"losses: expected at least one loss, found {len(items)} tasks, all absent: skip this batch")
    return Losses(names, tuple(items))
