"""Constant weights: what a search over weights has found."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmtl.checks import reals
from fastmtl.facts import Facts
from fastmtl.weighting.base import WeightedSum


class ConstantWeighting(WeightedSum):
    """The weighted sum of the losses, with weights that are given.

    Args:
        weights: T numbers. Where a task is absent, the others keep theirs.

    Raises:
        TypeError: Not a sequence of numbers.
        ValueError: None at all, or one that is not finite.

    Note:
        Cost: one ordinary backward pass; no state: the weights are an option, not in ``state_dict``.

    Example:
        >>> import torch, fastmtl
        >>> fastmtl.ConstantWeighting([1, 0.5])(torch.tensor([2., 8.]))
        tensor(6.)
    """

    facts = Facts("none", "", needs="the weights")
    given: Tensor

    def __init__(self, weights: Sequence[float] | Tensor) -> None:
        each = reals("weights", weights)
        if not isinstance(each, tuple):
            raise TypeError(f"weights: expected one number per task, found {weights!r}")
        super().__init__(len(each))
        self.constants = each
        self.register_option("given", "weights", each)

    def weigh(self, losses: Tensor, moves: Tensor) -> Tensor:
        """See `WeightedSum.weigh`."""
        return self.given

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        return f"weights={self.constants}"
