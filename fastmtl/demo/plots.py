"""The demo's plots. Needs matplotlib, which is optional: import this module only where it is wanted."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from .dataset import Dataset
from .measures import cosines, relative_gain
from .report import shared_records
from .train import Outcome, Record

FEATURES = "-features"  # the same method at feature level: same colour, hollow or dashed
COLORS = {
    "sum": "#222222",
    "uncertainty": "#e69f00",
    "dwa": "#b8860b",
    "lbtw": "#d6604d",
    "htw": "#a50f15",
    "gradnorm": "#8c6bb1",
    "pcgrad": "#0072b2",
    "gradvac": "#41b6e6",
    "mgda": "#009e73",
    "peltr": "#8db600",
    "single": "#999999",
    "passes": "#bbbbbb",
    "pair-loop": "#4a6a8a",
}
LABELLED_TASKS = 40  # more tasks than that get no label of their own on the heat map


def color(name: str) -> str:
    """Returns a method's colour."""
    return COLORS[name.removesuffix(FEATURES)]


def save_all(outcome: Outcome, data: Dataset, folder: Path) -> list[Path]:
    """Draws all plots into a folder and returns their paths."""
    figures = {
        "quality": quality(outcome, data),
        "cost": cost(outcome),
        "losses": losses(outcome, data),
        "cosines": heat_maps(outcome, data),
    }
    paths = [folder / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path, dpi=130)
    return paths


def gains(outcome: Outcome) -> tuple[str, dict[str, Tensor]]:
    """Returns what the methods are compared with, and each method's relative gain in AUC per task [T], best first."""
    name = "single" if "single" in outcome.records else "sum"
    reference = outcome.records[name].auc
    assert reference is not None  # both are scored in every run
    found = {
        name: relative_gain(record.auc, reference, higher_is_better=True)
        for name, record in outcome.records.items()
        if record.auc is not None
    }
    order = sorted(found, key=lambda name: -found[name].mean().item())
    return outcome.records[name].label, {name: found[name] for name in order}


