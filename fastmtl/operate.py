"""Surgery on the rows of one step: what the ways in do in one process, `RowMethod`s included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.accumulate import accumulate
from fastmtl.engine import clip, decide, under_policy, unscaled
from fastmtl.losses import Losses
from fastmtl.rows import Rows
from fastmtl.surgery.base import GradientMethod, Step
from fastmtl.surgery.row_method import ElementwiseMethod, RawRows, TrackingMethod, separate


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
    mask = None if tracked.everyone else mask
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
        step, kept = under_policy(Step(gramian, mask, values), nonfinite, names)
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
