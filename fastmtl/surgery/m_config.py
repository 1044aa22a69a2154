"""MConFIG: ConFIG's direction of moving averages of the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.checks import preferences, real
from fastmtl.facts import Facts
from fastmtl.rows import constant_mask
from fastmtl.state import commit
from fastmtl.surgery.base import CommonOptions, Step
from fastmtl.surgery.row_method import RawRows, Tracked, TrackingMethod

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MConFIG(TrackingMethod):
    """Steps in the direction that has the same cosine with each task's moving average of gradients.

    With ``y_t`` the average of task t, ``y_t = beta y_t + (1 - beta) g_t`` in the k_t-th step with a gradient of that
    task, the update is `ConFIG`'s of ``y_t / (1 - beta^k_t)``. A task that is absent takes part by its average: the
    paper computes the gradient of one task per step, in turn, at the cost of ordinary training. Answers conflict of
    direction, and of the differences in magnitude their part in the direction.

    Args:
        beta: How much of an average stays, 0 to below 1.
        preference: What the cosines are in proportion to, as for `ConFIG`.
        common: See `GradientMethod`; a normalization applies to the averages. With one by losses absent tasks take no
            part, as their losses are not known.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: An option out of range; at the first step: preferences for another number of tasks.

    Note:
        State: T P numbers, the averages (float32 where the parameters have 16 bits), and as many again while a step
        runs; T counts. Cost: `ConFIG`'s, and two passes over the averages. No synchronisation, no randomness. Tasks
        without a gradient so far have weight 0, as have those that ``nonfinite="drop_task"`` drops from a step. A
        parameter that no task reaches in a step has no part in it. ``Result.weights`` multiply the averages, whose
        Gramian is ``Result.gramian``. The averages are the momentum: the optimizer should have none of its own. Not for
        sparse gradients.

    Reference:
        Liu, Chu, Thuerey, "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks", ICLR 2025,
        Algorithm 1 (M-ConFIG). Deviation: the second moment is the optimizer's, as of Adam with ``betas=(0, 0.999)``,
        which averages the squares of the updates; the paper's averages those of the gradients that would give these
        updates by a moving average. How often each task's gradient is computed is the user's. See also `ConFIG`.

    Example:
        >>> import torch, fastmtl
        >>> method = fastmtl.MConFIG(beta=0.5)
        >>> for losses in ([1., None], [None, 2.]):  # one task per step
        ...     grads = [None if x is None else x * torch.eye(2)[t] for t, x in enumerate(losses)]
        ...     print(fastmtl.aggregate([grads], method).grads[0])
        tensor([1., 0.])
        tensor([1.5000, 1.5000])
    """

    facts = Facts("direction, magnitude", "Liu, ICLR 2025", state="T P", cost="T P + T^3")
    counts: Tensor

    def __init__(
        self,
        beta: float = 0.9,
        preference: Sequence[float] | Tensor | None = None,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(**common)
        self.beta = real("beta", beta, 0)
        if self.beta >= 1:
            raise ValueError(f"beta: expected a number in [0, 1), found {beta}")
        self.preference = preferences(preference)
        self.register_state("counts")

    def track(self, step: RawRows) -> Tracked:
        """See `TrackingMethod.track`."""
        t = step.rows.num_tasks
        counts = self.counts.to(step.rows.device) if self.counts.numel() else torch.zeros(t, device=step.rows.device)
        there = 1 / (1 - self.beta ** (counts.double() + 1))  # what an average of one gradient more is divided by
        absent = torch.where(counts > 0, 1 / (1 - self.beta ** counts.double()), 0.0)
        kept = self.move(step, lambda old, grad, task: grad + self.beta * (old - grad))
        grads: list[Tensor | None] = []
        for p, old in enumerate(self.recall(step)):
            like = next((g for g in step.rows.grads[p * t : (p + 1) * t] if g is not None), None)
            for task, new in enumerate(kept[p * t : (p + 1) * t]):
                if like is None:
                    grads.append(None)
                else:
                    grads.append((old[task] * absent[task] if new is None else new * there[task]).to(like.dtype))
        return Tracked(replace(step.rows, grads=grads), False, kept, everyone=not self.needs_losses)

    def solve(self, step: Step) -> Tensor:
        """See `GradientMethod.solve`."""
        preference = None if self.preference is None else self.per_task("preference", step.gramian)
        return ops.equal_cosines(step.gramian, step.mask, preference)

    def store(self, tracked: Tracked, moves: Tensor) -> None:
        """See `TrackingMethod.store`; counts the gradients."""
        super().store(tracked, moves)
        if self.training:
            t = tracked.rows.num_tasks
            counts = self.state("counts", moves, (t,), 0.0)
            seen = [any(x is not None for x in tracked.kept[task::t]) for task in range(t)]
            commit(counts, counts + 1, moves & constant_mask([seen], moves.device)[0])
