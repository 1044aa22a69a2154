"""Checks of options: TypeError for a wrong type, ValueError for a wrong value; both say the name and what was found."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def real(name: str, value: Any, low: float = -math.inf, high: float = math.inf, open: bool = False) -> float:
    """A finite number within bounds, as a float.

    Args:
        name: The option's.
        value: What was passed for it.
        low: Smallest value.
        high: Largest value.
        open: The bounds themselves are refused.

    Raises:
        TypeError: Not a real number; bool and tensors are none.
        ValueError: Not finite, or out of bounds.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, found {value!r}")
    number = float(value)
    inside = low < number < high if open else low <= number <= high
    if not (inside and -math.inf < number < math.inf):  # math.isfinite breaks graphs of torch.compile
        left, right = "(" if open or math.isinf(low) else "[", ")" if open or math.isinf(high) else "]"
        raise ValueError(f"{name}: expected a number in {left}{low:g}, {high:g}{right}, found {value}")
    return number


def whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """A whole number of any integral type, as an int.

    Args:
        name: The option's.
        value: What was passed for it.
        low: Smallest value.
        high: Largest value; None: any.

    Raises:
        TypeError: Not of an integral type; bool and tensors are none.
        ValueError: Out of bounds.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a whole number, found {value!r}")
    number = int(value)
    if number < low or (high is not None and number > high):
        expected = f"at least {low}" if high is None else f"a whole number in {low}..{high}"
        raise ValueError(f"{name}: expected {expected}, found {number}")
    return number


def choice(name: str, value: Any, options: tuple[str, ...]) -> str:
    """One of the options.

    Raises:
        TypeError: Not a string.
        ValueError: Another string.
    """
    if isinstance(value, str) and value in options:
        return value
    kind = ValueError if isinstance(value, str) else TypeError
    *others, last = map(repr, options)
    raise kind(f"{name}: expected {', '.join(others)} or {last}, found {value!r}")
