"""PBI: along a preferred direction, and not away from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.checks import choice, real, reals
from fastmtl.facts import Facts
from fastmtl.state import commit
from fastmtl.weighting.preference import PreferenceScalarization


class PBI(PreferenceScalarization):
    """Penalty-based boundary intersection: finds the point of the Pareto front in a preferred direction.

    With the losses ``f`` measured from the ideal point, and ``d = preference / |preference|``, the scalar is ``d1 +
    theta d2``: the distance ``d1 = f.d`` along the direction, and the distance ``d2 = |f - d1 d|`` from it. The weights
    are ``d + theta (f - d1 d) / d2``; they may be negative: a loss that is smaller than its share is let go.

    Args:
        num_tasks: T.
        theta: The penalty on ``d2``. Paper: 5. 0: the weighted sum.
        preference: The direction in which the losses shall lie, T numbers, not negative and not all 0; None: all alike.
            See `PreferenceScalarization`.
        ideal: The losses from which the others are measured: a number, or one per task; ``"running"``: the least so
            far of each task (paper).

    Raises:
        TypeError: An option of the wrong type.
        ValueError: An option out of range.

    Note:
        Cost: O(T) on the device, one ordinary backward pass, no synchronisation. State: the preference, and with
        ``ideal="running"`` the least losses. Where the losses lie in the direction itself, ``d2`` has no slope and adds
        none. Absent tasks are left out of ``f`` and ``d``.

    Reference:
        Zhang, Li, "MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition", IEEE Transactions on
        Evolutionary Computation 11(6), 2007, section II.C. Deviation: the ideal point is 0 by default, the usual bound
        of losses.

    Example:
        >>> import torch, fastmtl
        >>> losses = torch.tensor([4., 3.], requires_grad=True)
        >>> fastmtl.PBI(num_tasks=2, preference=[1., 0.])(losses).backward()  # 4 along, 3 away
        >>> losses.grad
        tensor([1., 5.])
    """

    facts = Facts("none", "Zhang, TEVC 2007", state="T")
    ideal_point: Tensor

    def __init__(
        self,
        num_tasks: int,
        theta: float = 5.0,
        preference: Sequence[float] | Tensor | None = None,
        ideal: float | Sequence[float] | str = 0.0,
    ) -> None:
        super().__init__(num_tasks, preference)
        self.theta = real("theta", theta, 0)
        if isinstance(ideal, str):
            choice("ideal", ideal, ("running",))
            self.register_state("ideal_point", (self.num_tasks,), float("inf"))
        else:
            ideal = reals("ideal", ideal)
            self.register_option("ideal_point", "ideal", ideal)
        self.ideal = ideal

    def observe(self, losses: Tensor, moves: Tensor) -> None:
        """See `Scalarization.observe`."""
        if self.ideal == "running":
            commit(self.ideal_point, torch.where(losses.isnan(), self.ideal_point, self._ideal(losses)), moves)

    def value(self, losses: Tensor, present: Tensor) -> Tensor:
        """See `Scalarization.value`."""
        height = torch.where(present, losses - self._ideal(losses.detach()), 0.0)
        direction = unit(torch.where(present, self.preference, 0.0))
        along = height @ direction
        return along + self.theta * norm(height - along * direction, 1e-12 * along.detach().abs())

    def _ideal(self, losses: Tensor) -> Tensor:
        return torch.minimum(self.ideal_point, losses) if self.ideal == "running" else self.ideal_point


def norm(x: Tensor, least: Tensor | float = 0.0) -> Tensor:
    """The Euclidean norm, of slope 0 where it is not above ``least``."""
    square = x @ x
    above = square > least**2
    return torch.where(above, torch.where(above, square, 1.0).sqrt(), 0.0)


def unit(x: Tensor) -> Tensor:
    """The direction of a vector; 0, of slope 0, for 0."""
    size = norm(x)
    return torch.where(size > 0, x / torch.where(size > 0, size, 1.0), 0.0)
