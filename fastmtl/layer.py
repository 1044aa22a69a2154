"""Feature level: surgery as a layer between trunk and heads, within one ordinary backward pass."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl import ops
from fastmtl.checks import whole
from fastmtl.engine import Method, check_method, decide, restored_on_error, scale_of, unscaled
from fastmtl.losses import Losses, LossesLike, numbered, parse_losses, spread, stack_scalars
from fastmtl.result import Result
from fastmtl.rows import Rows
from fastmtl.weighting.base import LossWeighting

IDLE_CALLS = 10

# Compiled graphs cannot hold a Python object: an opaque operator finds the layer by number instead.
_layers: weakref.WeakValueDictionary[int, FeatureSurgery] = weakref.WeakValueDictionary()
_numbers = itertools.count()


# State moves inside, so a graph that is captured and replayed by torch.compile must not contain it.
_TAGS = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []  # not in every torch >= 2.10


@torch.library.custom_op("fastmtl::layer_weights", mutates_args=(), tags=_TAGS)
def _layer_weights(gramian: Tensor, number: int) -> Tensor:
    return _layers[number]._weigh(gramian)


@_layer_weights.register_fake
def _(gramian: Tensor, number: int) -> Tensor:
    return gramian.new_empty(gramian.shape[:2])


class _Surgery(torch.autograd.Function):
    """Forward: one copy of the features per task. Backward: their gradients, combined.

    In eager mode the copies are T outputs, whose gradients are read where they lie. In a graph that torch.compile
    traces they are one expanded output, to be unbound outside: T outputs would be wrong there (surgery is skipped, or
    rows are mixed up).
    """

    @staticmethod
    def forward(ctx: Any, number: int, num_tasks: int, precision: str, features: Tensor) -> Tensor | tuple[Tensor, ...]:
        ctx.number = number
        ctx.precision = precision
        ctx.set_materialize_grads(False)
        copies = features.unsqueeze(0).expand(num_tasks, *features.shape)
        if torch.compiler.is_compiling():
            ctx.layer = None
            return copies
        ctx.layer = _layers[number]  # alive until backward
        ctx.used = False
        return copies.unbind(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, None, None, Tensor | None]:
        if torch.is_grad_enabled():
            raise RuntimeError("FeatureSurgery cannot be differentiated twice (create_graph=True)")
        first = next((grad for grad in grads if grad is not None), None)
        if first is None:
            return None, None, None, None
        stacked = ctx.layer is None
        rows = Rows([first], first.shape[0], stacked) if stacked else Rows([*grads], len(grads))
        gramian = ops.gram(rows, precision=ctx.precision)
        if torch.compiler.is_compiling():
            weights = torch.ops.fastmtl.layer_weights(gramian, ctx.number)
            return None, None, None, ops.combine(rows, weights)[0]
        if ctx.used:
            raise RuntimeError(
                "FeatureSurgery: a second backward pass through one forward pass; all losses must reach the layer "
                "in one: surgery.total(losses).backward()"
            )
        ctx.used = True
        with restored_on_error(ctx.layer.method):
            weights = ctx.layer._weigh(gramian, rows.mask())
            return None, None, None, ops.combine(rows, weights)[0]


class FeatureSurgery(nn.Module):
    """Gradient surgery on the shared representation: one trunk pass, whatever the number of tasks.

    Put it between trunk and heads; each head must read its own copy of the features, ``zs[t]``. In the ordinary
    ``backward()`` the T gradients that arrive at the features are combined by the method, flattened over the whole
    batch, and one gradient goes on into the trunk. With `MGDA` this is MGDA-UB. Heads get their plain gradients. A loss
    weighting as the method weighs the losses themselves, heads included.

    A task is absent from a step if its loss is None in `total`, or does not depend on its copy of the features. In
    compiled graphs zeros arrive in the latter case, and zero is not absent: there, pass None.

    In ``eval()`` mode, without gradients, and on features that need none, the layer is the identity, state does not
    move, and the T outputs are the same tensor: do not change one in place. (In training that raises.)

    Args:
        method: A gradient method with ``scale_heads=False``, or a loss weighting.
        num_tasks: T.
        scaler: The ``torch.amp.GradScaler`` that scales the total loss, if any: the method then sees raw gradients.
        nonfinite: ``"propagate"`` or ``"drop_task"``; see `fastmtl.backward`. The latter reaches the trunk only.
        precision: ``"full"`` or ``"fast"``, of the Gramian; see `fastmtl.ops.gram`.

    Attributes:
        result: `Result` of the last backward pass (``weights [T]``, ``gramian [T, T]`` over the features), or None.
            With a loss weighting, of the last `total`.

    Raises:
        TypeError: ``method`` is not one.
        ValueError: A method that scales heads, which a layer cannot do, or another option out of range.

    Note:
        Cost: T x (size of the features) instead of T x P: two reads of the features' gradients and one write. No host
        synchronisation. The losses must reach the layer in one backward pass of their sum: call `total` in every step,
        and its ``backward()`` before the next `total`. A second pass through the same forward pass raises.

    Reference:
        Sener and Koltun, "Multi-Task Learning as Multi-Objective Optimization", NeurIPS 2018, section 3.3, generalised
        from MGDA to every method.

    Example:
        >>> import torch, fastmtl
        >>> surgery = fastmtl.FeatureSurgery(fastmtl.MGDA(), num_tasks=2)
        >>> features = torch.ones(2, requires_grad=True)
        >>> a, b = surgery(features)
        >>> surgery.total([a[0], 2 * b[1]]).backward()
        >>> features.grad
        tensor([0.8000, 0.4000])
    """

    losses: Tensor
    present: Tensor

    def __init__(
        self,
        method: Method,
        num_tasks: int,
        *,
        scaler: Any = None,
        nonfinite: str = "propagate",
        precision: str = "full",
    ) -> None:
        super().__init__()
        check_method(method)
        num_tasks = whole("num_tasks", num_tasks, 1)
        if isinstance(method, LossWeighting) and method.num_tasks not in (None, num_tasks):
            raise ValueError(f"num_tasks: {type(method).__name__} is for {method.num_tasks} tasks, found {num_tasks}")
        if nonfinite not in ("propagate", "drop_task"):
            raise ValueError(f"nonfinite: a layer knows 'propagate' and 'drop_task', found {nonfinite!r}")
        if nonfinite == "drop_task" and scaler is not None:
            raise ValueError("nonfinite='drop_task' would hide overflows from the scaler")
        if not isinstance(method, LossWeighting) and method.scale_heads:
            raise ValueError(
                f"{type(method).__name__}: a layer cannot scale the heads; construct it with scale_heads=False"
            )
        self.method = method
        self.num_tasks = num_tasks
        self.scaler = scaler
        self.nonfinite = nonfinite
        ops.check_precision(precision)
        self.precision = precision
        self.result: Result | None = None
        # What `total` saw, for the backward pass. Buffers, because compiled graphs update those faithfully.
        self.register_buffer("losses", torch.zeros(num_tasks, dtype=torch.float64), persistent=False)
        self.register_buffer("present", torch.ones(num_tasks, dtype=torch.bool), persistent=False)
        self._names = numbered(num_tasks)
        self._has_losses = False
        self._all_present = True
        self._idle = 0  # forward passes since the layer last did something
        self._register()

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """T copies of the features, one per head.

        Args:
            features: The shared representation, any shape, floating.

        Returns:
            T tensors of that shape.
        """
        if not isinstance(features, Tensor):
            raise TypeError(f"features: expected a tensor, found {type(features).__name__}")
        if not (self.training and torch.is_grad_enabled() and features.requires_grad):
            return (features,) * self.num_tasks
        self._watch()
        if isinstance(self.method, LossWeighting):
            return (features,) * self.num_tasks
        # A new step, whose losses are still to come; unless activation checkpointing repeats this one within backward.
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            self._has_losses = False
            self._all_present = True
        copies = _Surgery.apply(self._number, self.num_tasks, self.precision, features)
        return copies.unbind(0) if isinstance(copies, Tensor) else copies

    def total(self, losses: LossesLike) -> Tensor:
        """The scalar to call ``backward()`` on, and the layer's way to learn loss values and absent tasks.

        Args:
            losses: T raw scalars; None: the task is absent from this batch.

        Returns:
            Their sum; or what the loss weighting makes of them.

        Raises:
            TypeError, ValueError: As for `fastmtl.backward`.
        """
        if isinstance(self.method, LossWeighting):
            total: Tensor = self.method(losses)
            if not torch.compiler.is_compiling():
                self._idle = 0
                self.result = None if self.method.weights is None else Result(None, self.method.weights, None)
            return total
        parsed = parse_losses(losses, differentiable=False)
        if len(parsed) != self.num_tasks:
            raise ValueError(f"losses: expected {self.num_tasks} tasks, found {len(parsed)}")
        if not torch.compiler.is_compiling():
            self._names = parsed.names
            if self.method.positional:
                self.method.remember(parsed.names)
        values = stack_scalars(parsed.present)
        if self.training and torch.is_grad_enabled():
            if self.losses.device != values.device:  # without parameters, it is easily forgotten in model.to(device)
                self.losses, self.present = self.losses.to(values.device), self.present.to(values.device)
            tasks = [t for t, x in enumerate(parsed.items) if x is not None]
            all_present = len(tasks) == self.num_tasks
            with torch.no_grad():
                self.losses.copy_(values if all_present else spread(values, tasks, self.num_tasks))
                self.present.fill_(all_present)
                for t in [] if all_present else tasks:
                    self.present[t] = True
            self._has_losses, self._all_present = True, all_present
        return values.sum()

    def _weigh(self, gramian: Tensor, reached: Tensor | None = None) -> Tensor:
        """``weights [1, T]``; ``reached``: bool ``[1, T]``: whose gradient arrived; None: not known, or all."""
        assert not isinstance(self.method, LossWeighting)
        losses = None
        if self.method.needs_losses or self.nonfinite != "propagate":
            if self._has_losses:
                losses = Losses(self._names, self.losses.unbind(0))
            elif self.method.needs_losses:
                name = type(self.method).__name__
                raise ValueError(f"{name} needs the losses: call surgery.total(losses).backward()")
        self._idle = 0
        raw = unscaled(gramian, scale_of(self.scaler, gramian.device))
        mask = reached
        if not self._all_present:
            declared = self.present.unsqueeze(0)
            mask = declared if reached is None else declared & reached
        weights = decide(self.method, raw, mask, losses, self._names, self.nonfinite).weights
        self.result = Result(None, weights[0], raw[0])
        return weights

    def _watch(self) -> None:
        """Warn once if the layer is passed again and again, and never used."""
        if torch.compiler.is_compiling():
            return
        self._idle += 1
        if self._idle == IDLE_CALLS:
            need = "no gradient came back: head t must read zs[t] of zs = surgery(features)"
            if isinstance(self.method, LossWeighting):
                need = "no total(losses): without it the losses are not weighed"
            warnings.warn(f"FeatureSurgery: {IDLE_CALLS} forward passes, and {need}", stacklevel=4)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FeatureSurgery:
        super()._apply(fn, recurse)
        self.losses = self.losses.double()  # model.half() must not round the values of losses
        return self

    def _register(self) -> None:
        self._number = next(_numbers)
        _layers[self._number] = self

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        return f"num_tasks={self.num_tasks}, nonfinite={self.nonfinite!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "result": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._register()
