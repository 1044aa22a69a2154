"""Other libraries' interfaces over this one's kernels: whoever uses them changes an import."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.backward import backward
from fastmtl.checks import choice
from fastmtl.distributed import several
from fastmtl.losses import LossesLike
from fastmtl.result import Result
from fastmtl.surgery.base import GradientMethod, Step


class PCGradOptimizer:
    """``PCGrad`` of Pytorch-PCGrad: an optimizer with ``pc_backward``.

    Not the paper's PCGrad: `fastmtl.PCGrad` is. What that port does, and this class with it:

    - All parameters of the optimizer take part, heads included: their gradients count in the norms, and heads are
      scaled by the weights of their tasks.
    - Each task's gradient also meets itself (``include_self`` of `fastmtl.PCGrad`).
    - Parameters that all tasks reach get the mean of the projected gradients, all others the sum.
    - Parameters that no task reaches get a gradient of 0 (with momentum they move).
    - ``.grad`` is overwritten, not added to; of parameters that are not the optimizer's, it is added to.
    - The orders are drawn from Python's ``random``: the same seed gives the same orders as there.

    Where it differs:

    - ``reduction="sum"`` sums. There it takes the mean, whatever it is given, as an oversight.
    - Parameters that require no gradients are left alone. There they get a gradient of 0, so weight decay moves them.
    - An objective may be None: the task is absent. One that reaches no parameter of the optimizer counts as absent.
    - The dot products are of float64 sums, so that pairs with nearly orthogonal gradients may fall the other way.

    Args:
        optimizer: A ``torch.optim.Optimizer``.
        reduction: ``"mean"`` or ``"sum"`` of the projected gradients, on what all tasks reach.
        scaler: A ``torch.amp.GradScaler``; `pc_backward` then takes raw losses. (Not there. Losses that were scaled by
            hand work without it: the projections do not depend on the scale.)

    Raises:
        TypeError: Not an optimizer.
        ValueError: Another reduction.

    Note:
        Cost: as for `fastmtl.backward`. Not there: several ranks, whose orders would differ; `fastmtl.backward` does
        that.

    Reference:
        https://github.com/WeiChengTseng/Pytorch-PCGrad, ``pcgrad.py`` at e987ac6.

    Example:
        >>> import torch
        >>> from fastmtl.compat import PCGradOptimizer as PCGrad
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = PCGrad(torch.optim.SGD([x], lr=1.0))
        >>> optimizer.pc_backward([x[0] + x[1], -2 * x[0]]).weights
        tensor([2.0000, 1.5000], dtype=torch.float64)
        >>> x.grad
        tensor([-0.5000,  1.0000])
    """

    def __init__(self, optimizer: torch.optim.Optimizer, reduction: str = "mean", scaler: Any = None) -> None:
        if not callable(getattr(optimizer, "step", None)) or not hasattr(optimizer, "param_groups"):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, found {type(optimizer).__name__}")
        self._optimizer = optimizer
        self._method = _ByPort(choice("reduction", reduction, ("mean", "sum")))
        self._scaler = scaler

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that was given: for schedulers, checkpoints and a scaler's ``step``."""
        return self._optimizer

    def zero_grad(self) -> None:
        """Set the parameters' ``.grad`` to None."""
        self._optimizer.zero_grad(set_to_none=True)

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """The optimizer's step."""
        return self._optimizer.step(closure)  # type: ignore[arg-type]

    def pc_backward(self, objectives: LossesLike, retain_graph: bool = True) -> Result:
        """Fill ``.grad`` of the optimizer's parameters with the combined projected gradients.

        Args:
            objectives: One loss per task; see `fastmtl.backward`.
            retain_graph: Keep the graph afterwards, as there. False frees its memory.

        Returns:
            `Result`: ``grads`` in the optimizer's order of parameters; ``weights [T]`` of the sum, to be divided by T
            for ``reduction="mean"`` where all tasks reach; ``gramian [T, T]``.

        Raises:
            TypeError, ValueError: As for `fastmtl.backward`. The ``.grad`` are then as before.
            RuntimeError: There are several ranks.
        """
        if several("auto"):
            raise RuntimeError(
                "PCGradOptimizer: not over several ranks, whose orders would differ; use fastmtl.backward with "
                "fastmtl.PCGrad(reduction='mean', include_self=True)"
            )
        params = [p for group in self._optimizer.param_groups for p in group["params"]]
        trained = [p for p in params if p.requires_grad]
        before = [p.grad for p in params]
        self.zero_grad()
        try:
            out = backward(
                objectives,
                self._method,
                trained,
                groups="tensor",
                scaler=self._scaler,
                retain_graph=retain_graph,
            )
        except BaseException:
            for p, grad in zip(params, before, strict=True):
                p.grad = grad
            raise
        for p in trained:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        assert out.gramian is not None
        return Result(tuple(p.grad for p in params), self._method.weights, out.gramian.sum(0))


class _ByPort(GradientMethod):
    """One problem over all groups, whose weights are then divided where all tasks are present.

    The groups are the single parameters, since which of them all tasks reach is known after the backward passes only.
    """

    weights: Tensor

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.reduction = reduction

    def solve(self, step: Step) -> Tensor:
        """See `GradientMethod.solve`."""
        num_tasks = step.gramian.shape[-1]
        mask = step.mask
        whole = step.gramian.sum(0, keepdim=True)  # absent rows count as zeros
        tasks = None if mask is None else mask.any(0, keepdim=True)
        weights = ops.pcgrad(whole, tasks, _orders(num_tasks).to(whole.device), include_self=True)
        self.weights = weights[0]
        if self.reduction == "sum":
            return weights.expand(len(step.gramian), -1).contiguous()
        if mask is None or tasks is None:
            return (weights / num_tasks).expand(len(step.gramian), -1).contiguous()
        everybody = (mask | ~tasks).all(-1, keepdim=True)
        return torch.where(everybody, weights / tasks.sum(), weights)


def _orders(num_tasks: int) -> Tensor:
    """As the port has them: one list, shuffled again for each task."""
    order = list(range(num_tasks))
    orders = []
    for _ in range(num_tasks):
        random.shuffle(order)
        orders.append(list(order))
    return torch.tensor(orders)
