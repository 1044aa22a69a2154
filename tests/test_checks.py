"""Options of methods: wrong types and values are refused by name, and ``repr`` shows what was chosen."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch

import fastmtl
from fastmtl import DWA, HTW, LBTW, MGDA, PELTR, GradNorm, GradVac, PCGrad, UncertaintyWeighting, ops
from fastmtl.checks import choice, flag, real, whole
from fastmtl.methods import all_methods
from fastmtl.surgery.base import CommonOptions
from tests.test_ways_in import METHODS, make


def test_numbers() -> None:
    assert real("x", 0, 0, 1) == 0
    assert real("x", np.float32(0.5), 0, 1, open=True) == 0.5
    assert type(real("x", np.float64(2))) is float
    assert whole("x", np.int64(3), 0, 3) == 3
    assert type(whole("x", np.int64(3), 0)) is int
    assert choice("x", "b", ("a", "b")) == "b"
    assert flag("x", False) is False


@pytest.mark.parametrize(
    ("value", "bounds", "expected"),
    [
        (1.5, (0, 1), r"\[0, 1\]"),
        (-1, (0,), r"\[0, inf\)"),
        (0, (0, 1, True), r"\(0, 1\)"),
        (1, (0, 1, True), r"\(0, 1\)"),
        (math.nan, (), r"\(-inf, inf\)"),
        (math.inf, (0,), r"\[0, inf\)"),
        (-math.inf, (), r"\(-inf, inf\)"),
    ],
)
def test_reals_out_of_bounds(value: float, bounds: tuple, expected: str) -> None:
    with pytest.raises(ValueError, match=rf"^x: expected a number in {expected}, found {value}$"):
        real("x", value, *bounds)


def test_whole_numbers_and_choices_out_of_bounds() -> None:
    with pytest.raises(ValueError, match=r"^x: expected at least 1, found 0$"):
        whole("x", 0, 1)
    for value in (-1, 4):
        with pytest.raises(ValueError, match=rf"^x: expected a whole number in 0\.\.3, found {value}$"):
            whole("x", value, 0, 3)
    with pytest.raises(ValueError, match=r"^x: expected 'a', 'b' or 'c', found 'd'$"):
        choice("x", "d", ("a", "b", "c"))


@pytest.mark.parametrize("value", [None, "a", [1.0], True, 1j, torch.tensor(0.5)], ids=repr)
def test_what_is_no_number(value: Any) -> None:
    for check in (real, lambda name, x: whole(name, x, 0)):
        with pytest.raises(TypeError, match=r"^x: expected a .*number, found "):
            check("x", value)


def test_in_a_compiled_graph_where_numbers_are_symbols() -> None:
    torch.compiler.reset()
    gramian = torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))[None]

    def solve(m: torch.Tensor, steps: int, tol: float) -> torch.Tensor:
        return ops.frank_wolfe(m, None, steps, tol)[0]

    compiled = torch.compile(solve, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps, tol in ((3, 1e-3), (5, 1e-4)):
        assert torch.equal(compiled(gramian, steps, tol), solve(gramian, steps, tol))


@pytest.mark.parametrize(
    ("method", "options", "name"),
    [
        (GradNorm, {"lr": None}, "lr"),
        (GradNorm, {"alpha": "a"}, "alpha"),
        (GradNorm, {"min_weight": "a"}, "min_weight"),
        (GradNorm, {"optimizer": None}, "optimizer"),
        (GradNorm, {"renormalize": 1}, "renormalize"),
        (GradNorm, {"renormalize": "epoch", "steps_per_epoch": 2.5}, "steps_per_epoch"),
        (GradVac, {"beta": "a"}, "beta"),
        (GradVac, {"init": None}, "init"),
        (PCGrad, {"reduction": None}, "reduction"),
        (PCGrad, {"order": 3}, "order"),
        (PCGrad, {"generator": 3}, "generator"),
        (PCGrad, {"rescale": None}, "rescale"),
        (MGDA, {"solver": None}, "solver"),
        (MGDA, {"solver": "frank_wolfe", "max_iter": 2.5}, "max_iter"),
        (MGDA, {"solver": "frank_wolfe", "tol": "a"}, "tol"),
        (MGDA, {"solver": "frank_wolfe", "start": 1}, "start"),
        (MGDA, {"normalization": None}, "normalization"),
        (MGDA, {"apply_to": None}, "apply_to"),
        (PELTR, {"lower_bounds": "a"}, "lower_bounds"),
        (PELTR, {"lower_bounds": None}, "lower_bounds"),
        (PELTR, {"lower_bounds": True}, "lower_bounds"),
        (PELTR, {"lower_bounds": [0.1, "a"]}, "lower_bounds of task 1"),
        (PELTR, {"solver": None}, "solver"),
        (DWA, {"num_tasks": 2.5}, "num_tasks"),
        (DWA, {"num_tasks": 2, "temperature": "a"}, "temperature"),
        (DWA, {"num_tasks": 2, "window": 2.5}, "window"),
        (DWA, {"num_tasks": 2, "steps_per_epoch": 2.5}, "steps_per_epoch"),
        (DWA, {"num_tasks": 2, "reduction": None}, "reduction"),
        (LBTW, {"num_tasks": True}, "num_tasks"),
        (LBTW, {"num_tasks": 2, "alpha": None}, "alpha"),
        (LBTW, {"num_tasks": 2, "normalize": None}, "normalize"),
        (HTW, {"num_tasks": 2, "main": True, "total_steps": 9}, "main"),
        (HTW, {"num_tasks": 2, "main": "clicks", "total_steps": 9}, "main"),
        (HTW, {"num_tasks": 2, "main": 0, "total_steps": math.nan}, "total_steps"),
        (HTW, {"num_tasks": 2, "main": 0, "total_steps": 9, "warmup": None}, "warmup"),
        (HTW, {"num_tasks": 2, "main": 0, "total_steps": 9, "ramp": None}, "ramp"),
        (HTW, {"num_tasks": 2, "main": 0, "total_steps": 9, "ramp": 0.5}, "ramp"),
        (HTW, {"num_tasks": 2, "main": 0, "total_steps": 9, "ramp": (0, "a")}, "ramp's end"),
        (UncertaintyWeighting, {"num_tasks": None}, "num_tasks"),
        (UncertaintyWeighting, {"num_tasks": 2, "init": "a"}, "init"),
        (UncertaintyWeighting, {"num_tasks": 2, "kind": 5}, "kind"),
        (UncertaintyWeighting, {"num_tasks": 2, "kind": ["regression", None]}, "kind of task 1"),
        (UncertaintyWeighting, {"num_tasks": 2, "variant": None}, "variant"),
        (fastmtl.COSMOS, {"num_tasks": 2, "penalty": "a"}, "penalty"),
        (fastmtl.COSMOS, {"num_tasks": 2, "generator": 3}, "generator"),
        (fastmtl.ConstantWeighting, {"weights": 1.0}, "weights"),
        (fastmtl.ConstantWeighting, {"weights": [1.0, None]}, "weights of task 1"),
        (fastmtl.EqualWeighting, {"num_tasks": 2, "reduction": None}, "reduction"),
        (fastmtl.FAMO, {"num_tasks": 2, "lr": "a"}, "lr"),
        (fastmtl.FAMO, {"num_tasks": 2, "after": None}, "after"),
        (fastmtl.FAMO, {"num_tasks": 2, "min_losses": "a"}, "min_losses"),
        (fastmtl.GeometricMean, {"num_tasks": 2, "focus": 1}, "focus"),
        (fastmtl.IMTLL, {"num_tasks": 2, "init": None}, "init"),
        (fastmtl.LogLoss, {"num_tasks": "a"}, "num_tasks"),
        (fastmtl.PBI, {"num_tasks": 2, "theta": None}, "theta"),
        (fastmtl.PBI, {"num_tasks": 2, "preference": 1.0}, "preference"),
        (fastmtl.PBI, {"num_tasks": 2, "ideal": None}, "ideal"),
        (fastmtl.RLW, {"num_tasks": 2, "distribution": None}, "distribution"),
        (fastmtl.ReLoBRaLo, {"num_tasks": 2, "alpha": "a"}, "alpha"),
        (fastmtl.ReLoBRaLo, {"num_tasks": 2, "start": None}, "start"),
        (fastmtl.STCH, {"num_tasks": 2, "mu": "a"}, "mu"),
        (fastmtl.STCH, {"num_tasks": 2, "preference": ["a", 1]}, "preference of task 0"),
        (fastmtl.STCH, {"num_tasks": 2, "variant": None}, "variant"),
        (fastmtl.SoftAdapt, {"num_tasks": 2, "beta": None}, "beta"),
        (fastmtl.SoftAdapt, {"num_tasks": 2, "order": 1.5}, "order"),
    ],
)
def test_wrong_types(method: type, options: dict, name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name}: expected .*, found "):
        method(**options)


FLAGS = [
    (name, option)
    for name, each in all_methods().items()
    for option, parameter in inspect.signature(each).parameters.items()
    if isinstance(parameter.default, bool)
]


@pytest.mark.parametrize(("name", "option"), FLAGS)
def test_what_is_neither_true_nor_false(name: str, option: str) -> None:
    assert getattr(make(name, **{option: True}), option) is True
    for value in ("no", None, 1, torch.tensor(True)):
        with pytest.raises(TypeError, match=rf"^{option}: expected True or False, found "):
            make(name, **{option: value})


def test_numbers_of_numpy_and_torch() -> None:
    assert HTW(np.int64(2), main=np.int64(1), total_steps=np.int32(9)).main == 1
    assert DWA(2, window=np.int64(3), temperature=np.float32(2)).history.shape == (6, 2)
    assert PELTR(torch.tensor(0.25)).lower_bounds == 0.25
    assert PELTR(np.array([0.25, 0.5])).lower_bounds == (0.25, 0.5)


@pytest.mark.parametrize("name", METHODS)
def test_repr_shows_every_option(name: str) -> None:
    """Except ``generator``, which is asked for a seed only."""
    method = make(name)
    options = inspect.signature(type(method)).parameters.keys() - {"generator"}
    if "common" in options:
        options = options - {"common"} | CommonOptions.__annotations__.keys()
    assert {x for x in options if f"{x}=" in repr(method)} == options


def test_repr_shows_what_was_chosen() -> None:
    text = repr(UncertaintyWeighting(2, ["regression", "classification"], init=0.5))
    assert "kind=['regression', 'classification']" in text
    assert "init=0.5" in text
    assert "variant='kendall'" in text
