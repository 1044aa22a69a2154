"""ReLoBRaLo: relative loss balancing with random lookback."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.checks import choice, real
from fastmtl.facts import Facts
from fastmtl.random import new_rng, uniforms
from fastmtl.state import commit
from fastmtl.weighting.base import WeightedSum

STARTS = ("history", "balance")


class ReLoBRaLo(WeightedSum):
    """Weighs each task by how its loss stands to the last step's and to the first; answers differences of velocity.

    With ``balance(i) = n softmax(L / (temperature L(i)))`` over the n present tasks, ``L(i)`` being the losses of step
    i, the weights are ``alpha (rho w + (1 - rho) balance(0)) + (1 - alpha) balance(last)``, where w are the last
    weights and rho is drawn: 1 with probability ``lookback``, else 0: now and then the weights look back at the start.
    What has fallen less weighs more. The first step's weights are 1.

    Args:
        num_tasks: T.
        alpha: How much of the last weights is kept. Authors' code: 0.999.
        temperature: Larger: more equal weights. Authors' code: 0.1.
        lookback: E[rho], the probability that history is not replaced by the look back at the start. Authors' code:
            0.99.
        start: The second step's weights. ``"history"``: by the formula, as all others. ``"balance"``: ``balance(0)`` (a
            published code of the authors), without which weights rise slowly from 1.
        generator: Where the seed comes from, at construction only; None: torch's default generator.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: An option out of range.

    Note:
        Cost: O(T) on the device, one ordinary backward pass, no synchronisation. State: the first and last losses, the
        weights, seed and step; it moves as `WeightedSum` says. A task that comes late starts with its own first loss;
        an absent one keeps its weight. A loss of 0 in the denominator counts as 1e-12 (authors' code).

    Reference:
        Bischof, Kraus, "Multi-Objective Loss Balancing for Physics-Informed Deep Learning", 2021 (arXiv 2110.09813),
        section 3 (ReLoBRaLo). No deviation for positive losses.

    Example:
        >>> import torch, fastmtl
        >>> weighting = fastmtl.ReLoBRaLo(num_tasks=2, alpha=0., temperature=1.)
        >>> for losses in ([2., 2.], [1., 2.]):
        ...     _ = weighting(torch.tensor(losses))
        >>> weighting.weights  # 2 softmax of 1/2 and 1
        tensor([0.7551, 1.2449], dtype=torch.float64)
    """

    facts = Facts("velocity", "Bischof, 2021", sums_to="T", state="3 T, seed, step")
    first: Tensor
    last: Tensor
    history: Tensor
    rng: Tensor

    def __init__(
        self,
        num_tasks: int,
        alpha: float = 0.999,
        temperature: float = 0.1,
        lookback: float = 0.99,
        start: str = "history",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(num_tasks)
        self.alpha, self.temperature = real("alpha", alpha, 0, 1), real("temperature", temperature, 0, open=True)
        self.lookback, self.start = real("lookback", lookback, 0, 1), choice("start", start, STARTS)
        self.register_state("first", (self.num_tasks,), float("nan"))
        self.register_state("last", (self.num_tasks,), float("nan"))
        self.register_state("history", (self.num_tasks,), 1.0)  # the last weights
        self.register_buffer("rng", new_rng(generator))

    def weigh(self, losses: Tensor, moves: Tensor) -> Tensor:
        """See `WeightedSum.weigh`."""
        present = ~losses.isnan()
        first = torch.where(self.first.isnan(), losses, self.first)
        last = torch.where(self.last.isnan(), losses, self.last)
        keeps = uniforms(self.rng, 1, 1)[0] < self.lookback
        from_first, from_last = self._balance(losses, first, present), self._balance(losses, last, present)
        weights = self.alpha * torch.where(keeps, self.history, from_first) + (1 - self.alpha) * from_last
        if self.start == "balance":
            weights = torch.where(self.rng[1] == 1, from_last, weights)
        commit(self.first, first, moves)
        commit(self.last, torch.where(present, losses, self.last), moves)
        commit(self.history, torch.where(present, weights, self.history), moves)
        self.rng[1].add_(moves)
        return weights

    def _balance(self, losses: Tensor, earlier: Tensor, present: Tensor) -> Tensor:
        ratios = losses / (self.temperature * earlier + 1e-12)
        return present.sum() * torch.softmax(torch.where(present, ratios, -float("inf")), 0)
