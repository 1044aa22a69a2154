"""Do ranks that share a batch end where one process ends, and what do they send? fastmtl and TorchJD 0.18, on gloo.

A small net is trained for 20 SGD steps by 1, 2 and 4 processes, each with its part of every batch. Nothing is timed:

What is recorded: how far the ranks' parameters are from each other (0: equal to the bit), and how far the first rank's
are from those of one process with the same library and the whole batches, both relative to the largest entry of each
parameter; and the bytes that a rank hands to collectives in one step, by call (of input and output the larger one),
next to the formulas of docs/distributed.md. What goes over a wire depends on the backend.

TorchJD has nothing for process groups. "TorchJD" is its use in one process, as its documentation shows it, with the
model wrapped in DistributedDataParallel; its passes do not fire DDP's hooks, so nothing is averaged. Two repairs that
users can make by hand are there too: averaging ``.grad`` over the ranks afterwards, as DDP does, or each ``.jac``
before it is aggregated. All ranks have the same seed, so they draw the same random orders.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastmtl
from benchmarks.harness import RESULTS, check, version
from benchmarks.peers import autojac, torchjd

TASKS, WIDTHS, BATCH, STEPS = 4, (12, 32, 24), 24, 20
SIZES = (1, 2, 4)
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4}

METHODS: dict[str, Callable[..., Any]] = {
    "PCGrad": fastmtl.PCGrad,
    "GradVac": fastmtl.GradVac,
    "MGDA": fastmtl.MGDA,
    "PELTR": lambda **options: fastmtl.PELTR([0.1] * TASKS, **options),
    "GradNorm": fastmtl.GradNorm,
    "UncertaintyWeighting": lambda **_: fastmtl.UncertaintyWeighting(TASKS),
}
SCALING = ("PELTR", "GradNorm")  # the heads, unless told otherwise, which a layer cannot do
PEERS = ("PCGrad", "MGDA", "UPGrad")


class Net(nn.Module):
    """Trunk and heads, with surgery between them or not.

    It returns the total loss, or the features and the losses.
    """

    def __init__(self, method: Any = None) -> None:
        super().__init__()
        d, hidden, width = WIDTHS
        self.trunk = nn.Sequential(nn.Linear(d, hidden), nn.Tanh(), nn.Linear(hidden, width), nn.Tanh())
        self.surgery = None if method is None else fastmtl.FeatureSurgery(method, TASKS)
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(TASKS))

    def forward(self, x: Tensor, y: Tensor) -> Any:
        """Of this rank's samples."""
        z = self.trunk(x)
        zs = [z] * TASKS if self.surgery is None else self.surgery(z)
        losses = [
            ((head(z)[:, 0] - y[:, t]) ** 2).mean() for t, (head, z) in enumerate(zip(self.heads, zs, strict=True))
        ]
        return (z, losses) if self.surgery is None else self.surgery.total(losses)


