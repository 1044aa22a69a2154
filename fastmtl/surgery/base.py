"""What a gradient method is: a map from the Gramian of the per-task gradients to one weight per task."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, TypedDict

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.checks import choice
from fastmtl.facts import Facts
from fastmtl.losses import LossesLike, numbered, parse_losses
from fastmtl.random import new_rng
from fastmtl.state import Stateful, commit
from fastmtl.surgery.normalization import APPLY_TO, NORMALIZATIONS, normalize, normalizers
from fastmtl.watch import is_watched, tell

if TYPE_CHECKING:
    from typing_extensions import Unpack

RESCALES = ("none", "sum_to_num_tasks", "sum_to_one")


class CommonOptions(TypedDict, total=False):
    """The options of `GradientMethod`, which its subclasses hand on."""

    rescale: str
    normalization: str
    apply_to: str


@dataclass(frozen=True)
class Step:
    """What a method sees of one training step. All tensors lie on the Gramian's device.

    Attributes:
        gramian: ``[K, T, T]`` float64, of the raw (unscaled) losses' gradients.
        mask: bool ``[K, T]``: which task reaches which group; None if all do. Absent entries of the Gramian may hold
            anything.
        losses: raw loss values ``[T]`` float64, NaN where a task is absent; None unless the method ``needs_losses``.
        training: The method is in training mode: state may move.
    """

    gramian: Tensor
    mask: Tensor | None
    losses: Tensor | None
    training: bool = True

    @property
    def present(self) -> Tensor:
        """Which task reaches which group, bool ``[K, T]``."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.gramian.shape[:2], dtype=torch.bool, device=self.gramian.device)

    @cached_property
    def finite(self) -> Tensor:
        """Whether the present Gramian entries and losses are finite, bool scalar."""
        zeros = self.gramian * 0  # NaN where not finite: faster than isfinite()
        if self.mask is not None:
            zeros = torch.where(self.mask.unsqueeze(-1) & self.mask.unsqueeze(-2), zeros, 0.0)
        finite = zeros.sum() == 0
        if self.losses is not None:
            there = self.losses.isfinite()
            finite = finite & (there if self.mask is None else there | ~self.mask.any(0)).all()
        return finite

    def commit(self, state: Tensor, new: Tensor) -> None:
        """Store ``new`` in the buffer ``state``, in training, if this step is finite (AMP overflows are not)."""
        if self.training:
            commit(state, new, self.finite)


