"""IMTL-L: learned scales bring all losses to the same size."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.checks import real
from fastmtl.facts import Facts
from fastmtl.weighting.learned import LearnedWeighting


class IMTLL(LearnedWeighting):
    """Impartial Multi-Task Learning, its loss balance: learned scales; answers differences of magnitude.

    The scalar is ``sum_t exp(s_t) L_t - s_t``. It is least in ``s_t`` where ``exp(s_t) L_t = 1``: every scaled loss
    tends to 1. With ``-s`` for ``s`` it is `UncertaintyWeighting` with ``variant="gal"``; the paper assumes no
    distribution.

    ``s`` is a parameter of this module and must be given to the optimizer: see `LearnedWeighting`.

    Args:
        num_tasks: T.
        init: First value of every ``s_t``. Paper: 0.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: ``num_tasks`` < 1, or an ``init`` that is not finite.

    Note:
        Cost: O(T), one ordinary backward pass. As a method (`fastmtl.backward`, ...) the weights are ``exp(s)``. Made
        for losses that are positive: at a negative one ``s_t`` grows without bound.

    Reference:
        Liu, Li, Kuang, Xue, Chen, Yang, Liao, Zhang, "Towards Impartial Multi-Task Learning", ICLR 2021, section 3.2.
        No deviation. (The gradient balance of the paper, IMTL-G, is a gradient method.)

    Example:
        >>> import torch, fastmtl
        >>> weighting = fastmtl.IMTLL(num_tasks=2)
        >>> weighting([torch.tensor(2.), torch.tensor(3.)]).backward()
        >>> weighting.s.grad
        tensor([1., 2.])
    """

    facts = Facts("magnitude", "Liu, ICLR 2021", needs="its parameters in the optimizer", state="T, learned")

    def __init__(self, num_tasks: int, init: float = 0.0) -> None:
        super().__init__(num_tasks, real("init", init))

    def terms(self) -> tuple[Tensor, Tensor]:
        """See `LearnedWeighting.terms`."""
        return torch.exp(self.s), -self.s
