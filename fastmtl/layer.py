"""Feature level: surgery as a layer between trunk and heads, within one ordinary backward pass."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastmtl import ops, watch
from fastmtl.checks import whole
from fastmtl.distributed import Group, Ranks, check_group, ranks_of, several
from fastmtl.engine import Method, check_method, decide, restored_on_error, scale_of, unscaled
from fastmtl.exchange import describe, handshake
from fastmtl.losses import Losses, LossesLike, numbered, parse_losses, spread, stack_scalars
from fastmtl.result import Result
from fastmtl.rows import Rows, constant_mask
from fastmtl.surgery.base import GradientMethod, Step
from fastmtl.surgery.row_method import refuse_row_method
from fastmtl.weighting.base import LossWeighting

IDLE_CALLS = 10
SKIPPED = 4  # arguments of `_Surgery` before the features
ONE_PASS = (
    "all losses must reach the layer in one pass: surgery.total(losses).backward(), with None for the loss of a task "
    "that is absent from this batch"
)

# Compiled graphs cannot hold a Python object: an opaque operator finds the layer by number instead.
_layers: weakref.WeakValueDictionary[int, FeatureSurgery] = weakref.WeakValueDictionary()
_numbers = itertools.count()


# State moves inside, so a graph that is captured and replayed by torch.compile must not contain it.
_TAGS = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []  # not in every torch >= 2.10


@torch.library.custom_op("fastmtl::layer_weights", mutates_args=(), tags=_TAGS)
def _layer_weights(gramian: Tensor, reached: list[bool] | None, number: int) -> Tensor:
    layer = _layers[number]
    layer._refuse_single_loss(reached)
    with restored_on_error(layer.method):
        return layer._weigh(gramian, reached)


@_layer_weights.register_fake
def _(gramian: Tensor, reached: list[bool] | None, number: int) -> Tensor:
    return gramian.new_empty(gramian.shape[:2])


class _Surgery(torch.autograd.Function):
    """Forward: one copy of each feature per task. Backward: their gradients, combined.

    In eager mode the copies are T outputs per feature, whose gradients are read where they lie. In a graph that
    torch.compile traces they are one expanded output, to be unbound outside: T outputs would be wrong there (surgery is
    skipped, or rows are mixed up).
    """

    @staticmethod
    def forward(
        ctx: Any, number: int, num_tasks: int, precision: str, anchored: bool, *features: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.number = number
        ctx.num_tasks = num_tasks
        ctx.precision = precision
        ctx.set_materialize_grads(False)
        copies = [x.unsqueeze(0).expand(num_tasks, *x.shape) for x in features]
        if torch.compiler.is_compiling():
            ctx.layer = None
            return tuple(copies)
        ctx.layer = _layers[number]  # alive until backward
        ctx.used = False
        ctx.anchored = anchored
        outputs = [z for copy in copies for z in copy.unbind(0)]
        if anchored:  # one more output, 0, on which every rank's total depends
            ctx.like = [torch.empty((), dtype=x.dtype, device=x.device).expand(x.shape) for x in features]
            outputs.append(features[0].new_zeros(()))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("FeatureSurgery cannot be differentiated twice (create_graph=True)")
        traced = ctx.layer is None
        anchored = not traced and ctx.anchored
        if anchored:
            grads, ctx.layer._anchor = grads[:-1], None
        rows = Rows([*grads], ctx.num_tasks, stacked=traced)
        parts = _by_dtype(rows)
        out: list[Tensor | None] = [None] * (SKIPPED + rows.num_params)
        if not parts:
            if anchored:  # the other ranks wait
                with restored_on_error(ctx.layer.method):
                    device = ctx.like[0].device
                    none = torch.zeros(1, ctx.num_tasks, ctx.num_tasks, dtype=torch.float64, device=device)
                    ctx.layer._weigh(none, [False] * ctx.num_tasks)
                _fill(out, ctx.like)
            return tuple(out)
        reached = None if traced or all(g is not None for g in grads) else rows.present()[0]
        if traced or torch.compiler.is_compiling():
            weights = torch.ops.fastmtl.layer_weights(_gram(parts, ctx.precision), reached, ctx.number)
            _combine(parts, weights, out)
            return tuple(out)
        _refuse_batched(parts[0][1])
        if ctx.used:
            raise RuntimeError(f"FeatureSurgery: a second backward pass through one forward pass; {ONE_PASS}")
        ctx.layer._refuse_single_loss(reached)
        with restored_on_error(ctx.layer.method):
            weights = ctx.layer._weigh(_gram(parts, ctx.precision), reached)
            _combine(parts, weights, out)
        if anchored:
            _fill(out, ctx.like)
        ctx.used = True
        return tuple(out)


Parts = list[tuple[list[int], Rows]]


def _by_dtype(rows: Rows) -> Parts:
    """The features that have a gradient, with their rows, apart by dtype: an operator takes one."""
    if rows.num_params == 1 and rows.grads[0] is not None:
        return [([0], rows)]
    n = 1 if rows.stacked else rows.num_tasks
    features: dict[torch.dtype, list[int]] = {}
    for i in range(rows.num_params):
        first = next((g for g in rows.grads[i * n : (i + 1) * n] if g is not None), None)
        if first is not None:
            features.setdefault(first.dtype, []).append(i)
    return [(each, rows.select(each)) for each in features.values()]


def _gram(parts: Parts, precision: str) -> Tensor:
    gramians = [ops.gram(part, precision=precision) for _, part in parts]
    return gramians[0] if len(gramians) == 1 else torch.stack(gramians).sum(0)


def _combine(parts: Parts, weights: Tensor, out: list[Tensor | None]) -> None:
    """Put the features' combined gradients in their places, which are the last ones of ``out``."""
    for features, part in parts:
        for i, grad in zip(features, ops.combine(part, weights), strict=True):
            out[SKIPPED + i] = grad


