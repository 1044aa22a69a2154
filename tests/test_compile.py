"""The layer under torch.compile, in whatever part of the model is compiled: always what eager mode does.

Most cases stop before code is generated (``backend="aot_eager"``), since what can go wrong is in how graphs are cut,
traced and joined. Those at the end go through inductor, its buffers and its cache on disk.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastmtl
from fastmtl import DWA, MGDA, FeatureSurgery, GradNorm, GradVac, PCGrad, UncertaintyWeighting
from tests.asserts import assert_untouched
from tests.test_layer import LayerNet, inputs

ROOT = Path(__file__).parent.parent

Forward = Callable[[Tensor, "int | None"], Tensor]

METHODS: dict[str, Callable[[], fastmtl.GradientMethod | fastmtl.LossWeighting]] = {
    "PCGrad": PCGrad,
    "GradVac": GradVac,
    "MGDA": MGDA,
    "GradNorm": lambda: GradNorm(scale_heads=False),
    "Amortized": lambda: fastmtl.Amortized(GradVac(), update_every=2),
    "UncertaintyWeighting": lambda: UncertaintyWeighting(3, init=0.5),
    "DWA": lambda: DWA(3, steps_per_epoch=2),
}


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    """A fresh one, whose own warnings are not ours."""
    torch._dynamo.reset()
    counters.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\..*")
        yield
    torch._dynamo.reset()


class Net(LayerNet):
    """Its total loss, with one of the tasks absent or none."""

    def forward(self, x: Tensor, absent: int | None = None) -> Tensor:
        return self.total(self.surgery(self.trunk(x)), absent)

    def total(self, zs: tuple[Any, ...], absent: int | None) -> Tensor:
        losses: list[Tensor | None] = [*self.head_losses(zs)]
        if absent is not None:
            losses[absent] = None
        return self.surgery.total(losses)


# ---- what is compiled ------------------------------------------------------------------------------------------------


def whole(net: Net, **options: Any) -> Forward:
    return torch.compile(net, fullgraph=True, **options)


def trunk_and_layer(net: Net, **options: Any) -> Forward:
    """What leaves the compiled graph are the layer's outputs; the heads are eager."""
    compiled = torch.compile(lambda x: net.surgery(net.trunk(x)), fullgraph=True, **options)
    return lambda x, absent: net.total(compiled(x), absent)


def graph_break_after_the_layer(net: Net, **options: Any) -> Forward:
    def forward(x: Tensor, absent: int | None) -> Tensor:
        zs = net.surgery(net.trunk(x))
        torch._dynamo.graph_break()
        return net.total(zs, absent)

    return torch.compile(forward, **options)


def trunk_and_heads(net: Net, **options: Any) -> Forward:
    """The layer is eager, between two compiled parts."""
    trunk = torch.compile(net.trunk, fullgraph=True, **options)
    heads = torch.compile(net.total, fullgraph=True, **options)
    return lambda x, absent: heads(net.surgery(trunk(x)), absent)


def layer_and_heads(net: Net, **options: Any) -> Forward:
    compiled = torch.compile(lambda z, absent: net.total(net.surgery(z), absent), fullgraph=True, **options)
    return lambda x, absent: compiled(net.trunk(x), absent)


def layer_alone(net: Net, **options: Any) -> Forward:
    compiled = torch.compile(net.surgery, fullgraph=True, **options)
    return lambda x, absent: net.total(compiled(net.trunk(x)), absent)


def ddp(net: nn.Module) -> DistributedDataParallel:
    """In buckets of about 100 bytes: a few parameters each."""
    return DistributedDataParallel(net, bucket_cap_mb=1e-4, find_unused_parameters=True)


def compiled_ddp(net: Net, **options: Any) -> Forward:
    return torch.compile(ddp(net), **options)


def ddp_of_compiled(net: Net, **options: Any) -> Forward:
    return ddp(torch.compile(net, **options))


PARTS = [trunk_and_layer, trunk_and_heads, layer_and_heads, layer_alone]


# ---- as eager --------------------------------------------------------------------------------------------------------


