"""Does a method get to the Pareto front? The two-loss toy of CAGrad and NashMTL: ``python -m benchmarks.toy``.

Two parameters ``(x, y)``, two losses that mirror each other, ``L_2(x, y) = L_1(-x, y)``, with ``s = tanh(y / 2)``::

    L_1 =  s (log max(|tanh y - (x + 7) / 2|, 5e-6) + 6)       where y >= 0: a steep valley, in which L_2 changes little
    L_1 = -s (((x - 7)^2 + (y + 8)^2 / 10) / 10 - 20)          where y <= 0: a bowl around (7, -8)

The front lies in the lower half, from one bowl's ground to the other's; from above, the summed loss runs into a valley
of one loss and stays there. Two settings are published, both with Adam at learning rate 1e-3: CAGrad's, and NashMTL's,
in which the first loss counts a tenth. Here Adam makes steps of 5e-3, a fifth as many, and forgets in as many fewer of
them (betas ``0.9^5``, ``0.999^5``): the same path, coarser. (Without the latter it would be another path, and with ten
times the step the summed loss jumps out of its valley.)

All starts of both settings are one call of the method per step, as groups of parameters. What reads the losses' values
has a method for each start, of the second setting only, and gets losses less their least values, as many want them
positive.

Reference: Liu, Liu, Jin, Stone, Liu, "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021, and its
code. Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik, Fetaya, "Multi-Task Learning as a Bargaining Game", ICML
2022, appendix B, and its code. Both draw the front straight, at y = -8.3552; it bends to -8.4345.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.harness import RESULTS, version
from fastmtl import from_name
from fastmtl.engine import Method
from fastmtl.methods import all_methods
from fastmtl.surgery.base import GradientMethod, Step
from fastmtl.surgery.row_method import RowMethod
from fastmtl.surgery.several_batches import SeveralBatches
from fastmtl.weighting import FAMO

Array = NDArray[np.float64]

COARSER = 5  # than published
LR, BETAS, EPS = 1e-3 * COARSER, (0.9**COARSER, 0.999**COARSER), 1e-8
SMALLEST = 5e-6  # below, the logarithms are flat
NEAR = 0.1  # the distance from the front at which it is reached
KEPT = 10  # every so many steps are kept of a path
MIRROR = np.array([1.0, -1.0])
COLUMNS = (
    "setting",
    "method",
    "start x",
    "start y",
    "x",
    "y",
    "loss 1",
    "loss 2",
    "distance",
    "reached",
    "commit",
    "date",
)

# What a method cannot do without.
OPTIONS: dict[str, dict[str, Any]] = {
    "Constant": {"weights": [0.5, 0.5]},
    "DWA": {"steps_per_epoch": 100},
    "EPO": {"preference": [1.0, 1.0]},
    "PELTR": {"lower_bounds": [0.25, 0.25]},
    "STCH": {"preference": [0.5, 0.5]},
}
# Of the loss weightings one of each kind, as each start takes them one by one.
WEIGHTINGS = ("UncertaintyWeighting", "LogLoss", "DWA", "FAMO", "STCH")
AT_LEAST_3 = ("Krum",)  # tasks


@dataclass(frozen=True)
class Setting:
    """A published experiment: its starts, what the losses are multiplied by, and its number of (published) steps."""

    name: str
    starts: tuple[tuple[float, float], ...]
    scales: tuple[float, float]
    steps: int


SETTINGS = (
    Setting("CAGrad", ((-8.5, 7.5), (-8.5, -5.0), (9.0, 9.0)), (1.0, 1.0), 100_000),
    Setting("NashMTL", ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0)), (0.1, 1.0), 35_000),
)


@dataclass(frozen=True)
class Trajectory:
    """One method from one start: every `KEPT`-th point, ``[n, 2]``, and the last one's distance to the front."""

    method: str
    setting: Setting
    points: Array

    @property
    def distance(self) -> float:
        """From the last point to the Pareto set; NaN where the method gave up."""
        return float(np.linalg.norm(FRONT - self.points[-1], axis=-1).min())

    @property
    def reached(self) -> bool:
        """Whether the path ends on the front."""
        return self.distance < NEAR


def evaluate(theta: Array) -> tuple[Array, Array]:
    """The two losses ``[..., 2]`` at points ``[..., 2]``, and their Jacobian ``[..., 2, 2]``, a row per loss."""
    x, y = theta[..., :1] * MIRROR, theta[..., 1:]
    t, s = np.tanh(y), np.tanh(y / 2)
    up, down = np.maximum(s, 0.0), np.maximum(-s, 0.0)
    u = t - (x + 7) / 2
    distance = np.abs(u)
    log = np.log(np.maximum(distance, SMALLEST)) + 6
    bowl = ((x - 7) ** 2 + (y + 8) ** 2 / 10) / 10 - 20
    slope = up * (distance >= SMALLEST) / np.where(u == 0, 1.0, u)
    dx = (down * (x - 7) / 5 - slope / 2) * MIRROR
    # On y = 0 both halves count, as in the published code: there the derivative of clamp(z, min=0) at z = 0 is 1.
    turn = (1 - s * s) / 2 * ((y >= 0) * log - (y <= 0) * bowl)
    dy = turn + slope * (1 - t * t) + down * (y + 8) / 50
    return up * log + down * bowl, np.stack([dx, dy], -1)


