"""One binary serves torch with and without CUDA: built with the kernels, it works where there is neither CUDA nor GPU.

Needs nvcc, no GPU.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda_check import find_nvcc, find_toolkit

ROOT = Path(__file__).parents[1]
USE = """
import pathlib, torch, fastmtl
from fastmtl import _extension
assert pathlib.Path(_extension.module.__file__).is_relative_to(pathlib.Path.cwd()), _extension.module.__file__
info = _extension.module.build_info()
assert info["cuda"] and info["cuda_archs"] == "9.0", info
for op in ("gram", "combine", "combine_", "min_norm", "pcgrad", "gradvac"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastmtl::{op}", "CUDA"), op
jacobian = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
assert fastmtl.ops.gram(jacobian).tolist() == [[[18.0, -22.0], [-22.0, 38.0]]]
for method in (fastmtl.PCGrad(), fastmtl.GradVac(), fastmtl.MGDA()):
    assert fastmtl.aggregate(jacobian, method).grads.isfinite().all()
"""


def test_binary_with_cuda_on_the_cpu(tmp_path: Path) -> None:
    if find_nvcc() is None:
        pytest.skip("needs nvcc, in CUDA_HOME or PATH")
    home = find_toolkit()
    assert home is not None, "nvcc without its toolkit: set CUDA_HOME to the folder that holds bin/nvcc"
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "fastmtl"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "demo"))
    build = {"FASTMTL_CUDA": "1", "CUDA_HOME": str(home), "TORCH_CUDA_ARCH_LIST": "9.0"}
    paths = {"PYTHONPATH": str(tmp_path), "FASTMTL_REQUIRE_EXT": "1"}
    for command, env in ((["setup.py", "build_ext", "--inplace"], build), (["-c", USE], paths)):
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env={**os.environ, **env}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
