"""The per-task gradients of one step, as they lie in memory, and the ways to obtain them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmtl.sharded import shard_of
from fastmtl.sparse import Coalescer, Touched, check_layout, compact

Gradients = Tensor | Sequence[Tensor | Sequence[Tensor | None]]
"""Per-task gradients as users hold them: a Jacobian ``[T, P]``; or per parameter one stacked ``[T, *shape]`` tensor;
or per parameter T tensors, None where a task does not reach it, which may be sparse (`fastmtl.sparse`)."""


@dataclass(frozen=True)
class Rows:
    """T gradients over some parameters, never concatenated.

    Attributes:
        grads: If ``stacked``, one tensor ``[T, *shape]`` per parameter; else T entries per parameter, parameter by
            parameter: the gradient, or None where the task does not reach it.
        num_tasks: T.
        stacked: Which of the two.
        groups: Per parameter the index of its group, or None if all are in one.
        num_groups: K.
        touched: Per parameter the rows of it that ``grads`` hold, where its gradients are sparse, else None. None if
            no parameter's are.
    """

    grads: list[Tensor | None]
    num_tasks: int
    stacked: bool = False
    groups: list[int] | None = None
    num_groups: int = 1
    touched: list[Touched | None] | None = None

    @staticmethod
    def by_task(
        tasks: Sequence[Sequence[Tensor | None] | None], groups: list[int] | None = None, num_groups: int = 1
    ) -> Rows:
        """Rows from T lists of equal length, one gradient or None per parameter; None for an absent task.

        Sparse gradients are compacted, which synchronises with the host.
        """
        num_tasks, num_params = len(tasks), next((len(t) for t in tasks if t is not None), 0)
        grads: list[Tensor | None] = [None] * (num_tasks * num_params)
        for t, task in enumerate(tasks):
            if task is not None:
                grads[t::num_tasks] = task
        return Rows._compacted(grads, num_tasks, groups, num_groups)

    @staticmethod
    def _compacted(grads: list[Tensor | None], num_tasks: int, groups: list[int] | None, num_groups: int) -> Rows:
        if not any(g is not None and g.is_sparse for g in grads):
            return Rows(grads, num_tasks, False, groups, num_groups)
        params = [compact(grads[i : i + num_tasks]) for i in range(0, len(grads), num_tasks)]
        blocks = [block for each, _ in params for block in each]
        return Rows(blocks, num_tasks, False, groups, num_groups, [touched for _, touched in params])

    @property
    def num_params(self) -> int:
        """Number of parameters."""
        return len(self.grads) if self.stacked else len(self.grads) // self.num_tasks

    @property
    def device(self) -> torch.device:
        """The device of the first gradient there is."""
        first = next((g for g in self.grads if g is not None), None)
        return torch.device("cpu") if first is None else first.device

    def select(self, params: Sequence[int]) -> Rows:
        """The rows of some of the parameters; groups keep their numbers."""
        groups = None if self.groups is None else [self.groups[p] for p in params]
        n = 1 if self.stacked else self.num_tasks
        grads = [g for p in params for g in self.grads[p * n : (p + 1) * n]]
        touched = None if self.touched is None else [self.touched[p] for p in params]
        return Rows(grads, self.num_tasks, self.stacked, groups, self.num_groups, touched)

    def dtype(self, param: int) -> torch.dtype:
        """That of the gradients of a parameter that some task reaches."""
        n = 1 if self.stacked else self.num_tasks
        return next(g.dtype for g in self.grads[param * n : (param + 1) * n] if g is not None)

    def is_sparse(self, param: int) -> bool:
        """Whether a parameter's gradients are."""
        return self.touched is not None and self.touched[param] is not None

    def unpack(self, param: int, block: Tensor) -> Tensor:
        """A gradient shaped as the parameter's rows, as a gradient of the parameter: sparse where those are."""
        touched = None if self.touched is None else self.touched[param]
        return block if touched is None else touched.sparse(block)

    def reached(self) -> list[int]:
        """The parameters that at least one task reaches."""
        if self.stacked:
            return list(range(self.num_params))
        t = self.num_tasks
        if t == 1:
            return [p for p, g in enumerate(self.grads) if g is not None]
        return [p for p in range(self.num_params) if any(g is not None for g in self.grads[p * t : (p + 1) * t])]

    def only(self, param: int) -> Tensor | None:
        """The gradient of a parameter that exactly one task reaches; None if several do."""
        if self.stacked:
            return None
        found = [g for g in self.grads[param * self.num_tasks : (param + 1) * self.num_tasks] if g is not None]
        return self.unpack(param, found[0]) if len(found) == 1 else None

    def present(self) -> list[list[bool]]:
        """Which task reaches which group, ``[K][T]``."""
        if self.stacked:
            return [[True] * self.num_tasks for _ in range(self.num_groups)]
        present = [[False] * self.num_tasks for _ in range(self.num_groups)]
        for i, g in enumerate(self.grads):
            if g is not None:
                p, t = divmod(i, self.num_tasks)
                present[0 if self.groups is None else self.groups[p]][t] = True
        return present

    def mask(self) -> Tensor | None:
        """Which task reaches which group, bool ``[K, T]`` on the rows' device; None if every task reaches all."""
        if self.stacked or all(g is not None for g in self.grads):
            return None
        present = self.present()
        return None if all(map(all, present)) else constant_mask(present, self.device)