def assert_as_eager(
    net: nn.Module,
    run: Callable[..., Tensor],
    batches: list[tuple[Any, ...]],
    rtol: float = 1e-8,
    eager: Callable[[nn.Module], Callable[..., Tensor]] = lambda twin: twin,
) -> None:
    """Some training steps, so that state and random orders must go on too.

    Args:
        net: Has a layer called ``surgery``; a copy of it takes the same steps.
        run: What is to be as eager: from a batch to the total loss.
        batches: One per step.
        rtol: Relative to the largest element of each gradient.
        eager: How the copy is run.
    """
    twin = copy.deepcopy(net)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (net, twin)]
    for batch in batches:
        for optimizer, forward in zip(optimizers, (run, eager(twin)), strict=True):
            optimizer.zero_grad()
            forward(*batch).backward()
        for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                assert q.grad is not None
                atol = rtol * float(q.grad.abs().max())
                torch.testing.assert_close(p.grad, q.grad, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
        if not isinstance(net.surgery.method, fastmtl.LossWeighting):
            found, expected = net.surgery.result, twin.surgery.result
            torch.testing.assert_close(found.weights, expected.weights, rtol=rtol, atol=rtol)
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(net.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol, equal_nan=True)


def batches(*absent: int | None) -> list[tuple[Tensor, int | None]]:
    return [(inputs(), t) for t in absent]


@pytest.mark.parametrize(
    ("compile_", "method"),
    [
        *((part, method) for part in (whole, graph_break_after_the_layer) for method in METHODS),
        *((part, method) for part in PARTS for method in ("GradVac", "GradNorm")),
        (trunk_and_heads, "UncertaintyWeighting"),
    ],
)
def test_parts(method: str, compile_: Callable[..., Forward]) -> None:
    """Which tasks are there changes from step to step."""
    net = Net(METHODS[method]())
    assert_as_eager(net, compile_(net, backend="aot_eager"), batches(None, 1, None))
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("compile_", [whole, trunk_and_layer])
def test_zero_gradients_without_total(compile_: Callable[..., Forward]) -> None:
    """Of hinge losses that are satisfied: such tasks are not absent, and a task that is left is not alone."""

    def total(net: Net, zs: tuple[Tensor, ...]) -> Tensor:
        a, *others = net.head_losses(zs)
        return a + sum((1e-3 * x - 1e3).clamp(min=0) for x in others)

    def forward(net: Net) -> Callable[[Tensor], Tensor]:
        return lambda x: total(net, net.surgery(net.trunk(x)))

    net = Net(GradVac())
    if compile_ is whole:
        run = torch.compile(forward(net), fullgraph=True, backend="aot_eager")
    else:
        part = torch.compile(lambda x: net.surgery(net.trunk(x)), fullgraph=True, backend="aot_eager")
        run = lambda x: total(net, part(x))  # noqa: E731
    assert_as_eager(net, run, [(inputs(),) for _ in range(3)], eager=forward)
    assert net.surgery.result.gramian.count_nonzero() == 1
    assert any(p.grad.count_nonzero() for p in net.trunk.parameters())


# ---- under DistributedDataParallel -----------------------------------------------------------------------------------


@pytest.fixture
def one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 1)  # else the first holds the whole model
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("method", ["GradVac", "GradNorm", "UncertaintyWeighting"])
@pytest.mark.parametrize("compile_", [compiled_ddp, ddp_of_compiled])
def test_distributed(method: str, compile_: Callable[..., Forward]) -> None:
    """torch.compile cuts the graph of a DDP model where a bucket is full."""
    net = Net(METHODS[method]())
    counted = CompileCounterWithBackend("aot_eager")
    run = compile_(net, backend=counted)
    assert_as_eager(net, run, batches(None, 1, None))
    assert counted.frame_count > 2  # the number of patterns of absent tasks


# ---- several features ------------------------------------------------------------------------------------------------


