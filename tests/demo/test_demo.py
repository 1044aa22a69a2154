"""The demo's closing text, plots, and behaviour at the command line."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmtl import demo
from fastmtl.demo import groceries, report, reviews, train
from fastmtl.demo.dataset import Dataset
from fastmtl.demo.methods import METHODS
from fastmtl.demo.yardstick import Yardstick

# ---- report ----------------------------------------------------------------------------------------------------------


def made_up(aucs: dict[str, float], data: Dataset) -> train.Outcome:
    """An outcome in which each method has one AUC everywhere."""
    size = len(data.tasks)
    records = {
        name: train.Record(
            METHODS[name].label,
            METHODS[name].trained,
            turns={0: 1.0},
            weights=[torch.ones(size)],
            gramians=[torch.eye(size).double()] * 2 if METHODS[name].trained else [],
            auc=torch.full((size,), value, dtype=torch.float64),
            log_loss=1 - torch.full((size,), value, dtype=torch.float64),
        )
        for name, value in aucs.items()
    }
    return train.Outcome(records, [0, 1])


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (0.7, "Summed loss is best on stars, votes"),
        (0.802, "No method that shares the trunk beats summed loss"),
        (0.9, "PCGrad, by 0.100"),
    ],
)
def test_verdict_says_where_summed_loss_wins(review_data: Dataset, other: float, words: str) -> None:
    outcome = made_up({"sum": 0.8, "pcgrad": other}, review_data)
    assert words in " ".join(report.verdict(outcome, review_data))


def test_table_lines_up(review_data: Dataset, grocery_data: Dataset) -> None:
    for data in (review_data, grocery_data):
        head, names, rule, *lines = report.table(made_up({"sum": 0.8, "pcgrad": 0.9, "single": 0.8}, data), data).split(
            "\n"
        )
        assert {len(line) for line in (head, names, rule, *lines)} == {len(names)}
        assert lines[1].split() == ["PCGrad", *["0.900"] * 5, "+12.5", "+50.0", "1000.00", "1.00", "0.0%"]
        assert lines[2].split()[-5:] == ["+0.0", "+0.0", "1000.00", "1.00", "-"]


def test_yardstick_note_counts_tasks(review_data: Dataset) -> None:
    outcome = made_up({"sum": 0.8, "single": 0.8}, review_data)
    assert outcome.records["sum"].auc is not None
    outcome.records["sum"].auc[[1, 2, 3, 4]] = torch.tensor([0.7, 0.75, 0.9, 0.802]).double()
    stick = Yardstick(torch.zeros(1, 25), torch.arange(1, 26), [torch.zeros(25)] * 30)
    text = " ".join(report.yardstick_notes(train.Outcome(outcome.records, [0], stick), review_data))
    assert "1 to 25 of 30" in text
    change = (-0.1 - 0.05 + 0.1 + 0.002) / 0.8 / 25  # the largest part is that of task 1, or of task 3
    assert f"of summed loss's {100 * change:+.1f} % in AUC" in text
    assert re.search(r"(5 stars|any helpful vote) \(held out: \d+ positive reviews\) makes [+-]0\.5", text)
    assert "2 of 25 tasks are better by more than 0.005 of AUC than with summed loss, 1 are worse" in text


@pytest.mark.parametrize(
    ("gramian", "words"),
    [
        (torch.ones(3, 3), "0% of the pairs .* 0% of the gradients .* is 3.0 times .* pull the same way"),
        (torch.eye(3), "is 1.0 times .* hardly help each other"),
        (torch.tensor([[4.0, -1, -1], [-1, 1, 0.5], [-1, 0.5, 1]]), "67% of the pairs .* 0% .* is 0.5 times"),
    ],
)
def test_conflict_note(gramian: torch.Tensor, words: str) -> None:
    assert re.search(words, report.conflict_note(train.Record("", True, gramians=[-gramian, gramian])))


def test_kinds_note_names_the_best_of_each(review_data: Dataset) -> None:
    outcome = made_up({"sum": 0.8, "dwa": 0.81, "htw": 0.79, "mgda": 0.7, "pcgrad-features": 0.82}, review_data)
    outcome.records["pcgrad-features"].turns = {0: 3.0}
    assert report.kinds_note(outcome) == [
        "Mean AUC: summed loss 0.800; the best loss weighting 0.810 (DWA, 1.0 x plain); "
        "the best gradient method 0.820 (PCGrad (features), 3.0 x plain)."
    ]


@pytest.mark.parametrize(("tasks", "reason"), [((3, 10, 20), False), ((24, 10, 20), True)])
def test_mgda_note_names_the_heaviest_tasks(review_data: Dataset, tasks: tuple[int, int, int], reason: bool) -> None:
    outcome = made_up({"sum": 0.8, "mgda": 0.7}, review_data)
    weights = torch.zeros(25)
    weights[list(tasks)] = torch.tensor([0.3, 0.4, 0.2])
    outcome.records["mgda"].weights = [weights]
    names = [
        f"{review_data.tasks[task].name} ({100 * review_data.train.labels[:, task].mean():.1f}% positive)"
        for task in (tasks[1], tasks[0], tasks[2])  # the heaviest first
    ]
    text = " ".join(report.quality_notes(outcome, review_data))
    assert f"90% of its weight (equal shares: 12%) to {', '.join(names)}" in text
    assert ("rare positives" in text) == reason  # one of the first three is "any helpful vote", which is not rare


# ---- command line ----------------------------------------------------------------------------------------------------


PLOTS = ["cosines.png", "cost.png", "losses.png", "quality.png"]


def check_run(folder: Path, out: str, methods: list[str]) -> None:
    """Asserts that a run drew all plots, none blank, and printed one table line per method."""
    from matplotlib.image import imread

    assert sorted(path.name for path in folder.iterdir()) == PLOTS
    for path in folder.iterdir():
        pixels = imread(path)
        assert min(pixels.shape[:2]) > 300
        assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50, path.name
    lines = out.splitlines()
    for name in methods:
        assert sum(line[:24].rstrip() == METHODS[name].label for line in lines) == 1, name


def test_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "plots" / "here"
    assert demo.main(["--quick", "--out", str(folder), "--threads", "1"]) == 0
    out = capsys.readouterr().out
    check_run(folder, out, list(METHODS))
    assert "15,835 clothing reviews" in out
    assert "rescale=" in out


def test_quick_run_on_groceries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["sum", "htw", "pcgrad", "mgda-features", "single"]
    assert demo.main(["--data", "groceries", "--quick", "--methods", ",".join(methods), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    check_run(tmp_path, out, methods)
    assert "17,283 household months" in out
    assert "150 tasks" in out
    assert "disputed" in out


def test_chosen_methods_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--methods", "mgda-features", "--steps", "3", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "summed loss" in out
    assert "\nMGDA (features)" in out
    assert "\nGradVac" not in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--methods", "sum,adam"], "unknown method 'adam'"),
        (["--steps", "0"], "'0' is not a whole number of at least 1"),
        (["--threads", "-1"], "--threads"),
        (["--seed", "x"], "'x' is not a whole number"),
        (["--colour"], "--colour"),
        (["--data", "nowhere.npz"], "cannot read nowhere.npz: No such file"),
        (["--data", str(groceries.GROCERIES)], "groceries.npz is not a reviews file"),
    ],
)
def test_bad_option_is_one_line(
    argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main([*argv, "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert (out, err.count("\n")) == ("", 1)


def test_output_folder_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file"
    path.write_text("")
    assert demo.main(["--quick", "--out", str(path)]) == 2
    assert capsys.readouterr().err == f"fastmtl demo: cannot write to {path}: File exists\n"


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "flipped", "folder", "array missing", "npy"])
def test_damaged_file_is_one_line(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "damaged.npz"
    content = reviews.REVIEWS.read_bytes()
    middle = len(content) // 2
    if damage == "folder":
        path.mkdir()
    elif damage == "array missing":
        np.savez(path, words=np.array(["a"]))
    elif damage == "npy":
        with path.open("wb") as file:
            np.save(file, np.arange(3))
    else:
        path.write_bytes(
            {
                "empty": b"",
                "text": b"words,ages\n",
                "truncated": content[:middle],
                "flipped": content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :],
            }[damage]
        )
    assert demo.main(["--quick", "--data", str(path), "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert str(path) in err
    assert (out, err.count("\n")) == ("", 1)


def test_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "fastmtl.demo.plots", raising=False)
    assert demo.main(["--methods", "sum", "--steps", "2", "--out", str(tmp_path)]) == 0
    assert "no plots: matplotlib is not installed" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_without_tqdm(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert demo.main(["--methods", "sum", "--steps", "2", "--out", str(tmp_path)]) == 0
    assert "no progress bar: tqdm is not installed" in capsys.readouterr().out
