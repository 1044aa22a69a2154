"""The backward passes of one step: a pass per task, several tasks at once, or one for a weighted sum."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastmtl.cut import Cut, cut
from fastmtl.engine import refuse_unsupported
from fastmtl.losses import Losses, stack_scalars
from fastmtl.rows import ThroughBackward, ThroughGrad

COMPILED = "CompiledFunctionBackward"

# Compiled backward functions that gave a task the same gradient before and after the passes of the others.
_repeatable: weakref.WeakSet[type] = weakref.WeakSet()

_RECIPE = (
    "several backward passes through a compiled trunk are right only with torch._functorch.config.donated_buffer = "
    'False from the start of the process and torch.compile(trunk, options={"fx_graph_cache": False}); or use '
    "FeatureSurgery, which needs neither"
)


class Passes:
    """The backward passes of one step.

    Args:
        losses: At least one present.
        kinds: The types of the nodes of their graph.
        filler: ``"grad"`` or ``"backward"``, see `fastmtl.backward`.
        scale: The loss scale, or None.
        retain_graph: Keep the graph afterwards.
        names: The parameters' names by id, for errors.
        precision: Of the Gramian.
        chunk_size: Tasks per pass through the common part; None: whole passes, one after the other.
        row_dtype: What per-task gradients are stored in; None: as they come.
    """

    def __init__(
        self,
        losses: Losses,
        kinds: set[type],
        filler: str,
        scale: Tensor | None,
        retain_graph: bool,
        names: dict[int, str],
        precision: str,
        chunk_size: int | None,
        row_dtype: torch.dtype | None,
    ) -> None:
        self.losses, self.scale, self.retain_graph = losses, scale, retain_graph
        self.names, self.precision = names, precision
        self.chunk_size, self.row_dtype = chunk_size, row_dtype
        self.through = ThroughGrad if filler == "grad" else ThroughBackward
        self.unproven = {kind for kind in kinds if kind.__name__ == COMPILED} - set(_repeatable)

    def without(self, kept: Tensor) -> Passes:
        """The passes over the tasks that were kept only; synchronises with the host."""
        items = tuple(x if keep else None for x, keep in zip(self.losses.items, kept.tolist(), strict=True))
        passes = copy.copy(self)
        passes.losses = Losses(self.losses.names, items)
        return passes

    def per_task(
        self, params: Sequence[Tensor], stored: int = 0, then_more: bool = False
    ) -> list[Sequence[Tensor | None] | None]:
        """Each task's gradients, None for absent tasks.

        Args:
            params: Parameters.
            stored: So many of them, the first, have their gradients stored in ``row_dtype``.
            then_more: Keep the graph for further passes.

        Raises:
            RuntimeError: A graph that was freed; backward functions that cannot be batched.
        """
        tasks: list[Sequence[Tensor | None] | None] = [None] * len(self.losses)

        def store(task: int, row: Sequence[Tensor | None]) -> None:
            refuse_unsupported(params, row, self.names)
            if self.row_dtype is not None:
                row = [self._narrow(g) if i < stored else g for i, g in enumerate(row)]
            tasks[task] = row

        keep = self.retain_graph or then_more
        present = self._present
        if self.chunk_size is None:
            with self.through(params) as run:
                for t in present:
                    store(t, self._run(run, t, keep or t < present[-1]))
        else:
            self._in_chunks(params, self.chunk_size, keep, store)
        return tasks

    def _narrow(self, grad: Tensor | None) -> Tensor | None:
        return grad.to(self.row_dtype) if grad is not None and grad.dtype is torch.float32 else grad

    def prove(self, params: Sequence[Tensor]) -> None:
        """Make sure, once per compiled function in the graph, that its backward can be repeated.

        Several passes through one may give wrong gradients without a word; so a first task's pass, another task's, and
        the first's again. They prove nothing while gradients are not finite; then the next step tries again.

        Raises:
            RuntimeError: It cannot.
        """
        if not self.unproven or len(self._present) < 2:
            return
        first, second = self._present[:2]
        with self.through(params) as run:
            before, _, after = (self._run(run, t, True) for t in (first, second, first))
        for a, b in zip(before, after, strict=True):
            if a is None or b is None:
                same = a is b
            else:
                size = float(a.norm())
                if not math.isfinite(size):
                    return
                same = float((a - b).norm()) <= 1e-3 * size  # NaN is not
            if not same:
                raise RuntimeError(f"compiled trunk: a repeated backward pass gave another gradient; {_RECIPE}")
        _repeatable.update(self.unproven)

    @property
    def _present(self) -> list[int]:
        return [t for t, x in enumerate(self.losses.items) if x is not None]

    def _in_chunks(
        self,
        params: Sequence[Tensor],
        size: int,
        keep: bool,
        store: Callable[[int, Sequence[Tensor | None]], None],
    ) -> None:
        """A pass per task through what it alone reaches, and one per chunk of tasks through what several reach."""
        parts = cut(self.losses.present)
        common = [i for i, p in enumerate(params) if id(p) in parts.reach]
        present = [*enumerate(self._present)]

        def chunk(start: int) -> None:  # what it leaves in other types than the rows' is freed before the next one
            some = present[start : start + size]
            tasks = [t for _, t in some]
            above = [self._above(parts, k, t, params, keep) for k, t in some]
            arrived = [cotangents for _, cotangents in above]
            keep_common = keep or start + size < len(present)
            below = self._below(parts, arrived, [params[i] for i in common], tasks, keep_common)
            for t, (row, _), found in zip(tasks, above, below, strict=True):
                for i, g in zip(common, found, strict=True):
                    row[i] = g
                store(t, row)

        for start in range(0, len(present), size):
            chunk(start)

    def _above(
        self, parts: Cut, k: int, task: int, params: Sequence[Tensor], keep: bool
    ) -> tuple[list[Tensor | None], dict[int, Tensor]]:
        """Backward through a private part: gradients of the parameters there, and what arrives at the edges."""
        loss = self.losses.items[task]
        assert loss is not None
        row: list[Tensor | None] = [None] * len(params)
        cotangent = self._cotangent(loss)
        edges = parts.of_task[k]
        if parts.at_losses:
            return row, {edges[0]: torch.ones_like(loss) if cotangent is None else cotangent}
        mine = [i for i, p in enumerate(params) if id(p) in parts.private[k]]
        inputs: list[Any] = [*(parts.edges[e] for e in edges), *(params[i] for i in mine)]
        if not inputs:
            return row, {}
        grads = self._explaining(
            [task], lambda: torch.autograd.grad([loss], inputs, [cotangent], retain_graph=keep, allow_unused=True)
        )
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
        grads = self._explaining(
            tasks,
            lambda: torch.autograd.grad(
                roots, params, cotangents, retain_graph=keep, allow_unused=True, is_grads_batched=batched
            ),
            batched,
        )
        if not batched:
            return [list(grads)]
        return [
            [
                None if g is None or parts.reach[id(p)].isdisjoint(mine) else g[k]
                for p, g in zip(params, grads, strict=True)
            ]
            for k, mine in enumerate(arrived)
        ]

    def weighted(
        self, params: Sequence[Tensor], weights: Tensor | None, then_more: bool = False, aside: Sequence[Tensor] = ()
    ) -> list[Tensor | None]:
        """One pass for ``sum_t w_t L_t``; None: the plain sum. ``aside``: must not be accumulated into meanwhile."""
        everything = [*params, *aside] if self.through is ThroughBackward else params
        tasks, keep = self._present, self.retain_graph or then_more
        with torch.enable_grad():  # one root: autograd takes 2 us to check each
            losses = stack_scalars(self.losses.present)
        if weights is None:
            weights = torch.ones_like(losses)
        elif len(tasks) < len(weights):
            weights = torch.stack([weights[t] for t in tasks])
        cotangent = (weights if self.scale is None else weights * self.scale).to(losses.dtype)
        with self.through(everything) as run:
            grads = list(self._explaining(tasks, lambda: run([losses], [cotangent], keep)))[: len(params)]
        refuse_unsupported(params, grads, self.names)
        return grads

    def _run(self, run: Any, task: int, keep: bool) -> Sequence[Tensor | None]:
        loss = self.losses.items[task]
        assert loss is not None
        return self._explaining([task], lambda: run([loss], [self._cotangent(loss)], keep))

    def _explaining(
        self, tasks: Sequence[int], run: Callable[[], Sequence[Any]], batched: bool = False
    ) -> Sequence[Any]:
        """Run a pass, with the cause and the cure in the errors that PyTorch words for itself."""
        names = ", ".join(self.losses.names[t] for t in tasks)
        try:
            with explain_freed_graph(names):
                return run()
        except RuntimeError as error:
            if "donated buffer" in str(error):
                raise RuntimeError(f"compiled trunk: {_RECIPE}") from error
            if batched and error.__cause__ is None:
                raise RuntimeError(
                    f"chunk_size={self.chunk_size}: backward of {names} at once failed, since some operation of the "
                    "model cannot be batched; use chunk_size=1 or None"
                ) from error
            raise

    def _cotangent(self, loss: Tensor) -> Tensor | None:
        return None if self.scale is None else self.scale.to(loss.dtype)


@contextmanager
def explain_freed_graph(names: str) -> Iterator[None]:
    """Say in PyTorch's error about a graph that was freed whose it was, and the cure."""
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise RuntimeError(
            f"loss of {names}: its graph was freed by an earlier backward pass; compute the loss anew, or pass "
            "retain_graph=True to that pass"
        ) from error
