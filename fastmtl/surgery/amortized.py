"""Amortized: a method's weights, solved in some steps and used in those between."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.checks import real, whole
from fastmtl.rows import constant_mask
from fastmtl.surgery.base import GradientMethod, Step
from fastmtl.surgery.row_method import refuse_row_method


class Amortized(GradientMethod):
    """Solves ``method`` in every k-th step only and uses its weights in the steps between.

    In a step between, `fastmtl.backward` takes one weighted backward pass for the shared parameters in place of T, and
    the heads get their plain gradients as always. The other ways in have the per-task gradients anyway: there only the
    weights are held.

    A step with a task for which the method was never solved solves, too (so each does while a task reaches no shared
    parameter). Where tasks are absent in turn, each has the weight of the last solved step in which it took part: these
    need not sum to what the method's weights do. The method's own state moves in the steps that solve it only.

    Args:
        method: A gradient method, for one group of parameters (with ``groups=`` it raises: one backward pass has one
            weight per task).
        update_every: k, at least 1: one step in k solves.
        warmup_steps: So many steps at first all solve, at least 0.
        max_conflict: Share of conflicting pairs of tasks (0 to 1) above which the step after a solved one solves, too.
            None: only the count of the steps matters.

    Raises:
        TypeError: ``method`` is not a gradient method (a loss weighting needs no T passes); an option of another type.
        ValueError: An option out of range; a method that works on the per-task gradients themselves.

    Note:
        Whether to solve is decided on the host, so steps cannot be captured in a CUDA graph. It synchronises with the
        host once after a step that solved, to learn whether the weights are finite; and in steps whose set of tasks is
        not that of the step before, or is not known to the host (tasks absent behind `FeatureSurgery`). State:
        T weights, and two counts in ``state_dict``; all move in training mode only. Weights of a step that is not
        finite are not kept. `fastmtl.backward` wants ``nonfinite="propagate"`` with it, since a step between looks at
        no task's gradient.

    Reference:
        Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022: weights updated every few steps only, there
        for Nash-MTL. Deviations: any method; heads keep their plain gradients; ``warmup_steps``, ``max_conflict``.

    Example:
        >>> import torch, fastmtl
        >>> method = fastmtl.Amortized(fastmtl.MGDA(), update_every=2)
        >>> method(torch.diag(torch.tensor([1., 4.])))
        tensor([0.8000, 0.2000], dtype=torch.float64)
        >>> method(torch.diag(torch.tensor([9., 1.])))
        tensor([0.8000, 0.2000], dtype=torch.float64)
    """

    positional = True
    single_group = True
    weights: Tensor
    conflict: Tensor

    def __init__(
        self,
        method: GradientMethod,
        update_every: int = 10,
        warmup_steps: int = 0,
        max_conflict: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(method, GradientMethod) or isinstance(method, Amortized):
            hint = f"; construct it: {method.__name__}()" if isinstance(method, type) else ""
            raise TypeError(f"method: expected a gradient method such as fastmtl.PCGrad(), found {method!r}{hint}")
        refuse_row_method(method, "method")
        self.method = method
        self.update_every = whole("update_every", update_every, 1)
        self.warmup_steps = whole("warmup_steps", warmup_steps, 0)
        self.max_conflict = None if max_conflict is None else real("max_conflict", max_conflict, 0, 1)
        self.needs_losses, self.scale_heads = method.needs_losses, method.scale_heads
        self.several_batches = method.several_batches
        self.register_state("weights")
        self.register_state("conflict", (1,))
        self.counts = {"steps": 0, "age": 0}  # in all; since the last one that solved
        self._held: tuple[Tensor, Tensor] | None = None  # the weights of the tasks that `ready` saw last

    @property
    def due(self) -> bool:
        """Whether the next step solves, by the schedule. Synchronises with the host after a step that solved."""
        steps, age = self.counts["steps"], self.counts["age"]
        if steps < self.warmup_steps or age + 1 >= self.update_every or self.weights.numel() == 0:
            return True
        if age == 0 and self.max_conflict is not None and float(self.conflict) > self.max_conflict:
            return True
        return self._held is None and not bool(self.weights.isfinite().any())

    def ready(self, present: Tensor) -> Tensor | None:
        """See `GradientMethod.ready`."""
        if self.due:
            return None
        if self._held is None or self._held[0] is not present:
            held = self.state("weights", present, (present.shape[1],), float("nan"))
            if bool((held.isnan() & present).any()):
                return None
            self._held = present, torch.where(present, held, 0.0)
        self._count(self.counts["age"] + 1)
        return self._held[1]

    def solve(self, step: Step) -> Tensor:
        """See `GradientMethod.solve`."""
        everyone = constant_mask([[True] * step.gramian.shape[1]], step.gramian.device)
        weights = self.ready(everyone if step.mask is None else step.mask)
        if weights is not None:
            return weights
        present, gramian = step.present[0], step.gramian[0]
        held = self.state("weights", gramian, (len(gramian),), float("nan"))
        share = self.state("conflict", gramian, (1,), 0.0)
        self._held, weights = None, self.method.weigh(step)
        pairs = (present.unsqueeze(-1) & present).triu(1)
        step.commit(held, torch.where(present, weights[0], held))
        step.commit(share, ((gramian < 0) & pairs).sum() / pairs.sum().clamp(min=1).double())
        self._count(0)
        return weights

    def _count(self, age: int) -> None:
        if self.training:
            self.counts = {"steps": self.counts["steps"] + 1, "age": age}

    def get_extra_state(self) -> Tensor:
        """The counts, for ``state_dict``: int64 ``[2]`` on the CPU."""
        return torch.tensor([self.counts["steps"], self.counts["age"]])

    def set_extra_state(self, state: Tensor) -> None:
        """The counts, from ``state_dict``."""
        self.counts = dict(zip(self.counts, state.tolist(), strict=True))
        self.forget()

    def forget(self) -> None:
        """See `Stateful.forget`."""
        self._held = None

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        return f"update_every={self.update_every}, warmup_steps={self.warmup_steps}, max_conflict={self.max_conflict}"
