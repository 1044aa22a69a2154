"""Where the graphs of several losses meet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from fastmtl.cut import Cut, cut
from tests import nets
from tests.nets import task_gradients


def inputs(batch: int = 4) -> Tensor:
    return torch.randn(batch, 5, dtype=torch.float64)


def ids(*modules: nn.Module) -> set[int]:
    return {id(p) for m in modules for p in m.parameters()}


def at_losses(parts: Cut, losses: list[Tensor], first: int = 0) -> bool:
    """Whether a task has nothing to itself, for each of the losses."""
    roots = [get_gradient_edge(x)[:2] for x in losses]
    return [[parts.edges[e][:2] for e in mine] for mine in parts.of_task[first:][: len(losses)]] == [[r] for r in roots]


def through(parts: Cut, losses: list[Tensor], params: list[Tensor]) -> list[list[Tensor | None]]:
    """Each task's gradients, by its private part and then by the common one."""
    rows = []
    for k, loss in enumerate(losses):
        row: dict[int, Tensor] = {}
        private = [p for p in params if id(p) in parts.private[k]]
        edges = [parts.edges[e] for e in parts.of_task[k]]
        if at_losses(parts, [loss], k):
            arrived = [torch.ones_like(loss)]
        else:
            found = torch.autograd.grad([loss], [*edges, *private], retain_graph=True)
            arrived = list(found[: len(edges)])
            row.update({id(p): g for p, g in zip(private, found[len(edges) :], strict=True)})
        common = [p for p in params if parts.reached(parts.of_task[k], p)]
        if common:
            found = torch.autograd.grad(edges, common, arrived, retain_graph=True)
            row.update({id(p): g for p, g in zip(common, found, strict=True)})
        rows.append([row.get(id(p)) for p in params])
    return rows


def assert_right(parts: Cut, losses: list[Tensor], params: list[Tensor]) -> None:
    for found, expected in zip(through(parts, losses, params), task_gradients(losses, params), strict=True):
        assert expected is not None
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_trunk_and_heads() -> None:
    model = nets.mlp()
    losses = model.losses(inputs())
    parts = cut(losses)
    assert parts.of_task == [[0], [0], [0]]
    assert parts.edges[0].node.name() == "AddmmBackward0"
    assert parts.private == [ids(head) for head in model.heads]
    assert set(parts.reach) == ids(model.trunk)
    assert_right(parts, losses, [*model.parameters()])


@pytest.mark.parametrize("trunk", [name for name in nets.TRUNKS if name != "reentrant"])
def test_every_trunk(trunk: str) -> None:
    model = nets.net(trunk)
    losses = model.losses(inputs())
    parts = cut(losses)
    assert not at_losses(parts, losses)
    assert_right(parts, losses, [*model.parameters()])


def test_several_features_and_subsets_of_them() -> None:
    a, b, c = (nn.Linear(5, 5).double() for _ in range(3))
    x = inputs()
    u, v, w = a(x), b(x), c(x)  # none leads to another
    losses = [(u * v).sum(), (v * w).tanh().sum(), w.pow(3).sum(), (u + v + w).pow(2).sum()]
    parts = cut(losses)
    assert [len(edges) for edges in parts.of_task] == [2, 2, 1, 3]
    assert_right(parts, losses, [*a.parameters(), *b.parameters(), *c.parameters()])


def test_features_that_lead_to_each_other_are_cut_at_the_losses() -> None:
    lower, upper = nn.Linear(5, 5).double(), nn.Linear(5, 5).double()
    z = torch.tanh(lower(inputs()))
    top = upper(z)
    losses = [(top * z).sum(), top.pow(2).sum(), z.pow(2).sum()]  # the first reads both
    parts = cut(losses)
    assert at_losses(parts, losses)
    assert_right(parts, losses, [*lower.parameters(), *upper.parameters()])
    apart = [top.sum(), z.pow(2).sum(), top.pow(2).sum()]  # each reads one
    assert not at_losses(cut(apart), apart)
    assert_right(cut(apart), apart, [*lower.parameters(), *upper.parameters()])


def test_a_weight_tied_between_trunk_and_head_is_cut_at_the_losses() -> None:
    model = nets.mlp()
    x = inputs()
    losses = [*model.losses(x), (model.features(x) @ model.trunk[0].weight[:6]).pow(2).sum()]
    parts = cut(losses)
    assert_right(parts, losses, [*model.parameters()])
    z = model.features(x)
    tied = [(z @ model.trunk[0].weight[:6]).pow(2).sum(), z.sum()]
    assert at_losses(cut(tied), tied)
    assert_right(cut(tied), tied, [*model.trunk.parameters()])


def test_a_loss_within_another() -> None:
    model = nets.mlp(2)
    first, second = model.losses(inputs())
    losses = [first, second + 2 * first, 3 * first]
    parts = cut(losses)
    assert_right(parts, losses, [*model.parameters()])


def test_losses_of_one_node_and_leaves_as_losses() -> None:
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    losses = [*(w**2).unbind(0)]
    assert_right(cut(losses), losses, [w])
    leaf = torch.randn((), dtype=torch.float64, requires_grad=True)
    losses = [leaf, 2 * leaf]
    assert_right(cut(losses), losses, [leaf])


def test_one_loss_has_everything_to_itself() -> None:
    model = nets.mlp(1)
    losses = model.losses(inputs())
    parts = cut(losses)
    assert parts.edges == []
    assert parts.reach == {}
    assert_right(parts, losses, [*model.parameters()])


@pytest.mark.parametrize("in_place", [False, True])
def test_a_hook_that_changes_a_gradient_would_do_so_twice(in_place: bool) -> None:
    model = nets.mlp(2)
    z = model.features(inputs())
    z.register_hook((lambda g: g.mul_(3)) if in_place else (lambda g: 3 * g))
    losses = [head(z).sum() for head in model.heads]
    assert at_losses(cut(losses), losses)
    seen: list[Tensor] = []
    z = model.features(inputs())
    z.register_hook(lambda g: seen.append(g))  # only looks
    losses = [head(z).sum() for head in model.heads]
    assert not at_losses(cut(losses), losses)
