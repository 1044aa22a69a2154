"""How close are the Gramian and the combine to one plain read of the gradients, to the arithmetic's peak, and to MKL?

Ratios are to a plain vectorised read of the float32 gradients, one stream per thread; eight streams per thread show
what the memory gives. ``multiply-adds alone`` does as many as the Gramian has, T (T + 1) / 2 per column, on registers.
Small inputs are measured against the same kernel on one thread. The error is relative to the product of two rows'
norms (Gramian), or to the norm of the result (combine).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import fastmtl
from benchmarks import oracle
from benchmarks.harness import Report, check, main
from benchmarks.read_pass import PLAIN, multiply_adds, read_passes
from fastmtl import _extension
from fastmtl.rows import as_rows

SIZES = [(2, 10_000_000), (8, 4_000_000), (16, 2_000_000), (40, 1_000_000), (128, 300_000)]
SMALL = [(t, p) for t in (2, 8, 64) for p in (1_000, 10_000, 100_000)]
CAPABILITIES = ("avx512", "avx2")  # those that the CPU has
CALLS = 20  # per sample of a small input: changing the number of threads must not be what is measured

Providers = dict[str, Callable[[], Tensor]]


def run(report: Report) -> None:
    capabilities = tuple(c for c in CAPABILITIES if _runs(c))
    for size in SIZES:
        rows = torch.randn(size)
        _gram(report, rows, capabilities)
        for dtype in (torch.bfloat16, torch.float16):
            _narrow_gram(report, rows, dtype, capabilities)
        _combine(report, rows)
    for size in SMALL:
        rows = torch.randn(size)
        _small(report, "one matrix", rows, rows, lambda rows=rows: rows @ rows.T)  # type: ignore[misc]
    sizes = torch.randint(64, 4096, (200,)).tolist()
    params = [[torch.randn(n) for _ in range(8)] for n in sizes]
    by_task = list(zip(*params, strict=True))

    def concatenated() -> Tensor:
        rows = torch.stack([torch.cat(grads) for grads in by_task])
        return rows @ rows.T

    _small(report, "200 parameters", torch.cat([torch.stack(rows) for rows in params], 1), params, concatenated)


def _runs(capability: str) -> bool:
    """Whether this CPU has the instruction set, and fastmtl its kernels."""
    if _extension.module is None:
        return False
    before = _extension.module.build_info()["cpu_capability"]
    found = bool(_extension.module.set_cpu_capability(capability))
    _extension.module.set_cpu_capability(before)
    return found


def _forced(capability: str, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call on another instruction set."""

    def run() -> Tensor:
        assert _extension.module is not None
        before = _extension.module.build_info()["cpu_capability"]
        _extension.module.set_cpu_capability(capability)
        try:
            return call()
        finally:
            _extension.module.set_cpu_capability(before)

    return run


def _grams(rows: Tensor, capabilities: tuple[str, ...]) -> Providers:
    grams: Providers = {"fastmtl": lambda: fastmtl.ops.gram(rows)[0]}
    for other in capabilities[1:]:
        grams[f"fastmtl, {other}"] = _forced(other, grams["fastmtl"])
    return grams


def _gram(report: Report, rows: Tensor, capabilities: tuple[str, ...]) -> None:
    num_tasks, size = rows.shape
    reads, grams, floors = read_passes(rows), _grams(rows, capabilities), {}
    for capability in capabilities:
        floors.update(multiply_adds(num_tasks * (num_tasks + 1) // 2 * size, capability))
    expected = oracle.gramian(rows)
    errors = {name: check(name, oracle.gramian_error(f(), expected), 1e-6) for name, f in grams.items()}
    grams["torch G @ G.T"] = lambda: rows @ rows.T
    errors["torch G @ G.T"] = check("torch", oracle.gramian_error(rows @ rows.T, expected), 1e-2)
    samples = report.time({**reads, **floors, **grams})
    report.record("gram", "gram", (num_tasks, size), samples, _yardstick(reads), errors)
    for floor, capability in zip(floors, capabilities, strict=False):
        name = "fastmtl" if capability == capabilities[0] else f"fastmtl, {capability}"
        share = torch.tensor([a / b for a, b in zip(samples[floor], samples[name], strict=True)]).median()
        print(f"  {name}: {share:.0%} of the peak of {capability}")


def _narrow_gram(report: Report, rows: Tensor, dtype: torch.dtype, capabilities: tuple[str, ...]) -> None:
    """16-bit rows, in units of the read of as many float32."""
    reads, narrow = read_passes(rows), rows.to(dtype)
    grams, expected, yardstick = _grams(narrow, capabilities), oracle.gramian(narrow), _yardstick(reads)
    errors = {name: check(name, oracle.gramian_error(f(), expected), 1e-6) for name, f in grams.items()}
    name = str(dtype).removeprefix("torch.")
    shape = (len(rows), rows.shape[1])
    report.measure("gram", "gram", shape, {yardstick: reads[yardstick], **grams}, yardstick, errors, name)


def _combine(report: Report, rows: Tensor) -> None:
    reads = read_passes(rows)
    weights = torch.randn(len(rows), dtype=torch.float64)
    narrow, as_they_lie, grad = weights.float(), as_rows(rows), torch.zeros(rows.shape[1])

    def accumulate() -> Tensor:
        fastmtl.ops.combine_(as_they_lie, weights, [grad])
        return grad

    combines: Providers = {
        "fastmtl": lambda: fastmtl.ops.combine(rows, weights),
        "fastmtl, added to .grad": accumulate,
        "torch w @ G": lambda: narrow @ rows,
    }
    expected = oracle.combination(weights, rows)
    errors = {name: check(name, oracle.vector_error(f(), expected), 1e-5) for name, f in combines.items()}
    report.measure("combine", "combine", (len(rows), rows.shape[1]), {**reads, **combines}, _yardstick(reads), errors)


def _small(report: Report, method: str, matrix: Tensor, grads: Any, theirs: Callable[[], Tensor]) -> None:
    """The Gramian of few columns on all threads and on one."""
    rows, threads = as_rows(grads), torch.get_num_threads()
    calls: dict[str, Callable[[], Tensor]] = {"fastmtl": lambda: fastmtl.ops.gram(rows)[0], "torch G @ G.T": theirs}
    expected = oracle.gramian(matrix)
    errors = {name: check(name, oracle.gramian_error(f(), expected), 1e-4) for name, f in calls.items()}

    def repeated(call: Callable[[], Tensor], num_threads: int) -> Callable[[], None]:
        def run() -> None:
            torch.set_num_threads(num_threads)
            for _ in range(CALLS):
                call()
            torch.set_num_threads(threads)

        return run

    single = "fastmtl, 1 thread"
    providers = {name: repeated(call, threads) for name, call in calls.items()}
    providers[single] = repeated(calls["fastmtl"], 1)
    samples = {name: [t / CALLS for t in times] for name, times in report.time(providers).items()}
    report.record("small gram", method, (len(matrix), matrix.shape[1]), samples, single, errors)


def _yardstick(reads: Mapping[str, object]) -> str:
    return PLAIN if PLAIN in reads else "read: torch.sum"


if __name__ == "__main__":
    main(run, threads=2)
