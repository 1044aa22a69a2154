"""How long does a method think about a ready Gramian, and how good is its answer?

Gramians of random gradients whose norms differ by an order of magnitude. Ratios are to fastmtl's method object, which
also checks its input; ``ops`` is what a training step calls. The error of PCGrad is that of its weights, relative to
their norm, with the same visiting orders in fp64; that of min-norm the duality gap over the smallest squared norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastmtl
from benchmarks import oracle
from benchmarks.harness import Report, check, main
from benchmarks.peers import seeded_orders, torchjd

NUM_TASKS = (8, 32, 64)
ITERATIONS = 10_000  # of Frank-Wolfe, where it is to converge


def random_gramian(num_tasks: int) -> Tensor:
    """A full-rank Gramian, float64."""
    rows = torch.randn(num_tasks, 4 * num_tasks, dtype=torch.float64)
    rows *= torch.logspace(-0.5, 0.5, num_tasks, dtype=torch.float64)[:, None]
    return rows @ rows.T


def run(report: Report) -> None:
    for num_tasks in NUM_TASKS:
        gramian = random_gramian(num_tasks)
        _pcgrad(report, gramian)
        _min_norm(report, gramian)


def _pcgrad(report: Report, gramian: Tensor) -> None:
    method, rng, batch = fastmtl.PCGrad(), torch.tensor([1, 0]), gramian[None]
    orders = seeded_orders(len(gramian))
    expected = oracle.pcgrad_weights(gramian, orders)
    providers: dict[str, Callable[[], Any]] = {
        "fastmtl": lambda: method(gramian),
        "fastmtl.ops": lambda: fastmtl.ops.pcgrad(batch, rng=rng),
    }
    found = {
        "fastmtl": fastmtl.PCGrad(order=orders)(gramian),
        "fastmtl.ops": fastmtl.ops.pcgrad(batch, order=orders)[0],
    }
    if torchjd is not None:
        weighting = torchjd.PCGradWeighting()
        providers["TorchJD"] = lambda: weighting(gramian)
        torch.manual_seed(0)
        found["TorchJD"] = weighting(gramian)
    errors = {name: check(name, oracle.vector_error(w, expected), 1e-9) for name, w in found.items()}
    report.measure("solver", "PCGrad", (len(gramian), 0), providers, "fastmtl", errors, "float64")


def _min_norm(report: Report, gramian: Tensor) -> None:
    method, batch = fastmtl.MGDA(), gramian[None]
    providers: dict[str, Callable[[], Any]] = {
        "fastmtl": lambda: method(gramian),
        "fastmtl.ops": lambda: fastmtl.ops.min_norm(batch)[0][0],
    }
    if torchjd is not None:
        default = torchjd.MGDAWeighting()
        longer = torchjd.MGDAWeighting(epsilon=1e-12, max_iters=ITERATIONS)
        providers["TorchJD"] = lambda: default(gramian)
        if len(gramian) == min(NUM_TASKS):
            providers[f"TorchJD, {ITERATIONS:,} iterations"] = lambda: longer(gramian)
    errors = {name: oracle.duality_gap(gramian, f()) for name, f in providers.items()}
    for name in ("fastmtl", "fastmtl.ops"):
        check(name, errors[name], 1e-9)
    report.measure("solver", "MGDA", (len(gramian), 0), providers, "fastmtl", errors, "float64")


if __name__ == "__main__":
    main(run, threads=1, clock="cpu")
