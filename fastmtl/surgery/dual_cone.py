"""What UPGrad and DualProj have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmtl.checks import preferences, real
from fastmtl.surgery.base import CommonOptions, GradientMethod, Step

if TYPE_CHECKING:
    from typing_extensions import Unpack


class DualConeMethod(GradientMethod):
    """A method that projects onto the dual cone of the gradients, ``{x: <g_t, x> >= 0 for all t}``.

    Args:
        preference: How much each task counts: T numbers, not negative and not all 0, taken as they are. None: 1 over
            the number of tasks that take part, each.
        noise: Relative error of the Gramian's entries, to be guarded against. 0: none. See `fastmtl.ops.dual_cone`.
        common: See `GradientMethod`.
    """

    def __init__(
        self, preference: Sequence[float] | None = None, noise: float = 5e-7, **common: Unpack[CommonOptions]
    ) -> None:
        super().__init__(**common)
        self.preference = preferences(preference)
        self.noise = real("noise", noise, 0, 1)
        self.positional = preference is not None

    def shares(self, step: Step) -> Tensor:
        """How much each task counts in this step, ``[K, T]``."""
        each = self.per_task("preference", step.gramian)
        if self.preference is not None:
            return each.expand(step.gramian.shape[:2])
        if step.mask is None:
            return (each / len(each)).expand(step.gramian.shape[:2])
        return torch.where(step.mask, each, 0.0) / step.mask.sum(-1, keepdim=True).clamp(min=1)
