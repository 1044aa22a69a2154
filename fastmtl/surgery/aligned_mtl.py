"""AlignedMTL: the gradients' principal components brought to one length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fastmtl import ops
from fastmtl.checks import choice, preferences
from fastmtl.facts import Facts
from fastmtl.surgery.base import CommonOptions, GradientMethod, Step

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AlignedMTL(GradientMethod):
    """Replaces the gradients by the nearest ones that are orthogonal and of one length, and sums those by preference.

    With ``M = V L V^T``, of rank R, the weights are ``sqrt(s) V L^(-1/2) V^T p`` over the R eigenvalues that are not 0,
    s the smallest of them and p the preference: the gradients' principal components, all shrunk to the length of the
    shortest. Answers conflict of direction and differences of magnitude; the condition number of the gradients becomes
    1. It opposes none of the aligned gradients; an original one it may. The weights sum to nothing in particular, and
    get small where gradients nearly depend on each other.

    Args:
        scale_mode: s is the ``"min"`` (paper), the ``"median"`` (the lower one of two) or the mean (``"rmse"``) of the
            eigenvalues, which keeps more of the gradients' length; the latter two from the paper's public code.
        preference: p: one number per task, not negative. None: 1 / T, T the number of present tasks.
        common: See `GradientMethod`.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: An option out of range; at the first step: preferences for another number of tasks.

    Note:
        Cost: 2 T^3 multiply-adds and about 0.8 T^2 rotations one after the other (milliseconds from T = 200 on, on a
        GPU from 100 on); one launch on a GPU, no synchronisation. No state, no randomness. Eigenvalues count as 0 up
        to ``T 2^-23`` of the largest, as in the public code, which computes in float32: a task whose gradient is some
        2,000 times shorter than the longest, at T = 2, is not aligned but left out (``normalization="l2"`` makes the
        weights independent of lengths). All weights are 0 where all gradients are.

    Reference:
        Senushkin, Patakin, Kuznetsov, Konushin, "Independent Component Alignment for Multi-Task Learning", CVPR 2023,
        Algorithm 1. No deviation; the cutoff is from its public code.

    Example:
        >>> import torch, fastmtl
        >>> fastmtl.aggregate(torch.tensor([[-4., 1., 1.], [6., 1., 1.]]), fastmtl.AlignedMTL()).weights
        tensor([0.5591, 0.4083], dtype=torch.float64)
    """

    facts = Facts("direction, magnitude", "Senushkin, CVPR 2023", cost="T^3")

    def __init__(
        self,
        scale_mode: str = "min",
        preference: Sequence[float] | Tensor | None = None,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(**common)
        self.scale_mode = choice("scale_mode", scale_mode, ops.SCALE_MODES)
        self.preference = preferences(preference)
        self.positional = preference is not None

    def solve(self, step: Step) -> Tensor:
        """See `GradientMethod.solve`."""
        preference = None if self.preference is None else self.per_task("preference", step.gramian)
        return ops.aligned_mtl(step.gramian, step.mask, preference, self.scale_mode)
