"""fastmtl.integrations.accelerate in loops as Accelerate's users write them, against plain loops."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmtl
from tests.nets import Net, mlp
from tests.ranks import processes

pytest.importorskip("accelerate")

import accelerate
from accelerate.state import AcceleratorState, GradientState, PartialState

from fastmtl.integrations.accelerate import backward

pytestmark = pytest.mark.filterwarnings("default")  # of a library that is not ours
STEPS, LR = 4, 0.1
METHODS = {
    "PCGrad": lambda: fastmtl.PCGrad(order="fixed"),
    "GradNorm": fastmtl.GradNorm,
    "DWA": lambda: fastmtl.DWA(3, steps_per_epoch=2),
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Accelerate keeps what it is in singletons."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def data(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return list(torch.randn(STEPS, 8, 5, generator=torch.Generator().manual_seed(1), dtype=dtype))


def train(net: Net, method: Any, accelerator: Any, batches: list[Tensor], clip: float | None = None) -> None:
    wrapped, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=LR))
    for x in batches:
        with accelerator.accumulate(wrapped):
            with accelerator.autocast():
                losses = net.losses(x) if wrapped is net else wrapped(x)
            backward(accelerator, losses, method, net.trunk, model=net)
            if accelerator.sync_gradients and clip is not None:
                accelerator.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


def by_hand(net: Net, batches: list[Tensor], method: Any, accumulate: int = 1, clip: float | None = None) -> Net:
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    for start in range(0, len(batches), accumulate):
        optimizer.zero_grad()
        for x in batches[start : start + accumulate]:
            fastmtl.backward(net.losses(x), method, net.trunk)
        for p in net.parameters():
            p.grad /= accumulate
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
    return net


def assert_same(found: nn.Module, expected: nn.Module, **tolerance: float) -> None:
    for p, q in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, **(tolerance or {"rtol": 1e-9, "atol": 1e-12}))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_as_a_plain_loop(method: str, accumulate: int) -> None:
    net = mlp()
    expected = by_hand(copy.deepcopy(net), data(), METHODS[method](), accumulate, clip=0.1)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    train(net, METHODS[method](), accelerator, data(), clip=0.1)
    assert_same(net, expected)


@pytest.mark.parametrize("method", METHODS)
def test_scaler(method: str) -> None:
    # A power of two changes no digit, so the parameters are those without a scaler.
    net = mlp(dtype=torch.float32)
    expected = by_hand(copy.deepcopy(net), data(torch.float32), METHODS[method]())
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)  # it makes none without a GPU
    train(net, METHODS[method](), accelerator, data(torch.float32))
    assert accelerator.scaler.state_dict()["_growth_tracker"] == STEPS
    assert_same(net, expected, rtol=0, atol=0)


def test_bfloat16() -> None:
    net = mlp(dtype=torch.float32)
    expected = by_hand(copy.deepcopy(net), data(torch.float32), fastmtl.MGDA())
    train(net, fastmtl.MGDA(), accelerate.Accelerator(cpu=True, mixed_precision="bf16"), data(torch.float32))
    assert_same(net, expected, rtol=0.05, atol=0.02)


def test_task_gradients_accumulate_exactly() -> None:
    net, batches = mlp(), data()
    whole = [torch.cat(batches[:2]), torch.cat(batches[2:])]
    expected = by_hand(copy.deepcopy(net), whole, fastmtl.MGDA())
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    wrapped, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=LR))
    rows = fastmtl.TaskGradients(net.trunk, num_tasks=3, scaler=accelerator.scaler)
    for x in batches:
        with accelerator.accumulate(wrapped):
            for t in range(3):
                rows.backward(t, net.losses(x)[t] / accelerator.gradient_accumulation_steps)
            if accelerator.sync_gradients:
                rows.combine(fastmtl.MGDA())
            optimizer.step()
            optimizer.zero_grad()
    assert_same(net, expected)


class Losses(nn.Module):
    """What a wrapper's forward pass returns."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.net.losses(x)


def of_a_rank(net: Net) -> list[Tensor]:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    rank = torch.distributed.get_rank()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}  # as a launcher does
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1"}
    accelerator = accelerate.Accelerator(cpu=True)
    assert accelerator.distributed_type == accelerate.DistributedType.MULTI_CPU
    wrapped, optimizer = accelerator.prepare(Losses(net), torch.optim.SGD(net.parameters(), lr=LR))
    assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
    for x in data()[rank::2]:
        optimizer.zero_grad()
        backward(accelerator, wrapped(x), fastmtl.PCGrad(order="fixed"), net.trunk)
        optimizer.step()
    return [p.detach() for p in net.parameters()]


def test_two_processes() -> None:
    net, batches = mlp(), data()
    whole = [torch.cat(batches[:2]), torch.cat(batches[2:])]
    expected = by_hand(copy.deepcopy(net), whole, fastmtl.PCGrad(order="fixed"))
    with processes(2) as ranks:
        found = ranks.run(2, of_a_rank, net)
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))
    for p, q in zip(found[0], expected.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=1e-9, atol=1e-12)


def test_errors() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    net = mlp()
    with pytest.raises(TypeError, match="scaler: the accelerator has it"):
        backward(accelerator, net.losses(data()[0]), fastmtl.PCGrad(), net.trunk, scaler=None)
    accelerator.state.distributed_type = accelerate.DistributedType.DEEPSPEED
    with pytest.raises(RuntimeError, match="DEEPSPEED: takes its own backward pass"):
        backward(accelerator, net.losses(data()[0]), fastmtl.PCGrad(), net.trunk)