class Scales(nn.Module):
    """A trunk with features of two scales and a mask; task 0 reads the first, task 1 the second, task 2 both."""

    def __init__(self, kind: str, method: fastmtl.GradientMethod) -> None:
        super().__init__()
        self.kind = kind
        self.trunk = nn.ModuleList([nn.Linear(5, 6), nn.Linear(6, 4)])
        self.heads = nn.ModuleList([nn.Linear(6, 1), nn.Linear(4, 1), nn.Linear(10, 1)])
        self.surgery = FeatureSurgery(method, num_tasks=3)
        self.double()

    def features(self, x: Tensor) -> Any:
        fine = torch.tanh(self.trunk[0](x))
        coarse = self.trunk[1](fine)
        mask = x.sum(1) > -1
        return (fine, (coarse, mask), None) if self.kind == "tuple" else {"fine": fine, "coarse": coarse, "mask": mask}

    def total(self, zs: tuple[Any, ...]) -> Tensor:
        losses = []
        for t, z in enumerate(zs):
            fine, coarse, mask = (z[0], *z[1]) if self.kind == "tuple" else (z["fine"], z["coarse"], z["mask"])
            read = (fine, coarse, torch.cat([fine, coarse], 1))[t]
            losses.append(((self.heads[t](read).squeeze(1) - (-1) ** t * (t + 1)) ** 2 * mask).mean())
        return self.surgery.total(losses)

    def forward(self, x: Tensor) -> Tensor:
        return self.total(self.surgery(self.features(x)))


@pytest.mark.parametrize("kind", ["tuple", "dict"])
@pytest.mark.parametrize("part", ["whole", "trunk and layer", "layer"])
def test_several_features(kind: str, part: str) -> None:
    net = Scales(kind, GradVac())
    options = {"fullgraph": True, "backend": "aot_eager"}
    compiled = {
        "whole": lambda: torch.compile(net, **options),
        "trunk and layer": lambda: torch.compile(lambda x: net.surgery(net.features(x)), **options),
        "layer": lambda: torch.compile(net.surgery, **options),
    }[part]()
    runs = {
        "whole": compiled,
        "trunk and layer": lambda x: net.total(compiled(x)),
        "layer": lambda x: net.total(compiled(net.features(x))),
    }
    assert_as_eager(net, runs[part], [(inputs(),) for _ in range(3)])


# ---- what else happens in training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("compile_", [whole, trunk_and_layer])
def test_changing_batch_sizes(compile_: Callable[..., Forward]) -> None:
    """The second size makes the graph dynamic; later ones compile nothing."""
    net = Net(GradVac())
    counted = CompileCounterWithBackend("aot_eager")
    run = compile_(net, backend=counted)
    assert_as_eager(net, run, [(torch.randn(n, 5).double(), None) for n in (4, 6)])
    so_far = counted.frame_count
    assert_as_eager(net, run, [(torch.randn(n, 5).double(), None) for n in (9, 7, 4)])
    assert counted.frame_count == so_far


def test_train_eval_train() -> None:
    net = Net(GradVac())
    run = whole(net, backend="aot_eager")
    assert_as_eager(net, run, batches(None))
    x = inputs()
    net.eval()
    with assert_untouched(net.surgery):
        with torch.no_grad():
            torch.testing.assert_close(run(x), net(x))
        net.zero_grad()
        run(x).backward()
        found = [p.grad for p in net.parameters()]
        net.zero_grad()
        net(x).backward()  # eager, whose gradients are plain in evaluation: tests/test_layer.py
        for g, p in zip(found, net.parameters(), strict=True):
            torch.testing.assert_close(g, p.grad)
    net.train()
    net.zero_grad()
    assert_as_eager(net, run, batches(None, 0))


