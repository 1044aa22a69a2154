"""What a step of gradient surgery returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Result:
    """The outcome of one step, on the device, detached; reading it is what synchronises.

    Attributes:
        grads: `fastmtl.aggregate`: the combined gradient, shaped as one row of its input. `fastmtl.backward` and
            `TaskGradients.combine`: the shared parameters' ``.grad`` themselves, in order, None where no task
            reaches. `FeatureSurgery`: None.
        weights: The tasks' weights, ``[T]`` float64, or ``[K, T]`` with groups; None for elementwise methods (GradDrop,
            TrimmedMean), which have none.
        gramian: Dot products of the raw losses' gradients, ``[T, T]`` float64, or ``[K, T, T]`` with groups; None for
            loss weightings and elementwise methods, which need none. Of methods that track gradients (MoCo, DBMTL), of
            the tracked ones.
    """

    grads: Any
    weights: Any
    gramian: Tensor | None

    @staticmethod
    def of(grads: Any, weights: Tensor | None, gramian: Tensor | None, grouped: bool) -> Result:
        """A result from ``weights [K, T]`` and ``gramian [K, T, T]``; K is left out unless ``grouped``."""
        if grouped:
            return Result(grads, weights, gramian)
        return Result(grads, None if weights is None else weights[0], None if gramian is None else gramian[0])

    def __repr__(self) -> str:
        """Weights and shapes; never the gradients."""
        grads = [self.grads] if isinstance(self.grads, Tensor) else list(self.grads or ())
        shapes = [None if g is None else list(g.shape) for g in grads[:3]] + ["..."] * (len(grads) > 3)
        gramian = None if self.gramian is None else list(self.gramian.shape)
        return f"Result(weights={self.weights}, gramian of shape {gramian}, grads of shapes {shapes})"

    @property
    def cosines(self) -> Tensor:
        """Cosines between the tasks' gradients, shaped as ``gramian``; 0 where a gradient is zero.

        Raises:
            ValueError: There is no Gramian.
        """
        if self.gramian is None:
            raise ValueError("cosines: a loss weighting or an elementwise method computes no Gramian")
        norms = self.gramian.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        scale = norms.unsqueeze(-1) * norms.unsqueeze(-2)
        return torch.where(scale > 0, self.gramian / scale, 0.0).clamp(-1, 1)
