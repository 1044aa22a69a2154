"""DWA: tasks whose loss falls more slowly weigh more."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.checks import choice, real, whole
from fastmtl.facts import Facts
from fastmtl.state import Epochs, commit
from fastmtl.weighting.base import WeightedSum

REDUCTIONS = ("sum", "mean")


class DWA(Epochs, WeightedSum):
    """Dynamic Weight Average: weighs each task by how slowly its loss falls; answers differences of velocity.

    With ``r_t`` = mean loss of the last epoch / mean loss of the epoch before, the weights of an epoch are
    ``T softmax(r / temperature)``: 1 for all in the first two epochs, and always of sum T.

    The end of an epoch is one call, `end_epoch`, or comes by itself every ``steps_per_epoch`` steps. An epoch's mean
    counts the batches that had the task; a rate that is unknown (a task absent for an epoch, a mean of 0 in the epoch
    before) counts as 1. An epoch without a step is none.

    Args:
        num_tasks: T.
        temperature: Larger: more equal weights. Paper: 2.
        steps_per_epoch: Steps after which an epoch ends by itself; None: `end_epoch` is called.
        window: k: no epochs, as in the public code of Nash-MTL (there 25). ``r_t`` is the mean of the last k losses,
            this step's included, over the mean of the k before them. Losses before the first step count as 1, and the
            weights are 1 in the first k + 1 steps: so the losses should be near 1 at first. `end_epoch` does nothing.
        reduction: ``"sum"``: the scalar is ``sum_t w_t L_t`` (paper). ``"mean"``: that divided by the number of present
            tasks (the same public code).

    Raises:
        TypeError: An option of the wrong type.
        ValueError: An option out of range, or both ``window`` and ``steps_per_epoch``.
        RuntimeError: `end_epoch` although epochs end by themselves.

    Note:
        Cost: O(T), with a window O(kT), on the device; one ordinary backward pass; no synchronisation. State: means of
        two epochs and the sums of this one, or 2k losses per task. It moves as `WeightedSum` says.

    Reference:
        Liu, Johns, Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019, equation 7. No deviation for
        positive losses.

    Example:
        >>> import torch, fastmtl
        >>> weighting = fastmtl.DWA(num_tasks=3, steps_per_epoch=1)
        >>> for epoch in ([2., 1., 4.], [1., .9, 3.]):
        ...     _ = weighting(torch.tensor(epoch))
        >>> losses = torch.ones(3, requires_grad=True)
        >>> weighting(losses).backward()
        >>> losses.grad
        tensor([0.8943, 1.0923, 1.0134])
    """

    facts = Facts("velocity", "Liu, CVPR 2019", sums_to="T", needs="the epochs' ends", state="4 T")
    means: Tensor
    sums: Tensor
    counts: Tensor
    history: Tensor

    def __init__(
        self,
        num_tasks: int,
        temperature: float = 2.0,
        steps_per_epoch: int | None = None,
        window: int | None = None,
        reduction: str = "sum",
    ) -> None:
        super().__init__(num_tasks)
        self.temperature = real("temperature", temperature, 0, open=True)
        self.window = None if window is None else whole("window", window, 1)
        if window is not None and steps_per_epoch is not None:
            raise ValueError(f"window: knows no epochs; drop steps_per_epoch={steps_per_epoch}")
        self.reduction = choice("reduction", reduction, REDUCTIONS)
        self.register_epochs(steps_per_epoch)
        if self.window is None:
            self.register_state("means", (2, self.num_tasks), float("nan"))  # of the epoch before the last, of the last
            self.register_state("sums", (self.num_tasks,))
            self.register_state("counts", (self.num_tasks,))
        else:
            self.register_state("history", (2 * self.window, self.num_tasks), 1.0)  # oldest first

    def weigh(self, losses: Tensor, moves: Tensor) -> Tensor:
        """See `WeightedSum.weigh`."""
        present = ~losses.isnan()
        if self.window is None:
            before, last = self.means.unbind(0)
            rates = last / before
            commit(self.sums, self.sums + torch.where(present, losses, 0.0), moves)
            commit(self.counts, self.counts + present, moves)
        else:
            history = torch.cat([self.history[1:], losses.unsqueeze(0)])
            rates = history[self.window :].nanmean(0) / history[: self.window].nanmean(0)
            rates = torch.where(self.steps > self.window, rates, 1.0)
            commit(self.history, history, moves)
        weights = self.num_tasks * torch.softmax(torch.where(rates.isfinite(), rates, 1.0) / self.temperature, 0)
        self.count_step(moves)
        return weights if self.reduction == "sum" else weights / present.sum()

    def close_epoch(self, where: Tensor) -> None:
        """See `Epochs.close_epoch`."""
        if self.window is not None:
            return
        where = where & (self.counts.sum() > 0)
        commit(self.means, torch.stack([self.means[1], self.sums / self.counts]), where)
        commit(self.sums, torch.zeros_like(self.sums), where)
        commit(self.counts, torch.zeros_like(self.counts), where)
