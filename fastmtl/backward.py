"""Parameter level: T losses of one batch, exact per-task gradients."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl import ops
from fastmtl.checks import whole
from fastmtl.distributed import Group, Ranks, ranks_of, several
from fastmtl.engine import (
    Method,
    accumulate,
    check_method,
    check_nonfinite,
    clip,
    decide,
    operate,
    refuse_options,
    restored_on_error,
    scale_of,
    task_mask,
    unscaled,
    weighed_losses,
)
from fastmtl.exchange import Exchange, describe_param, describe_params, finish, has_static_graph
from fastmtl.losses import Losses, LossesLike, parse_losses
from fastmtl.parameters import GroupsLike, ParamsLike, check_one_device, find_leaves, resolve_groups, resolve_params
from fastmtl.passes import Passes
from fastmtl.result import Result
from fastmtl.rows import Rows, ThroughBackward, ThroughGrad, constant_mask
from fastmtl.sharded import check_synchronised, is_sharded
from fastmtl.sharded_exchange import SAME_TASKS, ShardedExchange, ranks_of_sharded
from fastmtl.surgery.amortized import Amortized
from fastmtl.surgery.base import GradientMethod
from fastmtl.surgery.constant import Sum
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
    if filler not in FILLERS:
        raise ValueError(f"filler: expected one of {FILLERS}, found {filler!r}")
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
    grouped = groups not in (None, "all")
    parsed = parse_losses(losses, empty=several("auto"))
    leaves, kinds = find_leaves(parsed.present)
    known = _known_shared(shared_params, model, len(parsed))
    if known is None:
        assert model is not None
        candidates = resolve_params(model, model, "model")
    else:
        candidates = known
    sharded = _is_sharded([*candidates.values(), *leaves], kinds)
    if sharded:
        if model is None:
            raise ValueError("model: needed with sharded parameters, whose graph hides which parameters the heads have")
        check_synchronised(model)
        heads = _heads([], candidates, model)
        ranks = ranks_of_sharded(process_group, [*candidates.values(), *heads])
    else:
        ranks = ranks_of(process_group)
    if ranks is not None:
        refuse_row_method(method, "process_group")
    if ranks is None and not parsed.present:
        parse_losses(losses)  # raises
    hidden = any(kind.__name__ == "CheckpointFunctionBackward" for kind in kinds)
    if not sharded:
        heads = _heads(leaves, candidates, model if hidden or ranks is not None else None)
    knows_heads = gramian_params is not None or nonfinite != "propagate" or isinstance(method, Amortized)
    if hidden and model is None and (knows_heads or getattr(method, "scale_heads", False)):
        raise ValueError("model: needed here, since reentrant checkpointing hides which parameters the heads have")
    if filler == "auto":
        filler = "backward" if hidden or sharded else "grad"
    elif filler == "grad" and sharded:
        raise ValueError("filler='grad': finds no gradients of sharded parameters (FSDP2, DTensor); leave it to 'auto'")
    if chunk_size is not None and filler == "backward":
        raise ValueError(
            f"chunk_size={chunk_size}: needs filler='grad', which reentrant checkpointing and sharded parameters "
            "(FSDP2, DTensor) do not allow; use chunk_size=None"
        )
    through = ThroughGrad if filler == "grad" else ThroughBackward
    scale = scale_of(scaler, parsed.device if parsed.present else next(iter(candidates.values())).device)
    by_id = {id(p): name for name, p in candidates.items()}
    gather = model if sharded else None
    passes = Passes(parsed, kinds, through, scale, retain_graph, by_id, chunk_size, row_dtype, gather)

    exchange: Exchange | None = None
    if ranks is not None:
        if through is ThroughBackward and _averages(model):
            raise ValueError("model: filler='backward' would have DistributedDataParallel average; pass model.module")
        options: dict[str, Any] = {
            "nonfinite": nonfinite,
            "max_norm": max_norm,
            "precision": precision,
            "row_dtype": row_dtype,
        }
        options |= {"scaler": scaler is not None, "gramian_params": gramian_params is not None}
        options["groups"] = groups if isinstance(groups, str | None) else len(groups)
        if known is not None and grouped:
            options["group of each parameter"] = resolve_groups(groups, candidates, model)[0]
        few = {} if gramian_params is None else resolve_params(gramian_params, model, "gramian_params")
        exchange = _meet(ranks, parsed, method, candidates, known is None, heads, few, model, options, sharded)
        if known is None and isinstance(method, GradientMethod):
            assert model is not None
            known, private = _discover_over_ranks(exchange, passes, candidates, heads)
            _keep_shared(model, candidates, known, exchange.present)
            candidates, heads = known, [*private, *heads]

    if isinstance(method, LossWeighting):
        refuse_options(method, nonfinite=nonfinite, max_norm=max_norm, gramian_params=gramian_params)
        num_groups = resolve_groups(groups, candidates, model)[1]
        weights = _weigh_losses(passes, method, [*candidates.values(), *heads], exchange)
        return Result.of(_grads(candidates.values()), weights.expand(num_groups, -1), None, grouped)
    lean: list[Tensor] | None = None
    if gramian_params is not None:
        if grouped:
            raise ValueError("gramian_params: knows one group of parameters only; drop groups=")
        few = resolve_params(gramian_params, model, "gramian_params")
        check_one_device(few, "gramian_params")
        lean = [*few.values()]
        if known is None and not method.scale_heads:
            raise ValueError("gramian_params: pass shared_params= too; it is not known yet which parameters are heads")
    may_hold = known is not None and not grouped and nonfinite == "propagate" and not (hidden and model is None)
    once = may_hold and _is_plain_sum(method)
    again = not once and (len(passes.present) > 1 or lean is not None or isinstance(method, Amortized))
    if again and not passes.prove([*candidates.values(), *heads]) and nonfinite == "drop_task":
        raise RuntimeError("compiled trunk: no finite gradient yet to prove that its backward pass can be repeated")
    if may_hold:
        with restored_on_error(method):
            there = [x is not None for x in parsed.items] if exchange is None else exchange.present
            held = method.ready(constant_mask([there], next(iter(candidates.values())).device))
            if held is not None:
                if method.positional:
                    method.remember(parsed.names)
                _one_pass(passes, method, [*candidates.values()], heads, held, max_norm, exchange)
                tell(method, parsed.names, held, losses=parsed if exchange is None else exchange.losses)
                return Result.of(_grads(candidates.values()), held, None, grouped=False)
    if lean is not None:
        with restored_on_error(method):
            return _on_gramian_params(
                passes, method, [*candidates.values()], heads, lean, precision, nonfinite, max_norm, exchange
            )

    params = [*candidates.values(), *heads]
    if exchange is not None:
        check_one_device(candidates, "shared_params")
        indices, num_groups = resolve_groups(groups, candidates, model)
        shards = exchange.collect([*candidates.values()], indices, num_groups, row_dtype)
        with exchange.passes(len(exchange.present), len(candidates), shards):
            tasks = replace(passes, row_dtype=None).per_task(params, take=shards.add)
        columns = _columns(tasks, range(len(candidates), len(params)))
        weights, gramian = finish(shards, heads, columns, method, scale, nonfinite, max_norm, precision)
        return Result.of(_grads(candidates.values()), weights, gramian, grouped)
    tasks = passes.per_task(params, stored=0 if known is None else len(candidates))
    shared = list(range(len(candidates))) if known is not None else _discover(candidates, tasks)
    names = [*candidates]
    found = {names[i]: params[i] for i in shared}
    check_one_device(found, "shared_params")
    indices, num_groups = resolve_groups(groups, found, model)
    rows = Rows.by_task(_columns(tasks, shared), indices, num_groups)
    _refuse_unreached(rows, "shared_params")
    mask = task_mask(rows, parsed)
    rest = sorted(set(range(len(params))) - set(shared))
    widen = row_dtype is not None
    with restored_on_error(method):
        outcome = operate(method, rows, mask, parsed, parsed.names, passes.scale, nonfinite, max_norm, precision, widen)
        outcome.fill([params[i] for i in shared], [params[i] for i in rest], Rows.by_task(_columns(tasks, rest)))
    if known is None and model is not None:
        _keep_shared(model, candidates, found, [task is not None for task in tasks])
    return Result.of(_grads(params[i] for i in shared), outcome.weights, outcome.gramian, grouped)


def _meet(
    ranks: Ranks,
    losses: Losses,
    method: Method,
    shared: dict[str, Tensor],
    unknown: bool,
    heads: Sequence[Tensor],
    few: dict[str, Tensor],
    model: nn.Module | None,
    options: dict[str, Any],
    sharded: bool,
) -> Exchange:
    """The handshake of a step.

    Args:
        ranks: All.
        losses: This rank's.
        method: See `backward`.
        shared: The shared parameters, or where they are still to be found.
        unknown: The latter.
        heads: The other parameters.
        few: ``gramian_params``.
        model: See `backward`.
        options: What of the call must be the same on all ranks.
        sharded: Some parameters are.
    """
    there = [x is not None for x in losses.items]
    present = [name for name, here in zip(losses.names, there, strict=True) if here]
    call = {
        "call": ["fastmtl.backward"],
        "options": [f"{name}={value}" for name, value in options.items()],
        "shared_params": ["still to be found"] if unknown else describe_params(shared),
        "other parameters": [describe_param(p) for p in heads],
        "gramian_params": describe_params(few),
    }
    mine = set() if model is None else {id(p) for p in model.parameters()}
    if sharded:
        call[SAME_TASKS] = present
    elif not mine.issuperset(map(id, heads)):  # their order tells which they are while all ranks have the same tasks
        call["tasks with a loss (model= allows that)"] = present
    device = next(iter(shared.values())).device
    others = method, losses, there, losses.names, device, call, has_static_graph(losses.present, model)
    if sharded:
        return ShardedExchange([*shared.values(), *heads, *few.values()], ranks, *others)
    return Exchange(ranks, *others)


def _is_sharded(params: Iterable[Tensor], kinds: set[type]) -> bool:
    """Whether some are: of the parameters given, or behind FSDP2's hooks in a graph with nodes of these types."""
    return any(kind.__name__ == "RegisterPostBackwardFunctionBackward" for kind in kinds) or any(
        map(is_sharded, params)
    )


