"""The closing table and text of the demo."""

from __future__ import annotations

import textwrap

from . import measures
from .dataset import Dataset
from .train import Outcome, Record

NEAR = 0.005  # differences of AUC below this are called equal
PULLING_TOGETHER = 2.0  # of agreement
RARE = 0.1  # share of positives
LOSS_WEIGHTINGS = ("uncertainty", "dwa", "lbtw", "htw")


def table(outcome: Outcome, data: Dataset) -> str:
    """Returns the closing table, one line per method."""
    widths = [max(9, len(group) + 2) for group in data.groups] + [8]
    quality = "".join(f"{name:>{width}}" for name, width in zip((*data.groups, "mean"), widths, strict=True))
    names = f"{'method':24}{quality} {'AUC':>8}{'log-loss':>10} {'ms':>8}{'x plain':>9} {'pairs':>12}"
    head = (
        f"{'':24}{'AUC on held-out rows':^{sum(widths)}} {'delta-m, %':^18} {'cost of a step':^17} {'conflicting':>12}"
    )
    lines = [head, names, "-" * len(names)]
    for record in outcome.records.values():
        cells = ["-"] * len(widths)
        if record.auc is not None:
            cells = [f"{value:.3f}" for value in (*data.group_means(record.auc), record.auc.mean().item())]
        delta = outcome.delta_m(record)
        gains = [f"{100 * value:+.1f}" for value in delta] if delta else ["-", "-"]
        conflict = f"{record.conflict():.1%}" if record.gramians else "-"
        cost = record.cost(outcome.records["sum"])
        line = f"{record.label:24}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        line += f" {gains[0]:>8}{gains[1]:>10} {1e3 * record.step_time():8.2f}{cost:9.2f} {conflict:>12}"
        lines.append(line)
    return "\n".join(lines)


def shared_records(outcome: Outcome) -> list[Record]:
    """Returns the records of the trained methods, which share a trunk; summed loss is the first."""
    return [record for record in outcome.records.values() if record.trained]


def verdict(outcome: Outcome, data: Dataset) -> list[str]:
    """Returns sentences that compare summed loss with the other methods, group by group."""
    plain, *others = shared_records(outcome)
    if not others or plain.auc is None:
        return []
    wins: list[str] = []
    level: list[str] = []
    losses: list[str] = []
    own = [*data.group_means(plain.auc), plain.auc.mean().item()]
    rows = [(r, [*data.group_means(r.auc), r.auc.mean().item()]) for r in others if r.auc is not None]
    for column, group in enumerate((*data.groups, "the mean over all tasks")):
        best, values = max(rows, key=lambda row: row[1][column])
        gain = values[column] - own[column]
        if gain > NEAR:
            losses.append(f"{group} ({best.label}, by {gain:.3f})")
        else:
            (wins if gain < -NEAR else level).append(group)
    worse = [r.label for r, values in rows if values[-1] < own[-1] - NEAR]
    sentences = []
    if wins:
        sentences.append(f"Summed loss is best on {', '.join(wins)}.")
    if level:
        sentences.append(
            f"No method that shares the trunk beats summed loss by more than {NEAR} of AUC on {', '.join(level)}."
        )
    if losses:
        sentences.append(f"Summed loss is beaten on {', '.join(losses)}.")
    if worse:
        sentences.append(f"Summed loss beats these by more than {NEAR} in the mean: {', '.join(worse)}.")
    return [
        *sentences,
        "Its step is the cheapest: weigh every gain against the column 'x plain', the cost in steps of summed loss.",
    ]


def yardstick_notes(outcome: Outcome, data: Dataset) -> list[str]:
    """Returns sentences that compare the methods with the single-task nets."""
    single, plain, yardstick = outcome.records.get("single"), outcome.records["sum"], outcome.yardstick
    if single is None or yardstick is None or single.auc is None or plain.auc is None:
        return []
    better = int((plain.auc < single.auc - NEAR).sum())
    worse = int((plain.auc > single.auc + NEAR).sum())
    first, last = int(yardstick.epochs.min()), int(yardstick.epochs.max())
    gains = measures.relative_gain(plain.auc, single.auc, higher_is_better=True) / len(data.tasks)
    extreme = int(gains.abs().argmax())
    return [
        "delta-m is the mean over the tasks of the relative change against one net per task, in AUC and in log-loss; "
        "above 0 is better in both. Each of those nets is taken at its own best epoch on validation rows "
        f"({first} to {last} of {len(yardstick.history)}), a choice that the methods are not given. One task can count "
        f"for much: of summed loss's {100 * gains.sum():+.1f} % in AUC, {data.tasks[extreme].name} (held out: "
        f"{data.held_out.labels[:, extreme].sum():.0f} positive {data.unit}) makes {100 * gains[extreme]:+.1f}.",
        f"Without sharing, {better} of {len(data.tasks)} tasks are better by more than {NEAR} of AUC than with summed "
        f"loss, {worse} are worse.",
    ]


