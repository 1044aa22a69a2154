"""Pictures of the results, from the CSV alone: ``python -m benchmarks.plots``. One per script, into ``results/``.

A black tick is the figure wanted. A peer that was missing is named under the picture.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from benchmarks.harness import RESULTS, Row

FASTER = "times faster"
OURS, LIGHT, PEER, OTHER = "#0072b2", "#56b4e9", "#d55e00", "#999999"


@dataclass(frozen=True)
class Bar:
    """One horizontal bar, and the figure wanted."""

    label: str
    value: float
    color: str
    wanted: float | None = None


def read(path: Path) -> list[Row]:
    """The rows of a CSV that `harness.Report.save` wrote."""
    kinds: dict[str, Callable[[str], Any]] = {"T": int, "P": int} | dict.fromkeys(
        ("median", "p20", "p80", "ratio"), float
    )
    with path.open(newline="") as file:
        return [Row(**{k: kinds.get(k, str)(v) for k, v in line.items()}) for line in csv.DictReader(file)]


def _shape(row: Row) -> str:
    size = f"{row.P:.0e}".replace("e+0", "e") if row.P % 10**5 == 0 else f"{row.P:,}"
    return f"T = {row.T}, P = {size}" + f", {row.dtype}" * (row.dtype != "float32")


def bars(axes: Axes, content: Sequence[Bar | str], title: str, unit: str, log: bool = False, one: bool = True) -> None:
    """Draw bars with their values; a string in between is a heading; ``one``: a line at 1."""
    values = [1.0] + [x for b in content if isinstance(b, Bar) for x in (b.value, b.wanted) if x is not None]
    for y, bar in enumerate(content):
        if isinstance(bar, str):
            place, coordinates = (0, y + 0.1), ("axes fraction", "data")
            axes.annotate(bar, place, (2, 0), coordinates, "offset points", fontsize=8.5, weight="bold")
            continue
        axes.barh(y, bar.value, height=0.75, color=bar.color)
        text = f"{max(bar.value, 0):.2f}" if bar.value < 10 else f"{bar.value:,.0f}"
        if bar.wanted is not None:
            axes.plot([bar.wanted] * 2, [y - 0.45, y + 0.45], color="black", linewidth=2.2, solid_capstyle="butt")
            text += f" (wanted {'≥' if unit == FASTER else '≤'} {bar.wanted:.3g})"
        end = max(bar.value, bar.wanted or 0)
        axes.annotate(text, (end, y), (4, 0), textcoords="offset points", va="center", fontsize=8)
    if log:
        axes.set_xscale("log")
        axes.set_xlim(min(0.5, *values) / 1.2, max(values) * 2.5)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    else:
        axes.set_xlim(0, max(values) * 1.4)
    if one:
        axes.axvline(1, color="#222222", linewidth=0.8, linestyle=":", zorder=0.5)
    axes.set_yticks(
        [y for y, bar in enumerate(content) if isinstance(bar, Bar)],
        [bar.label for bar in content if isinstance(bar, Bar)],
        fontsize=8,
    )
    axes.set_ylim(len(content) - 0.4, -0.6)
    axes.set_title(title, fontsize=10.5, loc="left")
    axes.set_xlabel(unit, fontsize=8.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def kernels(rows: Sequence[Row]) -> Figure:
    """Gramian (fp32, 16 bit, AVX2) and combine over a plain read, and the Gramian against MKL's product."""
    figure = Figure(figsize=(15, 9.5), layout="constrained")
    (fp32, half), (product, combine) = figure.subplots(2, 2)
    unit = "time / time of one plain read of the fp32 gradients"
    gram = [r for r in rows if r.question == "gram" and not r.provider.startswith("read")]
    single = [r for r in gram if r.dtype == "float32" and "alone, avx2" not in r.provider]
    bars(fp32, _over_read(single, 1.1), "gram, float32", unit, log=True)
    bars(half, _over_read([r for r in gram if r.dtype != "float32"], None), "gram, 16 bit", unit, log=True)
    combines = [r for r in rows if r.question == "combine" and not r.provider.startswith("read")]
    bars(combine, _over_read(combines, None), "combine", unit)
    theirs = {r.T: r.ratio for r in gram if "G @ G.T" in r.provider and r.dtype == "float32"}
    content: list[Bar | str] = [
        Bar(_shape(r), theirs[r.T] / r.ratio, OURS, {40: 4.0, 128: 3.3}.get(r.T))
        for r in gram
        if _plain(r) and r.T in theirs
    ]
    bars(product, content, "gram against torch's G @ G.T", FASTER)
    return figure


