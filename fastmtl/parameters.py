"""Which parameters are shared, how they are grouped, and which others the losses reach."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from fastmtl.sharded import stored_parameters

ParamsLike = nn.Module | Iterable[nn.Module | Tensor | str]
"""A module; or an iterable of modules, parameters, or names of a model's parameters or submodules."""
GroupsLike = str | Sequence[ParamsLike]
"""``"all"``, ``"layer"``, ``"tensor"``, or one entry per group: a module, parameters, or names."""


def resolve_params(params: ParamsLike, model: nn.Module | None, argument: str) -> dict[str, Tensor]:
    """The trainable parameters that a user means, by name, each once; those that FSDP2 has gathered as it stores them.

    Args:
        params: See `ParamsLike`.
        model: Where names are looked up; also names the parameters that are passed as tensors.
        argument: The argument's name, for errors.

    Raises:
        TypeError: An entry is of another type.
        ValueError: A name is unknown or has no model to be found in, a tensor is not a trainable leaf, or nothing is
            trainable.
    """
    if not isinstance(params, nn.Module | Tensor | str | Iterable):
        raise TypeError(f"{argument}: expected a module, parameters or names, found {type(params).__name__}")
    entries = [params] if isinstance(params, nn.Module | Tensor | str) else list(params)
    prefixes: dict[int, str] = {}
    names: dict[int, str] = {}
    if model is not None and entries and not (len(entries) == 1 and entries[0] is model):
        prefixes = {id(m): name for name, m in model.named_modules()}
        names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    stored = stored_parameters([m for m in (model, *entries) if isinstance(m, nn.Module)])

    def add(name: str, p: Tensor) -> None:
        p = stored.get(id(p), p)
        if id(p) in seen:
            return
        seen.add(id(p))
        found[name if name not in found else f"{name}#{len(found)}"] = p

    def add_module(module: nn.Module, prefix: str) -> None:
        for name, p in module.named_parameters(prefix):
            if p.requires_grad:
                add(name, p)

    for i, entry in enumerate(entries):
        if isinstance(entry, nn.Module):
            add_module(entry, prefixes.get(id(entry), ""))
        elif isinstance(entry, Tensor):
            name = names.get(id(entry))
            _check_trainable(f"{argument}[{i}]" if name is None else f"{argument}: {name}", entry)
            add(name or f"{argument}[{i}]", entry)
        elif isinstance(entry, str):
            _add_named(entry, model, argument, add, add_module)
        else:
            hint = "; pass parameters(), not named_parameters()" if isinstance(entry, tuple) else ""
            raise TypeError(
                f"{argument}[{i}]: expected a module, a parameter or a name, found {type(entry).__name__}{hint}"
            )
    if not found:
        what = "nothing in it (a generator that was used already?)" if not entries else "no trainable parameter in it"
        raise ValueError(f"{argument}: {what}")
    return found


def _check_trainable(name: str, p: Tensor) -> None:
    if not (p.requires_grad and p.is_leaf):
        found = f"the output of {p.grad_fn.name()}" if p.grad_fn is not None else "requires_grad=False"
        raise ValueError(f"{name}: expected a trainable leaf tensor, found {found}")


def check_one_device(params: dict[str, Tensor], argument: str) -> None:
    """Refuse parameters whose gradients no kernel could read together.

    Raises:
        ValueError: They lie on several devices; the text names one.
    """
    first = next(iter(params.values())).device
    for name, p in params.items():
        if p.device != first:
            raise ValueError(f"{argument}: {name} is on {p.device}, the others on {first}")


def _add_named(name: str, model: nn.Module | None, argument: str, add, add_module) -> None:  # type: ignore[no-untyped-def]
    if model is None:
        raise ValueError(f"{argument}: the name {name!r} needs model= to be looked up in")
    parameter = dict(model.named_parameters()).get(name)
    if parameter is not None:
        _check_trainable(f"{argument}: {name}", parameter)
        add(name, parameter)
        return
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{argument}: the model has no parameter or submodule named {name!r}") from None
    add_module(module, name)


def resolve_groups(
    groups: GroupsLike | None, params: dict[str, Tensor], model: nn.Module | None
) -> tuple[list[int] | None, int]:
    """Per parameter the index of its group, and the number of groups K.

    Args:
        groups: None or ``"all"``: one group. ``"tensor"``: one per parameter. ``"layer"``: one per module that owns
            parameters. Else one entry per group, which together must cover ``params``.
        params: The shared parameters by name.
        model: Where names in ``groups`` are looked up.

    Raises:
        ValueError: An unknown keyword, a parameter in no group or in two, or ``"layer"`` without names to go by.
    """
    if groups is None or groups == "all":
        return None, 1
    if groups == "tensor":
        return list(range(len(params))), len(params)
    if groups == "layer":
        if any(name.startswith("shared_params[") for name in params):
            raise ValueError("groups='layer' goes by names: pass shared_params as a module, or model= as well")
        owners = [name.rpartition(".")[0] for name in params]
        index = {owner: k for k, owner in enumerate(dict.fromkeys(owners))}
        return [index[owner] for owner in owners], len(index)
    if isinstance(groups, str):
        raise ValueError(f"groups: expected 'all', 'layer', 'tensor' or a sequence, found {groups!r}")
    where = group_members(groups, model)
    missing = [name for name, p in params.items() if id(p) not in where]
    if missing:
        raise ValueError(f"groups: shared parameters in no group: {', '.join(missing[:5])}")
    return [where[id(p)] for p in params.values()], len(groups)


def group_members(groups: Sequence[Any], model: nn.Module | None) -> dict[int, int]:
    """The index of its group, by each parameter's id.

    Args:
        groups: One entry per group.
        model: Where names are looked up.

    Raises:
        ValueError: A parameter in two groups.
    """
    where: dict[int, int] = {}
    for k, entry in enumerate(groups):
        members = [entry] if isinstance(entry, nn.Module | Tensor | str) else entry
        for name, p in resolve_params(members, model, f"groups[{k}]").items():
            if id(p) in where:
                raise ValueError(f"groups: parameter {name} is in group {where[id(p)]} and in group {k}")
            where[id(p)] = k
    return where


def find_leaves(roots: Iterable[Tensor]) -> tuple[list[Tensor], set[type]]:
    """The leaves that backward from ``roots`` would accumulate into, and the types of the graph's nodes."""
    roots = list(roots)
    leaves = {id(r): r for r in roots if r.grad_fn is None and r.requires_grad}
    kinds: set[type] = set()
    stack = [r.grad_fn for r in roots if r.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        kinds.add(type(node))
        if type(node).__name__ == "AccumulateGrad":
            leaves[id(node.variable)] = node.variable  # type: ignore[attr-defined]
            continue
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                stack.append(after)
    return list(leaves.values()), kinds
