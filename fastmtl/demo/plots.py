"""The demo's plots. Needs matplotlib, which is optional: import this module only where it is wanted."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from .data import GROUPS, Dataset
from .report import group_means, members, shared_records
from .train import Outcome

TITLES = {
    "stars": "stars and recommendation",
    "votes": "helpful votes",
    "departments": "departments",
    "classes": "classes",
}
COLORS = {
    "sum": "#222222",
    "uncertainty": "#e69f00",
    "gradnorm": "#b8a200",
    "pcgrad": "#0072b2",
    "gradvac": "#56b4e9",
    "mgda": "#009e73",
    "pcgrad-features": "#cc79a7",
    "mgda-features": "#d55e00",
    "single": "#999999",
    "passes": "#bbbbbb",
    "pair-loop": "#7b3294",
}


def save_all(outcome: Outcome, data: Dataset, folder: Path) -> list[Path]:
    """Draws all plots into a folder and returns their paths."""
    figures = {
        "quality": quality(outcome, data),
        "cost": cost(outcome),
        "losses": losses(outcome, data),
        "cosines": cosines(outcome, data),
    }
    paths = [folder / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path, dpi=130)
    return paths


def quality(outcome: Outcome, data: Dataset) -> Figure:
    """Draws the mean AUC of each method per task group and over all tasks, one panel each."""
    records = {name: record for name, record in outcome.records.items() if record.auc is not None}
    panels = [*(TITLES[group] for group in GROUPS), "mean of all tasks"]
    figure = Figure(figsize=(13, 1.6 + 0.34 * len(records)), layout="constrained")
    for column, (axes, title) in enumerate(zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True)):
        scores = [r.auc for r in records.values() if r.auc is not None]
        values = [[*group_means(auc, data.tasks), auc.mean().item()][column] for auc in scores]
        for row, (name, value) in enumerate(zip(records, values, strict=True)):
            axes.plot([values[0], value], [row, row], color=COLORS[name], alpha=0.4, linewidth=2)
            axes.plot(value, row, "o", color=COLORS[name], markersize=8)
            axes.annotate(
                f"{value:.3f}",
                (value, row),
                (0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
            )
        axes.axvline(values[0], color=COLORS["sum"], linewidth=0.8, linestyle=":")
        axes.set_title(title, fontsize=11)
        axes.margins(x=0.25)
        axes.set_ylim(len(records) - 0.5, -0.7)
        axes.grid(axis="x", alpha=0.3)
        axes.locator_params(axis="x", nbins=5)
        axes.tick_params(axis="x", labelsize=8)
        axes.set_yticks(range(len(records)), [record.label for record in records.values()])
    figure.suptitle("Area under the ROC curve on held-out reviews (dotted line: summed loss)", fontsize=12)
    return figure


def cost(outcome: Outcome) -> Figure:
    """Draws the time of a step of each method as a multiple of the plain step's."""
    plain = outcome.records["sum"]
    costs = {name: record.cost(plain) for name, record in outcome.records.items()}
    names = sorted(costs, key=lambda name: costs[name])
    figure = Figure(figsize=(9, 1.6 + 0.34 * len(names)), layout="constrained")
    axes = figure.subplots()
    values = [costs[name] for name in names]
    axes.barh(range(len(names)), values, color=[COLORS[name] for name in names])
    for row, name in enumerate(names):
        milliseconds = 1e3 * outcome.records[name].step_time()
        axes.annotate(
            f"{costs[name]:.1f}x   ({milliseconds:.1f} ms)",
            (costs[name], row),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(names)), [outcome.records[name].label for name in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(values))
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel("time of a training step, relative to the step of summed loss in the same turn (median)")
    axes.set_title("Cost of a step, forward pass and optimizer included", fontsize=12)
    return figure


def relative_losses(values: list[Tensor], data: Dataset) -> Tensor:
    """Returns held-out losses [probes, T] relative to always predicting the share of positives."""
    rate = data.held_out.labels.mean(dim=0)
    entropy = torch.nn.functional.binary_cross_entropy(rate, rate, reduction="none")
    return torch.stack(values) / entropy


def losses(outcome: Outcome, data: Dataset) -> Figure:
    """Draws the held-out losses over the steps, one panel per task group."""
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    for axes, group in zip(figure.subplots(2, 2, sharex=True).flat, GROUPS, strict=True):
        low, first = 1.0, 0.0
        for name, record in outcome.records.items():
            if record.losses:
                curve = relative_losses(record.losses, data)[:, members(data.tasks, group)].mean(dim=1)
                style = "--" if name == "single" else "-"
                axes.plot(
                    outcome.probe_steps, curve.numpy(), style, color=COLORS[name], label=record.label, linewidth=1.8
                )
                low = min(low, curve.min().item())
                first = max(first, curve[1].item() if len(curve) > 1 else curve[0].item())
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set_ylim(low - 0.03, min(max(first, 1.05), 1.5))
        axes.set_title(TITLES[group], fontsize=11)
        axes.grid(alpha=0.3)
        if group in GROUPS[-2:]:
            axes.set_xlabel("training step")
    figure.supylabel(
        "held-out loss / loss of always predicting the share of positives (1 = learned nothing)", fontsize=10
    )
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.suptitle("Held-out losses over training, mean over the tasks of a group", fontsize=12)
    return figure


def cosines(outcome: Outcome, data: Dataset) -> Figure:
    """Draws the mean cosine between the tasks' gradients under summed loss."""
    mean = torch.stack(shared_records(outcome)[0].cosines).nanmean(dim=0)
    mean.fill_diagonal_(torch.nan)
    names = [task.name for task in data.tasks]
    bound = mean[~mean.isnan()].abs().quantile(0.98).item()
    figure = Figure(figsize=(11, 9.5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(mean.numpy(), cmap="RdBu", vmin=-bound, vmax=bound)
    axes.set_xticks(range(len(names)), names, rotation=55, ha="right", rotation_mode="anchor", fontsize=9)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    for position in range(1, len(names)):
        if data.tasks[position].group != data.tasks[position - 1].group:
            axes.axhline(position - 0.5, color="black", linewidth=0.8)
            axes.axvline(position - 0.5, color="black", linewidth=0.8)
    figure.colorbar(image, ax=axes, shrink=0.8, extend="both", label="mean cosine (red: conflict)")
    axes.set_title("Cosines between the tasks' gradients of the trunk, mean over training by summed loss", fontsize=12)
    return figure
