"""Methods by name, and what is said of each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastmtl
from fastmtl import GradientMethod, LossWeighting, methods
from fastmtl.checks import preferences, reals
from tests.test_ways_in import METHODS, OPTIONS

NAMES = [*methods.all_methods()]


def classes(base: type) -> set[type]:
    return {base}.union(*map(classes, base.__subclasses__()))


def test_every_public_method_is_listed() -> None:
    """All but base classes and wrappers, which say nothing of themselves."""
    public = {x for x in vars(fastmtl).values() if isinstance(x, type)}
    written = {x for x in classes(GradientMethod) | classes(LossWeighting) if x.__module__.startswith("fastmtl.")}
    wrappers = {getattr(fastmtl, name) for name in methods.WRAPPERS}
    without = {GradientMethod, LossWeighting, fastmtl.RowMethod} | wrappers
    assert written & public - without == {*methods.all_methods().values()}


@pytest.mark.parametrize("name", NAMES)
def test_has_tests_of_its_own(name: str) -> None:
    """A file of its name, or of its base class's, where a few lines make several methods."""
    *package, file = methods.all_methods()[name].__module__.split(".")[1:]
    files = [each.__module__.rpartition(".")[2] for each in methods.all_methods()[name].__mro__[:2]]
    assert any((Path(__file__).parent / package[0] / f"test_{each}.py").exists() for each in files), file


@pytest.mark.parametrize("name", NAMES)
def test_from_name(name: str) -> None:
    options = {key: value for key, value in OPTIONS.get(name, {}).items() if key != "num_tasks"}
    for spelled in (name, name.upper(), name.lower(), "_".join(name), name[:2] + "-" + name[2:]):
        assert type(fastmtl.from_name(spelled, 3, **options)) is getattr(fastmtl, name)


def test_options_go_through() -> None:
    found = fastmtl.from_name("mgda", solver="frank_wolfe", max_iter=7, normalization="l2")
    assert (found.solver, found.max_iter, found.normalization) == ("frank_wolfe", 7, "l2")
    assert fastmtl.from_name("dwa", num_tasks=4, temperature=3).temperature == 3


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        (("pcgrd",), {}, ValueError, "name: no method is called 'pcgrd'; there are .*PCGrad"),
        ((3,), {}, TypeError, "name: expected a method's name, found 3"),
        (("dwa",), {}, ValueError, "num_tasks: DWA is made for one number of tasks"),
        (("pcgrad",), {"colour": 1}, TypeError, "colour"),
        (("pcgrad", "x"), {}, TypeError, "num_tasks: expected a whole number, found 'x'"),
        (("dwa", 0), {}, ValueError, "num_tasks: expected at least 1, found 0"),
        (("htw", 3), {"main": 0}, TypeError, "total_steps: HTW needs this option, found num_tasks, main"),
        (("constant",), {}, TypeError, "weights: Constant needs this option, found none"),
        (("cr_mogm",), {}, ValueError, r"name: CRMOGM wraps a method: fastmtl.CRMOGM\(.*found 'cr_mogm'"),
        (("Amortized",), {}, ValueError, "name: Amortized wraps a method: .*found 'Amortized'"),
    ],
)
def test_from_name_refuses(arguments: tuple, options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        fastmtl.from_name(*arguments, **options)


def test_readme_has_the_table_and_the_wrappers() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert all(f"fastmtl.{name}(" in readme for name in methods.WRAPPERS)
    assert methods.markdown() in readme, "README.md should have what `python -m fastmtl methods --markdown` prints"


def test_command() -> None:
    found = subprocess.run([sys.executable, "-m", "fastmtl", "methods"], capture_output=True, text=True, check=True)
    lines = found.stdout.splitlines()
    assert sorted(line.split()[0] for line in lines[1:]) == sorted(NAMES)
    wrong = subprocess.run([sys.executable, "-m", "fastmtl", "methods", "--html"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "--html" in wrong.stderr


@pytest.mark.parametrize("name", [n for n in METHODS if issubclass(getattr(fastmtl, n), GradientMethod)])
@pytest.mark.parametrize("normalization", ["l2", "loss", "loss+"])
def test_normalization_is_the_method_on_normalized_gradients(name: str, normalization: str) -> None:
    options = {"num_tasks": 3, **OPTIONS.get(name, {})}
    try:
        methods_ = []
        for apply_to in ("raw", "normalized"):
            torch.manual_seed(3)
            methods_.append(fastmtl.from_name(name, **options, normalization=normalization, apply_to=apply_to))
    except TypeError:
        assert name == "GradNorm"  # which balances norms itself
        return
    torch.manual_seed(3)
    plain = fastmtl.from_name(name, **options)
    torch.manual_seed(1)
    jacobian = torch.randn(3, 7, dtype=torch.float64) * torch.tensor([[1.0], [10.0], [0.1]])
    losses = torch.tensor([3.0, 0.2, 1.5], dtype=torch.float64)
    factors = torch.ones(3, dtype=torch.float64)
    if normalization in ("l2", "loss+"):
        factors = factors / jacobian.norm(dim=1)
    if normalization in ("loss", "loss+"):
        factors = factors / losses
    expected = fastmtl.aggregate(factors.unsqueeze(1) * jacobian, plain, losses=losses)
    raw, normalized = (fastmtl.aggregate(jacobian, each, losses=losses) for each in methods_)
    torch.testing.assert_close(raw.weights, expected.weights)
    torch.testing.assert_close(normalized.grads, expected.grads)


def test_reals() -> None:
    assert reals("c", 1) == 1.0
    assert reals("c", torch.tensor([0.5, 2])) == (0.5, 2.0)
    for value, error, text in (
        ("1", TypeError, "c: expected a number, or one per task, found '1'"),
        ({"a": 1}, TypeError, "c: expected a number, or one per task"),
        ([], ValueError, "c: expected a number, or one per task"),
        ([1, -1], ValueError, "c of task 1: .* found -1"),
        ([1, True], TypeError, "c of task 1: expected a number, found True"),
    ):
        with pytest.raises(error, match=text):
            reals("c", value, 0)


def test_preferences() -> None:
    assert preferences(None) is None
    assert preferences([1, 0]) == (1.0, 0.0)
    for value, error, text in (
        (1.0, TypeError, "preference: expected one number per task, found 1.0"),
        ([0, 0], ValueError, "preference: expected a task that counts"),
        ([1, float("nan")], ValueError, "preference of task 1: .* found nan"),
    ):
        with pytest.raises(error, match=text):
            preferences(value)
    with pytest.raises(ValueError, match="preference of task 1: expected a number above 0"):
        preferences([1, 0], open=True)
