"""TrimmedMean: the mean of each element of the gradients without its extremes."""

from __future__ import annotations

from torch import Tensor

from fastmtl import ops
from fastmtl.checks import whole
from fastmtl.facts import Facts
from fastmtl.rows import Rows
from fastmtl.surgery.row_method import ElementwiseMethod


class TrimmedMean(ElementwiseMethod):
    """Averages each element over the tasks without its ``trim`` largest and its ``trim`` smallest values.

    No ``trim`` tasks, whatever their gradients, can move the outcome beyond what the other tasks' values span. Robust
    against single tasks of broken or hostile gradients; for tasks that merely differ it drops what is particular to
    each.

    Args:
        trim: How many on each side, below T / 2. Of a parameter that only n tasks reach, at most ``(n - 1) // 2``.

    Raises:
        TypeError, ValueError: ``trim`` is not a whole number, or negative; in a step, not below T / 2.

    Note:
        Cost: one read of the per-task gradients and one write; no Gramian, no synchronisation. Per element of a row
        about ``2 trim`` comparisons up to ``trim = 4``, ``log(T)^2 / 4`` above it (on CUDA then T at most 512). NaN
        stays NaN; infinities are values to be trimmed. No weights: ``Result.weights`` and ``Result.gramian`` are None,
        and groups make no difference. The outcome has the size of a mean, not of a sum.

    Reference:
        Yin, Chen, Ramchandran, Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
        ICML 2018, Definition 2. Deviation: a number of tasks where the paper has a share of the workers.

    Example:
        >>> import torch, fastmtl
        >>> fastmtl.aggregate(torch.tensor([[1., 9.], [2., -5.], [4., 3.], [600., 5.]]), fastmtl.TrimmedMean(1)).grads
        tensor([3., 4.])
    """

    facts = Facts("none", "Yin, ICML 2018", cost="trim T P, no Gramian")

    def __init__(self, trim: int = 1) -> None:
        super().__init__()
        self.trim = whole("trim", trim, 0)

    def merge(self, rows: Rows, taking_part: Tensor, widen: bool = False) -> list[Tensor | None]:
        """See `ElementwiseMethod.merge`."""
        if rows.num_tasks <= 2 * self.trim:
            raise ValueError(f"trim: of {rows.num_tasks} tasks nothing is left without {self.trim} on each side")
        merged: list[Tensor | None] = ops.trimmed_mean(rows, taking_part, self.trim, widen=widen)
        return merged
