"""The three ways in on a GPU: the CPU's results, any stream, no synchronisation, CUDA graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import fastmtl
from fastmtl.surgery import GradientMethod
from tests.asserts import assert_non_conflicting, assert_on_simplex
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


def task_by_task(net: Net, rows: fastmtl.TaskGradients, method: GradientMethod, x: Tensor) -> None:
    for t, loss in enumerate(net.losses(x)):
        rows.backward(t, loss, retain_graph=True)
    rows.combine(method)


def steps(net: Net, make: Callable[[], GradientMethod]) -> dict[str, tuple[Callable[[Tensor], object], nn.Module]]:
    """A training step by each way in, each with the module that holds its state."""
    exact, per_task, layer = make(), make(), fastmtl.FeatureSurgery(make(), num_tasks=3)
    rows = fastmtl.TaskGradients(net.trunk, num_tasks=3)
    return {
        "backward": (lambda x: fastmtl.backward(net.losses(x), exact, net.trunk), exact),
        "layer": (lambda x: surgery_step(net, layer, x), layer),
        "task gradients": (lambda x: task_by_task(net, rows, per_task, x), per_task),
    }


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
    x = torch.randn(8, 5, dtype=torch.float64, device="cuda")
    jacobian = torch.randn(6, 5003, device="cuda")
    each = steps(gpu_net, make)

    def step() -> None:
        fastmtl.aggregate(jacobian, method)
        for run, _ in each.values():
            run(x)

    for _, module in each.values():
        module.cuda()
    step()  # state comes to the GPU
    with no_sync():
        step()


@each_method
def test_few_launches(make: Callable[[], GradientMethod]) -> None:
    """Gramian, its sum, one or two kernels of the solver, combine; nothing is copied between host and GPU."""
    method, jacobian = make(), torch.randn(8, 100_003, device="cuda")
    fastmtl.aggregate(jacobian, method)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        fastmtl.aggregate(jacobian, method)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    if not names:
        pytest.skip("the profiler sees no kernels here: CUPTI is not available")
    assert sum("fastmtl" in name for name in names) in (4, 5), names
    assert not [name for name in names if "Memcpy HtoD" in name or "Memcpy DtoH" in name], names


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


def test_two_streams_at_once() -> None:
    """Calls that overlap on the GPU do not share scratch memory."""
    jacobians = [torch.randn(t, 400_003, device="cuda") for t in (8, 40)]
    expected = [fastmtl.aggregate(j, fastmtl.MGDA()) for j in jacobians]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    found: list[list[fastmtl.Result]] = [[], []]
    for _ in range(10):
        for stream, jacobian, results in zip(streams, jacobians, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(fastmtl.aggregate(jacobian, fastmtl.MGDA()))
    torch.cuda.synchronize()
    for results, right in zip(found, expected, strict=True):
        for result in results:
            assert torch.equal(result.weights, right.weights)
            assert torch.equal(result.grads, right.grads)


@each_method
@pytest.mark.parametrize("way", ["backward", "layer", "task gradients"])
def test_training_step_in_a_cuda_graph(make: Callable[[], GradientMethod], way: str) -> None:
    """Each replay gives the gradients of a step on the CPU from the same inputs and state."""
    gpu_net, cpu_net = nets()
    run, module = steps(gpu_net, make)[way]
    run_on_cpu, cpu_module = steps(cpu_net, make)[way]
    module.cuda()
    x = torch.randn(8, 5, dtype=torch.float64, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            gpu_net.zero_grad()
            run(x)
    torch.cuda.current_stream().wait_stream(side)

    gpu_net.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(x)
    cpu_module.load_state_dict({name: value.cpu() for name, value in module.state_dict().items()})
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        cpu_net.zero_grad()
        run_on_cpu(x.cpu())
        assert_same_grads(gpu_net, cpu_net)


def test_replays_draw_fresh_orders() -> None:
    method, jacobian = fastmtl.PCGrad(), torch.randn(8, 6, device="cuda")
    fastmtl.aggregate(jacobian, method)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = fastmtl.aggregate(jacobian, method)
    weights = []
    for _ in range(8):
        graph.replay()
        weights.append(found.weights.clone())
    assert len(torch.stack(weights).unique(dim=0)) > 4


@pytest.mark.parametrize("num_tasks", [3, 8, 40, 64])
def test_properties_of_the_papers(num_tasks: int) -> None:
    """What tests/surgery asserts of the results on the CPU, on gradients of many columns."""
    jacobian = torch.randn(num_tasks, 20_011, device="cuda", dtype=torch.float64)
    jacobian += 20 * (-1) ** torch.arange(num_tasks, device="cuda")[:, None] * torch.randn_like(jacobian[:1])
    out = fastmtl.aggregate(jacobian, fastmtl.MGDA())
    assert_on_simplex(out.weights)
    assert_non_conflicting(jacobian, out.grads, rtol=1e-6)
    torch.testing.assert_close(out.grads, out.weights @ jacobian)
    kind = fastmtl.aggregate(jacobian.abs(), fastmtl.PCGrad())  # without conflict, PCGrad and GradVac sum
    torch.testing.assert_close(kind.weights, torch.ones_like(kind.weights))
    kind = fastmtl.aggregate(jacobian.abs(), fastmtl.GradVac(beta=0))
    torch.testing.assert_close(kind.weights, torch.ones_like(kind.weights))


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