MAX_MASKS = 4096
_masks: dict[tuple, Tensor] = {}


def constant_mask(present: Sequence[Sequence[bool]], device: torch.device) -> Tensor:
    """A bool tensor from the host's pattern, kept for good, so that a pattern is sent to a device once.

    A captured CUDA graph holds the address of its masks, so none is ever dropped; beyond `MAX_MASKS` patterns, new ones
    are not kept.
    """
    key = (device, tuple(map(tuple, present)))
    kept = _masks.get(key)
    if kept is not None:
        return kept
    mask = torch.tensor(present, dtype=torch.bool, device=device)
    if type(mask) is torch.Tensor and len(_masks) < MAX_MASKS:  # not a fake one, of tracing
        _masks[key] = mask
    return mask


def as_rows(grads: Gradients | Rows, groups: Sequence[int] | None = None) -> Rows:
    """Check what a user passed as per-task gradients and bring it into one form, copying only what is sparse.

    Args:
        grads: See `Gradients`.
        groups: Per parameter the index of its group, 0..K-1; None puts all into one.

    Raises:
        TypeError: Something is not a tensor, or of a layout that is not supported.
        ValueError: No gradients, unequal numbers of tasks, several devices, sparse gradients of several shapes for one
            parameter, or ``groups`` does not fit.
    """
    if isinstance(grads, Rows):
        return grads
    params = [grads] if isinstance(grads, Tensor) else list(grads)
    if not params:
        raise ValueError("grads: expected the gradients of at least one parameter, found none")
    stacked = [isinstance(p, Tensor) for p in params]
    num_tasks = set()
    for i, p in enumerate(params):
        if isinstance(p, Tensor):
            if p.dim() == 0:
                raise ValueError(f"grads[{i}]: expected a stacked gradient [T, ...], found a scalar")
            if p.layout is not torch.strided:
                raise TypeError(f"grads[{i}]: expected a dense stacked gradient; pass T sparse tensors, one per task")
            num_tasks.add(p.shape[0])
        elif isinstance(p, Sequence) and not isinstance(p, str):
            num_tasks.add(len(p))
            for t, g in enumerate(p):
                if g is not None and not isinstance(g, Tensor):
                    raise TypeError(f"grads[{i}][{t}]: expected a tensor or None, found {type(g).__name__}")
            _check_sparse(p, i)
        else:
            raise TypeError(f"grads[{i}]: expected a tensor or a sequence of tensors, found {type(p).__name__}")
    if not isinstance(grads, Tensor) and all(isinstance(p, Tensor) and p.dim() == 1 for p in params):
        raise ValueError(
            "grads: a list of 1-D tensors may be one flat gradient per task, or one scalar parameter each: pass "
            "torch.stack(grads) for the former, tensors [T, 1] for the latter"
        )
    if len(num_tasks) != 1:
        raise ValueError(f"grads: parameters with different numbers of tasks: {sorted(num_tasks)}")
    (t,) = num_tasks
    if t == 0:
        raise ValueError("grads: expected at least one task, found none")
    _check_devices(params)
    indices, num_groups = None, 1
    if groups is not None:
        indices = [int(g) for g in groups]
        if len(indices) != len(params):
            raise ValueError(f"groups: expected one index per parameter ({len(params)}), found {len(indices)}")
        if min(indices) < 0:
            raise ValueError(f"groups: expected indices >= 0, found {min(indices)}")
        num_groups = max(indices) + 1
    if all(stacked):
        return Rows(params, t, True, indices, num_groups)  # type: ignore[arg-type]
    flat: list[Tensor | None] = []
    for p in params:
        flat.extend(p.unbind(0) if isinstance(p, Tensor) else p)
    return Rows._compacted(flat, t, indices, num_groups)


