"""The demo's second data set: what 2,469 households buy in the next four weeks, by what they bought before.

The format, origin and licence of the file are described in ``data/README.md`` beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .dataset import DataError, Dataset, Task, make_split, read_arrays

GROCERIES = Path(__file__).with_name("data") / "groceries.npz"
GROUPS = {
    "grocery": "grocery: shelves, dairy, frozen",
    "produce": "produce",
    "fresh": "meat, fish, deli, bakery",
    "drugs": "drugstore and household",
}
GROUP_OF_DEPARTMENT = {
    "GROCERY": "grocery",
    "PRODUCE": "produce",
    **dict.fromkeys(("MEAT", "MEAT-PCKGD", "SEAFOOD", "SEAFOOD-PCKGD", "DELI", "PASTRY", "SALAD BAR"), "fresh"),
    **dict.fromkeys(("DRUG GM", "COSMETICS", "NUTRITION"), "drugs"),
}
SPANS = (4, 12)  # weeks that the inputs look back
AHEAD = 4  # weeks that the labels look forward
ORIGIN = (
    "The groceries are the Complete Journey by 84.51°. Whether the households are real is disputed between its "
    "packagings: the R package calls it a study of frequent shoppers, the Python package, from which this extract was "
    "made, simulated data for teaching. It shows methods, not how people shop."
)


@dataclass(frozen=True)
class Groceries:
    """Purchases as the file holds them.

    Attributes:
        tasks: one per category of goods, the category bought in most household-weeks first.
        bought: whether a household bought of a category in a week, [households, weeks, T], bool.
    """

    tasks: list[Task]
    bought: np.ndarray


def load(path: Path = GROCERIES) -> Groceries:
    """Reads and checks a groceries file. Raises DataError, with the cause in one line, if it is not sound."""
    arrays = read_arrays(path, ("categories", "departments", "department", "bought"), "groceries")
    problem = find_problem(arrays)
    if problem:
        raise DataError(f"{path} is not a sound groceries file: {problem}")
    departments = arrays["departments"][arrays["department"]].tolist()
    tasks = [
        Task(name, GROUP_OF_DEPARTMENT[department])
        for name, department in zip(arrays["categories"].tolist(), departments, strict=True)
    ]
    return Groceries(tasks, np.unpackbits(arrays["bought"], axis=2, count=len(tasks)).astype(bool))


def find_problem(arrays: dict[str, np.ndarray]) -> str | None:
    """Returns what is wrong with the arrays of a groceries file, or None."""
    for name in ("categories", "departments"):
        if arrays[name].ndim != 1 or arrays[name].dtype.kind != "U":
            return f"{name} must be a list of words, found {arrays[name].dtype} {list(arrays[name].shape)}"
    unknown = sorted(set(arrays["departments"].tolist()) - set(GROUP_OF_DEPARTMENT))
    if unknown:
        return f"unknown department {unknown[0]!r}"
    tasks, department, bought = len(arrays["categories"]), arrays["department"], arrays["bought"]
    if department.shape != (tasks,) or department.dtype != np.uint8:
        return f"department must hold {tasks} bytes, found {department.dtype} {list(department.shape)}"
    if tasks == 0 or department.max() >= len(arrays["departments"]):
        return f"department must lie in 0..{len(arrays['departments']) - 1}"
    if bought.ndim != 3 or bought.dtype != np.uint8 or bought.shape[2] != -(-tasks // 8):
        return (
            f"bought must hold bytes [households, weeks, {-(-tasks // 8)}], found {bought.dtype} {list(bought.shape)}"
        )
    if len(bought) < 100 or bought.shape[1] < SPANS[-1] + 4 * AHEAD:
        return f"{bought.shape[0]} households and {bought.shape[1]} weeks are too few"
    return None


def window(bought: np.ndarray, week: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns inputs [households, 2 T] and labels [households, T] as seen at the beginning of a week.

    The inputs are ln(1 + weeks with a purchase) over the last 4 and the last 12 weeks; they know nothing of this week
    or later. The labels tell whether there is a purchase within 4 weeks from this one on.
    """
    counts = [bought[:, week - span : week].sum(axis=1) for span in SPANS]
    return np.log1p(np.concatenate(counts, axis=1)), bought[:, week : week + AHEAD].max(axis=1)


def window_weeks(weeks: int) -> tuple[list[int], list[int], list[int]]:
    """Returns the weeks at which training, validation and held-out rows look ahead.

    No two look at the same weeks ahead: the last two windows are held out, the one before them is for validation.
    """
    starts = list(range(SPANS[-1], weeks - AHEAD + 1, AHEAD))
    return starts[:-3], starts[-3:-2], starts[-2:]


def make_dataset(groceries: Groceries) -> Dataset:
    """Splits by time and makes inputs and labels. Tasks are ordered by group.

    Raises:
        DataError: a task has no positive or no negative row in a part.
    """
    groups = list(GROUPS)
    order = sorted(range(len(groceries.tasks)), key=lambda index: groups.index(groceries.tasks[index].group))
    tasks, bought = [groceries.tasks[index] for index in order], groceries.bought[:, :, order]

    def rows(weeks: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        inputs, labels = zip(*(window(bought, week) for week in weeks), strict=True)
        return np.concatenate(inputs), np.concatenate(labels)

    parts = [make_split(*rows(weeks), tasks, "rows") for weeks in window_weeks(bought.shape[1])]
    most_bought = int(bought.sum(axis=(0, 1)).argmax())
    return Dataset("household months", "rows", ORIGIN, GROUPS, tasks, most_bought, 400, 2e-2, *parts)
