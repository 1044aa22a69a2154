"""Sum, Mean, Constant: closed forms, and how many backward passes they cost."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmtl
from fastmtl import Constant, GradientMethod, Mean, RandomGradWeights, Sum
from tests import nets
from tests.asserts import assert_same_state, assert_untouched
from tests.nets import assert_grads, task_gradients, weighted_sum

METHODS = {
    "Sum": (Sum, (1, 1, 1)),
    "Mean": (Mean, (1 / 3, 1 / 3, 1 / 3)),
    "Constant": (lambda: Constant([2, -1, 0.5]), (2, -1, 0.5)),
    "Constant, one for all": (lambda: Constant(0.1), (0.1, 0.1, 0.1)),
    "Sum, rescaled": (lambda: Sum(rescale="sum_to_one"), (1 / 3, 1 / 3, 1 / 3)),
    "Constant, rescaled": (lambda: Constant([1, 2, 3], rescale="sum_to_num_tasks"), (0.5, 1, 1.5)),
}


def inputs() -> Tensor:
    return torch.randn(4, 5, dtype=torch.float64)


class Passes:
    """Counts how often a module is passed backwards."""

    def __init__(self, module: nn.Module) -> None:
        self.count = 0
        module.register_forward_hook(lambda module, args, output: output.register_hook(self._hook) and None)

    def _hook(self, grad: Tensor) -> None:
        self.count += 1


@pytest.mark.parametrize("num_tasks", [1, 2, 32, 512])
def test_weights(num_tasks: int) -> None:
    gramian, each = torch.eye(num_tasks, dtype=torch.float64), torch.randn(num_tasks).tolist()
    assert Sum()(gramian).tolist() == [1.0] * num_tasks
    assert Mean()(gramian).tolist() == [1 / num_tasks] * num_tasks
    assert Constant(each)(gramian).tolist() == each
    assert Constant(torch.tensor(each))(gramian).tolist() == each


def test_absent_tasks_and_groups() -> None:
    gramian = torch.full((2, 3, 3), math.nan, dtype=torch.float64)
    gramian[0, 1, 1] = gramian[1, 0, 0] = gramian[1, 2, 2] = gramian[1, 0, 2] = gramian[1, 2, 0] = 1.0
    mask = torch.tensor([[False, True, False], [True, False, True]])
    assert Sum()(gramian, mask=mask).tolist() == [[0, 1, 0], [1, 0, 1]]
    assert Mean()(gramian, mask=mask).tolist() == [[0, 1, 0], [0.5, 0, 0.5]]
    assert Constant([3, 4, 5])(gramian, mask=mask).tolist() == [[0, 4, 0], [3, 0, 5]]
    nobody = torch.zeros(3, dtype=torch.bool)
    for method in (Sum(), Mean(), Constant([3, 4, 5]), Sum(rescale="sum_to_one")):
        assert method(gramian[0], mask=nobody).tolist() == [0, 0, 0]
        assert method(gramian[0]).isnan().all()


@pytest.mark.parametrize("way", ["plain", "lean", "reentrant", "chunks", "scaler"])
@pytest.mark.parametrize("name", METHODS)
def test_backward_takes_one_pass(name: str, way: str) -> None:
    make, weights = METHODS[name]
    model = nets.net("reentrant" if way == "reentrant" else "mlp")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if way == "scaler" else None
    options: dict[str, dict[str, Any]] = {
        "lean": {"gramian_params": None if way == "reentrant" else model.trunk[-1:]} if way == "lean" else {},
        "reentrant": {"model": model},
        "chunks": {"chunk_size": 2},
        "scaler": {"scaler": scaler},
    }
    losses = model.losses(inputs())
    wanted: list[list[Tensor | None]] = []
    for params, factors in ((model.trunk.parameters(), weights), (model.heads.parameters(), (1, 1, 1))):
        kept = [*params]
        rows = []
        for loss in losses:  # autograd.grad sees nothing within reentrant checkpointing
            model.zero_grad()
            loss.backward(retain_graph=True)
            rows.append([None if p.grad is None else p.grad.clone() for p in kept])
        wanted.append(weighted_sum(rows, factors))
    model.zero_grad()
    passes = [Passes(model.trunk[2])] if way != "reentrant" else []
    losses = losses if way == "reentrant" else model.losses(inputs())
    if way != "reentrant":
        trunk, heads = [*model.trunk.parameters()], [*model.heads.parameters()]
        wanted = [
            weighted_sum(task_gradients(losses, trunk), weights),
            weighted_sum(task_gradients(losses, heads), (1, 1, 1)),
        ]
        passes[0].count = 0
    out = fastmtl.backward(losses, make(), model.trunk, **options.get(way, {}))
    assert out.gramian is None
    assert out.weights.tolist() == pytest.approx(weights)
    assert all(p.count == 1 for p in passes)
    unscale = 1.0 if scaler is None else 2.0**-10
    for params, expected in zip((model.trunk.parameters(), model.heads.parameters()), wanted, strict=True):
        kept = [*params]
        for p in kept:
            assert p.grad is not None
            p.grad *= unscale
        assert_grads(kept, expected, rtol=1e-9)


def test_sum_is_one_pass_through_the_heads_too() -> None:
    for make, expected in ((Sum, 1), (Mean, 2)):
        model = nets.mlp()
        passes = Passes(model.heads[0])
        fastmtl.backward(model.losses(inputs()), make(), model.trunk)
        assert passes.count == expected


@pytest.mark.parametrize("make", [Sum, Mean, lambda: Constant([3, 4, 5]), RandomGradWeights])
def test_absent_tasks_in_backward(make: Any) -> None:
    """With one pass as with the Gramian."""
    model, method = nets.mlp(), make()
    a, _, c = model.losses(inputs())
    expected = copy.deepcopy(method)(torch.eye(3), mask=torch.tensor([True, False, True]))
    rows = task_gradients([a, c], model.trunk.parameters())
    out = fastmtl.backward([a, None, c], method, model.trunk)
    torch.testing.assert_close(out.weights, expected)
    assert_grads(model.trunk.parameters(), weighted_sum(rows, expected[[0, 2]]))
    assert all(p.grad is None for p in model.heads[1].parameters())


@pytest.mark.parametrize("policy", ["skip", "drop_task", "raise"])
def test_policies_for_what_is_not_finite_take_the_gramian(policy: str) -> None:
    model = nets.mlp()
    losses = model.losses(inputs())
    bad = [losses[0], losses[1] * math.inf, losses[2]]
    expected = weighted_sum(task_gradients([losses[0], losses[2]], model.trunk.parameters()), (1, 1))
    if policy == "raise":
        with pytest.raises(FloatingPointError, match="task 1"):
            fastmtl.backward(bad, Sum(), model.trunk, nonfinite=policy)
        return
    out = fastmtl.backward(bad, Sum(), model.trunk, nonfinite=policy)
    assert out.gramian is not None
    if policy == "skip":
        assert all(p.grad is None for p in model.parameters())
    else:
        assert_grads(model.trunk.parameters(), expected)


@pytest.mark.parametrize("make", [Sum, RandomGradWeights])
def test_a_step_that_is_not_finite(make: type[GradientMethod]) -> None:
    model = nets.mlp()
    fastmtl.backward([x * math.nan for x in model.losses(inputs())], make(), model.trunk)
    assert all(p.grad is not None and p.grad.isnan().all() for p in model.trunk.parameters())


def test_max_norm_with_one_pass() -> None:
    for bound in (1e-3, 1e3):
        model = nets.mlp()
        losses = model.losses(inputs())
        plain = torch.cat(
            [g.flatten() for g in torch.autograd.grad(sum(losses), [*model.trunk.parameters()], retain_graph=True)]
        )
        fastmtl.backward(losses, Sum(), model.trunk, max_norm=bound)
        found = torch.cat([p.grad.flatten() for p in model.trunk.parameters()])  # type: ignore[union-attr]
        torch.testing.assert_close(found, plain * min(1.0, bound / float(plain.norm())))


def test_normalized_gradients_take_the_gramian() -> None:
    model = nets.mlp()
    losses = model.losses(inputs())
    rows = task_gradients(losses, model.trunk.parameters())
    norms = [float(torch.cat([g.flatten() for g in row]).norm()) for row in rows]  # type: ignore[union-attr]
    fastmtl.backward(losses, Sum(normalization="l2", apply_to="normalized"), model.trunk)
    assert_grads(model.trunk.parameters(), weighted_sum(rows, [1 / n for n in norms]))


def test_a_compiled_trunk_is_passed_once_for_the_sum() -> None:
    """Nothing is repeated, so nothing has to be proven first."""
    model = nets.mlp()
    x = inputs()
    z, passes = torch.compile(model.trunk, backend="aot_eager")(x), []
    z.register_hook(lambda grad: passes.append(grad))
    expected = torch.autograd.grad(sum(h(model.trunk(x)).pow(2).mean() for h in model.heads), [*model.parameters()])
    fastmtl.backward([h(z).pow(2).mean() for h in model.heads], Sum(), model.trunk)
    assert_grads(model.parameters(), expected, rtol=1e-9)
    assert len(passes) == 1


def test_with_groups_and_unknown_parameters() -> None:
    model = nets.mlp()
    out = fastmtl.backward(model.losses(inputs()), Mean(), model.trunk, groups="layer")
    assert out.weights.tolist() == [[1 / 3] * 3] * 2
    out = fastmtl.backward(model.losses(inputs()), Sum(), model=model)
    assert out.weights.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("weights", "error", "text"),
    [
        ("1", TypeError, "weights: expected a number, or one per task, found '1'"),
        ([], ValueError, "weights: expected a number, or one per task"),
        ([1, math.inf], ValueError, "weights of task 1: .* found inf"),
        (None, TypeError, "weights: expected a number"),
    ],
)
def test_errors(weights: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Constant(weights)


def test_weights_for_another_number_of_tasks() -> None:
    model, method = nets.mlp(), Constant([1, 2])
    with assert_untouched(model, method), pytest.raises(ValueError, match="weights: one for each of 2 tasks"):
        fastmtl.backward(model.losses(inputs()), method, model.trunk)


def test_no_state() -> None:
    for make, _ in METHODS.values():
        assert not make().state_dict()
    assert_same_state(Sum(), Mean())
