"""TorchJD: this library's gradient methods as its weightings and aggregators.

Whoever trains with ``torchjd.autojac`` or ``torchjd.autogram`` keeps that code and changes the aggregator. Not the
other way round: `fastmtl.backward` takes no weighting of TorchJD.
"""

from __future__ import annotations

from torch import Tensor
from torchjd.aggregation import WeightedAggregator, Weighting

from fastmtl import ops
from fastmtl.engine import check_method
from fastmtl.surgery.base import GradientMethod
from fastmtl.surgery.row_method import refuse_row_method


class FastmtlWeighting(Weighting):
    """A gradient method as a weighting of TorchJD: from a Gramian to weights.

    Goes wherever TorchJD takes a weighting of Gramians: ``GramianWeightedAggregator``, ``autogram.Engine``,
    ``jac_to_grad`` with ``optimize_gramian_computation=True``.

    Args:
        method: A gradient method. Its state is in this module's ``state_dict``.

    Raises:
        TypeError: Not a gradient method: loss weightings go around the losses.
        ValueError: A method that needs the values of the losses, or that scales heads, which TorchJD has no room for; a
            method for which the Gramian is not enough.

    Example:
        >>> import torch, fastmtl
        >>> from torchjd.aggregation import GramianWeightedAggregator
        >>> from fastmtl.integrations.torchjd import FastmtlWeighting
        >>> aggregator = GramianWeightedAggregator(FastmtlWeighting(fastmtl.PCGrad()))
        >>> aggregator(torch.tensor([[-4., 1., 1.], [6., 1., 1.]]))
        tensor([0.5848, 3.8012, 3.8012])
    """

    def __init__(self, method: GradientMethod) -> None:
        super().__init__()
        self.method = _checked(method)

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Weights ``[T]`` in the dtype of the Gramian ``[T, T]``."""
        wide = gramian.detach().double()
        weights: Tensor = self.method((wide + wide.mT) / 2)  # 16-bit products may be unsymmetric by more than rounding
        return weights.to(gramian.dtype)


class FastmtlAggregator(WeightedAggregator):
    """A gradient method as an aggregator of TorchJD, on this library's kernels: from a Jacobian to one gradient.

    The Gramian is summed in float64, which in ``GramianWeightedAggregator(FastmtlWeighting(method))`` has the
    precision of the Jacobian; the cost is two reads of the Jacobian.

    Args:
        method: As for `FastmtlWeighting`.

    Raises:
        TypeError, ValueError: As for `FastmtlWeighting`.

    Example:
        >>> import torch, fastmtl
        >>> from fastmtl.integrations.torchjd import FastmtlAggregator
        >>> FastmtlAggregator(fastmtl.MGDA())(torch.tensor([[1., 0.], [0., 2.]]))
        tensor([0.8000, 0.4000])
    """

    def __init__(self, method: GradientMethod) -> None:
        super().__init__(_OfJacobian(method))

    def forward(self, matrix: Tensor, /) -> Tensor:
        """The combined gradient ``[P]`` of a Jacobian ``[T, P]``."""
        matrix = matrix.detach()
        combined: Tensor = ops.combine(matrix, self.weighting(matrix))
        return combined


class _OfJacobian(Weighting):
    def __init__(self, method: GradientMethod) -> None:
        super().__init__()
        self.method = _checked(method)

    def forward(self, matrix: Tensor, /) -> Tensor:
        weights: Tensor = self.method(ops.gram(matrix.detach()))[0]
        return weights.to(matrix.dtype)


def _checked(method: GradientMethod) -> GradientMethod:
    check_method(method)
    name = type(method).__name__
    if not isinstance(method, GradientMethod):
        raise TypeError(f"method: expected a gradient method, found the loss weighting {name}: call it on the losses")
    refuse_row_method(method, "torchjd")
    if method.needs_losses:
        raise ValueError(f"{name}: needs the values of the losses, which TorchJD does not hand over")
    if method.scale_heads:
        raise ValueError(f"{name}: TorchJD does not scale heads; construct it with scale_heads=False")
    return method
