"""Hugging Face's Trainer: several losses of one batch, or one batch of each of several data sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer

from fastmtl.backward import backward
from fastmtl.engine import Method, check_method
from fastmtl.integrations.accelerate import check_engine
from fastmtl.integrations.scale import LossScale
from fastmtl.losses import LossesLike, parse_losses, stack_scalars
from fastmtl.parameters import ParamsLike, resolve_params
from fastmtl.result import Result
from fastmtl.task_gradients import TaskGradients

STATE = "fastmtl_method.pt"


class _SurgeryTrainer(Trainer):
    """What both trainers have in common: the method, and its state in checkpoints."""

    def __init__(self, *args: Any, method: Method, shared_params: ParamsLike | None = None, **kwargs: Any) -> None:
        check_method(method)
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise RuntimeError(f"{self.args.n_gpu} GPUs in one process (DataParallel): start one process for each")
        check_engine(self.accelerator)
        self.method = method
        self.shared_params = shared_params
        self.multi_task_result: Result | None = None

    def _to_train(self, model: nn.Module) -> None:
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            torch.save(self.method.state_dict(), Path(output_dir) / STATE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.method.load_state_dict(torch.load(Path(checkpoint) / STATE, weights_only=True))


class MultiTaskTrainer(_SurgeryTrainer):
    """A ``Trainer`` of a model with several losses per batch, whose backward pass is `fastmtl.backward`.

    The model's output is a mapping with an entry ``"losses"``: one loss per task. Otherwise override `compute_losses`.
    Evaluation sums the losses. Mixed precision, clipping, schedules, logging, checkpoints: as in any Trainer; the
    checkpoints hold the method's state.

    Args:
        args: Of ``Trainer``, as all other keywords.
        method: A gradient method or a loss weighting. Learned weights belong into the model.
        shared_params: As for `fastmtl.backward`; names are those of the model. None: found in the first step.
        backward_options: Further ones of `fastmtl.backward`.

    Attributes:
        multi_task_result: `Result` of the last step.

    Raises:
        TypeError: Not a method.
        RuntimeError: DeepSpeed, FSDP, or several GPUs in one process.

    Note:
        With ``gradient_accumulation_steps`` each micro-batch is a problem of its own, and the results are averaged.

    Example:
        >>> import fastmtl
        >>> from fastmtl.integrations.transformers import MultiTaskTrainer
        >>> def train(model, args, dataset):
        ...     MultiTaskTrainer(
        ...         model, args, train_dataset=dataset, method=fastmtl.PCGrad(), shared_params=model.encoder
        ...     ).train()
    """

    def __init__(
        self,
        *args: Any,
        method: Method,
        shared_params: ParamsLike | None = None,
        backward_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, method=method, shared_params=shared_params, **kwargs)
        self.backward_options = dict(backward_options or {})

    def compute_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[LossesLike, dict[str, Any]]:
        """The losses of a batch, means over its samples, and what else the model returned, for evaluation."""
        outputs = dict(model(**inputs))
        return outputs.pop("losses"), outputs

    def compute_loss(  # noqa: D102
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        losses, outputs = self.compute_losses(model, inputs)
        total = _sum(losses)
        return (total, outputs) if return_outputs else total

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The Trainer's hook."""
        self._to_train(model)
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            losses, _ = self.compute_losses(model, inputs)
        steps = self.current_gradient_accumulation_steps
        options = {"model": model, **self.backward_options, **LossScale.options(self.accelerator.scaler, steps)}
        shared = self.shared_params
        if shared is not None and not isinstance(shared, nn.Module):
            shared = [*resolve_params(shared, self.model, "shared_params").values()]
        self.multi_task_result = backward(losses, self.method, shared, **options)
        return _sum(losses).detach() / steps


