"""EqualWeighting: the sum and the mean."""

from __future__ import annotations

import pytest

from fastmtl import EqualWeighting
from tests.weighting.literal import step


def test_sum_and_mean_of_the_present_tasks() -> None:
    assert step(EqualWeighting(3), [2.0, None, 5.0]) == [1, None, 1]
    assert step(EqualWeighting(3, reduction="mean"), [2.0, None, 5.0]) == [1 / 2, None, 1 / 2]
    assert step(EqualWeighting(3, reduction="mean"), [2.0, 1.0, -5.0]) == [1 / 3] * 3


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"reduction: .*'max'"):
        EqualWeighting(3, reduction="max")
    with pytest.raises(ValueError, match="num_tasks: expected at least 1, found 0"):
        EqualWeighting(0)
