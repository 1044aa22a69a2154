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
import functools
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
WARM = 0.1  # seconds; longer calls are warm after the first
BUDGET, MIN_ROUNDS = 10.0, 5  # seconds per table; rounds that long calls get nevertheless

Provider = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One line of the results. ``ratio`` is the time (or memory) over the baseline's.

    Attributes:
        median: Of the samples: seconds, or elements where the question is one of memory; `p20` and `p80` likewise.
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
        rounds: Samples per provider; fewer where they would take longer than `BUDGET`, but at least `MIN_ROUNDS`.
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
        """Time the providers, `record` them.

        Args:
            question: What the rows answer; `save` replaces the earlier rows of the same question.
            method: What is computed.
            shape: T and P.
            providers: By name.
            baseline: The provider that ratios refer to; of several, the fastest.
            errors: Per provider, as found before this call.
            dtype: Of the inputs.
        """
        self.record(question, method, shape, self.time(providers), baseline, errors, dtype)

    def record(
        self,
        question: str,
        method: str,
        shape: tuple[int, int],
        samples: Mapping[str, Sequence[float]],
        baseline: str | Sequence[str],
        errors: Mapping[str, float] | None = None,
        dtype: str = "float32",
        unit: str = "s",
    ) -> None:
        """Keep samples as rows and print them as a table; `measure` has the arguments.

        Args:
            question: As there; so are the others.
            method: As there.
            shape: As there.
            samples: Per provider one for each round.
            baseline: As there.
            errors: As there.
            dtype: As there.
            unit: ``"s"``, or what else the samples are; only for print.
        """
        candidates = [baseline] if isinstance(baseline, str) else baseline
        base = min(candidates, key=lambda name: _percentiles(samples[name])[1])
        clock = f"{self.clock} time" if unit == "s" else unit
        print(f"\n{question}: {method}, T = {shape[0]}, P = {shape[1]:,}, {dtype}, {self._machine()}, {clock}")
        print(f"  {'':32} {'median':>10} {'p20':>10} {'p80':>10} {'ratio':>8} {'error':>9}")
        show = _time if unit == "s" else "{:10.4g}".format
        for name, each in samples.items():
            p20, median, p80 = _percentiles(each)
            ratio = _percentiles([a / b for a, b in zip(each, samples[base], strict=True)])[1]
            error = "" if errors is None or name not in errors else errors[name]
            row = Row(
                question, method, name, *shape, dtype, self._machine(), median, p20, p80, ratio, error, *version()
            )
            self.rows.append(row)
            shown = f"{error:9.1e}" if isinstance(error, float) else ""
            print(f"  {name:32} {show(median)} {show(p20)} {show(p80)} {ratio:8.3g} {shown}".rstrip(), flush=True)

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

    def time(self, providers: Mapping[str, Provider]) -> dict[str, list[float]]:
        """Samples of each provider, one per round, the rounds interleaved."""
        clock = CLOCKS[self.clock]
        repeats, total = {}, 0.0
        for name, call in providers.items():  # also the warm-up
            start = clock()
            call()
            once = clock() - start
            if once < WARM:
                start = clock()
                call()
                once = clock() - start
            repeats[name] = max(1, round(MIN_SAMPLE / max(once, 1e-6)))
            total += once * repeats[name]
        rounds = max(min(MIN_ROUNDS, self.rounds), min(self.rounds, int(BUDGET / total)))
        times: dict[str, list[float]] = {name: [] for name in providers}
        order = list(providers)
        gc.collect()
        gc.freeze()  # the collections below are about what the providers leave, not about all that torch imports
        gc.disable()
        try:
            for _ in range(rounds):
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
            gc.unfreeze()
        return times

    def _machine(self) -> str:
        return self.device or f"{_cpu()}, {self.threads} thread{'s' * (self.threads > 1)}"


def main(
    run: Callable[[Report], None],
    threads: int,
    clock: str = "wall",
    rounds: int = 11,
    keep_memory: bool = True,
    large: Callable[[Report], None] | None = None,
) -> None:
    """The command line of a CPU benchmark: run it and store its rows in ``results/cpu.csv``.

    Args:
        run: Measures its question into the report.
        threads: The default number of threads.
        clock: The default clock.
        rounds: The default number of rounds.
        keep_memory: Let the C library keep what is freed, so that no provider is charged for page faults of large
            results. Else give it back at once, so that what the process holds is what it needs.
        large: What ``--large`` measures in place of ``run``: what takes too long or too much memory for every day.
    """
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default=clock, help="cpu: for one thread on a busy machine")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--csv", type=Path, default=RESULTS / "cpu.csv")
    if large is not None:
        parser.add_argument("--large", action="store_true", help="measure the large case in place of the others")
    options = parser.parse_args()
    allocate(keep_memory)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    report = Report(options.threads, options.clock, options.rounds)
    (large if large is not None and options.large else run)(report)
    report.save(options.csv)


def check(what: str, error: float, bound: float) -> float:
    """Insist on a correct provider before it is timed.

    Raises:
        AssertionError: The error is above the bound, or NaN.
    """
    if not error <= bound:
        raise AssertionError(f"{what}: error {error:.1e} against the fp64 reference, expected at most {bound:.1e}")
    return error


def allocate(keep: bool) -> None:
    """Tell the C library what to do with freed memory, where it is glibc."""
    trim, mmap_threshold, mmap_max = -1, -3, -4
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and keep:
        mallopt(trim, 2**31 - 1)
        mallopt(mmap_max, 0)
    elif mallopt is not None:
        mallopt(mmap_threshold, 2**16)


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


@functools.cache
def version() -> tuple[str, str]:
    """The commit, with a plus sign where files have changed since, and the date."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "../csrc", "../fastmtl"], capture_output=True, text=True
    )
    commit = head.stdout.strip() + "+" * bool(changed.stdout.strip())
    return commit, datetime.datetime.now(datetime.timezone.utc).date().isoformat()
