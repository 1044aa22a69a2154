"""Parameter level with sharded parameters (FSDP2, tensor parallelism): equal to one process on the whole batch."""

from __future__ import annotations

import itertools
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastmtl
from fastmtl.sharded import layouts
from tests.nets import Net
from tests.ranks import Ranks, processes
from tests.test_distributed import cases
from tests.test_distributed_rows import METHODS, SIX, place

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")

FEW = 6
SAMPLES = 16
COUNTS = {1: [16], 2: [5, 11], 4: [6, 0, 7, 3]}  # samples of each data rank: one has none


class Outputs(nn.Module):
    """From samples to some tasks' outputs."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, tasks: Sequence[int]) -> list[Tensor]:
        z = self.net.features(x)
        return [self.net.heads[t](z) for t in tasks]


def outputs(dtype: torch.dtype = torch.float64, norm: bool = False) -> Any:
    torch.manual_seed(5)
    last = nn.LayerNorm(6) if norm else nn.Tanh()
    return Outputs(Net(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), last), 6, 3).to(dtype))


def mesh_of(names: tuple[str, ...] = ("dp",)) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    size = dist.get_world_size()
    return init_device_mesh("cpu", (size,) if len(names) == 1 else (size // 2, 2), mesh_dim_names=names)


def fully(model: Any, mesh: Any, parts: str = "trunk heads root") -> None:
    from torch.distributed.fsdp import fully_shard

    each = {"trunk": [model.net.trunk], "heads": [*model.net.heads], "root": [model]}
    for part in itertools.chain(*(each[name] for name in parts.split())):
        fully_shard(part, mesh=mesh)


def parallel(model: Any, mesh: Any) -> None:
    """The trunk, and one head, whose bias is a copy on every rank."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    parallelize_module(model.net.trunk, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    parallelize_module(model.net.heads, mesh, {"0": RowwiseParallel(input_layouts=Replicate())})


def sequence_parallel(model: Any, mesh: Any) -> None:
    """A LayerNorm on slices: the gradients of its copied parameters are terms yet to be summed."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor import parallel as tp

    plan = {
        "0": tp.ColwiseParallel(),
        "2": tp.RowwiseParallel(output_layouts=Shard(0)),
        "3": tp.SequenceParallel(sequence_dim=0, use_local_output=False),
    }
    tp.parallelize_module(model.net.trunk, mesh, plan)
    out = tp.PrepareModuleOutput(output_layouts=Shard(0), desired_output_layouts=Replicate())
    tp.parallelize_module(model.net.trunk, mesh, out)


def fsdp_and_tp(model: Any) -> Any:
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # RowwiseParallel returns a view; nothing writes to it
    mesh = mesh_of(("dp", "tp"))
    parallel(model, mesh["tp"])
    fully(model, mesh["dp"])
    return mesh["dp"]


def dp_and_tp(model: Any) -> Any:
    mesh = mesh_of(("dp", "tp"))
    parallel(model, mesh["tp"])
    return mesh["dp"]


def wrapped(parts: str, names: tuple[str, ...] = ("dp",)) -> Callable[[Any], Any]:
    def wrap(model: Any) -> Any:
        fully(model, mesh_of(names), parts)

    return wrap


# Sharding a model; returns the mesh of the ranks that have different samples: None: all, "none": they have the same.
KINDS: dict[str, Callable[[Any], Any]] = {
    "FSDP2": wrapped("trunk heads root"),
    "HSDP": wrapped("trunk heads root", ("replicate", "shard")),
    "TP": lambda model: parallel(model, mesh_of()) or "none",
    "FSDP2+TP": fsdp_and_tp,
    "FSDP2, one unit": wrapped("root"),
    "FSDP2, plain heads": wrapped("trunk"),
    "FSDP2, plain trunk": wrapped("heads"),
    "TP, slices": lambda model: sequence_parallel(model, mesh_of()) or "none",
    "DP+TP": dp_and_tp,
}


def losses_of(model: Any, step: int, dtype: torch.dtype, data: Any, tasks: Sequence[int] = range(3)) -> list[Tensor]:
    """The local losses of this rank's samples of a step, whose labels are missing for some tasks."""
    rank, size = place()
    if data == "none":
        rank, size = 0, 1
    elif data is not None:
        rank, size = data.get_local_rank(), data.size()
    random = torch.Generator().manual_seed(100 + step)
    here = slice(sum(COUNTS[size][:rank]), sum(COUNTS[size][: rank + 1]))
    x = torch.randn(SAMPLES, 5, generator=random, dtype=torch.float64).to(dtype)[here]
    i, t = torch.arange(SAMPLES).unsqueeze(1), torch.arange(3)
    has = ((7 * i + t) % 3 > 0)[here]
    errors = [(z[has[:, t]] - (-1) ** t * (t + 1)) ** 2 for t, z in zip(tasks, model(x, tasks), strict=True)]
    return fastmtl.distributed.mean([e.sum() for e in errors], [len(e) for e in errors])


