"""Our methods inside TorchJD: jac_to_grad, mtl_backward and the autogram engine."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import fastmtl
from tests.nets import mlp

pytest.importorskip("torchjd")

from torchjd import aggregation as theirs
from torchjd.aggregation import GramianWeightedAggregator
from torchjd.autogram import Engine
from torchjd.autojac import jac_to_grad, mtl_backward

from fastmtl.integrations.torchjd import FastmtlAggregator, FastmtlWeighting

METHODS = {
    "PCGrad": lambda: fastmtl.PCGrad(order="fixed"),
    "GradVac": lambda: fastmtl.GradVac(order="fixed"),
    "MGDA": fastmtl.MGDA,
    "PELTR": lambda: fastmtl.PELTR([0.1, 0.2, 0.3], scale_heads=False),
    "NashMTL": fastmtl.NashMTL,
    "Amortized": lambda: fastmtl.Amortized(fastmtl.MGDA(), update_every=2),
}
AGGREGATORS = {
    "weighting": lambda method: GramianWeightedAggregator(FastmtlWeighting(method)),
    "aggregator": FastmtlAggregator,
}


def batches(steps: int = 3) -> list[Tensor]:
    return list(torch.randn(steps, 9, 5, dtype=torch.float64))


@pytest.mark.parametrize("way", AGGREGATORS)
@pytest.mark.parametrize("name", METHODS)
def test_mtl_backward_is_fastmtl_backward(name: str, way: str) -> None:
    ours, net = mlp(), mlp()
    net.load_state_dict(ours.state_dict())
    method, aggregator = METHODS[name](), AGGREGATORS[way](METHODS[name]())
    for x in batches():
        ours.zero_grad()
        net.zero_grad()
        fastmtl.backward(ours.losses(x), method, ours.trunk)
        features = net.features(x)
        losses = [((head(features) - (-1) ** t * (t + 1)) ** 2).mean() for t, head in enumerate(net.heads)]
        mtl_backward(losses, features=features)
        shared = list(net.trunk.parameters())
        weights = jac_to_grad(shared, aggregator)
        assert weights.shape == (3,)
        for p in net.heads.parameters():
            p.grad = p.jac.sum(0) if getattr(p, "jac", None) is not None else p.grad
        for p, q in zip(ours.parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["PCGrad", "MGDA", "Mean", "AlignedMTL", "IMTLG"])
@pytest.mark.parametrize("way", AGGREGATORS)
def test_same_as_their_own(name: str, way: str) -> None:
    jacobian = torch.randn(2, 30, dtype=torch.float64)
    jacobian[1] -= jacobian[0]  # of two tasks any order gives the same
    found = AGGREGATORS[way](getattr(fastmtl, name)())(jacobian)
    torch.testing.assert_close(found, getattr(theirs, name)()(jacobian), rtol=1e-6, atol=1e-9)


def test_autogram_engine() -> None:
    net = mlp()
    x = batches()[0]
    engine = Engine(net.trunk, *net.heads, batch_dim=None)
    losses = torch.stack(net.losses(x))
    gramian = engine.compute_gramian(losses)
    losses = torch.stack(net.losses(x))
    losses.backward(FastmtlWeighting(fastmtl.MGDA())(gramian))
    found = [p.grad for p in net.parameters()]
    net.zero_grad()
    fastmtl.backward(net.losses(x), fastmtl.MGDA(), net)
    for p, grad in zip(net.parameters(), found, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", AGGREGATORS)
def test_precisions(way: str, dtype: torch.dtype) -> None:
    jacobian = torch.randn(5, 400).to(dtype)
    found = AGGREGATORS[way](fastmtl.PCGrad(order="fixed"))(jacobian)
    assert found.dtype == dtype
    exact = fastmtl.aggregate(jacobian.double(), fastmtl.PCGrad(order="fixed")).grads
    assert (found - exact).norm() < (1e-5 if dtype is torch.float32 else 2e-2) * exact.norm()


def test_state_is_in_the_state_dict() -> None:
    aggregator = FastmtlAggregator(fastmtl.GradVac())
    jacobian = torch.randn(3, 20)
    aggregator(jacobian)
    resumed = FastmtlAggregator(fastmtl.GradVac())
    resumed.load_state_dict(copy.deepcopy(aggregator.state_dict()))
    torch.testing.assert_close(resumed(jacobian), aggregator(jacobian), rtol=0, atol=0)


def test_errors() -> None:
    for make in AGGREGATORS.values():
        with pytest.raises(TypeError, match="loss weighting EqualWeighting"):
            make(fastmtl.EqualWeighting(2))
        with pytest.raises(ValueError, match="scale_heads=False"):
            make(fastmtl.PELTR([0.1, 0.1]))
        with pytest.raises(ValueError, match="values of the losses"):
            make(fastmtl.MGDA(normalization="loss"))
        with pytest.raises(ValueError, match="GradDrop works on the whole"):
            make(fastmtl.GradDrop())
        with pytest.raises(TypeError, match="construct it"):
            make(fastmtl.MGDA)
