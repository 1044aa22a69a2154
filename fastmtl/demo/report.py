"""The closing table and text of the demo."""

from __future__ import annotations

import textwrap

import torch
from torch import Tensor

from .data import GROUPS, Dataset, Task
from .train import Outcome, Record

NEAR = 0.005  # differences of AUC below this are called equal


def members(tasks: list[Task], group: str) -> Tensor:
    """Returns the positions of the tasks of a group."""
    return torch.tensor([position for position, task in enumerate(tasks) if task.group == group])


def group_means(values: Tensor, tasks: list[Task]) -> list[float]:
    """Returns the mean of per-task values [T] over each group of tasks."""
    return [values[members(tasks, group)].mean().item() for group in GROUPS]


def table(outcome: Outcome, tasks: list[Task]) -> str:
    """Returns the closing table, one line per method."""
    head = f"{'':24}{'AUC on held-out reviews':^44}  {'cost of a step':^16} {'conflicting':>12}{'sum of':>9}"
    names = f"{'method':24}" + "".join(f"{name:>9}" for name in ("stars", "votes", "departm.", "classes", "mean"))
    names += f"  {'ms':>7}{'x plain':>9} {'pairs':>12}{'weights':>9}"
    lines = [head, names, "-" * len(names)]
    for record in outcome.records.values():
        cells = [""] * 5
        if record.auc is not None:
            cells = [f"{value:.3f}" for value in (*group_means(record.auc, tasks), record.auc.mean().item())]
        conflict = f"{record.conflict():.1%}" if record.cosines else "-"
        weights = f"{record.mean_weights().sum():.1f}" if record.trained else "-"
        cost = record.cost(outcome.records["sum"])
        line = f"{record.label:24}" + "".join(f"{cell or '-':>9}" for cell in cells)
        lines.append(line + f"  {1e3 * record.step_time():7.2f}{cost:9.2f} {conflict:>12}{weights:>9}")
    return "\n".join(lines)


def shared_records(outcome: Outcome) -> list[Record]:
    """Returns the records of the trained methods that share a trunk."""
    return [record for record in outcome.records.values() if record.cosines]


def verdict(outcome: Outcome, tasks: list[Task]) -> list[str]:
    """Returns sentences that compare summed loss with the other methods, group by group."""
    plain, others = outcome.records["sum"], [r for r in shared_records(outcome) if r.label != "summed loss"]
    if not others or plain.auc is None:
        return []
    wins: list[str] = []
    level: list[str] = []
    losses: list[str] = []
    own = [*group_means(plain.auc, tasks), plain.auc.mean().item()]
    rows = [(r, [*group_means(r.auc, tasks), r.auc.mean().item()]) for r in others if r.auc is not None]
    for column, group in enumerate((*GROUPS, "the mean over all tasks")):
        best, values = max(rows, key=lambda row: row[1][column])
        gain = values[column] - own[column]
        if gain > NEAR:
            losses.append(f"{group} ({best.label}, by about {gain:.2f})")
        else:
            (wins if gain < -NEAR else level).append(group)
    worse = [r.label for r, values in rows if values[-1] < own[-1] - NEAR]
    sentences = []
    if wins:
        sentences.append(f"Summed loss is best on {', '.join(wins)}.")
    if level:
        sentences.append(
            f"No method that shares the trunk beats summed loss by more than {NEAR} on {', '.join(level)}."
        )
    if losses:
        sentences.append(f"Summed loss is beaten on {', '.join(losses)}.")
    if worse:
        sentences.append(f"Summed loss beats these by more than {NEAR} in the mean: {', '.join(worse)}.")
    return [
        *sentences,
        "Its step is the cheapest: weigh every gain against the column 'x plain', the cost in steps of summed loss.",
    ]


def quality_notes(outcome: Outcome, data: Dataset) -> list[str]:
    """Returns sentences on what the methods and the shared trunk did to the quality."""
    tasks = data.tasks
    lines = verdict(outcome, tasks)
    single, plain = outcome.records.get("single"), outcome.records["sum"]
    if single is not None and single.auc is not None and plain.auc is not None:
        count = int((plain.auc < single.auc - NEAR).sum())
        lines.append(
            f"Without sharing (one net per task) {count} of {len(tasks)} tasks are better by more than {NEAR} "
            "than with summed loss: there sharing seems to harm."
        )
    if "mgda" in outcome.records:
        share, most = outcome.records["mgda"].mean_weights().topk(3)
        rates = data.train.labels.mean(dim=0)
        names = [f"{tasks[task].name} ({rates[task]:.1%} positive)" for task in most]
        lines.append(
            f"MGDA gave {share.sum():.0%} of its weight to {', '.join(names)}: it favours the tasks with the smallest "
            "gradients, and rare positives make small gradients."
        )
    lines.append(
        "This is one seed, and the rare classes have few positive reviews: try other seeds (--seed) before believing a "
        "difference in the second decimal."
    )
    return lines


def notes(outcome: Outcome, data: Dataset, judge: bool = True) -> str:
    """Returns the closing text. ``judge``: the run was long enough to speak of quality."""
    lines = ["These few steps show the course of the demo; they say nothing of quality or cost."]
    if judge:
        lines = quality_notes(outcome, data)
    lines.append(
        f"Weights: summed loss gives each of the {len(data.tasks)} tasks 1. PCGrad's and GradVac's sum to at least "
        "that (each removed conflict adds), MGDA's to 1, so with SGD a change of method changes the step size: "
        'rescale="sum_to_num_tasks" evens it out. Here Adam, which is nearly indifferent to the scale of gradients, '
        "trains every method at the same learning rate."
    )
    if "pair-loop" in outcome.records:
        lines.append(
            "'PCGrad (pair loop)' is the same mathematics as PCGrad, written as a Python loop over pairs; it and "
            "'T backwards, no surgery' make only a few steps, timed between those of the others."
        )
    lines.append(
        "Cost: methods take turns of a few steps; 'x plain' is the median over the turns of a step's time over that of "
        "summed loss in the same turn, so it need not be the ratio of the two ms. Conflicting pairs: task "
        "pairs whose gradients of the trunk have a negative cosine, on the same reviews for every method, all through "
        "training."
    )
    return "\n".join(textwrap.fill(line, 108, initial_indent="* ", subsequent_indent="  ") for line in lines)
