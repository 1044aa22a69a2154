"""Amortized: the method's weights where it solves, the same weights in between."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmtl
from fastmtl import DWA, MGDA, Amortized, GradientMethod, GradNorm, GradVac, PCGrad
from tests import nets
from tests.asserts import assert_same_state, assert_untouched
from tests.nets import assert_grads, jacobian_of, task_gradients, weighted_sum


def inputs(batch: int = 4) -> Tensor:
    return torch.randn(batch, 5, dtype=torch.float64)


def gramian(num_tasks: int = 3) -> Tensor:
    jacobian = torch.randn(num_tasks, 5, dtype=torch.float64)
    return jacobian @ jacobian.T


def solved(method: Amortized, steps: int, **options: Any) -> list[bool]:
    """Which steps solve, over Gramians that never repeat."""
    found = []
    for _ in range(steps):
        m = gramian()
        expected = copy.deepcopy(method.method)(m)
        found.append(torch.equal(method(m, **options), expected))
    return found


# ---- the schedule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"update_every": 1}, [1, 1, 1, 1, 1, 1, 1]),
        ({"update_every": 3}, [1, 0, 0, 1, 0, 0, 1]),
        ({"update_every": 3, "warmup_steps": 2}, [1, 1, 0, 0, 1, 0, 0]),
        ({"update_every": 100, "warmup_steps": 4}, [1, 1, 1, 1, 0, 0, 0]),
    ],
)
def test_which_steps_solve(options: dict[str, int], expected: list[int]) -> None:
    assert solved(Amortized(MGDA(), **options), 7) == [bool(x) for x in expected]


def test_conflict_makes_the_next_step_solve() -> None:
    method = Amortized(MGDA(), update_every=4, max_conflict=0.5)
    one, two = torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    one[0, 1] = one[1, 0] = -0.1  # one pair of three
    two[0, 1] = two[1, 0] = two[0, 2] = two[2, 0] = -0.1  # two pairs
    assert method.due
    method(two)
    assert method.due  # 2/3 of the pairs are in conflict
    method(one)
    assert not method.due
    method(two)  # not looked at
    assert not method.due
    masked = Amortized(MGDA(), update_every=4, max_conflict=0.5)
    masked(two, mask=torch.tensor([False, True, True]))
    assert not masked.due  # the pair that is there is not in conflict


def test_evaluation_leaves_the_schedule_alone() -> None:
    method = Amortized(GradVac(), update_every=3).eval()
    with assert_untouched(method):
        assert solved(method, 3) == [True, True, True]
    method.train()
    first = method(gramian())
    method.eval()
    with assert_untouched(method):
        assert torch.equal(method(gramian()), first)
    method.train()
    assert solved(method, 3) == [False, False, True]


# ---- in training -----------------------------------------------------------------------------------------------------


class Passes:
    """Counts how often the trunk is passed backwards."""

    def __init__(self, trunk: nn.Sequential) -> None:
        self.count = 0
        trunk[2].register_full_backward_hook(self._hook)

    def _hook(self, *_: object) -> None:
        self.count += 1

    def take(self) -> int:
        count, self.count = self.count, 0
        return count


METHODS = {
    "MGDA": MGDA,
    "PCGrad": PCGrad,
    "GradVac": GradVac,
    "GradNorm": lambda: GradNorm(lr=0.2),
    "GradNorm, trunk": lambda: GradNorm(lr=0.2, scale_heads=False),
}


@pytest.mark.parametrize("way", ["exact", "lean", "reentrant", "chunks"])
@pytest.mark.parametrize("name", METHODS)
def test_one_pass_between_updates_by_the_weights_of_the_last(name: str, way: str) -> None:
    torch.manual_seed(0)
    method = Amortized(METHODS[name](), update_every=3)
    torch.manual_seed(0)
    alone = METHODS[name]()
    model = nets.net("reentrant" if way == "reentrant" else "mlp")
    shared, heads = [*model.trunk.parameters()], [*model.heads.parameters()]
    options: dict[str, Any] = {
        "exact": dict,
        "lean": lambda: {"gramian_params": model.trunk[-1:]},
        "reentrant": lambda: {"model": model},
        "chunks": lambda: {"chunk_size": 2},
    }[way]()
    passes = Passes(model.trunk) if way == "exact" else None
    weights = None
    for step in range(5):
        model.zero_grad()
        losses = model.losses(inputs())
        shared_rows, head_rows = task_gradients(losses, shared), task_gradients(losses, heads)
        if way == "reentrant":  # autograd.grad sees nothing there
            shared_rows = per_task_backward(losses, shared)
            model.zero_grad()
        if passes:
            passes.take()
        out = fastmtl.backward(losses, method, model.trunk, **options)
        if step % 3 == 0:
            assert out.gramian is not None
            weights = alone(out.gramian, losses=torch.stack(losses).detach())
        else:
            assert out.gramian is None
        assert weights is not None
        if passes:
            assert passes.take() == (3 if step % 3 == 0 else 1)
        torch.testing.assert_close(out.weights, weights)
        assert_grads(shared, weighted_sum(shared_rows, weights), rtol=1e-9)
        factors = weights if name == "GradNorm" else torch.ones(3)
        assert_grads(heads, weighted_sum(head_rows, factors), rtol=1e-9)
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.01 * p.grad  # type: ignore[operator]
    assert_same_state(method.method, alone)


def per_task_backward(losses: list[Tensor], params: list[Tensor]) -> list[list[Tensor | None] | None]:
    rows: list[list[Tensor | None] | None] = []
    for loss in losses:
        for p in params:
            p.grad = None
        loss.backward(retain_graph=True)
        rows.append([p.grad for p in params])
    return rows


def test_existing_gradients_are_added_to() -> None:
    model, method = nets.mlp(), Amortized(MGDA(), update_every=2)
    fastmtl.backward(model.losses(inputs()), method, model.trunk)
    before = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    losses = model.losses(inputs())
    rows = task_gradients(losses, model.trunk.parameters())
    out = fastmtl.backward(losses, method, model.trunk)
    added = weighted_sum(rows, out.weights)
    found = [p.grad - b for p, b in zip(model.trunk.parameters(), before, strict=False)]  # type: ignore[operator]
    for a, b in zip(found, added, strict=True):
        torch.testing.assert_close(a, b)


def test_max_norm_between_updates() -> None:
    model, method = nets.mlp(), Amortized(PCGrad(), update_every=9)
    for bound in (1e-3, 1e3):
        for scale in (None, 2.0**10):
            scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
            for _ in range(2):  # the second is between updates
                model.zero_grad()
                fastmtl.backward(model.losses(inputs()), method, model.trunk, max_norm=bound, scaler=scaler)
                norm = torch.cat([p.grad.flatten() for p in model.trunk.parameters()]).norm() / (scale or 1.0)
                assert norm <= bound * (1 + 1e-6)
                if bound < 1:
                    assert norm > bound * (1 - 1e-6)


def test_absent_tasks() -> None:
    """A task that was never solved for makes its step solve; then each keeps its last weight."""
    model, method = nets.mlp(4), Amortized(GradNorm(lr=0.2, scale_heads=False), update_every=9)

    def step(absent: int | None) -> fastmtl.Result:
        model.zero_grad()
        losses: list[Tensor | None] = [*model.losses(inputs())]
        if absent is not None:
            losses[absent] = None
        return fastmtl.backward(losses, method, model.trunk)

    first, again = step(1), step(1)
    assert torch.equal(again.weights, first.weights)
    assert again.gramian is None
    second = step(0)  # task 1 is new
    assert second.gramian is not None
    assert second.weights[0] == 0
    assert all(p.grad is None for p in model.heads[0].parameters())
    third = step(None)
    assert third.gramian is None
    torch.testing.assert_close(third.weights[0], first.weights[0])
    torch.testing.assert_close(third.weights[1:], second.weights[1:])
    fourth = step(2)
    torch.testing.assert_close(fourth.weights, third.weights * torch.tensor([1, 1, 0, 1]))


def test_a_task_that_misses_the_shared_parameters() -> None:
    """Its head goes on as it is in every step, though the method scales heads."""
    model, method = nets.mlp(), Amortized(GradNorm(lr=0.2), update_every=3)
    alone = nn.Linear(5, 1).double()
    for _ in range(4):
        x = inputs()
        losses = [*model.losses(x), alone(x).pow(2).mean()]
        alone.zero_grad()
        expected = torch.autograd.grad(losses[-1], [*alone.parameters()], retain_graph=True)
        out = fastmtl.backward(losses, method, model.trunk)
        assert out.weights[-1] == 0
        assert_grads(alone.parameters(), expected)


def test_wrong_parameters_between_updates() -> None:
    model, method, other = nets.mlp(), Amortized(MGDA(), update_every=9), nn.Linear(2, 2)
    fastmtl.backward(model.losses(inputs()), method, model.trunk)
    with assert_untouched(model, method, other), pytest.raises(ValueError, match="shared_params: no loss reaches"):
        fastmtl.backward(model.losses(inputs()), method, other)
    with assert_untouched(model, method), pytest.raises(ValueError, match=r"gramian_params.*'nowhere'"):
        fastmtl.backward(model.losses(inputs()), method, model.trunk, model=model, gramian_params="nowhere")


@pytest.mark.filterwarnings(r"ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing
@pytest.mark.parametrize("way", ["layer", "compiled layer", "task gradients", "aggregate"])
def test_the_other_ways_in_hold_the_weights(way: str) -> None:
    torch.manual_seed(1)
    method = Amortized(GradVac(), update_every=2)
    torch.manual_seed(1)
    alone = GradVac()
    model = nets.mlp()
    surgery = fastmtl.FeatureSurgery(method, 3)

    def features(x: Tensor) -> tuple[Tensor, ...]:
        return surgery(model.trunk(x))

    if way == "compiled layer":
        features = torch.compile(features, backend="aot_eager")
    weights = None
    for step in range(4):
        x = inputs()
        if "layer" in way:
            zs = features(x)
            losses = [head(z).pow(2).mean() - head(z).mean() for head, z in zip(model.heads, zs, strict=True)]
            surgery.total(losses).backward()
            assert surgery.result is not None
            found, m = surgery.result.weights, surgery.result.gramian
        elif way == "task gradients":
            rows = fastmtl.TaskGradients(model.trunk, 3)
            for t, loss in enumerate(model.losses(x)):
                rows.backward(t, loss, retain_graph=True)
            out = rows.combine(method)
            found, m = out.weights, out.gramian
        else:
            jacobian = torch.randn(3, 7, dtype=torch.float64)
            out = fastmtl.aggregate(jacobian, method)
            found, m = out.weights, out.gramian
            torch.testing.assert_close(out.grads, found @ jacobian)
        if step % 2 == 0:
            assert m is not None
            weights = alone(m)
        torch.testing.assert_close(found, weights)


# ---- state -----------------------------------------------------------------------------------------------------------


def train(model: nets.Net, method: GradientMethod, batches: list[Tensor], scaler: Any = None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x in batches:
        optimizer.zero_grad()
        fastmtl.backward(model.losses(x), method, model.trunk, scaler=scaler)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()


def test_a_resumed_run_equals_an_uninterrupted_one() -> None:
    batches = [inputs() for _ in range(9)]
    model, method = nets.mlp(), Amortized(GradVac(), update_every=3, warmup_steps=2)
    resumed, again = copy.deepcopy(model), Amortized(GradVac(), update_every=3, warmup_steps=2)
    train(model, method, batches[:4])
    resumed.load_state_dict(model.state_dict())
    again.load_state_dict(method.state_dict())
    train(model, method, batches[4:])
    train(resumed, again, batches[4:])
    assert_same_state(model, resumed)
    assert_same_state(method, again)


def test_an_overflow_is_not_held() -> None:
    """The first steps overflow: each solves anew; a later one leaves the weights as they were."""
    model, method = nets.mlp(), Amortized(MGDA(), update_every=2)
    bad = inputs() * float("inf")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for _ in range(3):
        assert method.due
        train(model, method, [bad], scaler)
    good = inputs()
    rows = task_gradients(model.losses(good), model.trunk.parameters())
    jacobian = jacobian_of(rows, model.trunk.parameters())
    train(model, method, [good], scaler)
    held = method.weights.clone()
    torch.testing.assert_close(held, MGDA()(jacobian @ jacobian.T))
    assert not method.due
    train(model, method, [bad], scaler)  # between updates: the scaler sees it
    assert all(p.grad is not None and not p.grad.isfinite().all() for p in model.trunk[2].parameters())
    train(model, method, [bad], scaler)  # an update
    assert torch.equal(method.weights, held)


def test_an_error_leaves_everything_as_it_was() -> None:
    model, method = nets.mlp(), Amortized(GradNorm(), update_every=3)
    x = inputs()
    for _ in range(4):  # both kinds of steps
        losses = model.losses(x)
        losses[0].backward()
        model.zero_grad()
        with assert_untouched(model, method), pytest.raises(RuntimeError, match="task 0"):
            fastmtl.backward(losses, method, model.trunk)
        fastmtl.backward(model.losses(x), method, model.trunk)
    two = model.losses(x)[:2]
    with assert_untouched(model, method), pytest.raises(ValueError, match=r"shape \[3\].*needs \[2\]"):
        fastmtl.backward(two, method, model.trunk)
    a, b, c = model.losses(x)
    named = Amortized(MGDA())
    fastmtl.backward({"a": a, "b": b, "c": c}, named, model.trunk, retain_graph=True)
    with assert_untouched(model, named), pytest.raises(ValueError, match="order of the tasks, which was a, b, c"):
        fastmtl.backward({"b": b, "a": a, "c": c}, named, model.trunk)


@pytest.mark.parametrize(
    ("error", "text", "arguments"),
    [
        (TypeError, "gradient method.*MGDA", {"method": MGDA}),
        (TypeError, "gradient method.*DWA", {"method": DWA(num_tasks=2)}),
        (TypeError, "gradient method.*Amortized", {"method": Amortized(MGDA())}),
        (ValueError, "update_every.*0", {"update_every": 0}),
        (TypeError, "update_every.*2.5", {"update_every": 2.5}),
        (ValueError, "warmup_steps.*-1", {"warmup_steps": -1}),
        (ValueError, "max_conflict.*1.5", {"max_conflict": 1.5}),
    ],
)
def test_bad_options(error: type[Exception], text: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=text):
        Amortized(**{"method": MGDA(), **arguments})


def test_several_groups_and_policies_are_refused() -> None:
    model, method = nets.mlp(), Amortized(MGDA())
    losses = model.losses(inputs())
    with assert_untouched(model, method), pytest.raises(ValueError, match="Amortized knows only one group"):
        fastmtl.backward(losses, method, model.trunk, groups="layer", retain_graph=True)
    for policy in ("skip", "drop_task", "raise"):
        with assert_untouched(model, method), pytest.raises(ValueError, match=f"nonfinite='{policy}'.*Amortized"):
            fastmtl.backward(losses, method, model.trunk, nonfinite=policy, retain_graph=True)
    fastmtl.backward(losses, method, model.trunk, retain_graph=True)
    with assert_untouched(model, method), pytest.raises(ValueError, match="Amortized knows only one group"):
        fastmtl.backward(losses, method, model.trunk, groups="layer")
