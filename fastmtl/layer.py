"""Feature level: surgery as a layer between trunk and heads, within one ordinary backward pass."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl import ops
from fastmtl.engine import Method, check_method, decide, scale_of, unscaled
from fastmtl.losses import Losses, LossesLike, parse_losses, stack_scalars
from fastmtl.result import Result
from fastmtl.rows import Rows
from fastmtl.weighting.base import LossWeighting

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
    """Forward: T copies of the features as one expanded tensor. Backward: their gradients, combined."""

    # T outputs, or views made in here, would be wrong in compiled graphs: surgery is skipped or rows are mixed up.
    @staticmethod
    def forward(ctx: Any, number: int, num_tasks: int, features: Tensor) -> Tensor:
        ctx.number = number
        ctx.layer = None if torch.compiler.is_compiling() else _layers[number]  # alive until backward
        ctx.used = False
        ctx.set_materialize_grads(False)
        return features.unsqueeze(0).expand(num_tasks, *features.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, None, Tensor | None]:
        if torch.is_grad_enabled():
            raise RuntimeError("FeatureSurgery cannot be differentiated twice (create_graph=True)")
        if grad is None:
            return None, None, None
        if not torch.compiler.is_compiling():
            if ctx.used:
                raise RuntimeError(
                    "FeatureSurgery: a second backward pass through one forward pass; all losses must reach the layer "
                    "in one: surgery.total(losses).backward()"
                )
            ctx.used = True
        rows = Rows([grad], grad.shape[0], stacked=True)
        gramian = ops.gram(rows)
        if torch.compiler.is_compiling():
            weights = torch.ops.fastmtl.layer_weights(gramian, ctx.number)
        else:
            weights = ctx.layer._weigh(gramian)
        return None, None, ops.combine(rows, weights)[0]


class FeatureSurgery(nn.Module):
    """Gradient surgery on the shared representation: one trunk pass, whatever the number of tasks.

    Put it between trunk and heads; each head must read its own copy of the features, ``zs[t]``. In the ordinary
    ``backward()`` the T gradients that arrive at the features are combined by the method, flattened over the whole
    batch, and one gradient goes on into the trunk. With `MGDA` this is MGDA-UB. Heads get their plain gradients. A loss
    weighting as the method weighs the losses themselves, heads included.

    In ``eval()`` mode, without gradients, and on features that need none, the layer is the identity, state does not
    move, and the T outputs are the same tensor: do not change one in place. (In training that raises.)

    Args:
        method: A gradient method with ``scale_heads=False``, or a loss weighting.
        num_tasks: T.
        scaler: The ``torch.amp.GradScaler`` that scales the total loss, if any: the method then sees raw gradients.
        nonfinite: ``"propagate"`` or ``"drop_task"``; see `fastmtl.backward`. The latter reaches the trunk only.

    Attributes:
        result: `Result` of the last backward pass (``weights [T]``, ``gramian [T, T]`` over the features), or None.

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

    def __init__(self, method: Method, num_tasks: int, *, scaler: Any = None, nonfinite: str = "propagate") -> None:
        super().__init__()
        check_method(method)
        if num_tasks < 1:
            raise ValueError(f"num_tasks: expected at least 1, found {num_tasks}")
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
        self.result: Result | None = None
        # What `total` saw, for the backward pass. Buffers, because compiled graphs update those faithfully.
        self.register_buffer("losses", torch.zeros(num_tasks, dtype=torch.float64), persistent=False)
        self.register_buffer("present", torch.ones(num_tasks, dtype=torch.bool), persistent=False)
        self._has_losses = False
        self._all_present = True
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
        identity = not (self.training and torch.is_grad_enabled() and features.requires_grad)
        if identity or isinstance(self.method, LossWeighting):
            return (features,) * self.num_tasks
        # A new step, whose losses are still to come; unless activation checkpointing repeats this one within backward.
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            self._has_losses = False
            self._all_present = True
        return _Surgery.apply(self._number, self.num_tasks, features).unbind(0)

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
            return self.method(losses)  # type: ignore[no-any-return]
        parsed = parse_losses(losses, differentiable=False)
        if len(parsed) != self.num_tasks:
            raise ValueError(f"losses: expected {self.num_tasks} tasks, found {len(parsed)}")
        if self.training and torch.is_grad_enabled():
            device = parsed.device
            if self.losses.device != device:  # a layer without parameters is easily forgotten in model.to(device)
                self.losses, self.present = self.losses.to(device), self.present.to(device)
            with torch.no_grad():
                self.losses.copy_(parsed.values())
                self.present.fill_(True)
                for t, x in enumerate(parsed.items):
                    if x is None:
                        self.present[t] = False
            self._has_losses = True
            self._all_present = all(x is not None for x in parsed.items)
        return stack_scalars(parsed.present).sum()

    def _weigh(self, gramian: Tensor) -> Tensor:
        assert not isinstance(self.method, LossWeighting)
        names = tuple(f"task {t}" for t in range(self.num_tasks))
        losses = Losses(names, self.losses.unbind(0)) if self._has_losses else None
        if losses is None and self.method.needs_losses:
            raise ValueError(f"{type(self.method).__name__} needs the losses: call surgery.total(losses).backward()")
        raw = unscaled(gramian, scale_of(self.scaler, gramian.device))
        mask = None if self._all_present else self.present.unsqueeze(0)
        weights = decide(self.method, raw, mask, losses, names, self.nonfinite).weights
        self.result = Result(None, weights[0], raw[0])
        return weights

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
