"""Krum's solver: the reference and NumPy against the kernels; `tests/surgery/test_krum.py` has the algorithm."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastmtl import ops, reference, solvers


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 40, 200])
@pytest.mark.parametrize("distance", ["squared", "euclidean"])
def test_kernels_reference_and_numpy_agree(num_tasks: int, distance: str) -> None:
    for f, selected in ((0, 1), (1, 2), (num_tasks, 5)):
        g = torch.randn(3, num_tasks, 9, dtype=torch.float64)
        m, mask = g @ g.mT, torch.rand(3, num_tasks) < 0.8
        m[~(mask.unsqueeze(-1) & mask.unsqueeze(-2))] = torch.nan
        found = ops.krum(m, mask, f, selected, distance)
        torch.testing.assert_close(found, reference.krum(m, mask, f, selected, distance), rtol=0, atol=0)
        np.testing.assert_array_equal(found, solvers.krum(m.numpy(), f, selected, distance, mask.numpy()))


def test_equal_scores_are_equal_whatever_is_added_first() -> None:
    """Two copies of a gradient, at both ends of the list, see the same distances in another order."""
    for seed in range(20):
        x = np.random.default_rng(seed).standard_normal((19, 6))
        g = np.vstack([np.zeros(6), x, -x, np.zeros(6)])  # 0 is the closest to all
        for solve in (ops.krum, reference.krum):
            weights = solve(torch.from_numpy(g @ g.T)[None], None, 1, 1)
            assert weights.argmax() == 0


@pytest.mark.parametrize(
    "options", [{"num_byzantine": -1}, {"num_selected": 0}, {"num_selected": 1.5}, {"distance": "l1"}], ids=repr
)
def test_options(options: dict) -> None:
    (name,) = options
    for call in (lambda: ops.krum(torch.eye(3).double()[None], **options), lambda: solvers.krum(np.eye(3), **options)):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
            call()
