"""STCH: a smooth maximum of the weighted losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.checks import choice, real, reals, whole
from fastmtl.facts import Facts
from fastmtl.state import Epochs, commit
from fastmtl.weighting.preference import PreferenceScalarization

VARIANTS = ("paper", "log")


class STCH(Epochs, PreferenceScalarization):
    """Smooth Tchebycheff scalarization: lowers the largest weighted loss; answers differences of magnitude.

    The scalar is ``mu log sum_t exp(p_t (L_t - ideal_t) / mu)``, which tends to the maximum of the ``p_t (L_t -
    ideal_t)`` as mu falls, p being the preference; the weights are ``p_t`` times a softmax. Every Pareto optimal
    solution is optimal for some preference, also where the front is not convex.

    ``variant="log"`` is the authors' code for multi-task learning, also in LibMTL: the same of ``T log(L_t /
    nadir_t)``, times T; with the default preference, ``T mu log sum_t (L_t / nadir_t)^(1 / mu)``. There ``nadir`` are
    the mean losses of epoch ``warmup_epochs`` (counted from 0); up to that epoch's end the scalar is ``sum_t log L_t``.

    Args:
        num_tasks: T.
        mu: Smoothness. Paper: 0.01 to 1; the authors' code for multi-task learning: 1.
        preference: T numbers, not negative and not all 0; None: 1/T each. See `PreferenceScalarization`.
        ideal: The least possible losses, for all tasks or one per task; for ``variant="paper"`` only.
        variant: See above.
        warmup_epochs: For ``variant="log"`` only. Authors' code: 4.
        nadir: For ``variant="log"`` only: T numbers above 0, instead of a warmup; None: measured.
        steps_per_epoch: For ``variant="log"`` only: steps after which an epoch ends by itself; None: `end_epoch` is
            called.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: An option out of range, or of the other variant.
        RuntimeError: `end_epoch` although epochs end by themselves.

    Note:
        Cost: O(T) on the device, one ordinary backward pass, no synchronisation. State: the preference, and in the
        ``"log"`` variant the epoch, sums and counts of losses; it moves as `WeightedSum` says. No overflow whatever mu.
        Losses of the ``"log"`` variant must be positive: otherwise the weights are NaN. A task that has no loss in the
        epoch that is measured has nadir 1.

    Reference:
        Lin, Zhang, Yang, Liu, Wang, Zhang, "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", ICML
        2024, equation 7 (section 3). Deviation: the authors' code adds 1e-20 to the quotients before the logarithm.

    Example:
        >>> import torch, fastmtl
        >>> losses = torch.tensor([1., 3.], requires_grad=True)
        >>> fastmtl.STCH(num_tasks=2, mu=1.)(losses).backward()  # softmax of 1/2 and 3/2, halved
        >>> losses.grad
        tensor([0.1345, 0.3655])
    """

    facts = Facts("magnitude", "Lin, ICML 2024", sums_to="1/T", state="T; with a nadir 3 T")
    lowest: Tensor
    sums: Tensor
    counts: Tensor
    epoch: Tensor

    def __init__(
        self,
        num_tasks: int,
        mu: float = 0.1,
        preference: Sequence[float] | Tensor | None = None,
        ideal: float | Sequence[float] | None = None,
        variant: str = "paper",
        warmup_epochs: int | None = None,
        nadir: Sequence[float] | None = None,
        steps_per_epoch: int | None = None,
    ) -> None:
        super().__init__(num_tasks, preference)
        self.mu, self.variant = real("mu", mu, 0, open=True), choice("variant", variant, VARIANTS)
        others = {"ideal": ideal} if variant == "log" else {"warmup_epochs": warmup_epochs, "nadir": nadir}
        if variant == "paper" or nadir is not None:
            others |= {"warmup_epochs": warmup_epochs, "steps_per_epoch": steps_per_epoch}
        for option, value in others.items():
            if value is not None:
                known = " with a nadir" if variant == "log" and nadir is not None and option != "ideal" else ""
                raise ValueError(f"{option}: variant={variant!r}{known} knows none, found {value}")
        self.register_epochs(steps_per_epoch)
        self.warmup_epochs = 4 if warmup_epochs is None else whole("warmup_epochs", warmup_epochs, 0)
        self.ideal = 0.0 if ideal is None else reals("ideal", ideal)
        self.nadir = nadir if nadir is None else reals("nadir", nadir, 0)
        if self.nadir is not None and (not isinstance(self.nadir, tuple) or 0 in self.nadir):
            raise ValueError(f"nadir: expected one number above 0 per task, found {nadir}")
        self.register_option("lowest", "ideal", self.ideal)
        if self.nadir is not None:
            self.register_option("sums", "nadir", self.nadir)
        elif variant == "log":
            self.register_state("sums", (self.num_tasks,))
            self.register_state("counts", (self.num_tasks,))
            self.register_state("epoch", (1,))

    def observe(self, losses: Tensor, moves: Tensor) -> None:
        """See `Scalarization.observe`."""
        if self.variant == "log" and self.nadir is None:
            present = ~losses.isnan()
            measured = moves & (self.epoch[0] == self.warmup_epochs)
            commit(self.sums, self.sums + torch.where(present, losses, 0.0), measured)
            commit(self.counts, self.counts + present, measured)
            self.count_step(moves)

    def close_epoch(self, where: Tensor) -> None:
        """See `Epochs.close_epoch`."""
        if self.variant == "log" and self.nadir is None:
            commit(self.epoch, self.epoch + 1, where)

    def value(self, losses: Tensor, present: Tensor) -> Tensor:
        """See `Scalarization.value`."""
        if self.variant == "paper":
            return self._maximum(losses - self.lowest, present)
        logs = losses.log()
        if self.nadir is not None:
            return self._log_variant(logs - self.sums.log(), present)
        nadir = torch.where(self.counts > 0, self.sums / self.counts, 1.0)
        smooth = self._log_variant(logs - nadir.log(), present)
        return torch.where(self.epoch[0] > self.warmup_epochs, smooth, torch.where(present, logs, 0.0).sum())

    def _log_variant(self, logs: Tensor, present: Tensor) -> Tensor:
        return self.num_tasks * self._maximum(self.num_tasks * logs, present)

    def _maximum(self, heights: Tensor, present: Tensor) -> Tensor:
        exponents = torch.where(present, self.preference * heights / self.mu, -float("inf"))
        return self.mu * torch.logsumexp(exponents, 0)
