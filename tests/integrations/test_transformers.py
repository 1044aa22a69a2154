"""The trainers against plain loops, on tests.nets and on a small transformer with an adapter's worth of parameters."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmtl
from tests.nets import Net, mlp
from tests.ranks import processes

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers

from fastmtl.integrations.transformers import MultiDatasetTrainer, MultiTaskTrainer

pytestmark = pytest.mark.filterwarnings("default")  # of a library that is not ours
STEPS, BATCH, LR = 4, 6, 0.1


class Model(nn.Module):
    """A sample is {"x": ...}; with a task, its loss alone."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, task: Tensor | None = None) -> dict[str, Any]:
        losses = self.net.losses(x)
        if task is not None:
            return {"loss": losses[int(task[0])]}
        return {"losses": {f"task {t}": loss for t, loss in enumerate(losses)}, "features": self.net.features(x)}


def samples(dtype: torch.dtype = torch.float64, seed: int = 1) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return [{"x": x} for x in torch.randn(STEPS * BATCH, 5, generator=random, dtype=dtype)]


def batches(data: list[dict[str, Tensor]]) -> list[Tensor]:
    x = torch.stack([sample["x"] for sample in data])
    return list(x.split(BATCH))


class InOrder:
    """No shuffling, so that a plain loop sees the same batches."""

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def create_optimizer(self, model: Any = None) -> Any:
        self.optimizer = torch.optim.SGD(self.model.net.parameters(), lr=LR)
        return self.optimizer


class MultiTask(InOrder, MultiTaskTrainer):
    pass


class MultiDataset(InOrder, MultiDatasetTrainer):
    pass


def arguments(folder: Path, **options: Any) -> transformers.TrainingArguments:
    defaults = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "label_names": ["x"],
    }
    return transformers.TrainingArguments(str(folder), **{**defaults, **options})


def by_hand(net: Net, data: list[Tensor], method: Any, accumulate: int = 1) -> list[Tensor]:
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    for start in range(0, len(data), accumulate):
        optimizer.zero_grad()
        for x in data[start : start + accumulate]:
            fastmtl.backward(net.losses(x), method, net.trunk)
        for p in net.parameters():
            p.grad /= accumulate
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
    return [p.detach() for p in net.parameters()]


def assert_same(found: nn.Module, expected: list[Tensor], **tolerance: float) -> None:
    for p, q in zip(found.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), q, **(tolerance or {"rtol": 1e-9, "atol": 1e-12}))


METHODS = {
    "PCGrad": lambda: fastmtl.PCGrad(order="fixed"),
    "GradNorm": fastmtl.GradNorm,
    "DWA": lambda: fastmtl.DWA(3, steps_per_epoch=2),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_several_losses(method: str, accumulate: int, tmp_path: Path) -> None:
    net = mlp()
    expected = by_hand(copy.deepcopy(net), batches(samples()), METHODS[method](), accumulate)
    args = arguments(tmp_path, gradient_accumulation_steps=accumulate)
    trainer = MultiTask(
        Model(net), args, train_dataset=samples(), method=METHODS[method](), shared_params=["net.trunk"]
    )
    found = trainer.train()
    assert_same(net, expected)
    assert found.global_step == STEPS // accumulate
    assert trainer.multi_task_result.weights.shape == (3,)
    assert found.training_loss > 0


def test_evaluation_sums_the_losses(tmp_path: Path) -> None:
    net = mlp()
    trainer = MultiTask(Model(net), arguments(tmp_path), eval_dataset=samples(), method=fastmtl.MGDA())
    expected = torch.stack([sum(net.losses(x)) for x in batches(samples())]).mean()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected.detach()), rel=1e-6)


def test_scaler(tmp_path: Path) -> None:
    # A power of two changes no digit, so the parameters are those without a scaler.
    nets = [mlp(dtype=torch.float32)]
    nets.append(copy.deepcopy(nets[0]))
    for net, scaler in zip(nets, [None, torch.amp.GradScaler("cpu", init_scale=2.0**10)], strict=True):
        args = arguments(tmp_path, max_grad_norm=0.0, gradient_accumulation_steps=2)
        trainer = MultiTask(
            Model(net), args, train_dataset=samples(torch.float32), method=fastmtl.GradNorm(), shared_params=net.trunk
        )
        trainer.accelerator.scaler = scaler  # Accelerate makes none without a GPU
        trainer.train()
    assert scaler.state_dict()["_growth_tracker"] == STEPS // 2
    assert_same(nets[1], [p.detach() for p in nets[0].parameters()], rtol=0, atol=0)


def test_bfloat16(tmp_path: Path) -> None:
    net = mlp(dtype=torch.float32)
    expected = by_hand(copy.deepcopy(net), batches(samples(torch.float32)), fastmtl.MGDA())
    args = arguments(tmp_path, bf16=True)
    MultiTask(
        Model(net), args, train_dataset=samples(torch.float32), method=fastmtl.MGDA(), shared_params=net.trunk
    ).train()
    assert_same(net, expected, rtol=0.05, atol=0.02)


def tagged(task: int, size: int = STEPS * BATCH) -> list[dict[str, Any]]:
    return [{**sample, "task": task} for sample in samples(seed=task)][:size]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", ["PCGrad", "GradNorm", "DWA"])
