"""What a loss weighting is: a map from loss values to one scalar, whose slopes are the tasks' weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastmtl.losses import LossesLike, parse_losses


class LossWeighting(nn.Module):
    """Base class of the loss weightings: subclasses implement `scalar`.

    Called with the losses, a weighting returns the scalar to call ``backward()`` on: no per-task gradients, no cost.
    Passed where a gradient method is expected, it enters as ``w_t = d scalar / d L_t``; its own parameters then get
    their gradients too.
    """

    def scalar(self, losses: Tensor, tasks: Tensor | None) -> Tensor:
        """The weighted loss.

        Args:
            losses: Values of the present tasks, ``[n]``.
            tasks: Their indices among the T tasks, int64 ``[n]``; None if all are present.
        """
        raise NotImplementedError

    def forward(self, losses: LossesLike) -> Tensor:
        """The scalar to differentiate.

        Args:
            losses: T scalars: a sequence, a mapping from task name, or a 1-D tensor; None: the task is absent.

        Returns:
            A scalar in the losses' dtype, at least float32.
        """
        parsed = parse_losses(losses, differentiable=False)
        values = torch.stack([x.to(torch.promote_types(x.dtype, torch.float32)) for x in parsed.present])
        if len(values) == len(parsed):
            return self.scalar(values, None)
        tasks = [t for t, x in enumerate(parsed.items) if x is not None]
        return self.scalar(values, torch.tensor(tasks, device=values.device))

    def slopes(self, losses: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """The scalar at these loss values, and its slopes.

        Args:
            losses: T scalars or None; taken as constants.

        Returns:
            The scalar, differentiable in the weighting's own parameters, and the weights ``[T]`` in float64, 0 for
            absent tasks.
        """
        with torch.enable_grad():
            leaves = [None if x is None else x.detach().requires_grad_() for x in losses]
            total = self(leaves)
            present = [x for x in leaves if x is not None]
            slopes = torch.autograd.grad(total, present, retain_graph=True, allow_unused=True)
        found = iter(slopes)
        zero = total.detach().new_zeros(())
        weights = [None if x is None else next(found) for x in leaves]
        return total, torch.stack([zero if w is None else w for w in weights]).double()
