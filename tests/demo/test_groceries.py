"""The demo's groceries: decoding, tasks, windows without leaks, split by time, and unsound files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmtl.demo import groceries
from fastmtl.demo.dataset import DataError, Dataset
from fastmtl.demo.groceries import Groceries


def edited(folder: Path, **changes: np.ndarray) -> Path:
    """Writes the groceries file with some arrays replaced."""
    with np.load(groceries.GROCERIES) as file:
        arrays = {name: file[name] for name in file.files}
    path = folder / "edited.npz"
    np.savez(path, **{**arrays, **changes})
    return path


def test_file_is_small() -> None:
    assert groceries.GROCERIES.stat().st_size < 1_000_000


def test_marginals_of_the_source(groceries_file: Groceries) -> None:
    """Counts made from the package's tables by another program, which knew categories by number only."""
    bought = groceries_file.bought
    assert bought.shape == (2469, 53, 150)
    assert bought.sum() == 903_953
    assert bought.sum(axis=(0, 1))[:5].tolist() == [32450, 28773, 28623, 23066, 20255]
    assert (np.diff(bought.sum(axis=(0, 1))) <= 0).all()
    assert 0.10 < bought[:, 0].any(axis=1).mean() < 0.15  # the first week has one day
    assert 0.48 < bought[:, 1:].any(axis=2).mean() < 0.57


