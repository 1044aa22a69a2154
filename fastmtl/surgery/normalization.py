"""Gradients made comparable before a method weighs them: divided by their norms, their losses, or both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastmtl.surgery.base import Step

NORMALIZATIONS = ("none", "l2", "loss", "loss+")
APPLY_TO = ("raw", "normalized")


def normalizers(step: Step, normalization: str) -> Tensor:
    """What the gradient of each task is multiplied by.

    Args:
        step: The losses are read for ``"loss"`` and ``"loss+"`` only.
        normalization: ``"l2"``: 1 / |g_t|; ``"loss"``: 1 / |L_t|; ``"loss+"``: 1 / (|L_t| |g_t|).

    Returns:
        ``[K, T]`` float64, positive, and NaN where the step is not finite. 1 for absent tasks; a norm or loss of 0 does
        not divide. The absolute value keeps a negative loss from turning its gradient around.

    Reference:
        Sener and Koltun's public code of "Multi-Task Learning as Multi-Objective Optimization", NeurIPS 2018 (the paper
        does not mention it), which has neither guard.
    """
    factors = torch.ones_like(step.gramian[..., 0])
    if normalization in ("l2", "loss+"):
        norms = step.gramian.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        factors = torch.where(norms == 0, factors, factors / norms)
    if normalization in ("loss", "loss+"):
        assert step.losses is not None
        factors = torch.where(step.losses == 0, factors, factors / step.losses.abs())
    return torch.where(step.finite, torch.where(step.present, factors, 1.0), float("nan"))


def normalize(gramian: Tensor, factors: Tensor) -> Tensor:
    """The Gramian ``[K, T, T]`` of the gradients multiplied by ``factors [K, T]``."""
    return gramian * factors.unsqueeze(-1) * factors.unsqueeze(-2)
