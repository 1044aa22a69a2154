"""Which parameters a user means, and how they are grouped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastmtl.parameters import find_leaves, resolve_groups, resolve_params
from tests import nets


def test_module_parameters_and_names_mean_the_same() -> None:
    model = nets.mlp()
    expected = [*model.trunk.parameters()]
    names = [f"trunk.{name}" for name, _ in model.trunk.named_parameters()]
    for params in (
        model.trunk,
        [*model.trunk],
        model.trunk.parameters(),
        expected,
        "trunk",
        names,
        ["trunk.0", "trunk.2"],
    ):
        found = resolve_params(params, model, "shared_params")
        assert [id(p) for p in found.values()] == [id(p) for p in expected]
        assert [*found] == names


def test_without_a_model_tensors_have_no_names() -> None:
    params = [*nets.mlp().trunk.parameters()]
    assert [*resolve_params(params, None, "shared_params")] == [f"shared_params[{i}]" for i in range(4)]
    assert [*resolve_params(params[0], None, "shared_params")] == ["shared_params[0]"]


def test_each_parameter_once() -> None:
    tied = nets.Tied()
    assert len(resolve_params(tied, None, "shared_params")) == 3
    assert len(resolve_params([tied.a, tied.b, tied.b.bias], None, "shared_params")) == 3
    assert len(resolve_params([tied.a, nn.Linear(5, 5)], None, "shared_params")) == 4  # equal names, other parameters


def test_frozen_parameters_of_a_module_are_left_out() -> None:
    trunk = nets.mlp().trunk
    trunk[0].requires_grad_(False)
    assert [*resolve_params(trunk, None, "shared_params")] == ["2.weight", "2.bias"]
    with pytest.raises(ValueError, match="no trainable parameter"):
        resolve_params(trunk[0], None, "shared_params")


@pytest.mark.parametrize(
    ("params", "kind", "error"),
    [
        (["trunk.9"], ValueError, "no parameter or submodule named 'trunk.9'"),
        ([3], TypeError, r"shared_params\[0\].*int"),
        ([torch.ones(3)], ValueError, r"shared_params\[0\].*trainable leaf"),
        ([torch.ones(3, requires_grad=True) * 2], ValueError, r"shared_params\[0\].*trainable leaf"),
        ([], ValueError, "nothing in it"),
        (torch.nn.ReLU(), ValueError, "no trainable parameter"),
    ],
)
def test_errors(params: Any, kind: type[Exception], error: str) -> None:
    with pytest.raises(kind, match=error):
        resolve_params(params, nets.mlp(), "shared_params")


def test_a_name_needs_a_model() -> None:
    with pytest.raises(ValueError, match="'trunk' needs model="):
        resolve_params("trunk", None, "shared_params")


# ---- groups ----------------------------------------------------------------------------------------------------------


def test_groups_by_keyword() -> None:
    model = nets.mlp()
    params = resolve_params(model.trunk, model, "shared_params")
    assert resolve_groups(None, params, model) == (None, 1)
    assert resolve_groups("all", params, model) == (None, 1)
    assert resolve_groups("layer", params, model) == ([0, 0, 1, 1], 2)
    assert resolve_groups("tensor", params, model) == ([0, 1, 2, 3], 4)


def test_explicit_groups() -> None:
    model = nets.mlp()
    params = resolve_params(model.trunk, model, "shared_params")
    for groups in (
        [model.trunk[2], model.trunk[0]],
        ["trunk.2", "trunk.0"],
        [[*model.trunk[2].parameters()], "trunk.0"],
    ):
        assert resolve_groups(groups, params, model) == ([1, 1, 0, 0], 2)


def test_groups_may_cover_more_than_the_shared_parameters() -> None:
    model = nets.mlp()
    params = resolve_params(model.trunk, model, "shared_params")
    assert resolve_groups(["heads", "trunk"], params, model) == ([1, 1, 1, 1], 2)


@pytest.mark.parametrize(
    ("groups", "error"),
    [
        ("module", "'module'"),
        (["trunk.0"], "in no group: trunk.2.weight, trunk.2.bias"),
        (["trunk.0", "trunk"], "trunk.0.weight is in group 0 and in group 1"),
        (["trunk.0", "trunk.7"], r"groups\[1\].*'trunk.7'"),
    ],
)
def test_groups_that_do_not_fit(groups: object, error: str) -> None:
    model = nets.mlp()
    with pytest.raises(ValueError, match=error):
        resolve_groups(groups, resolve_params(model.trunk, model, "shared_params"), model)  # type: ignore[arg-type]


def test_layers_need_names() -> None:
    params = resolve_params(nets.mlp().trunk.parameters(), None, "shared_params")
    with pytest.raises(ValueError, match="groups='layer' goes by names"):
        resolve_groups("layer", params, None)


# ---- leaves ----------------------------------------------------------------------------------------------------------


def test_leaves_are_what_backward_would_fill() -> None:
    model = nets.mlp()
    losses = model.losses(torch.randn(4, 5, dtype=torch.float64))
    leaves, kinds = find_leaves(losses[:2])
    reached = [*model.trunk.parameters(), *model.heads[0].parameters(), *model.heads[1].parameters()]
    assert {id(p) for p in leaves} == {id(p) for p in reached}
    assert len(leaves) == len(reached)
    assert "AddmmBackward0" in {kind.__name__ for kind in kinds}


def test_a_loss_may_be_a_leaf_itself() -> None:
    loss = torch.ones((), requires_grad=True)
    leaves, _ = find_leaves([loss, loss * 2])
    assert [id(p) for p in leaves] == [id(loss)]


def test_a_deep_graph_needs_no_recursion() -> None:
    x = torch.ones((), requires_grad=True)
    y = x
    for _ in range(5000):
        y = y * 1.0
    leaves, _ = find_leaves([y])
    assert leaves == [x]
