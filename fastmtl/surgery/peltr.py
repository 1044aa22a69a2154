"""PE-LTR: the common descent direction of smallest norm in which no task counts for less than its bound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.checks import choice, flag, reals
from fastmtl.facts import Facts
from fastmtl.simplex import project_onto_simplex
from fastmtl.surgery.base import CommonOptions, GradientMethod, Step

if TYPE_CHECKING:
    from typing_extensions import Unpack

_NOISE = 1e-6  # of cosines whose products were taken in float32, relative to the largest eigenvalue


class PELTR(GradientMethod):
    """Steps along the shortest combination of the tasks' gradients that gives every task at least its share.

    The weights are ``argmin |sum_t w_t g_t|^2`` over ``w_t >= c_t, sum w = 1``: MGDA with lower bounds c, which say how
    much each task matters at least. Answers conflict of direction. The weights sum to 1.

    Args:
        lower_bounds: c: one bound for all tasks, or one per task; not negative, of sum at most 1. The bound of a task
            that is absent from a step, or does not reach a group, counts as 0 there.
        solver: ``"exact"``, or ``"relaxed"`` (paper): the problem solved without ``w >= c``, and the solution projected
            onto it. Both agree for two tasks; for more, relaxed is not the optimum.
        scale_heads: Also multiply the heads' gradients, as the paper does. Must be False in `FeatureSurgery`.
        common: See `GradientMethod`.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: An option out of range; at the first step: bounds for another number of tasks, or one bound for all
            that sums to more than 1.

    Note:
        Cost: exact: as `MGDA`, one launch on a GPU, no synchronisation. Relaxed: one symmetric eigenproblem of T+1
        numbers per group, which synchronises with the host on CUDA. No state, no randomness. Zero gradients and
        gradients that depend on others are no problem, in any floating dtype of the gradients. Relaxed: eigenvalues of
        the optimality system below 1e-6 of the largest, which float32 products cannot tell from 0, count as 0. Thus
        gradients that differ by less than about ``sqrt(2T) / 1000`` of their norms count as one, in float64 too, which
        costs the combination's norm as much of theirs at most.

    Reference:
        Lin, Chen, Pei, Sun, Xiao, Sun, Zhang, Ou, Jiang, "A Pareto-Efficient Algorithm for Multiple Objective
        Optimization in E-Commerce Recommendation", RecSys 2019, PECsolver. Deviations: solved exactly by default;
        relaxed: the optimality system in cosines, by its pseudo-inverse, in place of its normal equations,
        and a projection by sorting in place of an iterative one, both of which give the same where the paper's exist
        and the gradients are not dependent to within the cutoff above.

    Example:
        >>> import torch, fastmtl
        >>> method = fastmtl.PELTR(lower_bounds=[0.7, 0.2])
        >>> fastmtl.aggregate(torch.tensor([[-4., 1., 1.], [6., 1., 1.]]), method).weights
        tensor([0.7000, 0.3000], dtype=torch.float64)
    """

    facts = Facts("direction", "Lin, RecSys 2019", sums_to="1", needs="least weights; scales heads too", cost="T^3")

    def __init__(
        self,
        lower_bounds: float | Sequence[float] = 0.0,
        solver: str = "exact",
        scale_heads: bool = True,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(**common)
        self.lower_bounds = reals("lower_bounds", lower_bounds, 0, 1)
        if isinstance(self.lower_bounds, tuple):
            _check_sum(self.lower_bounds)
        self.solver = choice("solver", solver, ("exact", "relaxed"))
        self.scale_heads = flag("scale_heads", scale_heads)
        self.positional = not isinstance(self.lower_bounds, float)

    def solve(self, step: Step) -> Tensor:
        """See `GradientMethod.solve`."""
        if isinstance(self.lower_bounds, float):
            _check_sum([self.lower_bounds] * step.gramian.shape[-1])
        bounds = self.per_task("lower_bounds", step.gramian)
        if self.solver == "exact":
            return ops.min_norm(step.gramian, step.mask, None if self.lower_bounds == 0 else bounds)[0]
        return _relaxed(step.gramian, step.present, bounds)


def _check_sum(bounds: Sequence[float]) -> None:
    if math.fsum(bounds) > 1 + 1e-12:
        raise ValueError(
            f"lower_bounds: expected a sum of at most 1, found {math.fsum(bounds):.6g} for {len(bounds)} tasks"
        )


def _relaxed(gramian: Tensor, present: Tensor, bounds: Tensor) -> Tensor:
    """Weights ``[K, T]``: the optimality system of the problem without ``w >= c``, then the projection onto it.

    The system is solved in cosines, for ``x`` in multiples of 1 / norm, its equality's row scaled to length 1.
    """
    finite = (gramian.isfinite() | ~(present.unsqueeze(-1) & present.unsqueeze(-2))).all(-1).all(-1, keepdim=True)
    both = present.unsqueeze(-1) & present.unsqueeze(-2) & finite.unsqueeze(-1)
    m = torch.where(both, gramian, 0.0)
    squared = m.diagonal(dim1=-2, dim2=-1)
    norms = torch.where(squared > 0, squared, 1.0).sqrt()
    cosines = m / norms.unsqueeze(-1) / norms.unsqueeze(-2)
    shortest = torch.where(squared > 0, norms, float("inf")).amin(-1, keepdim=True)
    norms = torch.where(squared > 0, norms / shortest, 1.0)  # a zero gradient's column is zero in any unit
    norms = norms * torch.linalg.vector_norm(present / norms, dim=-1, keepdim=True)
    c = torch.where(present, bounds, 0.0)
    left = (1 - c.sum(-1, keepdim=True)).clamp(min=0)
    ones = torch.where(present, 1 / norms, 0.0)
    system = torch.cat(
        [torch.cat([cosines, ones.unsqueeze(-1)], -1), torch.cat([ones, torch.zeros_like(left)], -1).unsqueeze(-2)], -2
    )
    right = torch.cat([-(cosines @ (norms * c).unsqueeze(-1)).squeeze(-1), left], -1)
    inverse = torch.linalg.pinv(system, rtol=_NOISE, hermitian=True)
    x = ones * (inverse @ right.unsqueeze(-1)).squeeze(-1)[:, :-1]
    weights = torch.where(present, c + project_onto_simplex(x, present, left), 0.0)
    return torch.where(finite, weights, float("nan"))
