"""DBMTL: gradients of the losses' logarithms, averaged over steps, scaled to the largest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmtl.checks import flag, real
from fastmtl.facts import Facts
from fastmtl.surgery.base import CommonOptions, Step
from fastmtl.surgery.row_method import RawRows, Tracked, TrackingMethod

if TYPE_CHECKING:
    from typing_extensions import Unpack


class DBMTL(TrackingMethod):
    """Balances losses by their logarithms and gradients by their norms.

    In step k, with ``beta_k = beta / k^decay``: ``y_t = beta_k y_t + (1 - beta_k) g_t / (L_t + eps)``, and the update
    is ``max_s |y_s| sum_t y_t / |y_t|``: all tasks move alike, as far as the largest would. Answers differences of
    magnitude.

    Args:
        beta: How much of the average stays, 0 to 1.
        decay: How fast ``beta_k`` falls; 0: not at all.
        eps: Added to the losses, which must stay positive: a loss that is not gives NaN.
        scale_heads: The heads get the gradients of the logarithms, too (paper).
        common: See `GradientMethod`; a normalization applies to the averaged gradients.

    Raises:
        TypeError, ValueError: An option of the wrong type or out of range.

    Note:
        State: T P numbers, the averages (float32 where the parameters have 16 bits), and as many again while a step
        runs; the step's number. Cost: two passes over them besides the usual two. No synchronisation. An absent task
        keeps its average. ``Result.weights`` multiply the averages, whose Gramian is ``Result.gramian``; with
        ``groups=`` the largest of each group counts. A zero average has weight 1. Not for sparse gradients.

    Reference:
        Lin, Jiang, Ye, Zhang, Chen, Chen, Liu, Kwok, "Dual-Balancing for Multi-Task Learning", 2023, Algorithm 1. No
        deviation with the defaults, of which beta is public code's.

    Example:
        >>> import torch, fastmtl
        >>> method = fastmtl.DBMTL(beta=0.0)
        >>> losses = torch.tensor([1., 2.])
        >>> fastmtl.aggregate(torch.tensor([[3., 4.], [0., 20.]]), method, losses=losses).grads
        tensor([ 6., 18.])
    """

    needs_losses = True
    facts = Facts("magnitude", "Lin, 2023", needs="positive losses; scales heads too", state="T P", cost="T P")
    steps: Tensor

    def __init__(
        self,
        beta: float = 0.9,
        decay: float = 0.5,
        eps: float = 1e-8,
        scale_heads: bool = True,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(**common)
        self.beta, self.decay, self.eps = real("beta", beta, 0, 1), real("decay", decay, 0), real("eps", eps, 0)
        self.scale_heads = flag("scale_heads", scale_heads)
        self.register_state("steps", (1,))

    def track(self, step: RawRows) -> Tracked:
        """See `TrackingMethod.track`."""
        assert step.losses is not None
        keep = self.beta / (self.steps.to(step.rows.device) + 1) ** self.decay
        losses = step.losses + self.eps
        slopes = torch.where(losses > 0, 1 / losses, torch.nan)

        def moved(old: Tensor, grad: Tensor, task: int) -> Tensor:
            goal = grad * slopes[task].to(grad.dtype)
            return goal + keep.to(old.dtype) * (old - goal)

        return self.follow(step, moved, heads=slopes if self.scale_heads else None)

    def solve(self, step: Step) -> Tensor:
        """See `GradientMethod.solve`."""
        steps = self.state("steps", step.gramian, (1,), 0.0)
        squares = torch.where(step.present, step.gramian.diagonal(dim1=-2, dim2=-1), 0.0)
        norms = squares.sqrt()
        weights = torch.where(norms > 0, norms.amax(-1, keepdim=True) / norms, 1.0)
        weights = torch.where(step.finite, weights, torch.nan)
        step.commit(steps, steps + 1)
        return torch.where(step.present, weights, 0.0)
