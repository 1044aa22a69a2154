"""Methods that want the same tasks on several independent batches in every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastmtl.checks import flag, whole
from fastmtl.simplex import renormalize
from fastmtl.surgery.base import CommonOptions, GradientMethod, Step

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SeveralBatches(GradientMethod):
    """Base class of the methods whose weights come from the products of gradients of independent batches.

    The losses of a step are those of B batches one after the other: the T tasks on the first batch, then the T tasks
    on the second, and so on, in the same order. The B T weights returned are 0 for the batches that do not make the
    update. A task takes part where it is present in all batches.

    The weights are kept, ``[K, T]``, as float64 state. They start equal. Tasks that are absent keep theirs; those of
    the others are scaled to sum to 1 in this step, or are equal if all are 0, and share afterwards what they held.

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
        self.scale_heads = flag("scale_heads", scale_heads)
        self.register_state("weights")

    def improve(self, weights: Tensor, step: Step, pull: Tensor | None) -> Tensor:
        """The next weights.

        Args:
            weights: Those so far, ``[K, T]``, of sum 1 over the tasks that take part; 0 for the others.
            step: Of the B T gradients.
            pull: As `pull` says.

        Returns:
            ``[K, T]``, not negative, of the same sum; 0 for absent tasks. NaN where what it reads is not finite.
        """
        raise NotImplementedError

    def pull(self, like: Tensor, present: Tensor | None) -> Tensor | None:
        """What is added to the weights in the update, ``[K, T]``, 0 for absent tasks; None: nothing.

        Args:
            like: ``[K, T]``.
            present: bool ``[K, T]``; None: all.
        """
        return None

    def taking_part(self, step: Step) -> Tensor | None:
        """Which task is present in all batches, bool ``[K, T]``; None: all are."""
        return None if step.mask is None else step.mask.unflatten(-1, (-1, self.num_tasks)).all(-2)

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
        kept = self.state("weights", step.gramian, (groups, t), 1 / t)
        present = self.taking_part(step)
        pull = self.pull(kept, present)
        if present is None:
            moved = self.improve(kept, step, pull)
            step.commit(kept, moved)
        else:
            weights, held = renormalize(kept, present)
            moved = self.improve(weights, step, pull)
            step.commit(kept, torch.where(present, moved * held, kept))
        used = torch.where(step.finite, moved if pull is None else moved + pull, float("nan"))
        return pad(used, (2 * t, 0)) if batches == 3 else (used / 2).repeat(1, 2)

    def rescaled(self, weights: Tensor, present: Tensor) -> Tensor:
        """See `GradientMethod.rescaled`; the number of tasks is that of one batch."""
        return super().rescaled(weights, present.unflatten(-1, (-1, self.num_tasks)).all(-2))
