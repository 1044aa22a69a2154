"""What the ways in have in common: checks, the decision how tasks count, policies, state put back on errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmtl.accumulate import accumulate
from fastmtl.losses import Losses
from fastmtl.rows import Rows, constant_mask
from fastmtl.sharded import copy_to_shard
from fastmtl.surgery.base import GradientMethod, Step
from fastmtl.surgery.row_method import TrackingMethod
from fastmtl.watch import tell
from fastmtl.weighting.base import LossWeighting

Method = GradientMethod | LossWeighting
NONFINITE = ("propagate", "skip", "drop_task", "raise")


def check_method(method: Any) -> None:
    """Refuse what is not a method.

    Raises:
        TypeError: ``method`` is neither a gradient method nor a loss weighting.
    """
    if not isinstance(method, GradientMethod | LossWeighting):
        if isinstance(method, type):
            raise TypeError(f"method: expected a fastmtl method, found the class; construct it: {method.__name__}()")
        raise TypeError(f"method: expected a fastmtl method such as fastmtl.PCGrad(), found {type(method).__name__}")


def check_nonfinite(nonfinite: str, scaler: Any) -> None:
    """Refuse unknown policies, and policies that would hide overflows from a scaler.

    Raises:
        ValueError: See above.
    """
    if nonfinite not in NONFINITE:
        raise ValueError(f"nonfinite: expected one of {NONFINITE}, found {nonfinite!r}")
    if nonfinite != "propagate" and scaler is not None:
        raise ValueError(f"nonfinite={nonfinite!r} would hide overflows from the scaler; use 'propagate' with scaler=")


def refuse_options(method: LossWeighting, **options: Any) -> None:
    """Refuse options that a loss weighting, which looks at no gradients, cannot honour.

    Raises:
        ValueError: One of them is given.
    """
    for name, value in options.items():
        if value is not None and (name, value) != ("nonfinite", "propagate"):
            raise ValueError(f"{name}: {type(method).__name__} is a loss weighting, which looks at no gradients")


def scale_of(scaler: Any, device: torch.device) -> Tensor | None:
    """The loss scale as a float32 scalar on ``device``, without a synchronisation; None without a scaler."""
    if scaler is None:
        return None
    if not callable(getattr(scaler, "scale", None)):
        raise TypeError(f"scaler: expected a torch.amp.GradScaler, found {type(scaler).__name__}")
    scale: Tensor = scaler.scale(torch.ones((), dtype=torch.float32, device=device))
    return scale


def unscaled(gramian: Tensor, scale: Tensor | None) -> Tensor:
    """The Gramian of the raw losses' gradients, from that of the scaled ones."""
    return gramian if scale is None else gramian / scale.double() ** 2


def task_mask(rows: Rows, losses: Losses | None) -> Tensor | None:
    """Which task reaches which group; a task without a loss is absent even if somebody left a gradient."""
    if losses is None or all(x is not None for x in losses.items):
        return rows.mask()
    present = [[r and x is not None for r, x in zip(g, losses.items, strict=True)] for g in rows.present()]
    return constant_mask(present, rows.device)


def drop_nonfinite(step: Step) -> tuple[Step, Tensor]:
    """Take the tasks whose gradient or loss is not finite out of the problem.

    Returns:
        The step without them, and the tasks that were kept, bool ``[T]``.
    """
    bad = (~step.gramian.diagonal(dim1=-2, dim2=-1).isfinite() & step.present).any(0)
    if step.losses is not None:
        bad = bad | (~step.losses.isfinite() & step.present.any(0))
    return Step(step.gramian, step.present & ~bad, step.losses), ~bad


@dataclass(frozen=True)
class Decision:
    """How the tasks count in this step.

    Attributes:
        weights: ``[K, T]`` float64.
        solved: bool ``[T]``: the tasks that took part; None: all.
        kept: bool ``[T]``: the tasks that ``nonfinite="drop_task"`` kept; None with another policy.
        skip: ``nonfinite="skip"`` applies: write nothing.
    """

    weights: Tensor
    solved: Tensor | None = None
    kept: Tensor | None = None
    skip: bool = False

    def for_heads(self, method: GradientMethod) -> Tensor | None:
        """The weights ``[1, T]`` of the gradients of parameters that are not shared; None: all count 1."""
        if not method.scale_heads and self.kept is None:
            return None
        weights = self.weights if method.scale_heads else torch.ones_like(self.weights[:1])
        if self.solved is not None:  # a head whose task misses the shared parameters goes on as it is
            weights = torch.where(self.solved, weights, 1.0)
        return weights if self.kept is None else torch.where(self.kept, weights, 0.0)


