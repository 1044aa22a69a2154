"""Runs the CUDA kernels on the host: under the address sanitizer, under a race checker, and with planted bugs.

``cuda_on_host/`` compiles the very sources of ``csrc/cuda`` with g++. It needs the headers of a CUDA toolkit, no GPU.
Objects are kept in ``build/cuda_on_host`` under a hash of all that went into them.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC, HOST, CACHE = ROOT / "csrc", ROOT / "tests" / "cuda_on_host", ROOT / "build" / "cuda_on_host"
KERNELS = ("gram.cu", "gram_registers.cu", "gram_tensor_cores.cu")
KERNELS += ("combine.cu", "grad_drop.cu", "trimmed_mean.cu", "solvers.cu")
RUNTIME = ("cuda_on_host.cpp", "check.cpp", "main.cpp", "test_gram.cpp", "test_combine.cpp")
RUNTIME += ("test_elementwise.cpp", "test_solvers.cpp")
# gram_long is about rounding alone and says most with few ranges: see test_few_ranges.
SUITES = ("gram_registers", "gram_tensor_cores", "gram_tables", "combine", "grad_drop", "trimmed_mean")
SUITES += ("min_norm", "bounded_min_norm", "dual_cone", "frank_wolfe", "simplex_lp", "cagrad", "fairgrad", "spectral")
SUITES += ("pcgrad", "gradvac", "krum", "projected_gradient", "random_weights")
WORKERS = min(2, os.cpu_count() or 1)
HALF_FLAGS = ["HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS"]  # as torch compiles .cu
COMMON_FLAGS = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
COMMON_FLAGS += [f"-D__CUDA_NO_{name}__" for name in HALF_FLAGS]
UNDEFINED = ["-fsanitize=undefined", "-fno-sanitize-recover=undefined"]


@dataclass(frozen=True)
class Mode:
    """How kernels, the rest, and the program are compiled, and what is linked besides."""

    kernel_flags: list[str]
    host_flags: list[str]
    runtime: tuple[str, ...] = RUNTIME


MODES = {
    "asan": Mode(["-fsanitize=address", *UNDEFINED], ["-fsanitize=address", *UNDEFINED]),
    "race": Mode(["-fsanitize=thread", *UNDEFINED], UNDEFINED, (*RUNTIME, "race_on_host.cpp")),
}


def toolkit_include() -> Path:
    """The folder of cuda_runtime.h; skips the test where there is none, or no compiler for these tests."""
    if platform.machine() != "x86_64" or shutil.which("g++") is None:
        pytest.skip("needs g++ on x86-64 Linux")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        homes.append(str(Path(nvcc).resolve().parents[1]))
    for home in filter(None, homes):
        include = Path(home) / "include"
        if (include / "cuda_runtime.h").is_file() and (include / "cuda_bf16.h").is_file():
            return include
    pytest.skip("needs the headers of a CUDA toolkit: cuda_runtime.h is neither in CUDA_HOME nor in /usr/local/cuda")


def run(command: Iterable[str | Path], **options: object) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{' '.join(done.args)}\n{done.stdout}\n{done.stderr}"


def headers(csrc: Path) -> bytes:
    files = [
        csrc / "rows.h",
        csrc / "grad_drop.h",
        *sorted(csrc.glob("cuda/*.h")),
        *sorted(csrc.glob("solvers/*.h")),
        *sorted(HOST.glob("*.h")),
    ]
    return b"".join(file.name.encode() + file.read_bytes() for file in files)


def compile_object(source: Path, flags: list[str], csrc: Path = CSRC) -> Path:
    flags = [*COMMON_FLAGS, *flags, "-isystem", str(toolkit_include())]
    if source.suffix == ".cu":
        flags += ["-include", str(HOST / "cuda_on_host.h"), "-x", "c++"]
    digest = hashlib.sha256(headers(csrc) + source.read_bytes() + repr(flags).encode()).hexdigest()[:16]
    target = CACHE / f"{source.stem}-{digest}.o"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        run(["g++", *flags, "-c", source, "-o", partial])
        partial.rename(target)
    return target


def link(mode: Mode, objects: list[Path], program: Path) -> Path:
    run(["g++", *mode.host_flags, *objects, "-o", program])
    return program


def build_objects(mode: Mode) -> dict[str, Path]:
    sources = [(CSRC / "cuda" / name, mode.kernel_flags) for name in KERNELS]
    sources += [(HOST / name, mode.host_flags) for name in mode.runtime]
    with ThreadPoolExecutor(WORKERS) as pool:
        objects = list(pool.map(lambda job: compile_object(*job), sources))
    return {source.name: target for (source, _), target in zip(sources, objects, strict=True)}


@pytest.mark.parametrize("mode", MODES)
def test_kernels(mode: str, tmp_path: Path) -> None:
    program = link(MODES[mode], list(build_objects(MODES[mode]).values()), tmp_path / "main")
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(lambda suite: run([program, suite], timeout=120), SUITES))


@dataclass(frozen=True)
class Edit:
    """The text ``old``, which occurs once in a file of ``csrc/cuda``, becomes ``new``."""

    file: str
    old: str
    new: str


class Bug:
    """A mistake planted in the kernels, and the mode, suite and report (a pattern) that find it."""

    def __init__(self, mode: str, suite: str, report: str, *edits: Edit) -> None:
        self.mode, self.suite, self.report, self.edits = mode, suite, report, edits


ONLY_F32 = Edit(  # a quarter of the instances
    "element.h",
    """  switch (type) {
    case Scalar::f32:
      return f(float());
    case Scalar::f64:
      return f(double());
    case Scalar::bf16:
      return f(__nv_bfloat16());
    default:
      return f(__half());
  }
