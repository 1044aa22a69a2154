"""The demo's reviews: decoding, tasks, inputs, split, and unsound files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastmtl.demo import reviews
from fastmtl.demo.dataset import DataError, Dataset


def edited(folder: Path, **changes: np.ndarray) -> Path:
    """Writes the reviews file with some arrays replaced."""
    with np.load(reviews.REVIEWS) as file:
        arrays = {name: file[name] for name in file.files}
    path = folder / "edited.npz"
    np.savez(path, **{**arrays, **changes})
    return path


def test_shapes_and_ranges(reviews_file: reviews.Reviews) -> None:
    assert len(reviews_file.documents) == 22621
    assert len(reviews_file.words) == len(set(reviews_file.words)) == 1000
    assert (len(reviews_file.departments), len(reviews_file.classes)) == (6, 20)
    assert all(len(column) == 22621 for column in reviews_file.columns.values())
    assert set(reviews_file.columns["rating"]) == {1, 2, 3, 4, 5}
    assert set(reviews_file.columns["recommended"]) == {0, 1}


def test_first_review_decodes_to_its_words(reviews_file: reviews.Reviews) -> None:
    """The review reads: "Absolutely wonderful - silky and sexy and comfortable"; its author is 33."""
    assert set(reviews_file.decode(0)) == {"absolutely", "wonderful", "silky", "sexy", "comfortable"}
    assert reviews_file.departments[reviews_file.columns["department"][0]] == "Intimate"
    assert (reviews_file.columns["age"][0], reviews_file.columns["rating"][0]) == (33, 4)


def test_vocabulary_is_ordered_by_frequency(reviews_file: reviews.Reviews) -> None:
    counts = np.bincount(np.concatenate(reviews_file.documents), minlength=1000)
    assert (np.diff(counts) <= 0).all()
    assert counts[-1] > 0


def test_tasks_and_their_rates(reviews_file: reviews.Reviews) -> None:
    tasks, labels = reviews.make_labels(reviews_file)
    assert [sum(task.group == group for task in tasks) for group in reviews.GROUPS] == [3, 2, 6, 14]
    assert len({task.name for task in tasks}) == 25
    rates = dict(zip((task.name for task in tasks), labels.mean(axis=0), strict=True))
    published = {"recommended": 0.82, "5 stars": 0.55, "1 or 2 stars": 0.105, "any helpful vote": 0.54}
    assert {name: rates[name] for name in published} == pytest.approx(published, abs=0.006)
    assert rates["5 or more votes"] == pytest.approx(0.16, abs=0.006)
    assert sum(rates[name] for name in reviews_file.departments) == pytest.approx(1)


def test_documented_rates(reviews_file: reviews.Reviews) -> None:
    tasks, labels = reviews.make_labels(reviews_file)
    text = reviews.REVIEWS.with_name("README.md").read_text(encoding="utf-8")
    for task, rate in zip(tasks, labels.mean(axis=0), strict=True):
        assert f"{task.name.removeprefix('class ')} {rate:.1%}".replace("%", " %") in text


def test_no_two_tasks_are_the_same(reviews_file: reviews.Reviews) -> None:
    _, labels = reviews.make_labels(reviews_file)
    assert len(np.unique(labels, axis=1).T) == labels.shape[1]


def test_labels_do_not_leak_into_inputs(reviews_file: reviews.Reviews) -> None:
    """Whatever the labels are made from may change at will: the inputs stay, so they know nothing of it."""
    random = np.random.default_rng(0)
    shuffled = {
        name: column if name in ("age", "length") else random.permutation(column)
        for name, column in reviews_file.columns.items()
    }
    other = reviews.Reviews(
        reviews_file.words, reviews_file.departments, reviews_file.classes, reviews_file.documents, shuffled
    )
    assert not np.array_equal(reviews.make_labels(reviews_file)[1], reviews.make_labels(other)[1])
    train_rows = np.arange(10000)
    np.testing.assert_array_equal(reviews.make_inputs(reviews_file, train_rows), reviews.make_inputs(other, train_rows))


def test_held_out_rows_do_not_shape_the_inputs(reviews_file: reviews.Reviews) -> None:
    train_rows = np.arange(10000)
    documents = reviews_file.documents[:10000] + [d[:1] for d in reviews_file.documents[10000:]]
    columns = dict(reviews_file.columns, length=np.array([len(d) for d in documents]))
    columns["age"] = np.where(np.arange(22621) < 10000, columns["age"], 20)
    other = reviews.Reviews(reviews_file.words, reviews_file.departments, reviews_file.classes, documents, columns)
    ours, theirs = (reviews.make_inputs(r, train_rows) for r in (reviews_file, other))
    np.testing.assert_array_equal(ours[:10000], theirs[:10000])
    assert not np.array_equal(ours[10000:], theirs[10000:])


def test_inputs_are_tf_idf(reviews_file: reviews.Reviews) -> None:
    train_rows = np.arange(0, 22621, 2)
    inputs = reviews.make_inputs(reviews_file, train_rows)
    assert inputs.shape == (22621, 1001)
    document = reviews_file.documents[7]
    frequency = [sum(word in set(reviews_file.documents[row]) for row in train_rows) for word in document]
    expected = np.log((1 + len(train_rows)) / (1 + np.array(frequency)))
    np.testing.assert_allclose(inputs[7, document], 6 * expected / np.linalg.norm(expected), rtol=1e-5)
    assert np.count_nonzero(inputs[7, :-1]) == len(document)
    assert inputs[train_rows, -1].mean() == pytest.approx(0, abs=1e-5)


def test_split_is_a_partition_by_seed(reviews_file: reviews.Reviews, review_data: Dataset) -> None:
    _, labels = reviews.make_labels(reviews_file)
    parts = (review_data.train, review_data.validation, review_data.held_out)
    assert [len(part.inputs) for part in parts] == [len(part.labels) for part in parts] == [15835, 2262, 4524]
    np.testing.assert_array_equal(sum(part.labels.double().sum(0) for part in parts), labels.sum(axis=0))
    again, other = (reviews.make_dataset(reviews_file, seed) for seed in (0, 1))
    assert torch.equal(again.train.inputs, review_data.train.inputs)
    assert not torch.equal(other.train.inputs, review_data.train.inputs)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"age": np.zeros(5, np.uint8)}, "length must hold 5 integers"),
        ({"rating": np.zeros(22621)}, "rating must hold 22621 integers, found float64"),
        ({"delta": np.zeros(7, np.uint16)}, "delta must hold"),
        ({"words": np.array(["a", "b"])}, "within the vocabulary"),
        ({"words": np.arange(1000)}, "words must be a list of words"),
        ({"department": np.full(22621, 6, np.uint8)}, r"department must lie in 0\.\.5, found 6"),
        ({"words": np.array([{}] * 1000)}, "not a reviews file"),
    ],
)
def test_unsound_arrays_are_refused(tmp_path: Path, changes: dict[str, np.ndarray], words: str) -> None:
    with pytest.raises(DataError, match=words):
        reviews.load(edited(tmp_path, **changes))


def test_task_without_positives_is_refused(tmp_path: Path) -> None:
    path = edited(tmp_path, recommended=np.zeros(22621, np.uint8))
    with pytest.raises(DataError, match="'recommended': 0 of 15835"):
        reviews.make_dataset(reviews.load(path), seed=0)
