"""Lightning: `fastmtl.backward` where Lightning takes its backward pass, in automatic and in manual optimisation."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from fastmtl.backward import backward
from fastmtl.engine import Method
from fastmtl.integrations.scale import LossScale
from fastmtl.losses import LossesLike, parse_losses, stack_scalars
from fastmtl.parameters import ParamsLike, resolve_params
from fastmtl.result import Result


class MultiTaskModule:
    """Mix it into a ``LightningModule``, on its left, and let ``training_step`` return ``self.multi_task_loss(...)``.

    Lightning then does all that it does with any loss: it clips, accumulates, scales, calls its hooks and steps. In
    manual optimisation hand the same to ``self.manual_backward``. Make the method an attribute of the module, so that
    its state is in the checkpoint.

    `fastmtl.FeatureSurgery` and the loss weightings need nothing of this: they make one ordinary loss.

    Attributes:
        multi_task_result: `fastmtl.Result` of the last backward pass, or None: for ``self.log``, say.

    Note:
        With ``accumulate_grad_batches=N`` each micro-batch is a problem of its own, and ``.grad`` the mean of the N
        results. That is not surgery of the whole batch, which `fastmtl.TaskGradients` does in manual optimisation.

        ``DDPStrategy``: as `fastmtl.backward` under ``DistributedDataParallel``. Not with other strategies of several
        processes, where the layer works.

    Example:
        >>> import fastmtl, lightning, torch
        >>> from fastmtl.integrations.lightning import MultiTaskModule
        >>> class Net(MultiTaskModule, lightning.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.trunk = torch.nn.Linear(20, 8)
        ...         self.heads = torch.nn.ModuleList(torch.nn.Linear(8, 1) for _ in range(3))
        ...         self.method = fastmtl.PCGrad()
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         features = self.trunk(batch)
        ...         losses = [head(features).square().mean() for head in self.heads]
        ...         return self.multi_task_loss(losses, self.method, self.trunk)
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
    """

    multi_task_result: Result | None = None
    _multi_task: tuple[Tensor, LossesLike, Method, ParamsLike | None, dict[str, Any]] | None = None

    def multi_task_loss(
        self, losses: LossesLike, method: Method, shared_params: ParamsLike | None = None, **options: Any
    ) -> Tensor:
        """The sum of the losses, whose backward pass will be `fastmtl.backward` with these arguments.

        Args:
            losses: Raw, whatever the precision and the accumulation.
            method: See `fastmtl.backward`.
            shared_params: See `fastmtl.backward`. None: found, as there.
            options: Of `fastmtl.backward`, but for ``scaler``, which is that of the trainer.

        Returns:
            A scalar, to be returned by ``training_step`` or handed to ``manual_backward`` as it is: what is added to it
            would be lost, and raises.

        Raises:
            TypeError: ``scaler`` is given.
            ValueError: The losses do not fit.
            RuntimeError: A strategy that takes its own backward pass.
        """
        strategy = self.trainer.strategy  # type: ignore[attr-defined]
        if not isinstance(strategy, DDPStrategy | SingleDeviceStrategy):
            raise RuntimeError(
                f"{type(strategy).__name__}: multi_task_loss knows one device and DDPStrategy; fastmtl.FeatureSurgery "
                "needs no backward pass of its own"
            )
        if "scaler" in options:
            raise TypeError("scaler: the trainer has it already; leave it out")
        total = stack_scalars(parse_losses(losses).present).sum()
        self._multi_task = total, losses, method, shared_params, options
        return total

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Lightning's hook: the backward pass of `multi_task_loss`, and an ordinary one of any other loss."""
        if self._multi_task is None:
            super().backward(loss, *args, **kwargs)  # type: ignore[misc]
            return
        (total, losses, method, shared, options), self._multi_task = self._multi_task, None
        _refuse_other(loss, total)
        trainer = self.trainer  # type: ignore[attr-defined]
        steps = trainer.accumulate_grad_batches if self.automatic_optimization else 1  # type: ignore[attr-defined]
        options |= LossScale.options(getattr(trainer.precision_plugin, "scaler", None), steps)
        assert isinstance(self, nn.Module)
        if not isinstance(shared, nn.Module | None):  # names are those of this module
            shared = [*resolve_params(shared, self, "shared_params").values()]
        options = {"model": trainer.strategy.model, **options}  # as DistributedDataParallel has wrapped it
        self.multi_task_result = backward(losses, method, shared, **options, **kwargs)


def _refuse_other(loss: Tensor, total: Tensor) -> None:
    """Refuse a loss that is more than a multiple of ``total``, by the graph that leads from one to the other."""
    node = loss.grad_fn
    while node is not None and node is not total.grad_fn:
        below = [n for n, _ in node.next_functions if n is not None]
        node = below[0] if len(below) == 1 else None
    if node is None:
        raise ValueError(
            "multi_task_loss: the loss of this backward pass is another one; what you add to it belongs to the losses "
            "of the tasks, and a loss of its own to another backward pass"
        )
