"""MGDA: the common descent direction of smallest norm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastmtl import ops
from fastmtl.checks import choice, flag
from fastmtl.facts import Facts
from fastmtl.surgery.base import CommonOptions, GradientMethod, Step

if TYPE_CHECKING:
    from typing_extensions import Unpack

SOLVERS = ("exact", "frank_wolfe")


class MGDA(GradientMethod):
    """Steps along the shortest vector in the convex hull of the tasks' gradients.

    The weights are ``argmin |sum_t w_t g_t|^2`` over ``w >= 0, sum w = 1``: the resulting direction has the same
    non-negative dot product with every gradient that takes part, and is 0 at a Pareto-stationary point. Answers
    conflict of direction; favours tasks with small gradients, which ``normalization`` makes up for. The weights sum
    to 1. In `FeatureSurgery` this is MGDA-UB, the same on the gradients of the shared representation, flattened over
    the batch.

    Args:
        solver: ``"exact"``, or ``"frank_wolfe"``: the paper's Algorithm 2, which stops short of the optimum.
        max_iter: Frank-Wolfe: the largest number of steps. None: 250.
        tol: Frank-Wolfe: stops where a step has changed the weights by less than this, in sum. None: 1e-5.
        scale_heads: Also multiply the heads' gradients, as the paper's code does. Must be False in `FeatureSurgery`.
        start: Frank-Wolfe: from ``"uniform"`` weights (paper), or from the best ``"pair"`` of tasks (its public code).
            None: ``"uniform"``.
        common: See `GradientMethod`. The paper's code has ``normalization`` "none", "l2", "loss" and "loss+", applied
            to ``"raw"`` gradients; with ``apply_to="normalized"`` the weights sum to 1 no more.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: An option out of range, or one of Frank-Wolfe with the exact solver, where it has no effect.

    Note:
        Cost: exact, by an active set: about T pivots of T^2 operations; one launch on a GPU, no synchronisation. The
        duality gap is at most 1e-9 of the smallest squared gradient norm on full-rank Gramians. Frank-Wolfe: T
        operations a step. No state, no randomness. A zero gradient takes all the weight.

    Reference:
        Désidéri, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization", C. R. Acad. Sci. 2012;
        Sener and Koltun, "Multi-Task Learning as Multi-Objective Optimization", NeurIPS 2018, equations 3 and 5,
        Algorithm 2. Deviation: solved exactly by default. Normalisation is from the latter's public code only; that
        divides by negative losses and by zero. It also keeps Frank-Wolfe's step within 0.001 to 0.999 where it should
        be 0 or 1, which we do not.

    Example:
        >>> import torch, fastmtl
        >>> fastmtl.aggregate(torch.tensor([[-4., 1., 1.], [6., 1., 1.]]), fastmtl.MGDA()).weights
        tensor([0.6000, 0.4000], dtype=torch.float64)
    """

    facts = Facts("direction", "Désidéri 2012; Sener, NeurIPS 2018", sums_to="1", cost="T^3")

    def __init__(
        self,
        solver: str = "exact",
        max_iter: int | None = None,
        tol: float | None = None,
        scale_heads: bool = False,
        start: str | None = None,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(**common)
        self.solver = choice("solver", solver, SOLVERS)
        for name, value in (("max_iter", max_iter), ("tol", tol), ("start", start)):
            if value is not None and solver == "exact":
                raise ValueError(f"{name}: {value!r} has no effect without solver='frank_wolfe'")
        self.max_iter = 250 if max_iter is None else max_iter
        self.tol = 1e-5 if tol is None else tol
        self.start = "uniform" if start is None else start
        ops.check_frank_wolfe(self.max_iter, self.tol, self.start)
        self.scale_heads = flag("scale_heads", scale_heads)

    def solve(self, step: Step) -> Tensor:
        """See `GradientMethod.solve`."""
        if self.solver == "exact":
            return ops.min_norm(step.gramian, step.mask)[0]
        return ops.frank_wolfe(step.gramian, step.mask, self.max_iter, self.tol, self.start)[0]
