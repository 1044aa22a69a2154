"""State of methods: buffers that survive casts, checkpoints and steps that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.checks import whole
from fastmtl.losses import numbered


def commit(state: Tensor, new: Tensor, where: Tensor) -> None:
    """Store ``new`` in ``state`` if the bool scalar ``where`` holds, without a synchronisation."""
    state.copy_(torch.where(where, new, state))


class Stateful(nn.Module):
    """A module whose buffers and parameters keep their own dtype whatever the model is cast to (``model.half()``)."""

    def __init__(self) -> None:
        super().__init__()
        self._shaped_later: set[str] = set()
        self._names: tuple[str, ...] | None = None

    def remember(self, names: Sequence[str]) -> None:
        """Refuse tasks whose names or order have changed: what is kept per task goes by position.

        Args:
            names: Of this step's tasks. Mere numbers (``fastmtl.losses.numbered``) are not compared.

        Raises:
            ValueError: Earlier steps had other names, or another order.
        """
        if torch.compiler.is_compiling() or tuple(names) == numbered(len(names)):
            return
        if self._names is None:
            self._names = tuple(names)
        elif self._names != tuple(names):
            raise ValueError(
                f"losses: {type(self).__name__} goes by the order of the tasks, which was {', '.join(self._names)}; "
                f"found {', '.join(names)}"
            )

    def forget(self) -> None:
        """Drop what was derived from the state, which has been replaced."""

    def register_state(self, name: str, shape: Sequence[int] | None = None, init: float = 0.0) -> None:
        """Declare a float64 state tensor.

        Args:
            name: The attribute.
            shape: None: known at the first step only; see `state`. Never ``()``: torch.compile loses what is written
                to a scalar of float64 on the CPU (seen in torch 2.13).
            init: What it is filled with.
        """
        assert shape is None or len(shape) > 0
        if shape is None:
            self._shaped_later.add(name)
        self.register_buffer(name, torch.full((0,) if shape is None else tuple(shape), init, dtype=torch.float64))

    def state(self, name: str, like: Tensor, shape: tuple[int, ...], init: float) -> Tensor:
        """A state tensor whose shape was not known at first, on the device of ``like``.

        In evaluation mode a state that is still to take its shape does not take it: what is returned is not kept.

        Args:
            name: As registered.
            like: A tensor of this step.
            shape: What this step needs.
            init: What the state is filled with when first asked for.

        Raises:
            ValueError: The state is of another number of tasks or groups.
        """
        buffer: Tensor = getattr(self, name)
        if buffer.numel() == 0:
            buffer = torch.full(shape, init, dtype=torch.float64, device=like.device)
            if not self.training:
                return buffer
        elif buffer.shape != shape:
            raise ValueError(
                f"{type(self).__name__}.{name}: the state is of shape {list(buffer.shape)}, this step needs "
                f"{list(shape)}; use one method object per set of tasks and groups"
            )
        elif buffer.device != like.device:
            buffer = buffer.to(like.device)
        setattr(self, name, buffer)
        return buffer

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        options = {k: v for k, v in vars(self).items() if not k.startswith("_") and k != "training"}
        return ", ".join(f"{k}={v!r}" for k, v in options.items())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Stateful:
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        params = [p for p in self._parameters.values() if p is not None]
        values = [(p, p.data, None if p.grad is None else p.grad.data) for p in params]
        super()._apply(fn, recurse)
        for param, value, grad in values:
            if param.dtype != value.dtype:
                param.grad, param.data = None, value.to(param.device)
                param.grad = None if grad is None else grad.to(param.device)
        for name, before in exact.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self._shaped_later:
            buffer, saved = self._buffers[name], state_dict.get(prefix + name)
            if buffer is not None and saved is not None and saved.shape != buffer.shape:
                self._buffers[name] = torch.empty(saved.shape, dtype=buffer.dtype, device=buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Epochs(Stateful):
    """Counts steps and ends epochs: by one call, or by itself every ``steps_per_epoch`` steps.

    Subclasses call `register_epochs` in their constructor and `count_step` at the end of each step, and implement
    `close_epoch`. Both ways of ending an epoch give the same state.

    Attributes:
        steps: Steps so far that moved the state, an int64 scalar on the device.
        steps_per_epoch: None: epochs end by `end_epoch`.
    """

    steps: Tensor
    steps_per_epoch: int | None

    def register_epochs(self, steps_per_epoch: int | None) -> None:
        """Declare ``steps``.

        Raises:
            TypeError, ValueError: ``steps_per_epoch`` is not a whole number, or < 1.
        """
        self.steps_per_epoch = None if steps_per_epoch is None else whole("steps_per_epoch", steps_per_epoch, 1)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def close_epoch(self, where: Tensor) -> None:
        """What the end of an epoch does to the state, to be committed if the bool scalar ``where`` holds."""
        raise NotImplementedError

    def end_epoch(self) -> None:
        """End the epoch. One call after each, in training or evaluation mode; it synchronises nothing.

        It does nothing where no option depends on epochs, so that one training loop fits all options.

        Raises:
            RuntimeError: Epochs end by themselves, since ``steps_per_epoch`` was given.
        """
        if self.steps_per_epoch is not None:
            raise RuntimeError(
                f"{type(self).__name__}.end_epoch: epochs end by themselves every {self.steps_per_epoch} steps "
                "(steps_per_epoch)"
            )
        with torch.no_grad():
            self.close_epoch(torch.ones((), dtype=torch.bool, device=self.steps.device))

    def count_step(self, moves: Tensor) -> None:
        """Count this step if the bool scalar ``moves`` holds, and end the epoch after its last one."""
        if self.steps.device != moves.device:
            self.steps = self.steps.to(moves.device)
        self.steps.add_(moves)
        if self.steps_per_epoch is not None:
            self.close_epoch(moves & (self.steps % self.steps_per_epoch == 0))
