"""ConstantWeighting: the weights that were given."""

from __future__ import annotations

import pytest
import torch

from fastmtl import ConstantWeighting
from tests.weighting.literal import step


@pytest.mark.parametrize("weights", [[0.5, 0.0, -3.0], (0.5, 0, -3), torch.tensor([0.5, 0.0, -3.0])])
def test_weights_are_those_given(weights: list[float]) -> None:
    weighting = ConstantWeighting(weights)
    assert step(weighting, [2.0, 1.0, 4.0]) == [0.5, 0, -3]
    assert step(weighting, [None, 1.0, 4.0]) == [None, 0, -3]
    assert weighting(torch.tensor([2.0, 1.0, 4.0])).item() == 1 - 12
    assert not weighting.state_dict()


@pytest.mark.parametrize(
    ("weights", "error", "text"),
    [
        (1.0, TypeError, "weights: expected one number per task, found 1.0"),
        ("ab", TypeError, "weights: .*'ab'"),
        ([], ValueError, "weights: expected"),
        ([1.0, float("nan")], ValueError, "weights of task 1: .*nan"),
    ],
)
def test_errors(weights: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ConstantWeighting(weights)
