"""CAGrad: the direction near the mean gradient that serves the worst-off task best."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastmtl import ops
from fastmtl.checks import choice, real
from fastmtl.facts import Facts
from fastmtl.surgery.base import CommonOptions, GradientMethod, Step

if TYPE_CHECKING:
    from typing_extensions import Unpack

SHRINK = ("none", "linear", "quadratic")


class CAGrad(GradientMethod):
    """Steps in the direction near the mean gradient that serves the worst-off task best.

    With the mean gradient ``g_0``, ``d`` maximises the least gain ``min_t <g_t, d>`` over ``|d - g_0| <= c |g_0|``. The
    weights are ``1/T + c |g_0| / |g_w| w``, with the w on the simplex that minimises ``<g_w, g_0> + c |g_0| |g_w|``,
    ``g_w = sum_t w_t g_t``. For c < 1 it converges to a stationary point of the mean loss (paper). Answers conflict of
    direction; the step is up to 1 + c times as long as the mean gradient.

    Args:
        c: Radius of the ball, in units of ``|g_0|``; at least 0. 0: the mean gradient. Paper: 0.2 to 0.5; 0.4 by
            default.
        shrink: What the direction is divided by: ``"none"``: nothing (paper); as ``rescale`` 1 and 2 of its public
            code: ``"quadratic"``: 1 + c^2 (the default there), ``"linear"``: 1 + c.
        common: See `GradientMethod`.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: An option out of range.

    Note:
        Cost: on random problems that of 2 to 6 exact min-norm problems; one launch on a GPU, no synchronisation. No
        state, no randomness. Where ``g_w = 0`` is optimal (then 0 lies in the convex hull of the gradients, and the
        least gain is 0 at best) every direction in the ball that conflicts with nobody is as good, and the one nearest
        to ``g_0`` is taken. Where ``g_0 = 0``: equal weights.

    Reference:
        Liu, Liu, Jin, Stone, Liu, "Conflict-Averse Gradient Descent for Multi-Task Learning", NeurIPS 2021, equation 4,
        Algorithm 1. Deviations: solved exactly, in place of SciPy's SLSQP; a rule where ``g_w = 0``, where the paper's
        formula has no value.

    Example:
        >>> import torch, fastmtl
        >>> fastmtl.aggregate(torch.tensor([[-4., 1., 1.], [6., 1., 1.]]), fastmtl.CAGrad(0.5)).weights
        tensor([0.7041, 0.5000], dtype=torch.float64)
    """

    facts = Facts("direction", "Liu, NeurIPS 2021", cost="T^3")

    def __init__(self, c: float = 0.4, shrink: str = "none", **common: Unpack[CommonOptions]) -> None:
        super().__init__(**common)
        self.c = real("c", c, 0)
        self.shrink = choice("shrink", shrink, SHRINK)

    def solve(self, step: Step) -> Tensor:
        """See `GradientMethod.solve`."""
        divisor = {"none": 1.0, "linear": 1 + self.c, "quadratic": 1 + self.c**2}[self.shrink]
        return ops.cagrad(step.gramian, step.mask, self.c)[0] / divisor
