"""FairGrad: the direction that shares the gains among the tasks alpha-fairly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.checks import flag, preferences
from fastmtl.facts import Facts
from fastmtl.surgery.base import CommonOptions, GradientMethod, Step

if TYPE_CHECKING:
    from typing_extensions import Unpack


class FairGrad(GradientMethod):
    """Steps in the direction that shares the gains among the tasks alpha-fairly.

    The gain of task t along ``d`` is ``<g_t, d>``, how fast its loss falls. Among all directions of its length,
    ``d = sum_t w_t g_t`` maximises ``sum_t p_t <g_t, d>^(1-alpha) / (1-alpha)``, which is where
    ``(Mw)_t = (w_t / p_t)^(-1/alpha)``: towards alpha = 0 the largest sum of the gains, alpha = 1 proportional fairness
    (`NashMTL`), alpha = 2 the least potential delay, towards infinity the largest of the least gains. All gains are
    above 0: no task gets worse. Answers conflict of direction, and for alpha = 1 differences of magnitude.

    Where no direction is good for all (0 lies in the convex hull of the gradients, as at a Pareto-stationary point, or
    a gradient is 0) there is no such direction, and the weights of the last step that had one are used again; before
    there was one, weights of 1.

    Args:
        alpha: The degree of fairness, 0.1 to 10. Default: 1, that of the paper's code. The weights' unit depends on it:
            gradients of twice the length have weights of ``2^(-2 alpha / (1+alpha))``.
        preference: p, one number per task, not negative; a task of preference 0 gets weight 0. None: 1 for each.
        scale_heads: Also multiply the heads' gradients, as the paper's code does. Must be False in `FeatureSurgery`.
        common: See `GradientMethod`.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: An option out of range; at the first step: preferences for another number of tasks.

    Note:
        Cost: Newton's method, T^3 / 6 multiply-adds a step; 4 to 8 steps for alpha = 1, more for other values and
        gradients of very different length: see `fastmtl.solvers.fairgrad`. One launch on a GPU, no synchronisation.
        State: the last weights, ``[K, T]``, in training mode. No randomness. To solve every few steps only:
        `Amortized`.

    Reference:
        Ban, Ji, "Fair Resource Allocation in Multi-Task Learning", ICML 2024, equation 4, Algorithm 1. Preferences, as
        weights of the objective: Mo, Walrand, "Fair End-to-End Window-Based Congestion Control", IEEE/ACM Transactions
        on Networking 8, 2000. Deviations: solved to the precision of float64, in place of SciPy's ``least_squares``
        stopped at 1e-8; the last weights where there is no solution, where the paper's code takes what the least
        squares end at; heads keep their plain gradients by default.

    Example:
        >>> import torch, fastmtl
        >>> method = fastmtl.FairGrad(alpha=2)
        >>> weights = fastmtl.aggregate(torch.tensor([[-4., 1., 1.], [6., 1., 1.]]), method).weights
        >>> weights
        tensor([0.4714, 0.3195], dtype=torch.float64)
    """

    facts = Facts("direction", "Ban, ICML 2024", state="K T", cost="T^3")
    positional = True
    weights: Tensor

    def __init__(
        self,
        alpha: float = 1.0,
        preference: Sequence[float] | Tensor | None = None,
        scale_heads: bool = False,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(**common)
        self.alpha = ops.check_alpha(alpha)
        self.preference = preferences(preference)
        self.scale_heads = flag("scale_heads", scale_heads)
        self.register_state("weights")

    def solve(self, step: Step) -> Tensor:
        """See `GradientMethod.solve`."""
        preference = None if self.preference is None else self.per_task("preference", step.gramian)
        weights, error = ops.fairgrad(step.gramian, step.mask, preference, self.alpha)
        weights = weights * self.factor(step)
        held = self.state("weights", step.gramian, tuple(weights.shape), 1.0)
        part = step.present if preference is None else step.present & (preference > 0)
        weights = torch.where(error.isinf().unsqueeze(-1), torch.where(part, held, 0.0), weights)
        step.commit(held, torch.where(part, weights, held))
        return weights

    def factor(self, step: Step) -> Tensor | float:
        """What the solution is multiplied by, ``[K, 1]`` or a number."""
        return 1.0
