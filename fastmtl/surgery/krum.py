"""Krum: the gradient that lies closest to its neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastmtl import ops
from fastmtl.checks import choice, whole
from fastmtl.facts import Facts
from fastmtl.surgery.base import CommonOptions, GradientMethod, Step

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Krum(GradientMethod):
    """Uses the gradient that lies closest to the others, or the mean of a few such (multi-Krum).

    With n tasks, f of which may be wrong in any way, the score of task i is the sum of the squared distances
    ``|g_i - g_j|^2`` to its ``n - f - 2`` closest others. The ``num_selected`` tasks of the smallest scores have equal
    weights, the others 0. Made for machines that fail or lie in distributed training; with tasks as machines it leaves
    out those whose gradients are far from all others. The weights sum to 1.

    Args:
        num_byzantine: f, at least 0. The paper's guarantee holds for ``2 f + 2 < n``.
        num_selected: m, at least 1: how many gradients are averaged. 1: Krum; more: multi-Krum.
        distance: What a score adds up: ``"squared"`` distances (paper), or ``"euclidean"`` ones (a public
            implementation, TorchJD).
        common: See `GradientMethod`.

    Raises:
        TypeError: An option that is no whole number.
        ValueError: An option out of range; at the first step: fewer tasks than ``num_byzantine + 3`` or
            ``num_selected``.

    Note:
        Cost: T^2 log T operations, one launch on a GPU, no synchronisation. No state, no randomness.
        Of equal scores the first task's counts as the smallest, as in the paper. Where tasks are absent, n is the
        number of those that are present; each then has at least one neighbour, and m is at most n.
        Distances come from the Gramian, as ``M_ii + M_jj - 2 M_ij``: those below about 1e-7 of the norms (of float32
        gradients: 1e-3) are lost in rounding, and count as 0 where that is float64's.

    Reference:
        Blanchard, El Mhamdi, Guerraoui, Stainer, "Machine Learning with Adversaries: Byzantine Tolerant Gradient
        Descent", NeurIPS 2017, section 4 (Krum) and section 5 (multi-Krum). No deviation with the defaults.

    Example:
        >>> import torch, fastmtl
        >>> g = torch.tensor([[1., 0.], [1.2, 0.], [0.9, 0.1], [-9., 5.]])
        >>> fastmtl.aggregate(g, fastmtl.Krum(num_byzantine=1)).weights
        tensor([1., 0., 0., 0.], dtype=torch.float64)
    """

    facts = Facts("none", "Blanchard, NeurIPS 2017", sums_to="1", needs="number of wrong tasks", cost="T^2 log T")

    def __init__(
        self,
        num_byzantine: int,
        num_selected: int = 1,
        distance: str = "squared",
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(**common)
        self.num_byzantine = whole("num_byzantine", num_byzantine, 0)
        self.num_selected = whole("num_selected", num_selected, 1)
        self.distance = choice("distance", distance, ops.DISTANCES)

    def solve(self, step: Step) -> Tensor:
        """See `GradientMethod.solve`."""
        m = step.gramian
        num_tasks = m.shape[-1]
        least = max(self.num_byzantine + 3, self.num_selected)
        if num_tasks < least:
            raise ValueError(
                f"num_byzantine: {self.num_byzantine} wrong tasks and num_selected={self.num_selected} take at least "
                f"{least} tasks, found {num_tasks}"
            )
        return ops.krum(m, step.mask, self.num_byzantine, self.num_selected, self.distance)
