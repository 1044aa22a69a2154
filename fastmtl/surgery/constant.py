"""Sum, Mean, Constant: the weights that everything else is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fastmtl.checks import reals
from fastmtl.facts import Facts
from fastmtl.surgery.base import CommonOptions
from fastmtl.surgery.gramian_free import GramianFree

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Sum(GramianFree):
    """Adds up the tasks' gradients, as ``sum(losses).backward()`` does; the baseline of every comparison.

    Args:
        common: See `GradientMethod`.

    Raises:
        TypeError, ValueError: An option of the wrong type, or an unknown one.

    Note:
        Cost: with `fastmtl.backward` one backward pass through everything, as of a summed loss; see `GramianFree` for
        where that holds. No state, no randomness, no synchronisation.

    Reference:
        None: it is what is done without multi-task methods.

    Example:
        >>> import torch, fastmtl
        >>> fastmtl.aggregate(torch.tensor([[-4., 1., 1.], [6., 1., 1.]]), fastmtl.Sum()).grads
        tensor([2., 2., 2.])
    """

    facts = Facts("none", "the summed loss", sums_to="T", cost="one pass")

    def __init__(self, **common: Unpack[CommonOptions]) -> None:
        super().__init__(**common)

    def choose(self, present: Tensor) -> Tensor:
        """See `GramianFree.choose`."""
        return present


class Mean(GramianFree):
    """Averages the gradients of the tasks that are present.

    Args:
        common: See `GradientMethod`.

    Raises:
        TypeError, ValueError: An option of the wrong type, or an unknown one.

    Note:
        Cost: with `fastmtl.backward` one backward pass, and a short one through heads, whose gradients are not divided;
        see `GramianFree` for where that holds. No state, no randomness, no synchronisation.

    Reference:
        None: it is what is done without multi-task methods.

    Example:
        >>> import torch, fastmtl
        >>> fastmtl.aggregate(torch.tensor([[-4., 1., 1.], [6., 1., 1.]]), fastmtl.Mean()).grads
        tensor([1., 1., 1.])
    """

    facts = Facts("none", "the averaged loss", sums_to="1", cost="one pass")

    def __init__(self, **common: Unpack[CommonOptions]) -> None:
        super().__init__(**common)

    def choose(self, present: Tensor) -> Tensor:
        """See `GramianFree.choose`."""
        return present / present.sum(-1, keepdim=True).clamp(min=1)


class Constant(GramianFree):
    """Adds up the tasks' gradients with given weights.

    Args:
        weights: One per task, or one for all; any finite numbers. An absent task's goes to nobody else.
        common: See `GradientMethod`.

    Raises:
        TypeError: Neither a number nor numbers.
        ValueError: A number that is not finite; at the first step: weights for another number of tasks.

    Note:
        Cost: as of `Mean`. Heads keep their plain gradients. No state, no randomness, no synchronisation.

    Reference:
        None: it is what is done without multi-task methods.

    Example:
        >>> import torch, fastmtl
        >>> fastmtl.aggregate(torch.tensor([[-4., 1., 1.], [6., 1., 1.]]), fastmtl.Constant([3, 2])).grads
        tensor([0., 5., 5.])
    """

    facts = Facts("none", "the weighted loss", needs="weights", cost="one pass")

    def __init__(self, weights: float | Sequence[float] | Tensor, **common: Unpack[CommonOptions]) -> None:
        super().__init__(**common)
        self.weights = reals("weights", weights)
        self.positional = isinstance(self.weights, tuple)

    def choose(self, present: Tensor) -> Tensor:
        """See `GramianFree.choose`."""
        return present * self.per_task("weights", present)
