"""``make gpu``: what only a GPU can show, in one command: build, tests, sanitizer, benchmark, and a short table.

Needs a machine with a GPU, torch with CUDA, nvcc of the same major version, ninja, pybind11 and pytest; no registry.
Results go to ``benchmarks/results/gpu.csv``. Each step runs in a process of its own; a failed one does not stop the
others, but the exit status tells.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from benchmarks.harness import Report

ROOT = Path(__file__).parent.parent
SHAPES = [(2, 10**8), (8, 10**8), (40, 10**7), (128, 10**6)]


def steps() -> list[tuple[str, list[str], dict[str, str]]]:
    """Name, command and environment of each step; an empty command: not available here."""
    python = sys.executable
    own = [python, "-m", "benchmarks.gpu"]
    checker = shutil.which("compute-sanitizer")
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else all tensors lie in one block and overruns go unseen
    result: list[tuple[str, list[str], dict[str, str]]] = [
        ("build", [python, "setup.py", "build_ext", "--inplace"], {"FASTMTL_CUDA": "1"}),
        ("info", [python, "-m", "fastmtl", "info"], {}),
        ("tests", [python, "-m", "pytest", "tests/gpu"], {}),
    ]
    for tool in ("memcheck", "racecheck"):
        command = [checker, "--tool", tool, "--error-exitcode", "1", *own, "--small"] if checker else []
        result.append((tool, command, uncached))
    result.append(("benchmark", [*own, "--benchmark"], {}))
    return result


def run_all() -> int:
    """Run the steps and print the table; 0 if none failed."""
    table, failed = [], False
    for name, command, env in steps():
        if not command:
            table.append((name, "unavailable: no compute-sanitizer", 0.0))
            continue
        print(f"\n=== {name}: {' '.join(command)}", flush=True)
        start = time.perf_counter()
        status = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "FASTMTL_REQUIRE_EXT": "1", **env}, check=False
        ).returncode
        failed |= status != 0
        table.append((name, "ok" if status == 0 else f"FAILED ({status})", time.perf_counter() - start))
        if name == "build" and status != 0:
            break
    print("\n" + "\n".join(f"{name:<10} {outcome:<36} {seconds:6.1f} s" for name, outcome, seconds in table))
    return int(failed)


def small() -> None:
    """Every operator on small, awkward inputs: what the sanitizers watch."""
    import torch

    import fastmtl

    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for num_tasks in (2, 8, 9, 40, 56, 72):
            sizes = (1, 3, 257, 1000)
            for shift in (0, 1):  # whole loads, and single ones
                grads = [
                    [torch.randn(n + shift, device="cuda").to(dtype)[shift:] for _ in range(num_tasks)] for n in sizes
                ]
                grads[1][0] = None  # type: ignore[call-overload]
                fastmtl.ops.gram(grads, precision="fast")
                for method in (fastmtl.PCGrad(), fastmtl.GradVac(), fastmtl.MGDA()):
                    out = fastmtl.aggregate(grads, method, groups=[0, 0, 1, 1])
                    assert all(g.isfinite().all() for g in out.grads if g is not None)


def benchmark() -> None:
    """Gramian, combine and whole surgeries against the bandwidth measured in the same run; the solvers."""
    import torch

    from benchmarks.harness import RESULTS, Report

    report = Report(threads=1, clock="cuda", rounds=9, device=torch.cuda.get_device_name())
    for num_tasks, size in SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            # Of float64, which the tensor cores of many GPUs take slowly, half as many columns: the same bytes.
            rows(report, num_tasks, size // 2 if dtype == torch.float64 else size, dtype)
            report.save(RESULTS / "gpu.csv")  # a failed check further on costs no more than its own rows
            torch.cuda.empty_cache()
    for num_tasks in (8, 32, 64):
        solvers(report, num_tasks)
    report.save(RESULTS / "gpu.csv")


def rows(report: Report, num_tasks: int, size: int, dtype: torch.dtype) -> None:
    """Everything over a Jacobian [T, P], every provider checked first; then the shares of the measured bandwidth."""
    import torch

    import fastmtl
    from benchmarks.harness import check
    from benchmarks.peers import pair_loop

    g = torch.randn(num_tasks, size, device="cuda").to(dtype)
    out = torch.empty_like(g)
    w = torch.rand(1, num_tasks, device="cuda", dtype=torch.float64)
    exact = torch.zeros(num_tasks, num_tasks, device="cuda", dtype=torch.float64)
    for part in g.split(10**6, dim=1):
        exact += part.double() @ part.double().T
    scale = exact.diagonal().sqrt()
    error = ((fastmtl.ops.gram(g)[0] - exact).abs() / (scale[:, None] * scale)).max().item()
    errors = {"gram": check("gram", error, 1e-12 if dtype == torch.float64 else 1e-6)}
    wanted = w[0] @ g[:, : 10**5].double()
    error = ((fastmtl.ops.combine(g, w)[: 10**5] - wanted).abs() / wanted.abs().max()).max().item()
    errors["combine"] = check("combine", error, max(2, num_tasks / 8) * torch.finfo(dtype).eps)  # T roundings

    methods = {"PCGrad": fastmtl.PCGrad(), "GradVac": fastmtl.GradVac(), "MGDA": fastmtl.MGDA()}
    for name, method in methods.items():
        result = fastmtl.aggregate(g, method)
        wanted = result.weights @ g[:, : 10**5].double()
        size_of = (result.weights.abs() @ g[:, : 10**5].double().abs()).max()
        error = ((result.grads[: 10**5] - wanted).abs().max() / size_of).item()
        errors[name] = check(name, error, max(2, num_tasks / 8) * torch.finfo(dtype).eps)
    providers: dict[str, Callable[[], object]] = {
        "read": lambda: g.sum(),
        "copy": lambda: out.copy_(g),
        "gram": lambda: fastmtl.ops.gram(g),
        "combine": lambda: fastmtl.ops.combine(g, w),
        **{name: lambda m=method: fastmtl.aggregate(g, m) for name, method in methods.items()},  # type: ignore[misc]
        "G @ G.T": lambda: g @ g.T,
    }
    if num_tasks > 8 and dtype == torch.float32:
        providers["gram, fast"] = lambda: fastmtl.ops.gram(g, precision="fast")
        error = ((fastmtl.ops.gram(g, precision="fast")[0] - exact).abs() / (scale[:, None] * scale)).max().item()
        errors["gram, fast"] = check("gram, fast", error, 1e-3)
    if num_tasks == 8 and dtype == torch.float32:
        providers["per-pair loop"] = lambda: pair_loop(list(g))
    kind = str(dtype).removeprefix("torch.")
    report.measure("gpu rows", "Gramian, combine, surgery", (num_tasks, size), providers, "read", errors, kind)
    seconds = {row.provider: row.median for row in report.rows[-len(providers) :]}
    one_pass = num_tasks * size * g.element_size()
    moved = {  # bytes; combine's floor is a read of the rows and a write of one
        "read": one_pass,
        "copy": 2 * one_pass,
        "gram": one_pass,
        "gram, fast": one_pass,
        "combine": one_pass + one_pass // num_tasks,
        **dict.fromkeys(methods, 2 * one_pass + one_pass // num_tasks),
    }
    best = max(moved[name] / seconds[name] for name in ("read", "copy"))
    print("  bandwidth, and share of the better of read and copy:")
    for name in [name for name in moved if name in seconds]:
        speed = moved[name] / seconds[name]
        print(f"  {name:32} {speed / 1e9:7.0f} GB/s {speed / best:6.1%}", flush=True)


def solvers(report: Report, num_tasks: int) -> None:
    """The T x T problems on a ready Gramian."""
    import torch

    import fastmtl

    x = torch.randn(num_tasks, 4 * num_tasks, device="cuda", dtype=torch.float64)
    gramian, rng = (x @ x.T)[None], torch.tensor([1, 0], device="cuda")
    targets = torch.zeros_like(gramian)
    providers: dict[str, Callable[[], object]] = {
        "pcgrad": lambda: fastmtl.ops.pcgrad(gramian, rng=rng),
        "gradvac": lambda: fastmtl.ops.gradvac(gramian, targets, rng=rng),
        "min_norm": lambda: fastmtl.ops.min_norm(gramian),
    }
    report.measure("gpu solvers", "weights on a ready Gramian", (num_tasks, 0), providers, "pcgrad", dtype="float64")


def main() -> int:
    """The command line; without options: all steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--small", action="store_true", help="only the workload that the sanitizers watch")
    parser.add_argument("--benchmark", action="store_true", help="only the benchmark")
    options = parser.parse_args()
    if options.small:
        small()
    elif options.benchmark:
        benchmark()
    else:
        return run_all()
    return 0


if __name__ == "__main__":
    sys.exit(main())
