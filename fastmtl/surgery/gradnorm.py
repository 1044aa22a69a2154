"""GradNorm: learned loss weights that balance gradient norms by training rates."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.checks import choice, flag, real
from fastmtl.facts import Facts
from fastmtl.state import Epochs, commit
from fastmtl.surgery.base import GradientMethod, Step

OPTIMIZERS = ("sgd", "adam")
RENORMALIZE = ("step", "epoch")


class GradNorm(Epochs, GradientMethod):
    """Learns one weight per task so that slower tasks get larger gradients.

    With ``G_t = w_t |g_t|``, the relative inverse training rate ``r_t = (L_t / L_t^0) / mean`` and the constant target
    ``mean(G) r_t^alpha``, the weights descend ``sum_t |G_t - target_t|``, whose gradient is
    ``sign(G_t - target_t) |g_t|``. A step uses the weights from before its own update. Then they are held above
    ``min_weight`` and made to sum to T. Answers differences of magnitude and of velocity.

    The norms come from the Gramian's diagonal. The paper takes them over the last shared layer: pass
    ``gramian_params=`` that layer to `fastmtl.backward`, which then needs T short backward passes and one whole one.

    Args:
        alpha: Strength of the pull towards equal training rates, at least 0. Paper: 1.5.
        lr: Learning rate of the weights, above 0. Paper: 0.025.
        optimizer: ``"sgd"`` (default) or ``"adam"`` (betas 0.9, 0.999, eps 1e-8), for the weights.
        min_weight: Lower bound of a weight. Deviation from the paper, which has none: its steps can make weights
            negative.
        scale_heads: Also multiply the heads' gradients, as the paper does (the network's loss is ``sum w_t L_t``).
            Must be False in `FeatureSurgery`.
        rescale: See `GradientMethod`; the weights already sum to T.
        renormalize: When the weights are made to sum to T: ``"step"``: after each step (paper). ``"epoch"``: at the end
            of each epoch only (the article's listing), which is one call, `end_epoch`, or comes by itself. With
            ``"step"`` that call does nothing.
        steps_per_epoch: Steps after which an epoch ends by itself; None: `end_epoch` is called.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: An option out of range, or ``steps_per_epoch`` without ``renormalize="epoch"``; more than one group
            of parameters.
        RuntimeError: `end_epoch` although epochs end by themselves.

    Note:
        Cost: O(T) on the device, no synchronisation. State: weights and initial losses, ``[T]`` each, with Adam
        ``[3, T]`` more; it moves on finite steps in training mode only. A task's initial loss is that of its first
        step; absent tasks keep their weight and take no part in the means.

    Reference:
        Chen, Badrinarayanan, Lee, Rabinovich, "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep
        Multitask Networks", ICML 2018, equations 1 and 2, Algorithm 1. Deviation: ``min_weight``.

    Example:
        >>> import torch, fastmtl
        >>> method = fastmtl.GradNorm()
        >>> _ = method(torch.diag(torch.tensor([1., 4., 16.])), losses=torch.tensor([1., 1., 1.]))
        >>> method.weights
        tensor([1.0336, 1.0588, 0.9076], dtype=torch.float64)
    """

    needs_losses = True
    positional = True
    single_group = True
    facts = Facts(
        "magnitude, velocity", "Chen, ICML 2018", sums_to="T", needs="scales heads too", state="2 T; with Adam 5 T"
    )
    weights: Tensor
    initial_losses: Tensor
    moments: Tensor

    def __init__(
        self,
        alpha: float = 1.5,
        lr: float = 0.025,
        optimizer: str = "sgd",
        min_weight: float = 1e-3,
        scale_heads: bool = True,
        rescale: str = "none",
        renormalize: str = "step",
        steps_per_epoch: int | None = None,
    ) -> None:
        super().__init__(rescale)
        self.alpha, self.lr = real("alpha", alpha, 0), real("lr", lr, 0, open=True)
        self.optimizer = choice("optimizer", optimizer, OPTIMIZERS)
        self.min_weight = real("min_weight", min_weight, 0, 1, open=True)
        self.scale_heads = flag("scale_heads", scale_heads)
        self.renormalize = choice("renormalize", renormalize, RENORMALIZE)
        if steps_per_epoch is not None and renormalize != "epoch":
            raise ValueError(f"steps_per_epoch: {steps_per_epoch} has no effect without renormalize='epoch'")
        self.register_epochs(steps_per_epoch)
        self.register_state("weights")
        self.register_state("initial_losses")
        if optimizer == "adam":
            self.register_state("moments")  # first, second, and the number of steps, per task

    def solve(self, step: Step) -> Tensor:
        """See `GradientMethod.solve`."""
        assert step.losses is not None
        present, losses = step.present[0], step.losses
        num_tasks = losses.shape[0]
        weights = self.state("weights", losses, (num_tasks,), 1.0)
        initial = self.state("initial_losses", losses, (num_tasks,), float("nan"))
        used = torch.where(present, weights, 0.0)
        first = torch.where(present & initial.isnan(), losses, initial)

        def mean(x: Tensor) -> Tensor:
            return torch.where(present, x, 0.0).sum() / present.sum()

        norms = step.gramian[0].diagonal().clamp(min=0).sqrt()
        size = weights * norms
        # A loss that started at 0 trains at rate 1; so do all while the mean rate is 0.
        ratio = torch.where(first == 0, 1.0, losses / first)
        rate = ratio / mean(ratio)
        rate = torch.where(rate.isfinite() & (rate > 0), rate, torch.where(rate == 0, 0.0, 1.0))
        slope = torch.sign(size - mean(size) * rate**self.alpha) * norms
        slope = torch.where(present, slope, 0.0)
        moved = weights - self.lr * (slope if self.optimizer == "sgd" else self._adam(slope, step))
        moved = torch.where(present, moved.clamp(min=self.min_weight), 0.0)
        if self.renormalize == "step":
            moved = moved * ((num_tasks - torch.where(present, 0.0, weights).sum()) / moved.sum())
        moved = torch.where(present, moved, weights)

        result = torch.where(step.finite, used, torch.full_like(used, float("nan")))
        step.commit(initial, first)
        step.commit(weights, moved)
        if step.training:
            self.count_step(step.finite)
        return result.unsqueeze(0)

    def close_epoch(self, where: Tensor) -> None:
        """See `Epochs.close_epoch`."""
        if self.renormalize == "epoch" and self.weights.numel() > 0:
            commit(self.weights, self.weights * (len(self.weights) / self.weights.sum()), where)

    def _adam(self, slope: Tensor, step: Step) -> Tensor:
        """Adam's direction; the moments of absent tasks stay."""
        present, moments = step.present[0], self.state("moments", slope, (3, len(slope)), 0.0)
        count = moments[2] + present
        m = torch.where(present, 0.9 * moments[0] + 0.1 * slope, moments[0])
        v = torch.where(present, 0.999 * moments[1] + 0.001 * slope**2, moments[1])
        step.commit(moments, torch.stack([m, v, count]))
        return m / (1 - 0.9**count) / ((v / (1 - 0.999**count)).sqrt() + 1e-8)
