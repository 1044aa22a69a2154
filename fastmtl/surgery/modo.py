"""MoDo: min-norm weights by one stochastic step at a time, on independent batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastmtl import ops
from fastmtl.checks import real
from fastmtl.facts import Facts
from fastmtl.surgery.base import CommonOptions, Step
from fastmtl.surgery.several_batches import SeveralBatches

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MoDo(SeveralBatches):
    """Moves the weights one step towards the min-norm point, by the products of gradients of two independent batches.

    With the gradients ``G_1``, ``G_2`` of the T tasks on two batches, the weights become the projection of
    ``w - gamma (G_1 G_2^T w + rho w)`` onto the simplex; unlike those of one batch, these products have no bias. The
    update is ``sum_t w_t g_t`` on a third batch, with the new weights; or, with two batches, on the mean of both.
    Answers conflict of direction. The weights sum to 1.

    The losses of a step are those of two or three batches one after the other, see `SeveralBatches`. In
    `fastmtl.backward` and in `TaskGradients`, whose pass b T + t is that of task t on batch b; not in `FeatureSurgery`,
    since features of different batches have no products.

    Args:
        num_tasks: T, of one batch.
        gamma: Step size of the weights, above 0. It goes with the square of the gradients' size.
        rho: Pull towards equal weights, at least 0.
        scale_heads: See `SeveralBatches`.
        common: See `GradientMethod`.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: An option out of range; at the first step: losses that are not those of two or three batches.

    Note:
        Cost: two or three times the backward passes; then T^2 operations, no synchronisation. State:
        the weights, K T numbers, which move on finite steps in training mode.

    Reference:
        Chen, Fernando, Ying, Chen, "Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization and
        Conflict-Avoidance", NeurIPS 2023, Algorithm 1; two batches, and rho: its long form, JMLR 2024. Deviation: where
        tasks are absent. The defaults are those of the authors' code, which with two batches adds them up and leaves
        the mean to the learning rate.

    Example:
        >>> import torch, fastmtl
        >>> x, method = torch.nn.Parameter(torch.ones(2)), fastmtl.MoDo(num_tasks=2, rho=0.0)
        >>> batches = [torch.tensor([1., 2.]), torch.tensor([3., 1.]), torch.tensor([1., 1.])]
        >>> losses = [loss for batch in batches for loss in (x[0] * batch[0], x[1] * batch[1])]
        >>> fastmtl.backward(losses, method, [x]).weights
        tensor([0.0000, 0.0000, 0.0000, 0.0000, 0.4750, 0.5250], dtype=torch.float64)
    """

    facts = Facts("direction", "Chen, NeurIPS 2023", sums_to="1", needs="2 or 3 batches", state="K T", cost="T^2")
    batches = (2, 3)

    def __init__(
        self,
        num_tasks: int,
        gamma: float = 0.1,
        rho: float = 0.1,
        scale_heads: bool = True,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(num_tasks, scale_heads, **common)
        self.gamma, self.rho = real("gamma", gamma, 0, open=True), real("rho", rho, 0)

    def improve(self, weights: Tensor, step: Step, pull: Tensor | None) -> Tensor:
        """See `SeveralBatches.improve`."""
        return ops.projected_gradient(step.gramian, weights, step.mask, lr=self.gamma, ridge=self.rho)
