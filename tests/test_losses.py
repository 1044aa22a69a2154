"""What may be passed as losses, and what is said of the rest."""

from __future__ import annotations

import math
from collections import OrderedDict

import pytest
import torch
from torch import Tensor

from fastmtl.losses import parse_losses


def leaf(value: float = 1.0) -> Tensor:
    return torch.tensor(value, requires_grad=True)


def test_sequence_mapping_and_tensor_are_the_same_losses() -> None:
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    for losses in ([*x], (*x,), x):
        parsed = parse_losses(losses)
        assert parsed.names == ("task 0", "task 1", "task 2")
        assert len(parsed) == 3
        assert torch.equal(parsed.values(), x.detach().double())
    parsed = parse_losses(OrderedDict(depth=x[0], normals=x[1], seg=x[2]))
    assert parsed.names == ("depth", "normals", "seg")
    assert torch.equal(parsed.values(), x.detach().double())


def test_values_are_float64_detached_and_nan_where_absent() -> None:
    parsed = parse_losses({"a": None, "b": leaf(2.0), "c": None, "d": leaf(3.0).to(torch.bfloat16)})
    values = parsed.values()
    assert values.dtype == torch.float64
    assert not values.requires_grad
    assert values[[1, 3]].tolist() == [2.0, 3.0]
    assert values[[0, 2]].isnan().all()
    assert [x is None for x in parsed.items] == [True, False, True, False]
    assert len(parsed.present) == 2


def test_one_element_is_a_scalar_whatever_its_shape() -> None:
    parsed = parse_losses([leaf(), torch.ones(1, 1, requires_grad=True)])
    assert all(x is not None and x.shape == () for x in parsed.items)


def test_values_that_are_not_finite_pass() -> None:
    assert parse_losses([leaf(math.inf)]).values().isinf().all()


@pytest.mark.parametrize(
    ("losses", "kind", "error"),
    [
        ({"depth": leaf(), "seg": torch.ones(3, requires_grad=True)}, ValueError, r"loss of seg.*scalar.*\[3\]"),
        ({"depth": leaf(), "seg": 1.5}, TypeError, "loss of seg.*float"),
        ({"depth": leaf(), "seg": torch.tensor(1)}, ValueError, "loss of seg.*torch.int64"),
        ({"depth": torch.tensor(1.0), "seg": leaf()}, ValueError, "loss of depth.*no graph"),
        ({"depth": leaf(), "seg": torch.ones((), device="meta", requires_grad=True)}, ValueError, "loss of seg.*meta"),
        ([leaf(), torch.ones(2)], ValueError, "loss of task 1"),
        (torch.ones(2, 2, requires_grad=True), ValueError, r"shape \[2, 2\]"),
        (leaf(), ValueError, r"shape \[\]"),
        ([], ValueError, "at least one loss, found 0 tasks"),
        ([None, None], ValueError, "found 2 tasks, all absent"),
        ("ab", TypeError, "losses: .*str"),
        (3.0, TypeError, "losses: .*float"),
        ((x for x in [leaf()]), TypeError, "losses: .*generator"),
    ],
)
def test_errors_name_task_and_value(losses: object, kind: type[Exception], error: str) -> None:
    with pytest.raises(kind, match=error):
        parse_losses(losses)  # type: ignore[arg-type]


def test_a_graph_is_asked_for_only_where_it_is_needed() -> None:
    assert parse_losses([torch.tensor(1.0)], differentiable=False).values().tolist() == [1.0]
