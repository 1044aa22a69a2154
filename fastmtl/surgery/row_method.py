"""Gradient methods that work on the per-task gradients themselves, or keep some as state: `RowMethod`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastmtl.rows import Rows
from fastmtl.state import commit
from fastmtl.surgery.base import GradientMethod

Moved = Callable[[Tensor, Tensor, int], Tensor]


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
        kept: The new state, per parameter and task as ``rows`` has them, or None where it stays.
        heads: ``[T]`` float64, the weights of what is not shared; None: as for any method.
        everyone: All tasks are weighed, by what ``rows`` has of them, also those absent from this step.
    """

    rows: Rows
    scaled: bool
    kept: Sequence[Tensor | None]
    heads: Tensor | None = None
    everyone: bool = False


class TrackingMethod(RowMethod):
    """A method that turns the gradients into others by a state of their own size, and weighs those by their Gramian.

    Subclasses implement `track` and `solve`. The state is one buffer ``[T, *shape]`` per parameter, ``rows_0``, ... in
    ``state_dict``: in the dtype of the gradients, float32 for those of 16 bits. It is stored after ``.grad`` is
    written, for the tasks whose values are finite, without a synchronisation; while a step runs, the new values take as
    much memory again.
    """

    positional = True

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)
        self._num_params = 0

    def track(self, step: RawRows) -> Tracked:
        """The gradients that count in this step; no state may move here."""
        raise NotImplementedError

    def move(self, step: RawRows, moved: Moved) -> list[Tensor | None]:
        """The new state of the name ``"rows"``, per parameter and task; None where there is no gradient.

        Args:
            step: This step.
            moved: From the old state and the raw gradient, both in the state's dtype, and the task, to the new state.
        """
        t, kept = step.rows.num_tasks, []
        for p, old in enumerate(self.recall(step)):
            for task, grad in enumerate(step.rows.grads[p * t : (p + 1) * t]):
                kept.append(None if grad is None else moved(old[task], step.raw(grad, old), task))
        return kept

    def follow(self, step: RawRows, moved: Moved, heads: Tensor | None = None) -> Tracked:
        """The step in which the new state itself is what counts; see `move`."""
        kept = self.move(step, moved)
        grads = [None if x is None or g is None else x.to(g.dtype) for x, g in zip(kept, step.rows.grads, strict=True)]
        return Tracked(replace(step.rows, grads=grads), False, kept, heads)

    def is_row(self, buffer: str) -> bool:
        """Whether a buffer is one of those per parameter."""
        return buffer.startswith("rows_")

    def recall(self, step: RawRows) -> list[Tensor]:
        """The state per parameter, ``[T, *shape]``; zeros where there is none yet.

        Raises:
            ValueError: It is of other parameters or another number of tasks; sparse gradients.
        """
        rows, t = step.rows, step.rows.num_tasks
        name = type(self).__name__
        if rows.touched is not None and any(x is not None for x in rows.touched):
            raise ValueError(f"{name} keeps dense gradients, found sparse ones")
        if self._num_params not in (0, rows.num_params):
            raise ValueError(f"{name}: the state is of {self._num_params} parameters, this step has {rows.num_params}")
        found = []
        for p in range(rows.num_params):
            like = next((g for g in rows.grads[p * t : (p + 1) * t] if g is not None), None)
            old = getattr(self, f"rows_{p}") if p < self._num_params else torch.zeros(0)
            if like is not None and old.numel() == 0:
                dtype = torch.float32 if like.dtype.itemsize == 2 else like.dtype
                old = torch.zeros((t, *like.shape), dtype=dtype, device=like.device)
            elif like is not None and old.shape != (t, *like.shape):
                raise ValueError(
                    f"{name}: the state of parameter {p} is of shape {list(old.shape)}, this step needs "
                    f"{[t, *like.shape]}; use one method object per set of tasks and parameters"
                )
            found.append(old if like is None else old.to(like.device))
        return found

    def store(self, tracked: Tracked, moves: Tensor) -> None:
        """Keep the new state of the tasks for which bool ``moves [T]`` holds, in training mode."""
        if not self.training:
            return
        t = tracked.rows.num_tasks
        for p in range(tracked.rows.num_params):
            if p >= self._num_params:
                self.register_buffer(f"rows_{p}", torch.zeros(0))
            new = tracked.kept[p * t : (p + 1) * t]
            like = next((x for x in new if x is not None), None)
            if like is None:
                continue
            state: Tensor = getattr(self, f"rows_{p}")
            if state.numel() == 0:
                state = torch.zeros((t, *like.shape), dtype=like.dtype, device=like.device)
            state = state.to(like.device)
            setattr(self, f"rows_{p}", state)
            for task, x in enumerate(new):
                if x is not None:
                    commit(state[task], x, moves[task])
        self._num_params = tracked.rows.num_params

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if any(key.startswith(prefix) for key in state_dict):  # the checkpoint's parameters take the place of ours
            for p in range(self._num_params):
                delattr(self, f"rows_{p}")
            self._num_params = 0
            while (saved := state_dict.get(f"{prefix}rows_{self._num_params}")) is not None:
                self.register_buffer(f"rows_{self._num_params}", torch.empty_like(saved))
                self._num_params += 1
        super()._load_from_state_dict(state_dict, prefix, *args)


def separate(rows: Rows, absent: Sequence[bool]) -> Rows:
    """The same rows, one tensor each, without those of absent tasks."""
    grads: list[Tensor | None] = rows.grads
    if rows.stacked:
        grads = [g for stacked in rows.grads if stacked is not None for g in stacked.unbind(0)]
    if any(absent):
        grads = [None if absent[i % rows.num_tasks] else g for i, g in enumerate(grads)]
    return replace(rows, grads=grads, stacked=False)
