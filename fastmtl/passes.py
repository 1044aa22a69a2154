"""The backward passes of one step: a pass per task, several tasks at once, or one for a weighted sum."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from fastmtl.accumulate import refuse_unsupported
from fastmtl.cut import Cut, cut
from fastmtl.losses import Losses, stack_scalars
from fastmtl.rows import ThroughBackward, ThroughGrad
from fastmtl.sharded import gathered_once

# Compiled backward functions that gave tasks the same gradients again after the passes of others.
_repeatable: weakref.WeakSet[type] = weakref.WeakSet()

_RECIPE = (
    "several backward passes through a compiled trunk are right only with torch._functorch.config.donated_buffer = "
    'False from the start of the process and torch.compile(trunk, options={"fx_graph_cache": False}); or use '
    "FeatureSurgery, which needs neither"
)


class Proof(IntEnum):
    """What repeated passes through a compiled function tell; of several ranks the largest counts."""

    REPEATABLE = 0
    NONE = 1  # gradients that are not finite; the next step tries again
    OTHER = 2  # they gave other gradients


@dataclass(frozen=True)
class Passes:
    """The backward passes of one step.

    Attributes:
        losses: At least one present, on some rank.
        kinds: The types of the nodes of their graph.
        through: How gradients are taken.
        scale: The loss scale, or None.
        retain_graph: Keep the graph afterwards.
        names: The parameters' names by id, for errors.
        chunk_size: Tasks per pass through the common part; None: whole passes, one after the other.
        row_dtype: What per-task gradients in float32 are stored in; None: as they come.
        sharded: The model, if some of its parameters are.
    """

    losses: Losses
    kinds: set[type]
    through: type[ThroughGrad] | type[ThroughBackward]
    scale: Tensor | None
    retain_graph: bool
    names: dict[int, str]
    chunk_size: int | None
    row_dtype: torch.dtype | None
    sharded: nn.Module | None = None

    @property
    def present(self) -> list[int]:
        """The tasks that have a loss."""
        return [t for t, x in enumerate(self.losses.items) if x is not None]

    def without(self, kept: Tensor) -> Passes:
        """The passes over the tasks that were kept only; synchronises with the host."""
        items = tuple(x if keep else None for x, keep in zip(self.losses.items, kept.tolist(), strict=True))
        return replace(self, losses=Losses(self.losses.names, items))

    def per_task(
        self,
        params: Sequence[Tensor],
        stored: int = 0,
        then_more: bool = False,
        take: Callable[[int, Sequence[Tensor | None]], Sequence[Tensor | None]] | None = None,
    ) -> list[Sequence[Tensor | None] | None]:
        """Each task's gradients, None for absent tasks.

        Args:
            params: Parameters.
            stored: So many of them, the first, have their gradients stored in ``row_dtype``.
            then_more: Keep the graph for further passes.
            take: Called with each task and its gradients as they come; what it returns takes their place.

        Raises:
            RuntimeError: A graph that was freed; backward functions that cannot be batched.
        """
        keep = self.retain_graph or then_more
        present = self.present
        rows: dict[int, Sequence[Tensor | None]] = {}

        def keep_row(task: int, row: Sequence[Tensor | None]) -> None:
            row = self._stored(params, row, stored)
            rows[task] = row if take is None else take(task, row)

        if self.chunk_size is None:
            with gathered_once(self.sharded), self.through(params) as run:
                for t in present:
                    keep_row(t, self._whole(run, t, keep or t < present[-1]))
        elif present:
            parts = cut(self.losses.present)
            for start in range(0, len(present), self.chunk_size):
                some = range(start, min(start + self.chunk_size, len(present)))
                last = some.stop == len(present)
                for k, row in zip(some, self._chunk(parts, some, params, keep, keep or not last), strict=True):
                    keep_row(present[k], row)
        return [rows.get(t) for t in range(len(self.losses))]

    def weighted(
        self, params: Sequence[Tensor], weights: Tensor | None, then_more: bool = False, aside: Sequence[Tensor] = ()
    ) -> list[Tensor | None]:
        """One pass for ``sum_t w_t L_t``; None: the plain sum. ``aside``: must not be accumulated into meanwhile."""
        everything = [*params, *aside] if self.through is ThroughBackward else params
        tasks, keep = self.present, self.retain_graph or then_more
        if not tasks:  # those of other ranks only
            return [None] * len(params)
        with torch.enable_grad():  # one root: autograd takes 2 us to check each
            losses = stack_scalars(self.losses.present)
        if weights is None:
            weights = torch.ones_like(losses)
        elif len(tasks) < len(weights):
            weights = torch.stack([weights[t] for t in tasks])
        cotangent = (weights if self.scale is None else weights * self.scale).to(losses.dtype)
        with self.through(everything) as run, self._explained(tasks):
            grads = list(run([losses], [cotangent], keep))[: len(params)]
        refuse_unsupported(params, grads, self.names)
        return grads

    @property
    def unproven(self) -> set[type]:
        """Compiled functions in the graph whose backward is still to be shown to be repeatable; see `prove`."""
        compiled = {kind for kind in self.kinds if kind.__name__ == "CompiledFunctionBackward"}
        return compiled - set(_repeatable)

    def prove(self, params: Sequence[Tensor]) -> Proof:
        """Find out whether the backward of compiled functions in the graph can be repeated.

        Several passes through one may give wrong gradients without a word; so one task's pass, another's, and both
        again. Once `accept` took note of it, it need not be done again.

        Args:
            params: All parameters that passes of this step may reach.

        Raises:
            RuntimeError: A pass failed.
        """
        if not self.present:  # those of other ranks only
            return Proof.REPEATABLE
        tasks = (self.present[0], self.present[-1])
        with self.through(params) as run:
            rows = [self._whole(run, t, True) for t in (*tasks, *tasks)]
        found = [_same(first, again) for first, again in zip(rows[:2], rows[2:], strict=True)]
        return Proof.OTHER if Proof.OTHER in found else min(found)

    def accept(self, proof: Proof) -> bool:
        """Take note of what was found; returns whether repeated passes are known to be right.

        Raises:
            RuntimeError: They are not.
        """
        if proof is Proof.OTHER:
            raise RuntimeError(f"compiled trunk: a repeated backward pass gave another gradient; {_RECIPE}")
        if proof is Proof.REPEATABLE:
            _repeatable.update(self.unproven)
        return proof is Proof.REPEATABLE

    def _whole(self, run: Any, task: int, keep: bool) -> Sequence[Tensor | None]:
        """A pass through all that a loss reaches."""
        with self._explained([task]):
            return run([self._loss(task)], [self._cotangent(task)], keep)

    def _chunk(
        self, parts: Cut, some: range, params: Sequence[Tensor], keep: bool, keep_common: bool
    ) -> list[list[Tensor | None]]:
        """A pass per task through what it alone reaches, and one for all through what several reach."""
        tasks = [self.present[k] for k in some]
        above = [self._above(parts, k, t, params, keep) for k, t in zip(some, tasks, strict=True)]
        common = [i for i, p in enumerate(params) if id(p) in parts.reach]
        below = self._below(parts, [edges for _, edges in above], [params[i] for i in common], tasks, keep_common)
        for (row, _), found in zip(above, below, strict=True):
            for i, g in zip(common, found, strict=True):
                row[i] = g
        return [row for row, _ in above]

    def _above(
        self, parts: Cut, k: int, task: int, params: Sequence[Tensor], keep: bool
    ) -> tuple[list[Tensor | None], dict[int, Tensor]]:
        """Backward through a private part: gradients of the parameters there, and what arrives at the edges."""
        loss, cotangent = self._loss(task), self._cotangent(task)
        row: list[Tensor | None] = [None] * len(params)
        edges, root = parts.of_task[k], get_gradient_edge(loss)
        if [parts.edges[e][:2] for e in edges] == [(root.node, root.output_nr)]:  # nothing is private
            return row, {edges[0]: torch.ones_like(loss) if cotangent is None else cotangent}
        mine = [i for i, p in enumerate(params) if id(p) in parts.private[k]]
        inputs: list[Any] = [*(parts.edges[e] for e in edges), *(params[i] for i in mine)]
        if not inputs:
            return row, {}
        with self._explained([task]):
            grads = torch.autograd.grad([loss], inputs, [cotangent], retain_graph=keep, allow_unused=True)
        for i, g in zip(mine, grads[len(edges) :], strict=True):
            row[i] = g
        return row, {e: g for e, g in zip(edges, grads, strict=False) if g is not None}

    def _below(
        self,
        parts: Cut,
        arrived: Sequence[dict[int, Tensor]],
        params: Sequence[Tensor],
        tasks: Sequence[int],
        keep: bool,
    ) -> list[list[Tensor | None]]:
        """Backward through the common part, for several tasks at once: their gradients."""
        edges = sorted({e for cotangents in arrived for e in cotangents})
        if not edges or not params:
            return [[None] * len(params) for _ in arrived]
        batched = len(arrived) > 1
        cotangents = [
            torch.stack([c[e] if e in c else torch.zeros_like(one) for c in arrived]) if batched else one
            for e, one in ((e, next(c[e] for c in arrived if e in c)) for e in edges)
        ]
        roots = [parts.edges[e] for e in edges]
        with self._explained(tasks, batched):
            grads = torch.autograd.grad(
                roots, params, cotangents, retain_graph=keep, allow_unused=True, is_grads_batched=batched
            )
        if not batched:
            return [list(grads)]
        return [
            [g[k] if g is not None and parts.reached(mine, p) else None for p, g in zip(params, grads, strict=True)]
            for k, mine in enumerate(arrived)
        ]

    def _stored(self, params: Sequence[Tensor], row: Sequence[Tensor | None], stored: int) -> Sequence[Tensor | None]:
        """A row as it is kept."""
        refuse_unsupported(params, row, self.names)
        if self.row_dtype is None:
            return row
        narrow = [i < stored and g is not None and g.dtype is torch.float32 for i, g in enumerate(row)]
        return [g.to(self.row_dtype) if g is not None and n else g for g, n in zip(row, narrow, strict=True)]

    def _loss(self, task: int) -> Tensor:
        loss = self.losses.items[task]
        assert loss is not None
        return loss

    def _cotangent(self, task: int) -> Tensor | None:
        return None if self.scale is None else self.scale.to(self._loss(task).dtype)

    @contextmanager
    def _explained(self, tasks: Sequence[int], batched: bool = False) -> Iterator[None]:
        """Give the cause and the cure in errors of a pass that PyTorch words for itself."""
        names = ", ".join(self.losses.names[t] for t in tasks)
        try:
            with explain_freed_graph(names):
                yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if "donated buffer" in str(error):
                raise RuntimeError(f"compiled trunk: {_RECIPE}") from error
            if batched and error.__cause__ is None:
                raise RuntimeError(
                    f"chunk_size={self.chunk_size}: backward of {names} at once failed, since some operation of the "
                    f"model cannot be batched; use chunk_size=1 or None ({str(error).splitlines()[0]})"
                ) from error
            raise


def _same(first: Sequence[Tensor | None], again: Sequence[Tensor | None]) -> Proof:
    """Whether two passes of a task gave the same gradients."""
    sizes = [0.0 if a is None else float(a.float().norm()) for a in first]
    if not all(map(math.isfinite, sizes)):
        return Proof.NONE
    for a, b, size in zip(first, again, sizes, strict=True):
        if a is None or b is None:
            same = a is b
        else:  # a parameter may have nothing but rounding noise for a gradient
            same = float((a.float() - b.float()).norm()) <= 1e-3 * size + 1e-6 * max(sizes)  # NaN is not
        if not same:
            return Proof.OTHER
    return Proof.REPEATABLE


@contextmanager
def explain_freed_graph(names: str) -> Iterator[None]:
    """Say in PyTorch's error about a graph that was freed whose it was, and the cure."""
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise RuntimeError(
            f"loss of {names}: its graph was freed by an earlier backward pass; hand all losses to one call, without a "
            "backward() of your own before it (or, to go through them again on purpose, retain_graph=True there)"
        ) from error
