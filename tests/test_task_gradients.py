"""One batch per task: rows that come one backward pass at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastmtl
from fastmtl import MGDA, GradNorm, GradVac, PCGrad, TaskGradients, UncertaintyWeighting
from tests import nets
from tests.asserts import assert_untouched
from tests.nets import assert_grads, jacobian_of, task_gradients, weighted_sum


def batches(num_tasks: int = 3) -> list[Tensor]:
    return [torch.randn(4, 5, dtype=torch.float64) for _ in range(num_tasks)]


def fill(rows: TaskGradients, model: nets.Net, xs: list[Tensor]) -> list[Tensor]:
    losses = [model.losses(x)[t] for t, x in enumerate(xs)]
    for t, loss in enumerate(losses):
        rows.backward(t, loss, retain_graph=True)
    return losses


@pytest.mark.parametrize("method", [PCGrad, GradVac, MGDA, lambda: GradNorm(scale_heads=False)])
def test_equals_backward_on_the_same_losses(method: type) -> None:
    model, xs, found = nets.mlp(), batches(), []
    for way in ("rows", "losses"):
        torch.manual_seed(5)
        solver = method()
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        if way == "rows":
            rows = TaskGradients(model.trunk, num_tasks=3)
            losses = fill(rows, model, xs)
            out = rows.combine(solver)
        else:
            losses = [model.losses(x)[t] for t, x in enumerate(xs)]
            out = fastmtl.backward(losses, solver, model.trunk)
        found.append([out.weights, out.gramian, *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_several_passes_of_a_task_add_up() -> None:
    """Micro-batches: surgery of the whole batch, exactly."""
    model, xs = nets.mlp(), batches()
    rows = TaskGradients(model.trunk, num_tasks=3)
    for half in (slice(0, 2), slice(2, 4)):
        for t, x in enumerate(xs):
            rows.backward(t, model.losses(x[half])[t] / 2)
    losses = [model.losses(x)[t] for t, x in enumerate(xs)]
    shared = task_gradients(losses, model.trunk.parameters())
    jacobian = jacobian_of(shared, model.trunk.parameters())
    method = GradNorm(scale_heads=False)
    out = rows.combine(method)
    torch.testing.assert_close(out.gramian, jacobian @ jacobian.T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(method.initial_losses, torch.stack(losses).detach())
    assert_grads(model.trunk.parameters(), weighted_sum(shared, out.weights), rtol=1e-10)
    assert_grads(model.heads.parameters(), weighted_sum(task_gradients(losses, model.heads.parameters()), [1.0] * 3))


def test_nothing_is_accumulated_before_combine_and_it_starts_anew_after() -> None:
    model, xs = nets.mlp(), batches()
    kept = [torch.ones_like(p) for p in model.trunk.parameters()]
    for p, g in zip(model.trunk.parameters(), kept, strict=True):
        p.grad = g
    rows = TaskGradients(model.trunk, num_tasks=3)
    fill(rows, model, xs)
    assert all(p.grad is g and (g == 1).all() for p, g in zip(model.trunk.parameters(), kept, strict=True))
    first = rows.combine(MGDA())
    with pytest.raises(ValueError, match="no task has run"):
        rows.combine(MGDA())
    fill(rows, model, xs)
    torch.testing.assert_close(rows.combine(MGDA()).weights, first.weights)
    fill(rows, model, xs)
    rows.zero()
    with pytest.raises(ValueError, match="no task has run"):
        rows.combine(MGDA())


def test_task_context() -> None:
    """Backward passes that the user runs, any number of them."""
    model, xs = nets.mlp(), batches()
    rows = TaskGradients(model.trunk, num_tasks=3)
    for t, x in enumerate(xs):
        with rows.task(t):
            for half in (x[:2], x[2:]):
                (model.losses(half)[t] / 2).backward()
    out = rows.combine(MGDA())
    losses = [model.losses(x)[t] for t, x in enumerate(xs)]
    shared = task_gradients(losses, model.trunk.parameters())
    assert_grads(model.trunk.parameters(), weighted_sum(shared, out.weights), rtol=1e-10)


def test_an_error_within_a_pass_keeps_nothing_of_it() -> None:
    model, xs = nets.mlp(), batches()
    rows = TaskGradients(model.trunk, num_tasks=3)
    fill(rows, model, xs)
    loss = model.losses(xs[0])[0]
    loss.backward()
    model.zero_grad()
    with assert_untouched(model), pytest.raises(RuntimeError, match="loss of task 0: its graph was freed"):
        rows.backward(0, loss)

    def interrupted() -> None:
        with rows.task(0):
            model.trunk(xs[0]).sum().backward()
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    losses = [model.losses(x)[t] for t, x in enumerate(xs)]
    jacobian = jacobian_of(task_gradients(losses, model.trunk.parameters()), model.trunk.parameters())
    torch.testing.assert_close(rows.combine(MGDA()).gramian, jacobian @ jacobian.T)


def test_tasks_without_a_row_are_absent() -> None:
    model, xs = nets.mlp(), batches()
    rows = TaskGradients(model.trunk, num_tasks=3)
    for t in (0, 2):
        rows.backward(t, model.losses(xs[t])[t])
    out = rows.combine(GradNorm(scale_heads=False))
    assert out.weights.tolist() == [1, 0, 1]


def test_groups() -> None:
    model, xs = nets.mlp(), batches()
    rows = TaskGradients("trunk", num_tasks=3, model=model, groups="layer")
    losses = fill(rows, model, xs)
    shared = task_gradients(losses, model.trunk.parameters())
    out = rows.combine(MGDA())
    assert out.weights.shape == (2, 3)
    expected = weighted_sum([s[:2] for s in shared], out.weights[0]) + weighted_sum(
        [s[2:] for s in shared], out.weights[1]
    )
    assert_grads(model.trunk.parameters(), expected)


def test_methods_that_scale_heads_need_to_know_them() -> None:
    model, xs = nets.mlp(), batches()
    unknown = TaskGradients(model.trunk, num_tasks=3)
    fill(unknown, model, xs)
    for method in (GradNorm(), UncertaintyWeighting(3)):
        with assert_untouched(model, method), pytest.raises(ValueError, match="pass heads= to TaskGradients"):
            unknown.combine(method)
    unknown.combine(MGDA())  # the rows are still there

    model.zero_grad()
    rows = TaskGradients(model.trunk, num_tasks=3, heads=model.heads)
    method = GradNorm()
    for _ in range(2):
        model.zero_grad()
        losses = fill(rows, model, xs)
        out = rows.combine(method)
    assert (out.weights != 1).all()
    assert_grads(model.parameters(), weighted_sum(task_gradients(losses, model.parameters()), out.weights))


def test_a_loss_weighting_is_its_scalar_backward() -> None:
    model, xs = nets.mlp(), batches()
    weighting = UncertaintyWeighting(3, init=0.4)
    params = [*model.parameters(), *weighting.parameters()]
    weighting([model.losses(x)[t] for t, x in enumerate(xs)]).backward()
    expected = [p.grad for p in params]
    for p in params:
        p.grad = None
    rows = TaskGradients(model.trunk, num_tasks=3, heads=model.heads)
    fill(rows, model, xs)
    rows.combine(weighting)
    assert_grads(params, expected, rtol=1e-6)


def test_scaler() -> None:
    model, xs, found = nets.mlp(), batches(), []
    for scale in (1.0, 2.0**14):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        method = GradNorm()
        rows = TaskGradients(model.trunk, num_tasks=3, heads=model.heads, scaler=scaler)
        for _ in range(2):
            model.zero_grad()
            fill(rows, model, xs)
            out = rows.combine(method, max_norm=0.1)
        found.append([out.weights, out.gramian, *method.buffers(), *(p.grad / scale for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("policy", ["skip", "drop_task", "raise"])
def test_nonfinite(policy: str) -> None:
    model, xs, method = nets.mlp(), batches(), PCGrad()
    rows = TaskGradients(model.trunk, num_tasks=3, heads=model.heads, names=["de", "fr", "ja"])
    for t, x in enumerate(xs):
        rows.backward(t, model.losses(x)[t] * (math.nan if t == 1 else 1.0))
    if policy == "drop_task":
        out = rows.combine(method, nonfinite=policy)
        assert out.weights[1] == 0
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        return
    with assert_untouched(model, method):
        if policy == "skip":
            assert rows.combine(method, nonfinite=policy).weights.tolist() == [0, 0, 0]
        else:
            with pytest.raises(FloatingPointError, match=r"not finite: fr$"):
                rows.combine(method, nonfinite=policy)


def test_losses_may_be_handed_over() -> None:
    model, xs = nets.mlp(), batches()
    rows = TaskGradients(model.trunk, num_tasks=3, names=["de", "fr", "ja"])
    method = GradNorm(scale_heads=False)

    def run() -> list[Tensor]:
        losses = [model.losses(x)[t] for t, x in enumerate(xs)]
        for t, loss in enumerate(losses):
            with rows.task(t):
                loss.backward()
        return [x.detach() for x in losses]

    losses = run()
    with assert_untouched(model.trunk, method):
        for wrong, error in ((None, "GradNorm needs the values"), (losses[:2], "expected 3 tasks, found 2")):
            with pytest.raises(ValueError, match=error):
                rows.combine(method, wrong)
        with pytest.raises(ValueError, match="loss of ja: the task has a gradient but no loss"):
            rows.combine(method, [*losses[:2], None])
    rows.combine(method, losses)
    torch.testing.assert_close(method.initial_losses, torch.stack(losses))


def test_errors() -> None:
    model, xs = nets.mlp(), batches()
    with pytest.raises(ValueError, match=r"num_tasks.*0"):
        TaskGradients(model.trunk, num_tasks=0)
    with pytest.raises(ValueError, match=r"names: expected one per task \(2\), found 1"):
        TaskGradients(model.trunk, num_tasks=2, names=["a"])
    rows = TaskGradients(model.trunk, num_tasks=2, names=["de", "fr"])
    for task in (2, -1, "de", 1.0):
        with pytest.raises(ValueError, match=r"task: expected an index in 0..1"):
            rows.backward(task, model.losses(xs[0])[0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"loss of fr.*no graph"):
        rows.backward(1, torch.tensor(1.0))
    with pytest.raises(TypeError, match="method"):
        rows.combine(MGDA)  # type: ignore[arg-type]


def test_losses_by_name_find_their_task_whatever_the_order() -> None:
    found = {}
    for order in (("a", "b"), ("b", "a")):
        model = nets.mlp(2)
        rows = fastmtl.TaskGradients(model.trunk, 2, names=["a", "b"])
        for t, loss in enumerate(model.losses(torch.randn(4, 5, dtype=torch.float64))):
            with rows.task(t):
                loss.backward(retain_graph=True)
        method = fastmtl.GradNorm(scale_heads=False)
        values = {"a": torch.tensor(1.0), "b": torch.tensor(5.0)}
        rows.combine(method, {name: values[name] for name in order})
        found[order] = method.initial_losses.tolist()
    assert list(found.values()) == [[1, 5], [1, 5]]
    with rows.task(0):
        pass
    with pytest.raises(ValueError, match="no task is named 'c'"):
        rows.combine(fastmtl.GradNorm(scale_heads=False), {"a": values["a"], "c": values["b"]})


def test_rows_are_kept_when_grad_is_a_view_of_a_bucket() -> None:
    """DistributedDataParallel with gradient_as_bucket_view leaves views in .grad, which its next pass overwrites."""
    w = torch.nn.Parameter(torch.ones(3))
    bucket = torch.zeros(4)
    rows = fastmtl.TaskGradients([w], 2)
    for t in range(2):
        with rows.task(t):
            bucket[:3] = t + 1.0
            w.grad = bucket[:3]
    out = rows.combine(fastmtl.MGDA())
    assert out.gramian.tolist() == [[3, 6], [6, 12]]
