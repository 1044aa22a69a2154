"""What the demo measures: quality of the scores, quality against single-task nets, and conflict between gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def auc(scores: Tensor, labels: Tensor) -> Tensor:
    """Returns each task's area under the ROC curve [T], float64, from scores and labels [N, T].

    It is the share of (positive, negative) pairs that the score ranks rightly; a tie counts half.
    """
    result = torch.empty(scores.shape[1], dtype=torch.float64)
    for task, (score, label) in enumerate(zip(scores.t(), labels.t(), strict=True)):
        _, place, count = torch.unique(score, return_inverse=True, return_counts=True)
        mean_rank = (count.cumsum(0) - (count - 1) / 2).double()[place]
        positive = label > 0.5
        size = positive.sum()
        result[task] = (mean_rank[positive].sum() - size * (size + 1) / 2) / (size * (len(score) - size))
    return result


def relative_gain(values: Tensor, yardstick: Tensor, higher_is_better: bool) -> Tensor:
    """Returns each task's relative change [T] against the single-task nets' value [T]; positive is better."""
    change = (values - yardstick) / yardstick
    return change if higher_is_better else -change


def delta_m(values: Tensor, yardstick: Tensor, higher_is_better: bool) -> float:
    """Returns the mean over the tasks of the relative gain.

    Reference:
        Maninis, Radosavovic, Kokkinos, "Attentive Single-Tasking of Multiple Tasks", CVPR 2019, equation 4 (there the
        drop, here with the sign of Vandenhende et al., "Multi-Task Learning for Dense Prediction Tasks", TPAMI 2021).
    """
    return relative_gain(values, yardstick, higher_is_better).mean().item()


def cosines(gramian: Tensor) -> Tensor:
    """Returns the cosines between gradients from their inner products, both [T, T]; NaN for a zero gradient."""
    norms = gramian.diagonal().sqrt()
    return gramian / (norms[:, None] * norms)


def conflicting_pairs(gramian: Tensor) -> float:
    """Returns the share of the pairs of nonzero gradients that have a negative cosine."""
    upper = torch.ones(gramian.shape, dtype=torch.bool).triu(1)
    pairs = cosines(gramian)[upper]
    return (pairs < 0).sum().item() / max((~pairs.isnan()).sum().item(), 1)


def opposing_tasks(gramian: Tensor) -> float:
    """Returns the share of the gradients whose inner product with the sum of all is negative."""
    return (gramian.sum(dim=1) < 0).double().mean().item()


def agreement(gramian: Tensor) -> float:
    """Returns the squared norm of the gradients' sum over the sum of their squared norms.

    0 if they cancel, 1 if they are orthogonal, T if they are equal.
    """
    return (gramian.sum() / gramian.trace()).item()
