"""What every loss weighting promises: state, absent tasks, compiled code, and each way in."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastmtl
from fastmtl import DWA, HTW, LBTW, FeatureSurgery, LossWeighting, TaskGradients, UncertaintyWeighting
from fastmtl.weighting import WeightedSum
from tests import nets
from tests.asserts import assert_same_state, assert_untouched
from tests.weighting.literal import leaves, random_losses, step

Make = Callable[[], LossWeighting]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


# Those with state that moves by itself, made so that some of their epochs end in the middle of a test.
STATEFUL: dict[str, Make] = {
    "DWA": lambda: DWA(3, steps_per_epoch=4),
    "DWA, mean": lambda: DWA(3, steps_per_epoch=4, reduction="mean"),
    "DWA, window": lambda: DWA(3, window=2),
    "FAMO": lambda: fastmtl.FAMO(3, lr=0.1, after="next_batch"),
    "FAMO, sgd": lambda: fastmtl.FAMO(3, lr=0.1, optimizer="sgd", after="next_batch"),
    "LBTW": lambda: LBTW(3),
    "LBTW, epochs": lambda: LBTW(3, reset_each_epoch=True, steps_per_epoch=4, normalize="sum_to_one"),
    "HTW": lambda: HTW(3, 1, 40),
    "HTW, epochs": lambda: HTW(3, 1, 60, ramp="to_one", reset_each_epoch=True, steps_per_epoch=4),
    "PBI, running": lambda: fastmtl.PBI(3, preference=[1, 2, 3], ideal="running"),
    "RLW": lambda: fastmtl.RLW(3, generator=seeded()),
    "ReLoBRaLo": lambda: fastmtl.ReLoBRaLo(3, 0.5, 1.0, 0.5, generator=seeded()),
    "STCH, log": lambda: fastmtl.STCH(3, variant="log", warmup_epochs=1, steps_per_epoch=2),
    "SoftAdapt": lambda: fastmtl.SoftAdapt(3, beta=1.0, normalized=True, loss_weighted=True, order=2),
}
LEARNED: dict[str, Make] = {
    v: lambda v=v: UncertaintyWeighting(3, variant=v) for v in ("kendall", "gal", "liebel", "article")
} | {"IMTLL": lambda: fastmtl.IMTLL(3, init=0.5)}
# Without state that moves by itself.
PLAIN: dict[str, Make] = {
    "COSMOS": lambda: fastmtl.COSMOS(3, preference=[1, 2, 3], generator=seeded()),
    "ConstantWeighting": lambda: fastmtl.ConstantWeighting([1.0, -0.5, 3.0]),
    "EqualWeighting": lambda: fastmtl.EqualWeighting(3),
    "EqualWeighting, mean": lambda: fastmtl.EqualWeighting(3, reduction="mean"),
    "FAMO, no update": lambda: fastmtl.FAMO(3),
    "GeometricMean": lambda: fastmtl.GeometricMean(3),
    "GeometricMean, focus": lambda: fastmtl.GeometricMean(3, focus=[1]),
    "LogLoss": lambda: fastmtl.LogLoss(3),
    "PBI": lambda: fastmtl.PBI(3, preference=[1, 2, 3], ideal=0.1),
    "STCH": lambda: fastmtl.STCH(3, preference=[1, 2, 3]),
}
UNLEARNED = STATEFUL | PLAIN
ALL = UNLEARNED | LEARNED
SUMS = [name for name, make in UNLEARNED.items() if isinstance(make(), WeightedSum)]


def trained(make: Make, num_steps: int = 10) -> LossWeighting:
    weighting = make()
    for losses in random_losses(num_steps, 3):
        step(weighting, losses)
    return weighting


@pytest.mark.parametrize("num_steps", [0, 3, 8, 10])  # an epoch has 4
@pytest.mark.parametrize("name", UNLEARNED)
def test_a_fresh_object_resumes_bitwise(name: str, num_steps: int) -> None:
    weighting, fresh = trained(UNLEARNED[name], num_steps), UNLEARNED[name]()
    fresh.load_state_dict(weighting.state_dict(), strict=True)
    assert_same_state(weighting, fresh)
    for losses in random_losses(11, 3, absent=0.3):
        assert step(weighting, losses) == step(fresh, losses)
    assert_same_state(weighting, fresh)


@pytest.mark.parametrize("absent", [None, 1])
@pytest.mark.parametrize("name", ALL)
def test_the_weights_of_the_last_call_can_be_looked_at(name: str, absent: int | None) -> None:
    weighting = ALL[name]()
    assert weighting.weights is None
    for values in random_losses(9, 3):
        losses = [None if t == absent else x for t, x in enumerate(leaves(values))]
        weighting(losses).backward()
        slopes = torch.tensor([0.0 if x is None else float(x.grad) for x in losses], dtype=torch.float64)
        torch.testing.assert_close(weighting.weights, slopes, rtol=1e-5, atol=0)
    assert not weighting.weights.requires_grad


@pytest.mark.parametrize("name", UNLEARNED)
def test_casting_the_model_keeps_the_state(name: str) -> None:
    weighting = trained(UNLEARNED[name])
    with assert_untouched(weighting):
        nn.ModuleList([weighting]).half()


@pytest.mark.parametrize("num_steps", [0, 10])  # validation before the first step of training, too
@pytest.mark.parametrize("name", UNLEARNED)
def test_evaluation_moves_nothing(name: str, num_steps: int) -> None:
    weighting = trained(UNLEARNED[name], num_steps)
    data = [leaves(x) for x in random_losses(5, 3)]
    with assert_untouched(weighting):
        with torch.no_grad():
            for losses in data:
                weighting(losses)
        weighting.eval()
        for losses in data:
            weighting(losses).backward()
        with torch.inference_mode():
            assert weighting(torch.ones(3)).isfinite()
        weighting.slopes([*torch.ones(3)])
    training = copy.deepcopy(weighting).train()
    assert step(weighting, [1.0, None, 0.5]) == step(training, [1.0, None, 0.5])


@pytest.mark.parametrize("name", UNLEARNED)
def test_as_a_method_a_call_without_gradients_is_a_step_of_training(name: str) -> None:
    weighting, other = trained(UNLEARNED[name]), trained(UNLEARNED[name])
    other.load_state_dict(weighting.state_dict())
    losses = torch.tensor([1.0, 2.0, 3.0])
    with torch.no_grad():
        fastmtl.aggregate(torch.eye(3), weighting, losses=losses)
    step(other, losses.tolist())
    assert_same_state(weighting, other)


@pytest.mark.parametrize("num_steps", [0, 10])
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("name", UNLEARNED)
def test_a_loss_that_is_not_finite_moves_nothing(name: str, value: float, num_steps: int) -> None:
    """The weights are NaN, for a GradScaler to see; training goes on as if the step had not been."""
    weighting = trained(UNLEARNED[name], num_steps)
    with assert_untouched(weighting):
        found = step(weighting, [1.0, value, None])
    assert math.isnan(found[0])
    assert math.isnan(found[1])
    assert all(math.isfinite(x) for x in step(weighting, [1.0, 1.0, 1.0]))


@pytest.mark.parametrize("name", SUMS)
def test_weights_are_constants(name: str) -> None:
    """The scalar is ``sum w L``, and its slopes are w: nothing flows through the weights."""
    weighting, other = trained(UNLEARNED[name]), trained(UNLEARNED[name])
    other.load_state_dict(weighting.state_dict())
    losses = torch.rand(3, dtype=torch.float64, requires_grad=True)
    total = weighting(losses)
    total.backward()
    torch.testing.assert_close(total.detach(), losses.detach() @ losses.grad)
    assert other.slopes([*losses])[1].tolist() == losses.grad.tolist()
    assert [*weighting.parameters()] == []


@pytest.mark.parametrize("name", ALL)
def test_dtypes(name: str) -> None:
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2):
        losses = torch.tensor([1.0, 2.0, 3.0], dtype=dtype)
        assert ALL[name]()(losses).dtype == wide


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALL)
def test_weights_are_not_rounded_to_the_losses_dtype(name: str, dtype: torch.dtype) -> None:
    weighting, other = trained(ALL[name]), ALL[name]()
    for p in weighting.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    other.load_state_dict(weighting.state_dict())
    losses = torch.tensor([0.3, 0.7, 1.1], dtype=dtype)
    expected = torch.autograd.functional.jacobian(lambda x: other(x), losses.double())
    found = fastmtl.aggregate(torch.eye(3), weighting, losses=losses).weights
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_weights_beyond_the_range_of_the_losses_dtype() -> None:
    losses = torch.ones(2, dtype=torch.float16)
    out = fastmtl.aggregate(torch.eye(2), UncertaintyWeighting(2, init=-12), losses=losses)
    assert out.weights.tolist() == pytest.approx([math.exp(12)] * 2, rel=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_compiled_as_part_of_a_loss(name: str) -> None:
    """The same scalars, gradients and state as eager, over the ends of epochs, without a graph break."""
    torch.compiler.reset()  # one function for all: its cache has a limit
    eager = ALL[name]()
    weighting = ALL[name]()
    target = torch.rand(3, 5)

    def loss(module: LossWeighting, x: Tensor) -> Tensor:
        return module([*((x - target) ** 2).mean(1)])

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for i in range(10):
        x, y = (torch.full((3, 5), i / 10, requires_grad=True) for _ in range(2))
        a, b = loss(eager, x), compiled(weighting, y)
        a.backward()
        b.backward()
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(x.grad, y.grad)
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(value, weighting.state_dict()[key], equal_nan=True)


# ---- ways in ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", [None, 1])
@pytest.mark.parametrize("name", ALL)
def test_every_way_in_is_its_scalar_backward(name: str, absent: int | None) -> None:
    """Gradients of all parameters and the state, over steps that end an epoch."""
    model = nets.mlp()
    ways: dict[str, LossWeighting] = {way: ALL[name]() for way in ("scalar", "backward", "tasks", "layer", "aggregate")}
    layer = FeatureSurgery(ways["layer"], num_tasks=3)
    tasks = TaskGradients(model.trunk, num_tasks=3, heads=model.heads)
    shared, params = [*model.trunk.parameters()], [*model.parameters()]
    for i in range(9):
        x = torch.randn(6, 5, dtype=torch.float64) * (1 + i)

        def losses(x: Tensor = x) -> list[Tensor | None]:
            return [None if t == absent else loss for t, loss in enumerate(model.losses(x))]

        ways["scalar"](losses()).backward()
        expected = [p.grad for p in params]
        own = [p.grad for p in ways["scalar"].parameters()]

        model.zero_grad()
        gradients = nets.task_gradients(losses(), shared)
        out = fastmtl.aggregate(
            [[None if g is None else g[p] for g in gradients] for p in range(len(shared))],
            ways["aggregate"],
            losses=losses(),
        )
        for g, e in zip(out.grads, expected, strict=False):
            torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-6)

        fastmtl.backward(losses(), ways["backward"], model.trunk)
        check(ways["backward"], params, expected, own)

        for t in range(3):
            if t != absent:
                tasks.backward(t, model.losses(x)[t])
        tasks.combine(ways["tasks"])
        check(ways["tasks"], params, expected, own)

        zs = layer(model.trunk(x))
        layer.total(
            [None if t == absent else ((model.heads[t](zs[t]) - (-1) ** t * (t + 1)) ** 2).mean() for t in range(3)]
        ).backward()
        check(ways["layer"], params, expected, own)
        for weighting in ways.values():
            weighting.zero_grad()
    for weighting in ways.values():
        for key, value in ways["scalar"].state_dict().items():
            torch.testing.assert_close(weighting.state_dict()[key], value, equal_nan=True)


def check(weighting: LossWeighting, params: list, expected: list, own: list) -> None:
    for p, e in zip([*params, *weighting.parameters()], [*expected, *own], strict=True):
        torch.testing.assert_close(p.grad, e, rtol=1e-9, atol=1e-12)
    for p in params:
        p.grad = None


@pytest.mark.parametrize("name", ALL)
def test_a_call_that_raises_leaves_the_state(name: str) -> None:
    weighting = trained(ALL[name])
    model = nets.mlp()
    x = torch.randn(6, 5, dtype=torch.float64)
    weighting.zero_grad()

    def fail(grad: Tensor) -> None:
        raise MemoryError("out of memory")

    losses = model.losses(x)
    losses[2].register_hook(fail)
    with assert_untouched(weighting, model), pytest.raises(MemoryError):
        fastmtl.backward(losses, weighting, model.trunk)
    tasks = TaskGradients(model.trunk, num_tasks=3, heads=model.heads)
    for t in range(3):
        tasks.backward(t, model.losses(x)[t])
    with assert_untouched(weighting, model):
        with pytest.raises(ValueError, match="losses: expected 3 tasks, found 2"):
            tasks.combine(weighting, [*torch.ones(2)])
        with pytest.raises(ValueError, match="needs the values of the losses"):
            fastmtl.aggregate(torch.randn(3, 5), weighting)
        with pytest.raises(ValueError, match="losses: expected 2 tasks, found 3"):
            fastmtl.aggregate(torch.randn(2, 5), weighting, losses=torch.ones(3))
        for wrong in (torch.ones(4), [torch.tensor(1.0)] * 2):
            with pytest.raises(ValueError, match="losses: expected 3 tasks, found"):
                weighting(wrong)


def test_a_weighting_for_any_number_of_tasks() -> None:
    """It shows no weights, and absent tasks are no trouble."""

    class Doubled(LossWeighting):
        def scalar(self, losses: Tensor, tasks: list[int] | None) -> Tensor:
            self.note(torch.full_like(losses, 2), tasks)
            return 2 * losses.sum()

    weighting = Doubled()
    assert weighting([torch.tensor(1.0), None, torch.tensor(3.0)]) == 8
    assert weighting.weights is None
