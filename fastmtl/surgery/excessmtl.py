"""ExcessMTL: weigh tasks by how far they are from converged."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmtl.checks import flag, real
from fastmtl.facts import Facts
from fastmtl.surgery.base import CommonOptions, Step
from fastmtl.surgery.row_method import RawRows, Tracked, TrackingMethod

if TYPE_CHECKING:
    from typing_extensions import Unpack

EPS = 1e-7


class ExcessMTL(TrackingMethod):
    """Weighs tasks by their excess risks, what their losses could still fall, so that label noise earns no weight.

    The excess risk of task t is estimated by ``E_t = g_t^T H_t^-1 g_t`` with a diagonal ``H_t = sqrt(S_t + 1e-7)``,
    ``S_t`` the sum of the squared gradients of all steps so far (as in Adagrad), and compared with its first value:
    ``w_t`` is multiplied by ``exp(step_size E_t / E_t^0)`` and all are divided by their sum. Answers differences of
    velocity.

    Args:
        step_size: Of the multiplicative update.
        scale_heads: The weights multiply the heads' gradients, too (paper: they weigh the losses).
        common: See `GradientMethod`; ``rescale="sum_to_num_tasks"`` is public code's.

    Raises:
        TypeError, ValueError: An option of the wrong type or out of range.

    Note:
        State: T P numbers, the squared gradients (float32 where the parameters have 16 bits), and as many again while a
        step runs; 2 T more, among them the weights' logarithms. Cost: three passes over them besides the usual two. No
        synchronisation. The first step of a task sets its ``E^0`` and does not move its weight. An absent task keeps
        its state; the weights of the others are scaled to sum to 1 in this step. ``Result.gramian`` is that of the
        gradients as they are. Not for sparse gradients.

    Reference:
        He, Zhou, Zhang, Yun, Xu, Zeng, Chilimbi, Zhao, "Robust Multi-Task Learning with Excess Risks", ICML 2024,
        equations 6, 7 and 9. As in its public code the first step is what is compared with; the paper takes the mean of
        the first epochs.

    Example:
        >>> import torch, fastmtl
        >>> method = fastmtl.ExcessMTL()
        >>> for grads in (torch.tensor([[1., 0.], [0., 1.]]), torch.tensor([[1., 0.], [0., 0.1]])):
        ...     weights = fastmtl.aggregate(grads, method).weights
        >>> weights
        tensor([0.6676, 0.3324], dtype=torch.float64)
    """

    single_group = True
    facts = Facts("velocity", "He, ICML 2024", sums_to="1", needs="scales heads too", state="T P", cost="T P")
    logs: Tensor
    initial: Tensor

    def __init__(self, step_size: float = 1.0, scale_heads: bool = True, **common: Unpack[CommonOptions]) -> None:
        super().__init__(**common)
        self.step_size = real("step_size", step_size, 0)
        self.scale_heads = flag("scale_heads", scale_heads)
        self.register_state("logs")
        self.register_state("initial")

    def track(self, step: RawRows) -> Tracked:
        """See `TrackingMethod.track`."""
        excess = torch.zeros(step.rows.num_tasks, dtype=torch.float64, device=step.rows.device)

        def moved(old: Tensor, grad: Tensor, task: int) -> Tensor:
            square = grad * grad
            sums = old + square
            excess[task] += (square / (sums + EPS).sqrt()).sum(dtype=torch.float64)
            return sums

        kept = self.move(step, moved)
        self._excess = excess
        return Tracked(step.rows, True, kept)

    def solve(self, step: Step) -> Tensor:
        """See `GradientMethod.solve`."""
        excess, present = self._excess, step.present[0]
        num_tasks = len(excess)
        logs = self.state("logs", excess, (num_tasks,), -math.log(num_tasks))  # the weights' may leave what exp() has
        initial = self.state("initial", excess, (num_tasks,), torch.nan)
        first = present & initial.isnan()
        ratio = torch.where(initial > 0, excess / initial, torch.where(excess > 0, 1.0, 0.0))
        push = torch.where(first | ~present, 0.0, self.step_size * ratio)
        moved = torch.where(present, logs + push, -torch.inf)
        held = torch.where(present, logs, -torch.inf).logsumexp(-1)
        step.commit(initial, torch.where(first, excess, initial))
        step.commit(logs, torch.where(present, moved - moved.logsumexp(-1) + held, logs))
        weights = torch.where(present, moved.softmax(-1), 0.0)
        return torch.where(step.finite | ~present, weights, torch.nan).unsqueeze(0)
