"""What every data set of the demo is: rows of inputs and binary labels, tasks in groups, and words for them."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# What NumPy and zipfile raise on a file that is not an .npz archive, is damaged, or holds pickles.
UNSOUND = (ValueError, TypeError, AttributeError, EOFError, RuntimeError, SyntaxError, zipfile.BadZipFile, zlib.error)


class DataError(ValueError):
    """The data file is missing, unreadable, or not what the demo expects."""


@dataclass(frozen=True)
class Task:
    """One binary task: its name and its group in table and plots."""

    name: str
    group: str


@dataclass(frozen=True)
class Split:
    """One part of the rows: inputs [N, D] and labels [N, T], both float32."""

    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Dataset:
    """Tasks and the rows to learn them from.

    Attributes:
        title: what the rows are, in the plural.
        unit: the same in one word.
        origin: a sentence on where the data comes from, as far as a reader must know it; may be empty.
        groups: the groups of tasks in the order in which the tasks come, and what plots call them.
        tasks: T tasks.
        main: the index of the task that a method with a main task puts first.
        steps: training steps that make sense where the user names none.
        lr: first learning rate of all methods: of 2.5, 5, 10, 20, 40 thousandths the best for summed loss in these
            steps, by the mean AUC on the validation rows of three seeds.
        train: rows to train on.
        validation: rows to choose the best epoch of the single-task nets on; no other method sees them.
        held_out: rows that no method sees.
    """

    title: str
    unit: str
    origin: str
    groups: dict[str, str]
    tasks: list[Task]
    main: int
    steps: int
    lr: float
    train: Split
    validation: Split
    held_out: Split

    def members(self, group: str) -> Tensor:
        """Returns the indices of the tasks of a group."""
        return torch.tensor([index for index, task in enumerate(self.tasks) if task.group == group])

    def group_means(self, values: Tensor) -> list[float]:
        """Returns the mean of per-task values [T] over each group of tasks."""
        return [values[self.members(group)].mean().item() for group in self.groups]


def read_arrays(path: Path, names: Sequence[str], kind: str) -> dict[str, np.ndarray]:
    """Reads arrays out of an .npz file. Raises DataError, with the cause in one line, if it cannot."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except KeyError as error:
        raise DataError(f"{path} is not a {kind} file: {str(error).strip(chr(39))}") from error
    except UNSOUND as error:
        raise DataError(f"{path} is not a {kind} file in .npz format, or it is damaged") from error


def make_split(inputs: np.ndarray, labels: np.ndarray, tasks: Sequence[Task], unit: str) -> Split:
    """Converts one part of the rows. Raises DataError if a task has no positive or no negative row in it."""
    for task, count in zip(tasks, labels.sum(axis=0), strict=True):
        if count in (0, len(labels)):
            raise DataError(f"task {task.name!r}: {count} of {len(labels)} {unit} are positive, so it has no AUC")
    return Split(torch.from_numpy(inputs.astype(np.float32)), torch.from_numpy(labels.astype(np.float32)))
