"""What records of a training run say: which of magnitude, velocity and direction is the trouble."""

from __future__ import annotations

import csv
import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Record = dict[str, Any]

PER_TASK = ("weights", "norms", "losses")
STRONG = -0.1  # a cosine below it: not by chance in thousands of dimensions

# From where on something is called a trouble.
MAGNITUDE = 10.0  # largest over smallest gradient norm
VELOCITY = 2.0  # how much more of its first value one loss has kept than another
DIRECTION = 0.1  # share of pairs with a strong conflict
PART = 0.1  # of the records at each end of the run, whose means are compared


def read(path: str | Path) -> tuple[list[Record], tuple[str, ...]]:
    """Records and the tasks' names, from a ``.jsonl`` or ``.csv`` file of `fastmtl.Monitor`.

    Raises:
        ValueError: Not such a file; the text names the line.
        OSError: It cannot be read.
    """
    path = Path(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".csv":
        return _read_csv(path, lines)
    found: list[Record] = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break  # the run is writing it, or was killed while it did
            raise ValueError(f"{path}:{number}: expected a record of fastmtl.Monitor ({error})") from None
    if not found or "tasks" not in found[0] or not all("step" in record for record in found[1:]):
        raise ValueError(f"{path}: expected the lines of fastmtl.Monitor, which begin with the tasks' names")
    return found[1:], tuple(found[0]["tasks"])


def _read_csv(path: Path, lines: Sequence[str]) -> tuple[list[Record], tuple[str, ...]]:
    head, *rows = csv.reader(lines) if lines else [[]]
    names = tuple(column.removeprefix("weights/") for column in head if column.startswith("weights/"))
    if not names or head[0] != "step":
        raise ValueError(f"{path}: expected the columns of fastmtl.Monitor, found {', '.join(head[:5])}")
    records = []
    for row in rows:
        cells = dict(zip(head, (None if cell == "" else float(cell) for cell in row), strict=False))
        record: Record = {name: value for name, value in cells.items() if "/" not in name}
        for what in PER_TASK:
            values = [cells.get(f"{what}/{name}") for name in names]
            record[what] = values if any(x is not None for x in values) else None
        records.append({**record, "cosines": None})
    return records, names


def report(records: Sequence[Record], names: Sequence[str]) -> str:
    """Which of magnitude, velocity and direction is the trouble, on what evidence, and which methods answer it.

    Raises:
        ValueError: No records.
    """
    if not records:
        raise ValueError("records: nothing was recorded; attach the monitor to the method that the steps are given")
    first, last = int(records[0]["step"]), int(records[-1]["step"])
    found = [_magnitude(records, names), _velocity(records, names), _direction(records, names)]
    troubles = [question for question, trouble, _ in found if trouble]
    lines = [f"{len(names)} tasks, {len(records)} records of steps {first} to {last}.", ""]
    for question, trouble, evidence in found:
        verdict = {True: "TROUBLE", False: "fine", None: "unknown"}[trouble]
        lines += textwrap.wrap(f"{question}: {verdict}. {evidence}", 100, subsequent_indent="    ")
    lines.append("")
    if troubles:
        for question in troubles:
            lines += textwrap.wrap(
                f"Against {question}: {', '.join(_answers(question))}.", 100, subsequent_indent="    "
            )
    elif any(trouble is None for _, trouble, _ in found):
        lines.append("No trouble found in what is known.")
    else:
        lines.append("No trouble: a summed loss, its weights tuned, will probably do as well as any method, for less.")
    return "\n".join(lines)


def _answers(question: str) -> list[str]:
    from fastmtl.methods import all_methods

    return [name for name, method in all_methods().items() if question in method.facts.answers]


def _column(records: Sequence[Record], what: str) -> np.ndarray:
    """``[records, T]`` or ``[records]``, NaN where unknown; of the records that have it."""
    return np.array([record[what] for record in records if record.get(what) is not None], dtype=float)


def _magnitude(records: Sequence[Record], names: Sequence[str]) -> tuple[str, bool | None, str]:
    norms = _column(records, "norms")
    if norms.size == 0 or (known := np.isfinite(norms).any(0)).sum() < 2:
        return "magnitude", None, "No gradients of two tasks were seen (a loss weighting looks at none)."
    typical = np.full(len(known), np.nan)
    typical[known] = np.nanmedian(norms[:, known], axis=0)
    large, small = int(np.nanargmax(typical)), int(np.nanargmin(typical))
    ratio = typical[large] / typical[small] if typical[small] > 0 else math.inf
    evidence = (
        f"The gradient of {names[large]} is typically {ratio:.3g} times as long as that of {names[small]} "
        f"({typical[large]:.3g} against {typical[small]:.3g})"
    )
    if ratio > MAGNITUDE:
        return "magnitude", True, f"{evidence}: a sum follows the former."
    return "magnitude", False, f"{evidence}; up to {MAGNITUDE:g} times is usual."


def _velocity(records: Sequence[Record], names: Sequence[str]) -> tuple[str, bool | None, str]:
    losses = _column(records, "losses")
    if len(losses) < 10:
        return "velocity", None, "It takes losses in 10 records or more."
    part = max(1, round(PART * len(losses)))
    with np.errstate(invalid="ignore", divide="ignore"):
        start, end = _mean(losses[:part]), _mean(losses[-part:])
        kept = np.where(start > 0, end / start, np.nan)
    if np.isfinite(kept).sum() < 2 or np.nanmin(kept) < 0:
        return "velocity", None, "It takes two tasks with positive losses."
    slow, fast = int(np.nanargmax(kept)), int(np.nanargmin(kept))
    ratio = kept[slow] / kept[fast] if kept[fast] > 0 else math.inf
    evidence = f"{names[fast]} is down to {kept[fast]:.1%} of its first loss, {names[slow]} at {kept[slow]:.1%}"
    if ratio > VELOCITY:
        return "velocity", True, f"{evidence}: they train at different rates."
    return "velocity", False, f"{evidence}."


def _direction(records: Sequence[Record], names: Sequence[str]) -> tuple[str, bool | None, str]:
    conflicts, strong = _column(records, "conflicts"), _column(records, "strong_conflicts")
    if conflicts.size == 0:
        return "direction", None, "No gradients of two tasks were seen (a loss weighting looks at none)."
    agreement = _column(records, "agreement").mean()
    evidence = (
        f"{conflicts.mean():.0%} of the pairs of gradients have a negative dot product, {strong.mean():.0%} a cosine "
        f"below {STRONG:g}; the squared norm of the sum is {agreement:.2g} times the sum of the squared norms "
        f"(orthogonal: 1, all equal: {len(names)})"
    )
    worst = _worst_pair(records, names)
    if worst:
        evidence += f"; {worst}"
    if strong.mean() > DIRECTION:
        return "direction", True, f"{evidence}: they pull against each other."
    return "direction", False, f"{evidence}."


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the records that know a value; NaN where none does."""
    count = np.isfinite(values).sum(0)
    total = np.where(np.isfinite(values), values, 0.0).sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def mean_cosines(records: Sequence[Record]) -> np.ndarray | None:
    """The mean of the matrices of cosines, ``[T, T]``; None if no record has one."""
    matrices = _column(records, "cosines")
    return None if matrices.size == 0 else _mean(matrices)


def _worst_pair(records: Sequence[Record], names: Sequence[str]) -> str:
    cosines = mean_cosines(records)
    if cosines is None:
        return ""
    upper = np.where(np.triu(np.ones_like(cosines), 1) > 0, cosines, np.nan)
    if not np.isfinite(upper).any():
        return ""
    i, j = divmod(int(np.nanargmin(upper)), len(upper))
    if upper[i, j] >= 0:
        return ""
    return f"most opposed on average: {names[i]} and {names[j]} (cosine {upper[i, j]:.2f})"


def plot(records: Sequence[Record], names: Sequence[str]) -> Any:
    """A figure of weights, gradient norms, losses, conflicts and the mean cosines; needs matplotlib.

    Raises:
        ValueError: No records.
        ImportError: There is no matplotlib.
    """
    if not records:
        raise ValueError("records: nothing was recorded; attach the monitor to the method that the steps are given")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    grid = figure.subplots(2, 3)
    for axes, (what, title) in zip(
        grid.flat, (("weights", "weights"), ("norms", "gradient norms"), ("losses", "losses")), strict=False
    ):
        some = [record for record in records if record.get(what) is not None]
        values = _column(some, what)
        axes.set_title(title if some else f"{title}: none seen")
        if not some:
            continue
        steps = [record["step"] for record in some]
        for t, name in enumerate(names):
            axes.plot(steps, values[:, t], linewidth=1, label=name)
        if what != "weights" and np.nanmin(values) > 0:
            axes.set_yscale("log")
        axes.set_xlabel("step")
    if len(names) <= 12:
        grid[0, 0].legend(fontsize="small")
    for axes, measures in ((grid[1, 0], ("conflicts", "strong_conflicts")), (grid[1, 1], ("magnitude_similarity",))):
        some = [record for record in records if record.get(measures[0]) is not None]
        for measure in measures:
            axes.plot([record["step"] for record in some], _column(some, measure), linewidth=1, label=measure)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("step")
        axes.set_title("share of conflicting pairs" if len(measures) > 1 else "magnitude similarity")
        if len(measures) > 1:
            axes.legend(fontsize="small")
    cosines = mean_cosines(records)
    axes = grid[1, 2]
    axes.set_title("mean cosines" if cosines is not None else "mean cosines: none seen")
    if cosines is not None:
        image = axes.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu")
        figure.colorbar(image, ax=axes, shrink=0.8)
        if len(names) <= 12:
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize="small")
            axes.set_yticks(range(len(names)), names, fontsize="small")
    return figure
