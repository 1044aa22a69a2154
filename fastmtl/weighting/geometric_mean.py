"""Geometric mean: what counts is by which factor a loss falls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.checks import whole
from fastmtl.facts import Facts
from fastmtl.weighting.scalarization import Scalarization


class GeometricMean(Scalarization):
    """Geometric Loss Strategy (GLS): the geometric mean of the losses; answers differences of magnitude.

    The scalar is ``(prod_t L_t)^(1/n)`` over the n present tasks, so the weights are ``scalar / (n L_t)``: scaling a
    loss by a constant leaves the balance of the tasks alone.

    Args:
        num_tasks: T.
        focus: Indices of tasks to be favoured: the scalar is multiplied by their own geometric mean (the paper's
            focused loss strategy).

    Raises:
        TypeError: An option of the wrong type.
        ValueError: ``num_tasks`` < 1; an index out of range, or twice.

    Note:
        Cost: O(T) on the device, one ordinary backward pass, no synchronisation; no state. Losses must be positive: at
        a loss of 0 or below the weights are NaN, as looking for one would stall the device.

    Reference:
        Chennupati, Sistu, Yogamani, Rawashdeh, "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss
        Strategy for Multi-Task Learning", CVPR workshops 2019, section 3. No deviation.

    Example:
        >>> import torch, fastmtl
        >>> losses = torch.tensor([2., 8.], requires_grad=True)
        >>> total = fastmtl.GeometricMean(num_tasks=2)(losses)
        >>> total.backward()
        >>> total.item(), losses.grad
        (4.0, tensor([1.0000, 0.2500]))
    """

    facts = Facts("magnitude", "Chennupati, CVPRW 2019", needs="positive losses")
    share: Tensor

    def __init__(self, num_tasks: int, focus: Sequence[int] = ()) -> None:
        super().__init__(num_tasks)
        if isinstance(focus, str) or not isinstance(focus, Sequence):
            raise TypeError(f"focus: expected indices of tasks, found {focus!r}")
        self.focus = tuple(whole("focus", t, 0, self.num_tasks - 1) for t in focus)
        if len(set(self.focus)) < len(self.focus):
            raise ValueError(f"focus: expected each task once, found {focus}")
        self.register_option("share", "focus", [float(t in self.focus) for t in range(self.num_tasks)])

    def value(self, losses: Tensor, present: Tensor) -> Tensor:
        """See `Scalarization.value`."""
        logs = losses.log()
        mean = torch.where(present, logs, 0.0).sum() / present.sum()
        if self.focus:
            share = torch.where(present, self.share, 0.0)
            mean = mean + (share * logs).sum() / share.sum().clamp(min=1)
        return mean.exp()
