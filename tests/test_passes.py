"""Backward passes of a step: chunks of tasks, narrow rows, compiled trunks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmtl
from fastmtl import MGDA, GradVac, PCGrad
from tests import nets
from tests.asserts import assert_untouched
from tests.nets import assert_grads, jacobian_of, task_gradients, weighted_sum

TRUNKS = [name for name in nets.TRUNKS if name != "reentrant"]


def inputs(batch: int = 4) -> Tensor:
    return torch.randn(batch, 5, dtype=torch.float64)


def fixed(num_tasks: int) -> PCGrad:
    return PCGrad(order=torch.arange(num_tasks).expand(num_tasks, num_tasks))


# ---- chunks ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # RNNs have no batching rule in PyTorch
@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("chunk_size", [1, 2, 5, 9])
def test_chunks_give_the_same_gradients(trunk: str, chunk_size: int) -> None:
    model = nets.net(trunk, num_tasks=5)
    losses = model.losses(inputs())
    shared, heads = [*model.trunk.parameters()], [*model.heads.parameters()]
    jacobian = jacobian_of(task_gradients(losses, shared), shared)
    expected = weighted_sum(task_gradients(losses, shared), fixed(5)(jacobian @ jacobian.T))
    plain = weighted_sum(task_gradients(losses, heads), torch.ones(5))
    out = fastmtl.backward(losses, fixed(5), shared, chunk_size=chunk_size)
    torch.testing.assert_close(out.gramian, jacobian @ jacobian.T)
    assert_grads(shared, expected, rtol=1e-10)
    assert_grads(heads, plain)


@pytest.mark.parametrize("chunk_size", [1, 3])
@pytest.mark.parametrize("options", [{}, {"groups": "layer"}, {"gramian_params": "trunk.2"}, {"max_norm": 0.1}])
def test_chunks_with_the_other_options(chunk_size: int, options: dict[str, Any]) -> None:
    model = nets.mlp(4)
    losses = model.losses(inputs())
    losses[2] = None  # type: ignore[call-overload]
    results = []
    for more in ({}, {"chunk_size": chunk_size}):
        model.zero_grad()
        out = fastmtl.backward(losses, fixed(4), "trunk", model=model, retain_graph=True, **options, **more)
        results.append([out.weights, out.gramian, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_chunks_keep_absent_apart_from_zero() -> None:
    """The second task misses one shared parameter, and multiplies another by 0."""
    a, b, c = (nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(3))
    u = a * 2
    losses = [(u * b * c).sum(), u.sum() + (0 * c).sum(), (b * c).sum() + u.sum()]
    expected = fastmtl.backward(losses, MGDA(), [a, b, c], groups="tensor", retain_graph=True).weights
    found = fastmtl.backward(losses, MGDA(), [a, b, c], groups="tensor", retain_graph=True, chunk_size=3).weights
    torch.testing.assert_close(found, expected)
    assert found[1, 1] == 0  # absent
    assert found[2, 1] == 1  # a zero gradient is the point of smallest norm


def test_chunks_find_the_shared_parameters() -> None:
    model = nets.mlp()
    fastmtl.backward(model.losses(inputs()), MGDA(), model=model, chunk_size=2)
    plain = nets.mlp()
    plain.load_state_dict(model.state_dict())
    x = inputs()
    model.zero_grad()
    fastmtl.backward(model.losses(x), MGDA(), model=model, chunk_size=2)
    fastmtl.backward(plain.losses(x), MGDA(), plain.trunk)
    assert_grads(model.parameters(), [p.grad for p in plain.parameters()], rtol=1e-10)


class Saved(torch.autograd.Function):
    """Saves a tensor whose end a test can see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, saved: Tensor) -> Tensor:
        ctx.save_for_backward(saved.clone())
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0].sum(), None


def test_a_heads_graph_is_freed_as_soon_as_it_was_passed() -> None:
    """Memory: the second head's backward sees what the first one saved no more."""

    def still_saved(node: Any) -> bool:
        try:
            _ = node.saved_tensors
        except RuntimeError:
            return False
        return True

    for chunk_size in (None, 1, 2):
        model = nets.mlp(4)
        z = model.features(inputs())
        nodes: list[Any] = []
        seen: list[int] = []

        def look(grad: Tensor, nodes: list[Any] = nodes, seen: list[int] = seen) -> None:
            seen.append(sum(still_saved(node) for node in nodes))

        losses = []
        for head in model.heads:
            y = Saved.apply(head(z), torch.ones(4))
            nodes.append(y.grad_fn)
            y.register_hook(look)
            losses.append(y.pow(2).sum())
        fastmtl.backward(losses, MGDA(), model.trunk, chunk_size=chunk_size)
        assert seen == ([4, 4, 4, 4] if chunk_size is None else [4, 3, 2, 1])