def _heads(leaves: Sequence[Tensor], shared: dict[str, Tensor], model: nn.Module | None) -> list[Tensor]:
    """The parameters that are not shared: a model's, in its order, and those that are leaves of the graph."""
    known = () if model is None else resolve_params(model, model, "model").values()
    heads = {id(p): p for p in (*known, *leaves)}
    for p in shared.values():
        heads.pop(id(p), None)
    return [*heads.values()]


def _averages(model: nn.Module | None) -> bool:
    return isinstance(model, nn.parallel.DistributedDataParallel) and bool(model.require_backward_grad_sync)


def _weigh_losses(passes: Passes, method: LossWeighting, params: Sequence[Tensor], exchange: Exchange | None) -> Tensor:
    """One pass for everything, the heads weighted too, as by ``method(losses).backward()``; returns ``weights [T]``."""
    losses = passes.losses if exchange is None else exchange.losses
    with weighed_losses(method, losses, passes.scale, alone=True) as weights:
        with nullcontext() if exchange is None else exchange.passes(1, len(params)):
            grads = passes.weighted(params, weights)
        if exchange is not None:
            grads = exchange.average(params, grads)
        accumulate((params, Rows.by_task([grads]), None))
    return weights


def _on_gramian_params(
    passes: Passes,
    method: GradientMethod,
    shared: Sequence[Tensor],
    heads: Sequence[Tensor],
    lean: Sequence[Tensor],
    precision: str,
    nonfinite: str,
    max_norm: float | None,
    exchange: Exchange | None,
) -> Result:
    """The Gramian on ``lean`` only, then one weighted pass; a second, short one where heads stay unweighted."""
    aside = [] if passes.through is ThroughGrad else [p for p in [*shared, *heads] if all(p is not q for q in lean)]
    losses: Losses | None = passes.losses
    if exchange is None:
        tasks = passes.per_task([*lean, *aside], stored=len(lean), then_more=True)
        rows = Rows.by_task(_columns(tasks, range(len(lean))))
        del tasks
        _refuse_unreached(rows, "gramian_params")
        gramian = unscaled(ops.gram(rows, precision=precision), passes.scale)
        mask = task_mask(rows, losses)
        del rows  # the pass below needs memory
    else:
        losses = exchange.losses
        shards = exchange.collect(lean, row_dtype=passes.row_dtype, argument="gramian_params")
        with exchange.passes(len(exchange.present), len(lean), shards):
            replace(passes, row_dtype=None).per_task([*lean, *aside], then_more=True, take=shards.add)
        gramian, mask = shards.gramian(precision, passes.scale)
        del shards
    decision = decide(method, gramian, mask, losses, passes.losses.names, nonfinite, max_norm)
    if decision.kept is not None:  # the pass below would multiply their gradients by 0, and 0 * inf is NaN
        passes = passes.without(decision.kept)
    if not decision.skip and (passes.losses.present or exchange is not None):
        _one_pass(passes, method, shared, heads, decision.weights, exchange=exchange)
    return Result.of(_grads(shared), decision.weights, gramian, grouped=False)


