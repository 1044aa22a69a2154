"""TrimmedMean's promises. (Against SciPy, for every layout: tests/test_elementwise_ops.py.)"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastmtl
from fastmtl import TrimmedMean


@pytest.mark.parametrize("num_tasks", [3, 8, 41])
@pytest.mark.parametrize("trim", [1, 3, 8])
def test_hostile_tasks_cannot_move_it_out_of_the_others_span(num_tasks: int, trim: int) -> None:
    if num_tasks <= 2 * trim:
        with pytest.raises(ValueError, match=f"trim: of {num_tasks} tasks nothing is left without {trim}"):
            fastmtl.aggregate(torch.randn(num_tasks, 5), TrimmedMean(trim))
        return
    grads = torch.randn(num_tasks, 500)
    hostile = torch.randperm(num_tasks)[:trim]
    grads[hostile] = torch.tensor([1e30, -1e30, float("inf"), -float("inf"), 0.0])[torch.randint(5, (trim, 500))]
    honest = grads[[t for t in range(num_tasks) if t not in hostile]]
    found = fastmtl.aggregate(grads, TrimmedMean(trim)).grads
    assert (found >= honest.amin(0) - 1e-5).all()
    assert (found <= honest.amax(0) + 1e-5).all()


def test_median_and_mean() -> None:
    grads = torch.randn(9, 200, dtype=torch.float64)
    torch.testing.assert_close(fastmtl.aggregate(grads, TrimmedMean(4)).grads, grads.median(0).values)
    torch.testing.assert_close(fastmtl.aggregate(grads, TrimmedMean(0)).grads, grads.mean(0))


def test_order_of_tasks_does_not_matter() -> None:
    grads = torch.randn(12, 200, dtype=torch.float64)
    for trim in (1, 2, 4, 5):
        found = fastmtl.aggregate(grads, TrimmedMean(trim)).grads
        torch.testing.assert_close(fastmtl.aggregate(grads[torch.randperm(12)], TrimmedMean(trim)).grads, found)


def test_fewer_tasks_than_usual() -> None:
    """A parameter that n tasks reach loses (n - 1) // 2 on each side at most."""
    a, b, c = torch.randn(3, 50).unbind()
    found = fastmtl.aggregate([[a, None, None, None, None], [a, b, None, None, c]], TrimmedMean(2)).grads
    assert torch.equal(found[0], a)
    torch.testing.assert_close(found[1], torch.stack([a, b, c]).median(0).values)


@pytest.mark.parametrize(("trim", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError), ("1", TypeError)])
def test_refused(trim: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="trim"):
        TrimmedMean(trim)
