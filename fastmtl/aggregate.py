"""For those who already hold per-task gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.engine import Method, check_method, restored_on_error, task_mask, weighed_losses
from fastmtl.losses import LossesLike, numbered, parse_losses
from fastmtl.operate import operate
from fastmtl.result import Result
from fastmtl.rows import Gradients, as_rows
from fastmtl.weighting.base import LossWeighting


def aggregate(
    grads: Gradients,
    method: Method,
    *,
    groups: Sequence[int] | None = None,
    losses: LossesLike | None = None,
    precision: str = "full",
) -> Result:
    """Combine per-task gradients by a method.

    Args:
        grads: A Jacobian ``[T, P]``; or one stacked ``[T, *shape]`` tensor per parameter; or T tensors or None (the
            task does not reach it) per parameter, which may be sparse COO tensors of one sparse dimension. float32,
            float64, bfloat16 or float16, on one device.
        method: A gradient method; or a loss weighting, together with ``losses``.
        groups: Per parameter the index of its group, 0..K-1; None: one group.
        losses: Loss values, for methods that need them.
        precision: ``"full"`` or ``"fast"``, of the Gramian; see `fastmtl.ops.gram`.

    Returns:
        `Result`: ``grads`` is ``[P]`` for a Jacobian, else a list with one tensor per parameter (None where no task
        reaches it; sparse and coalesced where all its rows are sparse); ``weights`` and ``gramian`` as there.

    Raises:
        TypeError: ``grads`` or ``method`` is of the wrong type; a sparse tensor of another layout.
        ValueError: Shapes that do not fit, losses that are missing or of another number.

    Note:
        Cost: two reads of the gradients and one write of P; the gradients are not written. No host synchronisation,
        unless there are sparse gradients, which are first copied; see `fastmtl.sparse`.

    Example:
        >>> import torch, fastmtl
        >>> fastmtl.aggregate(torch.tensor([[1., 0.], [0., 2.]]), fastmtl.MGDA()).grads
        tensor([0.8000, 0.4000])
    """
    check_method(method)
    rows = as_rows(grads, groups)
    parsed = None if losses is None else parse_losses(losses, differentiable=False)
    if parsed is not None and len(parsed) != rows.num_tasks:
        raise ValueError(f"losses: expected {rows.num_tasks} tasks, found {len(parsed)}")
    weights: Tensor | None
    gramian: Tensor | None = None
    if isinstance(method, LossWeighting):
        with weighed_losses(method, parsed) as found, torch.no_grad():
            weights = found.to(rows.device).expand(rows.num_groups, -1)
            combined = ops.combine(rows, weights)
    else:
        names = parsed.names if parsed is not None else numbered(rows.num_tasks)
        with torch.no_grad(), restored_on_error(method):
            outcome = operate(method, rows, task_mask(rows, parsed), parsed, names, precision=precision)
            weights, gramian, combined = outcome.weights, outcome.gramian, outcome.take()
    out = combined[0] if isinstance(grads, Tensor) else combined
    return Result.of(out, weights, gramian, grouped=groups is not None)