def _one_pass(
    passes: Passes,
    method: GradientMethod,
    shared: Sequence[Tensor],
    heads: Sequence[Tensor],
    weights: Tensor,
    max_norm: float | None = None,
    exchange: Exchange | None = None,
) -> None:
    """One pass with known ``weights [1, T]``; before it a short one where heads stay unweighted."""
    with nullcontext() if exchange is None else exchange.passes(1, len(shared) + len(heads)):
        if not heads or method.scale_heads or _is_plain_sum(method):
            grads, plain = passes.weighted([*shared, *heads], weights[0]), []
        else:
            plain = passes.weighted(heads, None, then_more=True, aside=shared)
            grads = passes.weighted(shared, weights[0], aside=heads)
    if exchange is not None:
        grads, plain = exchange.average([*shared, *heads], [*grads, *plain]), []
    rows, rest = Rows.by_task([grads[: len(shared)]]), Rows.by_task([[*grads[len(shared) :], *plain]])
    _refuse_unreached(rows, "shared_params")
    factor = None
    if max_norm is not None:
        square = unscaled(ops.gram(rows) if exchange is None else exchange.gram(shared, rows), passes.scale)
        factor = clip(torch.ones_like(square[0]), square, max_norm)
    accumulate((shared, rows, factor), (heads, rest, None))


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


