"""What is done wrong in practice, through every way in: refused by name, and nothing has changed."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmtl
from fastmtl import FeatureSurgery, LossWeighting, TaskGradients
from tests.asserts import assert_untouched
from tests.nets import mlp, task_gradients

NAMES = ["depth", "normals", "seg"]
T = 3
Losses = dict[str, Tensor | None]


class Way:
    """One way in, with a net and a method that have trained one step already."""

    options: Mapping[str, Any] = {}

    def __init__(self, method: Any) -> None:
        self.net, self.method = mlp(T), method
        self.inputs = torch.randn(4, 6, 5, dtype=torch.float64)
        self.count = 0
        self.set_up()
        self.step(self.losses())

    def set_up(self) -> None:
        """What is made once."""

    def losses(self) -> Losses:
        """Of a fresh forward pass."""
        self.count += 1
        return dict(zip(NAMES, self.net.losses(self.inputs[self.count % 4]), strict=True))

    def step(self, losses: Any) -> Tensor:
        """The weights."""
        return fastmtl.backward(losses, self.method, **self.arguments()).weights

    def arguments(self) -> dict[str, Any]:
        return {"shared_params": self.net.trunk, **self.options}


class Filler(Way):
    options: Mapping[str, Any] = {"filler": "backward"}


class Chunks(Way):
    options: Mapping[str, Any] = {"chunk_size": 2}


class Found(Way):
    def arguments(self) -> dict[str, Any]:
        return {"model": self.net}


class Lean(Way):
    def arguments(self) -> dict[str, Any]:
        return {"shared_params": self.net.trunk, "gramian_params": self.net.trunk[2]}


class Layer(Way):
    def set_up(self) -> None:
        self.surgery = FeatureSurgery(self.method, T)

    def losses(self) -> Losses:
        self.count += 1
        zs = self.surgery(self.net.trunk(self.inputs[self.count % 4]))
        pairs = zip(self.net.heads, zs, strict=True)
        return {n: (head(z) - t).pow(2).mean() for t, (n, (head, z)) in enumerate(zip(NAMES, pairs, strict=True))}

    def step(self, losses: Any) -> Tensor:
        self.surgery.total(losses).backward()
        return self.surgery.result.weights


class Tasks(Way):
    def set_up(self) -> None:
        self.rows = TaskGradients(self.net.trunk, T, heads=self.net.heads, names=NAMES)

    def step(self, losses: Any) -> Tensor:
        self.rows.zero()
        for t, name in enumerate(NAMES):
            if losses[name] is not None:
                self.rows.backward(t, losses[name], retain_graph=True)
        return self.combine()

    def combine(self, losses: Any = None, **options: Any) -> Tensor:
        return self.rows.combine(self.method, losses, **options).weights


class AtHand(Way):
    """Gradients are there; the losses come along."""

    def step(self, losses: Any) -> Tensor:
        params = [*self.net.trunk.parameters()]
        rows = task_gradients(self.net.losses(self.inputs[0]), params)
        columns = [[row[p] for row in rows] for p in range(len(params))]
        return fastmtl.aggregate(columns, self.method, losses=losses).weights


class Ready(Way):
    """A Gramian is there."""

    def step(self, losses: Any) -> Tensor:
        rows = torch.randn(T, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(self.count))
        return self.method(rows @ rows.T, losses=losses)


class Scalar(Way):
    """A loss weighting, called."""

    def step(self, losses: Any) -> Tensor:
        self.method(losses).backward()
        return self.method.weights


METHODS: dict[str, Callable[[], Any]] = {
    "PCGrad": lambda: fastmtl.PCGrad(),
    "GradVac": lambda: fastmtl.GradVac(),
    "GradNorm": lambda: fastmtl.GradNorm(optimizer="adam", scale_heads=False),
    "Amortized": lambda: fastmtl.Amortized(fastmtl.GradVac(), update_every=2),  # what goes wrong does so in between
    "UncertaintyWeighting": lambda: fastmtl.UncertaintyWeighting(T).double(),
    "LBTW": lambda: fastmtl.LBTW(T),
}
PARAMETER_LEVEL = [Way, Filler, Chunks, Found, Lean]
WEIGHTED = [Scalar, *PARAMETER_LEVEL[:2], Found, Layer, Tasks, AtHand]  # through which a loss weighting goes


def cases(ways: Sequence[type[Way]], *names: str) -> Any:
    """Each way in with each of the methods that it takes."""
    pairs = [
        pytest.param(name, way, id=f"{name}-{way.__name__}")
        for name in names or METHODS
        for way in ways
        if (way in WEIGHTED if isinstance(METHODS[name](), LossWeighting) else way is not Scalar)
    ]
    return pytest.mark.parametrize(("name", "way"), pairs)


def parameters(way: Way) -> list[Tensor]:
    return [*way.net.parameters(), *way.method.parameters()]


def made(name: str, way: type[Way]) -> tuple[Way, Way]:
    """Two alike."""
    return build(name, way), build(name, way)


def build(name: str, way: type[Way]) -> Way:
    torch.manual_seed(7)
    return way(METHODS[name]())


def refused(one: Way, twin: Way, call: Callable[[Way], Any], kind: type[Exception], error: str) -> None:
    """It raises with all that the text must name; no bit changes; the next step is as if nothing had been."""
    with assert_untouched(one.net, one.method), pytest.raises(kind) as raised:
        call(one)
    assert raised.type is kind
    assert re.search(error, str(raised.value)), f"{error!r} is not in {str(raised.value)!r}"
    goes_on_as(one, twin)


def goes_on_as(one: Way, twin: Way) -> None:
    one.count = twin.count
    weights = [w.step(w.losses()) for w in (one, twin)]
    assert torch.equal(*weights)
    assert weights[0].isfinite().all()
    for p, q in zip(parameters(one), parameters(twin), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad)


WITH_LOSSES = [*PARAMETER_LEVEL, Layer, Tasks, AtHand, Scalar]
OF_A_GRAPH = [*PARAMETER_LEVEL, Tasks]  # those that are handed the losses and run the backward passes themselves


# ---- losses ----------------------------------------------------------------------------------------------------------


def with_normals(change: Callable[[Tensor], Any]) -> Callable[[Way], Any]:
    def call(way: Way) -> Any:
        losses: Any = way.losses()
        return way.step({**losses, "normals": change(losses["normals"])})

    return call


@cases(WITH_LOSSES)
@pytest.mark.parametrize(
    ("change", "kind", "error"),
    [
        (lambda x: x * torch.ones(2), ValueError, r"loss of normals: expected a scalar, found shape \[2\]"),
        (lambda x: torch.zeros(0) * x, ValueError, r"loss of normals: expected a scalar, found shape \[0\]"),
        (lambda x: x.item(), TypeError, "loss of normals: expected a tensor.*found float"),
        (lambda x: x.detach().long(), ValueError, "loss of normals: expected a floating dtype, found torch.int64"),
    ],
    ids=["vector", "empty", "number", "integer"],
)
def test_what_is_no_loss(name: str, way: type[Way], change: Callable, kind: type[Exception], error: str) -> None:
    refused(*made(name, way), with_normals(change), kind, error)


@cases([w for w in WITH_LOSSES if w is not Tasks])
def test_a_loss_on_another_device(name: str, way: type[Way]) -> None:
    error = "loss of normals: on meta, the others on cpu"
    refused(*made(name, way), with_normals(lambda x: x.to("meta")), ValueError, error)


@cases(OF_A_GRAPH)
def test_a_loss_without_graph(name: str, way: type[Way]) -> None:
    error = r"loss of normals: it has no graph \(requires_grad is False\)"
    refused(*made(name, way), with_normals(Tensor.detach), ValueError, error)


@cases(OF_A_GRAPH)
def test_a_loss_whose_graph_was_freed(name: str, way: type[Way]) -> None:
    """By a backward pass of its own; the pass of the first task succeeds before."""

    def call(one: Way) -> None:
        losses: Any = one.losses()
        other = one.net.losses(one.inputs[0])[1]
        torch.autograd.grad(other, [*one.net.parameters()], allow_unused=True)
        one.step({**losses, "normals": other})

    refused(*made(name, way), call, RuntimeError, "loss of .*normals.*: its graph was freed by an earlier backward")


@cases([w for w in OF_A_GRAPH if w is not Tasks])
def test_a_second_step_on_the_same_losses(name: str, way: type[Way]) -> None:
    """The usual cause."""
    one, twin = made(name, way)
    losses = one.losses()
    twin.count = one.count
    one.step(losses)
    twin.step(dict(zip(NAMES, twin.net.losses(twin.inputs[twin.count % 4]), strict=True)))
    refused(one, twin, lambda way: way.step(losses), RuntimeError, "loss of .*depth.*: its graph was freed")


@pytest.mark.parametrize("name", ["PCGrad", "GradVac", "GradNorm"])
def test_a_second_backward_through_the_layer(name: str) -> None:
    """The heads' gradients came before the layer's turn, as in any backward pass that fails on its way."""
    one, _ = made(name, Layer)
    total = one.surgery.total(one.losses())
    total.backward(retain_graph=True)
    error = "FeatureSurgery: a second backward pass"
    with assert_untouched(one.net.trunk, one.method), pytest.raises(RuntimeError, match=error):
        total.backward()
    assert one.step(one.losses()).isfinite().all()


@cases(WITH_LOSSES, "PCGrad", "UncertaintyWeighting")
@pytest.mark.parametrize(
    ("losses", "kind", "error"),
    [
        (torch.tensor(1.0, requires_grad=True), ValueError, r"losses: .*found a tensor of shape \[\]"),
        ("depth", TypeError, "losses: .*found str"),
        ([None] * T, ValueError, "losses: expected at least one loss, found 3 tasks, all absent"),
    ],
    ids=["their sum", "a name", "all absent"],
)
def test_what_are_no_losses(name: str, way: type[Way], losses: Any, kind: type[Exception], error: str) -> None:
    one, twin = made(name, way)
    if isinstance(one, Tasks):
        one.rows.backward(0, one.losses()["depth"])
        refused(one, twin, lambda way: way.combine(losses), kind, error)
    else:
        refused(one, twin, lambda way: way.step(losses), kind, error)


@cases([*PARAMETER_LEVEL, Layer, Scalar], "PCGrad", "UncertaintyWeighting")
def test_none_in_place_of_losses(name: str, way: type[Way]) -> None:
    refused(*made(name, way), lambda way: way.step(None), TypeError, "losses: .*found NoneType")


# ---- number of tasks -------------------------------------------------------------------------------------------------


def in_number(number: int) -> Callable[[Way], Any]:
    def call(way: Way) -> Any:
        values = [*way.losses().values()] * 2
        return way.step(values[:number])

    return call


STATES = {
    "GradVac": r"GradVac.targets: the state is of shape \[1, 3, 3\], this step needs \[1, {0}, {0}\]",
    "GradNorm": r"GradNorm.weights: the state is of shape \[3\], this step needs \[{0}\]",
    "Amortized": r"Amortized.weights: the state is of shape \[3\], this step needs \[{0}\]",
    "UncertaintyWeighting": "losses: expected 3 tasks, found {0}",
    "LBTW": "losses: expected 3 tasks, found {0}",
}


@cases([*PARAMETER_LEVEL, Scalar], *STATES)
@pytest.mark.parametrize("number", [2, 4])
def test_another_number_of_losses_than_the_state_has(name: str, way: type[Way], number: int) -> None:
    refused(*made(name, way), in_number(number), ValueError, STATES[name].format(number))


@cases([Layer, AtHand, Ready], "GradNorm", "UncertaintyWeighting")
@pytest.mark.parametrize("number", [2, 4])
def test_another_number_of_losses_than_rows(name: str, way: type[Way], number: int) -> None:
    refused(*made(name, way), in_number(number), ValueError, f"losses: expected 3 tasks, found {number}")


@cases([Tasks])
@pytest.mark.parametrize("number", [2, 4])
def test_another_number_of_losses_than_collected(name: str, way: type[Way], number: int) -> None:
    def call(one: Way) -> None:
        for t, loss in enumerate(one.losses().values()):
            one.rows.backward(t, loss, retain_graph=True)
        one.combine(torch.ones(number))

    refused(*made(name, way), call, ValueError, f"losses: expected 3 tasks, found {number}")


@pytest.mark.parametrize("name", STATES)
def test_a_state_of_another_number_of_tasks_in_the_ways_that_fix_it(name: str) -> None:
    """One method object in two places."""
    one, twin = made(name, Way)
    z = torch.randn(2, 4, dtype=torch.float64)
    features = z.clone().requires_grad_()

    def layer(way: Way) -> None:
        surgery = FeatureSurgery(way.method, 2)
        a, b = surgery(features)
        surgery.total([a.sum(), b.pow(2).sum()]).backward()

    def tasks(way: Way) -> None:
        rows = TaskGradients([features], 2, heads=way.net.heads)
        for t, loss in enumerate((features.sum(), features.pow(2).sum())):
            rows.backward(t, loss)
        rows.combine(way.method)

    def at_hand(way: Way) -> None:
        fastmtl.aggregate(z, way.method, losses=torch.ones(2))

    error = STATES[name].format(2)
    if isinstance(one.method, LossWeighting):
        refused(one, twin, layer, ValueError, f"num_tasks: {name} is for 3 tasks, found 2")
    else:
        refused(one, twin, layer, ValueError, error)
        refused(one, twin, lambda way: way.method(z @ z.T, losses=torch.ones(2)), ValueError, error)
    refused(one, twin, tasks, ValueError, error)
    refused(one, twin, at_hand, ValueError, error)
    assert features.grad is None


def test_the_names_of_a_step_that_raised_are_not_remembered() -> None:
    """Neither by a gradient method nor by a loss weighting: the next, right step may have others."""
    net, x = mlp(T), torch.randn(6, 5, dtype=torch.float64)

    def losses(names: str) -> Losses:
        return dict(zip(names, net.losses(x), strict=True))

    def fail(grad: Tensor) -> None:
        raise MemoryError("out of memory")

    for name in ("GradVac", "GradNorm", "LBTW", "UncertaintyWeighting"):
        method, wrong = METHODS[name](), losses("abc")
        z = net.trunk(x)
        z.register_hook(fail)
        wrong["b"] = net.heads[1](z).sum()
        with assert_untouched(net, method), pytest.raises(MemoryError):
            fastmtl.backward(wrong, method, net.trunk)
        fastmtl.backward(losses("xyz"), method, net.trunk)
    method = METHODS["GradVac"]()
    broken = {**losses("abc"), "b": losses("abc")["b"] * math.nan}
    with assert_untouched(net, method), pytest.raises(FloatingPointError, match="not finite: b"):
        fastmtl.backward(broken, method, net.trunk, nonfinite="raise")
    fastmtl.backward(losses("xyz"), method, net.trunk)


# ---- parameters ------------------------------------------------------------------------------------------------------

FROZEN = nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False)
NOT_A_LEAF = torch.ones(3, dtype=torch.float64, requires_grad=True) * 2
ELSEWHERE = nn.Parameter(torch.ones(3, device="meta"))
PARAMS = {
    "frozen": (FROZEN, r"{0}\[4\]: expected a trainable leaf tensor, found requires_grad=False"),
    "not a leaf": (NOT_A_LEAF, r"{0}\[4\]: expected a trainable leaf tensor, found the output of MulBackward0"),
    "elsewhere": (ELSEWHERE, r"{0}: {0}\[4\] is on meta, the others on cpu"),
}


@cases([Way, Filler, Chunks, Lean], "PCGrad", "GradNorm")
@pytest.mark.parametrize("wrong", PARAMS)
def test_parameters_that_cannot_have_gradients(name: str, way: type[Way], wrong: str) -> None:
    """Of those that the Gramian is taken on: others may lie anywhere."""
    param, error = PARAMS[wrong]
    argument = "gramian_params" if way is Lean else "shared_params"

    def call(way: Way) -> None:
        params = [*way.net.trunk.parameters(), param]
        fastmtl.backward(way.losses(), way.method, **{**way.arguments(), argument: params})

    refused(*made(name, way), call, ValueError, error.format(argument))


@pytest.mark.parametrize("wrong", PARAMS)
def test_shared_parameters_of_collected_gradients(wrong: str) -> None:
    param, error = PARAMS[wrong]
    with pytest.raises(ValueError, match=error.format("shared_params")):
        TaskGradients([*mlp(T).trunk.parameters(), param], T)


@cases([Way, Lean, Tasks], "PCGrad")
def test_a_frozen_parameter_by_name(name: str, way: type[Way]) -> None:
    """Meant as shared, so it is not left out without a word; within a module it is. Tensors are named by the model."""
    one, twin = made(name, way)
    for each in (one, twin):
        each.net.trunk[0].bias.requires_grad_(False)
    error = "shared_params: trunk.0.bias: expected a trainable leaf tensor, found requires_grad=False"

    def call(way: Way, params: Any) -> None:
        if isinstance(way, Tasks):
            TaskGradients(params, T, model=way.net)
        else:
            arguments = {**way.arguments(), "model": way.net, "shared_params": params}
            fastmtl.backward(way.losses(), way.method, **arguments)

    for params in (["trunk.0.weight", "trunk.0.bias"], [*one.net.trunk.parameters()]):
        refused(one, twin, lambda way, params=params: call(way, params), ValueError, error)


@pytest.mark.parametrize("argument", ["shared_params", "gramian_params"])
def test_parameters_of_another_model(argument: str) -> None:
    """Moved or copied after the optimizer was built, say."""
    one, twin = made("GradVac", Way)
    other = copy.deepcopy(one.net.trunk)

    def call(way: Way) -> None:
        fastmtl.backward(way.losses(), way.method, **{"shared_params": way.net.trunk, argument: other})

    refused(one, twin, call, ValueError, f"{argument}: no loss reaches any of them")
    assert all(p.grad is None for p in other.parameters())


@pytest.mark.parametrize("name", ["PCGrad", "UncertaintyWeighting"])
def test_gradients_at_hand_on_several_devices(name: str) -> None:
    one, twin = made(name, AtHand)
    rows = [torch.ones(T, 4), torch.ones(T, 2, device="meta")]
    call = lambda way: fastmtl.aggregate(rows, way.method, losses=torch.ones(T))  # noqa: E731
    refused(one, twin, call, ValueError, r"grads\[1\].*on meta, the others on cpu")
    rows = [[torch.ones(4), torch.ones(4, device="meta"), None]]
    refused(one, twin, call, ValueError, r"grads\[0\]\[1\].*on meta, the others on cpu")


@cases(WEIGHTED, "UncertaintyWeighting")
def test_a_weightings_parameters_on_another_device(name: str, way: type[Way]) -> None:
    """It was forgotten in ``.to(device)``."""
    one, twin = made(name, way)
    there = copy.deepcopy(one)
    there.method.to("meta")
    with assert_untouched(there.net), pytest.raises(ValueError) as raised:
        there.step(there.losses())
    assert re.search("UncertaintyWeighting.s: on meta, the losses on cpu", str(raised.value))
    goes_on_as(one, twin)


# ---- values that are not finite --------------------------------------------------------------------------------------


def broken(way: Way) -> Losses:
    losses: Any = way.losses()
    return {**losses, "normals": losses["normals"] * math.nan}


POLICIES = [*PARAMETER_LEVEL, Tasks]


def with_policy(way: Way, policy: str, losses: Losses) -> Tensor:
    if isinstance(way, Tasks):
        way.rows.zero()
        for t, loss in enumerate(losses.values()):
            way.rows.backward(t, loss, retain_graph=True)
        return way.combine(nonfinite=policy)
    return fastmtl.backward(losses, way.method, **way.arguments(), nonfinite=policy).weights


def assert_nan_leaves_the_state(one: Way, losses: Losses) -> None:
    state = copy.deepcopy(one.method.state_dict())
    weights = one.step(losses)
    if not isinstance(one.method, fastmtl.UncertaintyWeighting):  # its weights do not depend on the losses
        assert weights.isnan().all()
    for key, value in one.method.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0, equal_nan=True)


@cases([*PARAMETER_LEVEL, Layer, Tasks, Scalar], "PCGrad", "GradVac", "GradNorm", "UncertaintyWeighting", "LBTW")
def test_propagated(name: str, way: type[Way]) -> None:
    """The default: NaN arrives in ``.grad``, and a method's state stays as it is."""
    one = build(name, way)
    assert_nan_leaves_the_state(one, broken(one))
    assert all(p.grad.isnan().all() for p in one.net.trunk.parameters())


