"""How much memory does surgery need beyond a plain backward pass on the summed loss?

Multilayer perceptrons with T linear heads and a small batch, so that the shared parameters' gradients dominate. What a
sample counts is the growth of the process's peak resident memory during forward and backward, from no ``.grad`` on, in
float32 elements, less that of the plain step: the scratch memory of every library is in it, a tensor that is never
written is not. Freed memory goes back at once (`harness.main`), so that nothing hides in what an earlier step left.
Ratios are to ``T * P + P``: the rows and one combined gradient. Between its updates, ``Amortized`` is measured.

Two tables more: heads of two layers on a larger batch, whose activations take twice the memory of the rows; and, with
``--large``, a trunk of 1e8 parameters, where each sample is taken in a process of its own and what does not fit into
the machine's free memory is left out.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from torch import nn

import fastmtl
from benchmarks.harness import Report, allocate, main
from benchmarks.steps import Net, mlp

SHAPES = [(8, 1024), (40, 512)]  # T, width
DEPTH, BATCH = 4, 32
HEAVY_TRUNK, HEAVY_HEAD, HEAVY_BATCH = 256, 1024, 256  # widths, samples
LARGE_TASKS, LARGE_WIDTH, LARGE_DEPTH, LARGE_BATCH = (8, 40), 4096, 6, 8
TORCHJD = [(None, False), (None, True), (1, True)]  # chunk, lean Gramian
PLAIN, FLOOR, UNIT = "summed loss", "T * P + P", "elements beyond a plain step"
SPARE = 2  # GiB that a large trunk leaves to the rest of the machine


def run(report: Report) -> None:
    if not Path("/proc/self/clear_refs").exists():
        print("memory: NOT MEASURED, needs Linux, where a process can reset its peak resident memory")
        return
    for num_tasks, width in SHAPES:
        _measure(report, "memory", Net(mlp(width, DEPTH), torch.randn(BATCH, width), num_tasks))
    for num_tasks, _ in SHAPES:
        inputs = torch.randn(HEAVY_BATCH, HEAVY_TRUNK)
        net = Net(mlp(HEAVY_TRUNK, DEPTH), inputs, num_tasks, _heavy_head)
        _measure(report, "memory, heavy heads", net, peers=False)


def _heavy_head(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, HEAVY_HEAD), nn.GELU(), nn.Linear(HEAVY_HEAD, 1))


def _ways(net: Net, peers: bool = True) -> dict[str, Callable[[], object]]:
    """Forward and backward each way in, the plain one first."""
    num_tasks, method = len(net.heads), fastmtl.PCGrad()
    last = list(net.trunk.parameters())[-2:]
    layer, kept = fastmtl.FeatureSurgery(method, num_tasks), fastmtl.TaskGradients(net.trunk, num_tasks)
    between = fastmtl.Amortized(fastmtl.PCGrad(), update_every=10**9)
    between(torch.eye(num_tasks))

    def separately() -> None:
        for t in range(num_tasks):
            kept.backward(t, net.loss(t))
        kept.combine(method)

    def exact(method: fastmtl.GradientMethod = method, **options: object) -> Callable[[], object]:
        return lambda: fastmtl.backward(net.losses(), method, net.trunk, **options)  # type: ignore[arg-type]

    return {
        PLAIN: lambda: torch.stack(net.losses()).sum().backward(),
        "fastmtl.backward": exact(),
        "fastmtl.backward, chunk_size=1": exact(chunk_size=1),
        "fastmtl.backward, row_dtype=bfloat16": exact(row_dtype=torch.bfloat16),
        "fastmtl.backward, both": exact(chunk_size=1, row_dtype=torch.bfloat16),
        "fastmtl.backward, gramian_params": exact(gramian_params=last),
        "Amortized, between updates": exact(between),
        "TaskGradients": separately,
        "FeatureSurgery": lambda: layer.total(net.losses(layer)).backward(),
        **net.torchjd_steps(TORCHJD if peers else ()),
    }


def _measure(report: Report, question: str, net: Net, peers: bool = True) -> None:
    ways = _ways(net, peers)
    for call in ways.values():  # libraries load and set up what they keep
        net.clear()
        call()
    peaks: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(min(report.rounds, 2)):
        for name, call in ways.items():
            peaks[name].append(_peak(net, call))
    _record(report, question, len(net.heads), _size(net), peaks)


def _record(report: Report, question: str, num_tasks: int, size: int, peaks: dict[str, list[float]]) -> None:
    plain = median(peaks.pop(PLAIN))
    samples = {name: [peak - plain for peak in each] for name, each in peaks.items()}
    samples = {FLOOR: [float((num_tasks + 1) * size)] * len(next(iter(samples.values()))), **samples}
    report.record(question, "PCGrad", (num_tasks, size), samples, FLOOR, unit=UNIT)


def _size(net: Net) -> int:
    return sum(p.numel() for p in net.trunk.parameters())


def _peak(net: Net, call: Callable[[], object]) -> float:
    """From no ``.grad`` on, in float32 elements."""
    net.clear()
    gc.collect()
    return peak_growth(call) / 4


def peak_growth(call: Callable[[], object]) -> int:
    """By how many bytes the process's resident memory grows at most while it runs."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now the present
    before = _field("/proc/self/status", "VmRSS")
    call()
    return _field("/proc/self/status", "VmHWM") - before


def _field(path: str, name: str) -> int:
    """A line of a file of ``/proc`` that gives kB, in bytes."""
    return next(int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.startswith(name)) * 1024


def run_large(report: Report) -> None:
    """A trunk of 1e8 parameters."""
    for num_tasks in LARGE_TASKS:
        net = _large(num_tasks)
        size, names = _size(net), [*_ways(net)]
        del net
        peaks: dict[str, list[float]] = {}
        for name in names:
            needed, free = _copies(name, num_tasks) * size * 4, _field("/proc/meminfo", "MemAvailable")
            if needed + SPARE * 2**30 > free:
                told = f"about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
                print(f"memory, large trunk, T = {num_tasks}: {name} LEFT OUT, it needs {told}", flush=True)
                continue
            peaks[name] = [_in_new_process(_large_peak, num_tasks, name, report.threads)]
        if len(peaks) > 1:
            _record(report, "memory, large trunk", num_tasks, size, peaks)


def _in_new_process(call: Callable[..., float], *args: object) -> float:
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(call, *args).result()


def _large(num_tasks: int) -> Net:
    return Net(mlp(LARGE_WIDTH, LARGE_DEPTH), torch.randn(LARGE_BATCH, LARGE_WIDTH), num_tasks)


def _copies(name: str, num_tasks: int) -> float:
    """About how many copies of the shared parameters the process needs in all, themselves included."""
    if "TorchJD" in name:
        return 2 * num_tasks + 2
    if "gramian_params" in name or name in (PLAIN, "Amortized, between updates", "FeatureSurgery"):
        return 4
    rows = num_tasks / 2 if "bfloat16" in name or "both" in name else num_tasks
    return rows + 3


def _large_peak(num_tasks: int, name: str, threads: int) -> float:
    torch.set_num_threads(threads)
    allocate(keep=False)
    small = Net(mlp(8, 1), torch.randn(2, 8), num_tasks)
    _ways(small)[name]()  # libraries load
    net = _large(num_tasks)
    return _peak(net, _ways(net)[name])


if __name__ == "__main__":
    main(run, threads=1, rounds=2, keep_memory=False, large=run_large)
