"""What a loss weighting is: a map from loss values to one scalar, whose slopes are the tasks' weights."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmtl.checks import whole
from fastmtl.distributed import Group, agree_on_losses, device_of, ranks_of, several
from fastmtl.facts import Facts
from fastmtl.losses import Losses, LossesLike, parse_losses, spread, stack_scalars
from fastmtl.state import Stateful
from fastmtl.watch import tell

UNCHANGED_CALLS = 100

Everywhere = tuple[Tensor, Tensor]
"""See `LossWeighting.scalar`."""


class LossWeighting(Stateful):
    """Base class of the loss weightings: subclasses implement `scalar`.

    Called with the losses, a weighting returns the scalar to call ``backward()`` on: no per-task gradients, no cost.
    Passed where a gradient method is expected, it enters as ``w_t = d scalar / d L_t``; its own parameters then get
    their gradients too.

    State moves in training mode only, as that of gradient methods. A direct call moves it with gradients enabled only:
    one under ``torch.no_grad()`` is taken for validation. A call as a method (`fastmtl.backward`, `aggregate`,
    `TaskGradients.combine`) is a training step also there.

    With several ranks of ``torch.distributed``, each training step is weighed by the losses' averages over them, the
    same on all, by one all-reduce of 2 T numbers; all ranks must call it.

    Attributes:
        num_tasks: T where the weighting is made for one number of tasks; None: any.
        process_group: The ranks that share a batch, see `fastmtl.distributed.Group`; None: each weighs its own losses.
        facts: The weighting in a few words.
    """

    facts: ClassVar[Facts]
    num_tasks: int | None = None
    process_group: Group = "auto"

    def __init__(self) -> None:
        super().__init__()
        self._weights: Tensor | None = None
        self._last_versions: list[int] = []
        self._unchanged = 0
        self._met = False  # all ranks have the same tasks and options
        self._aligned = False  # and state

    def scalar(self, losses: Tensor, tasks: Sequence[int] | None, everywhere: Everywhere | None = None) -> Tensor:
        """The weighted loss.

        Args:
            losses: Values of the present tasks, ``[n]``.
            tasks: Their n indices among the T tasks; None if all are present.
            everywhere: With several ranks: which tasks are on any of them, bool ``[T]``, and their average losses,
                ``[T]`` float64, NaN for absent ones. ``losses`` are then those of all T tasks, 0 for what is absent on
                this rank.
        """
        raise NotImplementedError

    def forward(self, losses: LossesLike) -> Tensor:
        """The scalar to differentiate.

        Args:
            losses: T scalars: a sequence, a mapping from task name, or a 1-D tensor; None: the task is absent.

        Returns:
            A scalar in the losses' dtype, at least float32.
        """
        parsed, total = self._weigh(losses)
        if torch.is_grad_enabled() and self._weights is not None:
            tell(self, parsed.names, self._weights.unsqueeze(0), losses=parsed)
        return total

    def _weigh(self, losses: LossesLike) -> tuple[Losses, Tensor]:
        shared = self.training and torch.is_grad_enabled() and several(self.process_group)
        parsed = parse_losses(losses, differentiable=False, empty=shared)
        if self.num_tasks is not None and len(parsed) != self.num_tasks:
            raise ValueError(f"losses: expected {self.num_tasks} tasks, found {len(parsed)}")
        self.remember(parsed.names)
        self._watch()
        if shared:
            self.meet(parsed)
            device = parsed.device if parsed.present else self._device()
            zero = parsed.present[0].detach().new_zeros(()) if parsed.present else torch.zeros((), device=device)
            values = stack_scalars([zero if x is None else x for x in parsed.items])
            total = self.scalar(values, None, agree_on_losses(self.process_group, parsed.items, device))
        else:
            tasks = [t for t, x in enumerate(parsed.items) if x is not None]
            total = self.scalar(stack_scalars(parsed.present), None if len(tasks) == len(parsed) else tasks)
        return parsed, total

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def meet(self, losses: Losses) -> None:
        """Make sure, once, that all ranks have the same tasks, weighting and state, where they share losses.

        Raises:
            RuntimeError: One has not; on every rank.
        """
        from fastmtl.exchange import describe, handshake

        ranks = ranks_of(self.process_group)
        if ranks is not None and not self._met:
            device = losses.device if losses.present else self._device()
            handshake(ranks, {"tasks": losses.names, "method": describe(self)}, [], device)
            self._align(device)
            self._met = True

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _align(self, device: torch.device) -> None:
        """Give all ranks, once, the first one's state: seeds, above all."""
        ranks = ranks_of(self.process_group)
        if ranks is not None and not self._aligned:
            ranks.align(self, device)
            self._aligned = True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_met": False, "_aligned": False}

    def _device(self) -> torch.device:
        """Where losses would lie, for a rank that has none."""
        state = next(itertools.chain(self.parameters(), self.buffers()), None)
        return device_of(self.process_group) if state is None else state.device

    def register_option(self, name: str, option: str, values: float | Sequence[float]) -> None:
        """Keep an option of one number per task, or for all, as a buffer ``[T]`` that is not saved.

        Args:
            name: The buffer's.
            option: The option's, for the error.
            values: A number, or one per task.

        Raises:
            ValueError: Of another number of tasks.
        """
        assert self.num_tasks is not None
        each = [values] * self.num_tasks if isinstance(values, float | int) else [*values]
        if len(each) != self.num_tasks:
            raise ValueError(f"{option}: expected one number per task ({self.num_tasks}), found {len(each)}")
        self.register_buffer(name, torch.tensor(each, dtype=torch.float64), persistent=False)

    def _follow(self, device: torch.device) -> None:
        """Bring the state to where the losses are."""
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.device != device:
                self._buffers[name] = buffer.to(device)

    @property
    def weights(self) -> Tensor | None:
        """Those of the last call, ``[T]`` float64, 0 for absent tasks; None before and in compiled graphs."""
        return self._weights

    def note(self, weights: Tensor, tasks: Sequence[int] | None) -> None:
        """Keep the weights of the present tasks, to be looked at."""
        if torch.compiler.is_compiling() or self.num_tasks is None:
            return
        weights = _wide(weights.detach())
        self._weights = weights if tasks is None else spread(weights, tasks, self.num_tasks, fill=0.0)

    def _watch(self) -> None:
        """Warn once if this weighting's parameters get gradients that no optimizer uses."""
        if torch.compiler.is_compiling() or not (self.training and torch.is_grad_enabled()):
            return
        versions = [p._version for p in self.parameters() if p.grad is not None]
        self._unchanged = self._unchanged + 1 if versions and versions == self._last_versions else 0
        self._last_versions = versions
        if self._unchanged == UNCHANGED_CALLS:
            warnings.warn(
                f"{type(self).__name__}: its parameters have not changed for {UNCHANGED_CALLS} calls: "
                "are they in an optimizer? (parameter_group())",
                stacklevel=5,
            )

    def slopes(self, losses: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """The scalar at these loss values, and its slopes.

        Args:
            losses: T scalars or None; taken as constants.

        Returns:
            The scalar, differentiable in the weighting's own parameters, and the weights ``[T]``, 0 for absent tasks;
            both in float64 (on MPS, which has none, float32), whatever the losses' dtype.

        Note:
            Counts as a training step also under ``torch.no_grad()``, unless in evaluation mode.
        """
        with torch.enable_grad():
            leaves = [None if x is None else _wide(x.detach()).requires_grad_() for x in losses]
            _, total = self._weigh(leaves)
            present = [x for x in leaves if x is not None]
            slopes = torch.autograd.grad(total, present, retain_graph=True, allow_unused=True)
        found = iter(slopes)
        zero = torch.zeros_like(present[0])
        weights = [None if x is None else next(found) for x in leaves]
        return total, torch.stack([zero if w is None else w for w in weights])


def _wide(loss: Tensor) -> Tensor:
    """In as many digits as the device has: a slope is rounded to its loss's dtype."""
    return loss.to(torch.float32 if loss.device.type == "mps" else torch.float64)


class WeightedSum(LossWeighting):
    """Base class of the weightings whose weights are constants of the step: subclasses implement `weigh`.

    State is float64 and moves as `LossWeighting` says, and only where the losses of the tasks that are present are
    finite. Where one is not, the weights are NaN, so that a GradScaler sees it.

    Args:
        num_tasks: T.
    """

    num_tasks: int

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = whole("num_tasks", num_tasks, 1)

    def weigh(self, losses: Tensor, moves: Tensor) -> Tensor:
        """The weights of this step; advances the state. No host synchronisation.

        Args:
            losses: ``[T]`` float64, detached, NaN for absent tasks.
            moves: bool scalar: whether state may move; to be passed to ``fastmtl.state.commit``.

        Returns:
            ``[T]`` float64; those of absent tasks are not read.
        """
        raise NotImplementedError

    def scalar(self, losses: Tensor, tasks: Sequence[int] | None, everywhere: Everywhere | None = None) -> Tensor:
        """See `LossWeighting.scalar`."""
        moving = self.training and torch.is_grad_enabled()
        with torch.no_grad():
            values = losses.detach().double() if everywhere is None else everywhere[1]
            there = None if everywhere is None else everywhere[0]
            finite = (values.isfinite() if there is None else values.isfinite() | ~there).all()
            self._follow(values.device)
            weights = self.weigh(values if tasks is None else spread(values, tasks, self.num_tasks), finite & moving)
            weights = torch.where(finite, weights, float("nan"))
            if there is not None:
                weights = torch.where(there, weights, 0.0)
            if tasks is not None:  # one by one: an index tensor would have to be sent to the device
                weights = torch.stack([weights[t] for t in tasks])
            self.note(weights, tasks)
        return (weights.to(losses.dtype) * losses).sum()