def conflict_note(plain: Record) -> str:
    """Returns sentences on how the tasks' gradients lie to each other under summed loss."""
    pairs, opposing, agreement = (
        plain.mean_over_training(measure)
        for measure in (measures.conflicting_pairs, measures.opposing_tasks, measures.agreement)
    )
    return (
        f"Conflict: with summed loss {pairs:.0%} of the pairs of gradients have a negative cosine and "
        f"{opposing:.0%} of the gradients oppose the sum of all. The squared length of that sum is {agreement:.1f} "
        "times what orthogonal gradients would give (mean over the probes after the start): "
        + (
            "the tasks mostly pull the same way."
            if agreement > PULLING_TOGETHER
            else "the tasks hardly help each other."
        )
    )


def kinds_note(outcome: Outcome) -> list[str]:
    """Returns a sentence on what loss weighting and gradient methods reach at best."""
    plain, *others = shared_records(outcome)
    names = {record.label: name for name, record in outcome.records.items()}
    scores = {record.label: record.auc.mean().item() for record in others if record.auc is not None}
    cheap = {label: score for label, score in scores.items() if names[label] in LOSS_WEIGHTINGS}
    dear = {label: score for label, score in scores.items() if label not in cheap}
    if not cheap or not dear or plain.auc is None:
        return []
    best = [max(kind, key=lambda label: kind[label]) for kind in (cheap, dear)]
    costs = [outcome.records[names[label]].cost(plain) for label in best]
    return [
        f"Mean AUC: summed loss {plain.auc.mean():.3f}; the best loss weighting {cheap[best[0]]:.3f} ({best[0]}, "
        f"{costs[0]:.1f} x plain); the best gradient method {dear[best[1]]:.3f} ({best[1]}, {costs[1]:.1f} x plain)."
    ]


def quality_notes(outcome: Outcome, data: Dataset) -> list[str]:
    """Returns sentences on what the methods and the shared trunk did to the quality."""
    tasks = data.tasks
    lines = [
        *verdict(outcome, data),
        *kinds_note(outcome),
        *yardstick_notes(outcome, data),
        conflict_note(outcome.records["sum"]),
    ]
    if "mgda" in outcome.records:
        share, most = outcome.records["mgda"].mean_weights().topk(3)
        rates = data.train.labels.mean(dim=0)
        names = [f"{tasks[task].name} ({rates[task]:.1%} positive)" for task in most]
        why = (
            ": it favours small gradients, and rare positives make small gradients" if rates[most].max() < RARE else ""
        )
        lines.append(
            f"MGDA gave {share.sum():.0%} of its weight (equal shares: {3 / len(tasks):.0%}) to "
            f"{', '.join(names)}{why}."
        )
    if "htw" in outcome.records:
        lines.append(f"HTW's main task is {tasks[data.main].name}; all tasks count alike in the means.")
    lines.append(
        "This is one seed, and the best of many methods is flattered by chance: try other seeds (--seed) before "
        "believing a difference in the second decimal."
    )
    return lines


def weights_note(outcome: Outcome, data: Dataset) -> str:
    """Returns a sentence on the sums of the weights."""
    names = ("gradnorm", "pcgrad", "gradvac", "mgda", "peltr")
    records = [outcome.records[name] for name in names if name in outcome.records]
    sums = ", ".join(f"{record.label} {record.mean_weights().sum():.1f}" for record in records)
    return (
        f"Weights: summed loss gives each of the {len(data.tasks)} tasks 1{'; the sums here: ' if sums else ''}{sums}. "
        "PCGrad's and GradVac's sum to at least T (each removed conflict adds), MGDA's and PE-LTR's to 1, so with SGD "
        'a change of method changes the step size: rescale="sum_to_num_tasks" evens it out. Here Adam, which is nearly '
        "indifferent to the scale of gradients, trains every method at the same learning rate, chosen for summed loss."
    )


def notes(outcome: Outcome, data: Dataset, judge: bool = True) -> str:
    """Returns the closing text. ``judge``: the run was long enough to speak of quality."""
    lines = ["These few steps show the course of the demo; they say nothing of quality or cost."]
    if judge:
        lines = quality_notes(outcome, data)
    lines.append(weights_note(outcome, data))
    if "pair-loop" in outcome.records:
        lines.append(
            "'PCGrad (pair loop)' is the same mathematics as PCGrad, written as a Python loop over pairs; it and "
            "'T backwards, no surgery' make only a few steps, timed between those of the others."
        )
    lines.append(
        "Cost: methods take turns of a few steps; 'x plain' is the median over the turns of a step's time over that of "
        "summed loss in the same turn, so it need not be the ratio of the two ms. Conflicting pairs: task "
        "pairs whose gradients of the trunk have a negative cosine, on the same rows for every method, mean over the "
        "probes after the start."
    )
    if data.origin:
        lines.append(data.origin)
    return "\n".join(textwrap.fill(line, 108, initial_indent="* ", subsequent_indent="  ") for line in lines)
