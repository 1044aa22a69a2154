"""Partial labels: losses of the labelled samples only, and training in which tasks come and go."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fastmtl
from fastmtl import FeatureSurgery, GradientMethod, LossWeighting, TaskGradients, labelled_losses
from tests.nets import Net, mlp

NAN = math.nan
SQUARES = nn.MSELoss(reduction="none")
NAMES = ["depth", "normals", "seg"]


def data(num_samples: int = 6, num_tasks: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions, targets and labels ``[B, T]``: the last task has none."""
    predictions = torch.randn(num_samples, num_tasks, dtype=torch.float64, requires_grad=True)
    labelled = torch.rand(num_samples, num_tasks) < 0.6
    labelled[0] = True
    labelled[:, -1] = False
    return predictions, torch.rand(num_samples, num_tasks, dtype=torch.float64), labelled


def loop(
    criterion: Callable[[Tensor, Tensor], Tensor], predictions: Tensor, targets: Tensor, labelled: Tensor
) -> list[Tensor | None]:
    """The definition, sample by sample: what is not labelled is never touched."""
    losses: list[Tensor | None] = []
    for t in range(predictions.shape[1]):
        terms = [criterion(predictions[b, t], targets[b, t]) for b in range(len(predictions)) if labelled[b, t]]
        losses.append(sum(terms[1:], terms[0]) / len(terms) if terms else None)
    return losses


def assert_same(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], *leaves: Tensor) -> None:
    """Values, and the gradients of an uneven sum; where no loss depends on an entry, the gradient is exactly 0."""
    assert [x is None for x in found] == [x is None for x in expected]
    for x, e in zip(found, expected, strict=True):
        if x is not None:
            assert x.shape == ()
            torch.testing.assert_close(x, e, rtol=1e-12, atol=0)
    grads = [
        torch.autograd.grad(sum((t + 1) * x for t, x in enumerate(losses) if x is not None), leaves, retain_graph=True)
        for losses in (found, expected)
    ]
    for g, e in zip(*grads, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=0)
        assert torch.equal(g == 0, e == 0)


# ---- values and gradients --------------------------------------------------------------------------------------------


def columns(x: Tensor) -> list[Tensor]:
    return [*x.unbind(1)]


def named(x: Tensor) -> dict[str, Tensor]:
    return dict(zip(NAMES, x.unbind(1), strict=True))


def named_in_another_order(x: Tensor) -> dict[str, Tensor]:
    return dict(reversed(named(x).items()))


@pytest.mark.parametrize("how", ["nan", "labelled"])
@pytest.mark.parametrize(
    "forms",
    [
        (Tensor.clone, Tensor.clone, Tensor.clone),
        (columns, columns, columns),
        (columns, Tensor.clone, tuple),
        (named, named, named),
        (named, named_in_another_order, named_in_another_order),
        (named, columns, Tensor.clone),
    ],
)
def test_against_a_loop_over_the_samples(forms: tuple[Callable, Callable, Callable], how: str) -> None:
    predictions, targets, labelled = data()
    expected = loop(SQUARES, predictions, targets, labelled)
    predict, aim, mark = forms
    marks = mark(labelled) if mark is not tuple else tuple(labelled.unbind(1))
    if how == "nan":
        found = labelled_losses(SQUARES, predict(predictions), aim(targets.masked_fill(~labelled, NAN)))
    else:
        found = labelled_losses(SQUARES, predict(predictions), aim(targets), marks)
    if predict is named:
        assert list(found) == NAMES
        found = list(found.values())
    assert isinstance(found, list)
    assert found[-1] is None
    assert_same(found, expected, predictions)


CRITERIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squares": SQUARES,
    "cross-entropy of logits": nn.BCEWithLogitsLoss(reduction="none"),
    "root: infinite slope at 0": lambda p, t: (p - t).abs().sqrt(),
    "logarithm: NaN at 0": lambda p, t: t.abs() * (p.abs().log() - t.abs().log()),
    "ratio: 0 / 0": lambda p, t: (p / t - 1) ** 2,
}


