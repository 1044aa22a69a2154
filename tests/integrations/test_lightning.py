"""MultiTaskModule and the layer in Lightning's trainer, against a plain loop."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fastmtl
from tests.nets import Net, mlp

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.plugins import MixedPrecision

    from fastmtl.integrations.lightning import MultiTaskModule

pytestmark = pytest.mark.filterwarnings("default")  # of a library that is not ours
STEPS, LR = 4, 0.1


def data(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return list(torch.randn(STEPS, 8, 5, generator=torch.Generator().manual_seed(1), dtype=dtype))


class Automatic(MultiTaskModule, lightning.LightningModule):
    """The losses of tests.nets, as a module of Lightning."""

    def __init__(self, net: Net, method: Any, **options: Any) -> None:
        super().__init__()
        self.net, self.method, self.options = net, method, options
        self.seen: list[Tensor] = []

    def losses(self, x: Tensor) -> Any:
        return self.net.losses(x)

    def training_step(self, x: Tensor, index: int) -> Any:
        return self.multi_task_loss(self.losses(x), self.method, self.net.trunk, **self.options)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=LR)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.seen.append(torch.cat([p.grad.flatten() for p in self.net.parameters()]))


class Manual(Automatic):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.automatic_optimization = False

    def training_step(self, x: Tensor, index: int) -> Any:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(x, index))
        optimizer.step()


def fit(module: Any, batches: list[Tensor], folder: Path, **options: Any) -> Any:
    quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    options = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, **dict.fromkeys(quiet, False), **options}
    trainer = lightning.Trainer(default_root_dir=folder, **options)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return trainer


def by_hand(
    net: Net, batches: list[Tensor], method: Any, accumulate: int = 1, clip: float | None = None, **options: Any
) -> list[Tensor]:
    """The parameters after a plain loop."""
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    for start in range(0, len(batches), accumulate):
        optimizer.zero_grad()
        for x in batches[start : start + accumulate]:
            fastmtl.backward(net.losses(x), method, net.trunk, **options)
        for p in net.parameters():
            p.grad /= accumulate
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
    return [p.detach() for p in net.parameters()]


def assert_same(found: nn.Module, expected: list[Tensor], **tolerance: float) -> None:
    for p, q in zip(found.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), q, **(tolerance or {"rtol": 1e-9, "atol": 1e-12}))


METHODS = {
    "PCGrad": lambda: fastmtl.PCGrad(order="fixed"),
    "GradNorm": fastmtl.GradNorm,  # sees loss values, has state, scales heads
    "DWA": lambda: fastmtl.DWA(3, steps_per_epoch=2),
}


@pytest.mark.parametrize("module", [Automatic, Manual])
@pytest.mark.parametrize("method", METHODS)
def test_as_a_plain_loop(method: str, module: type, tmp_path: Path) -> None:
    net = mlp()
    expected = by_hand(copy.deepcopy(net), data(), METHODS[method]())
    fit(module(net, METHODS[method]()), data(), tmp_path)
    assert_same(net, expected)


@pytest.mark.parametrize("method", METHODS)
def test_clipping_and_accumulation(method: str, tmp_path: Path) -> None:
    net = mlp()
    expected = by_hand(copy.deepcopy(net), data(), METHODS[method](), accumulate=2, clip=0.1)
    module = Automatic(net, METHODS[method]())
    fit(module, data(), tmp_path, accumulate_grad_batches=2, gradient_clip_val=0.1)
    assert len(module.seen) == STEPS // 2
    assert_same(net, expected)


@pytest.mark.parametrize("module", [Automatic, Manual])
@pytest.mark.parametrize("method", METHODS)
def test_scaler(method: str, module: type, tmp_path: Path) -> None:
    # A power of two changes no digit, so the parameters are those without a scaler.
    net = mlp(dtype=torch.float32)
    plain = copy.deepcopy(net)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
    plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
    fit(module(net, METHODS[method]()), data(torch.float32), tmp_path, plugins=[plugin])
    fit(module(plain, METHODS[method]()), data(torch.float32), tmp_path)
    assert plugin.state_dict()["_growth_tracker"] == STEPS
    assert_same(net, [*plain.parameters()], rtol=0, atol=0)


def test_half_precision(tmp_path: Path) -> None:
    net = mlp(dtype=torch.float32)
    expected = by_hand(copy.deepcopy(net), data(torch.float32), fastmtl.MGDA())
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
    module = Automatic(net, fastmtl.MGDA())
    fit(module, data(torch.float32), tmp_path, plugins=[plugin])
    assert_same(net, expected, rtol=0.05, atol=0.01)
    assert module.multi_task_result.weights.sum() == pytest.approx(1)


class Layer(lightning.LightningModule):
    """The layer needs nothing of ours but the trainer's scaler."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net, self.surgery = net, fastmtl.FeatureSurgery(fastmtl.MGDA(), 3)

    def on_fit_start(self) -> None:
        self.surgery.scaler = getattr(self.trainer.precision_plugin, "scaler", None)

    def training_step(self, x: Tensor, index: int) -> Tensor:
        zs = self.surgery(self.net.features(x))
        each = [
            ((head(z) - (-1) ** t * (t + 1)) ** 2).mean()
            for t, (head, z) in enumerate(zip(self.net.heads, zs, strict=True))
        ]
        return self.surgery.total(each)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LR)


