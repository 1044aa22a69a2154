"""Tests that need a GPU, and fastmtl built for it."""

import pytest
import torch

from fastmtl import _extension


@pytest.fixture(autouse=True)
def gpu() -> torch.device:
    """The GPU; skips where there is none, fails where the tests would run on the reference instead of our kernels."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    assert _extension.kernels_on("cuda"), "fastmtl was built without its CUDA backend: FASTMTL_CUDA=1 insists on it"
    return torch.device("cuda")