def quality(outcome: Outcome, data: Dataset) -> Figure:
    """Draws each method's relative gain in AUC: a dot per task, and the mean, over all tasks and per group."""
    label, values = gains(outcome)
    panels = {"all tasks": torch.arange(len(data.tasks))}
    panels.update({title: data.members(group) for group, title in data.groups.items()})
    figure = Figure(figsize=(15, 1.9 + 0.36 * len(values)), layout="constrained")
    for axes, (title, members) in zip(
        figure.subplots(1, len(panels), sharey=True, sharex=True), panels.items(), strict=True
    ):
        axes.axvline(0, color="black", linewidth=0.9)
        axes.axvline(100 * values["sum"][members].mean().item(), color=color("sum"), linewidth=0.9, linestyle=":")
        for row, (name, gain) in enumerate(values.items()):
            chosen = 100 * gain[members]
            hollow = name.endswith(FEATURES)
            axes.plot(chosen.numpy(), [row] * len(chosen), "|", color=color(name), alpha=0.45, markersize=9)
            face = "white" if hollow else color(name)
            axes.plot(
                chosen.mean(), row, "o", color=color(name), markerfacecolor=face, markersize=8, markeredgewidth=1.8
            )
            axes.annotate(
                f"{chosen.mean():+.1f}",
                (1, row),
                (-3, 0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=8,
            )
        axes.set_title(f"{title} ({len(members)})", fontsize=10)
        axes.grid(axis="x", alpha=0.3)
        axes.tick_params(axis="x", labelsize=8)
        axes.set_ylim(len(values) - 0.4, -0.6)
        axes.set_yticks(range(len(values)), [outcome.records[name].label for name in values])
    every = 100 * torch.stack(list(values.values()))
    low, high = every.min().item(), max(every.max().item(), every.min().item() + 1)
    figure.axes[0].set_xlim(low - 0.04 * (high - low), high + 0.36 * (high - low))  # room for the figures on the right
    figure.suptitle(
        f"Change of held-out AUC against {label}, in %: every task (|), their mean (o, = delta-m). "
        "Dotted: summed loss; hollow: at feature level",
        fontsize=12,
    )
    return figure


def cost(outcome: Outcome) -> Figure:
    """Draws the time of a step of each method as a multiple of the plain step's, on a logarithmic axis."""
    plain = outcome.records["sum"]
    costs = {name: record.cost(plain) for name, record in outcome.records.items()}
    names = sorted(costs, key=lambda name: costs[name])
    figure = Figure(figsize=(9, 1.6 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    for row, name in enumerate(names):
        hollow = name.endswith(FEATURES)
        axes.plot([1, costs[name]], [row, row], color=color(name), linewidth=2.5, linestyle="--" if hollow else "-")
        face = "white" if hollow else color(name)
        axes.plot(costs[name], row, "o", color=color(name), markerfacecolor=face, markersize=8, markeredgewidth=1.8)
        axes.annotate(
            f"{costs[name]:.3g}x  ({1e3 * outcome.records[name].step_time():.3g} ms)",
            (costs[name], row),
            (9, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), [outcome.records[name].label for name in names])
    axes.invert_yaxis()
    axes.set_xlim(min(0.9, 0.95 * min(costs.values())), 4 * max(costs.values()))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(axis="x", which="both", alpha=0.25)
    axes.set_axisbelow(True)
    axes.set_xlabel("time of a training step / time of a step of summed loss in the same turn (median)")
    axes.set_title("Cost of a step, forward pass and optimizer included (hollow: at feature level)", fontsize=12)
    return figure


def relative_loss(values: Tensor, members: Tensor, data: Dataset) -> Tensor:
    """Returns a group's held-out losses, summed, from [..., T], relative to predicting the share of positives."""
    rate = data.held_out.labels.mean(dim=0)
    entropy = torch.nn.functional.binary_cross_entropy(rate, rate, reduction="none")
    return values[..., members].sum(dim=-1) / entropy[members].sum()


def losses(outcome: Outcome, data: Dataset) -> Figure:
    """Draws the held-out losses over the steps, one panel per task group."""
    figure = Figure(figsize=(13, 8.5), layout="constrained")
    single = outcome.records.get("single")
    for axes, (group, title) in zip(figure.subplots(2, 2, sharex=True).flat, data.groups.items(), strict=True):
        members = data.members(group)
        ends: list[float] = []
        for name, record in outcome.records.items():
            if record.losses:
                curve = relative_loss(torch.stack(record.losses), members, data)
                style = "--" if name.endswith(FEATURES) else "-"
                axes.plot(
                    outcome.probe_steps,
                    curve.numpy(),
                    style,
                    color=color(name),
                    label=record.label,
                    linewidth=1.8,
                    zorder=3 if name == "sum" else 2,
                )
                ends += [curve.min().item(), curve[-1].item()]
        if single is not None and single.log_loss is not None:
            level = relative_loss(single.log_loss, members, data).item()
            axes.axhline(
                level, color=color("single"), linewidth=1.5, linestyle="-.", label=f"{single.label} (best epoch)"
            )
            ends.append(level)
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        top = max(*ends, 1) + 0.03
        axes.set_ylim(min(ends) - 0.06 * (top - min(ends)), top)
        axes.set_title(f"{title} ({len(members)} tasks)", fontsize=11)
        axes.grid(alpha=0.3)
    for axes in figure.axes[2:]:
        axes.set_xlabel("training step")
    figure.supylabel(
        "held-out loss / loss of always predicting the share of positives (1 = learned nothing)", fontsize=10
    )
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    figure.suptitle(
        "Held-out losses over training, summed over the tasks of a group (dashed: at feature level)", fontsize=12
    )
    return figure


def heat_maps(outcome: Outcome, data: Dataset) -> Figure:
    """Draws the cosines between the tasks' gradients before and after training by summed loss."""
    record: Record = shared_records(outcome)[0]
    maps = [cosines(gramian).fill_diagonal_(torch.nan) for gramian in (record.gramians[0], record.gramians[-1])]
    both = torch.stack(maps)
    bound = both[~both.isnan()].abs().quantile(0.98).item()
    many = len(data.tasks) > LABELLED_TASKS
    figure = Figure(figsize=(15, 7.6 if many else 7.9), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    edges = [0, *torch.tensor([len(data.members(group)) for group in data.groups]).cumsum(0).tolist()]
    for axes, values, title in zip(panels, maps, ("before training", "after training"), strict=True):
        image = axes.imshow(values.numpy(), cmap="RdBu", vmin=-bound, vmax=bound)
        pairs = values[~values.isnan()]
        axes.set_title(f"{title}: {(pairs < 0).double().mean():.0%} of the pairs conflict", fontsize=11)
        for edge in edges[1:-1]:
            axes.axhline(edge - 0.5, color="black", linewidth=0.8)
            axes.axvline(edge - 0.5, color="black", linewidth=0.8)
        if many:
            middles = [(low + high - 1) / 2 for low, high in pairwise(edges)]
            names = [f"{group} ({high - low})" for group, (low, high) in zip(data.groups, pairwise(edges), strict=True)]
            axes.set_xticks(middles, names, fontsize=10)
            axes.set_yticks(middles, names, fontsize=10, rotation=90, va="center")
            axes.tick_params(length=0)
        else:
            names = [task.name for task in data.tasks]
            axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=9)
            axes.set_yticks(range(len(names)), names, fontsize=9)
    figure.colorbar(image, ax=panels, shrink=0.7, extend="both", label="cosine (red: conflict)")
    figure.suptitle("Cosines between the tasks' gradients of the trunk, training by summed loss", fontsize=12)
    return figure