@cases([AtHand, Ready], "GradNorm", "UncertaintyWeighting", "LBTW")
def test_propagated_from_values_alone(name: str, way: type[Way]) -> None:
    """The gradients at hand are finite."""
    one = build(name, way)
    assert_nan_leaves_the_state(one, {n: None if x is None else x.detach() for n, x in broken(one).items()})


@cases(POLICIES, "PCGrad", "GradVac", "GradNorm")
def test_raised(name: str, way: type[Way]) -> None:
    call = lambda way: with_policy(way, "raise", broken(way))  # noqa: E731
    refused(*made(name, way), call, FloatingPointError, "gradient or loss not finite: normals$")


@cases([w for w in POLICIES if w is not Tasks], "PCGrad", "GradVac", "GradNorm")
def test_skipped(name: str, way: type[Way]) -> None:
    one, twin = made(name, way)
    with assert_untouched(one.net, one.method):
        assert with_policy(one, "skip", broken(one)).tolist() == [0, 0, 0]
    goes_on_as(one, twin)


@cases(POLICIES, "PCGrad", "GradVac", "GradNorm")
def test_dropped(name: str, way: type[Way]) -> None:
    """As if the loss were None, for weights, trunk and state."""
    one, twin = made(name, way)
    weights = with_policy(one, "drop_task", broken(one))
    expected = twin.step({**twin.losses(), "normals": None})
    assert weights[1] == 0
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)
    for p, q in zip(one.net.trunk.parameters(), twin.net.trunk.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)
    for key, value in one.method.state_dict().items():
        torch.testing.assert_close(value, twin.method.state_dict()[key], rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("policy", ["skip", "drop_task", "raise"])
@cases([w for w in WEIGHTED if w not in (Scalar, Layer, AtHand)], "UncertaintyWeighting", "LBTW")
def test_policies_are_for_gradient_methods(name: str, way: type[Way], policy: str) -> None:
    call = lambda way: with_policy(way, policy, broken(way))  # noqa: E731
    refused(*made(name, way), call, ValueError, f"nonfinite: {name} is a loss weighting")


# ---- methods ---------------------------------------------------------------------------------------------------------


@cases([*PARAMETER_LEVEL, Tasks, AtHand], "PCGrad")
@pytest.mark.parametrize(
    ("wrong", "error"),
    [(fastmtl.PCGrad, "found the class; construct it: PCGrad()"), ("pcgrad", "found str"), (None, "found NoneType")],
)
def test_what_is_no_method(name: str, way: type[Way], wrong: Any, error: str) -> None:
    def call(way: Way) -> None:
        method, way.method = way.method, wrong
        try:
            way.step(way.losses())
        finally:
            way.method = method

    refused(*made(name, way), call, TypeError, re.escape(error))
