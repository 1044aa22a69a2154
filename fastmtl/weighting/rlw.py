"""RLW: random weights in every step."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.checks import choice
from fastmtl.facts import Facts
from fastmtl.random import DISTRIBUTIONS, new_rng
from fastmtl.weighting.base import WeightedSum


class RLW(WeightedSum):
    """Random Loss Weighting: weights drawn anew in every step; a baseline that other methods should beat.

    The weights are not negative and sum to 1 over the present tasks. Their mean is 1/n each, so that on average the
    gradient is that of the mean loss; what is added is noise.

    Args:
        num_tasks: T.
        distribution: ``"normal"`` (paper's default; LibMTL, TorchJD), ``"uniform"``, ``"dirichlet"``, ``"bernoulli"``
            or ``"constrained_bernoulli"``: see `fastmtl.random.random_weights`.
        generator: Where the seed comes from, at construction only; None: torch's default generator.

    Raises:
        TypeError, ValueError: An option of the wrong type, or an unknown one.

    Note:
        Cost: one small launch on the device, one ordinary backward pass, no synchronisation. State: the seed
        and the step's number; it moves as `WeightedSum` says. The same weights on all ranks and devices.

    Reference:
        Lin, Ye, Zhang, Tsang, "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning",
        TMLR 2022, section 3 and Algorithm 1. No deviation.

    Example:
        >>> import torch, fastmtl
        >>> weighting = fastmtl.RLW(num_tasks=2)
        >>> _ = weighting(torch.tensor([3., 3.]))
        >>> weighting.weights.sum()
        tensor(1., dtype=torch.float64)
    """

    facts = Facts("none", "Lin, TMLR 2022", sums_to="1", state="seed, step")
    rng: Tensor

    def __init__(self, num_tasks: int, distribution: str = "normal", generator: torch.Generator | None = None) -> None:
        super().__init__(num_tasks)
        self.distribution = choice("distribution", distribution, DISTRIBUTIONS)
        self.register_buffer("rng", new_rng(generator))

    def weigh(self, losses: Tensor, moves: Tensor) -> Tensor:
        """See `WeightedSum.weigh`."""
        weights = ops.random_weights(self.rng, ~losses.isnan().unsqueeze(0), self.distribution)[0]
        self.rng[1].add_(moves)
        return weights
