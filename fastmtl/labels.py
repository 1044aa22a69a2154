"""Losses of batches in which a sample is labelled for some of the tasks only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.losses import numbered

PerTask = Sequence[Tensor] | Mapping[str, Tensor] | Tensor
"""T tensors ``[B, ...]``: a sequence, a mapping from task name, or one tensor ``[B, T]``, a column per task."""
Masks = Sequence[Tensor | None] | Mapping[str, Tensor | None] | Tensor
Criterion = Callable[[Tensor, Tensor], Tensor]
"""From predictions and targets to losses that are not reduced over the samples (``reduction="none"``)."""


def labelled_losses(
    criterion: Criterion | Sequence[Criterion] | Mapping[str, Criterion],
    predictions: PerTask,
    targets: PerTask,
    labelled: Masks | None = None,
    *,
    ignore_index: int = -100,
) -> dict[str, Tensor | None] | list[Tensor | None]:
    """Each task's mean loss over the samples labelled for it; None, which is absent and not zero, where there are none.

    What is returned goes into every way in as it is: `fastmtl.backward`, `FeatureSurgery.total`, a loss weighting. The
    mean over a task's own labels is the loss that a net trained on this task alone would see: its size does not depend
    on how many samples of the batch are labelled. (A mean over the whole batch would shrink with the share of labels,
    and methods that compare losses or gradient norms would take rare labels for a small loss.) All batches count alike,
    so a task with few labels per batch has a noisy gradient; larger batches help.

    Keep the heads' predictions apart: one tensor ``[B, T]`` carries gradients of 0 from each loss to all heads, so that
    the ``.grad`` of an absent task's head becomes 0 in place of None, and heads count as reached by all tasks.

    A missing entry cannot do harm, whatever lies there: its prediction and its target are 0 for the criterion, its
    gradient is exactly 0 even where the criterion's derivative is NaN or infinite.

    Args:
        criterion: From ``(prediction, target)`` to losses not reduced over the samples, ``[B]`` or ``[B, ...]``:
            ``torch.nn.MSELoss(reduction="none")``, say; or one per task. Called for tasks that are present.
        predictions: T tensors ``[B, ...]``: a sequence, a mapping from task name, or one tensor ``[B, T]``, a column
            per task.
        targets: Likewise, by the same names. With more than one entry per sample (pixels), channels or classes are in
            dimension 1, as in torch's losses, or last.
        labelled: Likewise, bool: per sample ``[B]`` or per entry (of dense targets ``[B, H, W]``, say); it alone then
            decides. None, for all tasks or for one: an entry is missing where its target is NaN, or ``ignore_index``
            if it is an integer.
        ignore_index: Marks missing class indices; as in ``torch.nn.functional.cross_entropy``.

    Returns:
        A dict if ``predictions`` is a mapping, else a list: scalars in the criterion's dtype, at least float32, or
        None. A batch without any label gives None for all tasks, which the ways in refuse: leave it out.

    Raises:
        TypeError: Something is not a tensor or not callable.
        ValueError: Names, numbers of tasks, samples or shapes that do not fit, masks that are not bool, a criterion
            that reduces over the samples. The text names the task.

    Note:
        Cost: at most one host synchronisation, for all tasks together, to learn which are absent; none where masks (or
        targets, if they decide) lie on the CPU. In graphs of torch.compile it is a graph break. A task that is labelled
        throughout is not copied.

    Example:
        >>> import torch, fastmtl
        >>> predictions = torch.tensor([[1., 2., 3.], [4., 5., 6.]], requires_grad=True)
        >>> targets = torch.tensor([[0., float("nan"), float("nan")], [2., 2., float("nan")]])
        >>> losses = fastmtl.labelled_losses(torch.nn.MSELoss(reduction="none"), predictions, targets)
        >>> losses
        [tensor(2.5000, grad_fn=<DivBackward0>), tensor(9., grad_fn=<DivBackward0>), None]
        >>> (losses[0] + losses[1]).backward()
        >>> predictions.grad
        tensor([[1., 0., 0.],
                [2., 6., 0.]])
    """
    names = list(predictions) if isinstance(predictions, Mapping) else None
    inputs = _per_task("predictions", predictions, names)
    labels = names if names is not None else list(numbered(len(inputs)))
    aims = _per_task("targets", targets, names, len(inputs))
    criteria = _criteria(criterion, names, len(inputs))
    given = [None] * len(inputs) if labelled is None else _per_task("labelled", labelled, names, len(inputs))
    masks = [
        _mask(name, x, y, mask, ignore_index) for name, x, y, mask in zip(labels, inputs, aims, given, strict=True)
    ]
    losses: list[Tensor | None] = [
        None if count == 0 else _mean(name, criterion, x, y, mask, count)
        for name, criterion, x, y, mask, count in zip(
            labels, criteria, inputs, aims, masks, _counts(masks), strict=True
        )
    ]
    return losses if names is None else dict(zip(names, losses, strict=True))


def _per_task(argument: str, values: Any, names: list[str] | None, num_tasks: int | None = None) -> list[Any]:
    """One entry per task, in the order of ``names``."""
    if isinstance(values, Mapping):
        if names is None:
            raise TypeError(f"{argument}: expected no mapping, since the predictions are none")
        if set(values) != set(names):
            raise ValueError(
                f"{argument}: expected the tasks {', '.join(map(str, names))}, found {', '.join(map(str, values))}"
            )
        found = [values[name] for name in names]
    elif isinstance(values, Tensor):
        if values.dim() != 2:
            raise ValueError(f"{argument}: expected one tensor [B, T], or T tensors, found shape {list(values.shape)}")
        found = list(values.unbind(1))
    elif isinstance(values, Sequence) and not isinstance(values, str):
        found = list(values)
    else:
        raise TypeError(f"{argument}: expected tensors by task or one tensor [B, T], found {type(values).__name__}")
    if not found or (num_tasks is not None and len(found) != num_tasks):
        raise ValueError(f"{argument}: expected {num_tasks or 'at least 1'} tasks, found {len(found)}")
    return found


def _criteria(criterion: Any, names: list[str] | None, num_tasks: int) -> list[Criterion]:
    if isinstance(criterion, nn.ModuleDict):
        criterion = dict(criterion.items())
    if isinstance(criterion, nn.ModuleList):
        criterion = list(criterion)
    if isinstance(criterion, Mapping | Sequence) and not isinstance(criterion, str):
        criteria = _per_task("criterion", criterion, names, num_tasks)
    else:
        criteria = [criterion] * num_tasks
    for c in criteria:
        if not callable(c):
            raise TypeError(f"criterion: expected a callable, or one per task, found {type(c).__name__}")
    return criteria


def _mask(name: str, prediction: Any, target: Any, labelled: Any, ignore_index: int) -> Tensor:
    """Which entries are there, bool ``[B]`` or ``[B, ...]``."""
    for argument, x in (("predictions", prediction), ("targets", target)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{argument} of {name}: expected a tensor, found {type(x).__name__}")
        if x.dim() == 0:
            raise ValueError(f"{argument} of {name}: expected shape [B, ...], found a scalar")
    if len(prediction) != len(target):
        raise ValueError(f"targets of {name}: expected {len(prediction)} samples as predicted, found {len(target)}")
    if labelled is None:
        return ~target.isnan() if target.is_floating_point() else target != ignore_index
    if not isinstance(labelled, Tensor):
        raise TypeError(f"labelled of {name}: expected a tensor, found {type(labelled).__name__}")
    if labelled.dtype != torch.bool:
        raise ValueError(f"labelled of {name}: expected bool, found {labelled.dtype}")
    return labelled


def _counts(masks: Sequence[Tensor]) -> list[int]:
    """The number of entries of each task; waits for each device once."""
    counts = [0] * len(masks)
    for device in {mask.device for mask in masks}:
        tasks = [t for t, mask in enumerate(masks) if mask.device == device]
        for t, count in zip(tasks, torch.stack([masks[t].sum() for t in tasks]).tolist(), strict=True):
            counts[t] = count
    return counts


def _mean(name: str, criterion: Criterion, prediction: Tensor, target: Tensor, mask: Tensor, count: int) -> Tensor:
    partial = count < mask.numel()
    mask = mask.to(prediction.device, non_blocking=True)
    classes = target.dim() < prediction.dim()  # indices, whose scores are in dimension 1
    inputs = [
        x.masked_fill(~_fit(name, mask, x, argument, classes), 0) if partial else x
        for argument, x in (("predictions", prediction), ("targets", target))
    ]
    losses = criterion(*inputs)
    if not isinstance(losses, Tensor):
        raise TypeError(f"criterion of {name}: expected a tensor of losses, found {type(losses).__name__}")
    shapes = target.shape[: losses.dim()], target.shape[:1] + target.shape[2:]
    if losses.dim() == 0 or losses.shape not in shapes:
        raise ValueError(
            f"criterion of {name}: expected one loss per sample or entry, found shape {list(losses.shape)} from "
            f"predictions {list(prediction.shape)} and targets {list(target.shape)}; use reduction='none'"
        )
    there = _fit(name, mask, losses, "losses", classes)
    total = (losses.masked_fill(~there, 0) if partial else losses).sum(
        dtype=torch.promote_types(losses.dtype, torch.float32)
    )
    return total / (count * losses.numel() // mask.numel())


def _fit(name: str, mask: Tensor, x: Tensor, argument: str, classes: bool) -> Tensor:
    """The mask, broadcast over what ``x`` has more: channels in dimension 1, or trailing dimensions."""
    first = x.dim() > 1 and x.shape[:1] + x.shape[2:] == mask.shape
    last = x.shape[: mask.dim()] == mask.shape
    if first and last and 1 < mask.dim() < x.dim() and not classes:
        raise ValueError(
            f"labelled of {name}: shape {list(mask.shape)} may leave out dimension 1 or the last one of the "
            f"{argument} {list(x.shape)}; pass a bool per entry"
        )
    if first and (classes or not last):
        return mask.unsqueeze(1)
    if last:
        return mask.reshape(mask.shape + (1,) * (x.dim() - mask.dim()))
    raise ValueError(
        f"labelled of {name}: expected a bool per sample or per entry of the {argument} {list(x.shape)}, found shape "
        f"{list(mask.shape)} (that of the targets if not given)"
    )