@pytest.mark.parametrize("garbage", [NAN, math.inf, -math.inf, 0.0, 1e300])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_whatever_lies_at_missing_entries_does_no_harm(criterion: str, garbage: float) -> None:
    """Values and gradients are those of the loop, bitwise 0 where nothing is labelled; also where slopes are NaN."""
    predictions, targets, labelled = data()
    with torch.no_grad():
        predictions[~labelled] = garbage
    found = labelled_losses(CRITERIA[criterion], predictions, targets.masked_fill(~labelled, garbage), labelled)
    assert_same(found, loop(CRITERIA[criterion], predictions, targets, labelled), predictions)
    found = labelled_losses(CRITERIA[criterion], predictions, targets.masked_fill(~labelled, NAN))
    assert_same(found, loop(CRITERIA[criterion], predictions, targets, labelled), predictions)


def test_a_criterion_that_refuses_values_does_not_see_missing_ones() -> None:
    criterion = nn.BCELoss(reduction="none")  # raises outside 0..1
    predictions, targets = torch.tensor([[0.5], [7.0]], requires_grad=True), torch.tensor([[1.0], [-3.0]])
    (loss,) = labelled_losses(criterion, predictions, targets, torch.tensor([[True], [False]]))
    torch.testing.assert_close(loss, torch.tensor(math.log(2)))
    with pytest.raises(RuntimeError, match="between 0 and 1"):
        labelled_losses(criterion, predictions, targets)


def test_what_is_labelled_is_not_hidden() -> None:
    """NaN in a target that is declared labelled, or in a prediction, is an error of the data or the net."""
    predictions, targets, _ = data()
    assert labelled_losses(SQUARES, predictions, targets * NAN, torch.ones(6, 3, dtype=torch.bool))[0].isnan()
    assert labelled_losses(SQUARES, predictions * NAN, targets)[0].isnan()


def test_labelled_throughout_it_is_the_criterions_mean() -> None:
    predictions, targets, _ = data()
    found = labelled_losses(SQUARES, predictions, targets)
    expected = [F.mse_loss(p, t) for p, t in zip(predictions.unbind(1), targets.unbind(1), strict=True)]
    assert_same(found, expected, predictions)


@pytest.mark.parametrize("ignore_index", [-100, 255])
def test_classes(ignore_index: int) -> None:
    logits = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    classes = torch.tensor([0, 1, ignore_index, 3, ignore_index, 2, 0])
    criterion = nn.CrossEntropyLoss(reduction="none")
    expected = F.cross_entropy(logits, classes, ignore_index=ignore_index)
    found = labelled_losses(criterion, [logits], [classes], ignore_index=ignore_index)
    assert_same(found, [expected], logits)
    labelled = classes != ignore_index
    assert_same(labelled_losses(criterion, [logits], [classes], [labelled]), [expected], logits)
    assert labelled_losses(criterion, [logits], [torch.full((7,), -100)]) == [None]


