"""Random weights by the kernels against the same draws in PyTorch; `tests/test_random.py` has their laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastmtl import ops, solvers
from fastmtl.random import DISTRIBUTIONS, random_weights


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 5, 32, 512])
def test_kernels_draw_the_same_as_pytorch(num_tasks: int, distribution: str) -> None:
    for seed, step, share in ((3, 0, 1.0), (2**62 - 5, 2**33 + 1, 0.6), (2**32, 1, 0.05)):
        present = torch.rand(3, num_tasks) < share
        rng = torch.tensor([seed, step])
        found = ops.random_weights(rng, present, distribution)
        expected = random_weights(rng, present, distribution)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
        np.testing.assert_array_equal(found, solvers.random_weights(present.numpy(), distribution, seed, step))
        assert ops.random_weights(rng, present, distribution, torch.float32).dtype == torch.float32


def test_arguments() -> None:
    assert solvers.DISTRIBUTIONS == DISTRIBUTIONS
    everyone, rng = torch.ones(1, 3, dtype=torch.bool), torch.tensor([1, 2])
    for draw in (lambda x: ops.random_weights(rng, everyone, x), lambda x: solvers.random_weights(everyone.numpy(), x)):
        with pytest.raises(ValueError, match=r"^distribution: expected 'normal'"):
            draw("cauchy")
    with pytest.raises(TypeError, match=r"^mask: expected an array of bool"):
        solvers.random_weights(np.ones(3))
