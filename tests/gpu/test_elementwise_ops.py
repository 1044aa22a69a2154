"""grad_drop and trimmed_mean on a GPU against their CPU kernels, which random numbers and order of sums they share."""

from __future__ import annotations

import pytest
import torch

from fastmtl import ops
from tests.gpu.test_ops import DTYPES, random_params

RNG = torch.tensor([0x1234567890ABCDEF, 5])
SIZES = [1, 4099, 20, 2048]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 17, 33, 512])
def test_as_on_the_cpu(num_tasks: int, dtype: torch.dtype) -> None:
    leak = torch.linspace(0, 1, num_tasks, dtype=torch.float64)
    weights = torch.ones(num_tasks, dtype=torch.float64)
    for missing, shift in ((False, 0), (num_tasks > 2, 0), (num_tasks > 2, 1)):
        params = random_params(num_tasks, SIZES, dtype, missing, shift)
        host = [[None if x is None else x.cpu() for x in rows] for rows in params]
        for share in (None, leak):
            found = ops.grad_drop(params, weights.cuda(), RNG.cuda(), None if share is None else share.cuda())
            for a, b in zip(found, ops.grad_drop(host, weights, RNG, share), strict=True):
                torch.testing.assert_close(a.cpu(), b, rtol=1e-2 if dtype.itemsize == 2 else 1e-4, atol=1e-3)
        for trim in (0, 1, 2, 3, 4, 5, 100):
            found = ops.trimmed_mean(params, weights.cuda(), trim)
            for a, b in zip(found, ops.trimmed_mean(host, weights, trim), strict=True):
                torch.testing.assert_close(a.cpu(), b, rtol=1e-2 if dtype.itemsize == 2 else 1e-4, atol=1e-5)


def test_captured_in_a_graph_draws_anew_when_the_step_advances() -> None:
    rows, weights, rng = torch.randn(4, 5000, device="cuda"), torch.ones(4, device="cuda"), RNG.cuda()
    first = ops.grad_drop(rows, weights, rng)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.grad_drop(rows, weights, rng)
        rng[1] += 1
    graph.replay()
    assert torch.equal(captured, first)
    graph.replay()
    assert not torch.equal(captured, first)
