"""Methods that want the same tasks on several independent batches in every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmtl.checks import whole
from fastmtl.surgery.base import CommonOptions, GradientMethod, Step

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SeveralBatches(GradientMethod):
    """Base class of the methods whose weights come from the products of gradients of independent batches.

    The losses of a step are those of B batches one after the other: the T tasks on the first batch, then the T tasks
    on the second, and so on, in the same order. The B T weights returned are 0 for the batches that do not make the
    update. A task takes part where it is present in all batches.

    The weights are kept, ``[K, T]``, as float64 state. They start equal; tasks that are absent keep theirs, and the
    others share the rest.

    Args:
        num_tasks: T, of one batch.
        scale_heads: The weights also multiply the heads' gradients: they are then those of the batches that make the
            update, as the papers have it, whose parameters are all shared. False: heads get the plain sum over all
            tasks of all batches.
        common: See `GradientMethod`.

    Attributes:
        batches: The possible numbers of batches, B.
    """

    several_batches = True
    positional = True
    batches: tuple[int, ...]
    weights: Tensor

    def __init__(self, num_tasks: int, scale_heads: bool, **common: Unpack[CommonOptions]) -> None:
        super().__init__(**common)
        self.num_tasks = whole("num_tasks", num_tasks, 1)
        self.scale_heads = scale_heads
        self.register_state("weights")

    def improve(self, weights: Tensor, cross: Tensor, present: Tensor) -> Tensor:
        """The next weights.

        Args:
            weights: Those so far, ``[K, T]``; of absent tasks 0.
            cross: Dot products of the gradients on the first batch with those on the second, ``[K, T, T]``, 0 where
                one is absent.
            present: bool ``[K, T]``.

        Returns:
            ``[K, T]``, not negative, of the same sum; what absent tasks have is not read.
        """
        raise NotImplementedError

    def combination(self, weights: Tensor, present: Tensor) -> Tensor:
        """What each task counts in the update, from its new weights, ``[K, T]``; 0 for absent tasks."""
        return weights

    def solve(self, step: Step) -> Tensor:
        """See `GradientMethod.solve`."""
        t, (groups, found) = self.num_tasks, step.gramian.shape[:2]
        batches = found // t
        if found != batches * t or batches not in self.batches:
            wanted = " or ".join(f"{b} x {t}" for b in self.batches)
            raise ValueError(
                f"losses: {type(self).__name__}(num_tasks={t}) takes the losses of the tasks on several batches, one "
                f"batch after the other: {wanted}, found {found}"
            )
        present = step.present.unflatten(-1, (batches, t)).all(-2)
        pairs = present.unsqueeze(-1) & present.unsqueeze(-2)
        cross = torch.where(pairs, step.gramian[:, :t, t : 2 * t], 0.0)
        kept = self.state("weights", cross, (groups, t), 1 / t)
        moved = torch.where(present, self.improve(torch.where(present, kept, 0.0), cross, present), kept)
        step.commit(kept, moved)
        used = self.combination(torch.where(present, moved, 0.0), present)
        used = torch.where(step.finite, used, float("nan"))
        parts = [torch.zeros_like(used)] * 2 + [used] if batches == 3 else [used / 2] * 2
        return torch.cat(parts, -1)

    def rescaled(self, weights: Tensor, present: Tensor) -> Tensor:
        """See `GradientMethod.rescaled`; the number of tasks is that of one batch."""
        return super().rescaled(weights, present.unflatten(-1, (-1, self.num_tasks)).all(-2))