class MultiDatasetTrainer(_SurgeryTrainer):
    """A ``Trainer`` on several data sets at once, a task each: every step takes a batch of each of them.

    Uses `fastmtl.TaskGradients`: one forward and one backward pass per data set, and no more. The losses are those of
    ``compute_loss``, which may be overridden as in any Trainer. ``per_device_train_batch_size`` is per data set; an
    epoch goes over the longest one, the others begin again. The collator gets the samples of one data set at a time.
    With ``gradient_accumulation_steps`` the tasks' gradients accumulate before they are combined, which is surgery of
    the whole batch. The checkpoints hold the method's state.

    Args:
        args: Of ``Trainer``, as all other keywords.
        method: A gradient method; a loss weighting where ``shared_params`` are not all.
        train_dataset: Data sets by the tasks' names, each with a length.
        shared_params: Names are those of the model. None: all that require gradients, as of an adapter.

    Attributes:
        multi_task_result: `Result` of the last step.

    Raises:
        TypeError: Not a method; ``train_dataset`` is no mapping, or of data sets without a length.
        RuntimeError: DeepSpeed, FSDP, or several GPUs in one process.

    Note:
        Memory: T times the shared parameters' gradients. The logged loss is the sum over the tasks.

    Example:
        >>> import fastmtl
        >>> from fastmtl.integrations.transformers import MultiDatasetTrainer
        >>> def train(model, args, news, reviews):
        ...     MultiDatasetTrainer(
        ...         model, args, train_dataset={"news": news, "reviews": reviews}, method=fastmtl.PCGrad()
        ...     ).train()
    """

    def __init__(
        self,
        *args: Any,
        method: Method,
        train_dataset: Mapping[str, Any],
        shared_params: ParamsLike | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(train_dataset, Mapping):
            raise TypeError(f"train_dataset: expected a mapping by task, found {type(train_dataset).__name__}")
        together = _Together(train_dataset)
        super().__init__(*args, method=method, shared_params=shared_params, train_dataset=together, **kwargs)
        self.tasks = together.names
        self.data_collator = _PerTask(self.data_collator, together.names)  # type: ignore[has-type]
        self._rows: TaskGradients | None = None

    def training_step(
        self, model: nn.Module, inputs: dict[str, dict[str, Any]], num_items_in_batch: Any = None
    ) -> Tensor:
        """The Trainer's hook."""
        self._to_train(model)
        if self._rows is None:
            self._rows = self._task_gradients()
        steps = self.current_gradient_accumulation_steps
        total: list[Tensor] = []
        for t, batch in enumerate(inputs.values()):
            batch = self._prepare_inputs(batch)
            with self.accelerator.no_sync(model):  # the ranks' average is taken once, of the rows
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(model, batch) / steps
                self._rows.backward(t, loss)
            total.append(loss.detach())
        if self.accelerator.sync_gradients:
            self.multi_task_result = self._rows.combine(self.method)
        return _sum(total)

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        if isinstance(data_collator, _PerTask):
            inner = super()._get_collator_with_removed_columns(data_collator.collator, description)
            return _PerTask(inner, data_collator.names)
        return super()._get_collator_with_removed_columns(data_collator, description)

    def _task_gradients(self) -> TaskGradients:
        assert self.model is not None
        trained = resolve_params(self.model, self.model, "model")
        shared = trained
        if self.shared_params is not None:
            shared = resolve_params(self.shared_params, self.model, "shared_params")
        inside = {id(p) for p in shared.values()}
        heads = [p for p in trained.values() if id(p) not in inside]
        return TaskGradients(
            [*shared.values()],
            len(self.tasks),
            heads=heads or None,
            scaler=self.accelerator.scaler,
            names=self.tasks,
        )


def _sum(losses: LossesLike) -> Tensor:
    return stack_scalars(parse_losses(losses, differentiable=False).present).sum()


class _Together(Dataset):
    """Sample i is a tuple of one sample of each data set."""

    def __init__(self, datasets: Mapping[str, Any]) -> None:
        for name, each in datasets.items():
            if not hasattr(each, "__len__") or not hasattr(each, "__getitem__"):
                raise TypeError(
                    f"train_dataset[{name!r}]: expected a data set with a length, found {type(each).__name__}"
                )
        self.names = [*datasets]
        self.parts = [*datasets.values()]

    def __len__(self) -> int:
        return max(map(len, self.parts))

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return tuple(part[index % len(part)] for part in self.parts)


class _PerTask:
    """Collates each task's samples; those of evaluation as they are."""

    def __init__(self, collator: Callable[[list[Any]], Any], names: Sequence[str]) -> None:
        self.collator = collator
        self.names = names

    def __call__(self, samples: list[Any]) -> Any:
        if not isinstance(samples[0], tuple):
            return self.collator(samples)
        return {
            name: self.collator(list(each)) for name, each in zip(self.names, zip(*samples, strict=True), strict=True)
        }
