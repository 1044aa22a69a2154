"""What a learned loss weighting is: one parameter per task, trained with the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.checks import whole
from fastmtl.weighting.base import Everywhere, LossWeighting


class LearnedWeighting(LossWeighting):
    """Base class of the weightings with one learned number ``s_t`` per task: subclasses implement `terms`.

    The scalar is the sum of ``weight_t L_t + penalty_t``. ``s`` is a parameter of this module and must be given to the
    optimizer, without weight decay:
    ``torch.optim.Adam([{"params": [*model.parameters()]}, weighting.parameter_group()])``.

    The gradient of an absent task's ``s_t`` is 0, not missing, as ``s`` is one parameter: plain gradient descent leaves
    it alone, but an optimizer with momentum, such as Adam, moves it on.

    Args:
        num_tasks: T.
        init: First value of every ``s_t``.
    """

    num_tasks: int

    def __init__(self, num_tasks: int, init: float) -> None:
        super().__init__()
        self.num_tasks = whole("num_tasks", num_tasks, 1)
        self.init = init
        self.s = nn.Parameter(torch.full((self.num_tasks,), init))

    def terms(self) -> tuple[Tensor, Tensor]:
        """Weights and penalties, each ``[T]``, differentiable in ``s``."""
        raise NotImplementedError

    def scalar(self, losses: Tensor, tasks: Sequence[int] | None, everywhere: Everywhere | None = None) -> Tensor:
        """See `LossWeighting.scalar`."""
        if self.s.device != losses.device:
            raise ValueError(
                f"{type(self).__name__}.s: on {self.s.device}, the losses on {losses.device}; move it there by .to()"
            )
        weights, penalties = self.terms()
        if tasks is not None:  # one by one: an index tensor would have to be sent to the device
            weights, penalties = (torch.stack([x[t] for t in tasks]) for x in (weights, penalties))
        if everywhere is not None:
            weights, penalties = (torch.where(everywhere[0], x, 0.0) for x in (weights, penalties))
        self.note(weights, tasks)
        return (weights * losses + penalties).sum()

    def parameter_group(self, **options: Any) -> dict[str, Any]:
        """The parameter group for the optimizer: ``s`` without weight decay, and any other ``options``."""
        return {"params": [self.s], "weight_decay": 0.0, **options}
