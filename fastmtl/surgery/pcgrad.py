"""PCGrad: project conflicting gradients onto each other's normal planes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.checks import choice, flag
from fastmtl.facts import Facts
from fastmtl.surgery.base import CommonOptions, RandomOrderMethod, Step

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PCGrad(RandomOrderMethod):
    """Removes from each task's gradient what opposes the other tasks' gradients, one after the other.

    For each task i, over the other tasks j in random order: where the current ``g_i'`` opposes the original ``g_j``
    (negative dot product), ``g_i' -= (g_i'.g_j / |g_j|^2) g_j``. The update is the sum of the ``g_i'``. Answers
    conflict of direction; keeps differences of magnitude. The weights sum to T, and to more for every conflict removed:
    twice T is common with dozens of tasks.

    Args:
        reduction: ``"sum"`` (paper) or ``"mean"`` over the present tasks (a popular port).
        include_self: Let task i also meet its own original gradient, as most public ports do: a gradient that was
            turned against itself is then projected once more. Paper: False.
        order: ``"random"`` (paper), ``"shared"`` (one random order for all tasks), ``"fixed"`` (0, 1, ...), or an
            int64 tensor ``[T, T]`` or ``[K, T, T]`` of permutations.
        generator: Where the seed comes from, at construction only; None: torch's default generator.
        common: See `GradientMethod`.

    Raises:
        TypeError, ValueError: An option of the wrong type, or an unknown one.

    Note:
        Cost: T^2 tests and up to T^2 additions of T numbers, on the Gramian; one launch on a GPU, no synchronisation.
        State: the seed and the step's number. A zero gradient never projects and stays zero.

    Reference:
        Yu, Kumar, Gupta, Levine, Hausman, Finn, "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, Algorithm 1.
        No deviation with the defaults.

    Example:
        >>> import torch, fastmtl
        >>> fastmtl.aggregate(torch.tensor([[-4., 1., 1.], [6., 1., 1.]]), fastmtl.PCGrad()).grads
        tensor([0.5848, 3.8012, 3.8012])
    """

    facts = Facts("direction", "Yu, NeurIPS 2020", sums_to="T or more", state="seed, step", cost="T^3")

    def __init__(
        self,
        reduction: str = "sum",
        include_self: bool = False,
        order: str | Tensor = "random",
        generator: torch.Generator | None = None,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(order, generator, **common)
        self.reduction = choice("reduction", reduction, ("sum", "mean"))
        self.include_self = flag("include_self", include_self)

    def solve(self, step: Step) -> Tensor:
        """See `GradientMethod.solve`."""
        order, rng = self.draw(step)
        weights = ops.pcgrad(step.gramian, step.mask, order, rng, self.include_self, self.reduction)
        self.advance(step)
        return weights
