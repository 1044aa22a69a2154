"""The three ways in on a GPU: the CPU's results, any stream, no synchronisation, CUDA graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import fastmtl
from fastmtl.surgery import GradientMethod
from tests.nets import Net, mlp

METHODS: dict[str, Callable[[], GradientMethod]] = {
    "mgda": fastmtl.MGDA,
    "pcgrad": fastmtl.PCGrad,
    "gradvac": lambda: fastmtl.GradVac(beta=0.3),
}
each_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS.keys())
# torch announces at every first use that the debug mode is a prototype.
sync_debugging = pytest.mark.filterwarnings("ignore:Synchronization debug mode")


@contextmanager
def no_sync() -> Iterator[None]:
    """Within, whatever waits for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def twins(make: Callable[[], GradientMethod]) -> tuple[GradientMethod, GradientMethod]:
    """The same method, with the same seed, for the GPU and the CPU."""
    method = make()
    return method, copy.deepcopy(method)


def nets() -> tuple[Net, Net]:
    net = mlp(num_tasks=3)
    return copy.deepcopy(net).cuda(), net


def surgery_step(net: Net, layer: fastmtl.FeatureSurgery, x: Tensor) -> None:
    zs = layer(net.features(x))
    losses = [
        ((head(z) - (-1) ** t * (t + 1)) ** 2).mean() for t, (head, z) in enumerate(zip(net.heads, zs, strict=True))
    ]
    layer.total(losses).backward()


def assert_same_grads(found: Net, expected: Net) -> None:
    for (name, p), q in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert p.grad is not None, name
        assert q.grad is not None, name
        torch.testing.assert_close(p.grad.cpu(), q.grad, rtol=1e-8, atol=1e-10)


@each_method
def test_aggregate_as_on_the_cpu(make: Callable[[], GradientMethod]) -> None:
    on_gpu, on_cpu = twins(make)
    for _ in range(3):  # state moves alike
        jacobian = torch.randn(6, 5003)
        found, expected = fastmtl.aggregate(jacobian.cuda(), on_gpu), fastmtl.aggregate(jacobian, on_cpu)
        torch.testing.assert_close(found.weights.cpu(), expected.weights, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.grads.cpu(), expected.grads, rtol=1e-4, atol=1e-4)


@each_method
def test_backward_as_on_the_cpu(make: Callable[[], GradientMethod]) -> None:
    on_gpu, on_cpu = twins(make)
    gpu_net, cpu_net = nets()
    for _ in range(2):
        x = torch.randn(8, 5, dtype=torch.float64)
        fastmtl.backward(gpu_net.losses(x.cuda()), on_gpu, gpu_net.trunk)
        fastmtl.backward(cpu_net.losses(x), on_cpu, cpu_net.trunk)
    assert_same_grads(gpu_net, cpu_net)


@each_method
def test_layer_as_on_the_cpu(make: Callable[[], GradientMethod]) -> None:
    on_gpu, on_cpu = twins(make)
    gpu_net, cpu_net = nets()
    gpu_layer = fastmtl.FeatureSurgery(on_gpu, num_tasks=3).cuda()
    cpu_layer = fastmtl.FeatureSurgery(on_cpu, num_tasks=3)
    for _ in range(2):
        x = torch.randn(8, 5, dtype=torch.float64)
        surgery_step(gpu_net, gpu_layer, x.cuda())
        surgery_step(cpu_net, cpu_layer, x)
    assert_same_grads(gpu_net, cpu_net)


@each_method
@sync_debugging
def test_nothing_waits_for_the_gpu(make: Callable[[], GradientMethod]) -> None:
    method = make()
    gpu_net, _ = nets()
    layer = fastmtl.FeatureSurgery(make(), num_tasks=3).cuda()
    x = torch.randn(8, 5, dtype=torch.float64, device="cuda")
    jacobian = torch.randn(6, 5003, device="cuda")

    def step() -> None:
        fastmtl.aggregate(jacobian, method_of_aggregate)
        fastmtl.backward(gpu_net.losses(x), method, gpu_net.trunk)
        surgery_step(gpu_net, layer, x)

    method_of_aggregate = make()
    step()  # state comes to the GPU
    with no_sync():
        step()


def test_works_on_the_current_stream() -> None:
    jacobian = torch.zeros(4, 100_001, device="cuda")
    values = torch.randn(4, 100_001, device="cuda")
    expected = fastmtl.aggregate(values, fastmtl.MGDA())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a kernel on another stream would find the zeros
        jacobian.copy_(values)
        found = fastmtl.aggregate(jacobian, fastmtl.MGDA())
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(found.weights, expected.weights)
    assert torch.equal(found.grads, expected.grads)


@each_method
@pytest.mark.parametrize("num_tasks", [3, 40])
def test_aggregate_in_a_cuda_graph(make: Callable[[], GradientMethod], num_tasks: int) -> None:
    """Replays compute on new values, state goes on, and random orders are fresh each time: as steps on the CPU."""
    on_gpu, on_cpu = twins(make)
    grads = [torch.randn(num_tasks, size, device="cuda") for size in (5003, 7, 640)]
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(2):
            fastmtl.aggregate(grads, on_gpu)
    torch.cuda.current_stream().wait_stream(warm_up)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = fastmtl.aggregate(grads, on_gpu)
    for name, buffer in on_gpu.named_buffers():
        setattr(on_cpu, name, buffer.cpu())
    for _ in range(3):
        for g in grads:
            g.copy_(torch.randn_like(g))
        graph.replay()
        expected = fastmtl.aggregate([g.cpu() for g in grads], on_cpu)
        torch.testing.assert_close(found.weights.cpu(), expected.weights, rtol=1e-4, atol=1e-4)
        for x, y in zip(found.grads, expected.grads, strict=True):
            torch.testing.assert_close(x.cpu(), y, rtol=1e-3, atol=1e-3)


@each_method
def test_bitwise_the_same_in_every_run(make: Callable[[], GradientMethod]) -> None:
    method = make()
    jacobian = torch.randn(17, 50_001, device="cuda")
    first = fastmtl.aggregate(jacobian, copy.deepcopy(method))
    for _ in range(20):
        again = fastmtl.aggregate(jacobian, copy.deepcopy(method))
        assert torch.equal(again.weights, first.weights)
        assert torch.equal(again.grads, first.grads)
