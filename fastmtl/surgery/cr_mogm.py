"""CRMOGM: the moving average of a method's weights in place of the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.checks import real
from fastmtl.surgery.amortized import Amortized
from fastmtl.surgery.base import GradientMethod, Step
from fastmtl.surgery.row_method import refuse_row_method


class CRMOGM(GradientMethod):
    """Smooths the weights of ``method`` over the steps: ``alpha`` of what they were, ``1 - alpha`` of this step's.

    Weights that a method takes from the gradients of one batch depend on their noise, and so the direction has a bias
    that more steps do not remove; the average's noise is less. What a method promises of its own weights (that nobody
    is opposed, say) holds for the average only in so far as the problem stands still.

    Args:
        method: A gradient method. Its own state moves as ever.
        alpha: 0 (the method alone) to 1 (the first weights for good). An attribute, which may be set between steps: the
            paper lets it grow to 1 as the learning rate falls, as by ``1 - lr / initial_lr``.

    Raises:
        TypeError: ``method`` is not a gradient method, or wraps weights itself (`Amortized` goes outside:
            ``Amortized(CRMOGM(...))``); ``alpha`` is not a number.
        ValueError: ``alpha`` out of range, at the step if it was set later; a method on the gradients themselves.

    Note:
        Cost: the method's, and a few operations on T numbers per group. No synchronisation beyond the method's. State:
        T weights per group; it moves in training mode and on finite steps only. A task's first weight is the method's.
        A task absent from a step has weight 0 there, and goes on from what it had: where tasks are absent in turn,
        the weights need not sum to what the method's do. No randomness of its own. Methods on the gradients themselves
        are refused: the elementwise ones have no weights, and those that track gradients smooth these instead.

    Reference:
        Zhou, Zhang, Jiang, Zhong, Gu, Zhu, "On the Convergence of Stochastic Multi-Objective Gradient Manipulation and
        Beyond", NeurIPS 2022: CR-MOGM. Deviation: the average starts at the first step's weights, where the paper
        leaves the start open; ``alpha`` = 0.9 is a usual value, not the paper's.

    Example:
        >>> import torch, fastmtl
        >>> method = fastmtl.CRMOGM(fastmtl.MGDA(), alpha=0.75)
        >>> method(torch.diag(torch.tensor([1., 4.])))
        tensor([0.8000, 0.2000], dtype=torch.float64)
        >>> method(torch.diag(torch.tensor([4., 1.])))
        tensor([0.6500, 0.3500], dtype=torch.float64)
    """

    positional = True
    weights: Tensor

    def __init__(self, method: GradientMethod, alpha: float = 0.9) -> None:
        super().__init__()
        if not isinstance(method, GradientMethod):
            hint = f"; construct it: {method.__name__}()" if isinstance(method, type) else ""
            raise TypeError(f"method: expected a gradient method such as fastmtl.MGDA(), found {method!r}{hint}")
        if isinstance(method, Amortized | CRMOGM):
            raise TypeError(f"method: {type(method).__name__} wraps weights itself, found {method!r}")
        refuse_row_method(method, "method")
        self.method = method
        self.alpha = real("alpha", alpha, 0, 1)
        self.needs_losses, self.scale_heads = method.needs_losses, method.scale_heads
        self.single_group, self.several_batches = method.single_group, method.several_batches
        self.register_state("weights")

    def solve(self, step: Step) -> Tensor:
        """See `GradientMethod.solve`."""
        alpha = real("alpha", self.alpha, 0, 1)
        held = self.state("weights", step.gramian, tuple(step.gramian.shape[:2]), float("nan"))
        found = self.method.weigh(step)
        average = torch.where(held.isnan(), found, alpha * held + (1 - alpha) * found)
        step.commit(held, torch.where(step.present, average, held))
        return torch.where(step.present | found.isnan(), average, 0.0)

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        return f"alpha={self.alpha}"
