"""From rows to ``.grad``: what the ways in have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastmtl import ops, sparse
from fastmtl.losses import Losses
from fastmtl.rows import Rows, constant_mask
from fastmtl.sharded import shards_written
from fastmtl.surgery.base import GradientMethod, Step
from fastmtl.surgery.row_method import ElementwiseMethod, RawRows, TrackingMethod, separate
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
    step, kept = _under_policy(Step(gramian, mask, values), nonfinite, names)
    if step is None:
        return Decision(torch.zeros_like(gramian[..., 0]), skip=True)
    weights = method.weigh(step)
    tell(method, names, weights, gramian=gramian, mask=step.mask, losses=losses)
    solved = None if mask is None else mask.any(0)
    return Decision(weights if max_norm is None else clip(weights, gramian, max_norm), solved, kept)


def _under_policy(step: Step, nonfinite: str, names: Sequence[str]) -> tuple[Step | None, Tensor | None]:
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


@dataclass(frozen=True)
class Outcome:
    """What surgery on the rows of one step comes to, before anything is written.

    Attributes:
        weights: ``[K, T]`` float64; None: an elementwise method.
        gramian: ``[K, T, T]`` float64, of what was weighed; None: an elementwise method that needed none.
        heads: The weights ``[1, T]`` of the gradients of parameters that are not shared; None: all count 1.
        skip: ``nonfinite="skip"`` applies: write nothing.
        rows: What is to be combined, by ``factors [K, T]``. An elementwise method's outcome is rows of one task, which
            nothing else has; factors None: 1.
    """

    weights: Tensor | None
    gramian: Tensor | None
    heads: Tensor | None
    skip: bool
    rows: Rows
    factors: Tensor | None
    _move: Callable[[], None] = lambda: None

    def fill(self, shared: Sequence[Tensor], heads: Sequence[Tensor] = (), rest: Rows | None = None) -> None:
        """Add to ``.grad``; then move the state that was held back until here.

        Args:
            shared: The parameters of the rows.
            heads: The parameters that are not shared.
            rest: Their rows.

        Raises:
            TypeError: As `accumulate`.
        """
        if self.skip:
            return
        jobs = [] if rest is None else [(heads, rest, self.heads)]
        if self.factors is None:
            accumulate(*jobs, own=(shared, self.combined()))
        else:
            accumulate((shared, self.rows, self.factors), *jobs)
        self._move()

    def take(self) -> list[Tensor | None]:
        """The combined gradients, for who has no ``.grad`` to fill; moves the state as `fill`."""
        combined = self.combined()
        self._move()
        return combined

    def combined(self) -> list[Tensor | None]:
        """The combined gradients."""
        if self.factors is None:
            return [None if g is None else self.rows.unpack(p, g) for p, g in enumerate(self.rows.grads)]
        combined: list[Tensor | None] = ops.combine(self.rows, self.factors)
        return combined


def operate(
    method: GradientMethod,
    rows: Rows,
    mask: Tensor | None,
    losses: Losses | None,
    names: Sequence[str],
    scale: Tensor | None = None,
    nonfinite: str = "propagate",
    max_norm: float | None = None,
    precision: str = "full",
    widen: bool = False,
) -> Outcome:
    """Gramian, weights, and what they multiply; or whatever a `RowMethod` has in their place.

    Args:
        method: Its state advances, but for what it keeps per element, which waits for `Outcome.fill`.
        rows: The per-task gradients, of losses multiplied by ``scale``.
        mask: As for `decide`.
        losses: As for `decide`.
        names: As for `decide`.
        scale: See `scale_of`.
        nonfinite: See `fastmtl.backward`.
        max_norm: See `clip`.
        precision: Of the Gramian; see `fastmtl.ops.gram`.
        widen: 16-bit rows are for wider parameters.

    Raises:
        ValueError, FloatingPointError: As `decide`.
    """
    if isinstance(method, ElementwiseMethod):
        return _merge(method, rows, mask, losses, names, scale, nonfinite, max_norm, widen)
    if isinstance(method, TrackingMethod):
        return _track(method, rows, mask, losses, names, scale, nonfinite, max_norm, precision)
    gramian = unscaled(ops.gram(rows, precision=precision), scale)
    decision = decide(method, gramian, mask, losses, names, nonfinite, max_norm)
    return Outcome(decision.weights, gramian, decision.for_heads(method), decision.skip, rows, decision.weights)


def _track(
    method: TrackingMethod,
    rows: Rows,
    mask: Tensor | None,
    losses: Losses | None,
    names: Sequence[str],
    scale: Tensor | None,
    nonfinite: str,
    max_norm: float | None,
    precision: str,
) -> Outcome:
    """`operate` on the gradients that the method makes of those of this step."""
    values = None
    if method.needs_losses:
        if losses is None:
            raise ValueError(f"losses: {type(method).__name__} needs the values of the losses")
        values = losses.values().to(rows.device)
    absent = [False] * rows.num_tasks if losses is None else [x is None for x in losses.items]
    with torch.no_grad():
        tracked = method.track(RawRows(separate(rows, absent), mask, values, scale))
    gramian = ops.gram(tracked.rows, precision=precision)
    gramian = unscaled(gramian, scale) if tracked.scaled else gramian
    decision = decide(method, gramian, mask, losses, names, nonfinite, max_norm)
    weights, heads, moves = decision.weights, decision.for_heads(method), decision.kept
    if tracked.heads is not None:
        heads = tracked.heads.unsqueeze(0)
        heads = heads if moves is None else torch.where(moves, heads, 0.0)
    if moves is None:
        moves = Step(gramian, mask, values).finite.expand(rows.num_tasks)
    factors = weights if tracked.scaled or scale is None else weights * scale
    move = partial(method.store, tracked, moves)
    return Outcome(weights, gramian, heads, decision.skip, tracked.rows, factors, move)


def _merge(
    method: ElementwiseMethod,
    rows: Rows,
    mask: Tensor | None,
    losses: Losses | None,
    names: Sequence[str],
    scale: Tensor | None,
    nonfinite: str,
    max_norm: float | None,
    widen: bool,
) -> Outcome:
    """`operate` by an elementwise method, without a Gramian unless the policy asks for it."""
    if losses is not None and method.positional:
        method.remember(names)
    gramian, kept = None, None
    ones = torch.ones(rows.num_groups, rows.num_tasks, dtype=torch.float64, device=rows.device)
    if nonfinite != "propagate":
        gramian = unscaled(ops.gram(rows), scale)
        values = None if losses is None else losses.values().to(rows.device)
        step, kept = _under_policy(Step(gramian, mask, values), nonfinite, names)
        if step is None:
            return Outcome(None, gramian, None, True, rows, None)
        mask = step.mask
    with torch.no_grad():
        taking_part = ones if mask is None else mask.double()
        merged = method.merge(rows, taking_part, widen)
        outcome = replace(Rows.by_task([merged]), num_groups=1)
        factors = None
        moves = method.has_state and method.training
        if max_norm is not None or moves:
            square = unscaled(ops.gram(outcome), scale)
            if moves:
                method.advance(square.isfinite().all())
            if max_norm is not None:
                factors = clip(torch.ones_like(square[0]), square, max_norm)
    heads = None if kept is None else kept.double().unsqueeze(0)
    return Outcome(None, gramian, heads, False, outcome, factors)


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

    Afterwards the weighting's own parameters get their gradients. If anything within raises, its state is as before.

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
    with restored_on_error(method):
        method.remember(losses.names)
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
        if total.requires_grad:
            total.backward(None if scale is None else scale.to(total.dtype))


def accumulate(
    *jobs: tuple[Sequence[Tensor], Rows, Tensor | None],
    own: tuple[Sequence[Tensor], Sequence[Tensor | None]] = ((), ()),
) -> None:
    """Add weighted rows to parameters' ``.grad``, as ``loss.backward()`` would.

    A parameter that no task reaches is left alone. Nothing is written if anything raises. Sparse rows give a sparse,
    coalesced ``.grad``, unless there is a dense one to be added to. Rows may be narrower than their parameter. Those of
    a sharded parameter are of this rank's shard; its ``.grad`` is sharded as the parameter is.

    Args:
        jobs: Parameters, their rows, and the rows' weights ``[K, T]``; None: all count 1.
        own: Parameters, and ready gradients that nothing else holds.

    Raises:
        TypeError: A ``.grad`` to be added to is not supported; see `refuse_unsupported`.
    """
    in_place: list[tuple[Rows, Tensor, list[Tensor]]] = []  # rows, their weights, and the dense .grad that there are
    added: list[tuple[Tensor, Tensor]] = []  # a dense .grad that there is, and what is added to it
    new: list[tuple[Tensor, Tensor]] = []  # a parameter, and what becomes its .grad

    def take(param: Tensor, grad: Tensor) -> None:
        if param.grad is None:
            new.append((param, grad))
        elif param.grad.is_sparse:
            new.append((param, sparse.add(param.grad, grad)))
        else:
            added.append((param.grad, grad))

    with torch.no_grad(), shards_written([params for params, *_ in jobs]) as written:
        refuse_unsupported(own[0], [p.grad for p in own[0]], {})
        for param, ready in zip(*own, strict=True):
            if ready is not None:
                take(param, ready)
        for params, (_, rows, weights) in zip(written, jobs, strict=True):
            refuse_unsupported(params, [p.grad for p in params], {})
            reached = rows.reached()
            if weights is None:  # heads, mostly: one task each
                alone = {p: row for p in reached if (row := rows.only(p)) is not None}
                for p, row in alone.items():  # may share its memory with another tensor, so a copy becomes .grad
                    take(params[p], _own(row, params[p]) if params[p].grad is None else row)
                reached = [p for p in reached if p not in alone]
                weights = torch.ones(rows.num_groups, rows.num_tasks, device=rows.device)
            dense: dict[int, Tensor] = {}
            fresh: dict[torch.dtype | None, list[int]] = {}  # by dtype, None where it is that of the rows
            for p in reached:
                grad, dtype = params[p].grad, params[p].dtype
                if grad is None or grad.is_sparse or rows.is_sparse(p):
                    fresh.setdefault(None if rows.dtype(p) == dtype else dtype, []).append(p)
                else:
                    dense[p] = grad
            if dense:
                in_place.append((rows.select([*dense]), weights, [*dense.values()]))
            for wide, some in fresh.items():
                part = rows if len(some) == rows.num_params else rows.select(some)
                for p, combined in zip(some, ops.combine(part, weights, dtype=wide), strict=True):
                    take(params[p], combined)
        for part, weights, grads in in_place:
            ops.combine_(part, weights, grads)
        for grad, more in added:
            grad.add_(more)
        for param, grad in new:
            as_it_is = grad.dtype == param.dtype and (grad.is_sparse or grad.stride() == param.stride())
            param.grad = grad if as_it_is else _own(grad, param)


def _own(grad: Tensor, param: Tensor) -> Tensor:
    """A copy of a gradient with its parameter's dtype, and strides if it is dense."""
    if grad.is_sparse:
        return grad.to(param.dtype, copy=True)
    if grad.dtype == param.dtype and grad.stride() == param.stride():
        return grad.clone()
    return torch.empty_like(param).copy_(grad)


def refuse_unsupported(params: Sequence[Tensor], grads: Sequence[Tensor | None], names: dict[int, str]) -> None:
    """Refuse gradients that no kernel reads.

    Args:
        params: Parameters.
        grads: A gradient for each, or None.
        names: The parameters' names by id, where known.

    Raises:
        TypeError: A gradient is complex, or sparse in another way than `fastmtl.sparse` knows; the text names the
            parameter.
    """
    for p, g in zip(params, grads, strict=True):
        if g is None or (type(g) is Tensor and g.layout is torch.strided and not g.is_complex()):
            continue
        name = names.get(id(p), f"a parameter of shape {list(p.shape)}")
        sparse.check_layout(g, name)
        if g.is_complex():
            raise TypeError(f"{name}: complex gradients are not supported")