def test_layer(tmp_path: Path) -> None:
    net = mlp()
    plain = Layer(copy.deepcopy(net))
    optimizer = plain.configure_optimizers()
    for x in data():
        optimizer.zero_grad()
        plain.training_step(x, 0).backward()
        optimizer.step()
    fit(Layer(net), data(), tmp_path)
    assert_same(net, [p.detach() for p in plain.net.parameters()])


def test_checkpoint_holds_the_methods_state(tmp_path: Path) -> None:
    method = fastmtl.GradNorm()
    trainer = fit(Automatic(mlp(), method), data(), tmp_path)
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    state = torch.load(tmp_path / "it.ckpt", weights_only=False)["state_dict"]
    kept = {name.removeprefix("method."): value for name, value in state.items() if name.startswith("method.")}
    for name, value in method.state_dict().items():
        torch.testing.assert_close(kept[name], value)


@pytest.mark.parametrize("module", [Automatic, Manual])
def test_two_processes(module: type, tmp_path: Path) -> None:
    net, batches = mlp(), data()
    whole = [torch.cat(batches[:2]), torch.cat(batches[2:])]
    expected = by_hand(copy.deepcopy(net), whole, fastmtl.PCGrad(order="fixed"))
    fit(module(net, fastmtl.PCGrad(order="fixed")), batches, tmp_path, strategy="ddp_spawn", devices=2)
    assert_same(net, expected)


def test_absent_task_and_ordinary_loss(tmp_path: Path) -> None:
    class Other(Automatic):
        def training_step(self, x: Tensor, index: int) -> Any:
            losses = self.losses(x)
            if index % 2:
                return sum(losses)
            return self.multi_task_loss([losses[0], None, losses[2]], self.method, ["net.trunk.0.weight"])

    net = mlp()
    plain = copy.deepcopy(net)
    optimizer = torch.optim.SGD(plain.parameters(), lr=LR)
    method = fastmtl.MGDA()
    for i, x in enumerate(data()):
        optimizer.zero_grad()
        losses = plain.losses(x)
        if i % 2:
            sum(losses).backward()
        else:
            fastmtl.backward([losses[0], None, losses[2]], method, [plain.trunk[0].weight])
        optimizer.step()
    module = Other(net, fastmtl.MGDA())
    module.on_before_optimizer_step = lambda optimizer: None
    fit(module, data(), tmp_path)
    assert_same(net, [p.detach() for p in plain.parameters()])


def test_errors(tmp_path: Path) -> None:
    class Regularised(Automatic):
        def training_step(self, x: Tensor, index: int) -> Tensor:
            return super().training_step(x, index) + self.net.trunk[0].weight.square().sum()

    with pytest.raises(ValueError, match="belongs to the losses"):
        fit(Regularised(mlp(), fastmtl.PCGrad()), data(), tmp_path)
    module = Automatic(mlp(), fastmtl.PCGrad())
    module._trainer = SimpleNamespace(strategy=SimpleNamespace())
    with pytest.raises(RuntimeError, match="SimpleNamespace: multi_task_loss knows"):
        module.training_step(data()[0], 0)
    with pytest.raises(TypeError, match="scaler: the trainer has it"):
        fit(Automatic(mlp(), fastmtl.PCGrad(), scaler=None), data(), tmp_path)
