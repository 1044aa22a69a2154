"""The time of a plain read of the gradients: what every kernel is compared with."""

from __future__ import annotations

import ctypes
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
    kernel = _compiled()
    if kernel is not None:
        threads = torch.get_num_threads()
        passes[PLAIN] = lambda: kernel(data.data_ptr(), flat.numel(), threads, 1)
        passes["read: C++, 8 streams"] = lambda: kernel(data.data_ptr(), flat.numel(), threads, 8)
    return passes


_kernels: list[Callable[[int, int, int, int], float] | None] = []


def _compiled() -> Callable[[int, int, int, int], float] | None:
    """The function of ``read_pass.cpp``, compiled once per process."""
    if not _kernels:
        _kernels.append(_compile())
    return _kernels[0]


def _compile() -> Callable[[int, int, int, int], float] | None:
    source = Path(__file__).with_suffix(".cpp")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "read_pass.so"
        try:
            subprocess.run([os.environ.get("CXX", "c++"), *COMMAND, str(source), "-o", str(library)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no C++ read pass ({error}): the yardstick is torch.sum")
            return None
        function = ctypes.CDLL(str(library)).read_pass
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    function.restype = ctypes.c_float
    return function  # type: ignore[no-any-return]
