"""All methods by name: `from_name`, and the table of ``python -m fastmtl methods``."""

from __future__ import annotations

import inspect
from typing import Any

from fastmtl import surgery, weighting
from fastmtl.checks import whole
from fastmtl.engine import Method
from fastmtl.surgery.base import GradientMethod
from fastmtl.weighting.base import LossWeighting

QUESTIONS = ("magnitude", "velocity", "direction")
WRAPPERS = ("Amortized", "CRMOGM")


def all_methods() -> dict[str, type[Method]]:
    """Every method's class by its name: loss weightings, then gradient methods, each by the alphabet."""
    found: dict[str, type[Method]] = {}
    for package in (weighting, surgery):
        for name in sorted(package.__all__, key=str.lower):
            each = getattr(package, name)
            if isinstance(each, type) and "facts" in vars(each):
                found[name] = each
    return found


def from_name(name: str, num_tasks: int | None = None, **options: Any) -> Method:
    """A method by its name, as in a configuration file.

    Args:
        name: A class's name in any case, with or without ``_`` and ``-``: ``"pcgrad"``, ``"uncertainty_weighting"``.
            ``python -m fastmtl methods`` lists them.
        num_tasks: T, at least 1, for methods that are made for one number of tasks; checked, but not used, by the
            others.
        options: The method's own.

    Raises:
        ValueError: There is no such method; the text lists the names. It wants ``num_tasks``, or that is below 1.
        TypeError: An option that the method has not, or lacks; ``num_tasks`` is no whole number.

    Example:
        >>> import fastmtl
        >>> fastmtl.from_name("dwa", num_tasks=3).num_tasks
        3
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a method's name, found {name!r}")
    known = all_methods()
    by_key = {_key(each): each for each in known}
    if num_tasks is not None:
        num_tasks = whole("num_tasks", num_tasks, 1)
    for wrapper in WRAPPERS:
        if _key(name) == _key(wrapper):
            raise ValueError(
                f"name: {wrapper} wraps a method: fastmtl.{wrapper}(fastmtl.from_name(...)); found {name!r}"
            )
    if _key(name) not in by_key:
        raise ValueError(f"name: no method is called {name!r}; there are {', '.join(known)}")
    method = known[by_key[_key(name)]]
    parameters = inspect.signature(method).parameters
    if "num_tasks" in parameters:
        if num_tasks is None and parameters["num_tasks"].default is inspect.Parameter.empty:
            raise ValueError(f"num_tasks: {method.__name__} is made for one number of tasks, found None")
        if num_tasks is not None:
            options = {"num_tasks": num_tasks, **options}
    for option, parameter in parameters.items():
        variadic = parameter.kind is inspect.Parameter.VAR_KEYWORD
        if parameter.default is inspect.Parameter.empty and not variadic and option not in options:
            raise TypeError(f"{option}: {method.__name__} needs this option, found {', '.join(options) or 'none'}")
    return method(**options)


def ways_in(method: type[Method]) -> str:
    """The ways in that take a method, in short."""
    if issubclass(method, LossWeighting):
        return "losses, all"
    assert issubclass(method, GradientMethod)
    if method.several_batches:
        return "all but FeatureSurgery"
    return "all but groups=" if method.single_group else "all"


def rows() -> list[dict[str, str]]:
    """The table of all methods: a dict of columns each."""
    return [
        {
            "method": name,
            "answers": method.facts.answers,
            "paper": method.facts.paper,
            "weights sum to": method.facts.sums_to,
            "also needs": method.facts.needs,
            "state": method.facts.state,
            "cost": method.facts.cost,
            "up to": f"T = {method.facts.up_to}",
            "ways in": ways_in(method),
        }
        for name, method in all_methods().items()
    ]


def markdown() -> str:
    """README's table: what answers to one question together, in their order."""
    columns = ("method", "answers", "paper", "weights sum to", "also needs", "state", "cost")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in _by_question():
        cells = [f"`{row['method']}`", *(row[column] or "–" for column in columns[1:])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def text() -> str:
    """The table for a terminal."""
    table = _by_question()
    widths = {column: max(len(column), *(len(row[column]) for row in table)) for column in table[0]}
    lines = ["  ".join(column.ljust(width) for column, width in widths.items()).rstrip()]
    lines += ["  ".join(row[column].ljust(width) for column, width in widths.items()).rstrip() for row in table]
    return "\n".join(lines)


def _by_question() -> list[dict[str, str]]:
    def place(row: dict[str, str]) -> int:
        first = row["answers"].split(",")[0]
        return QUESTIONS.index(first) if first in QUESTIONS else len(QUESTIONS)

    return sorted(rows(), key=place)


def _key(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()
