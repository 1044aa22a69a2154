"""SDMGrad: the common descent direction near that of a weighted loss, on independent batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.checks import flag, preferences, real, whole
from fastmtl.facts import Facts
from fastmtl.surgery.base import CommonOptions, Step
from fastmtl.surgery.several_batches import SeveralBatches

if TYPE_CHECKING:
    from typing_extensions import Unpack

_SMALLEST = 1e-300  # squared norms whose inverse is a number, also as the square of a mean over many tasks


class SDMGrad(SeveralBatches):
    """Steps along a common descent direction that is kept near the mean gradient, by three independent batches.

    With ``g_0 = sum_t p_t g_t`` (p: the preference, equal by default), the direction is ``sum_t w_t g_t + lam g_0``,
    where w tends to ``argmin |sum_t w_t g_t + lam g_0|^2`` on the simplex by projected steps along
    ``G_1 G_2^T (w + lam p)``: products of the gradients on two independent batches, which have no bias. The direction
    itself is that of the third batch. ``lam=0`` is MGDA, a large one the weighted sum. Answers conflict of direction.
    The weights sum to ``1 + lam``.

    The losses of a step are those of three batches one after the other, see `SeveralBatches`. In `fastmtl.backward`
    and in `TaskGradients`, whose pass b T + t is that of task t on batch b; not in `FeatureSurgery`, since features of
    different batches have no products.

    Args:
        num_tasks: T, of one batch.
        lam: Weight of ``g_0``, at least 0.
        lr: Step size of the weights, above 0. With ``scale_free`` orthogonal gradients of equal norm need less than 3.
            Public code has 10 or 5, at which the steps jump from corner to corner unless gradients are nearly parallel.
        momentum: Of these steps, 0 to below 1; it starts anew in every training step.
        num_steps: How many of them in each training step, at least 1.
        scale_free: Divide the products by the square of the mean norm, so that ``lr`` does not depend on the size of
            the gradients (experiments and code of the paper); where that is 0, w stays. False: Algorithm 1.
        preference: p, one number per task; scaled to sum to 1 over the tasks that take part. None: equal.
        scale_heads: See `SeveralBatches`.
        common: See `GradientMethod`. With ``rescale="sum_to_one"`` the direction is divided by ``1 + lam``, as in the
            paper's code.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: An option out of range; at the first step: losses that are not those of three batches.

    Note:
        Cost: three times the backward passes; then T^2 operations for each of ``num_steps``, one launch on a
        GPU, no synchronisation. State: w, K T numbers, which move on finite steps in training mode.

    Reference:
        Xiao, Ban, Ji, "Direction-oriented Multi-objective Learning: Simple and Provable Stochastic Algorithms", NeurIPS
        2023, equation 5 and Algorithm 1. Deviations, all of the paper's experiments and code: the inner steps share one
        pair of batches, momentum, ``scale_free``, whose squared norms are products over two batches, which count as 0
        where they are negative. Our own: the default of ``lr``; where tasks are absent.

    Example:
        >>> import torch, fastmtl
        >>> x, method = torch.nn.Parameter(torch.ones(2)), fastmtl.SDMGrad(2, lam=0.5, num_steps=50)
        >>> batches = [torch.tensor([1., 2.]), torch.tensor([3., 1.]), torch.tensor([1., 1.])]
        >>> losses = [loss for batch in batches for loss in (x[0] * batch[0], x[1] * batch[1])]
        >>> fastmtl.backward(losses, method, [x]).weights
        tensor([0.0000, 0.0000, 0.0000, 0.0000, 0.6000, 0.9000], dtype=torch.float64)
    """

    facts = Facts("direction", "Xiao, NeurIPS 2023", sums_to="1 + lam", needs="3 batches", state="K T", cost="T^2")
    batches = (3,)

    def __init__(
        self,
        num_tasks: int,
        lam: float = 0.3,
        lr: float = 0.5,
        momentum: float = 0.5,
        num_steps: int = 20,
        scale_free: bool = True,
        preference: Sequence[float] | Tensor | None = None,
        scale_heads: bool = True,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(num_tasks, scale_heads, **common)
        self.lam, self.lr = real("lam", lam, 0), real("lr", lr, 0, open=True)
        self.momentum = real("momentum", momentum, 0)
        if self.momentum >= 1:
            raise ValueError(f"momentum: expected a number in [0, 1), found {momentum}")
        self.num_steps = whole("num_steps", num_steps, 1)
        self.scale_free = flag("scale_free", scale_free)
        self.preference = preferences(preference)
        if self.preference is not None and len(self.preference) != self.num_tasks:
            raise ValueError(f"preference: expected {self.num_tasks} numbers, found {len(self.preference)}")

    def pull(self, like: Tensor, present: Tensor | None) -> Tensor:
        """See `SeveralBatches.pull`: lam p, of which p sums to 1 over the present tasks; 0 where none counts."""
        p = self.per_task("preference", like).expand_as(like)
        p = p if present is None else torch.where(present, p, 0.0)
        total = p.sum(-1, keepdim=True)
        return p * (self.lam / torch.where(total == 0, 1.0, total))

    def improve(self, weights: Tensor, step: Step, pull: Tensor | None) -> Tensor:
        """See `SeveralBatches.improve`."""
        moved = ops.projected_gradient(
            step.gramian,
            weights,
            step.mask,
            pull,
            lr=self.lr,
            momentum=self.momentum,
            num_steps=self.num_steps,
            scale_free=self.scale_free,
        )
        if not self.scale_free:
            return moved
        t, present = self.num_tasks, self.taking_part(step)
        squares = step.gramian[:, :t, t : 2 * t].diagonal(dim1=-2, dim2=-1)
        squares = squares if present is None else torch.where(present, squares, 0.0)
        return torch.where((squares > _SMALLEST).any(-1, keepdim=True), moved, weights)
