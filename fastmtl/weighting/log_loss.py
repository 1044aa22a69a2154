"""Sum of logarithms: scale-invariant."""

from __future__ import annotations

from torch import Tensor

from fastmtl.facts import Facts
from fastmtl.weighting.scalarization import Scalarization


class LogLoss(Scalarization):
    """Scale-invariant sum of the losses' logarithms; answers differences of magnitude.

    The scalar is ``sum_t log L_t``, so the weights are ``1 / L_t``: scaling a loss by a constant changes no gradient.
    The gradients are those of `GeometricMean` times ``n / GeometricMean``.

    Args:
        num_tasks: T.

    Raises:
        TypeError, ValueError: ``num_tasks`` is no whole number, or < 1.

    Note:
        Cost: O(T) on the device, one ordinary backward pass, no synchronisation; no state. Losses must be positive: at
        a loss of 0 or below the weights are NaN. A loss that goes to 0 gets all the weight there is: its weight is not
        bounded.

    Reference:
        The baseline "SI" of Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik, Fetaya, "Multi-Task Learning as a
        Bargaining Game", ICML 2022, section 5. No deviation.

    Example:
        >>> import torch, fastmtl
        >>> losses = torch.tensor([2., 8.], requires_grad=True)
        >>> fastmtl.LogLoss(num_tasks=2)(losses).backward()
        >>> losses.grad
        tensor([0.5000, 0.1250])
    """

    facts = Facts("magnitude", "Navon, ICML 2022 (SI)", needs="positive losses")

    def value(self, losses: Tensor, present: Tensor) -> Tensor:
        """See `Scalarization.value`."""
        return losses.log().sum()  # those of absent tasks are 1
