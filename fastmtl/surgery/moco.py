"""MoCo: gradients tracked by moving averages, weighted by steps towards their min-norm point."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.checks import choice, real
from fastmtl.facts import Facts
from fastmtl.simplex import renormalize
from fastmtl.surgery.base import CommonOptions, Step
from fastmtl.surgery.row_method import RawRows, Tracked, TrackingMethod

if TYPE_CHECKING:
    from typing_extensions import Unpack

SIMPLEX = ("projection", "softmax")
GRADIENTS = ("raw", "normalized")


class MoCo(TrackingMethod):
    """Weighs moving averages of the gradients instead of the noisy gradients, by one step per batch towards MGDA's.

    With ``y_t`` the tracked gradient of task t and Y their matrix, in step k, ``beta_k = beta / k^beta_decay`` and
    ``gamma_k = gamma / k^gamma_decay``: ``y_t -= beta_k (y_t - g_t)``, then the weights
    ``w -= gamma_k (Y Y^T + rho I) w``, projected onto the simplex, then the update ``sum_t w_t y_t``. Answers conflict
    of direction, without the bias that the noise of a batch brings into the min-norm point.

    Args:
        beta: Rate of the moving average, 0 to 1.
        gamma: Rate of the weights.
        rho: Pull towards equal weights.
        beta_decay: How fast ``beta_k`` falls; 0: not at all.
        gamma_decay: Likewise.
        simplex: ``"projection"`` (paper), or ``"softmax"`` of the moved weights (public code).
        gradients: What is tracked: ``"raw"`` (paper), or ``"normalized"``: ``g_t L_t / |g_t|`` (public code).
        common: See `GradientMethod`.

    Raises:
        TypeError, ValueError: An option of the wrong type or out of range.

    Note:
        State: T P numbers, the tracked gradients (float32 where the parameters have 16 bits), and as many again while a
        step runs; T weights per group, and the step's number. Cost: two passes over them besides the usual two;
        ``"normalized"``: one more. No synchronisation. The first update is ``beta`` times a combination of the first
        gradients, since tracking starts at 0. An absent task keeps its tracked gradient and its weight in the state;
        those of the others are scaled to sum to 1 in this step, or are equal if all are 0. ``Result.gramian`` is that
        of the tracked gradients. Not for sparse gradients.

    Reference:
        Fernando, Shen, Liu, Chaudhury, Murugesan, Chen, "Mitigating Gradient Bias in Multi-objective Learning: A
        Provably Convergent Stochastic Approach", ICLR 2023, Algorithm 1. The update uses the gradients and weights
        after their steps; the rates are those of public code.

    Example:
        >>> import torch, fastmtl
        >>> method = fastmtl.MoCo(beta=1.0, gamma=0.05)
        >>> fastmtl.aggregate(torch.tensor([[1., 0.], [0., 2.]]), method).weights
        tensor([0.5375, 0.4625], dtype=torch.float64)
    """

    facts = Facts("direction", "Fernando, ICLR 2023", sums_to="1", state="T P", cost="T P")
    weights: Tensor
    steps: Tensor

    def __init__(
        self,
        beta: float = 0.5,
        gamma: float = 0.1,
        rho: float = 0.0,
        beta_decay: float = 0.5,
        gamma_decay: float = 0.5,
        simplex: str = "projection",
        gradients: str = "raw",
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(**common)
        self.beta, self.gamma = real("beta", beta, 0, 1), real("gamma", gamma, 0)
        self.rho = real("rho", rho, 0)
        self.beta_decay, self.gamma_decay = real("beta_decay", beta_decay, 0), real("gamma_decay", gamma_decay, 0)
        self.simplex = choice("simplex", simplex, SIMPLEX)
        self.gradients = choice("gradients", gradients, GRADIENTS)
        self.needs_losses = self.needs_losses or gradients == "normalized"
        self.register_state("steps", (1,))
        self.register_state("weights")

    def track(self, step: RawRows) -> Tracked:
        """See `TrackingMethod.track`."""
        rate = self.beta / (self.steps.to(step.rows.device) + 1) ** self.beta_decay
        factors = None
        if self.gradients == "normalized":
            assert step.losses is not None
            squares = ops.gram(step.rows).diagonal(dim1=-2, dim2=-1).sum(0)
            norms = squares.sqrt() if step.scale is None else squares.sqrt() / step.scale.double()
            factors = torch.where(norms > 0, step.losses / norms, 0.0)

        def moved(old: Tensor, grad: Tensor, task: int) -> Tensor:
            goal = grad if factors is None else grad * factors[task].to(grad.dtype)
            return old + rate.to(old.dtype) * (goal - old)

        return self.follow(step, moved)

    def solve(self, step: Step) -> Tensor:
        """See `GradientMethod.solve`."""
        num_groups, num_tasks = step.gramian.shape[:2]
        steps = self.state("steps", step.gramian, (1,), 0.0)
        weights = self.state("weights", step.gramian, (num_groups, num_tasks), 1 / num_tasks)
        present = step.present
        w, held = renormalize(weights, present)
        rate = 1 / (steps + 1) ** self.gamma_decay
        if self.simplex == "softmax":
            gramian = torch.where(present.unsqueeze(-1) & present.unsqueeze(-2), step.gramian, 0.0)
            slope = (gramian @ w.unsqueeze(-1)).squeeze(-1) + self.rho * w
            moved = torch.where(present, w - self.gamma * rate * slope, -torch.inf).softmax(-1)
        else:
            moved = ops.projected_gradient(step.gramian, w, step.mask, lr=self.gamma, ridge=self.rho, rate=rate)
        result = torch.where(step.finite, moved, torch.nan)
        step.commit(weights, torch.where(present, moved * held, weights))
        step.commit(steps, steps + 1)
        return torch.where(present, result, 0.0)
