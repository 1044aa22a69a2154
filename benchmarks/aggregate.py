"""How much faster is surgery on ready gradients than TorchJD 0.18, and than the popular loop over pairs of tasks?

All get the same ``[T, P]`` matrix of random gradients (about half of the pairs conflict). Ratios are to fastmtl. The
error is that of the combined gradient, relative to its norm, with the same visiting orders in fp64; for MGDA it is the
duality gap over the smallest squared gradient norm, which TorchJD's default of 100 Frank-Wolfe steps leaves large.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastmtl
from benchmarks import oracle
from benchmarks.harness import Report, check, main
from benchmarks.peers import lean_pair_loop, pair_loop, port_pair_loop, seeded_orders, torchjd
from benchmarks.read_pass import read_passes

SIZES = [(8, 4_000_000), (40, 1_000_000), (128, 300_000)]
METHODS = ("PCGrad", "GradVac", "MGDA")
ELEMENTWISE: dict[str, dict[str, Any]] = {"GradDrop": {}, "TrimmedMean": {"trim": 1}}
LOOPED = (8, 40)  # numbers of tasks for which the loops over pairs, T^2 passes each, are bearable
BETA = 0.01  # of GradVac


def run(report: Report) -> None:
    for size in SIZES:
        rows = torch.randn(size)
        gramian = oracle.gramian(rows)
        for name in METHODS:
            _measure(report, name, rows, gramian)
        for name, options in ELEMENTWISE.items():
            _measure_elementwise(report, name, options, rows)


def _measure(report: Report, name: str, rows: Tensor, gramian: Tensor) -> None:
    num_tasks = len(rows)
    options = {"beta": BETA} if name == "GradVac" else {}
    method = getattr(fastmtl, name)(**options)
    providers: dict[str, Callable[[], Any]] = {"fastmtl": lambda: fastmtl.aggregate(rows, method).grads}
    if torchjd is not None:
        theirs = getattr(torchjd, name)(**options)
        providers["TorchJD"] = lambda: theirs(rows)
    errors = {}
    if name == "MGDA":
        errors["fastmtl"] = check(name, oracle.duality_gap(gramian, fastmtl.aggregate(rows, method).weights), 1e-5)
        if torchjd is not None:
            errors["TorchJD"] = oracle.duality_gap(gramian, theirs.weighting(rows))
    else:
        if name == "PCGrad" and num_tasks in LOOPED:
            flat = list(rows.unbind(0))
            providers["loop over pairs, lean"] = lambda: lean_pair_loop(flat)
            providers["loop over pairs"] = lambda: pair_loop(flat)
            providers["loop over pairs, as ported"] = lambda: port_pair_loop(flat)
        # GradVac's first step is PCGrad's.
        orders = seeded_orders(num_tasks, others_only=name == "GradVac")
        expected = oracle.combination(oracle.pcgrad_weights(gramian, orders), rows)
        ordered = getattr(fastmtl, name)(order=orders, **options)
        found = fastmtl.aggregate(rows, ordered).grads
        errors["fastmtl"] = check(name, oracle.vector_error(found, expected), 1e-5)
        for other in [p for p in providers if p != "fastmtl"]:
            torch.manual_seed(0)
            errors[other] = check(other, oracle.vector_error(providers[other](), expected), 1e-2)
    report.measure("aggregate", name, (num_tasks, rows.shape[1]), providers, "fastmtl", errors)


def _measure_elementwise(report: Report, name: str, options: dict[str, Any], rows: Tensor) -> None:
    """Against TorchJD, and a plain read of the same rows, which is the floor."""
    method = getattr(fastmtl, name)(**options)
    providers: dict[str, Callable[[], Any]] = {
        "fastmtl": lambda: fastmtl.aggregate(rows, method).grads,
        **read_passes(rows),
    }
    if torchjd is not None:
        theirs = torchjd.GradDrop() if name == "GradDrop" else torchjd.TrimmedMean(options["trim"])
        providers["TorchJD"] = lambda: theirs(rows)
    found = fastmtl.aggregate(rows, method).grads.double()
    if name == "GradDrop":
        sums = [rows.double().clamp(min=0).sum(0), rows.double().clamp(max=0).sum(0)]
        nearer = (found - sums[0]).abs() < (found - sums[1]).abs()
        expected: Tensor = torch.where(nearer, sums[0], sums[1])
    else:
        expected = rows.sort(0).values[options["trim"] : len(rows) - options["trim"]].double().mean(0)
    errors = {"fastmtl": check(name, oracle.vector_error(found, expected), 1e-5)}
    report.measure("aggregate", name, (len(rows), rows.shape[1]), providers, "fastmtl", errors)


if __name__ == "__main__":
    main(run, threads=2, rounds=9)
