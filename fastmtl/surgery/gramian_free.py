"""Gradient methods whose weights do not depend on the gradients: one backward pass does."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.surgery.base import GradientMethod, Step


class GramianFree(GradientMethod):
    """Base class of the methods that look at no gradients: subclasses implement `choose`.

    `fastmtl.backward` takes one weighted backward pass for the shared parameters in place of T, and there is no
    Gramian, if there is one group of parameters, ``nonfinite="propagate"``, and nothing is ``apply_to="normalized"``.
    In such a step a task whose loss reaches no shared parameter counts as present. The other ways in have the per-task
    gradients anyway.
    """

    def choose(self, present: Tensor) -> Tensor:
        """The weights ``[K, T]``.

        Args:
            present: 1 for a task that takes part, 0 for another, ``[K, T]`` of the weights' dtype.
        """
        raise NotImplementedError

    def advance(self, where: Tensor) -> None:
        """The weights have been used in training; state may move where ``where`` (bool scalar) holds."""

    def ready(self, present: Tensor) -> Tensor | None:
        """See `GradientMethod.ready`."""
        if self.apply_to == "normalized":
            return None
        there = present.to(torch.float32 if present.device.type == "mps" else torch.float64)
        return self.rescaled(self.choose(there), present)

    def solve(self, step: Step) -> Tensor:
        """See `GradientMethod.solve`."""
        weights = torch.where(step.finite, self.choose(step.present.to(step.gramian.dtype)), float("nan"))
        if step.training:
            self.advance(step.finite)
        return weights
