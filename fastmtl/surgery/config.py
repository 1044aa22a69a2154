"""ConFIG: the direction that has the same cosine with every task's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fastmtl import ops
from fastmtl.checks import preferences
from fastmtl.facts import Facts
from fastmtl.surgery.base import CommonOptions, GradientMethod, Step

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ConFIG(GradientMethod):
    """Steps in the direction that has the same cosine with all gradients, as far as they go together.

    The direction is the pseudo-inverse of the gradients of length 1, applied to ones; its length is the sum of the
    gradients' projections onto it, so it shrinks as they conflict. Answers conflict of direction, and of the
    differences in magnitude their part in the direction. With gradients that do not depend on each other no task is
    opposed. The weights sum to nothing in particular, and some may be negative.

    Args:
        preference: What the cosines are in proportion to: one number per task, not negative. None: all the same.
        common: See `GradientMethod`.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: An option out of range; at the first step: preferences for another number of tasks.

    Note:
        Cost: T^3 / 2 multiply-adds; where gradients may depend on each other also a symmetric eigenproblem, as in
        `AlignedMTL`. One launch on a GPU, no synchronisation. No state, no randomness. Gradients of zero have no
        cosine, and weight 0. Eigenvalues of the matrix of cosines up to 1e-6 of the largest count as 0: float32
        products cannot tell them from 0. Where no direction has the wanted cosines with all gradients, as with opposite
        ones, they hold in the sense of least squares, and tasks may be opposed; all weights are 0 if nothing is left.

    Reference:
        Liu, Chu, Thuerey, "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks", ICLR 2025,
        equations 2 and 3. ``preference`` takes the place of the vector of ones, as the weights do in its public code.
        Deviations: solved on the matrix of cosines, for which the cutoff above is ours (the public code leaves it to
        the pseudo-inverse of the gradients, where it grows with their size). The form with momentum is
        `MConFIG`.

    Example:
        >>> import torch, fastmtl
        >>> out = fastmtl.aggregate(torch.tensor([[-4., 1., 1.], [6., 1., 1.]]), fastmtl.ConFIG())
        >>> out.weights
        tensor([1.2265, 0.8441], dtype=torch.float64)
        >>> out.grads
        tensor([0.1588, 2.0706, 2.0706])
    """

    facts = Facts("direction, magnitude", "Liu, ICLR 2025", cost="T^3")

    def __init__(self, preference: Sequence[float] | Tensor | None = None, **common: Unpack[CommonOptions]) -> None:
        super().__init__(**common)
        self.preference = preferences(preference)
        self.positional = preference is not None

    def solve(self, step: Step) -> Tensor:
        """See `GradientMethod.solve`."""
        preference = None if self.preference is None else self.per_task("preference", step.gramian)
        return ops.equal_cosines(step.gramian, step.mask, preference)