def batches(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """All steps' inputs and targets; tasks pull in different directions with different force."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, BATCH, WIDTHS[0], generator=random, dtype=torch.float64)
    noise = torch.randn(STEPS, BATCH, TASKS, generator=random, dtype=torch.float64)
    y = torch.tensor([1.0, -2.0, 3.0, -0.5], dtype=torch.float64) * (1 + x[..., :TASKS] + 0.3 * noise)
    return [(a.to(dtype), b.to(dtype)) for a, b in zip(x, y, strict=True)]


# ---- ways in ---------------------------------------------------------------------------------------------------------

Step = Callable[[Tensor, Tensor], object]
"""From this rank's samples to ``.grad``."""


def summed(model: nn.Module, net: Net, method: Any) -> Step:
    return lambda x, y: torch.stack(model(x, y)[1]).sum().backward()


def layer(model: nn.Module, net: Net, method: Any) -> Step:
    return lambda x, y: model(x, y).backward()


def backward(model: nn.Module, net: Net, method: Any) -> Step:
    return lambda x, y: fastmtl.backward(model(x, y)[1], method, net.trunk, model=model)


def peer(repair: str = "") -> Callable[[nn.Module, Net, Any], Step]:
    """TorchJD; ``repair``: what is averaged over the ranks by hand."""

    def make(model: nn.Module, net: Net, aggregator: Any) -> Step:
        assert autojac is not None
        mtl_backward, jac_to_grad = autojac.mtl_backward, autojac.jac_to_grad
        shared = [*net.trunk.parameters()]
        heads = [[*head.parameters()] for head in net.heads]

        def average(tensors: Iterable[Tensor | None]) -> None:
            for x in tensors:
                if x is not None and dist.is_initialized():
                    dist.all_reduce(x)
                    x /= dist.get_world_size()

        def step(x: Tensor, y: Tensor) -> None:
            features, losses = model(x, y)
            mtl_backward(losses, features=features, tasks_params=heads, shared_params=shared)
            if repair == ".jac":
                average(p.jac for p in shared)  # type: ignore[attr-defined]
                average(p.grad for head in heads for p in head)
            jac_to_grad(shared, aggregator)
            if repair == ".grad":
                average(p.grad for p in net.parameters())

        return step

    return make


WAYS: dict[str, tuple[Callable[[nn.Module, Net, Any], Step], str]] = {
    "summed loss, DDP": (summed, "DDP"),
    "summed loss, FSDP2": (summed, "FSDP2"),
    "FeatureSurgery, DDP": (layer, "DDP"),
    "FeatureSurgery, FSDP2": (layer, "FSDP2"),
    "fastmtl.backward, DDP": (backward, "DDP"),
    "fastmtl.backward, FSDP2": (backward, "FSDP2"),
    "TorchJD": (peer(), "DDP"),
    "TorchJD, .grad averaged": (peer(".grad"), "DDP"),
    "TorchJD, .jac averaged": (peer(".jac"), "DDP"),
}
Case = tuple[str, str, torch.dtype]
"""Way, method, dtype."""
Outcome = tuple[list[Tensor], int]
"""Parameters after the last step, and the bytes that it sent."""


def cases() -> list[Case]:
    """All that is to be trained."""
    found = []
    for way in WAYS:
        if way.startswith("TorchJD"):
            names: Sequence[str] = PEERS if torchjd is not None else ()
        else:
            names = ["sum"] if way.startswith("summed") else [*METHODS]
        found += [*itertools.product([way], names, BOUNDS)]
    return found


def train(case: Case) -> Outcome:
    """On this rank's part of the batches; without a process group on all of them."""
    way, name, dtype = case
    make_step, wrap = WAYS[way]
    torch.manual_seed(0)
    method: Any = None
    if way.startswith("TorchJD"):
        method = getattr(torchjd, name)()
    elif name != "sum":
        method = _without_heads(name)
        for p in method.parameters():  # float32 whatever the model is cast to
            p.data = p.data.to(dtype)
    net = Net(method if make_step is layer else None).to(dtype)
    model: nn.Module = net
    rank, size = 0, 1
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
        model = DistributedDataParallel(net) if wrap == "DDP" else _sharded(net)
    params = [*net.parameters()]
    if make_step is backward:
        params += method.parameters()
    optimizer = torch.optim.SGD(params, lr=0.02)
    step = make_step(model, net, method)
    for x, y in batches(dtype):
        optimizer.zero_grad()
        with Sent() as sent:
            step(x.tensor_split(size)[rank], y.tensor_split(size)[rank])
        optimizer.step()
    return [_whole(p.detach()) for p in params], sent.bytes


def _without_heads(name: str) -> Any:
    return METHODS[name](**({"scale_heads": False} if name in SCALING else {}))


def _sharded(net: Net) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (net.trunk, *net.heads, net):
        fully_shard(part, mesh=mesh)
    return net


def _whole(param: Tensor) -> Tensor:
    return param.full_tensor() if hasattr(param, "full_tensor") else param  # type: ignore[no-any-return]


class Sent(TorchDispatchMode):
    """Counts what collectives within are called with.

    Attributes:
        calls: Bytes by kind of call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    @property
    def bytes(self) -> int:
        """All."""
        return sum(self.calls.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sizes = [sum(x.nbytes for x in tree_leaves(arg) if isinstance(x, Tensor)) for arg in args]
            self.calls[func.__name__] += max(sizes, default=0)
        return func(*args, **(kwargs or {}))


# ---- what becomes of it ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the results, of W processes.

    Attributes:
        between: The largest difference between two ranks.
        apart: The largest difference between the first rank and one process.
        bytes: In one step.
        formula: What docs/distributed.md expects; None: it says nothing of this way.
    """

    way: str
    method: str
    dtype: str
    W: int
    between: float
    apart: float
    bytes: int
    formula: int | None
    commit: str
    date: str


def formula(case: Case, size: int, plain: int) -> int:
    """What docs/distributed.md expects a rank to hand to collectives in one step.

    Args:
        case: See above.
        size: W > 1.
        plain: The bytes of the step on the summed loss with the same wrapper.
    """
    way, name, dtype = case
    method = METHODS[name]() if name in METHODS else None
    net = Net()
    shared, heads = [*net.trunk.parameters()], [*net.heads.parameters()]
    p, h = _count(shared), _count(heads)
    b, t, weighting = dtype.itemsize, TASKS, isinstance(method, fastmtl.LossWeighting)
    if method is None or way == "TorchJD, .grad averaged":
        return {"TorchJD": 0, "TorchJD, .jac averaged": b * (t * p + h)}.get(way, plain)
    if way.startswith("FeatureSurgery"):
        surgery = 16 * t if weighting else 8 * (t * t + t + t * method.needs_losses)
        if way.endswith("DDP"):  # which sends buffers in every step: the first rank's
            surgery += sum(x.nbytes for x in Net(_without_heads(name)).buffers())
        learned = b * _count(method.parameters())  # FSDP2 gathers them and scatters their gradients
        return plain + surgery + (learned if way.endswith("DDP") else 2 * learned)
    same = 8 * 4 * size + 16 * t  # the handshake; presence and losses
    if way.endswith("FSDP2"):  # which reduces the trunk's gradients once in the plain step, here for each task
        return plain + same + (0 if weighting else b * (t - 1) * p + 8 * t * t)
    reached = len(heads) + len(shared) * (1 if weighting else t)
    if weighting:
        return b * (p + h) + same + reached
    padded = -(-p // size) * size
    return b * (t * padded + padded + h) + 8 * t * t + same + reached


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest, relative to the largest entry of each tensor."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


def run() -> list[Row]:
    """Train everything, by one process and by several, and compare.

    Raises:
        AssertionError: fastmtl's ranks are not equal to the bit, or too far from one process, or its bytes are not as
            expected.
    """
    torch.set_num_threads(1)
    alone = {case: train(case)[0] for case in cases()}
    rows = []
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            spawn(_serve, (size, folder), nprocs=size)
            ranks: list[dict[Case, Outcome]] = [torch.load(f"{folder}/{rank}.pt") for rank in range(size)]
        for case, expected in alone.items():
            way, name, dtype = case
            params, sent = ranks[0][case]
            between = max(difference(other[case][0], params) for other in ranks)
            apart = difference(params, expected)
            plain = ranks[0][f"summed loss, {WAYS[way][1]}", "sum", dtype][1]
            expects = formula(case, size, plain) if size > 1 else None
            label = f"{way}, {name}, {dtype}, {size} processes"
            if not way.startswith("TorchJD"):
                check(f"{label}: ranks", between, 0.0)
                check(f"{label}: one process", apart, BOUNDS[dtype])
                if expects is not None:
                    check(f"{label}: {sent} bytes, expected {expects}", abs(sent - expects), 0)
            rows.append(Row(way, name, str(dtype)[6:], size, between, apart, sent, expects, *version()))
    return rows


def _serve(rank: int, size: int, folder: str) -> None:
    """Be one of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    torch.save({case: train(case) for case in cases()}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def show(rows: Sequence[Row]) -> None:
    """Print a table in markdown: the worst of fastmtl's methods, each of TorchJD's."""
    print("| way | method | W | ranks differ by | from one process: float64 | float32 | bytes (float64) |")
    print("|---|---|---|---|---|---|---|")
    lines: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        if row.W > 1 and row.method != "sum":
            method = row.method if row.way.startswith("TorchJD") else f"worst of {len(METHODS)}"
            lines.setdefault((row.way, method, row.W), []).append(row)
    for (way, method, size), some in lines.items():
        between = max(row.between for row in some)
        wide, narrow = ([row for row in some if row.dtype == dtype] for dtype in ("float64", "float32"))
        sent = f"{min(row.bytes for row in wide):,} to {max(row.bytes for row in wide):,}"
        apart = " | ".join(f"{max(row.apart for row in each):.1e}" for each in (wide, narrow))
        same = "0" if between == 0 else f"{between:.1e}"
        print(f"| {way} | {method} | {size} | {same} | {apart} | {sent.split(' to ')[0] if len(wide) == 1 else sent} |")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Ranks against one process, and what they send.")
    parser.add_argument("--csv", type=Path, default=RESULTS / "distributed.csv")
    path = parser.parse_args().csv
    rows = run()
    show(rows)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in dataclasses.fields(Row))
        writer.writerows([f"{v:.2g}" if isinstance(v, float) else v for v in vars(row).values()] for row in rows)


def _count(params: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in params)


if __name__ == "__main__":
    main()
