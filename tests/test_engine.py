"""What the ways in have in common."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastmtl
from tests.asserts import assert_untouched


class Wrapper(fastmtl.GradientMethod):
    """Hands the step to another method, and fails afterwards."""

    def __init__(self, inner: fastmtl.GradientMethod) -> None:
        super().__init__()
        self.inner = inner

    def solve(self, step: fastmtl.Step) -> Tensor:
        self.inner.solve(step)
        raise MemoryError


def test_the_state_of_a_wrapped_method_is_put_back_after_an_error() -> None:
    jacobian, inner = torch.randn(3, 5), fastmtl.GradVac()
    fastmtl.aggregate(jacobian, inner)
    with assert_untouched(inner), pytest.raises(MemoryError):
        fastmtl.aggregate(-jacobian.flip(0), Wrapper(Wrapper(inner)))
