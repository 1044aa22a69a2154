"""Accelerate: `fastmtl.backward` in place of ``accelerator.backward``."""

from __future__ import annotations

from typing import Any

import accelerate

from fastmtl.backward import backward as fastmtl_backward
from fastmtl.engine import Method
from fastmtl.integrations.scale import LossScale
from fastmtl.losses import LossesLike
from fastmtl.parameters import ParamsLike
from fastmtl.result import Result


def backward(
    accelerator: accelerate.Accelerator,
    losses: LossesLike,
    method: Method,
    shared_params: ParamsLike | None = None,
    **options: Any,
) -> Result:
    """`fastmtl.backward`, with the accelerator's scaler and its ``gradient_accumulation_steps``.

    All else is as with ``accelerator.backward``: ``accelerator.autocast``, ``accumulate``, ``clip_grad_norm_``, the
    prepared optimizer. Models that ``DistributedDataParallel`` wraps: as for `fastmtl.backward`.

    Args:
        accelerator: Whose optimizer will step.
        losses: Raw: neither scaled nor divided by the number of micro-batches.
        method: See `fastmtl.backward`.
        shared_params: See `fastmtl.backward`.
        options: Of `fastmtl.backward`, but for ``scaler``.

    Returns:
        `Result`, as of `fastmtl.backward`.

    Raises:
        TypeError: ``scaler`` is given.
        RuntimeError: DeepSpeed, Megatron, FSDP, or another engine that takes its own backward pass.

    Note:
        Within ``accumulate`` each micro-batch is a problem of its own, and ``.grad`` the mean of the results; and each
        is averaged over the ranks, in ``no_sync`` too. `fastmtl.TaskGradients` with ``scaler=accelerator.scaler`` does
        surgery of the whole batch: pass it ``loss / accelerator.gradient_accumulation_steps``, and call ``combine``
        where ``accelerator.sync_gradients``.

    Example:
        >>> import accelerate, fastmtl, torch
        >>> from fastmtl.integrations.accelerate import backward
        >>> accelerator = accelerate.Accelerator(cpu=True)
        >>> x = torch.nn.Parameter(torch.tensor([1., 1.]))
        >>> backward(accelerator, [x[0], 2 * x[1]], fastmtl.MGDA(), [x]).weights
        tensor([0.8000, 0.2000], dtype=torch.float64)
    """
    check_engine(accelerator)
    if "scaler" in options:
        raise TypeError("scaler: the accelerator has it already; leave it out")
    options |= LossScale.options(accelerator.scaler, accelerator.gradient_accumulation_steps)
    return fastmtl_backward(losses, method, shared_params, **options)


def check_engine(accelerator: accelerate.Accelerator) -> None:
    """Refuse what takes its own backward pass.

    Raises:
        RuntimeError: See `backward`.
    """
    kind = accelerator.distributed_type
    if kind != accelerate.DistributedType.NO and not kind.value.startswith("MULTI_"):
        raise RuntimeError(
            f"{kind.value}: takes its own backward pass; fastmtl.backward knows one process and DistributedDataParallel"
        )
