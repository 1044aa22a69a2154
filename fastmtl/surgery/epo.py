"""EPO: the Pareto-optimal solution at which the losses are in given proportions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.checks import flag, preferences, real
from fastmtl.facts import Facts
from fastmtl.surgery.base import CommonOptions, GradientMethod, Step

if TYPE_CHECKING:
    from typing_extensions import Unpack

_SMALLEST_SHARE = 2.0**-52


class EPO(GradientMethod):
    """Goes to the point of the Pareto front where ``r_1 L_1 = ... = r_T L_T``, by exact Pareto optimal search.

    How far the losses are from that is ``mu = sum_t s_t log(T s_t)`` for ``s_t = r_t L_t / sum r L``, and
    ``a_t = r_t (log(T s_t) - mu)`` the way back. While ``mu > eps`` the step balances: of all convex combinations of
    the gradients it takes the one that goes furthest along ``sum_t a_t g_t``, where the largest ``r_t L_t`` may not
    rise, nor those fall behind that this way leaves alone. Otherwise it descends: the combination along which the
    losses fall fastest in sum, none of them rises, and, unless ``relaxed``, the balance does not get worse. Both are
    linear programs in the weights. Answers conflict of direction, with a preference. The weights sum to 1.

    Args:
        preference: r, one number above 0 per task: a task with a larger one ends with a smaller loss. None: equal
            losses.
        relaxed: Descend without keeping the balance.
        eps: Below which mu counts as balanced, at least 0. Paper's code: 1e-4.
        common: See `GradientMethod`. The paper's code multiplies the weights by T: ``rescale="sum_to_num_tasks"``.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: An option out of range; at the first step: a preference for another number of tasks.

    Note:
        Cost: a linear program by the simplex method, about T pivots of T^2 operations, and some 30 launches on a GPU;
        no synchronisation. Meant for up to about 128 tasks. No state, no randomness. The losses must not be negative:
        the weights are NaN where one is. Where a linear program has several solutions one of them is taken, always the
        same.

    Reference:
        Mahapatra, Rajan, "Multi-Task Learning with User Preferences: Gradient Descent with Controlled Ascent in Pareto
        Optimization", ICML 2020, equation 24 and Algorithm 1, with the restricted descent of section 4. As in the
        public code: that keeps ``a.M w >= min(0, max Ma)``; where no weights do, they are in proportion to r. No
        deviation known; absent tasks are left out of mu and a.

    Example:
        >>> import torch, fastmtl
        >>> gramian = torch.tensor([[1., -.5], [-.5, 2.]])
        >>> fastmtl.EPO()(gramian, losses=torch.tensor([1., 1.]))  # balanced: none may rise
        tensor([0.3333, 0.6667], dtype=torch.float64)
        >>> fastmtl.EPO(preference=[1, 3])(gramian, losses=torch.tensor([1., 1.]))  # the first may
        tensor([0., 1.], dtype=torch.float64)
    """

    needs_losses = True
    facts = Facts("direction", "Mahapatra, ICML 2020", sums_to="1", needs="losses >= 0", cost="T^3", up_to=128)

    def __init__(
        self,
        preference: Sequence[float] | Tensor | None = None,
        relaxed: bool = False,
        eps: float = 1e-4,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(**common)
        self.preference = preferences(preference, open=True)
        self.relaxed = flag("relaxed", relaxed)
        self.eps = real("eps", eps, 0)
        self.positional = preference is not None

    def solve(self, step: Step) -> Tensor:
        """See `GradientMethod.solve`."""
        assert step.losses is not None
        m, present = step.gramian, step.present
        r = self.per_task("preference", m)
        size = torch.where(present, r * step.losses, 0.0)
        mu, away = imbalance(size, r, present)
        pairs = present.unsqueeze(-1) & present.unsqueeze(-2)
        known = torch.where(pairs, m, 0.0)
        pulls = (known @ away.unsqueeze(-1)).squeeze(-1)
        balancing = mu > self.eps
        helped = (pulls > 0) & present
        largest = present & (size == size.amax(-1, keepdim=True))
        bounds = torch.where(helped, float("-inf"), pulls)
        bounds = torch.where(largest | ~helped.any(-1, keepdim=True), 0.0, bounds)
        least = torch.where(present, pulls, float("-inf")).amax(-1).clamp(max=0)
        free = balancing.squeeze(-1) | self.relaxed
        weights, missed = ops.simplex_lp(
            m,
            torch.where(balancing, pulls, known.sum(-1)),
            torch.where(balancing, bounds, 0.0),
            pulls,
            torch.where(free, float("-inf"), least),
            step.mask,
        )
        share = torch.where(present, r, 0.0)
        share = share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(m.dtype).tiny)
        weights = torch.where(missed.unsqueeze(-1) > 0, share, weights)
        return torch.where(step.finite & (size >= 0).all(-1, keepdim=True), weights, float("nan"))


def imbalance(size: Tensor, r: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's non-uniformity and anchor direction.

    Args:
        size: ``r_t L_t``, ``[K, T]``; 0 for absent tasks.
        r: The preference, ``[T]``.
        present: bool ``[K, T]``.

    Returns:
        mu, ``[K, 1]``, and a, ``[K, T]``, 0 for absent tasks. A share of 0 counts as 2^-52 in a, and not at all in mu.
    """
    count, total = present.sum(-1, keepdim=True).clamp(min=1), size.sum(-1, keepdim=True)
    share = torch.where(total == 0, 1 / count, size / total)
    logs = (count * share.clamp(min=_SMALLEST_SHARE)).log()
    mu = torch.where(present, share * logs, 0.0).sum(-1, keepdim=True)
    return mu, torch.where(present, r * (logs - mu), 0.0)
