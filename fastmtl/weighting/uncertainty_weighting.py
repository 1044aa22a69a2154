"""Uncertainty weighting: learned variances weigh the losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.weighting.base import LossWeighting

KINDS = ("regression", "classification")


class UncertaintyWeighting(LossWeighting):
    """Weighs each loss by a learned variance ``sigma_t^2``; answers differences of magnitude.

    With ``s_t = log sigma_t^2``, the scalar is the sum over the tasks of ``exp(-s_t) L_t / 2 + s_t / 2`` (regression)
    or ``exp(-s_t) L_t + s_t / 2`` (classification).

    ``s`` is a parameter of this module and must be given to the optimizer, without weight decay:
    ``torch.optim.Adam([{"params": [*model.parameters()]}, weighting.parameter_group()])``.

    Args:
        num_tasks: T.
        kind: ``"regression"``, ``"classification"``, or one of them per task.
        init: First value of every ``s_t``.

    Raises:
        ValueError: ``num_tasks`` < 1 or an unknown kind.

    Note:
        Cost: O(T), one ordinary backward pass. As a method (`fastmtl.backward`, ...) the weights are
        ``exp(-s_t) / 2`` or ``exp(-s_t)``. Absent tasks leave their ``s_t`` without a gradient.

    Reference:
        Kendall, Gal, Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and
        Semantics", CVPR 2018, equations 7 and 10. No deviation.

    Example:
        >>> import torch, fastmtl
        >>> weighting = fastmtl.UncertaintyWeighting(num_tasks=2, kind=["regression", "classification"])
        >>> weighting([torch.tensor(2.), torch.tensor(3.)])
        tensor(4., grad_fn=<SumBackward0>)
    """

    def __init__(self, num_tasks: int, kind: str | Sequence[str] = "classification", init: float = 0.0) -> None:
        super().__init__()
        if num_tasks < 1:
            raise ValueError(f"num_tasks: expected at least 1, found {num_tasks}")
        kinds = [kind] * num_tasks if isinstance(kind, str) else list(kind)
        if len(kinds) != num_tasks:
            raise ValueError(f"kind: expected one per task ({num_tasks}), found {len(kinds)}")
        for t, k in enumerate(kinds):
            if k not in KINDS:
                raise ValueError(f"kind of task {t}: expected one of {KINDS}, found {k!r}")
        self.num_tasks = num_tasks
        self.s = nn.Parameter(torch.full((num_tasks,), float(init)))
        factor = torch.tensor([0.5 if k == "regression" else 1.0 for k in kinds])
        self.register_buffer("factor", factor, persistent=False)

    factor: Tensor

    def scalar(self, losses: Tensor, tasks: Sequence[int] | None) -> Tensor:
        """See `LossWeighting.scalar`."""
        s: Tensor = self.s
        factor = self.factor
        if tasks is not None:  # one by one: an index tensor would have to be sent to the device
            s, factor = torch.stack([s[t] for t in tasks]), torch.stack([factor[t] for t in tasks])
        return (factor * torch.exp(-s) * losses + 0.5 * s).sum()

    def parameter_group(self, **options: Any) -> dict[str, Any]:
        """The parameter group for the optimizer: ``s`` without weight decay, and any other ``options``."""
        return {"params": [self.s], "weight_decay": 0.0, **options}
