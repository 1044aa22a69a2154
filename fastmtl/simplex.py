"""Weights on a simplex: the nearest point, and what the present tasks hold."""

from __future__ import annotations

import torch
from torch import Tensor


def project_onto_simplex(x: Tensor, present: Tensor, total: Tensor) -> Tensor:
    """The nearest point with ``x >= 0, sum x = total`` over the present tasks.

    Args:
        x: ``[K, T]``.
        present: bool ``[K, T]``.
        total: ``[K, 1]``, not negative.

    Returns:
        ``[K, T]``; what absent tasks have means nothing.

    Reference:
        Duchi, Shalev-Shwartz, Singer, Chandra, "Efficient Projections onto the l1-Ball for Learning in High
        Dimensions", ICML 2008, Figure 1.
    """
    x = x - torch.where(present, x, -torch.inf).amax(-1, keepdim=True)  # exact near the largest, however large
    descending = torch.where(present, x, -total - 1).sort(-1, descending=True).values  # too small to have a share
    count = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    thresholds = (descending.cumsum(-1) - total) / count
    shares = (descending > thresholds).sum(-1, keepdim=True).clamp(min=1)
    return (x - thresholds.gather(-1, shares - 1)).clamp(min=0)


def renormalize(weights: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Scale the weights of the present tasks to sum to 1; where they are all 0, make them equal.

    Args:
        weights: ``[K, T]``, not negative.
        present: bool ``[K, T]``.

    Returns:
        ``[K, T]``, 0 for absent tasks, and what the present ones held, ``[K, 1]``.
    """
    share = torch.where(present, weights, 0.0)
    held = share.sum(-1, keepdim=True)
    equal = present.to(weights.dtype) / present.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(held > 0, share / held, equal), held