def test_several_data_sets(name: str, accumulate: int, tmp_path: Path) -> None:
    sizes = {"a": STEPS * BATCH, "b": 2 * BATCH, "c": STEPS * BATCH}  # the second begins again
    datasets = {task: tagged(t, size) for t, (task, size) in enumerate(sizes.items())}
    net = mlp()
    plain, method = copy.deepcopy(net), METHODS[name]()
    optimizer = torch.optim.SGD(plain.parameters(), lr=LR)
    per_task = [batches(each) * (STEPS * BATCH // len(each)) for each in datasets.values()]
    for start in range(0, STEPS, accumulate):
        optimizer.zero_grad()
        losses = [
            sum(plain.losses(x)[t] for x in each[start : start + accumulate]) / accumulate
            for t, each in enumerate(per_task)
        ]
        fastmtl.backward(losses, method, plain.trunk)
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.step()
    args = arguments(tmp_path, gradient_accumulation_steps=accumulate)
    trainer = MultiDataset(
        Model(net), args, train_dataset=datasets, method=METHODS[name](), shared_params=["net.trunk"]
    )
    trainer.train()
    assert_same(net, [p.detach() for p in plain.parameters()])


def of_a_rank(kind: str, net: Net, folder: Path) -> list[Tensor]:
    rank = torch.distributed.get_rank()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}  # as a launcher does
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1"}
    warnings.simplefilter("default")
    method = fastmtl.PCGrad(order="fixed")
    args = arguments(folder, ddp_backend="gloo")
    if kind == "losses":
        trainer: Any = MultiTask(Model(net), args, train_dataset=samples(), method=method, shared_params=["net.trunk"])
    else:
        datasets = {"a": tagged(0), "b": tagged(1), "c": tagged(2)}
        trainer = MultiDataset(Model(net), args, train_dataset=datasets, method=method, shared_params=["net.trunk"])
    trainer.train()
    assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("kind", ["losses", "data sets"])
def test_two_processes(kind: str, tmp_path: Path) -> None:
    net = mlp()
    expected, per_task = copy.deepcopy(net), [batches(samples() if kind == "losses" else tagged(t)) for t in range(3)]
    optimizer = torch.optim.SGD(expected.parameters(), lr=LR)
    for start in range(0, STEPS, 2):  # a batch for each process
        optimizer.zero_grad()
        losses = [expected.losses(torch.cat(each[start : start + 2]))[t] for t, each in enumerate(per_task)]
        fastmtl.backward(losses, fastmtl.PCGrad(order="fixed"), expected.trunk)
        nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
        optimizer.step()
    with processes(2) as ranks:
        found = ranks.run(2, of_a_rank, kind, net, tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))
    for p, q in zip(found[0], expected.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=1e-9, atol=1e-12)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    def trainer(net: Net, folder: str, **options: Any) -> MultiDataset:
        torch.manual_seed(0)
        datasets = {"a": tagged(0), "b": tagged(1), "c": tagged(2)}
        args = arguments(tmp_path / folder, save_strategy="steps", save_steps=2, **options)
        method = fastmtl.GradVac(generator=torch.Generator().manual_seed(len(folder)))  # the seed is in the checkpoint
        return MultiDataset(Model(net), args, train_dataset=datasets, method=method, shared_params=["net.trunk"])

    net = mlp()
    resumed = copy.deepcopy(net)
    trainer(net, "one").train()
    trainer(resumed, "other").train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    assert_same(resumed, [p.detach() for p in net.parameters()], rtol=0, atol=0)


def test_a_transformer_with_text_like_columns(tmp_path: Path) -> None:
    """Columns that the model does not take are removed per data set, and a padding collator pads per task."""
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.BertForSequenceClassification(config)
    for p in model.bert.embeddings.parameters():
        p.requires_grad_(False)

    def examples(seed: int) -> list[dict[str, Any]]:
        random = torch.Generator().manual_seed(seed)
        return [
            {"input_ids": torch.randint(50, (4,), generator=random), "labels": i % 2, "text": "not for the model"}
            for i in range(2 * BATCH)
        ]

    args = arguments(tmp_path, label_names=["labels"])
    datasets = {"news": examples(0), "reviews": examples(1)}
    trainer = MultiDatasetTrainer(
        model,
        args,
        train_dataset=datasets,
        eval_dataset={name: [{k: v for k, v in e.items() if k != "text"} for e in d] for name, d in datasets.items()},
        method=fastmtl.PCGrad(),
    )
    before = copy.deepcopy(model.state_dict())
    trainer.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert "bert.encoder.layer.0.attention.self.query.weight" in moved
    assert not any("embeddings" in name for name in moved)
    assert len(trainer._rows.shared) == len([p for p in model.parameters() if p.requires_grad])
    assert {"eval_news_loss", "eval_reviews_loss"} <= trainer.evaluate().keys()


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="method: expected a fastmtl method"):
        MultiTask(Model(mlp()), arguments(tmp_path), method="pcgrad")
    with pytest.raises(TypeError, match="train_dataset: expected a mapping by task, found list"):
        MultiDataset(Model(mlp()), arguments(tmp_path), method=fastmtl.PCGrad(), train_dataset=samples())
    with pytest.raises(TypeError, match=r"train_dataset\['a'\]: expected a data set with a length"):
        MultiDataset(Model(mlp()), arguments(tmp_path), method=fastmtl.PCGrad(), train_dataset={"a": iter([])})
