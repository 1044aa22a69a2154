"""Equal weights: the baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.checks import choice
from fastmtl.facts import Facts
from fastmtl.weighting.base import WeightedSum

REDUCTIONS = ("sum", "mean")


class EqualWeighting(WeightedSum):
    """The sum of the losses, or their mean: the baseline to beat.

    Args:
        num_tasks: T.
        reduction: ``"sum"``: every weight is 1. ``"mean"``: 1 over the number of present tasks.

    Raises:
        TypeError, ValueError: An option of the wrong type, or out of range.

    Note:
        Cost: one ordinary backward pass; no state.

    Example:
        >>> import torch, fastmtl
        >>> fastmtl.EqualWeighting(num_tasks=2)(torch.tensor([2., 8.]))
        tensor(10.)
    """

    facts = Facts("none", "", sums_to="T")

    def __init__(self, num_tasks: int, reduction: str = "sum") -> None:
        super().__init__(num_tasks)
        self.reduction = choice("reduction", reduction, REDUCTIONS)

    def weigh(self, losses: Tensor, moves: Tensor) -> Tensor:
        """See `WeightedSum.weigh`."""
        ones = torch.ones_like(losses)
        return ones if self.reduction == "sum" else ones / (~losses.isnan()).sum()