def test_dense_tasks_of_every_kind() -> None:
    """Per pixel: classes, depths, normals with channels second and last; per sample; each against its own pixels."""
    b, c, h, w = 3, 4, 5, 2
    logits, normals = (torch.randn(b, n, h, w, dtype=torch.float64, requires_grad=True) for n in (c, 3))
    depth = torch.randn(b, h, w, dtype=torch.float64, requires_grad=True)
    classes, aims = torch.randint(c, (b, h, w)), torch.randn(b, 3, h, w, dtype=torch.float64)
    depths = torch.randn(b, h, w, dtype=torch.float64)
    pixels, samples = torch.rand(b, h, w) < 0.5, torch.tensor([True, False, True])
    pixels[1] = False
    losses = labelled_losses(
        {
            "seg": nn.CrossEntropyLoss(reduction="none"),
            "marked seg": nn.CrossEntropyLoss(reduction="none"),
            "depth": nn.L1Loss(reduction="none"),
            "depth of samples": nn.L1Loss(reduction="none"),
            "mean depth": lambda p, t: (p - t).abs().mean((1, 2)),
            "cosines": lambda p, t: 1 - F.cosine_similarity(p, t, dim=1),
            "cosines, channels last": lambda p, t: 1 - F.cosine_similarity(p, t, dim=-1),
            "components": SQUARES,
            "known components": SQUARES,
        },
        {
            "seg": logits,
            "marked seg": logits,
            "depth": depth,
            "depth of samples": depth,
            "mean depth": depth,
            "cosines": normals,
            "cosines, channels last": normals.permute(0, 2, 3, 1),
            "components": normals,
            "known components": normals,
        },
        {
            "seg": classes.masked_fill(~pixels, -100),
            "marked seg": classes.masked_fill(~pixels, 10**6),
            "depth": depths.masked_fill(~pixels, NAN),
            "depth of samples": depths,
            "mean depth": depths,
            "cosines": aims,
            "cosines, channels last": aims.permute(0, 2, 3, 1),
            "components": aims,
            "known components": aims.masked_fill(aims < 0, NAN),
        },
        {
            "seg": None,
            "marked seg": pixels,
            "depth": None,
            "depth of samples": samples,
            "mean depth": samples,
            "cosines": pixels,
            "cosines, channels last": pixels,
            "components": pixels,
            "known components": None,
        },
    )
    seg = F.cross_entropy(logits.permute(0, 2, 3, 1)[pixels], classes[pixels])
    by_pixel, aims_by_pixel = (x.permute(0, 2, 3, 1)[pixels] for x in (normals, aims))
    cosines = (1 - F.cosine_similarity(by_pixel, aims_by_pixel, dim=-1)).mean()
    by_sample = F.l1_loss(depth[samples], depths[samples])
    expected = {
        "seg": seg,
        "marked seg": seg,
        "depth": F.l1_loss(depth[pixels], depths[pixels]),
        "depth of samples": by_sample,
        "mean depth": by_sample,
        "cosines": cosines,
        "cosines, channels last": cosines,
        "components": F.mse_loss(by_pixel, aims_by_pixel),
        "known components": F.mse_loss(normals[aims >= 0], aims[aims >= 0]),
    }
    assert_same([*losses.values()], [*expected.values()], logits, depth, normals)


@pytest.mark.parametrize("several", [list, tuple, nn.ModuleList, lambda c: dict(zip(NAMES, c, strict=True)), "modules"])
def test_a_criterion_per_task(several: Any) -> None:
    predictions, targets, labelled = data()
    criteria = [SQUARES, nn.L1Loss(reduction="none"), nn.SmoothL1Loss(reduction="none")]
    given = nn.ModuleDict(dict(zip(NAMES, criteria, strict=True))) if several == "modules" else several(criteria)
    found = labelled_losses(given, named(predictions), named(targets), labelled)
    expected = [loop(c, predictions, targets, labelled)[t] for t, c in enumerate(criteria)]
    assert_same([*found.values()], expected, predictions)


def test_the_criterion_of_an_absent_task_is_not_called() -> None:
    predictions, targets, labelled = data()

    def never(prediction: Tensor, target: Tensor) -> Tensor:
        raise AssertionError

    assert labelled_losses([SQUARES, SQUARES, never], predictions, targets, labelled)[2] is None
    assert labelled_losses(never, predictions, targets * NAN) == [None] * 3
    assert labelled_losses(never, predictions[:0], targets[:0]) == [None] * 3  # an empty batch


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("partial", [False, True])
def test_means_of_many_losses_in_16_bits(dtype: torch.dtype, partial: bool) -> None:
    """Their sum would overflow, or stop growing."""
    depth = torch.full((4, 64, 64), 10.0, dtype=dtype, requires_grad=True)
    target = torch.zeros(4, 64, 64, dtype=dtype)
    target[0] = NAN if partial else 0.0
    (loss,) = labelled_losses(SQUARES, [depth], [target])
    assert loss.dtype == torch.float32
    assert loss == 100
    loss.backward()
    expected = torch.full((4, 64, 64), 20 / ((3 if partial else 4) * 64 * 64), dtype=dtype)
    expected[0] = 0 if partial else expected[1, 0, 0]
    torch.testing.assert_close(depth.grad, expected)