def pareto_set(points: int = 2001) -> Array:
    """The Pareto set, ``[points, 2]``, from the second loss's minimum to the first's.

    In the lower half the sum with weights p and 1 - p is least at ``x = 7 (2 p - 1)``, whatever y is, and there where
    ``y = 50 bowl / sinh(-y) - 8``, with the weighted bowl; repeated, each step leaves half of the error or less.
    """
    p = np.linspace(0.0, 1.0, points)
    x, y = 7 * (2 * p - 1), np.full(points, -8.4)
    for _ in range(60):
        bowl = 19.6 * p * (1 - p) + (y + 8) ** 2 / 100 - 20
        y = 50 * bowl / np.sinh(-y) - 8
    return np.stack([x, y], -1)


FRONT = pareto_set()
LEAST = evaluate(FRONT)[0].min(0)


class Adam:
    """Adam for an array, as `torch.optim.Adam` computes it."""

    def __init__(self) -> None:
        self.step, self.m, self.v = 0, np.zeros(()), np.zeros(())

    def __call__(self, theta: Array, grads: Array) -> Array:
        """The next point."""
        self.step += 1
        a, b = BETAS
        self.m = a * self.m + (1 - a) * grads
        self.v = b * self.v + (1 - b) * grads * grads
        return theta - LR / (1 - a**self.step) * self.m / (np.sqrt(self.v / (1 - b**self.step)) + EPS)


def make(name: str) -> Method:
    """A method for two tasks, always with the same seed."""
    torch.manual_seed(0)
    return from_name(name, num_tasks=2, **OPTIONS.get(name, {}))


def methods() -> list[str]:
    """The names of what is compared: the gradient methods that a Gramian of two tasks is enough for; `WEIGHTINGS`."""
    every = {n: m for n, m in all_methods().items() if issubclass(m, GradientMethod) and not issubclass(m, RowMethod)}
    return sorted({*every, *WEIGHTINGS} - {*AT_LEAST_3}, key=str.lower)


def solo(name: str) -> bool:
    """Whether a method serves one start only, because it reads losses or knows one group."""
    method = make(name)
    return not isinstance(method, GradientMethod) or method.needs_losses or method.single_group