class GradientMethod(Stateful):
    """Base class of the gradient methods: subclasses implement `solve`.

    A method is an ``nn.Module`` so that its state (moving averages, learned weights, the random seed) moves with the
    model and round-trips through ``state_dict``. State is float64 whatever the model is cast to. It moves in training
    mode only, and on finite steps only: in ``eval()`` a call gives the weights of the step that would be next.

    Args:
        rescale: What the weights sum to: ``"none"``: as the paper says; ``"sum_to_num_tasks"`` or ``"sum_to_one"``.
            PCGrad's weights sum to T or more, MGDA's to 1: changing the method changes the step size unless they are
            made to sum to the same.
        normalization: What each gradient is divided by before solving: ``"none"``, ``"l2"``: its norm, ``"loss"``: its
            loss, ``"loss+"``: both. By absolute values, and where one is 0, not by it.
        apply_to: With a normalization, the weights then multiply the ``"raw"`` gradients, or the ``"normalized"`` ones:
            the weights returned, which go with the raw gradients, are then divided by the normalisers.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: An unknown option, or ``apply_to="normalized"`` without a normalization.

    Attributes:
        needs_losses: `solve` reads ``step.losses``.
        scale_heads: The weights also multiply the gradients of the parameters that are not shared.
        single_group: The method knows only one group of parameters (K = 1).
        positional: The method tells tasks apart, by state or options, so their order must stay the same.
        several_batches: The losses of a step are those of the tasks on several batches, so features have no products.
        facts: The method in a few words.
    """

    facts: ClassVar[Facts]
    needs_losses: bool = False
    scale_heads: bool = False
    single_group: bool = False
    positional: bool = False
    several_batches: bool = False

    def __init__(self, rescale: str = "none", normalization: str = "none", apply_to: str = "raw") -> None:
        super().__init__()
        self.rescale = choice("rescale", rescale, RESCALES)
        self.normalization = choice("normalization", normalization, NORMALIZATIONS)
        self.apply_to = choice("apply_to", apply_to, APPLY_TO)
        if apply_to == "normalized" and normalization == "none":
            raise ValueError("apply_to: 'normalized' has no effect without a normalization, found 'none'")
        if normalization in ("loss", "loss+"):
            self.needs_losses = True
        self._per_task: dict[str, Tensor] = {}

    def per_task(self, option: str, gramian: Tensor) -> Tensor:
        """An option that is a number, or one per task, as a tensor ``[T]`` beside the Gramian, sent there once.

        Args:
            option: The attribute's name; its value as `fastmtl.checks.reals` gives it, or None: 1 for each task.
            gramian: ``[K, T, T]``.

        Raises:
            ValueError: The option has not T numbers.
        """
        value, num_tasks = getattr(self, option), gramian.shape[-1]
        if isinstance(value, tuple) and len(value) != num_tasks:
            raise ValueError(f"{option}: one for each of {len(value)} tasks, but this step has {num_tasks}")
        kept = self._per_task.get(option)
        if kept is None or kept.device != gramian.device or len(kept) != num_tasks:
            each = value if isinstance(value, tuple) else (1.0 if value is None else value,) * num_tasks
            kept = self._per_task[option] = torch.tensor(each, dtype=gramian.dtype, device=gramian.device)
        return kept

    def solve(self, step: Step) -> Tensor:
        """The paper's weights, ``[K, T]`` float64: NaN where the step is not finite, 0 for absent tasks."""
        raise NotImplementedError

    def ready(self, present: Tensor) -> Tensor | None:
        """Weights ``[1, T]`` for a step that needs no Gramian; None: it needs one. The state advances if they are used.

        Args:
            present: Which tasks take part, bool ``[1, T]``.
        """
        return None

    def weigh(self, step: Step) -> Tensor:
        """`solve`, within the common options; advances the state in training mode. No host synchronisation."""
        if self.single_group and step.gramian.shape[0] != 1:
            raise ValueError(
                f"{type(self).__name__} knows only one group of parameters, found {step.gramian.shape[0]} groups"
            )
        with torch.no_grad():
            step = step if self.training else replace(step, training=False)
            if self.normalization == "none":
                weights = self.solve(step)
            else:
                factors = normalizers(step, self.normalization)
                weights = self.solve(replace(step, gramian=normalize(step.gramian, factors)))
                weights = weights if self.apply_to == "raw" else weights * factors
            return weights if self.rescale == "none" else self.rescaled(weights, step.present)

    def rescaled(self, weights: Tensor, present: Tensor) -> Tensor:
        """Weights ``[K, T]`` that sum to what ``rescale`` says, as far as they do not sum to 0."""
        if self.rescale == "none":
            return weights
        total = weights.sum(-1, keepdim=True)
        goal = present.sum(-1, keepdim=True) if self.rescale == "sum_to_num_tasks" else 1.0
        return torch.where(total == 0, weights, weights * (goal / total))

    def forward(self, gramian: Tensor, losses: LossesLike | None = None, mask: Tensor | None = None) -> Tensor:
        """Weights for a ready Gramian; advances the method's state in training mode.

        Args:
            gramian: ``[T, T]`` or ``[K, T, T]``, symmetric, any floating dtype.
            losses: T loss values, for methods that need them.
            mask: bool ``[T]`` or ``[K, T]``: which tasks take part; None: all.

        Returns:
            ``[T]`` or ``[K, T]`` float64.

        Raises:
            TypeError: Not a tensor; a loss of another type.
            ValueError: Not square, not symmetric (a Jacobian?), or losses are missing or of another number.

        Note:
            Checking the symmetry synchronises with the host once; the training entry points do not come this way.
        """
        if not isinstance(gramian, Tensor):
            raise TypeError(
                f"gramian: expected a tensor, found {type(gramian).__name__}; for losses use "
                "fastmtl.backward(losses, method, shared_params)"
            )
        if gramian.dim() not in (2, 3) or gramian.shape[-1] != gramian.shape[-2]:
            raise ValueError(
                f"gramian: expected shape [T, T] or [K, T, T], found {list(gramian.shape)}; for a Jacobian use "
                "fastmtl.aggregate(jacobian, method)"
            )
        m = gramian.detach().to(torch.float64)
        m = (m.unsqueeze(0) if m.dim() == 2 else m).contiguous()
        if not ops.is_symmetric(m):
            raise ValueError(
                "gramian: expected a symmetric matrix of dot products; for a Jacobian use fastmtl.aggregate"
            )
        present = None if mask is None else mask.to(m.device, torch.bool).expand(m.shape[:2]).contiguous()
        if self.needs_losses and losses is None:
            raise ValueError(f"losses: {type(self).__name__} needs the values of the losses")
        parsed = None if losses is None else parse_losses(losses, differentiable=False)
        if parsed is not None and len(parsed) != m.shape[-1]:
            raise ValueError(f"losses: expected {m.shape[-1]} tasks, found {len(parsed)}")
        values = parsed.values().to(m.device) if parsed is not None and self.needs_losses else None
        weights = self.weigh(Step(m, present, values))
        if is_watched(self):
            names = numbered(m.shape[-1]) if parsed is None else parsed.names
            tell(self, names, weights, gramian=m, mask=present, losses=parsed)
        return weights if gramian.dim() == 3 else weights[0]


class RandomOrderMethod(GradientMethod):
    """A method in which each task meets the others in an order that may be random.

    The orders are drawn by a counter-based generator (Philox) from the state ``rng`` = (seed, step): the same on every
    device and every rank, and resumed exactly from a checkpoint. The seed comes from the default generator, or from
    ``generator``, when the method is constructed; a training step never touches torch's generators.
    """

    rng: Tensor

    def __init__(
        self,
        order: str | Tensor = "random",
        generator: torch.Generator | None = None,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(**common)
        if isinstance(order, Tensor):
            if order.dim() not in (2, 3) or order.shape[-1] != order.shape[-2]:
                raise ValueError(f"order: expected shape [T, T] or [K, T, T], found {list(order.shape)}")
            every = torch.arange(order.shape[-1], device=order.device)
            if not torch.equal(order.long().sort(-1).values, every.expand(order.shape)):
                raise ValueError("order: each row must be a permutation of 0..T-1")
            order = order.long().contiguous()
        else:
            choice("order", order, ("random", "fixed", "shared"))
        self.order = order
        self.register_buffer("rng", new_rng(generator))

    def draw(self, step: Step) -> tuple[Tensor | str, Tensor]:
        """This step's ``order`` and ``rng`` for the solver."""
        device = step.gramian.device
        if self.rng.device != device:
            self.rng = self.rng.to(device)
        if isinstance(self.order, Tensor) and self.order.device != device:
            self.order = self.order.to(device)
        return self.order, self.rng

    def advance(self, step: Step) -> None:
        """The next step draws other orders, if this one was finite and a training step."""
        if step.training:
            self.rng[1].add_(step.finite)
