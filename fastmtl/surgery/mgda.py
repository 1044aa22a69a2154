"""MGDA: the common descent direction of smallest norm."""

from __future__ import annotations

from torch import Tensor

from fastmtl import ops
from fastmtl.checks import choice
from fastmtl.surgery.base import GradientMethod, Step
from fastmtl.surgery.normalization import NORMALIZATIONS, normalize, normalizers

SOLVERS = ("exact", "frank_wolfe")
APPLY_TO = ("raw", "normalized")


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
        normalization: What each gradient is divided by before solving: ``"none"``, ``"l2"``: its norm, ``"loss"``: its
            loss, ``"loss+"``: both. By absolute values, and where one is 0, not by it.
        apply_to: With a normalization, the weights then multiply the ``"raw"`` gradients (the paper's code), or the
            ``"normalized"`` ones: the weights returned, which go with the raw gradients, are then divided by the
            normalisers, and sum to 1 no more.
        scale_heads: Also multiply the heads' gradients, as the paper's code does. Must be False in `FeatureSurgery`.
        start: Frank-Wolfe: from ``"uniform"`` weights (paper), or from the best ``"pair"`` of tasks (its public code).
            None: ``"uniform"``.
        rescale: See `GradientMethod`.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: An option out of range, or one that has no effect: of Frank-Wolfe with the exact solver, or
            ``apply_to="normalized"`` without a normalization.

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

    def __init__(
        self,
        solver: str = "exact",
        max_iter: int | None = None,
        tol: float | None = None,
        normalization: str = "none",
        apply_to: str = "raw",
        scale_heads: bool = False,
        start: str | None = None,
        rescale: str = "none",
    ) -> None:
        super().__init__(rescale)
        self.solver = choice("solver", solver, SOLVERS)
        for name, value in (("max_iter", max_iter), ("tol", tol), ("start", start)):
            if value is not None and solver == "exact":
                raise ValueError(f"{name}: {value!r} has no effect without solver='frank_wolfe'")
        self.max_iter = 250 if max_iter is None else max_iter
        self.tol = 1e-5 if tol is None else tol
        self.start = "uniform" if start is None else start
        ops.check_frank_wolfe(self.max_iter, self.tol, self.start)
        self.normalization = choice("normalization", normalization, NORMALIZATIONS)
        self.apply_to = choice("apply_to", apply_to, APPLY_TO)
        if apply_to == "normalized" and normalization == "none":
            raise ValueError("apply_to: 'normalized' has no effect without a normalization, found 'none'")
        self.scale_heads = scale_heads
        self.needs_losses = normalization in ("loss", "loss+")

    def solve(self, step: Step) -> Tensor:
        """See `GradientMethod.solve`."""
        if self.normalization == "none":
            return self._solve(step.gramian, step)
        factors = normalizers(step, self.normalization)
        weights = self._solve(normalize(step.gramian, factors), step)
        return weights if self.apply_to == "raw" else weights * factors

    def _solve(self, gramian: Tensor, step: Step) -> Tensor:
        if self.solver == "exact":
            return ops.min_norm(gramian, step.mask)[0]
        return ops.frank_wolfe(gramian, step.mask, self.max_iter, self.tol, self.start)[0]