def test_what_cannot_be_batched_says_so() -> None:
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return torch.from_numpy(grad.numpy() * 2)

    model = nets.mlp()
    z = model.trunk[2](torch.tanh(Opaque.apply(model.trunk[0](inputs()))))
    losses = [head(z).sum() for head in model.heads]
    method = GradVac()
    with assert_untouched(model, method), pytest.raises(RuntimeError, match="chunk_size=2: backward of task 0, task 1"):
        fastmtl.backward(losses, method, model.trunk, chunk_size=2, retain_graph=True)
    fastmtl.backward(losses, method, model.trunk, chunk_size=1)


def test_bad_options() -> None:
    model, method = nets.net("reentrant"), MGDA()
    losses = model.losses(inputs())
    for error, text, options in (
        (ValueError, "chunk_size.*0", {"chunk_size": 0}),
        (TypeError, "chunk_size.*1.5", {"chunk_size": 1.5}),
        (ValueError, "chunk_size=2: needs filler='grad'", {"chunk_size": 2}),
        (ValueError, "chunk_size=2: needs filler='grad'", {"chunk_size": 2, "filler": "backward"}),
        (ValueError, "row_dtype.*float64", {"row_dtype": torch.float64}),
        (ValueError, "row_dtype.*'bf16'", {"row_dtype": "bf16"}),
    ):
        with assert_untouched(model, method), pytest.raises(error, match=text):
            fastmtl.backward(losses, method, model.trunk, model=model, **options)  # type: ignore[arg-type]


def test_a_freed_graph_is_named() -> None:
    model, method = nets.mlp(), GradVac()
    losses = dict(zip("abc", model.losses(inputs()), strict=True))
    fastmtl.backward(losses, method, model.trunk)
    for options in ({}, {"chunk_size": 1}, {"chunk_size": 2}, {"filler": "backward"}, {"gramian_params": "trunk.2"}):
        with assert_untouched(model, method), pytest.raises(RuntimeError, match="loss of a: its graph was freed"):
            fastmtl.backward(losses, method, "trunk", model=model, **options)  # type: ignore[arg-type]


# ---- narrow rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"chunk_size": 1}, {"chunk_size": 3}, {"filler": "backward"}])
@pytest.mark.parametrize("row_dtype", [torch.bfloat16, torch.float16])
def test_narrow_rows_are_rounded_once(row_dtype: torch.dtype, options: dict[str, Any]) -> None:
    model = nets.mlp(5, torch.float32)
    losses = model.losses(inputs().float())
    shared, heads = [*model.trunk.parameters()], [*model.heads.parameters()]
    rows = [[g.to(row_dtype).double() for g in row] for row in task_gradients(losses, shared)]  # type: ignore[union-attr]
    jacobian = jacobian_of(rows, shared)
    out = fastmtl.backward(losses, MGDA(), shared, row_dtype=row_dtype, retain_graph=True, **options)
    torch.testing.assert_close(out.gramian, jacobian @ jacobian.T, rtol=1e-4, atol=1e-6)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert_grads(shared, weighted_sum(rows, out.weights), rtol=1e-5)  # a result in row_dtype would be off by 1e-3
    assert_grads(heads, weighted_sum(task_gradients(losses, heads), torch.ones(5)), rtol=1e-6)
    fastmtl.backward(losses, MGDA(), shared, row_dtype=row_dtype, **options)  # into existing .grad
    assert_grads(shared, [2 * g for g in weighted_sum(rows, out.weights)], rtol=1e-5)  # type: ignore[operator]


def test_float64_rows_are_left_as_they_are() -> None:
    model = nets.mlp()
    losses = model.losses(inputs())
    shared = [*model.trunk.parameters()]
    jacobian = jacobian_of(task_gradients(losses, shared), shared)
    out = fastmtl.backward(losses, MGDA(), shared, row_dtype=torch.bfloat16)
    torch.testing.assert_close(out.gramian, jacobian @ jacobian.T, rtol=1e-12, atol=1e-14)


# ---- compiled trunks -------------------------------------------------------------------------------------------------

