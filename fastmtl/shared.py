"""Which parameters are shared between the tasks: those given, or those that several tasks are found to reach."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from fastmtl.exchange import Exchange
from fastmtl.parameters import ParamsLike, resolve_params
from fastmtl.passes import Passes

# Per model, from a step with all tasks present: T and the names of the trainable parameters, and the names of those
# that at least two tasks reached.
_shared_of: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int | str, ...], list[str]]] = weakref.WeakKeyDictionary()


def keep_shared(
    model: nn.Module, candidates: dict[str, Tensor], shared: Iterable[str], present: Sequence[bool]
) -> None:
    """Remember for the model which are shared, if all tasks were ``present`` in the step that found them."""
    if all(present):
        _shared_of[model] = (len(present), *candidates), [*shared]


def known_shared(shared_params: ParamsLike | None, model: nn.Module | None, num_tasks: int) -> dict[str, Tensor] | None:
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


def discover(candidates: dict[str, Tensor], tasks: Sequence[Sequence[Tensor | None] | None]) -> list[int]:
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


def discover_over_ranks(
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
    shared = discover(candidates, tasks)
    return {names[i]: params[i] for i in shared}, [p for i, p in enumerate(params) if i not in set(shared)]


def other_params(leaves: Sequence[Tensor], shared: dict[str, Tensor], model: nn.Module | None) -> list[Tensor]:
    """The parameters that are not shared: a model's, in its order, and those that are leaves of the graph."""
    known = () if model is None else resolve_params(model, model, "model").values()
    heads = {id(p): p for p in (*known, *leaves)}
    for p in shared.values():
        heads.pop(id(p), None)
    return [*heads.values()]