def test_inputs_are_not_written() -> None:
    predictions, targets, labelled = data()
    targets = targets.masked_fill(~labelled, NAN)
    before = [x.clone() for x in (predictions, targets)]
    labelled_losses(SQUARES, predictions, targets)
    for x, b in zip((predictions, targets), before, strict=True):
        torch.testing.assert_close(x, b, rtol=0, atol=0, equal_nan=True)


class HostReads(TorchFunctionMode):
    """Counts what waits for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = ("tolist", "item", "__bool__", "__float__", "__int__", "__index__", "nonzero", "cpu")
        self.count += getattr(func, "__name__", "") in names
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("how", ["nan", "labelled"])
def test_one_read_by_the_host_for_all_tasks(how: str) -> None:
    predictions, targets, labelled = data()
    with HostReads() as reads:
        if how == "nan":
            labelled_losses(SQUARES, predictions, targets.masked_fill(~labelled, NAN))
        else:
            labelled_losses(SQUARES, predictions, targets, labelled)
    assert reads.count == 1


def test_masks_on_the_host_need_nothing_of_the_device() -> None:
    """The meta device has no values that could be read."""
    predictions, targets, labelled = data()
    found = labelled_losses(SQUARES, predictions.to("meta"), targets.to("meta"), labelled)
    assert [None if x is None else (x.device.type, x.shape) for x in found] == [("meta", ())] * 2 + [None]


@pytest.mark.parametrize(
    ("criterion", "predictions", "targets", "labelled", "kind", "error"),
    [
        ("mse", [torch.ones(2)], [torch.ones(2)], None, TypeError, "criterion.*callable.*str"),
        ([SQUARES] * 2, [torch.ones(2)], [torch.ones(2)], None, ValueError, "criterion: expected 1 tasks, found 2"),
        ([None], [torch.ones(2)], [torch.ones(2)], None, TypeError, "criterion.*callable.*NoneType"),
        (nn.MSELoss(), {"seg": torch.ones(2)}, {"seg": torch.ones(2)}, None, ValueError, "of seg.*reduction='none'"),
        (lambda p, t: 1.0, {"seg": torch.ones(2)}, {"seg": torch.ones(2)}, None, TypeError, "of seg.*float"),
        (SQUARES, 3.0, [torch.ones(2)], None, TypeError, "predictions: .*float"),
        (SQUARES, "ab", [torch.ones(2)], None, TypeError, "predictions: .*str"),
        (SQUARES, [], [], None, ValueError, "predictions: expected at least 1 tasks, found 0"),
        (SQUARES, torch.ones(2), [torch.ones(2)], None, ValueError, r"predictions: .*\[B, T\].*\[2\]"),
        (SQUARES, {"seg": 3.0}, {"seg": torch.ones(2)}, None, TypeError, "predictions of seg: .*float"),
        (SQUARES, {"seg": torch.tensor(1.0)}, {"seg": torch.ones(2)}, None, ValueError, "predictions of seg: .*scalar"),
        (SQUARES, {"seg": torch.ones(2)}, {"seg": None}, None, TypeError, "targets of seg: .*NoneType"),
        (SQUARES, {"seg": torch.ones(2)}, {"seg": torch.ones(3)}, None, ValueError, "of seg: expected 2.*found 3"),
        (SQUARES, {"seg": torch.ones(2)}, {"sge": torch.ones(2)}, None, ValueError, "targets: .*seg, found sge"),
        (SQUARES, [torch.ones(2)], {"seg": torch.ones(2)}, None, TypeError, "targets: expected no mapping"),
        (SQUARES, [torch.ones(2)], torch.ones(2, 3), None, ValueError, "targets: expected 1 tasks, found 3"),
        (SQUARES, [torch.ones(2)], [torch.ones(2)], torch.ones(2, 1), ValueError, "labelled of task 0: .*float32"),
        (SQUARES, [torch.ones(2)], [torch.ones(2)], [[True, True]], TypeError, "labelled of task 0: .*list"),
        (SQUARES, [torch.ones(2)], [torch.ones(2)], [torch.ones(3) > 0], ValueError, r"labelled of task 0: .*\[3\]"),
        # Shapes that broadcast would give a loss per pair of samples.
        (SQUARES, {"seg": torch.ones(5, 1)}, {"seg": torch.ones(5)}, None, ValueError, r"of seg: .*\[5, 5\]"),
        (SQUARES, [torch.ones(5)], [torch.ones(5, 1)], [torch.ones(5) > 0], ValueError, r"of task 0: .*\[5, 5\]"),
        # One loss per sample, but which values are known differs within samples.
        (lambda p, t: (p - t).sum(1), [torch.ones(5, 3)], [torch.ones(5, 3)], None, ValueError, r"task 0: .*\[5, 3\]"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Using a target size")  # what torch says of shapes that broadcast
def test_errors(
    criterion: Any, predictions: Any, targets: Any, labelled: Any, kind: type[Exception], error: str
) -> None:
    with pytest.raises(kind, match=error):
        labelled_losses(criterion, predictions, targets, labelled)


# ---- training in which tasks come and go -----------------------------------------------------------------------------

T = 4
BOUNDS = [0.1, 0.05, 0.2, 0.15]
METHODS: dict[str, Callable[[list[int]], Any]] = {  # for some of the T tasks; the others' absent tasks: their own tests
    "PCGrad": lambda tasks: fastmtl.PCGrad(order="fixed"),
    "GradVac": lambda tasks: fastmtl.GradVac(beta=0.2, order="fixed"),
    "MGDA": lambda tasks: fastmtl.MGDA(),
    "MGDA, loss+": lambda tasks: fastmtl.MGDA(normalization="loss+"),
    "PELTR": lambda tasks: fastmtl.PELTR([BOUNDS[t] for t in tasks], scale_heads=False),
    "PELTR, heads too": lambda tasks: fastmtl.PELTR([BOUNDS[t] for t in tasks]),
    "GradNorm": lambda tasks: fastmtl.GradNorm(lr=0.1, scale_heads=False),
    "GradNorm, Adam": lambda tasks: fastmtl.GradNorm(lr=0.1, optimizer="adam"),
    "Amortized": lambda tasks: fastmtl.Amortized(fastmtl.PCGrad(order="fixed"), update_every=2),
    "UncertaintyWeighting": lambda tasks: fastmtl.UncertaintyWeighting(len(tasks), init=0.3).double(),
    "DWA": lambda tasks: fastmtl.DWA(len(tasks)),
    "LBTW": lambda tasks: fastmtl.LBTW(len(tasks)),
    "HTW": lambda tasks: fastmtl.HTW(len(tasks), main=tasks.index(1), total_steps=20),
}


class Training:
    """A net with a head per task, trained by one way in on batches with partial labels."""

    def __init__(self, net: Net, method: Any) -> None:
        self.net, self.method = net, method
        self.num_tasks = len(net.heads)
        self.optimizer = torch.optim.SGD([*net.parameters(), *method.parameters()], lr=0.05)

    def losses(self, x: Tensor, targets: Tensor, features: Sequence[Tensor] | None = None) -> list[Tensor | None]:
        zs = [self.net.trunk(x)] * self.num_tasks if features is None else features
        predictions = [head(z).squeeze(-1) for head, z in zip(self.net.heads, zs, strict=True)]
        return labelled_losses(SQUARES, predictions, targets)

    def step(self, x: Tensor, targets: Tensor) -> Tensor:
        """The tasks' weights ``[T]``."""
        self.optimizer.zero_grad()
        weights = self.fill(x, targets)
        self.optimizer.step()
        return weights

    def fill(self, x: Tensor, targets: Tensor) -> Tensor:
        return fastmtl.backward(self.losses(x, targets), self.method, self.net.trunk).weights