def decide(
    method: GradientMethod,
    gramian: Tensor,
    mask: Tensor | None,
    losses: Losses | None,
    names: Sequence[str],
    nonfinite: str = "propagate",
    max_norm: float | None = None,
) -> Decision:
    """Let the method weigh the tasks, under the policy for values that are not finite.

    Args:
        method: Its state advances, unless this raises or skips.
        gramian: ``[K, T, T]`` float64, of the raw losses' gradients.
        mask: bool ``[K, T]`` or None.
        losses: None where the caller has none.
        names: The tasks' names, for errors.
        nonfinite: See `fastmtl.backward`.
        max_norm: See `clip`.

    Raises:
        ValueError: The method needs losses that there are not, or scales heads and knows several groups.
        FloatingPointError: With ``nonfinite="raise"``.
    """
    if method.needs_losses and losses is None:
        raise ValueError(f"losses: {type(method).__name__} needs the values of the losses")
    if method.scale_heads and gramian.shape[0] != 1:
        raise ValueError(
            f"{type(method).__name__}: scale_heads needs one group, found {gramian.shape[0]}; drop groups="
        )
    if losses is not None and method.positional:
        method.remember(names)
    values = None
    if losses is not None and (method.needs_losses or nonfinite != "propagate"):
        values = losses.values().to(gramian.device)
        known = [x is not None for x in losses.items]
        if mask is None and not all(known):  # tracked gradients of absent tasks, of whose losses nothing is wanted
            values = torch.where(constant_mask([known], gramian.device)[0], values, 0.0)
    step, kept = under_policy(Step(gramian, mask, values), nonfinite, names)
    if step is None:
        return Decision(torch.zeros_like(gramian[..., 0]), skip=True)
    weights = method.weigh(step)
    tell(method, names, weights, gramian=gramian, mask=step.mask, losses=losses)
    solved = None if mask is None else mask.any(0)
    return Decision(weights if max_norm is None else clip(weights, gramian, max_norm), solved, kept)


def under_policy(step: Step, nonfinite: str, names: Sequence[str]) -> tuple[Step | None, Tensor | None]:
    """The step that the policy for values that are not finite leaves, None: skip it; and which tasks it kept.

    Raises:
        FloatingPointError: With ``nonfinite="raise"``.
    """
    if nonfinite == "drop_task":
        return drop_nonfinite(step)
    if nonfinite != "propagate" and not bool(step.finite):
        if nonfinite == "skip":
            return None, None
        ok = drop_nonfinite(step)[1].tolist()
        bad = ", ".join(name for name, fine in zip(names, ok, strict=True) if not fine)
        raise FloatingPointError(f"gradient or loss not finite: {bad}")
    return step, None


def clip(weights: Tensor, gramian: Tensor, max_norm: float) -> Tensor:
    """Scale the weights so that the combined gradient's norm is at most ``max_norm``.

    The squared norm is the sum over the groups of ``w^T M w``, whose rounding is relative to ``sum |w_i w_j M_ij|``:
    where the terms cancel below 1e-5 of that sum, that bound takes the norm's place, so the result may come out shorter
    than ``max_norm``, but longer by rounding only.
    """
    pairs = weights.unsqueeze(-1) * weights.unsqueeze(-2)
    terms = torch.where(pairs == 0, pairs, pairs * gramian)
    square = torch.maximum(terms.sum(), 1e-5 * terms.abs().sum())
    return weights * (max_norm / square.sqrt()).clamp(max=1.0)


@contextmanager
def restored_on_error(method: Method) -> Iterator[None]:
    """Put the method's state back if anything within raises, out of memory included."""
    before = [
        (module._buffers, name, buffer, buffer.clone())
        for module in method.modules()  # a method may wrap another
        for name, buffer in module._buffers.items()
        if buffer is not None and not (isinstance(module, TrackingMethod) and module.is_row(name))  # moved at the end
    ]
    attributes = [(vars(module), dict(vars(module))) for module in method.modules()]  # names of tasks, counts of steps
    try:
        yield
    except BaseException:
        for now, then in attributes:
            now.update(then)
        for buffers, name, buffer, value in before:
            buffers[name] = buffer.copy_(value)
        raise


@contextmanager
def weighed_losses(
    method: LossWeighting, losses: Losses | None, scale: Tensor | None = None, alone: bool = False
) -> Iterator[Tensor]:
    """Weigh the losses by a loss weighting, for the weights ``[T]`` to be used within.

    Afterwards the weighting's own parameters get their gradients, the same on all ranks; no hook runs: those of
    ``DistributedDataParallel`` would wait for the other parameters. If anything within raises, its state is as before.

    Args:
        method: Its state advances.
        losses: None where the caller has none.
        scale: The loss scale, for the gradients of the weighting's own parameters.
        alone: Ask no other rank: the losses are the averages already, or the caller wants this rank's.

    Raises:
        ValueError: There are no losses.
    """
    if losses is None:
        raise ValueError(f"losses: {type(method).__name__} needs the values of the losses")
    if method.training and not alone:
        method.meet(losses)  # before the state is noted: an error puts it back to the first rank's
    with restored_on_error(method):
        method.remember(losses.names)
        params = [p for p in method.parameters() if p.requires_grad]
        if alone:
            group, method.process_group = method.process_group, None
            try:
                total, weights = method.slopes(losses.items)
            finally:
                method.process_group = group
        else:
            total, weights = method.slopes(losses.items)
        tell(method, losses.names, weights.unsqueeze(0), losses=losses)
        yield weights
        if params:
            factor = None if scale is None else scale.to(total.dtype)
            grads = torch.autograd.grad(total, params, factor, allow_unused=True)
            stored = [p for p in method.parameters() if p.requires_grad]  # others, where FSDP2 had gathered them
            shards = [None if g is None else copy_to_shard(g, p) for g, p in zip(grads, stored, strict=True)]
            accumulate((stored, Rows.by_task([shards]), None))
