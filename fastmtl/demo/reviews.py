"""The demo's first data set: clothing reviews as word vectors, and 25 things to predict about each of them.

The format, origin and licence of the file are described in ``data/README.md`` beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .dataset import DataError, Dataset, Task, make_split, read_arrays

REVIEWS = Path(__file__).with_name("data") / "reviews.npz"
NUM_CLASSES = 14  # classes that become tasks
GROUPS = {
    "stars": "stars and recommendation",
    "votes": "helpful votes",
    "departments": "departments",
    "classes": "classes",
}
COLUMNS = ("length", "age", "rating", "recommended", "helpful", "department", "class")  # one value per review


@dataclass(frozen=True)
class Reviews:
    """Reviews as the file holds them.

    Attributes:
        words: the vocabulary, most frequent word first.
        departments: what the codes in the column "department" stand for, most frequent first.
        classes: the same for the column "class".
        documents: per review, the ascending indices of the words that occur in it.
        columns: per name in ``COLUMNS``, one integer per review.
    """

    words: list[str]
    departments: list[str]
    classes: list[str]
    documents: list[np.ndarray]
    columns: dict[str, np.ndarray]

    def decode(self, review: int) -> list[str]:
        """Returns the known words of one review, most frequent word of the vocabulary first."""
        return [self.words[index] for index in self.documents[review]]


def load(path: Path = REVIEWS) -> Reviews:
    """Reads and checks a reviews file. Raises DataError, with the cause in one line, if it is not sound."""
    arrays = read_arrays(path, (*COLUMNS, "words", "delta", "departments", "classes"), "reviews")
    problem = find_problem(arrays)
    if problem:
        raise DataError(f"{path} is not a sound reviews file: {problem}")
    columns = {name: arrays[name].astype(np.int64) for name in COLUMNS}
    parts = np.split(arrays["delta"].astype(np.int64), np.cumsum(columns["length"])[:-1])
    documents = [np.cumsum(part) for part in parts]
    if any(len(d) and (d[0] < 0 or d[-1] >= len(arrays["words"]) or (np.diff(d) <= 0).any()) for d in documents):
        raise DataError(f"{path} is not a sound reviews file: the words of a review must ascend within the vocabulary")
    words, departments, classes = (arrays[name].tolist() for name in ("words", "departments", "classes"))
    return Reviews(words, departments, classes, documents, columns)


def find_problem(arrays: dict[str, np.ndarray]) -> str | None:
    """Returns what is wrong with the shapes and ranges of the arrays of a reviews file, or None."""
    for name in ("words", "departments", "classes"):
        if arrays[name].ndim != 1 or arrays[name].dtype.kind != "U":
            return f"{name} must be a list of words, found {arrays[name].dtype} {list(arrays[name].shape)}"
    rows = arrays["age"].size
    for name in COLUMNS:
        if arrays[name].shape != (rows,) or arrays[name].dtype.kind not in "iu":
            return f"{name} must hold {rows} integers, found {arrays[name].dtype} {list(arrays[name].shape)}"
    if rows < 100:
        return f"{rows} reviews are too few"
    total, delta = int(arrays["length"].sum(dtype=np.int64)), arrays["delta"]
    if arrays["length"].min() < 0 or delta.shape != (total,) or delta.dtype.kind not in "iu":
        return f"delta must hold {total} integers, as length says, found {delta.dtype} {list(delta.shape)}"
    for name, names in (("department", "departments"), ("class", "classes")):
        if arrays[name].min() < 0 or arrays[name].max() >= len(arrays[names]):
            return f"{name} must lie in 0..{len(arrays[names]) - 1}, found {arrays[name].max()}"
    return None


def make_labels(reviews: Reviews) -> tuple[list[Task], np.ndarray]:
    """Returns the tasks and their labels [N, T] (bool).

    A class that is a whole department (Dresses, Trend) would be the same task twice and is left out; of the others the
    ``NUM_CLASSES`` most frequent become tasks.
    """
    columns = reviews.columns
    labels = {
        Task("recommended", "stars"): columns["recommended"] == 1,
        Task("5 stars", "stars"): columns["rating"] == 5,
        Task("1 or 2 stars", "stars"): columns["rating"] <= 2,
        Task("any helpful vote", "votes"): columns["helpful"] >= 1,
        Task("5 or more votes", "votes"): columns["helpful"] >= 5,
    }
    for code, name in enumerate(reviews.departments):
        labels[Task(name, "departments")] = columns["department"] == code
    classes = [code for code, name in enumerate(reviews.classes) if not is_department(reviews, code)]
    for code in classes[:NUM_CLASSES]:
        labels[Task(f"class {reviews.classes[code]}", "classes")] = columns["class"] == code
    return list(labels), np.stack(list(labels.values()), axis=1)


def is_department(reviews: Reviews, code: int) -> bool:
    """Tells whether a class holds exactly the reviews of one department."""
    members = reviews.columns["class"] == code
    return any(
        np.array_equal(members, reviews.columns["department"] == department)
        for department in range(len(reviews.departments))
    )


def make_inputs(reviews: Reviews, train: np.ndarray) -> np.ndarray:
    """Returns the inputs [N, words + 1], float32: tf-idf of the words, and the age.

    A word counts once per review, times ln(N / reviews with the word); the words of a review have norm 6, so that one
    entry is about 1. The age is standardised. Frequencies, mean and deviation come from the rows ``train`` alone.
    """
    rows = np.repeat(np.arange(len(reviews.documents)), reviews.columns["length"])
    inputs = np.zeros((len(reviews.documents), len(reviews.words) + 1), np.float32)
    inputs[rows, np.concatenate(reviews.documents)] = 1
    words, age = inputs[:, :-1], reviews.columns["age"]
    words *= np.log((1 + len(train)) / (1 + words[train].sum(axis=0)))
    words *= 6 / np.maximum(np.linalg.norm(words, axis=1, keepdims=True), 1e-6)
    inputs[:, -1] = (age - age[train].mean()) / max(age[train].std(), 1e-6)
    return inputs


def make_dataset(reviews: Reviews, seed: int) -> Dataset:
    """Splits the reviews at random and makes inputs and labels.

    A fifth is held out, a tenth is for validation.

    Args:
        reviews: what ``load`` returned.
        seed: of the split (NumPy's generator).

    Raises:
        DataError: a task has no positive or no negative review in a part.
    """
    rows = len(reviews.documents)
    order = np.random.default_rng(seed).permutation(rows)
    held_out, validation, train = np.split(order, [round(0.2 * rows), round(0.3 * rows)])
    tasks, labels = make_labels(reviews)
    inputs = make_inputs(reviews, train)
    parts = [make_split(inputs[part], labels[part], tasks, "reviews") for part in (train, validation, held_out)]
    main = tasks.index(Task("recommended", "stars"))
    return Dataset("clothing reviews", "reviews", "", GROUPS, tasks, main, 420, 1e-2, *parts)
