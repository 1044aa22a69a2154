"""From combined gradients to ``.grad``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl import ops, sparse
from fastmtl.rows import Rows
from fastmtl.sharded import shards_written


def accumulate(
    *jobs: tuple[Sequence[Tensor], Rows, Tensor | None],
    own: tuple[Sequence[Tensor], Sequence[Tensor | None]] = ((), ()),
) -> None:
    """Add weighted rows to parameters' ``.grad``, as ``loss.backward()`` would.

    A parameter that no task reaches is left alone. Nothing is written if anything raises. Sparse rows give a sparse,
    coalesced ``.grad``, unless there is a dense one to be added to. Rows may be narrower than their parameter. Those of
    a sharded parameter are of this rank's shard; its ``.grad`` is sharded as the parameter is.

    Args:
        jobs: Parameters, their rows, and the rows' weights ``[K, T]``; None: all count 1.
        own: Parameters, and ready gradients that nothing else holds.

    Raises:
        TypeError: A ``.grad`` to be added to is not supported; see `refuse_unsupported`.
    """
    in_place: list[tuple[Rows, Tensor, list[Tensor]]] = []  # rows, their weights, and the dense .grad that there are
    added: list[tuple[Tensor, Tensor]] = []  # a dense .grad that there is, and what is added to it
    new: list[tuple[Tensor, Tensor]] = []  # a parameter, and what becomes its .grad

    def take(param: Tensor, grad: Tensor) -> None:
        if param.grad is None:
            new.append((param, grad))
        elif param.grad.is_sparse:
            new.append((param, sparse.add(param.grad, grad)))
        else:
            added.append((param.grad, grad))

    with torch.no_grad(), shards_written([params for params, *_ in jobs]) as written:
        refuse_unsupported(own[0], [p.grad for p in own[0]], {})
        for param, ready in zip(*own, strict=True):
            if ready is not None:
                take(param, ready)
        for params, (_, rows, weights) in zip(written, jobs, strict=True):
            refuse_unsupported(params, [p.grad for p in params], {})
            reached = rows.reached()
            if weights is None:  # heads, mostly: one task each
                alone = {p: row for p in reached if (row := rows.only(p)) is not None}
                for p, row in alone.items():  # may share its memory with another tensor, so a copy becomes .grad
                    take(params[p], _own(row, params[p]) if params[p].grad is None else row)
                reached = [p for p in reached if p not in alone]
                weights = torch.ones(rows.num_groups, rows.num_tasks, device=rows.device)
            dense: dict[int, Tensor] = {}
            fresh: dict[torch.dtype | None, list[int]] = {}  # by dtype, None where it is that of the rows
            for p in reached:
                grad, dtype = params[p].grad, params[p].dtype
                if grad is None or grad.is_sparse or rows.is_sparse(p):
                    fresh.setdefault(None if rows.dtype(p) == dtype else dtype, []).append(p)
                else:
                    dense[p] = grad
            if dense:
                in_place.append((rows.select([*dense]), weights, [*dense.values()]))
            for wide, some in fresh.items():
                part = rows if len(some) == rows.num_params else rows.select(some)
                for p, combined in zip(some, ops.combine(part, weights, dtype=wide), strict=True):
                    take(params[p], combined)
        for part, weights, grads in in_place:
            ops.combine_(part, weights, grads)
        for grad, more in added:
            grad.add_(more)
        for param, grad in new:
            as_it_is = grad.dtype == param.dtype and (grad.is_sparse or grad.stride() == param.stride())
            param.grad = grad if as_it_is else _own(grad, param)


def _own(grad: Tensor, param: Tensor) -> Tensor:
    """A copy of a gradient with its parameter's dtype, and strides if it is dense."""
    if grad.is_sparse:
        return grad.to(param.dtype, copy=True)
    if grad.dtype == param.dtype and grad.stride() == param.stride():
        return grad.clone()
    return torch.empty_like(param).copy_(grad)


def refuse_unsupported(params: Sequence[Tensor], grads: Sequence[Tensor | None], names: dict[int, str]) -> None:
    """Refuse gradients that no kernel reads.

    Args:
        params: Parameters.
        grads: A gradient for each, or None.
        names: The parameters' names by id, where known.

    Raises:
        TypeError: A gradient is complex, or sparse in another way than `fastmtl.sparse` knows; the text names the
            parameter.
    """
    for p, g in zip(params, grads, strict=True):
        if g is None or (type(g) is Tensor and g.layout is torch.strided and not g.is_complex()):
            continue
        name = names.get(id(p), f"a parameter of shape {list(p.shape)}")
        sparse.check_layout(g, name)
        if g.is_complex():
            raise TypeError(f"{name}: complex gradients are not supported")
