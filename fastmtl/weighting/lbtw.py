"""LBTW: tasks that have learned less weigh more."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.checks import choice, flag, real
from fastmtl.facts import Facts
from fastmtl.state import Epochs, commit
from fastmtl.weighting.base import WeightedSum

NORMALIZE = ("none", "sum_to_one", "sum_to_num_tasks")


class LBTW(Epochs, WeightedSum):
    """Loss-Balanced Task Weighting: weighs each task by what is left of its loss; answers differences of velocity.

    The weights are ``(L_t / L_t^0)^alpha``, constants of the step, where ``L_t^0`` is the task's loss in its first
    batch.

    Args:
        num_tasks: T.
        alpha: 0: equal weights; 1: in proportion to the loss. Paper: 0.5.
        reset_each_epoch: False: ``L_t^0`` is of the first batch of training, and `end_epoch` does nothing. True: of
            each epoch, whose end is one call, `end_epoch`, or comes by itself (paper, Algorithm 1).
        steps_per_epoch: Steps after which an epoch ends by itself; None: `end_epoch` is called.
        normalize: ``"none"`` (paper); ``"sum_to_one"`` or ``"sum_to_num_tasks"``: what the weights of the present tasks
            are scaled to sum to: 1, or their number.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: An option out of range, or ``steps_per_epoch`` without ``reset_each_epoch``.
        RuntimeError: `end_epoch` although epochs end by themselves.

    Note:
        Cost: O(T) on the device, one ordinary backward pass, no synchronisation. State: ``L^0``, ``[T]``. It moves as
        `WeightedSum` says. A task that is absent at first starts with its own first batch.

        Made for losses that are not negative. Guards, not in the paper: a task whose loss started at 0 has weight 1; a
        task whose loss has changed its sign has weight 0.

    Reference:
        Liu, Liang, Gitter, "Loss-Balanced Task Weighting to Reduce Negative Transfer in Multi-Task Learning", AAAI
        2019, Algorithm 1. Deviation: ``reset_each_epoch`` is False by default.

    Example:
        >>> import torch, fastmtl
        >>> weighting = fastmtl.LBTW(num_tasks=2)
        >>> weighting(torch.tensor([2., 8.]))
        tensor(10.)
        >>> weighting(torch.tensor([2., 2.]))  # 1 * 2 + 0.5 * 2
        tensor(3.)
    """

    facts = Facts("velocity", "Liu, AAAI 2019", sums_to="T at first, less as losses fall", state="T")
    initial_losses: Tensor

    def __init__(
        self,
        num_tasks: int,
        alpha: float = 0.5,
        reset_each_epoch: bool = False,
        steps_per_epoch: int | None = None,
        normalize: str = "none",
    ) -> None:
        super().__init__(num_tasks)
        self.alpha, self.reset_each_epoch = real("alpha", alpha, 0), flag("reset_each_epoch", reset_each_epoch)
        self.normalize = choice("normalize", normalize, NORMALIZE)
        if steps_per_epoch is not None and not reset_each_epoch:
            raise ValueError(f"steps_per_epoch: {steps_per_epoch} has no effect without reset_each_epoch=True")
        self.register_epochs(steps_per_epoch)
        self.register_state("initial_losses", (self.num_tasks,), float("nan"))

    def balance(self, losses: Tensor, moves: Tensor) -> Tensor:
        """The weights before ``normalize``; advances ``L^0``. As `WeightedSum.weigh`."""
        first = torch.where(self.initial_losses.isnan(), losses, self.initial_losses)
        commit(self.initial_losses, first, moves)
        ratio = losses / first
        return torch.where(ratio.isfinite(), ratio.clamp(min=0), 1.0) ** self.alpha

    def weigh(self, losses: Tensor, moves: Tensor) -> Tensor:
        """See `WeightedSum.weigh`."""
        weights = self.balance(losses, moves)
        self.count_step(moves)
        if self.normalize == "none":
            return weights
        present = ~losses.isnan()
        total = torch.where(present, weights, 0.0).sum()
        goal = present.sum() if self.normalize == "sum_to_num_tasks" else 1.0
        return torch.where(total == 0, weights, weights * (goal / total))

    def close_epoch(self, where: Tensor) -> None:
        """See `Epochs.close_epoch`."""
        if self.reset_each_epoch:
            commit(self.initial_losses, torch.full_like(self.initial_losses, float("nan")), where)
