"""Uncertainty weighting: learned variances weigh the losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fastmtl.checks import choice, real
from fastmtl.facts import Facts
from fastmtl.weighting.learned import LearnedWeighting

KINDS = ("regression", "classification")
VARIANTS = ("kendall", "gal", "liebel", "article")


class UncertaintyWeighting(LearnedWeighting):
    """Weighs each loss by a learned variance ``sigma_t^2``; answers differences of magnitude.

    The scalar is the sum over the tasks of one of these, ``s_t`` being what is learned:

    - ``variant="kendall"``, ``s = log sigma^2``: the paper's ``exp(-s) L / 2 + s / 2`` (``kind="regression"``) or
      ``exp(-s) L + s / 2`` (``kind="classification"``). Public code often takes one of them for all tasks; that of MTAN
      and LibMTL is ``kind="regression", init=-0.5``.
    - ``"gal"``, ``s = log sigma^2``: ``exp(-s) L + s``, twice the paper's regression, as in the notebook that the
      paper's second author published (multi-task-learning-example).
    - ``"liebel"``, ``s = sigma``: ``L / (2 s^2) + log(1 + s^2)``. The second term is never negative: the scalar stays
      positive. Liebel and Koerner; so parametrised, from 1, in public code.
    - ``"article"``, ``s = log sigma``: ``exp(-2 s) L / 2 + log(1 + exp(s))``, which is ``L / (2 sigma^2) + log(1 +
      sigma)``.

    ``s`` is a parameter of this module and must be given to the optimizer: see `LearnedWeighting`.

    Args:
        num_tasks: T.
        kind: ``"regression"``, ``"classification"`` (default), or one of them per task; for ``"kendall"`` only.
        init: First value of every ``s_t``; None: 0, for ``"liebel"`` 1: then every ``sigma_t`` is 1.
        variant: See above.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: ``num_tasks`` < 1, an ``init`` that is not finite, an unknown kind or variant, a kind with a variant
            that knows none, or ``init=0`` for ``"liebel"``.

    Note:
        Cost: O(T), one ordinary backward pass. As a method (`fastmtl.backward`, ...) the weights are the factors of
        ``L``. The gradient of an absent task's ``s_t`` is 0, not missing, as ``s`` is one parameter: plain gradient
        descent leaves it alone, but an optimizer with momentum, such as Adam, moves it on.

    Reference:
        Kendall, Gal, Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and
        Semantics", CVPR 2018, equations 7 and 10. Liebel, Koerner, "Auxiliary Tasks in Multi-task Learning", 2018
        (arXiv 1805.06334). No deviation.

    Example:
        >>> import torch, fastmtl
        >>> weighting = fastmtl.UncertaintyWeighting(num_tasks=2, kind=["regression", "classification"])
        >>> weighting([torch.tensor(2.), torch.tensor(3.)])
        tensor(4., grad_fn=<SumBackward0>)
    """

    facts = Facts("magnitude", "Kendall, CVPR 2018", needs="its parameters in the optimizer", state="T, learned")
    factor: Tensor

    def __init__(
        self,
        num_tasks: int,
        kind: str | Sequence[str] | None = None,
        init: float | None = None,
        variant: str = "kendall",
    ) -> None:
        choice("variant", variant, VARIANTS)
        if kind is not None and variant != "kendall":
            raise ValueError(f"kind: variant={variant!r} knows none, found {kind!r}")
        first = (1.0 if variant == "liebel" else 0.0) if init is None else real("init", init)
        if first == 0 and variant == "liebel":
            raise ValueError(f"init: variant='liebel' divides by it, found {init}")
        super().__init__(num_tasks, first)
        self.variant = variant
        kind = "classification" if kind is None else kind
        kinds = [kind] * self.num_tasks if isinstance(kind, str) else kind
        if not isinstance(kinds, Sequence):
            raise TypeError(f"kind: expected one of {KINDS}, or one per task, found {kind!r}")
        if len(kinds) != self.num_tasks:
            raise ValueError(f"kind: expected one per task ({self.num_tasks}), found {len(kinds)}")
        for t, k in enumerate(kinds):
            choice(f"kind of task {t}", k, KINDS)
        self.kind = kind if variant == "kendall" else None
        factor = torch.tensor([0.5 if k == "regression" else 1.0 for k in kinds])
        self.register_buffer("factor", factor, persistent=False)

    def terms(self) -> tuple[Tensor, Tensor]:
        """See `LearnedWeighting.terms`."""
        s: Tensor = self.s
        if self.variant == "kendall":
            return self.factor * torch.exp(-s), 0.5 * s
        if self.variant == "gal":
            return torch.exp(-s), s
        if self.variant == "liebel":
            return 0.5 / s**2, torch.log1p(s**2)
        return 0.5 * torch.exp(-2 * s), softplus(s)
