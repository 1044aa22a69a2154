"""PCGradOptimizer against the port's algorithm, in float64 and with the same orders."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from fastmtl.compat import PCGradOptimizer
from tests.nets import mlp


def by_port(losses: Sequence[Tensor], params: Sequence[Tensor], reduction: str) -> list[Tensor]:
    """What the port does to flattened gradients of all parameters, with what is missing as zeros."""
    grads = [torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True) for loss in losses]
    rows = [
        torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(row, params, strict=True)])
        for row in grads
    ]
    everybody = torch.cat(
        [torch.full((p.numel(),), all(row[i] is not None for row in grads)) for i, p in enumerate(params)]
    )
    met = list(rows)
    projected = []
    for row in rows:
        random.shuffle(met)
        for other in met:
            dot = row @ other
            if dot < 0:
                row = row - dot / (other @ other) * other
        projected.append(row)
    total = torch.stack(projected).sum(0)
    if reduction == "mean":
        total = torch.where(everybody, total / len(rows), total)
    return [part.view_as(p) for part, p in zip(total.split([p.numel() for p in params]), params, strict=True)]


def two_of_three() -> tuple[list[Tensor], list[nn.Parameter]]:
    """Parameters of all tasks, of two, of one, of none."""
    params = [nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in (6, 4, 3, 2)]
    a, b, c, _ = params
    return [
        (a**2).sum() + (b - 1).square().sum(),
        -(a**2).sum() + (b + 1).square().sum(),
        (a.sum() + c.sum()) ** 2,
    ], params


def heads(num_tasks: int) -> tuple[list[Tensor], list[nn.Parameter]]:
    net = mlp(num_tasks)
    return net.losses(torch.randn(9, 5, dtype=torch.float64)), list(net.parameters())


PROBLEMS: dict[str, Callable[[], tuple[list[Tensor], list[nn.Parameter]]]] = {
    "two of three": two_of_three,
    "one task": lambda: heads(1),
    "heads, T = 3": lambda: heads(3),
    "heads, T = 12": lambda: heads(12),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_same_as_the_port(problem: str, reduction: str) -> None:
    losses, params = PROBLEMS[problem]()
    for p in params:
        p.grad = torch.ones_like(p)  # overwritten
    optimizer = PCGradOptimizer(torch.optim.SGD(params[::2] + params[1::2], lr=0.1), reduction)  # another order
    for seed in range(3):
        random.seed(seed)
        expected = by_port(losses, params, reduction)
        random.seed(seed)
        optimizer.pc_backward(losses)
        for p, grad in zip(params, expected, strict=True):
            torch.testing.assert_close(p.grad, grad, rtol=1e-9, atol=1e-12)


def test_projections_happen() -> None:
    # Else the comparison above would say nothing of the orders.
    losses, params = heads(12)
    optimizer = PCGradOptimizer(torch.optim.SGD(params, lr=0.1))
    found = [optimizer.pc_backward(losses).weights for _ in range(2)]
    assert (found[0] > 1.01).any()
    assert not torch.allclose(found[0], found[1])


def test_training_steps() -> None:
    torch.manual_seed(1)
    ours, theirs = mlp(4), mlp(4)
    theirs.load_state_dict(ours.state_dict())
    adam = torch.optim.Adam(theirs.parameters(), lr=0.01)
    optimizer = PCGradOptimizer(torch.optim.Adam(ours.parameters(), lr=0.01))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer.optimizer, 0.9)
    schedules = schedule, torch.optim.lr_scheduler.ExponentialLR(adam, 0.9)
    for step in range(5):
        x = torch.randn(9, 5, dtype=torch.float64)
        random.seed(step)
        params = list(theirs.parameters())
        for p, grad in zip(params, by_port(theirs.losses(x), params, "mean"), strict=True):
            p.grad = grad
        adam.step()
        random.seed(step)
        optimizer.zero_grad()
        optimizer.pc_backward(ours.losses(x))
        optimizer.step()
        for each in schedules:
            each.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


def test_absent_task() -> None:
    losses, params = two_of_three()
    optimizer = PCGradOptimizer(torch.optim.SGD(params, lr=0.1))
    random.seed(0)
    out = optimizer.pc_backward([losses[0], None, losses[1]])
    with_none = [p.grad for p in params]
    assert out.weights[1] == 0
    expected = by_port(losses[:2], params, "mean")  # of two tasks any order gives the same
    for found, grad in zip(with_none, expected, strict=True):
        torch.testing.assert_close(found, grad)


def test_frozen_and_foreign_parameters() -> None:
    losses, (a, b, c, d) = two_of_three()
    c.grad = torch.ones_like(c)
    d.requires_grad_(False)
    optimizer = PCGradOptimizer(torch.optim.SGD([a, b, d], lr=0.1))
    optimizer.pc_backward(losses)
    assert d.grad is None
    torch.testing.assert_close(c.grad, 1 + torch.autograd.grad(losses[2], c)[0])


def test_graph_is_kept_or_freed() -> None:
    losses, params = two_of_three()
    optimizer = PCGradOptimizer(torch.optim.SGD(params, lr=0.1))
    optimizer.pc_backward(losses)
    optimizer.pc_backward(losses, retain_graph=False)
    with pytest.raises(RuntimeError, match=r"second time|freed"):
        optimizer.pc_backward(losses)


def test_scaler() -> None:
    losses, params = heads(3)
    random.seed(0)
    PCGradOptimizer(torch.optim.SGD(params, lr=0.1)).pc_backward(losses)
    plain = [p.grad for p in params]
    random.seed(0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = PCGradOptimizer(torch.optim.SGD(params, lr=0.1), scaler=scaler)
    optimizer.pc_backward(losses)
    for p, grad in zip(params, plain, strict=True):
        torch.testing.assert_close(p.grad, 1024 * grad, rtol=0, atol=0)


def test_errors_leave_grad() -> None:
    losses, params = two_of_three()
    kept = params[0].grad = torch.ones_like(params[0])
    optimizer = PCGradOptimizer(torch.optim.SGD(params, lr=0.1))
    with pytest.raises(ValueError, match="task 1: it has no graph"):
        optimizer.pc_backward([losses[0], torch.ones(())])
    assert params[0].grad is kept
    with pytest.raises(ValueError, match=r"reduction: .*'median'"):
        PCGradOptimizer(torch.optim.SGD(params, lr=0.1), "median")
    with pytest.raises(TypeError, match=r"optimizer: .*list"):
        PCGradOptimizer(params)
