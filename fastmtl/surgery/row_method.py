"""Gradient methods that work on the per-task gradients themselves, or keep some as state: `RowMethod`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastmtl.rows import Rows
from fastmtl.state import commit
from fastmtl.surgery.base import GradientMethod


class RowMethod(GradientMethod):
    """Base class of the methods for which the Gramian is not enough: `ElementwiseMethod` and `TrackingMethod`.

    They go through `fastmtl.backward`, `TaskGradients.combine` and `fastmtl.aggregate`, in one process. What takes the
    Gramian alone, or from somewhere else, refuses them: ``method(gramian)``, ``gramian_params=``, `Amortized`.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refuse: there are no weights for a Gramian.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"{type(self).__name__} works on the per-task gradients, a Gramian is not enough: use "
            "fastmtl.aggregate(gradients, method)"
        )


def refuse_row_method(method: Any, where: str) -> None:
    """Refuse a `RowMethod` where it cannot go.

    Raises:
        ValueError: ``method`` is one; the text begins with ``where``.
    """
    if isinstance(method, RowMethod):
        raise ValueError(f"{where}: {type(method).__name__} works on the whole per-task gradients")


class ElementwiseMethod(RowMethod):
    """A method that makes each element of the combination from the tasks' values of that element alone.

    There are no weights then: `Result.weights` and, unless a policy asks for it, `Result.gramian` are None. Groups make
    no difference. Subclasses implement `merge`, and `advance` if they have state.

    Attributes:
        has_state: There is something to `advance`.
    """

    has_state: bool = False

    def merge(self, rows: Rows, taking_part: Tensor, widen: bool = False) -> list[Tensor | None]:
        """The combination.

        Args:
            rows: Per-task gradients, perhaps scaled, which must scale the combination alike.
            taking_part: ``[K, T]`` float64: 1, or 0 where the task is absent from the group.
            widen: float32 results where the gradients are bfloat16 or float16.

        Returns:
            One tensor per parameter, None where no task reaches it; NaN where what counts is NaN.
        """
        raise NotImplementedError

    def advance(self, finite: Tensor) -> None:
        """Move the state after a training step, if the bool scalar ``finite`` holds."""
        raise NotImplementedError


@dataclass(frozen=True)
class RawRows:
    """What a `TrackingMethod` sees of a step.

    Attributes:
        rows: The per-task gradients, one tensor per task and parameter, of losses multiplied by ``scale``.
        mask: bool ``[K, T]``: which task reaches which group; None if all do.
        losses: Raw values ``[T]`` float64 on the rows' device, NaN where absent; None unless the method needs them.
        scale: float32 scalar on the rows' device, or None: 1.
    """

    rows: Rows
    mask: Tensor | None
    losses: Tensor | None
    scale: Tensor | None

    def raw(self, grad: Tensor, like: Tensor) -> Tensor:
        """A gradient of the raw loss, in the dtype of the state ``like``."""
        grad = grad.to(like.dtype)
        return grad if self.scale is None else grad / self.scale.to(like.dtype)


@dataclass(frozen=True)
class Tracked:
    """What a `TrackingMethod` makes of a step's gradients.

    Attributes:
        rows: What `solve` gets the Gramian of and the weights multiply, shaped and typed as the step's rows.
        scaled: They still have the loss scale.
        kept: The new state: by name, per parameter and task as ``rows`` has them, or None where it stays.
        heads: ``[T]`` float64, the weights of what is not shared; None: as for any method.
    """

    rows: Rows
    scaled: bool
    kept: dict[str, list[Tensor | None]]
    heads: Tensor | None = None


