"""The nearest point of a simplex."""

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
    last = torch.where(present, x, float("inf")).amin(-1, keepdim=True)
    far = torch.where(last.isinf(), 0.0, last) - total - 1  # too small to have a share
    descending = torch.where(present, x, far).sort(-1, descending=True).values
    count = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    thresholds = (descending.cumsum(-1) - total) / count
    shares = (descending > thresholds).sum(-1, keepdim=True).clamp(min=1)
    return (x - thresholds.gather(-1, shares - 1)).clamp(min=0)
