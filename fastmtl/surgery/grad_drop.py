"""GradDrop: keep of each element of the gradients one sign, at random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.checks import reals
from fastmtl.facts import Facts
from fastmtl.random import new_rng
from fastmtl.rows import Rows
from fastmtl.surgery.row_method import ElementwiseMethod


class GradDrop(ElementwiseMethod):
    """Where the tasks' gradients disagree about an element's sign, one sign is drawn and the others' values dropped.

    Per element, with ``P = (1 + sum_t g_t / sum_t |g_t|) / 2``, the share of what is positive, and U uniform on (0, 1):
    where ``f(P) > U`` the positive values are kept, else the negative ones; the update is their sum. Answers conflict
    of direction, element by element; in expectation the signs of large and unanimous gradients survive.

    Args:
        leak: The share of a task's value that passes where it is dropped, 0 to 1; a number, or one per task.
        f: A map of tensors from and to [0, 1], monotonic, with ``f(1/2) = 1/2``, in place of the identity. It keeps the
            kernel out: plain PyTorch then, with a host synchronisation.
        generator: Where the seed comes from, at construction only; None: torch's default generator.

    Raises:
        TypeError, ValueError: An option of the wrong type or out of range.

    Note:
        Cost: one read of the per-task gradients and one write, and one read of the outcome, which tells whether it is
        finite; no Gramian, no synchronisation. State: the seed and the step's number. The random numbers are a function
        of seed, step, and the element's place alone: the same on every device and for any number of threads. No
        weights: ``Result.weights`` and ``Result.gramian`` are None, and groups make no difference. Heads get their
        plain gradients.

    Reference:
        Chen, Ngiam, Huang, Luong, Kretzschmar, Chai, Anguelov, "Just Pick a Sign: Optimizing Deep Multitask Models with
        Gradient Sign Dropout", NeurIPS 2020, Algorithm 1. Deviation: on the gradients of parameters, where there is no
        batch to sum over and no activation whose sign would count.

    Example:
        >>> import torch, fastmtl
        >>> _ = torch.manual_seed(0)
        >>> grads = torch.tensor([[1., 1., -1., 0.], [2., -1., -3., 0.]])
        >>> fastmtl.aggregate(grads, fastmtl.GradDrop()).grads[[0, 2, 3]]
        tensor([ 3., -4.,  0.])
    """

    facts = Facts("direction", "Chen, NeurIPS 2020", state="seed, step", cost="T P, no Gramian")

    has_state = True
    rng: Tensor

    def __init__(
        self,
        leak: Any = 0.0,
        f: Callable[[Tensor], Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.leak = reals("leak", leak, 0, 1)
        if f is not None and not callable(f):
            raise TypeError(f"f: expected a function of a tensor, or None, found {f!r}")
        self.f = f
        self.positional = isinstance(self.leak, tuple)
        self.register_buffer("rng", new_rng(generator))

    def merge(self, rows: Rows, taking_part: Tensor, widen: bool = False) -> list[Tensor | None]:
        """See `ElementwiseMethod.merge`."""
        if self.rng.device != rows.device:
            self.rng = self.rng.to(rows.device)
        leak = None if self.leak == 0 else self.per_task("leak", taking_part)
        merged: list[Tensor | None] = ops.grad_drop(rows, taking_part, self.rng, leak, widen=widen, f=self.f)
        return merged

    def advance(self, finite: Tensor) -> None:
        """The next step draws other numbers."""
        self.rng[1].add_(finite)
