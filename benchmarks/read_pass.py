"""The floors that kernels are compared with: a plain read of the gradients, and multiply-adds on registers alone."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

PLAIN = "read: C++, 1 stream"  # per thread, front to back: the yardstick where it can be compiled
COMMAND = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-Wno-psabi"]


def read_passes(data: Tensor) -> dict[str, Callable[[], object]]:
    """Ways to read a contiguous float32 tensor once.

    Returns:
        Providers by name: our own loop where a compiler is found (it says so where not), and torch's.
    """
    flat = data.view(-1)
    passes: dict[str, Callable[[], object]] = {
        "read: torch.sum": flat.sum,
        "read: torch.dot": lambda: torch.dot(flat, flat),
    }
    library = _compiled()
    if library is not None:
        threads = torch.get_num_threads()
        passes[PLAIN] = lambda: library.read_pass(data.data_ptr(), flat.numel(), threads, 1)
        passes["read: C++, 8 streams"] = lambda: library.read_pass(data.data_ptr(), flat.numel(), threads, 8)
    return passes


def multiply_adds(count: int, capability: str) -> dict[str, Callable[[], object]]:
    """The provider of `count` float32 multiply-adds, or none where they cannot be compiled or run."""
    library, vector_bytes = _compiled(), {"avx512": 64, "avx2": 32}.get(capability)
    if library is None or vector_bytes is None or not hasattr(library, "multiply_adds"):
        return {}
    threads = torch.get_num_threads()
    return {f"multiply-adds alone, {capability}": lambda: library.multiply_adds(count, threads, vector_bytes)}


@functools.cache
def _compiled() -> ctypes.CDLL | None:
    """The functions of ``read_pass.cpp``."""
    source = Path(__file__).with_suffix(".cpp")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "read_pass.so"
        try:
            subprocess.run([os.environ.get("CXX", "c++"), *COMMAND, str(source), "-o", str(path)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no C++ floors ({error}): the yardstick is torch.sum")
            return None
        library = ctypes.CDLL(str(path))
    library.read_pass.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    library.read_pass.restype = ctypes.c_float
    if hasattr(library, "multiply_adds"):
        library.multiply_adds.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_int]
        library.multiply_adds.restype = ctypes.c_float
    return library