def run(name: str, settings: Sequence[Setting] = SETTINGS, steps: int | None = None) -> list[Trajectory]:
    """Follow a method from all starts of the settings.

    Args:
        name: The method's.
        settings: Published experiments.
        steps: At most so many published steps; None: as published.
    """
    owner = [s for s in settings for _ in s.starts]
    counts = [min(s.steps, steps or s.steps) // COARSER for s in owner]
    theta = np.array([start for s in settings for start in s.starts])
    scales = np.array([s.scales for s in owner])
    weigh = _one_each(name, len(theta)) if solo(name) else _one_for_all(name)
    adam, points = Adam(), [theta]
    for step in range(1, max(counts) + 1):
        losses, jacobian = evaluate(theta)
        jacobian = jacobian * scales[..., None]
        weights = weigh((losses - LEAST) * scales, jacobian @ jacobian.swapaxes(-1, -2))
        theta = adam(theta, (weights[:, None] @ jacobian)[:, 0])
        if step % KEPT == 0:
            points.append(theta)
    every = np.stack(points, 1)
    return [Trajectory(name, s, path[: n // KEPT + 1]) for s, n, path in zip(owner, counts, every, strict=True)]


Weigh = Callable[[Array, Array], Array]  # from losses [K, 2] and Gramians [K, 2, 2] to weights [K, 2]


def _one_for_all(name: str) -> Weigh:
    method = make(name)
    assert isinstance(method, GradientMethod)
    return lambda losses, gramian: _weights(method, gramian, None)


def _one_each(name: str, starts: int) -> Weigh:
    each = [make(name) for _ in range(starts)]
    learned = [torch.optim.Adam(params, LR, BETAS) if (params := [*m.parameters()]) else None for m in each]

    def weigh(losses: Array, gramian: Array) -> Array:
        found = []
        for k, (method, optimizer) in enumerate(zip(each, learned, strict=True)):
            values = torch.from_numpy(losses[k])
            if isinstance(method, GradientMethod):
                found.append(_weights(method, gramian[k : k + 1], values)[0])
                continue
            if isinstance(method, FAMO):
                method.update(values)  # of the step before
            total, weights = method.slopes(values.unbind())
            if optimizer is not None:
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
            found.append(weights.numpy())
        return np.stack(found)

    return weigh


def _weights(method: GradientMethod, gramian: Array, losses: torch.Tensor | None) -> Array:
    batches = max(method.batches) if isinstance(method, SeveralBatches) else 1  # there is no noise: all are the same
    weights = method.weigh(Step(torch.from_numpy(np.tile(gramian, (batches, batches))), None, losses)).numpy()
    return weights.reshape(len(gramian), batches, 2).sum(1)


def save(paths: Sequence[Trajectory], path: Path) -> None:
    """Write a line per path: where it started and ended."""
    commit, date = version()
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for p in paths:
            ends = [*p.points[-1], *evaluate(p.points[-1])[0], p.distance]
            numbers = [*(f"{x:g}" for x in p.points[0]), *(f"{x:.4g}" for x in ends)]
            writer.writerow([p.setting.name, p.method, *numbers, "yes" if p.reached else "no", commit, date])


def markdown(path: Path = RESULTS / "toy.csv") -> str:
    """The table of docs/toy.md, from the CSV: per method how many starts reach the front, and where they do."""
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    table = []
    for method in dict.fromkeys(line["method"] for line in lines):
        cells, ends = [], ""
        for setting in SETTINGS:
            mine = [line for line in lines if (line["method"], line["setting"]) == (method, setting.name)]
            good = sum(line["reached"] == "yes" for line in mine)
            cells.append(f"{good} of {len(mine)}" if mine else "")
            ends = ", ".join(
                f"{round(float(line['x']), 1) + 0.0:.1f}" if line["reached"] == "yes" else "–" for line in mine
            )
        table.append((cells[1], cells[0], f"| `{method}` | {cells[0]} | {cells[1]} | {ends} |"))
    heading = ["| method | CAGrad's starts | NashMTL's starts | there, x on the front |", "|---|---|---|---|"]
    return "\n".join([*heading, *(line for *_, line in sorted(table, key=lambda row: row[:2], reverse=True))])


def draw(paths: Sequence[Trajectory]) -> Figure:
    """The paths of NashMTL's setting, a panel per method, on the average of the unscaled losses."""
    setting = SETTINGS[1]
    mine = {
        m: [p for p in paths if p.method == m and p.setting is setting] for m in dict.fromkeys(p.method for p in paths)
    }
    order = sorted(mine, key=lambda m: -sum(p.reached for p in mine[m]))
    columns = 6
    lines = -(-len(order) // columns)
    figure = Figure(figsize=(2.3 * columns, 2.3 * lines + 0.6), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel in panels[len(order) :]:
        panel.set_axis_off()
    for panel, method in zip(panels, order, strict=False):
        _panel(panel, mine[method])
        panel.set_title(f"{method}: {sum(p.reached for p in mine[method])} of {len(mine[method])}", fontsize=9.5)
    return figure


def _panel(panel: Axes, paths: Sequence[Trajectory]) -> None:
    ticks = np.linspace(-11, 11, 160)
    average = evaluate(np.stack(np.meshgrid(ticks, ticks), -1))[0].mean(-1)
    panel.contour(ticks, ticks, average, 14, cmap="Greys_r", linewidths=0.6, alpha=0.7)
    panel.plot(*FRONT.T, color="black", linewidth=3.5, solid_capstyle="butt")
    for p in paths:
        color = "#0072b2" if p.reached else "#d55e00"
        panel.plot(*p.points.T, color=color, linewidth=1.4)
        panel.plot(*p.points[0], "o", color="white", markeredgecolor="black", markersize=4.5)
        panel.plot(
            *p.points[-1], "o" if p.reached else "X", color=color, markeredgecolor="white", markersize=6, zorder=5
        )
    panel.set(xlim=(-11, 11), ylim=(-11, 11), xticks=(-7, 0, 7), yticks=(-8, 0, 8), aspect="equal")
    panel.tick_params(labelsize=7.5)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--methods", nargs="+", default=methods(), metavar="NAME")
    options = parser.parse_args()
    torch.set_num_threads(1)
    paths: list[Trajectory] = []
    for name in options.methods:
        found = run(name, SETTINGS[1:] if solo(name) else SETTINGS)
        paths += found
        ends = (f"({p.points[-1][0]:.1f}, {p.points[-1][1]:.1f}){' ' if p.reached else '!'}" for p in found)
        print(f"{name:20} {sum(p.reached for p in found)} of {len(found)}  {' '.join(ends)}", flush=True)
    save(paths, options.folder / "toy.csv")
    figure = draw(paths)
    figure.savefig(options.folder / "toy.png", dpi=110)
    print(options.folder / "toy.png")


if __name__ == "__main__":
    main()
