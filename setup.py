"""Builds the extension module fastmtl._C. Everything else about the package is in pyproject.toml.

Environment variables:
    FASTMTL_NO_EXT=1   install without a compiler; fastmtl then runs on its pure-PyTorch reference.
    FASTMTL_CUDA=0|1   leave the CUDA backend out, or insist on it. Unset: built where torch has CUDA and nvcc is found.
    TORCH_CUDA_ARCH_LIST   CUDA architectures; default: the GPUs of this machine, or all supported ones.
"""

import os
import re
import sys
from pathlib import Path

from setuptools import setup

CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
VERSION = re.search(r'^version = "(.+)"', Path("pyproject.toml").read_text(), re.MULTILINE)[1]  # type: ignore[index]


def extension() -> dict:
    import pybind11
    import torch
    from torch.utils import cpp_extension

    sources = [*sorted(map(str, Path("csrc").glob("*.cpp"))), *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
    # pybind11's own headers come before torch's bundled copy, which refuses the stable ABI.
    include, link, libraries = [pybind11.get_include()], ["-Wl,-s"] if sys.platform == "linux" else [], []
    cxx = ["-O3", "-g0", "-std=c++17", "-Wall", "-Wextra", "-Wno-psabi", "-fvisibility=hidden"]
    cxx += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f'-DFASTMTL_VERSION="{VERSION}"']

    cuda_home = cpp_extension.CUDA_HOME or os.environ.get("CUDA_HOME")
    wanted = os.environ.get("FASTMTL_CUDA", "auto")
    if wanted == "1" and cuda_home is None:
        sys.exit("FASTMTL_CUDA=1, but no CUDA toolkit was found: set CUDA_HOME to the folder that holds bin/nvcc")
    if wanted == "1" or (wanted == "auto" and cuda_home is not None and torch.version.cuda is not None):
        cpp_extension.CUDA_HOME = cuda_home  # None under a torch without CUDA, though nothing else is missing there
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "native")
        sources += sorted(map(str, Path("csrc/cuda").glob("*.cu")))
        include.append(f"{cuda_home}/include")
        link += [f"-L{cuda_home}/lib64", "-Wl,--exclude-libs,ALL"]
        libraries = ["cudart_static", "dl", "rt", "pthread"]
        cxx += ["-DWITH_CUDA", f'-DFASTMTL_CUDA_ARCHS="{architectures}"']

    nvcc = ["-O3", "-std=c++17", "-Xfatbin=-compress-all"]
    module = cpp_extension.CppExtension(
        "fastmtl._C",
        sources,
        include_dirs=include,
        libraries=libraries,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=link,
        depends=[str(p) for p in Path("csrc").rglob("*.h")],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


setup(**({} if os.environ.get("FASTMTL_NO_EXT") == "1" else extension()))
