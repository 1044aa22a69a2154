"""Sparse gradients (``nn.Embedding(sparse=True)``), compacted to the rows of the parameter that they touch.

The gradient of a parameter ``[N, *shape]`` is a COO tensor of one sparse dimension: indices ``[nnz]``, with duplicates,
and values ``[nnz, *shape]``. The tasks' gradients become dense blocks ``[n, *shape]`` over the union of the n indices
that any of them touches; the kernels read the blocks as they read any gradient, and their outcome is sparse again.
Nothing here takes time or memory proportional to N. Sorting and counting indices synchronises with the host on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def check_layout(grad: Tensor, name: str) -> None:
    """Refuse layouts other than strided and COO with one sparse dimension.

    Raises:
        TypeError: See above; the text begins with ``name``.
    """
    if grad.layout is torch.strided or _is_row_sparse(grad):
        return
    found = str(grad.layout).removeprefix("torch.")
    if grad.is_sparse:
        found = f"{grad.sparse_dim()} sparse dimensions"
    raise TypeError(f"{name}: sparse gradients are supported as COO tensors of one sparse dimension, found {found}")


@dataclass(frozen=True)
class Touched:
    """The rows of one parameter that sparse gradients touch.

    Attributes:
        indices: ``[n]`` int64, ascending, each once.
        shape: Of the parameter.
    """

    indices: Tensor
    shape: torch.Size

    def sparse(self, block: Tensor) -> Tensor:
        """The coalesced sparse tensor of the parameter's shape with the rows ``block``; copies nothing."""
        indices = self.indices.unsqueeze(0)
        return torch.sparse_coo_tensor(indices, block, self.shape, is_coalesced=True, check_invariants=False)


class Coalescer:
    """Sums the duplicates in sparse gradients, one backward pass after another.

    The outcome shares no memory with its input (a gradient's indices are often the very input of the network). Passes
    in succession that find equal indices share one sort and one tensor of indices. Sums go in the order of the input,
    in float32 for narrower types: the same on every run.
    """

    def __init__(self) -> None:
        # Per parameter the last indices, and as sorted: each once, the order, and where each begins in it.
        self._seen: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def __call__(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """One pass's gradients, the sparse ones coalesced; those that `check_layout` refuses stay as they are."""
        return [g if g is None or not g.is_sparse else self.one(g, param) for param, g in enumerate(grads)]

    @torch.no_grad()
    def one(self, grad: Tensor, param: int = 0) -> Tensor:
        """One gradient, of the parameter of that number."""
        if not _is_row_sparse(grad) or not grad.is_floating_point():
            return grad
        found, values = grad._indices()[0], grad._values()
        if param not in self._seen or not torch.equal(self._seen[param][0], found):
            ascending, order = found.sort(stable=True)
            unique, counts = torch.unique_consecutive(ascending, return_counts=True)
            self._seen[param] = found, unique, order, F.pad(counts.cumsum(0), (1, 0))
        _, unique, order, offsets = self._seen[param]
        flat = values.reshape(len(values), math.prod(values.shape[1:]))
        sums = F.embedding_bag(order, flat, offsets, mode="sum", include_last_offset=True)
        return Touched(unique, grad.shape).sparse(sums.view(len(unique), *values.shape[1:]))


def compact(grads: Sequence[Tensor | None]) -> tuple[list[Tensor | None], Touched | None]:
    """One parameter's gradients of T tasks as dense tensors of one shape.

    Args:
        grads: Sparse or dense, of one shape; None where a task does not reach the parameter.

    Returns:
        Blocks ``[n, *shape]`` over the union of the touched rows, and which these are. Where one of the gradients is
        dense, all are made dense, and there is no `Touched`.

    Note:
        Cost: gradients that are coalesced and touch the same rows are taken as they lie. Else T blocks of the union's
        size: tasks that touch n rows each and none in common need T^2 n rows together.
    """
    there = [g for g in grads if g is not None]
    if not any(g.is_sparse for g in there):
        return list(grads), None
    if not all(g.is_sparse for g in there):
        return [g.to_dense() if g is not None and g.is_sparse else g for g in grads], None
    coalesce = Coalescer()
    coalesced = [g if g is None or g.is_coalesced() else coalesce.one(g) for g in grads]
    indices = [g._indices()[0] for g in coalesced if g is not None]
    if all(torch.equal(indices[0], other) for other in indices[1:]):
        return [g if g is None else g._values() for g in coalesced], Touched(indices[0].clone(), there[0].shape)
    union = torch.cat(indices).unique()

    def block(grad: Tensor) -> Tensor:
        values = grad._values()
        where = torch.searchsorted(union, grad._indices()[0])
        return values.new_zeros(len(union), *values.shape[1:]).index_copy_(0, where, values)

    return [g if g is None else block(g) for g in coalesced], Touched(union, there[0].shape)


def add(a: Tensor, b: Tensor) -> Tensor:
    """``a + b``, a new tensor: coalesced if both are sparse, else dense."""
    if a.is_sparse and b.is_sparse:  # torch 2.13 cannot add those of float16 on the CPU
        indices = torch.cat([a._indices(), b._indices()], 1)
        values = torch.cat([a._values(), b._values()])
        return Coalescer().one(torch.sparse_coo_tensor(indices, values, a.shape, check_invariants=False))
    return b + a if a.is_sparse else a + b


def _is_row_sparse(grad: Tensor) -> bool:
    return grad.is_sparse and grad.sparse_dim() == 1