def _grads(params: Iterable[Tensor]) -> tuple[Tensor | None, ...]:
    return tuple(p.grad for p in params)


# Per model, from a step with all tasks present: T and the names of the trainable parameters, and the names of those
# that at least two tasks reached.
_shared_of: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int | str, ...], list[str]]] = weakref.WeakKeyDictionary()


def _keep_shared(
    model: nn.Module, candidates: dict[str, Tensor], shared: Iterable[str], present: Sequence[bool]
) -> None:
    if all(present):
        _shared_of[model] = (len(present), *candidates), [*shared]


def _known_shared(
    shared_params: ParamsLike | None, model: nn.Module | None, num_tasks: int
) -> dict[str, Tensor] | None:
    """The shared parameters by name, or None if they are still to be found."""
    if shared_params is not None:
        return resolve_params(shared_params, model, "shared_params")
    if model is None:
        raise ValueError(
            "shared_params: missing; pass the shared trunk, or model= to have found what several tasks reach"
        )
    if model not in _shared_of:
        return None
    trainable = resolve_params(model, model, "model")
    key, shared = _shared_of[model]
    if key != (num_tasks, *trainable):  # other tasks, or (un)frozen since
        return None
    return {name: trainable[name] for name in shared}


def _discover(candidates: dict[str, Tensor], tasks: Sequence[Sequence[Tensor | None] | None]) -> list[int]:
    """Indices of the candidates with rows from at least two tasks."""
    present = [task for task in tasks if task is not None]
    if len(present) < 2:
        raise ValueError(
            "model: finding the shared parameters takes a step with two tasks present; pass shared_params="
        )
    shared = [p for p in range(len(candidates)) if sum(task[p] is not None for task in present) >= 2]
    if not shared:
        raise ValueError(
            "model: no parameter is reached by two tasks, so there is nothing to share; pass shared_params="
        )
    return shared


def _discover_over_ranks(
    exchange: Exchange, passes: Passes, candidates: dict[str, Tensor], heads: Sequence[Tensor]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The shared ones of the candidates, and the others, by passes that look at what has a gradient on any rank.

    The graph would not do: `DistributedDataParallel` makes all of the model's outputs depend on each other.
    """
    names, params = [*candidates], [*candidates.values()]
    marks = [[0] * len(params) for _ in exchange.present]

    def take(task: int, row: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        marks[task] = [int(g is not None) for g in row[: len(params)]]
        return ()

    with exchange.passes(len(marks), len(params)):
        passes.per_task([*params, *heads], then_more=True, take=take)
    tasks = [
        [p if mark else None for p, mark in zip(params, row, strict=True)] if there else None
        for there, row in zip(exchange.present, exchange.most(marks), strict=True)
    ]
    shared = _discover(candidates, tasks)
    return {names[i]: params[i] for i in shared}, [p for i, p in enumerate(params) if i not in set(shared)]