def test_bits_decode_one_by_one(groceries_file: Groceries) -> None:
    with np.load(groceries.GROCERIES) as file:
        packed = file["bought"]
    random = np.random.default_rng(0)
    for household, week, task in zip(*(random.integers(size, size=300) for size in (2469, 53, 150)), strict=True):
        bit = packed[household, week, task // 8] >> (7 - task % 8) & 1
        assert groceries_file.bought[household, week, task] == bool(bit)
    assert not (packed[:, :, -1] & 0b11).any()  # 150 bits in 19 bytes leave two


def test_names_and_groups(groceries_file: Groceries, grocery_data: Dataset) -> None:
    assert [task.name for task in groceries_file.tasks[:3]] == [
        "Fluid milk products",
        "Baked bread/buns/rolls",
        "Soft drinks",
    ]
    assert len({task.name for task in groceries_file.tasks}) == 150
    groups = [task.group for task in grocery_data.tasks]
    assert Counter(groups) == {"grocery": 77, "produce": 23, "fresh": 27, "drugs": 23}
    assert list(dict.fromkeys(groups)) == list(grocery_data.groups)  # in the order of the groups, each in one piece
    assert groups == sorted(groups, key=list(grocery_data.groups).index)
    by_name = {task.name: task.group for task in grocery_data.tasks}
    assert [by_name[name] for name in ("Eggs", "Carrots", "Bacon", "Oral hygiene products")] == list(
        grocery_data.groups
    )
    assert grocery_data.tasks[grocery_data.main].name == "Fluid milk products"


def test_documented_figures(grocery_data: Dataset) -> None:
    text = groceries.GROCERIES.with_name("README.md").read_text(encoding="utf-8")
    parts = (grocery_data.train, grocery_data.validation, grocery_data.held_out)
    rate = torch.cat([part.labels for part in parts]).mean().item()
    assert f"{100 * rate:.1f} % of the labels" in " ".join(text.split())
    assert "simulated" in text
    assert "simulated" in grocery_data.origin


def test_window_by_hand() -> None:
    """One household, one category, bought in weeks 1, 9, 10, 12 and 14, seen from week 13."""
    bought = np.zeros((1, 20, 1), bool)
    bought[0, [1, 9, 10, 12, 14]] = True
    inputs, labels = groceries.window(bought, week=13)
    np.testing.assert_allclose(inputs, [[np.log(1 + 3), np.log(1 + 4)]])
    assert labels.tolist() == [[True]]
    assert groceries.window(bought, week=15)[1].tolist() == [[False]]
    assert groceries.window(bought, week=14)[0][0, 1] == np.log(1 + 3)  # week 1 is no longer seen


@pytest.mark.parametrize("week", [12, 28, 48])
def test_inputs_know_nothing_of_the_weeks_ahead(groceries_file: Groceries, week: int) -> None:
    bought, random = groceries_file.bought[:200], np.random.default_rng(week)
    future, past = bought.copy(), bought.copy()
    future[:, week:] = random.random(future[:, week:].shape) < 0.5
    past[:, :week] = random.random(past[:, :week].shape) < 0.5
    inputs, labels = groceries.window(bought, week)
    np.testing.assert_array_equal(groceries.window(future, week)[0], inputs)
    np.testing.assert_array_equal(groceries.window(past, week)[1], labels)
    assert not np.array_equal(groceries.window(future, week)[1], labels)
    assert not np.array_equal(groceries.window(past, week)[0], inputs)


def test_split_by_time(grocery_data: Dataset, groceries_file: Groceries) -> None:
    train, validation, held_out = groceries.window_weeks(53)
    assert (train, validation, held_out) == ([12, 16, 20, 24, 28, 32, 36], [40], [44, 48])
    parts = (grocery_data.train, grocery_data.validation, grocery_data.held_out)
    assert [len(part.labels) for part in parts] == [7 * 2469, 2469, 2 * 2469]
    assert {part.inputs.shape[1] for part in parts} == {300}
    changed = groceries_file.bought.copy()
    changed[:, 44:] = changed[::-1, 44:]
    other = groceries.make_dataset(Groceries(groceries_file.tasks, changed))
    for name in ("train", "validation"):  # nothing from the held-out weeks gets in
        before, after = getattr(grocery_data, name), getattr(other, name)
        assert torch.equal(before.inputs, after.inputs)
        assert torch.equal(before.labels, after.labels)
    assert not torch.equal(grocery_data.held_out.labels, other.held_out.labels)


def test_rows_are_households_at_a_week(grocery_data: Dataset, groceries_file: Groceries) -> None:
    positions = {task.name: index for index, task in enumerate(groceries_file.tasks)}
    random = np.random.default_rng(1)
    for row, task in zip(random.integers(7 * 2469, size=100), random.integers(150, size=100), strict=True):
        week, household = 12 + 4 * (row // 2469), row % 2469
        weeks = groceries_file.bought[household, :, positions[grocery_data.tasks[task].name]]
        assert grocery_data.train.labels[row, task] == float(weeks[week : week + 4].any())
        short, long = grocery_data.train.inputs[row, [task, 150 + task]].expm1().round().tolist()
        assert (short, long) == (weeks[week - 4 : week].sum(), weeks[week - 12 : week].sum())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bought": np.zeros((2469, 53, 18), np.uint8)}, r"bought must hold bytes \[households, weeks, 19\]"),
        ({"bought": np.zeros((2469, 53, 19), np.int64)}, "bought must hold bytes"),
        ({"bought": np.zeros((2469, 20, 19), np.uint8)}, "2469 households and 20 weeks are too few"),
        ({"department": np.zeros(3, np.uint8)}, "department must hold 150 bytes"),
        ({"department": np.full(150, 12, np.uint8)}, r"department must lie in 0\.\.11"),
        ({"departments": np.array(["CANDLES"] * 12)}, "unknown department 'CANDLES'"),
        ({"categories": np.arange(150)}, "categories must be a list of words"),
        ({"categories": np.array([{}] * 150)}, "not a groceries file"),
    ],
)
def test_unsound_arrays_are_refused(tmp_path: Path, changes: dict[str, np.ndarray], words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        groceries.load(edited(tmp_path, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped"])
def test_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    content = groceries.GROCERIES.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
    path = tmp_path / "damaged.npz"
    path.write_bytes({"empty": b"", "truncated": content[:middle], "flipped": flipped}[damage])
    with pytest.raises(DataError, match="damaged"):
        groceries.load(path)


def test_category_never_bought_is_refused(groceries_file: Groceries) -> None:
    bought = groceries_file.bought.copy()
    bought[:, :, 3] = False
    with pytest.raises(DataError, match="'Cheese': 0 of 17283"):
        groceries.make_dataset(Groceries(groceries_file.tasks, bought))
