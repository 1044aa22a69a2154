"""Every gradient method with as many tasks as it says it is made for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastmtl
from fastmtl.methods import all_methods
from fastmtl.surgery.row_method import RowMethod
from tests.test_ways_in import OPTIONS

NAMES = [name for name, method in all_methods().items() if issubclass(method, fastmtl.GradientMethod)]


def options_for(name: str, num_tasks: int) -> dict[str, Any]:
    options = {key: value for key, value in OPTIONS.get(name, {}).items() if not isinstance(value, list | tuple)}
    own = {"PELTR": {"lower_bounds": 0.5 / num_tasks}, "Constant": {"weights": 2.0}, "EPO": {}}
    return {**options, **own.get(name, {})}


@pytest.mark.parametrize("name", NAMES)
def test_many_tasks(name: str) -> None:
    """Finite weights, 0 for an absent task, which give the combination."""
    method_class = all_methods()[name]
    num_tasks = method_class.facts.up_to
    several = getattr(method_class, "several_batches", False)
    options = options_for(name, num_tasks)
    if several:
        num_tasks -= num_tasks % 3
        options["num_tasks"] = num_tasks // 3
    method = fastmtl.from_name(name, **{"num_tasks": num_tasks, **options})
    torch.manual_seed(num_tasks)
    rows = torch.randn(num_tasks, num_tasks + 50) * torch.logspace(-0.5, 0.5, num_tasks)[:, None]
    losses: list[Any] = [*(torch.rand(num_tasks) + 0.1).unbind()]
    if not several:
        losses[7] = None
    out = fastmtl.aggregate(rows, method, losses=losses)
    assert out.grads.isfinite().all()
    if issubclass(method_class, RowMethod):  # what it weighs are not these rows
        return
    assert out.weights.isfinite().all()
    assert several or out.weights[7] == 0
    torch.testing.assert_close(out.grads, (out.weights.float() @ rows), rtol=1e-3, atol=1e-3 * float(rows.abs().max()))
