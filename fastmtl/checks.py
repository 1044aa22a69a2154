"""Checks of options: TypeError for a wrong type, ValueError for a wrong value; both say the name and what was found."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from torch import Tensor


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


def flag(name: str, value: Any) -> bool:
    """True or False.

    Raises:
        TypeError: Anything else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, found {value!r}")
    return value


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


def reals(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float | tuple[float, ...]:
    """A finite number for all tasks, or one per task, within bounds.

    Args:
        name: The option's.
        value: What was passed for it: a number, a sequence or a 1-D tensor.
        low: Smallest value.
        high: Largest value.

    Raises:
        TypeError: Neither; bool is no number.
        ValueError: None at all, not finite, or out of bounds; the text names the task.
    """
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable | Real):
        raise TypeError(f"{name}: expected a number, or one per task, found {value!r}")
    if isinstance(value, Real):
        return real(name, value, low, high)
    each = tuple(real(f"{name} of task {t}", x, low, high) for t, x in enumerate(value))
    if not each:
        raise ValueError(f"{name}: expected a number, or one per task, found {value!r}")
    return each


def preferences(value: Any, open: bool = False) -> tuple[float, ...] | None:
    """How much each task counts: one number per task, not negative and not all 0; None: all alike.

    Args:
        value: What was passed for ``preference``.
        open: 0 is refused as well.

    Raises:
        TypeError: Not a sequence of numbers.
        ValueError: Negative, not finite, all 0.
    """
    if value is None:
        return None
    if isinstance(value, Real):
        raise TypeError(f"preference: expected one number per task, found {value!r}")
    each = reals("preference", value, 0)
    assert isinstance(each, tuple)
    for t, x in enumerate(each):
        if open and x == 0:
            raise ValueError(f"preference of task {t}: expected a number above 0, found 0")
    if not any(each):
        raise ValueError(f"preference: expected a task that counts, found {each}")
    return each
