"""CAGrad by its properties. (The solver itself: tests/solvers.)"""

from __future__ import annotations

import pytest
import torch

import fastmtl
from fastmtl import CAGrad


def test_in_the_ball_and_better_for_the_worst_off() -> None:
    jacobian = torch.randn(6, 20, dtype=torch.float64)
    mean, least = jacobian.mean(0), []
    for c in (0.0, 0.2, 0.5, 0.9):
        out = fastmtl.aggregate(jacobian, CAGrad(c))
        torch.testing.assert_close((out.grads - mean).norm(), c * mean.norm())
        least.append(float((jacobian @ out.grads).min()))
    assert least == sorted(least)


def test_shrink() -> None:
    jacobian = torch.randn(3, 8, dtype=torch.float64)
    plain = fastmtl.aggregate(jacobian, CAGrad(0.5)).weights
    for shrink, divisor in (("linear", 1.5), ("quadratic", 1.25)):
        torch.testing.assert_close(fastmtl.aggregate(jacobian, CAGrad(0.5, shrink)).weights, plain / divisor)


def test_it_has_no_state() -> None:
    assert not CAGrad().state_dict()


def test_errors() -> None:
    for options, error, text in (
        ({"c": -1}, ValueError, "c: expected a number"),
        ({"c": "a"}, TypeError, "c: expected a number, found 'a'"),
        ({"shrink": 1}, TypeError, "shrink: expected"),
        ({"shrink": "cubic"}, ValueError, "shrink: expected .* found 'cubic'"),
    ):
        with pytest.raises(error, match=text):
            CAGrad(**options)
