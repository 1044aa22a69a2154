"""RandomGradWeights: new random weights in every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.checks import choice
from fastmtl.facts import Facts
from fastmtl.random import DISTRIBUTIONS, new_rng
from fastmtl.surgery.base import CommonOptions
from fastmtl.surgery.gramian_free import GramianFree

if TYPE_CHECKING:
    from typing_extensions import Unpack


class RandomGradWeights(GramianFree):
    """Weighs the tasks' gradients at random: the baseline that a method has to beat (RGW).

    The weights are the softmax of T draws from N(0, 1), new in every step and for every group of parameters, and sum
    to 1. They are a pure function of a seed and the step's number: the same on every device and every rank, resumed
    exactly from a checkpoint, and new in each replay of a captured CUDA graph.

    Args:
        distribution: What the weights are made of, see `fastmtl.random.random_weights`: ``"normal"`` (default),
            ``"uniform"``, ``"dirichlet"``, ``"bernoulli"`` or ``"constrained_bernoulli"``.
        generator: Where the seed comes from, at construction only; None: torch's default generator.
        common: See `GradientMethod`.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: An unknown option.

    Note:
        Cost: a few numbers per task and, with `fastmtl.backward`, one backward pass in place of T and a short one
        through heads; see `GramianFree` for where that holds. No synchronisation. State: the seed and the step's
        number, which moves on finite steps in training mode; in a step of one pass, which looks at no gradients,
        on every step.

    Reference:
        Lin, Ye, Zhang, Tsang, "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning",
        TMLR 2022, Algorithm 2. Deviations: a Bernoulli draw is not drawn again where it is all 0, but from those that
        are not, which is the same law.

    Example:
        >>> import torch, fastmtl
        >>> method = fastmtl.RandomGradWeights(generator=torch.Generator().manual_seed(0))
        >>> method(torch.eye(2))
        tensor([0.5834, 0.4166], dtype=torch.float64)
    """

    facts = Facts("none", "Lin, TMLR 2022", sums_to="1", state="seed, step", cost="one pass")
    rng: Tensor

    def __init__(
        self,
        distribution: str = "normal",
        generator: torch.Generator | None = None,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(**common)
        self.distribution = choice("distribution", distribution, DISTRIBUTIONS)
        self.register_buffer("rng", new_rng(generator))

    def choose(self, present: Tensor) -> Tensor:
        """See `GramianFree.choose`."""
        if self.rng.device != present.device:
            self.rng = self.rng.to(present.device)
        return ops.random_weights(self.rng, present > 0, self.distribution, present.dtype)

    def advance(self, where: Tensor) -> None:
        """See `GramianFree.advance`."""
        self.rng[1].add_(where)
