"""Parameter level: T losses of one batch, exact per-task gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl import ops
from fastmtl.accumulate import accumulate, refuse_unsupported
from fastmtl.checks import choice, whole
from fastmtl.distributed import Group, Ranks, ranks_of, several
from fastmtl.engine import (
    Method,
    check_method,
    check_nonfinite,
    clip,
    decide,
    refuse_options,
    restored_on_error,
    scale_of,
    task_mask,
    unscaled,
    weighed_losses,
)
from fastmtl.exchange import (
    Collected,
    Exchange,
    aligned_after_errors,
    describe_param,
    describe_params,
    finish,
    has_static_graph,
)
from fastmtl.losses import Losses, LossesLike, parse_losses, stack_scalars
from fastmtl.operate import operate
from fastmtl.parameters import (
    GroupsLike,
    ParamsLike,
    check_one_device,
    find_leaves,
    group_members,
    resolve_groups,
    resolve_params,
)
from fastmtl.passes import Passes, Proof
from fastmtl.result import Result
from fastmtl.rows import Rows, ThroughBackward, ThroughGrad, constant_mask
from fastmtl.sharded import check_synchronised, is_sharded
from fastmtl.sharded_exchange import SAME_TASKS, ShardedExchange, ranks_of_sharded
from fastmtl.shared import discover, discover_over_ranks, keep_shared, known_shared, other_params
from fastmtl.surgery.amortized import Amortized
from fastmtl.surgery.base import GradientMethod
from fastmtl.surgery.constant import Sum
from fastmtl.surgery.gramian_free import GramianFree
from fastmtl.surgery.row_method import refuse_row_method
from fastmtl.watch import tell
from fastmtl.weighting.base import LossWeighting

FILLERS = ("auto", "grad", "backward")


def backward(
    losses: LossesLike,
    method: Method,
    shared_params: ParamsLike | None = None,
    *,
    model: nn.Module | None = None,
    groups: GroupsLike | None = None,
    gramian_params: ParamsLike | None = None,
    scaler: Any = None,
    nonfinite: str = "propagate",
    max_norm: float | None = None,
    precision: str = "full",
    chunk_size: int | None = None,
    row_dtype: torch.dtype | None = None,
    filler: str = "auto",
    retain_graph: bool = False,
    process_group: Group = "auto",
) -> Result:
    """Fill ``.grad`` as ``loss.backward()`` does, with the shared parameters' gradients combined by ``method``.

    The other parameters that the losses reach (the heads) get their plain gradient ``sum_t dL_t/dtheta``, or
    ``sum_t w_t dL_t/dtheta`` if ``method.scale_heads``. Existing ``.grad`` are added to. Surgery per micro-batch is not
    surgery of the whole batch: to accumulate exactly use `TaskGradients`.

    Args:
        losses: T scalars of one graph, raw (not multiplied by a loss scale): a sequence, a mapping from task name, or a
            1-D tensor. None: the task is absent from this batch; it takes no part and gets weight 0.
        method: A gradient method, or a loss weighting, which enters as ``w_t = d scalar / d L_t`` on all parameters and
            needs one backward pass only.
        shared_params: A module, parameters, or names (with ``model``). None: those of ``model`` that at least two
            tasks reach, found at the first step in which all tasks are present and kept for the model.
        model: Where names are looked up and shared parameters found.
        groups: Solve per group: None or ``"all"``, ``"layer"``, ``"tensor"``, or a sequence of modules, parameters or
            names per group.
        gramian_params: Take the Gramian on these parameters only (a last shared layer, say): T short backward passes
            and one weighted one, and no T x P memory. One group only.
        scaler: A ``torch.amp.GradScaler``: ``.grad`` is left scaled for it, while the method sees raw gradients.
        nonfinite: Where a gradient or a loss is inf or NaN. ``"propagate"``: ``.grad`` becomes NaN (a scaler then skips
            the step). ``"drop_task"``: such tasks count as absent. ``"skip"``: no ``.grad`` is changed, the weights are
            0. ``"raise"``: FloatingPointError naming the tasks. The last three not with a scaler; the last two
            synchronise with the host once; so does ``"drop_task"`` with ``gramian_params``.
        max_norm: Upper bound of the norm of the combined shared gradient, from the Gramian, without another pass; see
            `fastmtl.engine.clip` for its rounding. With a scaler: of the unscaled gradient.
        precision: ``"full"`` or ``"fast"``, of the Gramian; see `fastmtl.ops.gram`.
        chunk_size: Pass so many tasks at once through what the tasks share of the graph (``is_grads_batched``), and
            free each head's graph as soon as it was passed. Faster for many tasks and small operations, slower for
            large ones: measure. 1: no batching, heads freed all the same, for heads that hold much memory. None: one
            whole pass per task. Hooks of the tensors that heads read run twice, or on batched gradients: leave them and
            ``retain_grad()`` away. A custom ``autograd.Function`` whose outputs different tasks read gets zeros, not
            None, for those that a task does not read.
        row_dtype: Store float32 per-task gradients of the shared parameters in ``torch.bfloat16`` or ``torch.float16``,
            half the memory; each is rounded once, the sum is in float32. float16 overflows beyond 65504, the loss scale
            included. None: as they come, which they also are while ``shared_params`` are still to be found.
        filler: How rows are obtained. ``"grad"``: ``torch.autograd.grad``, fires no post-accumulate hooks.
            ``"backward"``: ``.backward()``, taking ``.grad``; for reentrant checkpointing and sharded parameters.
            ``"auto"`` picks.
        retain_graph: Keep the graph afterwards.
        process_group: The ranks that share a batch, whose local losses average to its losses
            (`fastmtl.distributed.mean`): ``.grad`` is what one process with the whole batch would have, and needs no
            further averaging. ``"auto"``: all ranks, where ``torch.distributed`` has several. None: each rank for
            itself.

    Returns:
        `Result`; ``grads`` are the shared parameters' ``.grad``.

    Raises:
        TypeError: ``method`` or a loss is of the wrong type.
        ValueError: A loss without graph, an unknown option or name, options that exclude each other. ``.grad`` and the
            method's state are then as before.
        FloatingPointError: With ``nonfinite="raise"``.
        RuntimeError: Ranks have other tasks, parameters, methods or options, or one failed in its backward passes; on
            every rank.

    Note:
        Cost: T backward passes through the shared part (one, if ``method`` is a loss weighting, or looks at no
        gradients, as `Sum` does), then two reads of the T x P per-task gradients and one write of P; T x P memory. No
        host synchronisation with the default policy. Of parameters with sparse gradients only the rows that are touched
        count, which synchronises; see `fastmtl.sparse`.

        With W ranks each task's gradients are reduce-scattered while the next one's are computed, and the combination
        all-gathered: ``(T + 1) P`` numbers moved, ``T P / W + 2 P`` memory, four host synchronisations. The model may
        be wrapped in ``DistributedDataParallel``, whose own averaging is not used then, but not with
        ``static_graph=True``; with ``filler="backward"`` pass its ``module`` and run that. Tasks may be absent on some
        ranks: then pass ``model``. Not there: sparse gradients.

        With sharded parameters (FSDP2, tensor parallelism: `fastmtl.sharded`) each rank keeps its shards of the tasks'
        gradients, ``T P / n`` numbers of n shards; only the Gramian is summed. ``model`` is needed, each task needs a
        loss on every rank, and the filler is ``"backward"``. FSDP2 holds the gathered parameters during the passes.

    Example:
        >>> import torch, fastmtl
        >>> x = torch.nn.Parameter(torch.tensor([1., 1.]))
        >>> losses = {"slow": x[0], "fast": 2 * x[1]}
        >>> fastmtl.backward(losses, fastmtl.MGDA(), shared_params=[x]).weights
        tensor([0.8000, 0.2000], dtype=torch.float64)
        >>> x.grad
        tensor([0.8000, 0.4000])
    """
    check_method(method)
    check_nonfinite(nonfinite, scaler)
    choice("filler", filler, FILLERS)
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm: expected a positive norm, found {max_norm}")
    ops.check_precision(precision)
    if chunk_size is not None:
        chunk_size = whole("chunk_size", chunk_size, 1)
    if row_dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"row_dtype: expected torch.bfloat16, torch.float16 or None, found {row_dtype!r}")
    if isinstance(method, Amortized) and nonfinite != "propagate":
        raise ValueError(f"nonfinite={nonfinite!r}: Amortized looks at no gradients between its updates")
    if gramian_params is not None:
        refuse_row_method(method, "gramian_params")

    parsed = parse_losses(losses, empty=several("auto"))
    leaves, kinds = find_leaves(parsed.present)
    known = known_shared(shared_params, model, len(parsed))
    shared = resolve_params(model, model, "model") if known is None and model is not None else known
    assert shared is not None
    sharded = _are_sharded([*shared.values(), *leaves], kinds)
    hidden = any(kind.__name__ == "CheckpointFunctionBackward" for kind in kinds)
    if sharded:
        if model is None:
            raise ValueError("model: needed with sharded parameters, whose graph hides which parameters the heads have")
        check_synchronised(model)
        heads = other_params([], shared, model)
        ranks = ranks_of_sharded(process_group, [*shared.values(), *heads])
    else:
        ranks = ranks_of(process_group)
        heads = other_params(leaves, shared, model if hidden or ranks is not None else None)
    if ranks is not None:
        refuse_row_method(method, "process_group")
    elif not parsed.present:
        parse_losses(losses)  # raises
    knows_heads = gramian_params is not None or nonfinite != "propagate" or isinstance(method, Amortized)
    if hidden and model is None and (knows_heads or getattr(method, "scale_heads", False)):
        raise ValueError("model: needed here, since reentrant checkpointing hides which parameters the heads have")
    through = _through(filler, hidden, sharded, chunk_size)
    if ranks is not None and through is ThroughBackward and _averages(model):
        raise ValueError("model: filler='backward' would have DistributedDataParallel average; pass model.module")
    scale = scale_of(scaler, parsed.device if parsed.present else next(iter(shared.values())).device)
    by_id = {id(p): name for name, p in shared.items()}
    gather = model if sharded else None
    passes = Passes(parsed, kinds, through, scale, retain_graph, by_id, chunk_size, row_dtype, gather)
    few = {} if gramian_params is None else resolve_params(gramian_params, model, "gramian_params")
    step = _Step(method, model, shared, known is not None, heads, few, passes, groups, nonfinite, max_norm, precision)
    if isinstance(method, LossWeighting):
        refuse_options(method, nonfinite=nonfinite, max_norm=max_norm, gramian_params=few or None)
    elif few:
        step.check_few()
    if ranks is not None:
        step.meet(ranks, scaler is not None, sharded)
    with aligned_after_errors(method):
        return step.weigh_losses(method) if isinstance(method, LossWeighting) else step.weigh_gradients(method, hidden)


@dataclass
class _Step:
    """One call of `backward`, checked: what the ways through it have in common.

    Attributes:
        method: See `backward`.
        model: See `backward`.
        shared: The shared parameters by name; where they are still to be found, all that may be.
        known: Whether they are not to be found.
        heads: The other parameters.
        few: ``gramian_params``.
        passes: The backward passes.
        groups: See `backward`, as for the remaining ones.
        nonfinite: See above.
        max_norm: See above.
        precision: See above.
        exchange: The word with the other ranks, if there are any.
    """

    method: Method
    model: nn.Module | None
    shared: dict[str, Tensor]
    known: bool
    heads: list[Tensor]
    few: dict[str, Tensor]
    passes: Passes
    groups: GroupsLike | None
    nonfinite: str
    max_norm: float | None
    precision: str
    exchange: Exchange | None = None

    @property
    def grouped(self) -> bool:
        """Whether results have a dimension of groups."""
        return self.groups not in (None, "all")

    @property
    def losses(self) -> Losses:
        """Those of the whole batch."""
        if self.exchange is None or self.exchange.losses is None:
            return self.passes.losses
        return self.exchange.losses

    @property
    def params(self) -> list[Tensor]:
        """All parameters, the shared ones first."""
        return [*self.shared.values(), *self.heads]

    @contextmanager
    def during(self, num_tasks: int, num_params: int, collected: Collected | None = None) -> Iterator[None]:
        """The context of backward passes: other ranks learn of an error within, and of a ``.grad`` not supported."""
        if self.exchange is None:
            yield
            return
        with self.exchange.passes(num_tasks, num_params, collected):
            refuse_unsupported(self.params, [p.grad for p in self.params], {})
            yield

    def prove(self) -> bool:
        """`Passes.prove`, where it is needed; by all ranks together.

        Returns:
            Whether it is proven, on all ranks, or there is nothing to prove.

        Raises:
            RuntimeError: It cannot be repeated, on some rank; on every rank.
        """
        exchange = self.exchange
        if not (self.passes.unproven if exchange is None else exchange.unproven):
            return True
        with self.during(1, 1):
            proof = self.passes.prove(self.params)
        if exchange is not None:
            proof = Proof(exchange.most([[proof]])[0][0])
        return self.passes.accept(proof)

    def result(self, weights: Tensor | None, gramian: Tensor | None) -> Result:
        """From ``weights [K, T]`` and ``gramian [K, T, T]``."""
        return Result.of(tuple(p.grad for p in self.shared.values()), weights, gramian, self.grouped)

    def meet(self, ranks: Ranks, scaled: bool, sharded: bool) -> None:
        """The handshake with the other ranks, and the shared parameters, if they are still to be found.

        Args:
            ranks: All.
            scaled: There is a scaler.
            sharded: Some parameters are.
        """
        losses, model = self.passes.losses, self.model
        there = [x is not None for x in losses.items]
        present = [name for name, here in zip(losses.names, there, strict=True) if here]
        options: dict[str, Any] = {
            "nonfinite": self.nonfinite,
            "max_norm": self.max_norm,
            "precision": self.precision,
            "row_dtype": self.passes.row_dtype,
            "scaler": scaled,
            "groups": self.groups if isinstance(self.groups, str | None) else len(self.groups),
        }
        if self.known and self.grouped:
            options["group of each parameter"] = resolve_groups(self.groups, self.shared, model)[0]
        elif self.grouped and not isinstance(self.groups, str):
            where = group_members(self.groups or (), model)
            options["group of each parameter"] = [where.get(id(p)) for p in self.shared.values()]
        call = {
            "call": ["fastmtl.backward"],
            "options": [f"{name}={value}" for name, value in options.items()],
            "shared_params": describe_params(self.shared) if self.known else ["still to be found"],
            "other parameters": [describe_param(p) for p in self.heads],
            "gramian_params": describe_params(self.few),
        }
        mine = set() if model is None else {id(p) for p in model.parameters()}
        if sharded:
            call[SAME_TASKS] = present
        elif not mine.issuperset(map(id, self.heads)):  # their order tells which they are only with the same tasks
            call["tasks with a loss (model= allows that)"] = present
        device = next(iter(self.shared.values())).device
        static_graph, unproven = has_static_graph(losses.present, model), bool(self.passes.unproven)
        others = self.method, losses, there, losses.names, device, call, static_graph, unproven
        if sharded:
            self.exchange = ShardedExchange([*self.params, *self.few.values()], ranks, *others)
        else:
            self.exchange = Exchange(ranks, *others)
        if not self.known and isinstance(self.method, GradientMethod):
            assert model is not None
            found, private = discover_over_ranks(self.exchange, self.passes, self.shared, self.heads)
            keep_shared(model, self.shared, found, self.exchange.present)
            self.shared, self.heads, self.known = found, [*private, *self.heads], True

    def weigh_losses(self, method: LossWeighting) -> Result:
        """One pass for everything, the heads weighted too, as by ``method(losses).backward()``."""
        num_groups = resolve_groups(self.groups, self.shared, self.model)[1]
        losses = self.passes.losses if self.exchange is None else self.exchange.losses
        with weighed_losses(method, losses, self.passes.scale, alone=True) as weights:
            with self.during(1, len(self.params)):
                grads = self.passes.weighted(self.params, weights)
            if self.exchange is not None:
                grads = self.exchange.average(self.params, grads)
            accumulate((self.params, Rows.by_task([grads]), None))
        return self.result(weights.expand(num_groups, -1), None)

    def weigh_gradients(self, method: GradientMethod, hidden: bool) -> Result:
        """By the cheapest way that there is; ``hidden``: the graph hides parameters."""
        simple = self.known and not self.grouped and self.nonfinite == "propagate"
        whole_pass = simple and not (hidden and self.model is None)
        once = whole_pass and _is_plain_sum(method)
        present = len(self.passes.present) if self.exchange is None else sum(self.exchange.present)
        again = not once and (present > 1 or bool(self.few) or isinstance(method, Amortized))
        if again and not self.prove() and self.nonfinite == "drop_task":
            raise RuntimeError("compiled trunk: no finite gradient yet to prove that its backward pass can be repeated")
        held = self.hold(method) if whole_pass else None
        if held is not None:
            return held
        if self.few:
            return self.on_gramian_params(method)
        return self.alone(method) if self.exchange is None else self.over_ranks(method, self.exchange)

    def hold(self, method: GradientMethod) -> Result | None:
        """One pass with weights that the method has without a Gramian; None: it has none."""
        with restored_on_error(method):
            there = [x is not None for x in self.passes.losses.items]
            there = there if self.exchange is None else self.exchange.present
            weights = method.ready(constant_mask([there], next(iter(self.shared.values())).device))
            if weights is None:
                return None
            names = self.passes.losses.names
            if method.positional:
                method.remember(names)
            self._one_pass(method, self.passes, weights, self.max_norm)
            if isinstance(method, GramianFree) and method.training:
                method.advance(stack_scalars(self.losses.present).isfinite().all())
            tell(method, names, weights, losses=self.losses)
            return self.result(weights, None)

    def check_few(self) -> None:
        """Refuse what ``gramian_params`` cannot do.

        Raises:
            ValueError: See above.
        """
        if self.grouped:
            raise ValueError("gramian_params: knows one group of parameters only; drop groups=")
        check_one_device(self.few, "gramian_params")
        if not self.known and not self.method.scale_heads:  # type: ignore[union-attr]
            raise ValueError("gramian_params: pass shared_params= too; it is not known yet which parameters are heads")

    def on_gramian_params(self, method: GradientMethod) -> Result:
        """The Gramian on few parameters, then one weighted pass; a second, short one where heads stay unweighted."""
        passes, few = self.passes, [*self.few.values()]
        ids = set(map(id, few))
        others = [p for p in self.params if id(p) not in ids]
        aside = [] if passes.through is ThroughGrad else others
        losses: Losses | None = passes.losses
        with restored_on_error(method):
            if self.exchange is None:
                tasks = passes.per_task([*few, *aside], stored=len(few), then_more=True)
                rows = Rows.by_task(_columns(tasks, range(len(few))))
                del tasks
                _refuse_unreached(rows, "gramian_params")
                gramian = unscaled(ops.gram(rows, precision=self.precision), passes.scale)
                mask = task_mask(rows, losses)
                del rows  # the pass below needs memory
            else:
                losses = self.exchange.losses
                shards = self.exchange.collect(few, row_dtype=passes.row_dtype, argument="gramian_params")
                with self.during(len(self.exchange.present), len(few), shards):
                    replace(passes, row_dtype=None).per_task([*few, *aside], then_more=True, take=shards.add)
                gramian, mask = shards.gramian(self.precision, passes.scale)
                del shards
            decision = decide(method, gramian, mask, losses, passes.losses.names, self.nonfinite, self.max_norm)
            if decision.kept is not None:  # the pass below would multiply their gradients by 0, and 0 * inf is NaN
                passes = passes.without(decision.kept)
            if not decision.skip and (passes.losses.present or self.exchange is not None):
                self._one_pass(method, passes, decision.weights)
            return self.result(decision.weights, gramian)

    def over_ranks(self, method: GradientMethod, exchange: Exchange) -> Result:
        """Each rank keeps a shard of all tasks' averaged gradients."""
        check_one_device(self.shared, "shared_params")
        indices, num_groups = resolve_groups(self.groups, self.shared, self.model)
        shards = exchange.collect([*self.shared.values()], indices, num_groups, self.passes.row_dtype)
        with self.during(len(exchange.present), len(self.shared), shards):
            tasks = replace(self.passes, row_dtype=None).per_task(self.params, take=shards.add)
        columns = _columns(tasks, range(len(self.shared), len(self.params)))
        options = self.passes.scale, self.nonfinite, self.max_norm, self.precision
        return self.result(*finish(shards, self.heads, columns, method, *options))

    def alone(self, method: GradientMethod) -> Result:
        """All tasks' gradients, in one process."""
        passes, params, losses = self.passes, self.params, self.passes.losses
        tasks = passes.per_task(params, stored=len(self.shared) if self.known else 0)
        if not self.known:
            assert self.model is not None
            candidates, names = self.shared, [*self.shared]
            chosen = discover(candidates, tasks)
            self.shared = {names[i]: params[i] for i in chosen}
        else:
            chosen = list(range(len(self.shared)))
        rest = sorted(set(range(len(params))) - set(chosen))
        self.heads = [params[i] for i in rest]
        check_one_device(self.shared, "shared_params")
        indices, num_groups = resolve_groups(self.groups, self.shared, self.model)
        rows = Rows.by_task(_columns(tasks, chosen), indices, num_groups)
        _refuse_unreached(rows, "shared_params")
        policy = passes.scale, self.nonfinite, self.max_norm, self.precision, passes.row_dtype is not None
        with restored_on_error(method):
            outcome = operate(method, rows, task_mask(rows, losses), losses, losses.names, *policy)
            outcome.fill([*self.shared.values()], self.heads, Rows.by_task(_columns(tasks, rest)))
        if not self.known and self.model is not None:
            keep_shared(self.model, candidates, self.shared, [task is not None for task in tasks])
        return self.result(outcome.weights, outcome.gramian)

    def _one_pass(self, method: GradientMethod, passes: Passes, weights: Tensor, max_norm: float | None = None) -> None:
        """One pass with known ``weights [1, T]``; before it a short one where heads stay unweighted."""
        shared, heads, exchange = [*self.shared.values()], self.heads, self.exchange
        with self.during(1, len(self.params)):
            if not heads or method.scale_heads or _is_plain_sum(method):
                grads, plain = passes.weighted(self.params, weights[0]), []
            else:
                plain = passes.weighted(heads, None, then_more=True, aside=shared)
                grads = passes.weighted(shared, weights[0], aside=heads)
        if exchange is not None:
            grads, plain = exchange.average(self.params, [*grads, *plain]), []
        rows, rest = Rows.by_task([grads[: len(shared)]]), Rows.by_task([[*grads[len(shared) :], *plain]])
        _refuse_unreached(rows, "shared_params")
        factor = None
        if max_norm is not None:
            square = unscaled(ops.gram(rows) if exchange is None else exchange.gram(shared, rows), passes.scale)
            factor = clip(torch.ones_like(square[0]), square, max_norm)
        accumulate((shared, rows, factor), (heads, rest, None))


