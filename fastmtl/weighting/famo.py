"""FAMO: all losses are to fall at the same rate, as seen by how they fell."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.checks import choice, real, reals
from fastmtl.distributed import agree_on_losses, several
from fastmtl.facts import Facts
from fastmtl.losses import LossesLike, parse_losses
from fastmtl.state import commit
from fastmtl.weighting.base import UNCHANGED_CALLS, WeightedSum

OPTIMIZERS = ("adam", "sgd")
AFTER = ("same_batch", "next_batch")


class FAMO(WeightedSum):
    """Fast Adaptive Multitask Optimization: improves the worst rate of improvement; answers differences of velocity.

    With ``z = softmax(xi)`` and ``L_t`` measured from its least possible value, the weights are ``z_t / L_t``, scaled
    to sum to 1: steps along the gradients of the logarithms. After the optimizer's step, the losses of the same batch
    tell what the step did, and one call learns ``xi`` from it: tasks whose logarithm fell less get more weight.

    ::

        loss = weighting(losses(batch))
        loss.backward(); optimizer.step(); optimizer.zero_grad()
        with torch.no_grad():
            weighting.update(losses(batch))

    Args:
        num_tasks: T.
        lr: Learning rate of ``xi``. Paper: 0.025.
        decay: gamma, pulls ``xi`` to 0. Paper: 0.001. (The authors' package has 0.01 by default.)
        optimizer: What moves ``xi``: ``"adam"`` (the paper's Algorithm 2, and its experiments) or ``"sgd"``
            (Algorithm 1).
        min_losses: The least possible losses, for all tasks or one per task.
        after: ``"same_batch"``: losses after the step come by `update` (paper); one forward pass more per step, without
            gradients. ``"next_batch"``: they are those of the next call: free, but what differs between batches counts
            as progress.
        eps: Added to the losses wherever they are divided by or their logarithms are taken. Authors' code: 1e-8.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: An option out of range.

    Note:
        Cost: O(T) on the device, no synchronisation. State: ``xi``, the last call's losses, and Adam's moments; it
        moves as `WeightedSum` says. ``xi`` is no parameter of the network's optimizer. ``xi`` of a task moves if the
        task is in both the call and the `update`. Losses must be above ``min_losses``: otherwise the weights are NaN,
        and `update` does nothing.

    Reference:
        Liu, Feng, Stone, Liu, "FAMO: Fast Adaptive Multitask Optimization", NeurIPS 2023, Algorithms 1 and 2.
        Deviation: the scalar is ``sum_t w_t L_t``, as of any weighting, not ``sum_t z_t log L_t`` scaled: another value
        with the same gradients.

    Example:
        >>> import torch, fastmtl
        >>> weighting = fastmtl.FAMO(num_tasks=2)
        >>> weighting(torch.tensor([1., 4.]))  # 0.8 * 1 + 0.2 * 4
        tensor(1.6000)
        >>> weighting.update(torch.tensor([0.5, 4.]))  # the second has not improved
        >>> _ = weighting(torch.tensor([1., 1.]))
        >>> weighting.weights
        tensor([0.4875, 0.5125], dtype=torch.float64)
    """

    facts = Facts("velocity", "Liu, NeurIPS 2023", sums_to="1", needs="the losses after the step", state="5 T")
    logits: Tensor
    before: Tensor
    moments: Tensor
    floor: Tensor

    def __init__(
        self,
        num_tasks: int,
        lr: float = 0.025,
        decay: float = 0.001,
        optimizer: str = "adam",
        min_losses: float | Sequence[float] = 0.0,
        after: str = "same_batch",
        eps: float = 1e-8,
    ) -> None:
        super().__init__(num_tasks)
        self.lr, self.decay = real("lr", lr, 0), real("decay", decay, 0)
        self.optimizer = choice("optimizer", optimizer, OPTIMIZERS)
        self.after, self.eps = choice("after", after, AFTER), real("eps", eps, 0)
        self.min_losses = reals("min_losses", min_losses)
        self.register_option("floor", "min_losses", self.min_losses)
        self._waiting = 0  # steps since the last update
        self.register_state("logits", (self.num_tasks,))
        self.register_state("before", (self.num_tasks,), float("nan"))
        self.register_state("moments", (3, self.num_tasks))  # first, second, and the number of steps

    def weigh(self, losses: Tensor, moves: Tensor) -> Tensor:
        """See `WeightedSum.weigh`."""
        present = ~losses.isnan()
        logits = self._learn(losses, present, moves) if self.after == "next_batch" else self.logits
        self._watch_updates()
        height = losses - self.floor + self.eps
        share = shares(logits, present) / torch.where(height > 0, height, float("nan"))
        share = torch.where(present, share, 0.0)
        commit(self.before, losses, moves)
        return share / share.sum()

    def update(self, losses: LossesLike) -> None:
        """Learn from what the last step did. In evaluation mode it does nothing.

        Args:
            losses: Those of the batch of the last call, after the optimizer's step; in the same form.

        Raises:
            TypeError, ValueError: As for a call.
            RuntimeError: ``after="next_batch"``.

        Note:
            Of several ranks, all must call it: it averages the losses over them. A second call without a step between
            does nothing, nor does one before the first step.
        """
        if self.after == "next_batch":
            raise RuntimeError("FAMO.update: the next call's losses tell what a step did (after='next_batch')")
        shared = self.training and several(self.process_group)
        parsed = parse_losses(losses, differentiable=False, empty=shared)
        if len(parsed) != self.num_tasks:
            raise ValueError(f"losses: expected {self.num_tasks} tasks, found {len(parsed)}")
        self.remember(parsed.names)
        if not self.training:
            return
        self._waiting = 0
        with torch.no_grad():
            if shared:
                device = parsed.device if parsed.present else self._device()
                there, values = agree_on_losses(self.process_group, parsed.items, device)
            else:
                values = parsed.values()
                absent = torch.zeros((), dtype=torch.bool, device=values.device)
                there = torch.stack([absent if x is None else ~absent for x in parsed.items])
            self._follow(values.device)
            self._learn(values, there, torch.ones((), dtype=torch.bool, device=values.device))

    def _watch_updates(self) -> None:
        """Warn once if `update` is forgotten."""
        if torch.compiler.is_compiling() or not self.training or self.after == "next_batch":
            return
        self._waiting += 1
        if self._waiting == UNCHANGED_CALLS:
            warnings.warn(
                f"FAMO: {UNCHANGED_CALLS} steps without update(losses): its weights learn nothing", stacklevel=6
            )

    def _learn(self, after: Tensor, there: Tensor, moves: Tensor) -> Tensor:
        """The new ``xi``, from the losses of the tasks that are there; kept if the bool scalar ``moves`` holds."""
        both = ~self.before.isnan() & there
        fall = (self.before - self.floor + self.eps).log() - (after - self.floor + self.eps).log()
        sound = (fall.isfinite() | ~both).all() & both.any()
        fall = torch.where(both, fall, 0.0)
        share = torch.where(both, shares(self.logits, both), 0.0)  # without a task it is NaN
        slope = torch.where(both, share * (fall - (share * fall).sum()) + self.decay * self.logits, 0.0)
        if self.optimizer == "adam":
            m, v, count = self.moments.unbind(0)
            moments = torch.stack([0.9 * m + 0.1 * slope, 0.999 * v + 0.001 * slope**2, count + 1])
            moments = torch.where(both, moments, self.moments)
            commit(self.moments, moments, moves & sound)
            m, v, count = moments.unbind(0)
            slope = m / (1 - 0.9**count) / ((v / (1 - 0.999**count)).sqrt() + 1e-8)
        logits = torch.where(both & sound, self.logits - self.lr * slope, self.logits)
        commit(self.logits, logits, moves)
        commit(self.before, torch.full_like(self.before, float("nan")), moves & sound)
        return logits


def shares(logits: Tensor, present: Tensor) -> Tensor:
    """``z``, 0 for absent tasks."""
    return torch.softmax(torch.where(present, logits, -float("inf")), 0)
