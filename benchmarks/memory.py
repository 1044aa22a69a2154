"""How much memory does surgery need beyond a plain backward pass on the summed loss?

Multilayer perceptrons with T linear heads and a small batch, so that the shared parameters' gradients dominate. What a
sample counts is the growth of the process's peak resident memory during forward and backward, from no ``.grad`` on, in
float32 elements, less that of the plain step: the scratch memory of every library is in it, a tensor that is never
written is not. Freed memory goes back at once (`harness.main`), so that nothing hides in what an earlier step left.
Ratios are to ``T * P + P``: the rows and one combined gradient.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

import fastmtl
from benchmarks.harness import Report, main
from benchmarks.steps import Net

SHAPES = [(8, 1024), (40, 512)]  # T, width
DEPTH, BATCH = 4, 32
TORCHJD = [(None, False), (None, True), (1, True)]  # chunk, lean Gramian
FLOOR = "T * P + P"


def run(report: Report) -> None:
    if not Path("/proc/self/clear_refs").exists():
        print("memory: NOT MEASURED, needs Linux, where a process can reset its peak resident memory")
        return
    for num_tasks, width in SHAPES:
        _measure(report, Net(width, BATCH, num_tasks, DEPTH))


def _measure(report: Report, net: Net) -> None:
    num_tasks, method = len(net.heads), fastmtl.PCGrad()
    size = sum(p.numel() for p in net.trunk.parameters())
    last = list(net.trunk.parameters())[-2:]
    layer, kept = fastmtl.FeatureSurgery(method, num_tasks), fastmtl.TaskGradients(net.trunk, num_tasks)

    def separately() -> None:
        for t in range(num_tasks):
            kept.backward(t, net.loss(t))
        kept.combine(method)

    providers: dict[str, Callable[[], object]] = {
        "summed loss": lambda: torch.stack(net.losses()).sum().backward(),
        "fastmtl.backward": lambda: fastmtl.backward(net.losses(), method, net.trunk),
        "fastmtl.backward, gramian_params": lambda: fastmtl.backward(
            net.losses(), method, net.trunk, gramian_params=last
        ),
        "TaskGradients": separately,
        "FeatureSurgery": lambda: layer.total(net.losses(layer)).backward(),
    }
    providers |= net.torchjd_steps(TORCHJD)
    for call in providers.values():  # libraries load and set up what they keep
        net.clear()
        call()
    peaks: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(min(report.rounds, 3)):
        for name, call in providers.items():
            net.clear()
            gc.collect()
            peaks[name].append(_peak_growth(call) / 4)
    plain = median(peaks.pop("summed loss"))
    samples = {name: [peak - plain for peak in each] for name, each in peaks.items()}
    samples = {FLOOR: [float((num_tasks + 1) * size)] * len(next(iter(samples.values()))), **samples}
    report.record("memory", "PCGrad", (num_tasks, size), samples, FLOOR, unit="elements beyond a plain step")


def _peak_growth(call: Callable[[], object]) -> int:
    """By how many bytes the process's resident memory grows at most while it runs."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now the present
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


if __name__ == "__main__":
    main(run, threads=2, rounds=3, keep_memory=False)