def _over_read(rows: Sequence[Row], wanted: float | None) -> list[Bar | str]:
    content: list[Bar | str] = []
    for shape in dict.fromkeys(_shape(r) for r in rows):
        content.append(shape)
        for r in rows:
            if _shape(r) == shape:
                color = OURS if r.provider == "fastmtl" else LIGHT if "fastmtl" in r.provider else OTHER
                content.append(Bar(r.provider, r.ratio, color, wanted if _plain(r) and r.T <= 16 else None))
    return content


def _plain(row: Row) -> bool:
    return row.provider == "fastmtl" and row.dtype == "float32"


def aggregate(rows: Sequence[Row]) -> Figure:
    """Whole aggregations against TorchJD and against the loops over pairs."""
    wanted = {("PCGrad", 8): 3.7, ("PCGrad", 40): 5.0, ("PCGrad", 128): 9.0, ("GradVac", 40): 8.0}
    mine = [r for r in rows if r.question == "aggregate" and r.provider != "fastmtl"]
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    jd = [r for r in mine if r.provider == "TorchJD"]
    content: list[Bar | str] = []
    for method in dict.fromkeys(r.method for r in jd):
        content.append(method)
        content += [Bar(_shape(r), r.ratio, OURS, wanted.get((method, r.T))) for r in jd if r.method == method]
    bars(left, content, "ready gradients: fastmtl against TorchJD", FASTER, log=True)
    loops = [r for r in mine if r.provider != "TorchJD"]
    content = []
    for shape in dict.fromkeys(_shape(r) for r in loops):
        content.append(f"PCGrad, {shape}")
        content += [Bar(r.provider, r.ratio, LIGHT) for r in loops if _shape(r) == shape]
    bars(right, content, "... and against the loop over pairs of tasks", FASTER, log=True)
    return figure


