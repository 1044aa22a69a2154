"""UPGrad: each gradient projected onto what helps all tasks, then averaged."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.facts import Facts
from fastmtl.surgery.base import Step
from fastmtl.surgery.dual_cone import DualConeMethod


class UPGrad(DualConeMethod):
    """Moves each task's gradient to the nearest direction that conflicts with no task, and takes their mean.

    The nearest point to ``g_i`` in the dual cone ``{x: <g_t, x> >= 0 for all t}`` is ``sum_t v_t g_t`` with
    ``v = argmin |sum_t v_t g_t|^2`` over ``v >= e_i``; the weights are the mean of these v over i. Their direction
    conflicts with no task; it scales linearly with each gradient's length; without conflicts it is the mean of the
    gradients. Answers conflict of direction; keeps differences of magnitude. The weights sum to 1 without conflict, and
    to more for every conflict resolved.

    Args:
        preference: Weights of the sum over i: T numbers, not negative and not all 0, taken as they are. None (paper): a
            mean over the tasks that take part.
        noise: Relative error of the Gramian's entries: 5e-7 is that of gradients in float32; 0: for float64. Only
            matters where gradients nearly cancel under weights of hundreds: see `fastmtl.ops.dual_cone`.
        common: See `GradientMethod`.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: An option out of range; at the first step: preferences for another number of tasks.

    Note:
        Cost: T problems of T tasks; one in conflict takes about as many pivots, of T^2 / 2 operations each, as tasks to
        be projected onto, so up to T^4 / 4 in all; one without conflict takes T operations. One launch on a GPU, no
        synchronisation. No state, no randomness. Zero gradients stay zero; equal, opposite and dependent gradients are
        no problem.

    Reference:
        Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", arXiv:2406.16232, 2024: the aggregator
        that it proposes, and the quadratic program of its weights. No deviation with ``noise=0``. (Its code, TorchJD,
        adds 1e-4 of the Gramian's trace to its diagonal, for its solver's sake, and so leaves conflicts.)

    Example:
        >>> import torch, fastmtl
        >>> fastmtl.aggregate(torch.tensor([[-4., 1., 1.], [6., 1., 1.]]), fastmtl.UPGrad()).weights
        tensor([1.1111, 0.7895], dtype=torch.float64)
    """

    facts = Facts("direction", "Quinton 2024", sums_to="1 or more", cost="T^4", up_to=256)

    def solve(self, step: Step) -> Tensor:
        """See `GradientMethod.solve`."""
        each = torch.diag_embed(self.shares(step))
        return ops.dual_cone(step.gramian, each, step.mask, self.noise)[0].sum(1)
