"""HTW: a main task that is ramped up, and auxiliary tasks that fade as they learn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.checks import choice, real, whole
from fastmtl.facts import Facts
from fastmtl.weighting.lbtw import LBTW


class HTW(LBTW):
    """Hybrid Task Weighting: one main task among auxiliary ones; answers differences of velocity.

    The main task's weight is the Abridged Linear Schedule: during the first ``warmup`` of the steps it grows linearly,
    from then on it is 1. The auxiliary tasks' weights are those of `LBTW`.

    Args:
        num_tasks: T.
        main: Index of the main task, 0..T-1. (A weighting does not know the tasks' names.)
        total_steps: Steps of the whole training, counted on the device. Afterwards the main task's weight stays 1.
        warmup: Share of ``total_steps`` in which the main task's weight grows.
        ramp: The weight at step i = 0, 1, ... of the warmup. ``"article"``: ``i / total_steps``, from 0 to ``warmup``,
            and then at once 1. ``"to_one"``: ``i / (warmup total_steps)``, from 0 to 1. ``(start, end)``: from start to
            end, both at least 0.
        alpha: See `LBTW`.
        reset_each_epoch: See `LBTW`; without it `end_epoch` does nothing.
        steps_per_epoch: See `LBTW`.
        normalize: See `LBTW`; the main task's weight counts among the others.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: An option out of range, or ``steps_per_epoch`` without ``reset_each_epoch``.
        RuntimeError: `end_epoch` although epochs end by themselves.

    Note:
        Cost: O(T) on the device, one ordinary backward pass, no synchronisation. State: as `LBTW`, and the number of
        steps. It moves as `WeightedSum` says; steps count whether the main task is present or not. With a ramp from 0
        the first step does not train the main task.

    Reference:
        Kongyoung, Macdonald, Ounis, "Multi-Task Learning using Dynamic Task Weighting for Conversational Question
        Answering", SCAI workshop at EMNLP 2020 (Hybrid). Deviations: those of `LBTW`; ``normalize`` and the other ramps
        are additions.

    Example:
        >>> import torch, fastmtl
        >>> weighting = fastmtl.HTW(num_tasks=2, main=0, total_steps=20)
        >>> for _ in range(3):
        ...     losses = torch.tensor([3., 4.], requires_grad=True)
        ...     weighting(losses).backward()
        ...     losses.grad
        tensor([0., 1.])
        tensor([0.0500, 1.0000])
        tensor([1., 1.])
    """

    facts = Facts("velocity", "Kongyoung, 2020", needs="the main task, the number of steps", state="T")

    def __init__(
        self,
        num_tasks: int,
        main: int,
        total_steps: int,
        warmup: float = 0.1,
        ramp: str | tuple[float, float] = "article",
        alpha: float = 0.5,
        reset_each_epoch: bool = False,
        steps_per_epoch: int | None = None,
        normalize: str = "none",
    ) -> None:
        super().__init__(num_tasks, alpha, reset_each_epoch, steps_per_epoch, normalize)
        self.main = whole("main", main, 0, self.num_tasks - 1)
        self.total_steps = whole("total_steps", total_steps, 1)
        self.warmup = real("warmup", warmup, 0, 1)
        self.ramp = ramp
        named = {"article": (0.0, self.warmup), "to_one": (0.0, 1.0)}
        if not isinstance(ramp, Sequence):
            raise TypeError(f"ramp: expected one of {tuple(named)} or (start, end), found {ramp!r}")
        if isinstance(ramp, str):
            self._start, self._end = named[choice("ramp", ramp, tuple(named))]
        elif len(ramp) == 2:
            self._start, self._end = real("ramp's start", ramp[0], 0), real("ramp's end", ramp[1], 0)
        else:
            raise ValueError(f"ramp: expected (start, end), found {ramp!r}")

    def balance(self, losses: Tensor, moves: Tensor) -> Tensor:
        """See `LBTW.balance`; the main task's weight is the schedule's."""
        weights = super().balance(losses, moves)
        done = self.steps.double() / self.total_steps
        rising = self._start + (self._end - self._start) * (done / self.warmup) if self.warmup > 0 else done
        weights[self.main] = torch.where(done < self.warmup, rising, 1.0)
        return weights
