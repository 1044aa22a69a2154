"""GradVac: turn gradients until they agree as well as they usually do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.checks import flag, real
from fastmtl.facts import Facts
from fastmtl.surgery.base import CommonOptions, RandomOrderMethod, Step

if TYPE_CHECKING:
    from typing_extensions import Unpack


class GradVac(RandomOrderMethod):
    """Raises the cosine between each pair of gradients to a target learned as a moving average.

    For each task i, over the other tasks j in random order, with phi the cosine between the current ``g_i'`` and the
    original ``g_j``: where phi is below the target, enough of ``g_j`` is added to ``g_i'`` to reach it. Then the target
    moves towards phi: ``target_ij = (1 - beta) target_ij + beta phi``. The update is the sum of the ``g_i'``. Targets
    start at 0, so the first step equals PCGrad's. Answers conflict of direction.

    Each group of parameters (``groups=`` of the entry points) has its own targets; the paper found one group per layer
    best.

    Args:
        beta: Rate of the moving average, in [0, 1]. Paper: 0.01.
        init: The targets' first value, in (-1, 1). Paper: 0.
        ema_first: Move the target before comparing with it (public variant). Paper: False.
        ema_always: Move it on every pair; False: only where a correction was made (public variant). Paper: True.
        order: As for `PCGrad`.
        generator: As for `PCGrad`.
        common: See `GradientMethod`.

    Raises:
        TypeError, ValueError: An option of the wrong type, or out of range.

    Note:
        Cost: T^2 updates of T numbers on the Gramian; one launch on a GPU, no synchronisation. State: targets
        ``[K, T, T]``, the seed, the step's number. Pairs with a zero gradient are skipped and leave their target alone.

    Reference:
        Wang, Tsvetkov, Firat, Cao, "Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively
        Multilingual Models", ICLR 2021, Algorithm 1 and equation 3. No deviation with the defaults.

    Example:
        >>> import torch, fastmtl
        >>> fastmtl.aggregate(torch.tensor([[-4., 1., 1.], [6., 1., 1.]]), fastmtl.GradVac()).grads
        tensor([0.5848, 3.8012, 3.8012])
    """

    positional = True
    facts = Facts("direction", "Wang, ICLR 2021", sums_to="T or more", state="K T^2, seed, step", cost="T^3")
    targets: Tensor

    def __init__(
        self,
        beta: float = 0.01,
        init: float = 0.0,
        ema_first: bool = False,
        ema_always: bool = True,
        order: str | Tensor = "random",
        generator: torch.Generator | None = None,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(order, generator, **common)
        self.beta, self.init = real("beta", beta, 0, 1), real("init", init, -1, 1, open=True)
        self.ema_first, self.ema_always = flag("ema_first", ema_first), flag("ema_always", ema_always)
        self.register_state("targets")

    def solve(self, step: Step) -> Tensor:
        """See `GradientMethod.solve`."""
        targets = self.state("targets", step.gramian, tuple(step.gramian.shape), self.init)
        order, rng = self.draw(step)
        weights, moved = ops.gradvac(
            step.gramian, targets, step.mask, order, rng, self.beta, self.ema_first, self.ema_always
        )
        step.commit(targets, moved)
        self.advance(step)
        return weights