def whole(params: Any) -> list[Tensor]:
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for p in params]


def train(
    kind: str, name: str, dtype: torch.dtype = torch.float64, way: str = "backward", steps: int = 20, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and the method's state after some steps; each step's weights."""
    rank, size = place()
    model = outputs(dtype, norm=kind == "TP, slices")
    torch.manual_seed(rank)  # methods draw their seeds: the first rank's is to be used
    method = METHODS[name]()
    for p in method.parameters():
        p.data = p.data.to(dtype)
    data = KINDS[kind](model) if size > 1 else None
    trunk, heads = model.net.trunk, model.net.heads
    optimizer = torch.optim.SGD([*model.parameters(), *method.parameters()], lr=0.02)
    twice = options.pop("twice", False)  # calls per step
    if options.pop("lean", False):
        options["gramian_params"] = trunk[2]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if options.pop("scaler", False) else None
    if options.pop("data group", False) and data is not None:
        options["process_group"] = data.get_group()
    overflow = options.pop("overflow", False)
    weights = []
    for step in range(steps):
        for call in range(1 + twice):
            if way == "task_gradients":
                rows = fastmtl.TaskGradients(trunk, 3, heads=heads, scaler=scaler)
                for t in range(3):
                    rows.backward(t, losses_of(model, step + call, dtype, data, [t])[0])
                weights.append(rows.combine(method, **options).weights)
            else:
                losses = losses_of(model, step + call, dtype, data)
                if overflow and step % 5 == 2:
                    losses[2] = losses[2] * (float("inf") if rank == size - 1 or data == "none" else 1.0)
                shared = None if way == "discover" else trunk
                weights.append(fastmtl.backward(losses, method, shared, model=model, scaler=scaler, **options).weights)
        for p in model.parameters():
            if hasattr(p, "full_tensor") and p.grad is not None:
                assert (p.grad.placements, p.grad.device_mesh) == (p.placements, p.device_mesh)
                assert p.grad.shape == p.shape
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    return [*whole(model.parameters()), *whole(method.state_dict().values())], weights


def compare(ranks: Ranks, size: int, rtol: float, *args: Any, **options: Any) -> None:
    """The ranks equal one process on the whole batch, and each other bit for bit."""
    expected, weights = train(*args, **options)
    found = ranks.run(size, train, *args, **options)
    for other in found[1:]:
        for a, b in zip([*other[0], *other[1]], [*found[0][0], *found[0][1]], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    worst = 0.0
    for a, b in zip([*found[0][0], *found[0][1]], [*expected, *weights], strict=True):
        largest = float(b.double().nan_to_num().abs().max())
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * largest, equal_nan=True)
        worst = max(worst, float((a.double() - b.double()).nan_to_num().abs().max()) / max(largest, 1e-30))
    print(f"largest difference {worst:.1e}")
    assert not torch.equal(expected[0], whole(outputs().parameters())[0])


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with processes(4) as found:
        yield found


LAYOUTS = ["FSDP2 on 2", "FSDP2 on 4", "HSDP on 4", "TP on 2", "TP on 4", "FSDP2+TP on 4"]
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4}
QUICK = {
    ("FSDP2 on 2", "MGDA", "backward"),
    ("FSDP2 on 4", "UncertaintyWeighting", "backward"),
    ("HSDP on 4", "GradNorm", "task_gradients"),
    ("TP on 2", "PELTR", "task_gradients"),
    ("FSDP2+TP on 4", "PCGrad", "backward"),
}


@cases(
    lambda layout, method, way, dtype: (layout, method, way) in QUICK and dtype == torch.float64,
    layout=LAYOUTS,
    method=SIX,
    way=["backward", "task_gradients"],
    dtype=BOUNDS,
)
def test_equals_one_process(ranks: Ranks, layout: str, method: str, way: str, dtype: torch.dtype) -> None:
    kind, size = layout.split(" on ")
    compare(ranks, int(size), BOUNDS[dtype], kind, method, dtype, way)


@cases(
    lambda kind, method: kind == "TP, slices" or method == "GradNorm", kind=[*KINDS][4:], method=["PCGrad", "GradNorm"]
)
def test_mixed_layouts(ranks: Ranks, kind: str, method: str) -> None:
    compare(ranks, 4, 1e-9, kind, method, steps=FEW)
    compare(ranks, 4, 1e-9, kind, method, steps=FEW, way="task_gradients")


OPTIONS: list[dict[str, Any]] = [
    {"groups": "layer", "method": "GradVac"},
    {"groups": "tensor", "max_norm": 0.5},
    {"lean": True, "method": "GradNorm"},
    {"method": "Amortized"},
    {"method": "Amortized", "max_norm": 0.5},
    {"method": "DWA", "way": "discover"},
    {"way": "discover"},
    {"twice": True},
    {"method": "MGDA", "scaler": True},
    {"method": "GradNorm", "scaler": True, "way": "task_gradients"},
    {"overflow": True, "nonfinite": "drop_task"},
    {"overflow": True, "nonfinite": "drop_task", "lean": True},
    {"overflow": True, "nonfinite": "skip"},
    {"data group": True, "method": "GradNorm"},
    {"retain_graph": True},
]


@cases(
    lambda options, kind: kind == "FSDP2+TP" and options in OPTIONS[::4], options=OPTIONS, kind=["FSDP2", "FSDP2+TP"]
)
def test_options(ranks: Ranks, kind: str, options: dict[str, Any]) -> None:
    others = {key: value for key, value in options.items() if key != "method"}
    compare(ranks, 4, 1e-9, kind, options.get("method", "PCGrad"), steps=FEW, **others)


def test_narrow_rows(ranks: Ranks) -> None:
    compare(ranks, 4, 2e-2, "FSDP2+TP", "PCGrad", torch.float32, steps=FEW, row_dtype=torch.bfloat16)


class Traffic(TorchDispatchMode):
    """Numbers that each kind of call has as its largest tensor, and how many calls."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = func.__name__.split(".")[0].strip("_")
        if func.namespace in ("c10d", "_c10d_functional") and not kind.startswith(("wait", "wrap")):
            self.numbers[kind] += max(x.numel() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
            self.calls[kind] += 1
        return func(*args, **(kwargs or {}))


def traffic(kind: str, plain: bool = False) -> tuple[Counter[str], Counter[str]]:
    """Of the second step, without its forward pass; ``plain``: of nothing but each task's backward pass."""
    model = outputs(norm=kind == "TP, slices")
    data = KINDS[kind](model)
    method = fastmtl.MGDA()
    for step in range(2):
        losses = losses_of(model, step, torch.float64, data)
        with Traffic() as seen:
            if plain:
                for x in losses:
                    x.backward(retain_graph=True)
            else:
                fastmtl.backward(losses, method, model.net.trunk, model=model)
    return seen.numbers, seen.calls


def padded(params: Any, parts: int) -> int:
    """Numbers of parameters whose first dimension is padded to a multiple of the parts."""
    return sum(-(-p.shape[0] // parts) * parts * p[0].numel() for p in params)


def test_numbers_moved_by_fsdp(ranks: Ranks) -> None:
    model = outputs()
    ours = {"allgather_base": 4 * 4, "allreduce": 2 * 3 + 3 * 3}  # handshake; presence and losses, the Gramian
    trunk, heads = padded(model.net.trunk.parameters(), 4), padded(model.net.heads.parameters(), 4)
    for numbers, calls in ranks.run(4, traffic, "FSDP2"):
        # every task's gradient of the trunk is reduce-scattered by FSDP; the parameters are gathered once, no gradient
        assert numbers["reduce_scatter_base"] == 3 * trunk + heads
        assert numbers["allgather_base"] == ours["allgather_base"] + trunk + heads
        assert numbers["allreduce"] == ours["allreduce"]
        assert calls == {"reduce_scatter_base": 3 + 3, "allgather_base": 1 + 1 + 3, "allreduce": 2}


def test_numbers_moved_by_tensor_parallelism(ranks: Ranks) -> None:
    heads = 4 + 2 * 7  # those that are not parallel: reached, and their gradients
    for kind, partial in {"TP": 0, "TP, slices": 3 * (6 + 6)}.items():
        plain = ranks.run(4, traffic, kind, plain=True)
        for (numbers, _), (others, _) in zip(ranks.run(4, traffic, kind), plain, strict=True):
            more = Counter(numbers)
            more.subtract(others)
            assert {call: n for call, n in more.items() if n} == {
                "allgather_base": 4 * 4,
                "allreduce": 2 * 3 + 3 * 3 + (heads if kind == "TP" else 6 + 3 * 7),
                **({"all_reduce": partial} if partial else {}),
            }


def accumulated(synchronised: bool) -> list[Tensor]:
    """The gradients of steps on two micro-batches per task; without synchronisation in each but the last."""
    model = outputs()
    if dist.is_initialized():
        fully(model, mesh_of())
    rows = fastmtl.TaskGradients(model.net.trunk, 3, heads=model.net.heads)
    for t in range(3):
        for step in range(2):
            if not synchronised and dist.is_initialized():
                model.set_requires_gradient_sync(step == 1)
            rows.backward(t, losses_of(model, step, torch.float64, None, [t])[0])
    rows.combine(fastmtl.MGDA())
    return whole(p.grad for p in model.parameters())


@pytest.mark.parametrize("synchronised", [True, False])
def test_accumulation(ranks: Ranks, synchronised: bool) -> None:
    for found in ranks.run(2, accumulated, synchronised):
        torch.testing.assert_close(found, accumulated(synchronised), rtol=1e-9, atol=1e-12)


def left_out() -> tuple[bool, bool, int]:
    """After a step: whether a parameter that no task reaches has a gradient, whether the next forward pass sees changed
    parameters, and in how many modules FSDP keeps them for it."""
    model = outputs()
    model.net.unused = nn.Linear(2, 2).double()
    fully(model, mesh_of())
    model.net.heads[1].set_reshard_after_backward(False)
    losses = losses_of(model, 0, torch.float64, None)
    fastmtl.backward(losses, fastmtl.MGDA(), model.net.trunk, model=model)
    modules = [m for m in model.modules() if hasattr(m, "set_reshard_after_backward")]
    settings = [m._get_fsdp_state()._fsdp_param_group for m in modules]
    kept = [group.reshard_after_backward for group in settings if group is not None]
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    seen = not any(z.any() for z in model(torch.ones(1, 5, dtype=torch.float64), [0, 2]))
    return model.net.unused.weight.grad is not None, seen, kept.count(False)


def test_what_a_step_leaves_alone(ranks: Ranks) -> None:
    for found in ranks.run(2, left_out):
        assert found == (False, True, 1)


def raised(what: str) -> tuple[str, str, float, bool]:
    """Kind and text of the error, seconds, and whether no gradient was touched."""
    rank, size = place()
    last = rank == size - 1
    model = outputs()
    tensor_parallel = what in ("group", "loss")
    data = dp_and_tp(model) if tensor_parallel else fully(model, mesh_of())
    torch.manual_seed(rank)  # the first rank's seed is not to be taken over either
    method: Any = fastmtl.GradVac(beta=0.5 if what == "method" and last else 0.25)
    losses: Any = losses_of(model, 0, torch.float64, data)
    options: dict[str, Any] = {"model": model}
    shared = model.net.trunk
    if what == "task" and last:
        losses[1] = None
    if what == "max_norm":
        options["max_norm"] = 1.0 + rank
    if what == "parameters" and last:
        shared = model.net.trunk[0]
    if what == "model":
        options = {}
    if what in ("chunk_size", "filler"):
        options[what] = {"chunk_size": 2, "filler": "grad"}[what]
    if what == "group":
        options["process_group"] = data.get_group()
    if what == "loss":
        from torch.distributed.tensor import Replicate, distribute_tensor

        mesh = model.net.trunk[0].weight.device_mesh
        one = torch.ones((), dtype=torch.float64, requires_grad=True)
        losses[0] = distribute_tensor(one, mesh, [Replicate()])
    if what == "accumulation":
        model.set_requires_gradient_sync(False)
    before = [x.clone() for x in method.state_dict().values()]
    start = time.monotonic()
    try:
        if what.startswith("rows"):
            model.set_requires_gradient_sync(what == "rows: tasks")
            rows = fastmtl.TaskGradients(shared, 3)
            for t in range(2 if what == "rows: next" else 1):
                rows.backward(t, losses[t], retain_graph=True)
            if what == "rows: tasks" and last:
                rows._rows[1], rows._rows[0] = rows._rows[0], None
            rows.combine(fastmtl.PCGrad())
        else:
            fastmtl.backward(losses, method, shared, **options)
    except (RuntimeError, ValueError, TypeError) as error:
        clean = all(map(torch.equal, before, method.state_dict().values()))
        clean = clean and all(p.grad is None for p in model.net.trunk.parameters())
        return type(error).__name__, str(error), time.monotonic() - start, clean
    return "nothing", "", 0.0, False


@pytest.mark.parametrize(
    ("what", "kind", "words"),
    [
        ("task", "RuntimeError", ["rank 3", "tasks with a loss", "sum over no sample", "task 2, where", "has task 1"]),
        ("method", "RuntimeError", ["rank 3", "'beta': 0.5", "'beta': 0.25"]),
        ("max_norm", "RuntimeError", ["rank 1", "max_norm=2.0", "max_norm=1.0"]),
        (
            "parameters",
            "RuntimeError",
            ["rank 3", "shared_params", "none, where rank 0 has", "net.trunk.2.weight [6, 8]", "Shard"],
        ),
        ("rows: tasks", "RuntimeError", ["rank 3", "tasks with a loss", "task 1, where", "task 0"]),
        ("rows: next", "RuntimeError", ["task 0", "set_requires_gradient_sync"]),
        ("rows: end", "RuntimeError", ["task 0", "set_requires_gradient_sync"]),
        ("accumulation", "ValueError", ["set_requires_gradient_sync(False)", "TaskGradients"]),
        ("model", "ValueError", ["model:", "sharded"]),
        ("chunk_size", "ValueError", ["chunk_size=2", "FSDP2", "chunk_size=None"]),
        ("filler", "ValueError", ["filler='grad'", "sharded", "'auto'"]),
        ("group", "ValueError", ["process_group", "'auto'"]),
        ("loss", "TypeError", ["task 0", "full_tensor()"]),
    ],
)
def test_every_rank_is_told(ranks: Ranks, what: str, kind: str, words: list[str]) -> None:
    for name, text, seconds, clean in ranks.run(4, raised, what):
        assert name == kind, text
        assert all(word in text for word in words), text
        assert seconds < 20
        assert clean


def test_every_rank_counts_the_same_layouts() -> None:
    """Split along the one or the other dimension of a mesh, the first rank has the same place."""
    from types import SimpleNamespace

    from torch.distributed.tensor import Replicate, Shard

    both = [Shard(0), Replicate()], [Replicate(), Shard(0)]
    for at in itertools.product(range(2), range(2)):
        mesh = SimpleNamespace(shape=(2, 2), mesh=torch.arange(4).view(2, 2), get_coordinate=lambda at=at: list(at))
        params: Any = [SimpleNamespace(full_tensor=None, device_mesh=mesh, placements=p) for p in both]
        assert len(set(layouts(params))) == 2
