"""Sharded parameters (DTensor: FSDP2, tensor parallelism): each rank works on its own shards.

A parameter's ``DTensor`` lies on a mesh of ranks: split along some of the mesh's dimensions (``Shard``), copied along
the others (``Replicate``). Its gradient is a ``DTensor`` of the same mesh, which FSDP2 has averaged over the ranks'
slices of the batch. The kernels read and write local tensors: this rank's shard of the gradient, placed as the
parameter is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def is_sharded(x: Tensor) -> bool:
    """Whether it is a ``DTensor``; imports nothing."""
    return type(x) not in _PLAIN and hasattr(x, "full_tensor")


@torch.no_grad()
def shard_of(x: Tensor, param: Tensor) -> Tensor:
    """This rank's shard of a gradient, which may be empty; plain tensors as they are.

    Where the gradient is placed otherwise than its parameter (``Partial`` above all: terms yet to be summed over the
    ranks), it is redistributed first, which all ranks of the mesh do together.
    """
    if not is_sharded(x):
        return x
    placed: Any = x
    like: Any = param
    if placed.placements != like.placements:
        placed = placed.redistribute(like.device_mesh, like.placements)
    local: Any = placed.to_local()
    return local.wait() if hasattr(local, "wait") else local  # type: ignore[no-any-return]  # on its way until then


@torch.no_grad()
def copy_to_shard(x: Tensor, param: Any) -> Tensor:
    """This rank's shard of a whole gradient that all ranks have; sends nothing. Plain parameters: all of it."""
    if is_sharded(x) or not is_sharded(param):
        return shard_of(x, param)
    from torch.distributed.tensor import distribute_tensor

    return shard_of(distribute_tensor(x, param.device_mesh, param.placements, src_data_rank=None), param)


@contextmanager
def shards_written(lists: Sequence[Sequence[Tensor]]) -> Iterator[list[list[Tensor]]]:
    """Within, shards stand for parameters: what is done to a shard's ``.grad`` is done to its parameter's.

    Args:
        lists: Parameters; those that are not sharded stand for themselves.
    """
    pairs: list[tuple[Any, Tensor]] = []

    @torch.no_grad()
    def stand_in(param: Any) -> Tensor:
        if not is_sharded(param):
            return param  # type: ignore[no-any-return]
        shard = shard_of(param, param).detach()
        if param.grad is not None:
            shard.grad = shard_of(param.grad, param)
        pairs.append((param, shard))
        return shard

    yield [[stand_in(p) for p in params] for params in lists]
    for param, shard in pairs:
        if shard.grad is not None and (param.grad is None or param.grad.placements != param.placements):
            param.grad = _whole(shard.grad, param)


def _whole(shard: Tensor, param: Any) -> Any:
    """The ``DTensor`` placed as a parameter is, of which this is the shard; sends nothing."""
    from torch.distributed.tensor import DTensor

    mesh, placements = param.device_mesh, param.placements
    return DTensor.from_local(shard, mesh, placements, run_check=False, shape=param.shape, stride=param.stride())


@dataclass(frozen=True)
class Layout:
    """How a parameter lies on the ranks. The Gramian of some parameters is the sum of those of their shards.

    Attributes:
        ranks: Of its mesh, ascending; empty: a plain parameter.
        place: Which of the shards this rank has.
        shards: How many different ones there are; the ranks of the mesh hold each equally often.
        split: Along which of the mesh's dimensions. Other splits are other layouts on every rank, even on one whose
            place is the same.
    """

    ranks: tuple[int, ...] = ()
    place: int = 0
    shards: int = 1
    split: tuple[bool, ...] = ()


def layouts(params: Iterable[Tensor]) -> list[Layout]:
    """The layout of each parameter."""
    seen: dict[tuple[Any, ...], Layout] = {}

    def layout(param: Any) -> Layout:
        if not is_sharded(param):
            return Layout()
        mesh = param.device_mesh
        split = tuple(not p.is_replicate() for p in param.placements)
        key = id(mesh), split
        if key not in seen:
            place, shards = 0, 1
            for size, index, dim_is_split in zip(mesh.shape, mesh.get_coordinate(), split, strict=True):
                if dim_is_split:
                    place, shards = place * size + index, shards * size
            seen[key] = Layout(tuple(sorted(mesh.mesh.flatten().tolist())), place, shards, split)
        return seen[key]

    return [layout(p) for p in params]


def stored_parameters(modules: Sequence[nn.Module]) -> dict[int, Tensor]:
    """The shards behind the parameters that FSDP2 has gathered, by these parameters' ids.

    Between the forward and the backward pass, the root and modules with ``reshard_after_forward=False`` have plain
    parameters, which never get a ``.grad``.
    """
    params = [param for module in modules for _, group in _param_groups(module) for param in group.fsdp_params]
    return {id(p._unsharded_param): p.sharded_param for p in params if hasattr(p, "_unsharded_param")}


def check_synchronised(model: nn.Module) -> None:
    """Refuse a model in which FSDP2 was told to leave gradients where they are.

    Raises:
        ValueError: See above.
    """
    if not all(group.reduce_grads and group.all_reduce_grads for _, group in _param_groups(model)):
        raise ValueError(
            "model: after set_requires_gradient_sync(False) or set_requires_all_reduce(False) the tasks' gradients "
            "would mix; set it to True (to accumulate over micro-batches, use TaskGradients)"
        )


@contextmanager
def gathered_once(model: nn.Module | None) -> Iterator[None]:
    """Within, FSDP2 keeps the parameters that it gathered for a backward pass for the following ones."""
    before = [] if model is None else [(m, g.reshard_after_backward) for m, g in _param_groups(model)]
    for module, _ in before:
        module.set_reshard_after_backward(False, recurse=False)
    try:
        yield
    finally:
        for module, reshard in before:
            module.set_reshard_after_backward(reshard, recurse=False)
            if reshard:
                module.reshard()


def _param_groups(model: nn.Module) -> list[tuple[Any, Any]]:
    """The modules that FSDP2 has wrapped, and what it knows of their own parameters, which no public way tells."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    found: list[tuple[Any, Any]] = []
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            one = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            found += [(module, group) for group in one if group is not None]
    return found
