"""Compiles the CUDA kernels with nvcc and prints what each one takes.

    python tests/cuda_check.py [--arch sm_80,sm_90 | all] [--write]

A kernel that spills registers is an error, and so is one that takes more than ``cuda_kernels.csv`` says, which
``--write`` renews. Needs nvcc, no GPU.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = sorted((Path(__file__).parents[1] / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
KEPT = Path(__file__).parent / "cuda_kernels.csv"
MARGIN = 8  # registers: what another nvcc may take
NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    "--expt-relaxed-constexpr",
    "-D__CUDA_NO_HALF_OPERATORS__",  # as torch compiles .cu files
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
    "-Werror=all-warnings",
    "-Xptxas=-v",
    "-cubin",
]


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel: registers per thread, bytes of static shared memory, of stack, and spilled."""

    name: str
    arch: str
    registers: int
    shared: int
    stack: int
    spilled: int


def find_toolkit() -> Path | None:
    """The folder of a CUDA toolkit that can build the extension: with nvcc, headers and the static runtime."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    parts = ("bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart_static.a")
    return next((Path(home) for home in homes if home and all((Path(home) / part).exists() for part in parts)), None)


def find_nvcc() -> str | None:
    """The path of nvcc, from CUDA_HOME or PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def demangled(names: list[str]) -> list[str]:
    """Readable names, without namespaces and arguments, where c++filt is there."""
    if shutil.which("c++filt") is None:
        return names
    lines = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = [re.sub(r"fastmtl::|\(anonymous namespace\)::|^void ", "", line) for line in lines.splitlines()]
    return [line.split("(")[0] for line in short]


def kernels_in(log: str) -> list[Kernel]:
    """Read the output of ``-Xptxas=-v``."""
    entries = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers([^\n]*)",
        log,
        re.DOTALL,
    )
    names = demangled([entry[0] for entry in entries])
    kernels = []
    for name, (_, arch, stack, stores, loads, registers, rest) in zip(names, entries, strict=True):
        shared = re.search(r"(\d+) bytes smem", rest)
        spilled = int(stores) + int(loads)
        kernels.append(Kernel(name, arch, int(registers), int(shared[1]) if shared else 0, int(stack), spilled))
    return kernels


def compile_for(nvcc: str, source: Path, arch: str) -> list[Kernel]:
    """Compile one source; raises RuntimeError with nvcc's output where that fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *NVCC_FLAGS, f"-arch={arch}", str(source), "-o", f"{folder}/out.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    log = done.stdout + done.stderr
    kernels = kernels_in(log)
    if done.returncode != 0 or not kernels:
        raise RuntimeError(f"{' '.join(command)}\n{log}")
    return kernels


def check(nvcc: str, architectures: list[str]) -> list[Kernel]:
    """All kernels of all sources for the given architectures."""
    jobs = [(source, arch) for arch in architectures for source in SOURCES]
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        return [kernel for kernels in pool.map(lambda job: compile_for(nvcc, *job), jobs) for kernel in kernels]


def table(kernels: list[Kernel]) -> str:
    """A row per kernel; per architecture registers and static shared memory, and what is spilled."""
    architectures = list(dict.fromkeys(kernel.arch for kernel in kernels))
    cells: dict[str, dict[str, str]] = {}
    for kernel in kernels:
        spills = f" SPILLS {kernel.spilled}" if kernel.spilled else f" stack {kernel.stack}" if kernel.stack else ""
        cells.setdefault(kernel.name, {})[kernel.arch] = f"{kernel.registers} / {kernel.shared}{spills}"
    width = max(map(len, cells))
    lines = [f"{'registers / shared bytes':{width}}  " + "".join(f"{arch:>14}" for arch in architectures)]
    for name, row in sorted(cells.items()):
        lines.append(f"{name:{width}}  " + "".join(f"{row.get(arch, ''):>14}" for arch in architectures))
    return "\n".join(lines)


def write(kernels: list[Kernel]) -> None:
    """Keep the table: per kernel its static shared memory, the same everywhere, and its registers per architecture."""
    rows: dict[str, dict[str, int | str]] = {}
    for kernel in kernels:
        row = rows.setdefault(kernel.name, {"kernel": kernel.name, "shared": kernel.shared})
        row[kernel.arch] = kernel.registers
    with KEPT.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["kernel", "shared", *ARCHITECTURES], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[name] for name in sorted(rows))


def complaints(kernels: list[Kernel]) -> list[str]:
    """What is wrong with the kernels: spills, and differences from the kept table beyond `MARGIN`."""
    with KEPT.open(newline="") as file:
        kept = {row["kernel"]: row for row in csv.DictReader(file)}
    # An array that is indexed dynamically lands on the stack without being called spilled.
    found = [
        f"{k.name}: {k.spilled} bytes spilled, stack of {k.stack} on {k.arch}" for k in kernels if k.spilled or k.stack
    ]
    found += [
        f"{name} is in {KEPT.name}, but no such kernel is compiled" for name in kept.keys() - {k.name for k in kernels}
    ]
    for k in kernels:
        if k.name not in kept:
            found.append(f"{k.name} is not in {KEPT.name}")
            continue
        registers, shared = int(kept[k.name][k.arch]), int(kept[k.name]["shared"])
        if k.registers > registers + MARGIN or k.shared > shared:
            found.append(
                f"{k.name} takes {k.registers} registers and {k.shared} bytes of shared memory on {k.arch}, "
                f"more than the {registers} and {shared} of {KEPT.name}"
            )
    return found


def main() -> int:
    """Print the table; 1 if there are complaints or a kernel does not compile."""
    parser = argparse.ArgumentParser(description="Compile the CUDA kernels; spills are errors.")
    parser.add_argument("--arch", default="sm_80,sm_90", help="architectures, separated by commas, or 'all'")
    parser.add_argument("--write", action="store_true", help=f"renew {KEPT.name}; implies all architectures")
    options = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("nvcc was found neither in CUDA_HOME nor in PATH", file=sys.stderr)
        return 1
    everywhere = options.write or options.arch == "all"
    kernels = check(nvcc, list(ARCHITECTURES) if everywhere else options.arch.split(","))
    print(table(kernels))
    if options.write:
        write(kernels)
    wrong = complaints(kernels)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