def _fill(out: list[Tensor | None], like: list[Tensor]) -> None:
    """Zeros where no gradient arrived: other ranks may have one, and the trunk's parameters are reduced on all."""
    for i, x in enumerate(like):
        if out[SKIPPED + i] is None:
            out[SKIPPED + i] = torch.zeros_like(x, memory_format=torch.contiguous_format)


def _refuse_batched(rows: Rows) -> None:
    functorch, grad = torch._C._functorch, next(g for g in rows.grads if g is not None)
    if functorch.is_legacy_batchedtensor(grad) or functorch.is_batchedtensor(grad):
        raise RuntimeError(
            "FeatureSurgery: batched gradients (is_grads_batched=True, vmap, jacrev) cannot pass through the layer, "
            f"which combines T gradients into one; {ONE_PASS}"
        )


@dataclass(eq=False)
class _Total:
    """What a call of `total` tells the backward pass."""

    num_present: int
    flows: bool  # the backward pass began at it, or at least passed it; True if that cannot be known


class FeatureSurgery(nn.Module):
    """Gradient surgery on the shared representation: one trunk pass, whatever the number of tasks.

    Put it between trunk and heads; each head must read its own copy of the features, ``zs[t]``. In the ordinary
    ``backward()`` the T gradients that arrive at the features are combined by the method, flattened over the whole
    batch, and one gradient goes on into the trunk. With `MGDA` this is MGDA-UB. Heads get their plain gradients. A loss
    weighting as the method weighs the losses themselves, heads included.

    The features may be several, of any shapes and floating dtypes: tuples, lists, dicts of tensors, as from a trunk of
    several scales. One surgery then goes over all of them: the Gramian is the sum over the features, and each gets its
    own combined gradient with the same weights. A task need not read all of them.

    A task is absent from a step if its loss is None in `total`, or does not depend on its copies of the features. In
    compiled graphs zeros arrive in the latter case, and zero is not absent: there, pass None.

    In ``eval()`` mode, without gradients, and on features that need none, the layer is the identity, state does not
    move, and the T outputs are the same tensors: do not change one in place. (In training that raises.)

    Args:
        method: A gradient method with ``scale_heads=False``, or a loss weighting.
        num_tasks: T.
        scaler: The ``torch.amp.GradScaler`` that scales the total loss, if any: the method then sees raw gradients.
        nonfinite: ``"propagate"`` or ``"drop_task"``; see `fastmtl.backward`. The latter reaches the trunk only.
        precision: ``"full"`` or ``"fast"``, of the Gramian; see `fastmtl.ops.gram`.
        process_group: The ranks that share a batch: a ``torch.distributed.ProcessGroup``; ``"auto"``: all ranks, where
            there are several; None: each for itself. See `fastmtl.distributed`.

    Attributes:
        result: `Result` of the last backward pass (``weights [T]``, ``gramian [T, T]`` over the features), or None.
            With a loss weighting, of the last `total`.

    Raises:
        TypeError: ``method`` is not one.
        ValueError: A method that scales heads, which a layer cannot do, or another option out of range.

    Note:
        Cost: T x (size of the features) instead of T x P: two reads of the features' gradients and one write. No host
        synchronisation. The losses must reach the layer in one backward pass of their sum: call `total` in every step,
        and its ``backward()`` before the next `total`. With several layers in one model, call each one's `total` with
        the losses that read it.

        RuntimeError, before any state moves, in backward: for gradients of gradients and for batched ones
        (``is_grads_batched``, ``torch.func``); for a second pass through the same forward pass; for the pass of an
        earlier `total` than the last (of a sum of them: after the last one's step); and for a pass in which one task of
        several arrives, unless it is the pass of a `total` or `total` was told that the others are absent: each of one
        backward pass per loss would solve a problem of a single task.

        torch.compile: the layer may be compiled with the whole model, with any part of it or not at all, with the same
        results. A compiled graph hides some wrong uses: derivatives raise with PyTorch's own text, gradients of
        gradients only in the second pass; a second pass with ``retain_graph`` is a second step; one backward pass per
        loss is not noticed, nor, if `total` is compiled, the pass of an earlier one. Activation checkpointing may go
        around trunk and heads; around the layer it breaks the graph.

        RuntimeError, on every rank and naming one, in the first backward pass: with several ranks, of which one has
        other tasks, another method or other options.

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
        process_group: Group = "auto",
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
        if not isinstance(method, LossWeighting) and method.several_batches:
            raise ValueError(
                f"{type(method).__name__}: needs the gradients of several batches, whose features have no products; "
                "use fastmtl.backward or TaskGradients"
            )
        if not isinstance(method, LossWeighting) and method.scale_heads:
            raise ValueError(
                f"{type(method).__name__}: a layer cannot scale the heads; construct it with scale_heads=False"
            )
        refuse_row_method(method, "FeatureSurgery")
        self.method = method
        self.num_tasks = num_tasks
        self.scaler = scaler
        self.nonfinite = nonfinite
        ops.check_precision(precision)
        self.precision = precision
        check_group(process_group)
        self.process_group = process_group
        if isinstance(method, LossWeighting) and process_group != "auto":
            method.process_group = process_group
        self._aligned = False  # all ranks have the same state
        self._anchor: Tensor | None = None  # 0, with the graph of the last forward pass: of several ranks only
        self.result: Result | None = None
        # What `total` saw, for the backward pass. Buffers, because compiled graphs update those faithfully.
        self.register_buffer("losses", torch.zeros(num_tasks, dtype=torch.float64), persistent=False)
        self.register_buffer("present", torch.ones(num_tasks, dtype=torch.bool), persistent=False)
        self._names = numbered(num_tasks)
        self._total: _Total | None = None  # of the backward pass to come; None: not called yet
        self._last_total: _Total | None = None  # whose the buffers are
        self._idle = 0  # forward passes since the layer last did something
        if not isinstance(method, LossWeighting):
            _shape_state(method, num_tasks)
        self._register()

    def forward(self, features: Any) -> tuple[Any, ...]:
        """T copies of the features, one per head.

        Args:
            features: The shared representation: a floating tensor of any shape, or several of them in tuples, lists,
                dicts, and whatever else ``torch.utils._pytree`` knows. What needs no gradient (masks, numbers, None) is
                handed on as it is.

        Returns:
            T of the same.

        Raises:
            TypeError: No tensor, a complex one, or an object whose tensors cannot be found.
            ValueError: Features on several devices.
            RuntimeError: Within a transform of ``torch.func``.
        """
        if isinstance(features, Tensor):
            return tuple(self._copies([features], features))
        leaves, structure = pytree.tree_flatten(features)
        if not any(isinstance(x, Tensor) for x in leaves):
            raise TypeError(f"features: expected a tensor or a structure of tensors, found {type(features).__name__}")
        shared: list[Tensor] = []
        index: list[int | None] = []  # per leaf: which of the shared ones it is
        for leaf in leaves:
            place = None
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                place = next((i for i, x in enumerate(shared) if x is leaf), len(shared))
                shared += [leaf] * (place == len(shared))
            elif leaf is not None and not isinstance(leaf, Tensor | int | float | str | torch.Size):
                raise TypeError(
                    f"{_name(features, leaf)}: expected a tensor, found {type(leaf).__name__}; a container of one's "
                    "own must be registered with torch.utils._pytree.register_pytree_node"
                )
            index.append(place)
        copies = self._copies(shared, features)
        return tuple(
            pytree.tree_unflatten(
                [x if i is None else copies[i * self.num_tasks + t] for x, i in zip(leaves, index, strict=True)],
                structure,
            )
            for t in range(self.num_tasks)
        )

    def _copies(self, shared: list[Tensor], features: Any) -> Sequence[Tensor]:
        """T copies of each, feature by feature; ``features``: as they were passed, for errors."""
        for x in shared:
            if x.is_complex():
                raise TypeError(f"{_name(features, x)}: complex features are not supported")
            if x.device != shared[0].device:
                raise ValueError(f"{_name(features, x)}: on {x.device}, the others on {shared[0].device}")
        learning, compiling = self.training and torch.is_grad_enabled(), torch.compiler.is_compiling()
        if learning and not compiling and torch._C._are_functorch_transforms_active():
            raise RuntimeError("FeatureSurgery cannot be trained within a transform of torch.func (vmap, grad, jacrev)")
        learning = learning and any(x.requires_grad for x in shared)
        if learning:
            self._watch()
        alone = compiling or not learning or not several(self.process_group)
        if not learning or isinstance(self.method, LossWeighting):
            if not alone:
                self._anchor = torch.stack([x.reshape(-1)[:0].sum().double() for x in shared if x.requires_grad]).sum()
            return [x for x in shared for _ in range(self.num_tasks)]
        # A new step, whose losses are still to come; unless activation checkpointing repeats this one within backward.
        if compiling or torch._C._current_graph_task_id() == -1:
            self._total = None
        anchored = not alone and ranks_of(self.process_group) is not None
        copies = _Surgery.apply(self._number, self.num_tasks, self.precision, anchored, *shared)
        if compiling:
            return [z for copy in copies for z in copy.unbind(0)]
        if anchored:
            *copies, anchor = copies
            if torch._C._current_graph_task_id() == -1:
                self._anchor = anchor
        return copies

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
            if self._anchor is not None:
                if not _any(losses):
                    total = total + self._anchor.to(total.dtype)
                self._anchor = None
            if not torch.compiler.is_compiling():
                self._idle = 0
                self.result = None if self.method.weights is None else Result(None, self.method.weights, None)
            return total
        parsed = parse_losses(losses, differentiable=False, empty=self._anchor is not None)
        if len(parsed) != self.num_tasks:
            raise ValueError(f"losses: expected {self.num_tasks} tasks, found {len(parsed)}")
        if not torch.compiler.is_compiling():
            self._names = parsed.names
            if self.method.positional:
                self.method.remember(parsed.names)
        values = stack_scalars(parsed.present if self._anchor is None else parsed.present or [self._anchor])
        if self.training and torch.is_grad_enabled():
            if self.losses.device != values.device:  # without parameters, it is easily forgotten in model.to(device)
                self.losses, self.present = self.losses.to(values.device), self.present.to(values.device)
            tasks = [t for t, x in enumerate(parsed.items) if x is not None]
            all_present = len(tasks) == self.num_tasks
            with torch.no_grad():
                if self._reads_losses and tasks:
                    self.losses.copy_(values if all_present else spread(values, tasks, self.num_tasks))
                if not all_present:
                    self.present.fill_(False)
                    for t in tasks:
                        self.present[t] = True
            total = values.sum()
            compiling = torch.compiler.is_compiling()
            if self._anchor is not None and not compiling:
                total = total + self._anchor.to(total.dtype)
            # Within backward, activation checkpointing repeats a `total` whose hook has run.
            told = _Total(len(tasks), flows=compiling or torch._C._current_graph_task_id() != -1)
            self._total = self._last_total = told
            if not compiling and total.requires_grad:
                total.register_hook(partial(self._begin, told))
            return total
        return values.sum()

    @property
    def _reads_losses(self) -> bool:
        """A `Monitor` reads them too, but where ranks exchange what they read: all have to read the same."""
        watched = watch.is_watched(self.method) and not several(self.process_group)
        return self.nonfinite != "propagate" or bool(self.method.needs_losses) or watched

    def _begin(self, total: _Total, grad: Tensor) -> None:
        """The backward pass of a `total` begins."""
        if total is not self._last_total:
            raise RuntimeError(
                "FeatureSurgery: backward of an earlier total; call each total's backward() before the next total"
            )
        total.flows = True
        self._total = total  # again, if there was another forward pass in between

    def _refuse_single_loss(self, reached: list[bool] | None) -> None:
        """Refuse one backward pass per loss: each would solve a problem of a single task.

        Args:
            reached: Whose gradient arrived; None: not known, or all.
        """
        if self.num_tasks == 1 or reached is None or sum(reached) != 1:
            return
        if self._total is None or not (self._total.flows or self._total.num_present == 1):
            task = self._names[reached.index(True)]
            raise RuntimeError(f"FeatureSurgery: a backward pass of the loss of {task} alone; {ONE_PASS}")

    def _weigh(self, gramian: Tensor, reached: list[bool] | None = None) -> Tensor:
        """``weights [1, T]``; ``reached``: whose gradient arrived; None: not known, or all."""
        assert not isinstance(self.method, LossWeighting)
        losses = None
        if self._reads_losses:
            if self._total is not None:
                losses = Losses(self._names, self.losses.unbind(0))
            elif self.method.needs_losses:
                name = type(self.method).__name__
                raise ValueError(f"{name} needs the losses: call surgery.total(losses).backward()")
        self._idle = 0
        raw = unscaled(gramian, scale_of(self.scaler, gramian.device))
        mask = None if reached is None else constant_mask([reached], gramian.device)
        if self._total is not None and self._total.num_present < self.num_tasks:
            declared = self.present.unsqueeze(0)
            mask = declared if mask is None else declared & mask
        ranks = ranks_of(self.process_group)
        if ranks is not None:
            raw, mask, losses = self._agree(ranks, raw, mask, losses)
        weights = decide(self.method, raw, mask, losses, self._names, self.nonfinite).weights
        self._aligned = ranks is not None
        self.result = Result(None, weights[0], raw[0])
        return weights

    def _agree(
        self, ranks: Ranks, gramian: Tensor, mask: Tensor | None, losses: Losses | None
    ) -> tuple[Tensor, Tensor, Losses | None]:
        """What a single process with the whole batch would see."""
        if not self._aligned:
            subjects = {
                "tasks": self._names,
                "method": describe(self.method),
                "FeatureSurgery": [f"nonfinite={self.nonfinite!r}", f"total called: {self._total is not None}"],
            }
            handshake(ranks, subjects, [], gramian.device)
            ranks.align(self.method, gramian.device)
        here = torch.ones_like(gramian[0, 0], dtype=torch.bool) if mask is None else mask[0]
        values = None if losses is None else self.losses
        there, values, total = ranks.agree(here, values, gramian[0])
        assert total is not None
        everyone = None if values is None else Losses(self._names, values.unbind(0))
        return total.unsqueeze(0), there.unsqueeze(0), everyone

    def _watch(self) -> None:
        """Warn once if the layer is passed again and again, and never used."""
        if torch.compiler.is_compiling():
            return
        self._idle += 1
        if self._idle == IDLE_CALLS:
            need = "no gradient came back: head t must read zs[t] of zs = surgery(features)"
            if isinstance(self.method, LossWeighting):
                need = "no total(losses): without it the losses are not weighed"
            warnings.warn(f"FeatureSurgery: {IDLE_CALLS} forward passes, and {need}", stacklevel=6)

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
        return {**self.__dict__, "result": None, "_anchor": None, "_aligned": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._register()


def _shape_state(method: GradientMethod, num_tasks: int) -> None:
    """Let state that waits for its shape have it now: ``torch.distributed.checkpoint`` loads into what is there.

    A step that is not finite gives it one, and moves nothing.
    """
    waiting = [getattr(module, name) for module in method.modules() for name in getattr(module, "_shaped_later", ())]
    if not method.training or not any(x.numel() == 0 and not x.is_meta for x in waiting):
        return
    nan = torch.full((1, num_tasks, num_tasks), float("nan"), dtype=torch.float64, device=waiting[0].device)
    attributes = [(vars(module), dict(vars(module))) for module in method.modules()]  # counts of steps
    method.weigh(Step(nan, None, nan[0, 0]))
    for now, then in attributes:
        now.update(then)


def _any(losses: LossesLike) -> bool:
    """Whether any task is present."""
    items = losses.values() if isinstance(losses, Mapping) else losses
    return any(x is not None for x in items)


def _name(features: Any, leaf: Any) -> str:
    """Where in the structure it stands, as Python would write it."""
    paths = pytree.tree_flatten_with_path(features)[0]
    return "features" + next(pytree.keystr(path) for path, x in paths if x is leaf)
