"""DualProj: the mean gradient, projected onto what helps all tasks."""

from __future__ import annotations

from torch import Tensor

from fastmtl import ops
from fastmtl.facts import Facts
from fastmtl.surgery.base import Step
from fastmtl.surgery.dual_cone import DualConeMethod


class DualProj(DualConeMethod):
    """Moves the mean gradient to the nearest direction that conflicts with no task.

    With p the mean, the nearest point in the dual cone ``{x: <g_t, x> >= 0 for all t}`` is ``sum_t w_t g_t`` with
    ``w = argmin |sum_t w_t g_t|^2`` over ``w >= 1 / T``. Where the mean conflicts with no task, it stays; so tasks with
    large gradients dominate, as they do in the mean. Answers conflict of direction. The weights sum to 1 without
    conflict, and to more otherwise.

    Args:
        preference: Weights of the sum that is projected: T numbers, not negative and not all 0, taken as they are.
            None: a mean over the tasks that take part.
        noise: Relative error of the Gramian's entries: 5e-7 is that of gradients in float32; 0: for float64. Only
            matters where gradients nearly cancel under weights of hundreds: see `fastmtl.ops.dual_cone`.
        common: See `GradientMethod`.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: An option out of range; at the first step: preferences for another number of tasks.

    Note:
        Cost: one problem of T tasks, with about as many pivots of T^2 / 2 operations as tasks to be projected onto;
        without conflict T^2 operations. One launch on a GPU, no synchronisation. No state, no randomness. Zero, equal,
        opposite and dependent gradients are no problem.

    Reference:
        Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017, section 3.
        Deviations: it projects the gradient of a new task onto the dual cone of earlier tasks; here, as in TorchJD,
        which gave it this name, the mean of all onto the dual cone of all. No margin (the ``memory strength`` of its
        code, a lower bound of the dual variables).

    Example:
        >>> import torch, fastmtl
        >>> fastmtl.aggregate(torch.tensor([[-4., 1., 1.], [6., 1., 1.]]), fastmtl.DualProj()).grads
        tensor([0.5556, 1.1111, 1.1111])
    """

    facts = Facts("direction", "Lopez-Paz, NeurIPS 2017", sums_to="1 or more", cost="T^3")

    def solve(self, step: Step) -> Tensor:
        """See `GradientMethod.solve`."""
        total = self.shares(step).unsqueeze(1)
        return ops.dual_cone(step.gramian, total, step.mask, self.noise)[0].squeeze(1)
