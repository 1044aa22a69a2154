"""One batch per task: collect each task's gradients as its backward pass comes, then combine them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl import sparse
from fastmtl.accumulate import accumulate, refuse_unsupported
from fastmtl.checks import whole
from fastmtl.distributed import Group, ranks_of, several
from fastmtl.engine import (
    Method,
    check_method,
    check_nonfinite,
    refuse_options,
    restored_on_error,
    scale_of,
    task_mask,
    weighed_losses,
)
from fastmtl.exchange import (
    Exchange,
    aligned_after_errors,
    describe_param,
    describe_params,
    finish,
    has_static_graph,
    weighted,
)
from fastmtl.losses import Losses, LossesLike, numbered, parse_losses
from fastmtl.operate import operate
from fastmtl.parameters import GroupsLike, ParamsLike, check_one_device, resolve_groups, resolve_params
from fastmtl.passes import explain_freed_graph
from fastmtl.result import Result
from fastmtl.rows import Rows, ThroughBackward
from fastmtl.sharded import is_sharded
from fastmtl.sharded_exchange import SAME_TASKS, ShardedExchange, ranks_of_sharded
from fastmtl.surgery.row_method import refuse_row_method
from fastmtl.weighting.base import LossWeighting


class TaskGradients:
    """Collects per-task gradients over separate backward passes: multilingual, multi-dataset, RL, micro-batches.

    Each task's pass is an ordinary ``backward``; no extra work is done. Several passes of one task add up, so surgery
    over micro-batches is exact here. Parameters that are not shared accumulate into their ``.grad`` as usual.

    Args:
        shared_params: A module, parameters, or names (with ``model``).
        num_tasks: T.
        heads: The parameters that are not shared, given likewise; only for methods that scale them too
            (``scale_heads``, loss weightings).
        model: Where names are looked up.
        groups: As for `fastmtl.backward`.
        scaler: A ``torch.amp.GradScaler``. `backward` then takes raw losses and scales them; within `task`, scale the
            loss yourself. ``.grad`` is left scaled.
        names: The tasks' names, for errors.

    Raises:
        TypeError, ValueError: As for `fastmtl.backward`.

    Note:
        Cost: T x P memory; `combine` reads it twice and writes P. Of parameters with sparse gradients only the rows
        that are touched count; each pass then synchronises with the host.

    Example:
        >>> import torch, fastmtl
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> rows = fastmtl.TaskGradients(model, num_tasks=2)
        >>> for t, x in enumerate([torch.tensor([1., 0.]), torch.tensor([0., 2.])]):
        ...     rows.backward(t, model(x).sum())
        >>> rows.combine(fastmtl.MGDA()).weights
        tensor([0.8000, 0.2000], dtype=torch.float64)
        >>> model.weight.grad
        tensor([[0.8000, 0.4000]])
    """

    def __init__(
        self,
        shared_params: ParamsLike,
        num_tasks: int,
        *,
        heads: ParamsLike | None = None,
        model: nn.Module | None = None,
        groups: GroupsLike | None = None,
        scaler: Any = None,
        names: Sequence[str] | None = None,
    ) -> None:
        num_tasks = whole("num_tasks", num_tasks, 1)
        if names is not None and len(names) != num_tasks:
            raise ValueError(f"names: expected one per task ({num_tasks}), found {len(names)}")
        by_name = resolve_params(shared_params, model, "shared_params")
        check_one_device(by_name, "shared_params")
        self._param_names = {id(p): name for name, p in by_name.items()}
        self.num_tasks = num_tasks
        self.names = tuple(names) if names is not None else numbered(num_tasks)
        self.shared = list(by_name.values())
        self.heads = [] if heads is None else list(resolve_params(heads, model, "heads").values())
        self.scaler = scaler
        self._groups, self._num_groups = resolve_groups(groups, by_name, model)
        self._grouped = groups not in (None, "all")
        self.zero()

    def zero(self) -> None:
        """Forget all rows and losses; `combine` does so too."""
        self._rows: list[list[Tensor | None] | None] = [None] * self.num_tasks
        self._losses: list[Tensor | None] = [None] * self.num_tasks
        self._static_graph = False
        self._left_behind: int | None = None  # a task whose last pass left no gradient in sharded parameters

    def backward(self, task: int, loss: Tensor, retain_graph: bool = False) -> None:
        """Run ``loss.backward()`` and keep the shared parameters' gradients as this task's.

        Args:
            task: Index, 0..T-1.
            loss: Raw scalar. Called again for the same task, gradients and losses add up.
            retain_graph: As for ``loss.backward()``.

        Raises:
            ValueError: The task or the loss does not fit. Nothing is kept of a pass that raises.
            RuntimeError: The loss's graph was freed by an earlier pass.
        """
        checked = parse_losses({self._name(task): loss}).present[0]
        scale = scale_of(self.scaler, checked.device)
        if several("auto"):
            self._static_graph = self._static_graph or has_static_graph([checked])
        with self.task(task), explain_freed_graph(self._name(task)):
            torch.autograd.backward([checked], [scale if scale is None else scale.to(loss.dtype)], retain_graph)
        before = self._losses[task]
        self._losses[task] = checked.detach() if before is None else before + checked.detach()

    @contextmanager
    def task(self, task: int) -> Iterator[None]:
        """All backward passes within are this task's. Losses are not seen: hand them to `combine` where needed."""
        self._name(task)
        if self._left_behind not in (None, task):
            self._refuse_left_behind()
        with ThroughBackward([*self.shared, *self.heads]) as run:
            yield
            new = run.take()
            refuse_unsupported(run.params, new, self._param_names)
        sharded = [g for p, g in zip(run.params, new, strict=True) if is_sharded(p)]
        self._left_behind = task if sharded and all(g is None for g in sharded) else None
        old = self._rows[task]
        self._rows[task] = new if old is None else [_sum(a, b) for a, b in zip(old, new, strict=True)]

    def combine(
        self,
        method: Method,
        losses: LossesLike | None = None,
        *,
        nonfinite: str = "propagate",
        max_norm: float | None = None,
        precision: str = "full",
        process_group: Group = "auto",
    ) -> Result:
        """Add the combined gradients to ``.grad`` and forget the rows.

        Args:
            method: A gradient method or a loss weighting. Those that scale heads need ``heads=`` at construction.
            losses: Raw loss values, a mapping by the tasks' names; None: those that `backward` has seen.
            nonfinite: As for `fastmtl.backward`; ``"skip"`` and ``"drop_task"`` reach only heads
                that were given.
            max_norm: As for `fastmtl.backward`.
            precision: As for `fastmtl.backward`.
            process_group: As for `fastmtl.backward`. Each rank may have run passes of other tasks, or none. The shared
                parameters' gradients are averaged over the ranks, and those of heads that were given; others are left
                to the caller. Under ``DistributedDataParallel`` run the forward passes in ``no_sync()``, which saves
                its averaging of each task's gradients. Where parameters are sharded (FSDP2, tensor parallelism) all
                ranks run passes of the same tasks.

        Returns:
            `Result`; ``grads`` are the shared parameters' ``.grad``. Tasks without a row are absent.

        Raises:
            ValueError: No rows, missing losses, or heads that would have to be scaled and were not given. Rows,
                ``.grad`` and the method's state are then as before.
            RuntimeError: Ranks differ; FSDP2 has gradients that it was told not to synchronise.
        """
        check_method(method)
        check_nonfinite(nonfinite, self.scaler)
        self._refuse_left_behind()
        params = [*self.shared, *self.heads]
        sharded = any(map(is_sharded, params))
        ranks = ranks_of_sharded(process_group, params) if sharded else ranks_of(process_group)
        if ranks is not None:
            refuse_row_method(method, "process_group")
        if ranks is None and all(row is None for row in self._rows):
            raise ValueError("combine: no task has run a backward pass yet")
        if (isinstance(method, LossWeighting) or method.scale_heads) and not self.heads:
            raise ValueError(
                f"{type(method).__name__} scales the heads too: pass heads= to TaskGradients, "
                "or scale_heads=False to the method if it has it"
            )
        parsed = self._parse(losses)
        n = len(self.shared)
        if isinstance(method, LossWeighting):
            refuse_options(method, nonfinite=nonfinite, max_norm=max_norm)
        if ranks is not None:
            options = (
                f"nonfinite={nonfinite} max_norm={max_norm} precision={precision} scaler={self.scaler is not None}"
            )
            shared = dict(zip(self._param_names.values(), self.shared, strict=True))
            call = {
                "call": ["TaskGradients.combine"],
                "options": [options],
                "shared_params": describe_params(shared),
                "groups": [str(self._groups)],
                "heads": [describe_param(p) for p in self.heads],
            }
            here = [row is not None for row in self._rows]
            others = method, parsed, here, self.names, self.shared[0].device, call, self._static_graph
            if sharded:
                call[SAME_TASKS] = [name for name, x in zip(self.names, here, strict=True) if x]
            exchange = ShardedExchange(params, ranks, *others) if sharded else Exchange(ranks, *others)
            with aligned_after_errors(method):
                return self._combine_over_ranks(exchange, method, nonfinite, max_norm, precision)
        rows = Rows.by_task([r and r[:n] for r in self._rows], self._groups, self._num_groups)
        heads = Rows.by_task([r and r[n:] for r in self._rows])
        if isinstance(method, LossWeighting):
            return self._weigh_losses(method, parsed, rows, heads)
        scale, mask = scale_of(self.scaler, rows.device), task_mask(rows, None)
        with restored_on_error(method):
            outcome = operate(method, rows, mask, parsed, self.names, scale, nonfinite, max_norm, precision)
            outcome.fill(self.shared, self.heads, heads)
        return self._finish(outcome.weights, outcome.gramian)

    def _weigh_losses(self, method: LossWeighting, losses: Losses | None, rows: Rows, heads: Rows) -> Result:
        with weighed_losses(method, losses, scale_of(self.scaler, rows.device), alone=True) as weights:
            weights = weights.to(rows.device).expand(rows.num_groups, -1)
            accumulate((self.shared, rows, weights), (self.heads, heads, weights[:1]))
        return self._finish(weights, None)

    def _combine_over_ranks(
        self, exchange: Exchange, method: Method, nonfinite: str, max_norm: float | None, precision: str
    ) -> Result:
        scale = scale_of(self.scaler, exchange.device)
        params = [*self.shared, *self.heads]
        before = [p.grad for p in params]
        if isinstance(method, LossWeighting):
            with weighed_losses(method, exchange.losses, scale, alone=True) as weights:
                weights = weights.to(exchange.device).unsqueeze(0)
                with exchange.passes(1, len(params)):
                    refuse_unsupported(params, before, {})
                    grads = weighted(self._rows, len(params), weights)
                grads = exchange.average(params, grads)
                accumulate((params, Rows.by_task([grads]), None))
            return self._finish(weights.expand(self._num_groups, -1), None)
        shards = exchange.collect(self.shared, self._groups, self._num_groups)
        with exchange.passes(self.num_tasks, len(self.shared), shards):
            refuse_unsupported(params, before, {})
            rest = [None if row is None else shards.add(t, row)[len(self.shared) :] for t, row in enumerate(self._rows)]
        weights, gramian = finish(shards, self.heads, rest, method, scale, nonfinite, max_norm, precision)
        return self._finish(weights, gramian)

    def _finish(self, weights: Tensor | None, gramian: Tensor | None) -> Result:
        self.zero()
        return Result.of(tuple(p.grad for p in self.shared), weights, gramian, self._grouped)

    def _parse(self, losses: LossesLike | None) -> Losses | None:
        """The losses of the tasks that have rows, or None if there are none."""
        present = [row is not None for row in self._rows]
        if losses is None:
            items = self._losses
            if any(p and x is None for p, x in zip(present, items, strict=True)):
                return None
        else:
            if isinstance(losses, Mapping):
                unknown = [name for name in losses if name not in self.names]
                if unknown:
                    raise ValueError(f"losses: no task is named {unknown[0]!r}; the tasks are {', '.join(self.names)}")
                losses = {name: losses.get(name) for name in self.names}
            parsed = parse_losses(losses, differentiable=False)
            if len(parsed) != self.num_tasks:
                raise ValueError(f"losses: expected {self.num_tasks} tasks, found {len(parsed)}")
            for name, p, x in zip(self.names, present, parsed.items, strict=True):
                if p and x is None:
                    raise ValueError(f"loss of {name}: the task has a gradient but no loss")
            items = list(parsed.items)
        return Losses(self.names, tuple(x if p else None for p, x in zip(present, items, strict=True)))

    def _refuse_left_behind(self) -> None:
        """Gradients that FSDP2 has not reduced would count for the next task."""
        if self._left_behind is not None:
            raise RuntimeError(
                f"{self.names[self._left_behind]}: its last backward pass left no gradient in the sharded parameters; "
                "after set_requires_gradient_sync(False), set it to True for each task's last pass"
            )

    def _name(self, task: int) -> str:
        if not isinstance(task, int) or not 0 <= task < self.num_tasks:
            raise ValueError(f"task: expected an index in 0..{self.num_tasks - 1}, found {task!r}")
        return self.names[task]


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return sparse.add(a, b)
