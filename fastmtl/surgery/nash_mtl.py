"""NashMTL: the direction on which the tasks agree in a bargain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmtl.checks import choice
from fastmtl.facts import Facts
from fastmtl.surgery.base import CommonOptions, Step
from fastmtl.surgery.fairgrad import FairGrad

if TYPE_CHECKING:
    from typing_extensions import Unpack

UNITS = ("paper", "gramian")


class NashMTL(FairGrad):
    """Steps in the direction on which the tasks agree in a Nash bargain over their gains.

    ``d = sum_t w_t g_t`` maximises ``sum_t p_t log <g_t, d>`` among all directions of its length, which is where
    ``(Mw)_t = p_t / w_t``: each task contributes ``w_t <g_t, d> = p_t`` to ``|d|^2``. All gains ``<g_t, d>`` are above
    0: no task gets worse. Scaling a task's loss scales its weight inversely and leaves the direction as it is, so it
    answers differences of magnitude as well as conflict of direction. It is `FairGrad` with alpha = 1.

    **The step's length** is ``sqrt(sum_t p_t)``, so ``sqrt(T)``, whatever the gradients: divide the learning rate, or
    do as the public code, which clips the shared gradient to norm 1: ``max_norm=1.0`` of `fastmtl.backward` and
    `TaskGradients.combine` (which with ``scale_heads`` clips the heads' weights alike, unlike that code).

    Where no direction is good for all (0 lies in the convex hull of the gradients, as at a Pareto-stationary point, or
    a gradient is 0) there is no agreement, and the weights of the last step that had one are used again, as in the
    public code; before there was one, weights of 1.

    Args:
        preference: p, one number per task, not negative: its bargaining power; a task of preference 0 gets weight 0.
            None: 1 for each.
        unit: ``"paper"``: as above; ``"gramian"`` (public code): weights for ``M / |M|`` (Frobenius norm), so
            ``|d|^2 = |M| sum_t p_t``: with clipping, steps shorten where the gradients do.
        scale_heads: Also multiply the heads' gradients, as the public code does. Must be False in `FeatureSurgery`.
        common: See `GradientMethod`.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: An option out of range; at the first step: preferences for another number of tasks.

    Note:
        Cost: 4 to 8 steps of Newton's method, T^3 / 6 multiply-adds each; one launch on a GPU, no synchronisation.
        State: the last weights, ``[K, T]``, in training mode. No randomness. The paper's weights that are updated
        every few steps only (``update_weights_every`` in the public code): ``Amortized(NashMTL(), update_every=k)``.

    Reference:
        Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik, Fetaya, "Multi-Task Learning as a Bargaining Game", ICML
        2022, equation 2, Algorithm 1. Preferences, not in the paper: Kalai, "Nonsymmetric Nash Solutions and
        Replications of 2-Person Bargaining", International Journal of Game Theory 6, 1977. Deviations: solved to the
        precision of float64, in place of at most 20 convex programs; heads keep their plain gradients by default.

    Example:
        >>> import torch, fastmtl
        >>> jacobian = torch.tensor([[-4., 1., 1.], [6., 1., 1.]])
        >>> out = fastmtl.aggregate(jacobian, fastmtl.NashMTL())
        >>> out.weights
        tensor([0.5915, 0.4071], dtype=torch.float64)
        >>> out.grads / out.grads.norm()
        tensor([0.0542, 0.7061, 0.7061])
    """

    facts = Facts("magnitude, direction", "Navon, ICML 2022", state="K T", cost="T^3")

    def __init__(
        self,
        preference: Sequence[float] | Tensor | None = None,
        unit: str = "paper",
        scale_heads: bool = False,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(1.0, preference, scale_heads, **common)
        self.unit = choice("unit", unit, UNITS)

    def factor(self, step: Step) -> Tensor | float:
        """See `FairGrad.factor`."""
        if self.unit == "paper":
            return 1.0
        both = step.present.unsqueeze(-1) & step.present.unsqueeze(-2)
        squares = torch.where(both, step.gramian, 0.0).square().sum((-2, -1))
        return squares.sqrt().sqrt().unsqueeze(-1)
