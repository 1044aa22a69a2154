"""What others do, for comparison: TorchJD, where it is installed, and the popular loop over pairs of tasks."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from scipy import optimize
from torch import Tensor

torchjd: ModuleType | None = None
autojac: ModuleType | None = None
try:
    torchjd = importlib.import_module("torchjd.aggregation")
    autojac = importlib.import_module("torchjd.autojac")
except ImportError as error:
    print(f"NO COMPARISON WITH TORCHJD, its rows will be missing: {error} (pip install torchjd==0.18.0)")


def installed(*packages: str) -> bool:
    """Whether all are there: some of TorchJD's methods need solvers that it does not bring along."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        print(f"without {', '.join(missing)} some rows of TorchJD are missing (pip install 'torchjd[full]')")
    return not missing


def torchjd_backward(
    aggregator: Callable[[Tensor], Tensor],
    shared: Sequence[Tensor],
    heads: Sequence[Sequence[Tensor]],
    chunk: int | None = None,
    lean: bool = False,
) -> Callable[[Sequence[Tensor], Tensor], None]:
    """TorchJD's counterpart of `fastmtl.backward`: from losses and features to ``.grad``.

    Args:
        aggregator: Of ``torchjd.aggregation``.
        shared: The shared parameters.
        heads: Each task's own parameters.
        chunk: How many tasks are differentiated at once by ``vmap``; None: all; 1: one by one, without ``vmap``.
        lean: Sum up the parameters' Gramians (``optimize_gramian_computation``) instead of concatenating the Jacobians.
    """
    assert autojac is not None
    mtl_backward, jac_to_grad = autojac.mtl_backward, autojac.jac_to_grad

    def backward(losses: Sequence[Tensor], features: Tensor) -> None:
        mtl_backward(losses, features=features, tasks_params=heads, shared_params=shared, parallel_chunk_size=chunk)
        jac_to_grad(shared, aggregator, optimize_gramian_computation=lean)

    return backward


def pair_loop(grads: list[Tensor]) -> Tensor:
    """PCGrad as commonly written, on gradients that are flat already: two passes and a host sync per pair."""
    projected = [g.clone() for g in grads]
    for i, g_i in enumerate(projected):
        for j in torch.randperm(len(grads)).tolist():
            if j == i:
                continue
            g_j = grads[j]
            product = torch.dot(g_i, g_j)
            if product.item() < 0:
                g_i -= product * g_j / g_j.norm() ** 2
    return torch.stack(projected).sum(0)


def port_pair_loop(grads: list[Tensor]) -> Tensor:
    """The loop with the bookkeeping of the most used port of PCGrad, which tracks per element who has a gradient."""
    has_grad = [torch.ones_like(g) for g in grads]
    shared = torch.stack(has_grad).prod(0).bool()
    projected = copy.deepcopy(grads)
    for i, g_i in enumerate(projected):
        for j in torch.randperm(len(grads)).tolist():
            if j == i:
                continue
            g_j = grads[j]
            product = torch.dot(g_i, g_j)
            if product < 0:
                g_i -= product * g_j / g_j.norm() ** 2
    merged = torch.zeros_like(grads[0])
    merged[shared] = torch.stack([g[shared] for g in projected]).sum(0)
    merged[~shared] = torch.stack([g[~shared] for g in projected]).sum(0)
    return merged


def lean_pair_loop(grads: list[Tensor]) -> Tensor:
    """The same loop with what can be saved inside of it: squared norms once, no temporaries, an in-place sum."""
    squares = [float(torch.dot(g, g)) for g in grads]
    total = torch.zeros_like(grads[0])
    for i, g in enumerate(grads):
        g_i = g.clone()
        for j in torch.randperm(len(grads)).tolist():
            if j == i:
                continue
            product = torch.dot(g_i, grads[j]).item()
            if product < 0:
                g_i.sub_(grads[j], alpha=product / squares[j])
        total += g_i
    return total


def slsqp_cagrad(gramian: Tensor, c: float) -> Tensor:
    """CAGrad's weights by SciPy's SLSQP from equal weights, as its paper's code."""
    m, num_tasks = gramian.numpy(), len(gramian)
    mean = torch.full((num_tasks,), 1 / num_tasks, dtype=torch.float64).numpy()
    linear, radius = m @ mean, c * math.sqrt(mean @ m @ mean)
    found = optimize.minimize(
        lambda w: w @ linear + radius * math.sqrt(w @ m @ w + 1e-8),
        mean,
        bounds=[(0, 1)] * num_tasks,
        constraints={"type": "eq", "fun": lambda w: 1 - w.sum()},
    ).x
    return torch.from_numpy(mean + radius / (math.sqrt(found @ m @ found) + 1e-8) * found)


def seeded_orders(num_tasks: int, others_only: bool = False) -> Tensor:
    """The orders that ``torch.manual_seed(0)`` makes the loops above draw, and TorchJD (GradVac: of the others)."""
    torch.manual_seed(0)
    if not others_only:
        return torch.stack([torch.randperm(num_tasks) for _ in range(num_tasks)])
    rows = []
    for i in range(num_tasks):
        others = torch.tensor([j for j in range(num_tasks) if j != i])
        rows.append(torch.cat([others[torch.randperm(num_tasks - 1)], torch.tensor([i])]))
    return torch.stack(rows)
