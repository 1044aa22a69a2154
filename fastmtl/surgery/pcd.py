"""PCD: the main task's gradient, bent no more than the other tasks' progress takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.checks import real, reals, whole
from fastmtl.facts import Facts
from fastmtl.surgery.base import CommonOptions, GradientMethod, Step

if TYPE_CHECKING:
    from typing_extensions import Unpack

_FAR = 1e-6  # what is left of 1 where the other tasks need a step 1,000 times longer than the gradients


class PCD(GradientMethod):
    """Follows one task as closely as the others allow, who each get a share of the progress of a step of their own.

    With gradients ``h_t = g_t / sqrt(v_t + eps)``, v the average of ``|g_t|^2`` over the steps, the direction is
    ``argmin |d - h_main|^2`` with ``<h_t, d> >= tau_t |h_t|^2`` for the other tasks, at the length of ``g_main``.
    Answers conflict of direction where one task is what counts, and the others' differences of magnitude. The weights
    sum to nothing in particular.

    Args:
        main: The main task's position.
        tau: 0 to 1: one share for all other tasks, or one per task (the main task's is not used).
        beta: Decay of the average, 0 to below 1, without bias in the first steps.
        eps: Not negative.
        common: See `GradientMethod`.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: An option out of range; at the first step: no task of that position, or shares for another number.

    Note:
        Cost: as `ops.dual_cone`, one launch of it and some operations on T x T numbers. No synchronisation. State: two
        numbers per task and group. No randomness. Where the other tasks contradict each other, or would take a
        change of the direction longer than 1,000 normalised gradients, the direction is the main task's gradient. All
        weights are 0 where that is 0, or its task absent.

    Reference:
        Varam, AlHajri, "Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical
        Multi-Objective Optimization", TMLR 2026. Deviations: the program is solved exactly for any number of tasks, as
        one projection onto a dual cone, where the paper enumerates the sets of constraints that bind; absent tasks keep
        their averages; what counts as contradiction. Formulas and defaults are from TorchJD 0.18's description of the
        paper.

    Example:
        >>> import torch, fastmtl
        >>> fastmtl.aggregate(torch.tensor([[-4., 1., 1.], [6., 1., 1.]]), fastmtl.PCD()).weights
        tensor([1.8481, 1.0954], dtype=torch.float64)
    """

    facts = Facts("direction", "Varam, TMLR 2026", needs="the main task", state="2 K T", cost="T^3")
    positional = True
    squares: Tensor
    counts: Tensor

    def __init__(
        self,
        main: int = 0,
        tau: float | Sequence[float] = 0.02,
        beta: float = 0.999,
        eps: float = 1e-8,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(**common)
        self.main = whole("main", main, 0)
        self.tau = reals("tau", tau, 0, 1)
        self.beta = real("beta", beta, 0)
        if self.beta >= 1:
            raise ValueError(f"beta: expected a number in [0, 1), found {beta}")
        self.eps = real("eps", eps, 0)
        self.register_state("squares")
        self.register_state("counts")

    def solve(self, step: Step) -> Tensor:
        """See `GradientMethod.solve`."""
        shape = tuple(step.gramian.shape[:2])
        if self.main >= shape[1]:
            raise ValueError(f"main: expected one of {shape[1]} tasks, found {self.main}")
        tau, present = self.per_task("tau", step.gramian), step.present
        held = self.state("squares", step.gramian, shape, 0.0)
        counts = self.state("counts", step.gramian, shape, 0.0)
        m = torch.where(present.unsqueeze(-1) & present.unsqueeze(-2), step.gramian, 0.0)
        squares = m.diagonal(dim1=-2, dim2=-1)
        average = self.beta * held + (1 - self.beta) * squares
        bound = average / (1 - self.beta ** (counts + 1)) + self.eps
        scales = torch.where(bound == 0, 1.0, bound.rsqrt())
        step.commit(held, torch.where(present, average, held))
        step.commit(counts, counts + present)

        # The nearest d to h_main with <h_t, d> >= b_t is h_main + x, x the shortest with <h_t, x> >= r_t. With one more
        # dimension that is a projection of f = (0, -1) onto the dual cone of the (h_t, r_t): f + sum_t u_t (h_t, r_t)
        # is left (x, -1). (Lawson and Hanson, "Solving Least Squares Problems", chapter 23.) f takes the main's place.
        h = m * scales.unsqueeze(-1) * scales.unsqueeze(-2)
        is_main = torch.arange(shape[1], device=m.device) == self.main
        rest = torch.where(is_main, -1.0, tau * h.diagonal(dim1=-2, dim2=-1) - h[..., self.main])
        lifted = torch.where(is_main | is_main.unsqueeze(-1), 0.0, h) + rest.unsqueeze(-1) * rest.unsqueeze(-2)
        start = is_main.to(m.dtype).expand(shape[0], 1, -1)
        u = ops.dual_cone(lifted, start, present | is_main)[0][:, 0]
        left = -(rest * torch.where(present | is_main, u, 0.0)).sum(-1, keepdim=True)
        shares = torch.where(left > _FAR, u / left, 0.0)
        weights = scales * torch.where(is_main, 1.0, torch.where(present, shares, 0.0))
        products = (m @ weights.unsqueeze(-1)).squeeze(-1)
        square = (weights * products).sum(-1, keepdim=True)
        parts = (weights * squares.sqrt()).sum(-1, keepdim=True) ** 2
        factor = torch.where(square > 1e-12 * parts, (squares[:, self.main, None] / square).sqrt(), 0.0)
        finite = (m * 0).sum((-1, -2)).unsqueeze(-1) == 0
        return torch.where(finite, weights * factor * present, float("nan"))