class ThroughBackward(Training):
    def fill(self, x: Tensor, targets: Tensor) -> Tensor:
        return fastmtl.backward(self.losses(x, targets), self.method, self.net.trunk, filler="backward").weights


class Groups(Training):
    def fill(self, x: Tensor, targets: Tensor) -> Tensor:
        out = fastmtl.backward(self.losses(x, targets), self.method, self.net.trunk, groups="layer")
        return out.weights.abs().sum(0)  # 0 where it is in each group


class Lean(Training):
    def fill(self, x: Tensor, targets: Tensor) -> Tensor:
        losses, last = self.losses(x, targets), self.net.trunk[-1]
        return fastmtl.backward(losses, self.method, self.net.trunk, gramian_params=last).weights


class Layer(Training):
    def __init__(self, net: Net, method: Any) -> None:
        super().__init__(net, method)
        self.surgery = FeatureSurgery(method, self.num_tasks)

    def fill(self, x: Tensor, targets: Tensor) -> Tensor:
        self.surgery.total(self.losses(x, targets, self.surgery(self.net.trunk(x)))).backward()
        return self.surgery.result.weights


class Tasks(Training):
    def fill(self, x: Tensor, targets: Tensor) -> Tensor:
        rows = TaskGradients(self.net.trunk, self.num_tasks, heads=self.net.heads)
        for t, loss in enumerate(self.losses(x, targets)):
            if loss is not None:
                rows.backward(t, loss, retain_graph=True)
        return rows.combine(self.method).weights