def _check_devices(params: Sequence[Tensor | Sequence[Tensor | None]]) -> None:
    """Refuse gradients on several devices."""
    device = None
    for i, p in enumerate(params):
        for t, g in enumerate([p] if isinstance(p, Tensor) else p):
            if g is not None and g.device != device:
                if device is not None:
                    name = f"grads[{i}]" if isinstance(p, Tensor) else f"grads[{i}][{t}]"
                    raise ValueError(f"{name}: on {g.device}, the others on {device}")
                device = g.device


def _check_sparse(grads: Sequence[Tensor | None], param: int) -> None:
    """Refuse layouts that are not supported, and sparse gradients whose shape is not that of the others."""
    there = [(f"grads[{param}][{t}]", g) for t, g in enumerate(grads) if g is not None]
    if all(g.layout is torch.strided for _, g in there):
        return
    first, like = there[0]
    for name, g in there:
        check_layout(g, name)
        if g.shape != like.shape:
            raise ValueError(f"{name}: expected the shape of {first}, {list(like.shape)}, found {list(g.shape)}")


class ThroughGrad:
    """Fills rows by ``torch.autograd.grad``: touches no ``.grad`` and fires no post-accumulate hooks.

    Rows may alias each other, be transposed or have stride 0; sparse ones are coalesced, which synchronises with the
    host. Finds nothing under reentrant checkpointing.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self.coalesce = Coalescer()

    def __enter__(self) -> ThroughGrad:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __call__(
        self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor | None], retain_graph: bool
    ) -> Sequence[Tensor | None]:
        """One backward pass: the gradients of ``sum_i <cotangent_i, output_i>``, None where a parameter is unused."""
        if not self.params:
            return []
        return self.coalesce(
            torch.autograd.grad(outputs, self.params, list(cotangents), retain_graph=retain_graph, allow_unused=True)
        )


class ThroughBackward:
    """Fills rows by ``backward`` and takes what it left in ``.grad``: works wherever ``loss.backward()`` does.

    Of sharded parameters, rows are this rank's shards; see `fastmtl.sharded`.

    While it is entered, the parameters' own ``.grad`` are set aside; leaving puts them back, also after an error.
    Sparse rows are coalesced, which synchronises with the host.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self.coalesce = Coalescer()
        self.aside: list[Tensor | None] = []

    def __enter__(self) -> ThroughBackward:
        self.aside = [p.grad for p in self.params]
        for p in self.params:
            p.grad = None
        return self

    def __exit__(self, *error: object) -> None:
        for p, grad in zip(self.params, self.aside, strict=True):
            p.grad = grad

    def __call__(
        self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor | None], retain_graph: bool
    ) -> Sequence[Tensor | None]:
        """As `ThroughGrad.__call__`; leaves that are not among the parameters accumulate as usual."""
        torch.autograd.backward(list(outputs), list(cotangents), retain_graph=retain_graph)
        return self.take()

    def take(self) -> list[Tensor | None]:
        """What backward has left in ``.grad`` since the last time."""
        # A view lies in a bucket of DistributedDataParallel, which the next pass overwrites.
        found = [(p, p.grad) for p in self.params]
        for p in self.params:
            p.grad = None
        grads = [None if g is None else shard_of(g.clone() if g._is_view() else g, p) for p, g in found]
        return self.coalesce(grads)
