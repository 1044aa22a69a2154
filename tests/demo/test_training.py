"""The demo's nets, measures, methods, training and yardstick."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import fastmtl
from fastmtl.demo import measures, model, train, yardstick
from fastmtl.demo.dataset import Dataset, Split, Task
from fastmtl.demo.methods import METHODS, Settings, Trainer
from fastmtl.demo.pair_loop import pcgrad_by_pairs


def test_auc_counts_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(6, (40, 3), generator=generator) / 5.0  # many ties
    labels = torch.randint(2, (40, 3), generator=generator).float()
    for task, value in enumerate(measures.auc(scores, labels)):
        positive = scores[labels[:, task] == 1, task].tolist()
        negative = scores[labels[:, task] == 0, task].tolist()
        points = [1.0 if p > n else 0.5 if p == n else 0.0 for p, n in itertools.product(positive, negative)]
        assert value.item() == pytest.approx(sum(points) / len(points), abs=1e-12)


def test_auc_extremes() -> None:
    labels = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    assert measures.auc(torch.tensor([[3.0, 1.0], [1.0, 3.0], [2.0, 2.0]]), labels).tolist() == [1.0, 0.0]


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


def test_pair_loop_is_pcgrad(review_data: Dataset) -> None:
    """The loop that is timed computes what fastmtl computes."""
    grads = []
    for by_pairs in (True, False):
        torch.manual_seed(3)
        net = model.multi_task_net(1001, 25)
        losses = model.task_losses(net(review_data.train.inputs[:256]), review_data.train.labels[:256])
        if by_pairs:
            pcgrad_by_pairs(list(losses), list(net.trunk.parameters()), orders=[range(25)] * 25)
        else:
            fastmtl.backward(losses, fastmtl.PCGrad(order="fixed"), shared_params=net.trunk)
        grads.append(torch.cat([param.grad.flatten() for param in net.trunk.parameters() if param.grad is not None]))
    assert len(grads[0]) == 1001 * 64 + 64 + 64 * 32 + 32
    assert (grads[0] - grads[1]).norm() < 1e-4 * grads[1].norm()


def test_gramian_and_cosines_match_flattened_gradients(review_data: Dataset) -> None:
    trainer = Trainer(review_data, Settings(("sum",), steps=1, seed=0))
    inputs, labels = review_data.train.inputs[:64], review_data.train.labels[:64]
    losses, params = trainer.losses(inputs, labels), list(trainer.model.trunk.parameters())
    rows = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
    flat = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]).double()
    gramian = train.gramian(trainer, inputs, labels)
    torch.testing.assert_close(gramian, flat @ flat.t(), atol=1e-8, rtol=1e-5)
    unit = flat / flat.norm(dim=1, keepdim=True)
    torch.testing.assert_close(measures.cosines(gramian), unit @ unit.t(), atol=1e-5, rtol=0)


def test_measures_of_conflict() -> None:
    """Rows (1, 0), (-1, 1), (0, 0), (0, 2): one of three pairs conflicts; the sum is (0, 3)."""
    rows = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    gramian = rows @ rows.t()
    assert measures.conflicting_pairs(gramian) == 1 / 3
    assert measures.opposing_tasks(gramian) == 0
    assert measures.agreement(gramian) == pytest.approx(9 / 7)
    assert measures.opposing_tasks(torch.tensor([[1.0, -2.0], [-2.0, 9.0]])) == 0.5
    assert measures.agreement(torch.ones(5, 5)) == 5


def test_conflict_leaves_out_the_start() -> None:
    opposed, equal = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.ones(2, 2)
    assert train.Record("", True, gramians=[opposed, opposed, equal]).conflict() == 0.5


def test_delta_m_by_hand() -> None:
    """AUC 0.8 -> 0.9 and 0.5 -> 0.4: +12.5 % and -20 %; losses 0.2 -> 0.1 and 0.4 -> 0.5: +50 % and -25 %."""
    auc = measures.delta_m(torch.tensor([0.9, 0.4]), torch.tensor([0.8, 0.5]), higher_is_better=True)
    assert auc == pytest.approx((0.125 - 0.2) / 2)
    loss = measures.delta_m(torch.tensor([0.1, 0.5]), torch.tensor([0.2, 0.4]), higher_is_better=False)
    assert loss == pytest.approx((0.5 - 0.25) / 2)
    assert measures.delta_m(auc := torch.tensor([0.7, 0.9]), auc, higher_is_better=True) == 0


def test_outcome_compares_with_the_single_task_nets() -> None:
    single = train.Record("", False, auc=torch.tensor([0.8, 0.5]), log_loss=torch.tensor([0.2, 0.4]))
    plain = train.Record("", True, auc=torch.tensor([0.9, 0.4]), log_loss=torch.tensor([0.1, 0.5]))
    assert train.Outcome({"sum": plain, "single": single}, [0]).delta_m(plain) == pytest.approx((-0.0375, 0.125))
    assert train.Outcome({"sum": plain}, [0]).delta_m(plain) is None


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


def test_total_steps_is_what_a_run_makes(review_data: Dataset) -> None:
    settings = Settings(
        ("sum", "single", "passes", "pair-loop"), 19, seed=0, batch=512, probes=1, timed_turns=2, single_epochs=1
    )
    done: list[int] = []
    outcome = train.run(review_data, settings, done.append)
    assert sum(done) == train.total_steps(review_data, settings)
    assert len(outcome.records["sum"].weights) == 19
    assert outcome.records["pair-loop"].auc is None
    assert outcome.probe_steps == [0, 19]
    assert len(outcome.records["sum"].gramians) == len(outcome.records["sum"].losses) == 2


def small_data(rows: int = 120, tasks: int = 3) -> Dataset:
    """Labels that are signs of noisy linear functions: the last task is pure noise, which can only be overfitted."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3 * rows, 20, generator=generator)
    scores = inputs @ torch.randn(20, tasks, generator=generator)
    scores[:, -1] = torch.randn(3 * rows, generator=generator)
    labels = (scores + 0.5 * torch.randn(3 * rows, tasks, generator=generator) > 0).float()
    parts = [Split(inputs[part::3], labels[part::3]) for part in range(3)]
    names = [Task(f"task {task}", "all") for task in range(tasks)]
    return Dataset("", "rows", "", {"all": "all"}, names, 0, 10, 1e-2, *parts)