class AtHand(Training):
    """Combines the trunk's gradients; the heads learn nothing."""

    def fill(self, x: Tensor, targets: Tensor) -> Tensor:
        losses, params = self.losses(x, targets), [*self.net.trunk.parameters()]
        rows = [None if x is None else torch.autograd.grad(x, params, retain_graph=True) for x in losses]
        columns = [[None if row is None else row[p] for row in rows] for p in range(len(params))]
        out = fastmtl.aggregate(columns, self.method, losses=losses)
        for p, grad in zip(params, out.grads, strict=True):
            p.grad = grad
        return out.weights


class Scalar(Training):
    """A loss weighting, called with the losses."""

    def fill(self, x: Tensor, targets: Tensor) -> Tensor:
        self.method(self.losses(x, targets)).backward()
        return self.method.weights


WAYS = [Training, ThroughBackward, Groups, Lean, Layer, Tasks, AtHand, Scalar]


def fits(way: type[Training], method: GradientMethod | LossWeighting) -> bool:
    """Whether this way in takes the method."""
    if isinstance(method, LossWeighting):
        return way is not Lean
    if way is Scalar or (way is Layer and method.scale_heads):
        return False
    return way is not Groups or not (method.single_group or method.scale_heads)


PAIRS = [
    pytest.param(name, way, id=f"{name}-{way.__name__}")
    for name, make in METHODS.items()
    for way in WAYS
    if fits(way, make([0, 1, 2, 3]))
]


