"""How every benchmark measures: all providers of a question interleaved in one run, checked before they are timed.

The machines this runs on may be shared, so an absolute time alone proves nothing: each round times every provider once,
in a rotating order, and what counts is the median over the rounds of the ratio to a baseline of the same round.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import dataclasses
import datetime
import gc
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles

import torch

RESULTS = Path(__file__).parent / "results"


def _cuda_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time, "cuda": _cuda_clock}
MIN_SAMPLE = 2e-3  # seconds; shorter calls are repeated within a sample

Provider = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One line of the results. Times in seconds; ``ratio`` is the time over the baseline's.

    Attributes:
        error: What was found before timing, against an fp64 reference on the same inputs; each script says in which
            measure. Empty where there is nothing to check.
    """

    question: str
    method: str
    provider: str
    T: int
    P: int
    dtype: str
    device: str
    median: float
    p20: float
    p80: float
    ratio: float
    error: float | str
    commit: str
    date: str


@dataclass
class Report:
    """Measures, prints and collects the rows of one script.

    Attributes:
        threads: Number of torch threads.
        clock: ``"wall"``; ``"cpu"`` (of the process: for one thread, on a busy machine); ``"cuda"`` (wall, with the
            device synchronised at both ends of a sample).
        rounds: Samples per provider.
        device: The machine in words; None: its CPU and the number of threads.
    """

    threads: int
    clock: str = "wall"
    rounds: int = 11
    device: str | None = None
    rows: list[Row] = field(default_factory=list)

    def measure(
        self,
        question: str,
        method: str,
        shape: tuple[int, int],
        providers: Mapping[str, Provider],
        baseline: str | Sequence[str],
        errors: Mapping[str, float] | None = None,
        dtype: str = "float32",
    ) -> None:
        """Time the providers and print a table.

        Args:
            question: What the rows answer; `save` replaces the earlier rows of the same question.
            method: What is computed.
            shape: T and P.
            providers: By name.
            baseline: The provider that ratios refer to; of several, the fastest.
            errors: Per provider, as found before this call.
            dtype: Of the inputs.
        """
        times = self._interleaved(providers)
        candidates = [baseline] if isinstance(baseline, str) else baseline
        base = min(candidates, key=lambda name: _percentiles(times[name])[1])
        print(
            f"\n{question}: {method}, T = {shape[0]}, P = {shape[1]:,}, {dtype}, {self._machine()}, {self.clock} time"
        )
        print(f"  {'':32} {'median':>10} {'p20':>10} {'p80':>10} {'ratio':>8} {'error':>9}")
        for name, samples in times.items():
            p20, median, p80 = _percentiles(samples)
            ratio = _percentiles([a / b for a, b in zip(samples, times[base], strict=True)])[1]
            error = "" if errors is None or name not in errors else errors[name]
            row = Row(
                question, method, name, *shape, dtype, self._machine(), median, p20, p80, ratio, error, *_version()
            )
            self.rows.append(row)
            shown = f"{error:9.1e}" if isinstance(error, float) else ""
            print(f"  {name:32} {_time(median)} {_time(p20)} {_time(p80)} {ratio:8.3g} {shown}".rstrip())

    def save(self, path: Path) -> None:
        """Write the rows into a CSV file, in place of its rows of the same questions."""
        names = [f.name for f in dataclasses.fields(Row)]
        new = [{k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in vars(row).items()} for row in self.rows]
        old = []
        if path.exists():
            with path.open(newline="") as file:
                old = [row for row in csv.DictReader(file) if row["question"] not in {r.question for r in self.rows}]
        path.parent.mkdir(exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows([*old, *new])

    def _interleaved(self, providers: Mapping[str, Provider]) -> dict[str, list[float]]:
        clock = CLOCKS[self.clock]
        repeats = {}
        for name, call in providers.items():  # also the warm-up
            call()
            start = clock()
            call()
            repeats[name] = max(1, round(MIN_SAMPLE / max(clock() - start, 1e-6)))
        times: dict[str, list[float]] = {name: [] for name in providers}
        order = list(providers)
        gc.collect()
        gc.disable()
        try:
            for _ in range(self.rounds):
                for name in order:
                    call, n = providers[name], repeats[name]
                    gc.collect()  # what one provider leaves behind is not the next one's cost
                    start = clock()
                    for _ in range(n):
                        call()
                    times[name].append((clock() - start) / n)
                order = order[1:] + order[:1]
        finally:
            gc.enable()
        return times

    def _machine(self) -> str:
        return self.device or f"{_cpu()}, {self.threads} thread{'s' * (self.threads > 1)}"


def main(run: Callable[[Report], None], threads: int, clock: str = "wall", rounds: int = 11) -> None:
    """The command line of a CPU benchmark: run it and store its rows in ``results/cpu.csv``.

    Args:
        run: Measures its question into the report.
        threads: The default number of threads.
        clock: The default clock.
        rounds: The default number of rounds.
    """
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default=clock, help="cpu: for one thread on a busy machine")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--csv", type=Path, default=RESULTS / "cpu.csv")
    options = parser.parse_args()
    _keep_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    report = Report(options.threads, options.clock, options.rounds)
    run(report)
    report.save(options.csv)


def check(what: str, error: float, bound: float) -> float:
    """Insist on a correct provider before it is timed.

    Raises:
        AssertionError: The error is above the bound, or NaN.
    """
    if not error <= bound:
        raise AssertionError(f"{what}: error {error:.1e} against the fp64 reference, expected at most {bound:.1e}")
    return error


def _keep_memory() -> None:
    """Let the C library keep what is freed, so that no provider is charged for page faults of large results."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc
    if mallopt is not None:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-4, 0)  # M_MMAP_MAX


def _percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """p20, median, p80."""
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    tenths = quantiles(samples, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1 or unit == "us":
            break
    return f"{seconds * factor:7.4g} {unit:2}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def _version() -> tuple[str, str]:
    """The commit, with a plus sign where files have changed since, and the date."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "../csrc", "../fastmtl"], capture_output=True, text=True
    )
    commit = head.stdout.strip() + "+" * bool(changed.stdout.strip())
    return commit, datetime.datetime.now(datetime.timezone.utc).date().isoformat()
