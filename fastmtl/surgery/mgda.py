"""MGDA: the common descent direction of smallest norm."""

from __future__ import annotations

from torch import Tensor

from fastmtl import ops
from fastmtl.surgery.base import GradientMethod, Step


class MGDA(GradientMethod):
    """Steps along the shortest vector in the convex hull of the tasks' gradients.

    The weights are ``argmin |sum_t w_t g_t|^2`` over ``w >= 0, sum w = 1``: the resulting direction has the same
    non-negative dot product with every gradient that takes part, and is 0 at a Pareto-stationary point. Answers
    conflict of direction; favours tasks with small gradients. The weights sum to 1. In `FeatureSurgery` this is
    MGDA-UB, the same on the gradients of the shared representation, flattened over the batch.

    Args:
        rescale: See `GradientMethod`.

    Note:
        Cost: exact, by an active set: about T pivots of T^2 operations; one launch on a GPU, no synchronisation. The
        duality gap is at most 1e-9 of the smallest squared gradient norm on full-rank Gramians. No state, no
        randomness. A zero gradient takes all the weight.

    Reference:
        Désidéri, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization", C. R. Acad. Sci. 2012;
        Sener and Koltun, "Multi-Task Learning as Multi-Objective Optimization", NeurIPS 2018, equations 3 and 5.
        Deviation: solved exactly, where Algorithm 2 of the latter iterates Frank-Wolfe steps.

    Example:
        >>> import torch, fastmtl
        >>> fastmtl.aggregate(torch.tensor([[-4., 1., 1.], [6., 1., 1.]]), fastmtl.MGDA()).weights
        tensor([0.6000, 0.4000], dtype=torch.float64)
    """

    def __init__(self, rescale: str = "none") -> None:
        super().__init__(rescale)

    def solve(self, step: Step) -> Tensor:
        """See `GradientMethod.solve`."""
        return ops.min_norm(step.gramian, step.mask)[0]
