"""SoftAdapt: a softmax over the rates at which the losses change."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmtl.checks import flag, real, whole
from fastmtl.facts import Facts
from fastmtl.state import commit
from fastmtl.weighting.base import WeightedSum


class SoftAdapt(WeightedSum):
    """Weighs each task by the exponential of its loss's rate of change; answers differences of velocity.

    With ``s_t`` the change of ``L_t`` in the last step, the weights are ``softmax(beta s)``: what falls more slowly, or
    rises, weighs more. They are equal as long as a rate is unknown, and sum to 1.

    Args:
        num_tasks: T.
        beta: Larger: less equal weights; below 0: the losses that fall fastest weigh more. Paper: 0.1.
        normalized: Rates are divided by the sum of their absolute values (the paper's "normalized" variant), so that
            units do not matter. The authors' package divides by the plain sum, which may vanish or change its sign.
        loss_weighted: The exponentials are multiplied by the losses' means over what is kept (the paper's "loss
            weighted" variant). May be combined with ``normalized``.
        order: Accuracy of the backward difference that gives the rates: the last ``order + 1`` losses are kept. 1
            (paper): ``L(i) - L(i - 1)``. The authors' package takes 4 when it is given 5 losses.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: An option out of range.

    Note:
        Cost: O(T order) on the device, one ordinary backward pass, no synchronisation. State: the last ``order + 1``
        losses of each task, not counting batches without it; it moves as `WeightedSum` says. This step's losses count.
        Losses of single batches are noisy; the authors' package suggests means, of an epoch for instance.

    Reference:
        Heydari, Thompson, Mehmood, "SoftAdapt: Techniques for Adaptive Loss Weighting of Neural Networks with
        Multi-Part Loss Functions", 2019 (arXiv 1912.12355), section 3.1. Deviation: weights change in every step, while
        the authors' package is called at intervals.

    Example:
        >>> import torch, fastmtl
        >>> weighting = fastmtl.SoftAdapt(num_tasks=2, beta=1.)
        >>> for losses in ([3., 4.], [1., 3.]):
        ...     _ = weighting(torch.tensor(losses))
        >>> weighting.weights  # softmax of -2 and -1
        tensor([0.2689, 0.7311], dtype=torch.float64)
    """

    facts = Facts("velocity", "Heydari, 2019", sums_to="1", state="2 T")
    history: Tensor

    def __init__(
        self,
        num_tasks: int,
        beta: float = 0.1,
        normalized: bool = False,
        loss_weighted: bool = False,
        order: int = 1,
    ) -> None:
        super().__init__(num_tasks)
        self.beta, self.order = real("beta", beta), whole("order", order, 1, 8)
        self.normalized = flag("normalized", normalized)
        self.loss_weighted = flag("loss_weighted", loss_weighted)
        self.register_state("history", (self.order + 1, self.num_tasks), float("nan"))  # oldest first

    def weigh(self, losses: Tensor, moves: Tensor) -> Tensor:
        """See `WeightedSum.weigh`."""
        present = ~losses.isnan()
        history = torch.where(present, torch.cat([self.history[1:], losses.unsqueeze(0)]), self.history)
        commit(self.history, history, moves)
        rates = sum(c * row for c, row in zip(backward_difference(self.order), history.flip(0).unbind(0), strict=True))
        assert isinstance(rates, Tensor)
        rates = torch.where(present & rates.isfinite(), rates, 0.0)
        if self.normalized:
            size = rates.abs().sum()
            rates = torch.where(size > 0, rates / size, 0.0)
        weights = torch.softmax(torch.where(present, self.beta * rates, -float("inf")), 0)
        if self.loss_weighted:
            weights = torch.where(present, weights * history.nanmean(0), 0.0)
            weights = weights / weights.sum()
        return weights


def backward_difference(order: int) -> list[float]:
    """Coefficients of the newest, the one before, ... value in a first derivative that is exact for polynomials."""
    first = sum(1 / k for k in range(1, order + 1))
    return [first, *((-1) ** k * math.comb(order, k) / k for k in range(1, order + 1))]
