"""What a scalarization is: a function of the losses that is not their weighted sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.checks import whole
from fastmtl.losses import spread
from fastmtl.weighting.base import Everywhere, LossWeighting


class Scalarization(LossWeighting):
    """Base class of the weightings that are a function of the losses: subclasses implement `value`.

    The weights are its slopes at this step's losses. State moves as `WeightedSum` says, and where a loss or the value
    is not finite, the weights are NaN.

    Args:
        num_tasks: T.
    """

    num_tasks: int

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = whole("num_tasks", num_tasks, 1)

    def value(self, losses: Tensor, present: Tensor) -> Tensor:
        """The scalar, differentiable in the losses. No state moves, no host synchronisation.

        Args:
            losses: ``[T]`` float64, 1 for absent tasks.
            present: bool ``[T]``: the tasks that count.
        """
        raise NotImplementedError

    def observe(self, losses: Tensor, moves: Tensor) -> None:
        """Advance the state by this step, after `value`. Arguments as those of `WeightedSum.weigh`."""

    def scalar(self, losses: Tensor, tasks: Sequence[int] | None, everywhere: Everywhere | None = None) -> Tensor:
        """See `LossWeighting.scalar`."""
        moving = self.training and torch.is_grad_enabled()
        values, here = losses.double(), torch.ones_like(losses, dtype=torch.bool)
        if everywhere is not None:  # the value at the averages; its slopes there are those of this rank's losses
            here, means = everywhere
            values = torch.where(here, means + (values - values.detach()), 1.0)
        elif tasks is not None:
            values = spread(values, tasks, self.num_tasks, fill=1.0)
            here = spread(here, tasks, self.num_tasks, fill=0.0)
        self._follow(values.device)
        self._note_slopes(values, here)
        total = self._sound(values, here)
        with torch.no_grad():
            self.observe(torch.where(here, values, float("nan")), values.isfinite().all() & moving)
        return total.to(losses.dtype)

    def _sound(self, values: Tensor, here: Tensor) -> Tensor:
        """The value, whose slopes are all NaN where it or a loss is not finite."""
        value = self.value(values, here)
        finite = value.isfinite() & values.isfinite().all()
        return value + (values * torch.where(finite, 0.0, float("nan"))).sum()

    def _note_slopes(self, values: Tensor, here: Tensor) -> None:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return
        with torch.inference_mode(False), torch.enable_grad():
            leaf = values.detach().clone().requires_grad_()
            slopes = torch.autograd.grad(self._sound(leaf, here.clone()), leaf)[0]
        self.note(torch.where(here, slopes, 0.0), None)
