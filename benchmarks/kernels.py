"""How close are the Gramian and the combine to one plain read of the gradients, and to MKL?

Ratios are to a plain vectorised read, one stream per thread; eight streams per thread show what the memory gives. The
error is relative to the product of two rows' norms (Gramian), or to the norm of the result (combine).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import fastmtl
from benchmarks import oracle
from benchmarks.harness import Report, check, main
from benchmarks.read_pass import PLAIN, read_passes
from fastmtl.rows import as_rows

SIZES = [(2, 10_000_000), (8, 4_000_000), (16, 2_000_000), (40, 1_000_000), (128, 300_000)]
BOUND = {"fastmtl": 1e-6, "fastmtl, added to .grad": 1e-6, "torch G @ G.T": 1e-2, "torch w @ G": 1e-5}

Providers = dict[str, Callable[[], Tensor]]


def run(report: Report) -> None:
    for size in SIZES:
        rows = torch.randn(size)
        _gram(report, rows)
        _combine(report, rows)


def _gram(report: Report, rows: Tensor) -> None:
    reads = read_passes(rows)
    grams: Providers = {"fastmtl": lambda: fastmtl.ops.gram(rows)[0], "torch G @ G.T": lambda: rows @ rows.T}
    expected = oracle.gramian(rows)
    errors = {name: check(name, oracle.gramian_error(f(), expected), BOUND[name]) for name, f in grams.items()}
    report.measure("gram", "gram", (len(rows), rows.shape[1]), {**reads, **grams}, _yardstick(reads), errors)


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
    errors = {name: check(name, oracle.vector_error(f(), expected), BOUND[name]) for name, f in combines.items()}
    report.measure("combine", "combine", (len(rows), rows.shape[1]), {**reads, **combines}, _yardstick(reads), errors)


def _yardstick(reads: Mapping[str, object]) -> str:
    return PLAIN if PLAIN in reads else "read: torch.sum"


if __name__ == "__main__":
    main(run, threads=2)