class TrackingMethod(RowMethod):
    """A method that turns the gradients into others by a state of their own size, and weighs those by their Gramian.

    Subclasses implement `track` and `solve`. The state is one buffer ``[T, *shape]`` per parameter and name, in
    ``state_dict`` as ``{name}_{parameter}``: in the dtype of the gradients, float32 for those of 16 bits. It is stored
    after ``.grad`` is written, for the tasks whose values are finite, without a synchronisation; while a step runs, the
    new values take as much memory again.
    """

    positional = True

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)
        self.row_names: dict[str, list[str]] = {}  # the buffers of each name

    def track(self, step: RawRows) -> Tracked:
        """The gradients that count in this step; no state may move here."""
        raise NotImplementedError

    def is_row(self, buffer: str) -> bool:
        """Whether a buffer is one of those per parameter."""
        return any(buffer in names for names in self.row_names.values())

    def recall(self, name: str, step: RawRows) -> list[Tensor]:
        """The state of that name per parameter, ``[T, *shape]``; zeros before the first step.

        Raises:
            ValueError: It is of other parameters or another number of tasks; sparse gradients.
        """
        rows, t = step.rows, step.rows.num_tasks
        if rows.touched is not None and any(x is not None for x in rows.touched):
            raise ValueError(f"{type(self).__name__} keeps dense gradients, found sparse ones")
        known = self.row_names.get(name)
        if known is not None and len(known) != rows.num_params:
            raise ValueError(
                f"{type(self).__name__}: the state is of {len(known)} parameters, this step has {rows.num_params}"
            )
        found = []
        for p in range(rows.num_params):
            like = next((g for g in rows.grads[p * t : (p + 1) * t] if g is not None), None)
            old = None if known is None else getattr(self, known[p])
            if like is None:
                found.append(torch.zeros(0) if old is None else old)
                continue
            shape = (t, *like.shape)
            if old is None or old.numel() == 0:
                dtype = torch.float32 if like.dtype.itemsize == 2 else like.dtype
                old = torch.zeros(shape, dtype=dtype, device=like.device)
            elif old.shape != shape:
                raise ValueError(
                    f"{type(self).__name__}: the state of parameter {p} is of shape {list(old.shape)}, this step needs "
                    f"{list(shape)}; use one method object per set of tasks and parameters"
                )
            found.append(old.to(like.device))
        return found

    def store(self, tracked: Tracked, moves: Tensor) -> None:
        """Keep the new state of the tasks for which bool ``moves [T]`` holds, in training mode."""
        if not self.training:
            return
        t = tracked.rows.num_tasks
        for name, rows in tracked.kept.items():
            names = self.row_names.setdefault(name, [f"{name}_{p}" for p in range(len(rows) // t)])
            for p, buffer in enumerate(names):
                new = rows[p * t : (p + 1) * t]
                like = next((x for x in new if x is not None), None)
                if not hasattr(self, buffer):
                    self.register_buffer(buffer, torch.zeros(0))
                if like is None:
                    continue
                state: Tensor = getattr(self, buffer)
                if state.numel() == 0 or state.device != like.device:
                    fresh = torch.zeros((t, *like.shape), dtype=like.dtype, device=like.device)
                    state = fresh if state.numel() == 0 else fresh.copy_(state)
                    setattr(self, buffer, state)
                for task, x in enumerate(new):
                    if x is not None:
                        commit(state[task], x, moves[task])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
        if own:
            for buffer in (buffer for names in self.row_names.values() for buffer in names):
                delattr(self, buffer)
            self.row_names = {}
            for key in sorted(own, key=lambda key: (len(key), key)):
                name, _, number = key.rpartition("_")
                if name in self.row_states and number.isdigit():
                    self.row_names.setdefault(name, []).append(key)
                    self.register_buffer(key, torch.empty_like(state_dict[prefix + key]))
        super()._load_from_state_dict(state_dict, prefix, *args)

    row_states: tuple[str, ...] = ("rows",)


def separate(rows: Rows, absent: Sequence[bool]) -> Rows:
    """The same rows, one tensor each, without those of absent tasks."""
    grads: list[Tensor | None] = rows.grads
    if rows.stacked:
        grads = [g for stacked in rows.grads if stacked is not None for g in stacked.unbind(0)]
    if any(absent):
        grads = [None if absent[i % rows.num_tasks] else g for i, g in enumerate(grads)]
    return replace(rows, grads=grads, stacked=False)