""",
    "  (void)type;\n  return f(float());\n",
)
FEW_RANGES = (
    Edit("gram_partials.h", "kRegisterRanges = {1024,", "kRegisterRanges = {1,"),
    Edit("gram_partials.h", "kTensorCoreRanges = {2048,", "kTensorCoreRanges = {1,"),
)
RACE, OVERFLOW, WRONG = "data race|has not written", "heap-buffer-overflow", "FAILED"


def tensor_bug(mode: str, report: str, old: str, new: str) -> Bug:
    return Bug(mode, "gram_tensor_cores", report, Edit("gram_tensor_cores.cu", old, new))


BUGS = {
    "barrier missing after the warps' sums": Bug(
        "race", "gram_registers", RACE, Edit("gram_registers.cu", "  __syncthreads();\n  for (int q", "  for (int q")
    ),
    "all blocks write the same partial sums": Bug(
        "race", "gram_registers", RACE, Edit("gram_registers.cu", "int64_t(blockIdx.x) * kPairs + q", "q")
    ),
    "threads leave before a barrier": Bug(
        "race",
        "gram_registers",
        "the others have exited",
        Edit(
            "gram.cu",
            "  __syncthreads();\n  if (lane > 0 || q >= pairs)",
            "  if (lane > 0) return;\n  __syncthreads();\n  if (q >= pairs)",
        ),
    ),
    "missing row read": Bug(
        "asan", "gram_registers", "null pointer|SEGV", Edit("gram_registers.cu", "x[t] = rows[t] ?", "x[t] = true ?")
    ),
    "vector loads from misaligned rows": Bug(
        "asan", "gram_registers", "misaligned address", Edit("table.h", "address_bits % 16 == 0", "address_bits != 0")
    ),
    "reads past the end of a row": Bug(
        "asan", "gram_registers", OVERFLOW, Edit("gram_registers.cu", "i + N <= end; i += N", "i < end; i += N")
    ),
    "scratch one range short": Bug(
        "asan", "gram_tables", OVERFLOW, Edit("gram.cu", "return most_ranges *", "return (most_ranges - 1) *")
    ),
    "last range left out of the sum": Bug(
        "asan",
        "gram_registers",
        WRONG,
        Edit("gram.cu", "first[blockIdx.y + 1]; r +=", "first[blockIdx.y + 1] - 1; r +="),
    ),
    "ragged last unit dropped": Bug(
        "asan",
        "gram_registers",
        WRONG,
        Edit("table.h", "unit += ceil_div(param.size, kUnit)", "unit += param.size / kUnit"),
    ),
    "two groups share a range": Bug(
        "asan",
        "gram_tables",
        WRONG,
        Edit("table.h", "unit = ceil_div(unit, units_per_range) * units_per_range", "unit += 0"),
    ),
    "registers of a factor in the wrong order": tensor_bug(
        "asan",
        WRONG,
        "{top.high[0], bottom.high[0], top.high[1], bottom.high[1]}",
        "{top.high[0], top.high[1], bottom.high[0], bottom.high[1]}",
    ),
    "cut to TF32 instead of rounded": tensor_bug(
        "asan", WRONG, "f.high[i] = round_to_tf32(x[i])", "f.high[i] = __float_as_uint(x[i])"
    ),
    "one of the three products forgotten": tensor_bug("asan", WRONG, "mma_tf32(products, high, right.low);", ""),
    "one TF32 product unasked": tensor_bug("asan", WRONG, "return fast ?", "return true ?"),
    "first half of a step taken twice": tensor_bug("asan", WRONG, "step.shift();", ""),
    "warps overlap": tensor_bug("asan", WRONG, "kStride = kWarps *", "kStride = (kWarps - 1) *"),
    "tile of M from the wrong rows": tensor_bug(
        "asan", WRONG, "kTile * (tile_row - 1) + row", "kTile * tile_row + row"
    ),
    "sums grow within the tensor cores, which round toward zero": Bug(
        "asan",
        "gram_long",
        WRONG,
        Edit(
            "gram_tensor_cores.cu",
            "float products[4] = {};\n    if constexpr (!kFast)",
            "float (&products)[4] = sums;\n    if (!kFast)",
        ),
        Edit(
            "gram_tensor_cores.cu",
            "right.high);\n#pragma unroll\n    for (int e = 0; e < 4; ++e) sums[e] += products[e];",
            "right.high);",
        ),
        *FEW_RANGES,
    ),
    "missing row read by the tensor cores": tensor_bug(
        "asan", "null pointer|SEGV", "present >> r & 1 && n < left", "n < left"
    ),
    "reads past the end of a row into a factor": tensor_bug(
        "asan", OVERFLOW, "present >> r & 1 && n < left", "present >> r & 1"
    ),
    "whole loads although the row ends": tensor_bug(
        "asan", OVERFLOW, "i + kStride + Columns::kColumns <= end", "i + kStride < end"
    ),
    "whole loads from misaligned rows": tensor_bug("asan", "misaligned address", "whole = vector &&", "whole ="),
    "part of a warp multiplies": tensor_bug(
        "asan", "warp operation|has exited|deadlock", "i = first; i < end;", "i = first; i + shift < end;"
    ),
    "warps add without waiting": tensor_bug("race", RACE, "__syncthreads();\n      double total", "double total"),
    "tile overwritten while others read it": tensor_bug(
        "race",
        RACE,
        "triangle[num_pairs(a) + b] = total;\n      __syncthreads();",
        "triangle[num_pairs(a) + b] = total;",
    ),
    "all ranges write the same triangle": tensor_bug(
        "race", RACE, "partials + blockIdx.x * num_pairs(table.num_tasks)", "partials"
    ),
    "row of weight 0 read": Bug("asan", "combine", "SEGV", Edit("terms.h", "row && weight != 0", "row")),
    "list of rows overwritten while others read it": Bug(
        "race", "combine", RACE, Edit("combine.cu", "__syncthreads();  // nobody", "// nobody")
    ),
    "every parameter draws the first one's numbers": Bug(
        "asan", "grad_drop", WRONG, Edit("grad_drop.cu", "table.params[p].number", "0")
    ),
    "numbers in another order": Bug(
        "asan", "grad_drop", WRONG, Edit("grad_drop.cu", "uniform_of(random.word[n])", "uniform_of(random.word[3 - n])")
    ),
    "leak of the place in the list, not of the task": Bug(
        "asan", "grad_drop", WRONG, Edit("grad_drop.cu", "(leak[task])", "(leak[place])")
    ),
    "no room for the leaks": Bug(
        "asan", "grad_drop", OVERFLOW, Edit("grad_drop.cu", "leak ? sizeof(Sum<Element>) : 0", "0")
    ),
    "list of rows read before it is written": Bug(
        "race",
        "grad_drop",
        RACE,
        Edit("grad_drop.cu", "__syncthreads();\n    Out* const", "Out* const"),
    ),
    "one more is trimmed": Bug(
        "asan", "trimmed_mean", WRONG, Edit("trimmed_mean.cu", "r + term < 2 * trim);", "r + term <= 2 * trim);")
    ),
    "sorted before all values are there": Bug(
        "race",
        "trimmed_mean",
        RACE,
        Edit("trimmed_mean.cu", "__syncthreads();\n      sort_columns(", "sort_columns("),
    ),
    "stages of the sort overlap": Bug(
        "race", "trimmed_mean", RACE, Edit("trimmed_mean.cu", "      __syncthreads();\n    }\n  }\n}", "    }\n  }\n}")
    ),
    "next values before the last were read": Bug(
        "race", "trimmed_mean", RACE, Edit("trimmed_mean.cu", "__syncthreads();  // the values", "// the values")
    ),
    "comparisons across blocks of the merge sort": Bug(
        "asan",
        "trimmed_mean",
        WRONG,
        Edit("trimmed_mean.cu", " || low / (2 * p) != (low + k) / (2 * p)", ""),
    ),
    "warp does not wait for its writes": Bug(
        "race", "pcgrad", RACE, Edit("teams.h", "sync() const { __syncwarp(); }", "sync() const {}")
    ),
    "block does not wait for its warps": Bug(
        "race", "min_norm", RACE, Edit("teams.h", "    }\n    __syncthreads();\n  }", "    }\n  }")
    ),
    "problems share their scratch": Bug(
        "race", "min_norm", RACE, Edit("solvers.cu", "scratch + blockIdx.x * doubles", "scratch")
    ),
    "bounds of the first problem for all": Bug(
        "asan",
        "bounded_min_norm",
        WRONG,
        Edit("solvers.cu", "args.lower_bounds + problem.index * problem.num_tasks", "args.lower_bounds"),
    ),
    "Gramian of the first problem for all": Bug(
        "asan",
        "dual_cone",
        WRONG,
        Edit("solvers.cu", "problem_at(problems, k);\n    const double", "problem_at(problems, 0);\n    const double"),
    ),
    "scratch of half the size": Bug(
        "asan",
        "frank_wolfe",
        OVERFLOW,
        Edit("solvers.cu", "return frank_wolfe_scratch(num_tasks);", "return frank_wolfe_scratch(num_tasks) / 2;"),
    ),
    "shared memory one double short": Bug(
        "asan",
        "gradvac",
        OVERFLOW,
        Edit("solvers.cu", "? doubles * sizeof(double)", "? (doubles - 1) * sizeof(double)"),
    ),
}


def kernels_of(suite: str) -> set[str]:
    """The files whose kernels a suite runs."""
    if suite in ("gram_registers", "gram_tensor_cores"):
        return {"gram.cu", f"{suite}.cu"}
    if suite.startswith("gram"):
        return {"gram.cu", "gram_registers.cu", "gram_tensor_cores.cu"}
    return {f"{suite}.cu" if suite in ("combine", "grad_drop", "trimmed_mean") else "solvers.cu"}


def build_edited(mode: Mode, suite: str, edits: tuple[Edit, ...], folder: Path) -> Path:
    """The program with the kernels that the edits concern, f32 only, compiled from edited sources."""
    objects = build_objects(mode)
    level = "-O1" if suite == "gram_long" else "-O0"  # of the others, compiling is what takes time
    csrc = folder / "csrc"
    shutil.copytree(CSRC, csrc)
    for edit in (*edits, ONLY_F32):
        file = csrc / "cuda" / edit.file
        text = file.read_text()
        assert text.count(edit.old) == 1, f"{edit.file} holds {edit.old!r} {text.count(edit.old)} times"
        file.write_text(text.replace(edit.old, edit.new))
    edited = {edit.file for edit in edits}
    concerned = kernels_of(suite) if any(name.endswith(".h") for name in edited) else edited
    flags = [*mode.kernel_flags, "-Wno-error", level]
    objects |= {name: compile_object(csrc / "cuda" / name, flags, csrc) for name in concerned}
    return link(mode, list(objects.values()), folder / "main")


def test_few_ranges(tmp_path: Path) -> None:
    """Many terms per range, which takes large gradients otherwise, are summed as precisely."""
    program = build_edited(MODES["asan"], "gram_long", FEW_RANGES, tmp_path)
    run([program, "--quick", "gram_long", "gram_tables"], timeout=120)


def find(bug: Bug, folder: Path) -> subprocess.CompletedProcess[str]:
    program = build_edited(MODES[bug.mode], bug.suite, bug.edits, folder)
    return subprocess.run([program, "--quick", bug.suite], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def findings(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """Per planted bug that is asked for what the program says, all of them under way at once."""
    toolkit_include()
    names = [item.callspec.params["name"] for item in request.session.items if "findings" in item.fixturenames]
    for mode in {BUGS[name].mode for name in names}:
        build_objects(MODES[mode])
    with ThreadPoolExecutor(WORKERS) as pool:
        yield {name: pool.submit(find, BUGS[name], tmp_path_factory.mktemp("bug")) for name in names}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_found(name: str, findings: dict[str, Future[subprocess.CompletedProcess[str]]]) -> None:
    done = findings[name].result()
    output = done.stdout + done.stderr
    assert done.returncode != 0, f"not found: {output}"
    assert re.search(BUGS[name].report, output), output
