"""IMTLG: the weighted mean of the gradients that has the same projection onto each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastmtl import ops
from fastmtl.facts import Facts
from fastmtl.surgery.base import CommonOptions, GradientMethod, Step

if TYPE_CHECKING:
    from typing_extensions import Unpack


class IMTLG(GradientMethod):
    """Weighs the tasks such that their sum projects alike onto every gradient's direction; the weights sum to 1.

    The direction is `ConFIG`'s, the one of equal cosines; the length is not. Answers differences of magnitude, and
    conflict of direction. The paper's condition leaves the weights' sign free: where short gradients would need
    negative weights, the sum of 1 turns the direction against all tasks, and where the weights would sum to nearly 0 it
    makes it long. `ConFIG` does neither.

    Args:
        common: See `GradientMethod`.

    Raises:
        TypeError, ValueError: An option of the wrong type, or an unknown one.

    Note:
        Cost: as `ConFIG`. One launch on a GPU, no synchronisation. No state, no randomness. Gradients of zero have
        weight 0. Where gradients depend on each other: see `ConFIG`. All weights are 0 where they cannot sum to 1.

    Reference:
        Liu, Li, Kuang, Xue, Chen, Yang, Liao, Zhang, "Towards Impartial Multi-task Learning", ICLR 2021, section 3.1:
        the gradient part, IMTL-G, in closed form. Deviation: where its matrix is singular the paper has no value; here
        the pseudo-inverse of the matrix of cosines takes its place.

    Example:
        >>> import torch, fastmtl
        >>> fastmtl.aggregate(torch.tensor([[-4., 1., 1.], [6., 1., 1.]]), fastmtl.IMTLG()).weights
        tensor([0.5923, 0.4077], dtype=torch.float64)
    """

    facts = Facts("magnitude, direction", "Liu, ICLR 2021", sums_to="1", cost="T^3")

    def __init__(self, **common: Unpack[CommonOptions]) -> None:
        super().__init__(**common)

    def solve(self, step: Step) -> Tensor:
        """See `GradientMethod.solve`."""
        return ops.equal_cosines(step.gramian, step.mask, length="sum_to_one")