def test_yardstick_is_each_tasks_best_epoch() -> None:
    data = small_data()
    settings = Settings(("single",), steps=1, seed=0, batch=16, single_epochs=40)
    found = yardstick.train_single_tasks(data, settings)
    history = torch.stack(found.history)
    assert torch.equal(found.epochs, history.argmin(dim=0) + 1)
    assert len(set(found.epochs.tolist())) > 1
    assert found.epochs[-1] < found.epochs[0]
    for task, epoch in enumerate(found.epochs.tolist()):  # as if training had ended there
        stopped = Settings(("single",), steps=1, seed=0, batch=16, single_epochs=epoch)
        torch.testing.assert_close(yardstick.train_single_tasks(data, stopped).logits[:, task], found.logits[:, task])


def test_held_out_rows_do_not_choose_the_epoch() -> None:
    data = small_data()
    other = Dataset(
        *(getattr(data, name) for name in ("title", "unit", "origin", "groups", "tasks", "main", "steps", "lr")),
        data.train,
        data.validation,
        Split(data.held_out.inputs, 1 - data.held_out.labels),
    )
    settings = Settings(("single",), steps=1, seed=0, batch=16, single_epochs=5)
    first, second = (yardstick.train_single_tasks(d, settings) for d in (data, other))
    assert torch.equal(first.logits, second.logits)


@pytest.mark.parametrize("name", [name for name, entry in METHODS.items() if name not in ("sum", "pair-loop")])
def test_every_method_lowers_the_losses(review_data: Dataset, name: str) -> None:
    trainer = METHODS[name].make(review_data, Settings((name,), steps=30, seed=0))
    inputs, labels = review_data.train.inputs[:256], review_data.train.labels[:256]
    before = trainer.losses(inputs, labels).sum().item()
    for _ in range(15):
        weights = trainer.step(inputs, labels)
    assert weights.shape == (25,)
    assert weights.isfinite().all()
    assert trainer.losses(inputs, labels).sum().item() < 0.95 * before


def test_weight_sums(review_data: Dataset) -> None:
    """What the closing text says of the sums of the weights."""
    sums = {}
    for name in (
        "sum",
        "dwa",
        "gradnorm",
        "pcgrad",
        "mgda",
        "peltr",
        "pcgrad-features",
        "mgda-features",
        "peltr-features",
    ):
        trainer = METHODS[name].make(review_data, Settings((name,), steps=2, seed=0))
        sums[name] = float(trainer.step(review_data.train.inputs[:64], review_data.train.labels[:64]).sum())
    assert sums["sum"] == 25
    assert sums["gradnorm"] == pytest.approx(25, abs=1e-4)
    assert sums["dwa"] == pytest.approx(25, abs=1e-4)
    for name in ("mgda", "mgda-features", "peltr", "peltr-features"):
        assert sums[name] == pytest.approx(1, abs=1e-6), name
    assert min(sums["pcgrad"], sums["pcgrad-features"]) > 25 - 1e-4


def test_same_seed_same_quality(review_data: Dataset) -> None:
    methods = tuple(name for name, entry in METHODS.items() if entry.trained)
    settings = Settings(methods, steps=4, seed=7, batch=64, probes=1)
    first, second = (train.run(review_data, settings) for _ in range(2))
    for name in methods:
        assert torch.equal(first.records[name].auc, second.records[name].auc), name
        assert torch.equal(first.records[name].mean_weights(), second.records[name].mean_weights()), name
