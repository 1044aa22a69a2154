"""What does surgery on a large embedding table cost with sparse gradients, in time and memory?

A shared table of 1e6 rows of 32, as `nn.Embedding` (one index per sample) or `nn.EmbeddingBag` (the sum of ten), 8
linear heads, squared error, a batch of 4,096; forward and backward from no ``.grad`` on, no optimizer. Ratios are to
the ordinary step on the summed loss with sparse gradients, whose ``.grad`` still holds the duplicates (surgery's does
not). Memory is the growth of the process's peak during a step, in float32 elements; see `benchmarks.memory`. The error
is that of the table's gradient, relative to its norm, against PCGrad in fp64 on the gradients of T backward passes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import fastmtl
from benchmarks import oracle
from benchmarks.harness import Report, allocate, check, main
from benchmarks.memory import peak_growth

ROWS, WIDTH, BATCH, NUM_TASKS = 1_000_000, 32, 4096, 8
PLAIN = "summed loss, sparse"


class Net(nn.Module):
    """The table and the heads, over values that are given, and a batch."""

    def __init__(self, values: Tensor, inputs: Tensor, targets: Tensor, sparse: bool) -> None:
        super().__init__()
        make = nn.Embedding if inputs.dim() == 1 else nn.EmbeddingBag
        options = {} if inputs.dim() == 1 else {"mode": "sum"}
        self.table = make(ROWS, WIDTH, sparse=sparse, _weight=values, **options)  # type: ignore[arg-type]
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in targets)
        self.inputs, self.targets = inputs, targets

    def losses(self) -> list[Tensor]:
        """One loss per task."""
        vectors = self.table(self.inputs)
        return [nn.functional.mse_loss(head(vectors), y) for head, y in zip(self.heads, self.targets, strict=True)]

    def clear(self) -> None:
        """Forget the gradients."""
        for p in self.parameters():
            p.grad = None


def run(report: Report) -> None:
    values, targets = torch.randn(ROWS, WIDTH), torch.randn(NUM_TASKS, BATCH, 1)
    cases = []
    for name, shape in (("1 index", (BATCH,)), ("10 indices", (BATCH, 10))):
        inputs = torch.randint(0, ROWS, shape)
        sparse, dense = (Net(values, inputs, targets, kind) for kind in (True, False))
        dense.load_state_dict(sparse.state_dict())
        cases.append((name, sparse, dense, _checked(sparse, dense)))
    for name, sparse, dense, _ in cases:
        _memory(report, name, sparse, dense)
    allocate(keep=True)
    for name, sparse, dense, errors in cases:
        providers = _providers(sparse, dense)
        report.measure(f"sparse table, {name}", "PCGrad", (NUM_TASKS, ROWS * WIDTH), providers, PLAIN, errors)


def _providers(sparse: Net, dense: Net) -> dict[str, Callable[[], object]]:
    method = fastmtl.PCGrad()

    def plain(net: Net) -> None:
        net.clear()
        torch.stack(net.losses()).sum().backward()

    def ours(net: Net) -> None:
        net.clear()
        fastmtl.backward(net.losses(), method, net.table)

    return {
        PLAIN: lambda: plain(sparse),
        "fastmtl.backward, sparse": lambda: ours(sparse),
        "summed loss, dense": lambda: plain(dense),
        "fastmtl.backward, dense": lambda: ours(dense),
    }


def _checked(sparse: Net, dense: Net) -> dict[str, float]:
    """The errors, on the rows that are touched; the dense gradient is zero elsewhere."""
    touched = sparse.inputs.unique()
    rows = torch.stack(
        [
            torch.autograd.grad(loss, sparse.table.weight, retain_graph=True)[0]
            .double()
            .index_select(0, touched)
            .to_dense()
            .flatten()
            for loss in sparse.losses()
        ]
    )
    orders = torch.arange(NUM_TASKS).expand(NUM_TASKS, -1)
    expected = oracle.pcgrad_weights(rows @ rows.T, orders) @ rows
    errors = {}
    for name, net in (("fastmtl.backward, sparse", sparse), ("fastmtl.backward, dense", dense)):
        net.clear()
        fastmtl.backward(net.losses(), fastmtl.PCGrad(order="fixed"), net.table)
        found = net.table.weight.grad
        assert found is not None
        found = found.index_select(0, touched).to_dense().flatten()
        errors[name] = check(name, oracle.vector_error(found, expected), 1e-5)
        net.clear()
    return errors


def _memory(report: Report, name: str, sparse: Net, dense: Net) -> None:
    if not Path("/proc/self/clear_refs").exists():
        print("sparse: memory NOT MEASURED, needs Linux, where a process can reset its peak resident memory")
        return
    providers = _providers(sparse, dense)
    peaks: dict[str, list[float]] = {provider: [] for provider in providers}
    for _ in range(min(report.rounds, 3)):
        for provider, call in providers.items():
            sparse.clear()
            dense.clear()
            gc.collect()
            peaks[provider].append(peak_growth(call) / 4)
    shape = (NUM_TASKS, ROWS * WIDTH)
    report.record(f"sparse table's memory, {name}", "PCGrad", shape, peaks, PLAIN, unit="elements")


if __name__ == "__main__":
    main(run, threads=2, rounds=9, keep_memory=False)