def _through(
    filler: str, hidden: bool, sharded: bool, chunk_size: int | None
) -> type[ThroughGrad] | type[ThroughBackward]:
    """How gradients are taken.

    Raises:
        ValueError: Not that way, or not in chunks.
    """
    if filler == "grad" and sharded:
        raise ValueError("filler='grad': finds no gradients of sharded parameters (FSDP2, DTensor); leave it to 'auto'")
    if filler == "grad" or (filler == "auto" and not (hidden or sharded)):
        return ThroughGrad
    if chunk_size is not None:
        raise ValueError(
            f"chunk_size={chunk_size}: needs filler='grad', which reentrant checkpointing and sharded parameters "
            "(FSDP2, DTensor) do not allow; use chunk_size=None"
        )
    return ThroughBackward


def _are_sharded(params: Iterable[Tensor], kinds: set[type]) -> bool:
    """Whether some are: of the parameters given, or behind FSDP2's hooks in a graph with nodes of these types."""
    return any(kind.__name__ == "RegisterPostBackwardFunctionBackward" for kind in kinds) or any(
        map(is_sharded, params)
    )


def _averages(model: nn.Module | None) -> bool:
    return isinstance(model, nn.parallel.DistributedDataParallel) and bool(model.require_backward_grad_sync)


def _is_plain_sum(method: GradientMethod) -> bool:
    """Whether shared parameters are to have what heads have, so that one pass does for both."""
    return isinstance(method, Sum) and method.rescale == "none" and method.apply_to == "raw"


def _refuse_unreached(rows: Rows, argument: str) -> None:
    if all(g is None for g in rows.grads):
        raise ValueError(
            f"{argument}: no loss reaches any of them; do they belong to the model that made the losses, and ran it "
            "with gradients (no detach(), no torch.no_grad())?"
        )


def _columns(
    tasks: Sequence[Sequence[Tensor | None] | None], params: Sequence[int] | range
) -> list[list[Tensor | None] | None]:
    return [None if task is None else [task[p] for p in params] for task in tasks]