@pytest.mark.parametrize("layer_too", [False, True])
def test_activation_checkpointing(layer_too: bool) -> None:
    """Of trunk and heads each; or around the layer, too, where the compiler breaks the graph."""
    net = Net(GradVac())

    def recomputed(part: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: checkpoint(part, *args, use_reentrant=False)

    def around_the_layer(x: Tensor) -> Tensor:
        return net.surgery.total(recomputed(net.losses)(x))

    def around_trunk_and_heads(x: Tensor) -> Tensor:
        zs = net.surgery(recomputed(net.trunk)(x))
        outs = [recomputed(head)(z) for head, z in zip(net.heads, zs, strict=True)]
        return net.surgery.total([((out - (-1) ** t * (t + 1)) ** 2).mean() for t, out in enumerate(outs)])

    forward = around_the_layer if layer_too else around_trunk_and_heads
    run = torch.compile(forward, fullgraph=not layer_too, backend="aot_eager")
    assert_as_eager(net, run, [(inputs(),) for _ in range(3)])


@pytest.mark.parametrize("compile_", [whole, trunk_and_layer, graph_break_after_the_layer])
def test_autocast(compile_: Callable[..., Forward]) -> None:
    net = Net(GradVac()).float()

    def autocast(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*batch: Any) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return forward(*batch)

        return run

    run = autocast(compile_(net, backend="aot_eager"))
    steps = [(inputs(torch.float32), t) for t in (None, None, 1)]
    assert_as_eager(net, run, steps, rtol=1e-3, eager=autocast)


@pytest.mark.parametrize("compile_", [whole, trunk_and_layer])
def test_gradient_scaler(compile_: Callable[..., Forward]) -> None:
    """In half precision, with an overflow in the third step, which moves neither state nor parameters."""
    seed = torch.Generator().manual_seed(0)
    steps = [torch.randn(4, 5, generator=seed) * (1e6 if step == 2 else 1.0) for step in range(5)]

    def train(compiled: bool) -> tuple[Net, list[float]]:
        torch.manual_seed(1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        net = Net(GradVac(), scaler=scaler).float()
        run = compile_(net, backend="aot_eager") if compiled else net
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        scales = []
        for x in steps:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                assert net.trunk(x).dtype == torch.float16
                total = run(x, None)
            scaler.scale(total).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return net, scales

    (found, scales), (expected, same) = train(True), train(False)
    assert scales == same == [256.0, 256.0, 128.0, 128.0, 128.0]
    assert found.surgery.method.rng[1] == expected.surgery.method.rng[1] == 4
    for (name, a), b in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


class CompiledBackward:
    """A total loss whose backward pass is compiled when it begins."""

    def __init__(self, total: Tensor) -> None:
        self.total = total

    def backward(self) -> None:
        with compiled_autograd._enable(torch.compile(backend="aot_eager")):
            self.total.backward()


@pytest.mark.parametrize("forward_too", [False, True])
def test_compiled_autograd(forward_too: bool) -> None:
    net = Net(MGDA())
    forward = whole(net, backend="aot_eager") if forward_too else net
    assert_as_eager(net, lambda *batch: CompiledBackward(forward(*batch)), batches(None, 1, None))
    assert counters["compiled_autograd"]["captures"] > 0


def test_compiled_autograd_of_an_eager_layer_knows_who_is_absent() -> None:
    """A loss that does not depend on its copy of the features; no zero gradient, which would be MGDA's only choice."""
    features, elsewhere = torch.randn(4, 3, requires_grad=True), torch.ones((), requires_grad=True)
    surgery = FeatureSurgery(MGDA(), num_tasks=3)
    z = surgery(features)
    CompiledBackward(surgery.total([z[0].square().sum(), z[1].sum(), elsewhere * 1])).backward()
    rows = torch.stack([2 * features.detach(), torch.ones(4, 3)]).flatten(1)
    alone = fastmtl.aggregate(rows, MGDA())
    torch.testing.assert_close(surgery.result.weights, torch.cat([alone.weights, torch.zeros(1)]))
    torch.testing.assert_close(features.grad.flatten(), alone.grads)


def test_export_is_the_identity() -> None:
    net, x = Net(GradVac()).eval(), inputs()
    program = torch.export.export(net, (x,))
    torch.testing.assert_close(program.module()(x), net(x))
    assert not any("fastmtl" in str(node.target) for node in program.graph.nodes)


# ---- wrong uses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compile_", [whole, trunk_and_layer])
def test_the_backward_pass_of_an_earlier_total_raises(compile_: Callable[..., Forward]) -> None:
    """Where `total` is eager."""
    net = Net(GradVac())
    if compile_ is whole:  # but for `total`
        losses = torch.compile(net.losses, fullgraph=True, backend="aot_eager")
    else:
        part = torch.compile(lambda x: net.surgery(net.trunk(x)), fullgraph=True, backend="aot_eager")
        losses = lambda x: net.head_losses(part(x))  # noqa: E731
    earlier = net.surgery.total(losses(inputs()))
    a, _, _ = losses(inputs())
    last = net.surgery.total([a, None, None])
    with assert_untouched(net), pytest.raises(RuntimeError, match="backward of an earlier total"):
        earlier.backward()
    last.backward()
    assert net.surgery.result.weights.tolist() == [1, 0, 0]


def test_compiled_autograd_of_an_earlier_total_raises() -> None:
    """Also with a graph at hand from passes that were right."""
    net = Net(GradVac())
    for _ in range(2):
        CompiledBackward(net(inputs())).backward()
    earlier, last = net(inputs()), net(inputs(), 1)
    with assert_untouched(net), pytest.raises(RuntimeError, match="backward of an earlier total"):
        CompiledBackward(earlier).backward()
    CompiledBackward(last).backward()
    assert net.surgery.result.weights[1] == 0


def test_an_error_leaves_the_state_alone() -> None:
    class Broken(GradVac):
        def solve(self, step: fastmtl.Step) -> Tensor:
            weights = super().solve(step)
            if step.gramian.isfinite().all():  # not while the layer is constructed
                raise MemoryError
            return weights

    net = Net(Broken())
    total = whole(net, backend="aot_eager")(inputs(), None)
    with assert_untouched(net.surgery, net.trunk), pytest.raises(MemoryError):
        total.backward()


def test_batched_gradients_raise() -> None:
    """By PyTorch, which runs no compiled graph on them."""
    net = Net(GradVac())
    total = trunk_and_layer(net, backend="aot_eager")(inputs(), None)
    with assert_untouched(net.surgery, net.trunk), pytest.raises(RuntimeError, match=r"batched|vmap"):
        torch.autograd.grad(total, [*net.trunk.parameters()], torch.ones(2).double(), is_grads_batched=True)


def test_no_double_backward() -> None:
    """By PyTorch, and in the second pass only."""
    net = Net(GradVac())
    total = trunk_and_layer(net, backend="aot_eager")(inputs(), None)
    (grad, *_) = torch.autograd.grad(total, [*net.trunk.parameters()], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


# ---- inductor --------------------------------------------------------------------------------------------------------


def matrices_only(method: fastmtl.GradientMethod) -> Net:
    """A trunk for which inductor calls no C++ compiler: that would take half a minute."""
    net = Net(method)
    net.trunk = nn.Linear(5, 6, bias=False).double()
    return net


def test_inductor() -> None:
    net = matrices_only(GradVac())
    assert_as_eager(net, trunk_and_layer(net), batches(None, 1, None))


@pytest.mark.usefixtures("one_rank")
def test_inductor_distributed() -> None:
    net = matrices_only(GradVac())
    assert_as_eager(net, compiled_ddp(net), batches(None, None))


CHILD = """
import sys
import torch
import fastmtl
from tests.test_compile import Net, assert_as_eager, batches, counters, whole

torch.manual_seed(0)
torch.set_num_threads(1)
net = Net(getattr(fastmtl, sys.argv[1])())
assert_as_eager(net, whole(net), batches(None, None, None))
print("hits", counters["inductor"]["fxgraph_cache_hit"], "misses", counters["inductor"]["fxgraph_cache_miss"])
"""


def test_inductor_with_a_warm_cache(tmp_path: Path) -> None:
    """A graph from the disk serves whatever method the layer has now."""
    if shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
        pytest.skip("inductor needs a C++ compiler, and there is none")
    counts = []
    for method in ("GradVac", "MGDA"):
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", CHILD, method], env=environment, cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        counts.append(done.stdout.split())
    assert counts == [["hits", "0", "misses", "2"], ["hits", "2", "misses", "0"]]
