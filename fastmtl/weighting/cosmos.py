"""COSMOS: one network for all preferences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.checks import real, reals
from fastmtl.distributed import device_of, several
from fastmtl.facts import Facts
from fastmtl.random import dirichlet, new_rng
from fastmtl.weighting.pbi import unit
from fastmtl.weighting.preference import PreferenceScalarization


class COSMOS(PreferenceScalarization):
    """Weighted sum with a reward for losses in the preference's direction: learns the whole Pareto front at once.

    The scalar is ``r.L - penalty cos(r, L)``, ``r`` being the preference. In the paper ``r`` is drawn anew for every
    batch and given to the network as a further input, so that one network serves all preferences::

        r = weighting.sample(concentration=1.2)
        losses = losses_of(network(torch.cat([x, r.to(x).expand(len(x), -1)], 1)))
        weighting(losses).backward()

    Args:
        num_tasks: T.
        penalty: lambda. 0: the weighted sum. Paper: 0.01 to 8, by data set.
        preference: ``r``, T numbers, not negative and not all 0; None: 1/T each. See `PreferenceScalarization`.
        generator: Where the seed of `sample` comes from, at construction only; None: torch's default generator.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: An option out of range.

    Note:
        Cost: O(T) on the device, one ordinary backward pass, no synchronisation. State: the preference, seed and step
        of `sample`. Absent tasks are left out of both ``r`` and ``L``. A weight may be negative.

    Reference:
        Ruchte, Grabocka, "Scalable Pareto Front Approximation for Deep Multi-Objective Learning", ICDM 2021, equation 6
        and Algorithm 1. The network's part is the user's.

    Example:
        >>> import torch, fastmtl
        >>> fastmtl.COSMOS(num_tasks=2, penalty=1.)(torch.tensor([3., 3.]))  # 3, less a cosine of 1
        tensor(2.)
    """

    facts = Facts("none", "Ruchte, ICDM 2021", needs="a network that sees the preference", state="T, seed, step")
    rng: Tensor

    def __init__(
        self,
        num_tasks: int,
        penalty: float = 1.0,
        preference: Sequence[float] | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(num_tasks, preference)
        self.penalty = real("penalty", penalty, 0)
        self.register_buffer("rng", new_rng(generator))
        self._law: tuple[tuple[float, ...], Tensor] | None = None

    def sample(self, concentration: float | Sequence[float] = 1.0) -> Tensor:
        """Draw a preference from a Dirichlet distribution: once per batch, before the network's pass.

        Args:
            concentration: For all tasks or one per task, above 0. 1: uniform on the simplex; less: near its corners.

        Returns:
            The preference from now on, ``[T]`` float64, on the device of the state; in evaluation mode and under
            ``torch.no_grad()``, the one that there is. The same on all ranks, all of which must call it.

        Raises:
            TypeError, ValueError: Not numbers above 0, or of another number of tasks.
        """
        each = reals("concentration", concentration, 0)
        each = (each,) * self.num_tasks if isinstance(each, float) else each
        if len(each) != self.num_tasks or 0 in each:
            raise ValueError(f"concentration: expected {self.num_tasks} numbers above 0, found {concentration}")
        if self.training and torch.is_grad_enabled():
            if several(self.process_group):
                self._align(self.rng.device if self.rng.is_cuda else device_of(self.process_group))
            with torch.no_grad():
                if self._law is None or self._law[0] != each or self._law[1].device != self.rng.device:
                    self._law = each, torch.tensor(each, dtype=torch.float64, device=self.rng.device)  # sent once
                self.preference = dirichlet(self.rng, self._law[1])
                self.rng[1].add_(1)
        return self.preference

    def value(self, losses: Tensor, present: Tensor) -> Tensor:
        """See `Scalarization.value`."""
        there = torch.where(present, losses, 0.0)
        wanted = torch.where(present, self.preference, 0.0)
        return wanted @ there - self.penalty * (unit(wanted) @ unit(there))