SCRIPT = """
import warnings
import torch
from torch import nn
import torch._functorch.config as functorch
import fastmtl

warnings.filterwarnings("ignore")
torch.manual_seed(0)
trunk = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU())
heads = nn.ModuleList(nn.Linear(64, 1) for _ in range(3))
model = nn.ModuleList([trunk, heads])
x = torch.randn(32, 64)


def losses(trunk):
    z = trunk(x)
    return [(head(z) - t).pow(2).mean() for t, head in enumerate(heads)]


def step(trunk_of_step, method, shared=trunk, **options):
    model.zero_grad()
    state = {name: value.clone() for name, value in method.state_dict().items()}
    try:
        fastmtl.backward(losses(trunk_of_step), method, shared, **options)
    except RuntimeError as error:
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(value, state[name]) for name, value in method.state_dict().items())
        return str(error).splitlines()[0]
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def tell(name, trunk_of_step, **options):
    found, expected = (step(t, fastmtl.GradVac(order="fixed"), **options) for t in (trunk_of_step, trunk))
    if not isinstance(found, str):
        same = all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(found, expected))
        found = "right" if same else "wrong"
    print(f"{name}: {found}")


compiled = torch.compile(trunk)
sum(losses(compiled)).backward()  # an ordinary step
tell("flag on", compiled)
functorch.donated_buffer = False
tell("flag off, but compiled before", compiled)
tell("also by backward", compiled, filler="backward")
fine = losses
losses = lambda trunk: [None, None, fine(trunk)[2]]  # one pass per task, but two in all
tell("also of one task", compiled, gramian_params=trunk[3])
losses = lambda trunk: [fine(trunk)[0] * float("inf"), *fine(trunk)[1:]]
tell("also below a task that is dropped", compiled, nonfinite="drop_task")
losses = fine
resumed = fastmtl.Amortized(fastmtl.MGDA(), update_every=9)
fastmtl.backward(losses(trunk), resumed, trunk[3])
print("also between updates:", step(compiled, resumed, shared=trunk[3]))
torch._dynamo.reset()
tell("flag off, but from the cache", torch.compile(trunk))
torch._dynamo.reset()
compiled = torch.compile(trunk, options={"fx_graph_cache": False})
sum(losses(compiled)).backward()
for options in ({}, {"filler": "backward"}, {"chunk_size": 1}, {"gramian_params": trunk[3]}):
    tell("flag off, no cache", compiled, **options)
method, same = (fastmtl.Amortized(fastmtl.MGDA(), update_every=2) for _ in range(2))
for _ in range(2):
    found, expected = step(compiled, method), step(trunk, same)
print("amortized:", all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(found, expected)))
tell("batched", compiled, chunk_size=2)
"""


def test_a_compiled_trunk_gives_an_error_or_a_right_answer(tmp_path: Path) -> None:
    """Never a wrong row: whatever was compiled when, and whatever comes from the cache on disk."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    found = [line.split(": ", 1) for line in done.stdout.splitlines()]
    cure = "compiled trunk: .*donated_buffer = False from the start.*fx_graph_cache.*FeatureSurgery"
    for name, text in found[:7]:
        assert re.match(cure, text), (name, text)
    assert found[7][0] == "flag off, no cache"
    assert [text for name, text in found if name == "flag off, no cache"] == ["right"] * 4
    assert ["amortized", "True"] in found
    assert (found[-1][0] == "batched" and found[-1][1] == "right") or found[-1][1].startswith("chunk_size=2")


def test_a_compiled_trunk_is_proven_once() -> None:
    """Three passes more in the first step, none later; and none while gradients are not finite."""
    trunk, heads = nn.Linear(5, 4).double(), nn.ModuleList(nn.Linear(4, 1).double() for _ in range(3))
    compiled = torch.compile(trunk, backend="aot_eager")
    passes: list[int] = []

    def step(x: Tensor) -> int:
        z = compiled(x)
        passes.clear()
        losses = [head(z).pow(2).mean() for head in heads]
        losses[0].register_hook(lambda g: passes.append(0))
        fastmtl.backward(losses, MGDA(), trunk)
        return len(passes)

    assert step(inputs() * float("inf")) == 3
    assert step(inputs()) == 3
    assert step(inputs()) == 1


def test_proving_leaves_the_heads_alone() -> None:
    trunk, heads = nn.Linear(5, 4).double(), nn.ModuleList(nn.Linear(4, 1).double() for _ in range(3))
    compiled = torch.compile(trunk, backend="aot_eager")
    z = compiled(inputs())
    losses = [head(z).pow(2).mean() for head in heads]
    expected = weighted_sum(task_gradients(losses, heads.parameters()), torch.ones(3))
    fastmtl.backward(losses, MGDA(), trunk, filler="backward")
    assert_grads(heads.parameters(), expected)


def test_out_of_memory_stays_what_it_is() -> None:
    def give_out(grad: Tensor) -> None:
        raise torch.OutOfMemoryError("no memory")

    model = nets.mlp()
    h = model.trunk[0](inputs())
    z = model.trunk[2](torch.tanh(h))
    h.register_hook(give_out)
    losses = [head(z).sum() for head in model.heads]
    with assert_untouched(model), pytest.raises(torch.OutOfMemoryError, match="no memory"):
        fastmtl.backward(losses, MGDA(), model.trunk, chunk_size=3)