def solvers(rows: Sequence[Row]) -> Figure:
    """Time on a ready Gramian by number of tasks."""
    mine = [r for r in rows if r.question == "solver"]
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    colors = {"fastmtl": OURS, "fastmtl.ops": LIGHT, "TorchJD": PEER}
    wanted = {"PCGrad": 200.0, "MGDA": 15.0}  # times faster than TorchJD at T = 64
    for axes, method in zip(figure.subplots(1, 3, sharey=True), ("PCGrad", "GradVac", "MGDA"), strict=True):
        each = [r for r in mine if r.method == method]
        for provider in dict.fromkeys(r.provider for r in each):
            line = [r for r in each if r.provider == provider]
            style = {"color": colors.get(provider, OTHER), "label": provider}
            axes.plot([r.T for r in line], [r.median * 1e6 for r in line], "o-", markersize=4, **style)
        theirs = [r for r in each if r.provider == "TorchJD" and r.T == 64]
        for r in theirs if method in wanted else []:
            label = f"wanted: 1/{wanted[method]:.0f} of TorchJD"
            level = r.median * 1e6 / wanted[method]
            axes.plot(64, level, "_", color="black", markersize=16, markeredgewidth=2.2, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({r.T for r in each})
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.set_title(f"{method}: weights of a ready Gramian", fontsize=10.5, loc="left")
        axes.set_xlabel("number of tasks T", fontsize=8.5)
        axes.set_ylim(5, 1e8)
        axes.grid(alpha=0.25)
        if each:
            axes.legend(fontsize=8, loc="upper left")
    figure.axes[0].set_ylabel("CPU time in microseconds, one thread", fontsize=8.5)
    return figure


def steps(rows: Sequence[Row]) -> Figure:
    """What surgery and loss weightings add to a training step."""
    figure = Figure(figsize=(12, 11), layout="constrained")
    (passes, theirs), (layer, weighting), (ways, chunks) = figure.subplots(3, 2, height_ratios=(2, 2, 3))
    content: list[Bar | str] = [
        Bar(_net(r), r.ratio, OURS, 1.15)
        for r in rows
        if r.question.startswith("backward, ") and r.provider == "fastmtl.backward"
    ]
    bars(passes, content, "PCGrad at parameter level", "time / T plain backward passes")
    content = []
    against = [r for r in rows if r.question.startswith("backward against TorchJD") and "TorchJD" in r.provider]
    for net in dict.fromkeys(_net(r) for r in against):
        best = min((r for r in against if _net(r) == net), key=lambda r: r.ratio)
        content.append(Bar(net, best.ratio, OURS, {8: 1.0, 40: 1.3}[best.T]))
    bars(theirs, content, "... against the fastest setting of TorchJD's mtl_backward", FASTER)
    content = []
    surgery = [r for r in rows if r.question.startswith("layer, ") and r.provider == "FeatureSurgery"]
    for method in dict.fromkeys(r.method for r in surgery):
        content.append(method)
        content += [Bar(_net(r), r.ratio, OURS, {8: 1.2, 40: 1.35}[r.T]) for r in surgery if r.method == method]
    bars(layer, content, "FeatureSurgery", "time / plain step on the summed loss")
    losses = [r for r in rows if r.question.startswith("loss weighting") and r.provider != "summed loss"]
    bars(weighting, _by_net(losses), "loss weightings", "time / plain step on the summed loss")
    each = [r for r in rows if r.question.startswith("ways, ") and r.provider != "summed loss"]
    bars(ways, _by_net(each), "all ways in, PCGrad", "time / plain step on the summed loss", log=True)
    batched = [r for r in rows if r.question.startswith("chunk_size, ") and r.provider != "chunk_size=None"]
    bars(chunks, _by_net(batched), "tasks per batched backward pass", "time / whole passes one by one")
    return figure


def _by_net(rows: Sequence[Row]) -> list[Bar | str]:
    content: list[Bar | str] = []
    for net in dict.fromkeys(_net(r) for r in rows):
        content += [net, *(Bar(r.provider, r.ratio, LIGHT) for r in rows if _net(r) == net)]
    return content


def _net(row: Row) -> str:
    return f"{row.question.split(', ', 1)[1]}, T = {row.T}"


def memory(rows: Sequence[Row]) -> Figure:
    """Peak memory beyond a plain step, in copies of the shared parameters."""
    mine = [r for r in rows if r.question.startswith("memory")]
    tables = list(dict.fromkeys((r.question, _shape(r)) for r in mine))
    lines = (len(tables) + 1) // 2
    figure = Figure(figsize=(12, 3.6 * lines), layout="constrained")
    for axes, (question, shape) in zip(figure.subplots(lines, 2, squeeze=False).flat, tables, strict=False):
        content: list[Bar | str] = []
        for r in (r for r in mine if (r.question, _shape(r)) == (question, shape)):
            color = OTHER if "*" in r.provider else PEER if "TorchJD" in r.provider else OURS
            wanted = 1.1 * (r.T + 1) if r.provider == "fastmtl.backward" and question == "memory" else None
            content.append(Bar(r.provider, r.median / r.P, color, wanted))
        bars(axes, content, f"{question}: {shape}", "peak memory beyond a plain step / P", one=False)
    return figure


# Name of the picture: the question without which it is not drawn, and how.
FIGURES: dict[str, tuple[str, Callable[[Sequence[Row]], Figure]]] = {
    "kernels": ("gram", kernels),
    "aggregate": ("aggregate", aggregate),
    "solvers": ("solver", solvers),
    "steps": ("backward", steps),
    "memory": ("memory", memory),
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--csv", type=Path, default=RESULTS / "cpu.csv")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = read(options.csv)
    commits = sorted({r.commit for r in rows})
    cpus = sorted({r.device.rsplit(",", 1)[0] for r in rows})
    note = f"{'; '.join(cpus)}, commit {', '.join(commits)}."
    if not any("TorchJD" in r.provider for r in rows):
        note += " TorchJD was not installed: not compared."
    print(note)
    for name, (question, draw) in FIGURES.items():
        if not any(r.question.startswith(question) for r in rows):
            print(f"{name}: not drawn, {options.csv} has no rows on it")
            continue
        figure = draw(rows)
        figure.supxlabel(note, fontsize=8, color="#555555", x=0.01, ha="left")
        path = options.folder / f"{name}.png"
        figure.savefig(path, dpi=110)
        print(path)


if __name__ == "__main__":
    main()