def batches(absent: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
    """Per step the inputs and targets ``[8, T]``: some labels are missing, and all of the tasks that are absent."""
    steps = []
    for tasks in absent:
        targets = torch.randn(8, T, dtype=torch.float64) + torch.tensor([0.0, 2.0, -2.0, 4.0])
        targets[torch.rand(8, T) < 0.4] = NAN
        targets[0] = 1.0
        targets[:, list(tasks)] = NAN
        steps.append((torch.randn(8, 5, dtype=torch.float64), targets))
    return steps


def of_task(method: Any, t: int) -> dict[str, Tensor]:
    """The part of the state that is kept for a task: slices of whatever has a dimension of T."""
    parts = {}
    for name, x in method.state_dict().items():
        for dim, size in enumerate(x.shape):
            if size == T:
                parts[f"{name} {dim}"] = x.select(dim, t).clone()
    return parts


@pytest.mark.parametrize(("name", "way"), PAIRS)
def test_an_absent_task_takes_no_part(name: str, way: type[Training]) -> None:
    """Weight 0, no gradient for its head, no move of its state; whichever tasks are absent, and back again."""
    net = mlp(T)
    training = way(net, METHODS[name]([0, 1, 2, 3]))
    for absent, (x, targets) in zip(pattern := [(), (1,), (0, 3), (), (1, 2)], batches(pattern), strict=True):
        state = {t: of_task(training.method, t) for t in absent}
        heads = copy.deepcopy(net.heads)
        weights = training.step(x, targets)
        for t in absent:
            assert weights[t] == 0
            assert all(p.grad is None for p in net.heads[t].parameters())
            for p, before in zip(net.heads[t].parameters(), heads[t].parameters(), strict=True):
                assert torch.equal(p, before)
            for key, part in of_task(training.method, t).items():
                torch.testing.assert_close(part, state[t][key], rtol=0, atol=0, equal_nan=True, msg=key)
        assert weights.isfinite().all()
        assert (weights != 0).any()


@pytest.mark.parametrize(("name", "way"), [p for p in PAIRS if not p.id.startswith("DWA")])
def test_training_equals_that_of_the_present_tasks(name: str, way: type[Training]) -> None:
    """With a task that never comes, as without it. (DWA's weights sum to T, absent tasks included.)"""
    rest = [0, 1, 3]
    net = mlp(T)
    alone = mlp(len(rest))
    alone.trunk.load_state_dict(net.trunk.state_dict())
    for head, t in zip(alone.heads, rest, strict=True):
        head.load_state_dict(net.heads[t].state_dict())
    training, reference = way(net, METHODS[name]([0, 1, 2, 3])), way(alone, METHODS[name](rest))
    start = [p.clone() for p in net.trunk.parameters()]
    for x, targets in batches([(2,)] * 4):
        weights, expected = training.step(x, targets), reference.step(x, targets[:, rest])
        assert weights[2] == 0
        torch.testing.assert_close(weights[rest], expected, rtol=1e-9, atol=1e-9)
    for p, q, before in zip(net.trunk.parameters(), alone.trunk.parameters(), start, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
        assert not torch.equal(p, before)
    for t, head in zip(rest, alone.heads, strict=True):
        for p, q in zip(net.heads[t].parameters(), head.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("way", [Training, Lean, Layer, Scalar])
def test_a_batch_without_any_label_is_refused(way: type[Training]) -> None:
    training = way(mlp(T), METHODS["UncertaintyWeighting"]([0, 1, 2, 3]))
    ((x, targets),) = batches([(0, 1, 2, 3)])
    with pytest.raises(ValueError, match="expected at least one loss, found 4 tasks, all absent"):
        training.step(x, targets)


def test_a_mask_that_could_be_read_in_two_ways() -> None:
    """[B, S] against [B, S, D] is clear unless S = D; and always for class indices."""
    mse = nn.MSELoss(reduction="none")
    for d in (5, 4):
        x, y = torch.randn(2, 4, d, requires_grad=True), torch.randn(2, 4, d)
        tokens = torch.zeros(2, 4, dtype=torch.bool)
        tokens[:, 0] = True
        if d == 4:
            with pytest.raises(
                ValueError, match=r"labelled of task 0: shape \[2, 4\] may leave out dimension 1 or the last"
            ):
                labelled_losses(mse, [x], [y], [tokens])
            tokens = tokens.unsqueeze(-1).expand(2, 4, d)
        (loss,) = labelled_losses(mse, [x], [y], [tokens])  # type: ignore[misc]
        torch.testing.assert_close(loss, (x - y)[:, 0].pow(2).mean())
    scores, classes = torch.randn(2, 4, 4, requires_grad=True), torch.randint(4, (2, 4))
    classes[:, 2] = -100
    (loss,) = labelled_losses(nn.CrossEntropyLoss(reduction="none"), [scores], [classes])  # type: ignore[misc]
    torch.testing.assert_close(loss, nn.functional.cross_entropy(scores, classes))
