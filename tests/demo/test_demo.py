"""The demo: its data, its nets, its measurements, and its behaviour at the command line."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import fastmtl
from fastmtl import demo
from fastmtl.demo import data, model, report, train
from fastmtl.demo.methods import METHODS, Settings, Trainer
from fastmtl.demo.pair_loop import pcgrad_by_pairs


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small nets on a busy machine are fastest so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def reviews() -> data.Reviews:
    return data.load_reviews()


@pytest.fixture(scope="module")
def dataset(reviews: data.Reviews) -> data.Dataset:
    return data.make_dataset(reviews, seed=0)


def edited(folder: Path, **changes: np.ndarray) -> Path:
    """Writes the reviews file with some arrays replaced."""
    with np.load(data.REVIEWS) as file:
        arrays = {name: file[name] for name in file.files}
    path = folder / "edited.npz"
    np.savez(path, **{**arrays, **changes})
    return path


# ---- data ------------------------------------------------------------------------------------------------------------


def test_shapes_and_ranges(reviews: data.Reviews) -> None:
    assert len(reviews.documents) == 22621
    assert len(reviews.words) == len(set(reviews.words)) == 1000
    assert (len(reviews.departments), len(reviews.classes)) == (6, 20)
    assert all(len(column) == 22621 for column in reviews.columns.values())
    assert set(reviews.columns["rating"]) == {1, 2, 3, 4, 5}
    assert set(reviews.columns["recommended"]) == {0, 1}


def test_first_review_decodes_to_its_words(reviews: data.Reviews) -> None:
    """The review reads: "Absolutely wonderful - silky and sexy and comfortable"; its author is 33."""
    assert set(reviews.decode(0)) == {"absolutely", "wonderful", "silky", "sexy", "comfortable"}
    assert reviews.departments[reviews.columns["department"][0]] == "Intimate"
    assert (reviews.columns["age"][0], reviews.columns["rating"][0]) == (33, 4)


def test_vocabulary_is_ordered_by_frequency(reviews: data.Reviews) -> None:
    counts = np.bincount(np.concatenate(reviews.documents), minlength=1000)
    assert (np.diff(counts) <= 0).all()
    assert counts[-1] > 0


def test_tasks_and_their_rates(reviews: data.Reviews) -> None:
    tasks, labels = data.make_labels(reviews)
    assert [sum(task.group == group for task in tasks) for group in data.GROUPS] == [3, 2, 6, 14]
    assert len({task.name for task in tasks}) == 25
    rates = dict(zip((task.name for task in tasks), labels.mean(axis=0), strict=True))
    published = {"recommended": 0.82, "5 stars": 0.55, "1 or 2 stars": 0.105, "any helpful vote": 0.54}
    assert {name: rates[name] for name in published} == pytest.approx(published, abs=0.006)
    assert rates["5 or more votes"] == pytest.approx(0.16, abs=0.006)
    assert sum(rates[name] for name in reviews.departments) == pytest.approx(1)


def test_documented_rates(reviews: data.Reviews) -> None:
    tasks, labels = data.make_labels(reviews)
    text = data.REVIEWS.with_name("README.md").read_text(encoding="utf-8")
    for task, rate in zip(tasks, labels.mean(axis=0), strict=True):
        assert f"{task.name.removeprefix('class ')} {rate:.1%}".replace("%", " %") in text


def test_no_two_tasks_are_the_same(reviews: data.Reviews) -> None:
    _, labels = data.make_labels(reviews)
    assert len(np.unique(labels, axis=1).T) == labels.shape[1]


def test_labels_do_not_leak_into_inputs(reviews: data.Reviews) -> None:
    """Whatever the labels are made from may change at will: the inputs stay, so they know nothing of it."""
    random = np.random.default_rng(0)
    shuffled = {
        name: column if name in ("age", "length") else random.permutation(column)
        for name, column in reviews.columns.items()
    }
    other = data.Reviews(reviews.words, reviews.departments, reviews.classes, reviews.documents, shuffled)
    assert not np.array_equal(data.make_labels(reviews)[1], data.make_labels(other)[1])
    train_rows = np.arange(10000)
    np.testing.assert_array_equal(data.make_inputs(reviews, train_rows), data.make_inputs(other, train_rows))


def test_held_out_rows_do_not_shape_the_inputs(reviews: data.Reviews) -> None:
    train_rows = np.arange(10000)
    documents = reviews.documents[:10000] + [d[:1] for d in reviews.documents[10000:]]
    columns = dict(reviews.columns, length=np.array([len(d) for d in documents]))
    columns["age"] = np.where(np.arange(22621) < 10000, columns["age"], 20)
    other = data.Reviews(reviews.words, reviews.departments, reviews.classes, documents, columns)
    ours, theirs = (data.make_inputs(r, train_rows) for r in (reviews, other))
    np.testing.assert_array_equal(ours[:10000], theirs[:10000])
    assert not np.array_equal(ours[10000:], theirs[10000:])


def test_inputs_are_tf_idf(reviews: data.Reviews) -> None:
    train_rows = np.arange(0, 22621, 2)
    inputs = data.make_inputs(reviews, train_rows)
    assert inputs.shape == (22621, 1001)
    document = reviews.documents[7]
    frequency = [sum(word in set(reviews.documents[row]) for row in train_rows) for word in document]
    expected = np.log((1 + len(train_rows)) / (1 + np.array(frequency)))
    np.testing.assert_allclose(inputs[7, document], 6 * expected / np.linalg.norm(expected), rtol=1e-5)
    assert np.count_nonzero(inputs[7, :-1]) == len(document)
    assert inputs[train_rows, -1].mean() == pytest.approx(0, abs=1e-5)


def test_split_is_a_partition_by_seed(reviews: data.Reviews, dataset: data.Dataset) -> None:
    _, labels = data.make_labels(reviews)
    parts = (dataset.train, dataset.held_out)
    assert [len(part.inputs) for part in parts] == [len(part.labels) for part in parts] == [18097, 4524]
    np.testing.assert_array_equal(sum(part.labels.double().sum(0) for part in parts), labels.sum(axis=0))
    again, other = (data.make_dataset(reviews, seed) for seed in (0, 1))
    assert torch.equal(again.train.inputs, dataset.train.inputs)
    assert not torch.equal(other.train.inputs, dataset.train.inputs)


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
    with pytest.raises(data.DataError, match=words):
        data.load_reviews(edited(tmp_path, **changes))


def test_task_without_positives_is_refused(tmp_path: Path) -> None:
    path = edited(tmp_path, recommended=np.zeros(22621, np.uint8))
    with pytest.raises(data.DataError, match="'recommended': 0 of 18097"):
        data.make_dataset(data.load_reviews(path), seed=0)


# ---- nets and measures -----------------------------------------------------------------------------------------------


def test_auc_counts_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(6, (40, 3), generator=generator) / 5.0  # many ties
    labels = torch.randint(2, (40, 3), generator=generator).float()
    for task, value in enumerate(model.auc(scores, labels)):
        positive = scores[labels[:, task] == 1, task].tolist()
        negative = scores[labels[:, task] == 0, task].tolist()
        points = [1.0 if p > n else 0.5 if p == n else 0.0 for p, n in itertools.product(positive, negative)]
        assert value.item() == pytest.approx(sum(points) / len(points), abs=1e-12)


def test_auc_extremes() -> None:
    labels = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    assert model.auc(torch.tensor([[3.0, 1.0], [1.0, 3.0], [2.0, 2.0]]), labels).tolist() == [1.0, 0.0]


def test_heads_read_shared_and_own_features_alike() -> None:
    heads = model.Heads(4, 5)
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(heads(features), heads(features[:, None].expand(7, 4, 5)))
    torch.testing.assert_close(heads(features)[:, 2], features @ heads.weight[2] + heads.bias[2])


def test_single_task_nets_share_nothing() -> None:
    net = model.single_task_nets(6, 3)
    logits = net(torch.randn(5, 6, generator=torch.Generator().manual_seed(0)))
    reached = []
    for task in range(3):
        grads = torch.autograd.grad(logits[:, task].sum(), list(net.parameters()), retain_graph=True)
        reached.append(torch.cat([grad.flatten() for grad in grads]) != 0)
        assert reached[-1].any()
    assert torch.stack(reached).sum(dim=0).max() == 1


def test_task_losses_are_cross_entropies() -> None:
    logits = torch.tensor([[0.0, 2.0], [-1.0, 3.0]], dtype=torch.float64)
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    probability = 1 / (1 + np.exp(-logits.numpy()))
    right = np.where(labels.numpy() == 1, probability, 1 - probability)
    np.testing.assert_allclose(model.task_losses(logits, labels).numpy(), -np.log(right).mean(axis=0), rtol=1e-12)


def test_pair_loop_is_pcgrad(dataset: data.Dataset) -> None:
    """The loop that is timed computes what fastmtl computes."""
    grads = []
    for by_pairs in (True, False):
        torch.manual_seed(3)
        net = model.multi_task_net(1001, 25)
        losses = model.task_losses(net(dataset.train.inputs[:256]), dataset.train.labels[:256])
        if by_pairs:
            pcgrad_by_pairs(list(losses), list(net.trunk.parameters()), orders=[range(25)] * 25)
        else:
            fastmtl.backward(losses, fastmtl.PCGrad(order="fixed"), shared_params=net.trunk)
        grads.append(torch.cat([param.grad.flatten() for param in net.trunk.parameters() if param.grad is not None]))
    assert len(grads[0]) == 1001 * 64 + 64 + 64 * 32 + 32
    assert (grads[0] - grads[1]).norm() < 1e-4 * grads[1].norm()


def test_cosines_match_flattened_gradients(dataset: data.Dataset) -> None:
    trainer = Trainer(dataset, Settings(("sum",), steps=1, seed=0))
    inputs, labels = dataset.train.inputs[:64], dataset.train.labels[:64]
    losses, params = trainer.losses(inputs, labels), list(trainer.model.trunk.parameters())
    rows = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
    flat = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]).double()
    unit = flat / flat.norm(dim=1, keepdim=True)
    torch.testing.assert_close(train.cosines(trainer, inputs, labels), unit @ unit.t(), atol=1e-5, rtol=0)


def test_conflict_is_the_share_of_negative_pairs() -> None:
    nan = float("nan")
    first = torch.tensor([[1.0, -0.5, 0.2], [-0.5, 1.0, 0.0], [0.2, 0.0, 1.0]])
    second = torch.tensor([[1.0, -0.1, nan], [-0.1, 1.0, nan], [nan, nan, nan]])
    assert train.Record("", True, cosines=[first, second]).conflict() == 2 / 4


def test_cost_compares_the_same_turns() -> None:
    plain = train.Record("", True, turns={0: 1.0, 1: 10.0, 2: 1.0})
    assert train.Record("", False, turns={1: 30.0}).cost(plain) == 3.0


@pytest.mark.parametrize(("count", "size"), [(4, 53), (4, 3), (12, 53), (1, 1), (2, 3)])
def test_spread_stays_in_range(count: int, size: int) -> None:
    turns = train.spread(count, size)
    assert len(turns) == min(count, size)
    assert min(turns) >= 0
    assert max(turns) < size


def test_batches_visit_every_row_once_per_epoch() -> None:
    settings = Settings(("sum",), steps=1, seed=0, batch=10)
    epoch = list(itertools.islice(train.batches(60, settings), 6))
    assert sorted(torch.cat(epoch).tolist()) == list(range(60))


def test_total_steps_is_what_a_run_makes(dataset: data.Dataset) -> None:
    settings = Settings(("sum", "passes", "pair-loop"), steps=19, seed=0, batch=16, probes=1, timed_turns=2)
    done: list[int] = []
    outcome = train.run(dataset, settings, done.append)
    assert sum(done) == train.total_steps(settings)
    assert len(outcome.records["sum"].weights) == 19
    assert outcome.records["pair-loop"].auc is None


@pytest.mark.parametrize("name", [name for name, entry in METHODS.items() if name not in ("sum", "pair-loop")])
def test_every_method_lowers_the_losses(dataset: data.Dataset, name: str) -> None:
    trainer = METHODS[name].make(dataset, Settings((name,), steps=30, seed=0))
    inputs, labels = dataset.train.inputs[:256], dataset.train.labels[:256]
    before = trainer.losses(inputs, labels).sum().item()
    for _ in range(15):
        weights = trainer.step(inputs, labels)
    assert weights.shape == (25,)
    assert weights.isfinite().all()
    assert trainer.losses(inputs, labels).sum().item() < 0.95 * before


def test_weight_sums(dataset: data.Dataset) -> None:
    """What the closing text says of the sums of the weights."""
    sums = {}
    for name in ("sum", "gradnorm", "pcgrad", "mgda", "pcgrad-features", "mgda-features"):
        trainer = METHODS[name].make(dataset, Settings((name,), steps=2, seed=0))
        sums[name] = float(trainer.step(dataset.train.inputs[:64], dataset.train.labels[:64]).sum())
    assert sums["sum"] == 25
    assert sums["gradnorm"] == pytest.approx(25, abs=1e-4)
    assert sums["mgda"] == pytest.approx(1, abs=1e-6)
    assert sums["mgda-features"] == pytest.approx(1, abs=1e-6)
    assert min(sums["pcgrad"], sums["pcgrad-features"]) > 25 - 1e-4


# ---- report ----------------------------------------------------------------------------------------------------------


def made_up(aucs: dict[str, float], tasks: list[data.Task]) -> train.Outcome:
    """An outcome in which each method has one AUC everywhere."""
    records = {
        name: train.Record(
            METHODS[name].label,
            True,
            turns={0: 1.0},
            weights=[torch.ones(25)],
            cosines=[torch.eye(25)],
            auc=torch.full((25,), value, dtype=torch.float64),
        )
        for name, value in aucs.items()
    }
    return train.Outcome(records, [0])


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (0.7, "Summed loss is best on stars, votes"),
        (0.802, "No method that shares the trunk beats summed loss"),
        (0.9, "PCGrad, by about 0.10"),
    ],
)
def test_verdict_says_where_summed_loss_wins(reviews: data.Reviews, other: float, words: str) -> None:
    tasks, _ = data.make_labels(reviews)
    assert words in " ".join(report.verdict(made_up({"sum": 0.8, "pcgrad": other}, tasks), tasks))


def test_mgda_note_names_the_heaviest_tasks(dataset: data.Dataset) -> None:
    outcome = made_up({"sum": 0.8, "mgda": 0.7}, dataset.tasks)
    weights = torch.zeros(25)
    weights[[3, 10, 20]] = torch.tensor([0.3, 0.4, 0.2])
    outcome.records["mgda"].weights = [weights]
    rates = [
        f"{name} ({100 * dataset.train.labels[:, task].mean():.1f}% positive)"
        for name, task in (("Trend", 10), ("any helpful vote", 3), ("class Swim", 20))
    ]
    assert f"90% of its weight to {', '.join(rates)}:" in " ".join(report.quality_notes(outcome, dataset))


# ---- command line ----------------------------------------------------------------------------------------------------


def test_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "plots" / "here"
    assert demo.main(["--quick", "--out", str(folder), "--threads", "1"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["cosines.png", "cost.png", "losses.png", "quality.png"]
    for path in folder.iterdir():
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG\r\n")
        assert len(content) > 10_000
    out = capsys.readouterr().out
    lines = out.splitlines()
    for entry in METHODS.values():
        assert sum(line[:24].rstrip() == entry.label for line in lines) == 1, entry.label
    assert "18,097 clothing reviews" in out
    assert "rescale=" in out


def test_same_seed_same_quality(dataset: data.Dataset) -> None:
    methods = ("sum", "uncertainty", "gradnorm", "pcgrad", "gradvac", "mgda", "pcgrad-features", "mgda-features")
    settings = Settings(methods, steps=5, seed=7, batch=64, probes=1)
    first, second = (train.run(dataset, settings) for _ in range(2))
    for name in methods:
        assert torch.equal(first.records[name].auc, second.records[name].auc), name
        assert torch.equal(first.records[name].mean_weights(), second.records[name].mean_weights()), name


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
    content = data.REVIEWS.read_bytes()
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
