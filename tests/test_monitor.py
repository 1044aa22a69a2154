"""Monitor: records against NumPy on the rows, no effect on training, and the words of the report."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastmtl
from fastmtl import diagnosis
from fastmtl.__main__ import main
from tests.nets import mlp

T = 3
METHODS: dict[str, Any] = {
    "PCGrad": fastmtl.PCGrad,
    "GradNorm": lambda: fastmtl.GradNorm(scale_heads=False),
    "Amortized": lambda: fastmtl.Amortized(fastmtl.MGDA(), update_every=2),
    "DWA": lambda: fastmtl.DWA(T, window=1),
    "UncertaintyWeighting": lambda: fastmtl.UncertaintyWeighting(T),
}


def literal(rows: np.ndarray) -> dict[str, Any]:
    """The measures of gradients ``[T, P]``, pair by pair."""
    pairs = [(i, j) for i in range(len(rows)) for j in range(i)]
    norms = [math.sqrt(g @ g) for g in rows]
    cosines = [rows[i] @ rows[j] / norms[i] / norms[j] for i, j in pairs]
    return {
        "norms": norms,
        "conflicts": sum(c < 0 for c in cosines) / len(pairs),
        "strong_conflicts": sum(c < -0.1 for c in cosines) / len(pairs),
        "mean_cosine": sum(cosines) / len(pairs),
        "min_cosine": min(cosines),
        "magnitude_similarity": sum(2 * norms[i] * norms[j] / (norms[i] ** 2 + norms[j] ** 2) for i, j in pairs)
        / len(pairs),
        "agreement": (rows.sum(0) ** 2).sum() / (rows**2).sum(),
        "condition": np.linalg.cond(rows / np.array(norms)[:, None]) ** 2,
    }


@pytest.mark.parametrize("num_tasks", [2, 5, 80])
def test_measures(num_tasks: int) -> None:
    torch.manual_seed(num_tasks)
    method = fastmtl.PCGrad()
    jacobian = torch.randn(num_tasks, 100, dtype=torch.float64) * torch.logspace(-1, 1, num_tasks)[:, None]
    losses = torch.rand(num_tasks)
    with fastmtl.Monitor(method) as monitor:
        out = fastmtl.aggregate(jacobian, method, losses=losses)
    (record,) = monitor.records
    assert record["step"] == 1
    assert record["weights"] == out.weights.tolist()
    assert record["losses"] == losses.double().tolist()
    for name, value in literal(jacobian.numpy()).items():
        assert record[name] == pytest.approx(value, rel=1e-7, abs=1e-12), name
    np.testing.assert_allclose(record["cosines"], out.cosines, rtol=1e-12, atol=1e-12)


def test_absent_zero_and_infinite() -> None:
    method = fastmtl.MGDA()
    rows = [torch.tensor([1.0, 0.0]), None, torch.zeros(2), torch.tensor([-1.0, 0.0])]
    with fastmtl.Monitor(method) as monitor:
        fastmtl.aggregate([rows], method)
        fastmtl.aggregate(torch.tensor([[1.0, float("inf")], [1.0, 0.0]]), fastmtl.MGDA())  # not this method
        fastmtl.aggregate([[torch.tensor([float("inf")])] * 2 + [torch.ones(1)] * 2], method)
    first, second = monitor.records
    assert first["norms"] == [1, None, 0, 1]
    assert (first["conflicts"], first["min_cosine"], first["agreement"]) == (1, -1, 0)
    assert first["condition"] is None
    assert first["cosines"][0] == [1, None, None, -1]
    assert second["weights"] == [None] * 4
    assert second["conflicts"] is None


def step(net: Any, method: Any, x: Tensor, way: str, surgery: Any) -> None:
    net.zero_grad()
    if way == "backward":
        fastmtl.backward(dict(zip("abc", net.losses(x), strict=True)), method, net.trunk)
    elif way == "lean":
        fastmtl.backward(net.losses(x), method, net.trunk, gramian_params=net.trunk[-1])
    elif way == "groups":
        fastmtl.backward(net.losses(x), method, net.trunk, groups="layer")
    elif way == "layer":
        pairs = zip(net.heads, surgery(net.trunk(x)), strict=True)
        surgery.total([((head(z) - (-1) ** t * (t + 1)) ** 2).mean() for t, (head, z) in enumerate(pairs)]).backward()
    elif way == "task_gradients":
        rows = fastmtl.TaskGradients(net.trunk, T, heads=net.heads)
        for t in range(T):
            rows.backward(t, net.losses(x)[t])
        rows.combine(method)
    elif isinstance(method, fastmtl.LossWeighting):
        method(net.losses(x)).backward()
    with torch.no_grad():
        for p in net.parameters():
            p -= 0.05 * p.grad


@pytest.mark.parametrize("way", ["backward", "lean", "groups", "layer", "task_gradients", "direct"])
@pytest.mark.parametrize("name", METHODS)
def test_training_is_as_without(name: str, way: str) -> None:
    """Weights are what the step used, losses those of the step; parameters and state are as without a monitor."""
    weighting = name in ("DWA", "UncertaintyWeighting")
    if (way == "direct" and not weighting) or (way == "lean" and weighting) or (way == "groups" and name != "PCGrad"):
        return
    found = []
    for watched in (False, True):
        torch.manual_seed(0)
        net, method = mlp(T), METHODS[name]()
        surgery = fastmtl.FeatureSurgery(method, T) if way == "layer" else None
        monitor = fastmtl.Monitor(method, every=2, flush_every=3) if watched else None
        for x in torch.randn(8, 6, 5, dtype=torch.float64):
            step(net, method, x, way, surgery)
        if monitor is not None:
            monitor.close()
        step(net, method, x, way, surgery)
        found.append([*net.state_dict().values(), *method.state_dict().values()])
        if monitor is not None:
            assert [record["step"] for record in monitor.records] == [1, 3, 5, 7]
            assert all(len(record["weights"]) == len(record["losses"]) == T for record in monitor.records)
            assert all((record["norms"] is None) == weighting for record in monitor.records[:1])
            assert monitor.names == (("a", "b", "c") if way == "backward" else ("task 0", "task 1", "task 2"))
    for plain, watched_ in zip(*found, strict=True):
        assert torch.equal(plain, watched_)


def test_groups_are_summed() -> None:
    torch.manual_seed(0)
    whole, split = fastmtl.MGDA(), fastmtl.MGDA()
    grads = [torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)]
    with fastmtl.Monitor(whole) as one, fastmtl.Monitor(split) as two:
        fastmtl.aggregate(torch.cat(grads, 1), whole)
        out = fastmtl.aggregate(grads, split, groups=[0, 1])
    assert two.records[0]["norms"] == pytest.approx(one.records[0]["norms"])
    assert two.records[0]["conflicts"] == one.records[0]["conflicts"]
    assert two.records[0]["weights"] == pytest.approx(out.weights.mean(0).tolist())


def test_a_reused_gramian_is_copied() -> None:
    method, gramian = fastmtl.PCGrad(), torch.eye(2, dtype=torch.float64)
    with fastmtl.Monitor(method) as monitor:
        method(gramian)
        gramian.mul_(4)
        method(gramian)
    assert [record["norms"] for record in monitor.records] == [[1, 1], [2, 2]]


def test_copies_and_checkpoints_take_no_monitor_along() -> None:
    import copy

    method = fastmtl.GradVac()
    before = [*method.state_dict()]
    with fastmtl.Monitor(method) as monitor:
        copy.deepcopy(method)(torch.eye(2))
        method.eval()(torch.eye(2))
        assert [*method.state_dict()] == before
    assert monitor.records == []


def run_of(losses: Tensor, scale: Tensor, opposed: bool, **options: Any) -> fastmtl.Monitor:
    """A made-up training run of 40 steps with 3 tasks."""
    torch.manual_seed(0)
    base = torch.eye(3, 300, dtype=torch.float64) + torch.eye(1, 300, dtype=torch.float64)
    if opposed:
        base[1] = -base[0]
    method = fastmtl.PCGrad()
    with fastmtl.Monitor(method, **options) as monitor:
        for k in range(40):
            rows = (base + 0.01 * torch.randn(3, 300)) * scale[:, None]
            values = dict(zip(("cart", "click", "order"), losses**k, strict=True))
            fastmtl.aggregate(rows, method, losses=values)
    return monitor


@pytest.mark.parametrize("trouble", ["none", "magnitude", "velocity", "direction"])
def test_report_names_the_trouble(trouble: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = torch.tensor([0.9, 1.0, 1.0] if trouble == "velocity" else [0.9, 0.9, 0.9])
    scale = torch.tensor([1.0, 100.0, 1.0] if trouble == "magnitude" else [1.0, 2.0, 1.0])
    paths = [tmp_path / "log.jsonl", tmp_path / "log.csv"]
    monitor = run_of(losses, scale, trouble == "direction", writers=[str(paths[0]), paths[1]], flush_every=7)
    text = monitor.report()
    for question in ("magnitude", "velocity", "direction"):
        assert f"{question}: {'TROUBLE' if question == trouble else 'fine'}." in text
        assert (f"Against {question}:" in text) == (question == trouble)
    assert ("tuned" in text) == (trouble == "none")
    words = {"magnitude": "click is typically", "velocity": "cart is down to", "direction": "cart and click"}
    assert words.get(trouble, "") in text
    answers = {"magnitude": "GradNorm", "velocity": "DWA", "direction": "PCGrad"}
    assert answers.get(trouble, "") in text.rpartition("Against")[2]
    for path in paths:  # a file holds as much, but for the matrices in a table
        again = diagnosis.report(*diagnosis.read(path))
        expected = " ".join(text.split())
        if path.suffix == ".csv":
            expected = re.sub(r"; most opposed.*?\)", "", expected)
        assert " ".join(again.split()) == expected
        assert main(["doctor", str(path)]) == 0
        assert capsys.readouterr().out == again + "\n"


def test_report_without_gradients() -> None:
    method = fastmtl.DWA(2, window=1)
    with fastmtl.Monitor(method) as monitor:
        for k in range(20):
            method([torch.tensor(0.9**k, requires_grad=True), torch.tensor(1.0, requires_grad=True)])
    text = monitor.report()
    assert "magnitude: unknown" in text
    assert "velocity: TROUBLE" in text
    with pytest.raises(ValueError, match="nothing was recorded"):
        fastmtl.Monitor(method).report()


def test_files_are_whole_after_each_hand_over(tmp_path: Path) -> None:
    method = fastmtl.MGDA()
    monitor = fastmtl.Monitor(method, [tmp_path / "a.jsonl", tmp_path / "a.csv"], flush_every=2)
    for _ in range(3):
        method(torch.eye(2), losses=[torch.tensor(1.0), None])
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert lines[0] == {"tasks": ["task 0", "task 1"], "method": "MGDA"}
    assert [line["step"] for line in lines[1:]] == [1, 2]
    assert lines[1]["losses"] == [1, None]
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [float(row["weights/task 1"]) for row in rows] == pytest.approx([0.5, 0.5])
    assert [row["losses/task 1"] for row in rows] == ["", ""]
    monitor.close()
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 4
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"step": 4, "wei')  # cut off
    assert len(diagnosis.read(tmp_path / "a.jsonl")[0]) == 3


class SummaryWriter:
    def __init__(self) -> None:
        self.found: dict[str, list[tuple[int, float]]] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.found.setdefault(tag, []).append((step, value))


def test_other_writers() -> None:
    board, seen = SummaryWriter(), []
    method = fastmtl.MGDA()
    with fastmtl.Monitor(method, [board, seen.append]) as monitor:
        method(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]))
    assert seen == monitor.records
    assert board.found["fastmtl/conflicts"] == [(1, 1.0)]
    assert board.found["fastmtl/norms/1"] == [(1, 2.0)]


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    monitor = run_of(torch.tensor([0.9, 1.0, 1.0]), torch.ones(3), True)
    figure = monitor.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:3] == ["weights", "gradient norms", "losses"]
    assert len(figure.axes[0].lines) == 3
    np.testing.assert_allclose(figure.axes[0].lines[1].get_ydata(), [r["weights"][1] for r in monitor.records])


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((3,), TypeError, "method: expected a fastmtl method"),
        ((fastmtl.MGDA(), "a.txt"), ValueError, r"writers: expected a path that ends in .jsonl or .csv, found 'a.txt'"),
        ((fastmtl.MGDA(), 3), TypeError, "writers: expected .* found 3"),
        ((fastmtl.MGDA(), None, 0), ValueError, "every: expected at least 1, found 0"),
    ],
)
def test_refuses(arguments: tuple, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        fastmtl.Monitor(*arguments)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.jsonl", "{}\n{}\n", "begin with the tasks"),
        ("a.jsonl", "x\ny\n", "a.jsonl:1"),
        ("a.csv", "x,y\n", "columns"),
    ],
)
def test_doctor_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, text: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=text):
        diagnosis.read(tmp_path / name)
    assert main(["doctor", str(tmp_path / name)]) == 1
    assert text in capsys.readouterr().err
