"""What every scalarization promises beyond what every loss weighting does (test_base.py)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastmtl
from fastmtl.weighting import Scalarization

MAKE: dict[str, Callable[[], Scalarization]] = {
    "COSMOS": lambda: fastmtl.COSMOS(3, preference=[1, 2, 3]),
    "GeometricMean": lambda: fastmtl.GeometricMean(3),
    "LogLoss": lambda: fastmtl.LogLoss(3),
    "PBI": lambda: fastmtl.PBI(3, preference=[1, 2, 3]),
    "STCH": lambda: fastmtl.STCH(3, preference=[1, 2, 3]),
    "STCH, log": lambda: fastmtl.STCH(3, variant="log", nadir=[1.0, 2.0, 0.5]),
}
LOSSES = [0.7, 1.9, 0.4]


@pytest.mark.parametrize("name", MAKE)
def test_first_and_second_derivatives(name: str) -> None:
    weighting = MAKE[name]()
    losses = torch.tensor(LOSSES, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(weighting, losses)
    assert torch.autograd.gradgradcheck(weighting, losses)


@pytest.mark.parametrize("name", MAKE)
def test_several_ranks(name: str) -> None:
    """Local scalars and gradients average to those at the losses' averages; the third task is on no rank."""
    there = torch.tensor([True, True, False])
    locals_ = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in ([0.2, 1.9, 0.0], [1.2, 0.0, 0.0])]
    means = torch.tensor([0.7, 0.95, float("nan")], dtype=torch.float64)
    totals = [MAKE[name]().scalar(x, None, (there, means)) for x in locals_]
    sum(totals).backward()
    single = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.7, 0.95)]
    expected = MAKE[name]()([*single, None])
    expected.backward()
    slopes = torch.stack([*(x.grad for x in single), torch.zeros((), dtype=torch.float64)])
    for total, x in zip(totals, locals_, strict=True):
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(x.grad, slopes, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", MAKE)
def test_in_a_transform(name: str) -> None:
    losses = torch.tensor(LOSSES, dtype=torch.float64)
    slopes = torch.func.grad(lambda x: MAKE[name]()(x))(losses)
    weighting = MAKE[name]()
    weighting(losses)
    torch.testing.assert_close(weighting.weights, slopes)


class Product(Scalarization):
    """One of a user's own; it may give a value that is not finite."""

    def value(self, losses: Tensor, present: Tensor) -> Tensor:
        return torch.where(losses[0] > 10, float("inf"), losses.prod())


def test_one_of_your_own() -> None:
    weighting = Product(3)
    losses = [torch.tensor(x, requires_grad=True) for x in (2.0, 3.0, 5.0)]
    weighting([losses[0], None, losses[2]]).backward()
    assert weighting.weights.tolist() == [5, 0, 2]
    assert (losses[0].grad, losses[1].grad, losses[2].grad) == (5, None, 2)
    weighting(torch.tensor([11.0, 1.0, 1.0]))
    assert weighting.weights.isnan().all()


@pytest.mark.parametrize("name", ["COSMOS", "PBI", "STCH"])
def test_a_preference_may_change(name: str) -> None:
    losses = torch.tensor(LOSSES)
    kind = getattr(fastmtl, name)
    weighting, other = kind(3, preference=[3, 2, 1]), kind(3, preference=[1, 2, 3])
    before = weighting(losses)
    assert weighting.preference.tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 6])
    for changed in ([1, 2, 3], torch.tensor([2.0, 4.0, 6.0])):
        weighting.prefer(changed)
        torch.testing.assert_close(weighting(losses), other(losses))
    assert abs(float(weighting(losses) - before)) > 1e-3
    fresh = kind(3)
    assert fresh.preference.tolist() == pytest.approx([1 / 3] * 3)
    fresh.load_state_dict(weighting.state_dict())
    torch.testing.assert_close(fresh(losses), other(losses))


@pytest.mark.parametrize("name", ["COSMOS", "PBI", "STCH"])
@pytest.mark.parametrize(
    ("preference", "error", "text"),
    [
        (0.5, TypeError, r"preference: expected one number per task, found 0.5"),
        ([1, 2], ValueError, r"preference: expected one number per task \(3\), found shape \[2\]"),
        ([1, -1, 1], ValueError, r"preference of task 1: .*-1"),
        ([0, 0, 0], ValueError, r"preference: expected a task that counts"),
        (torch.ones(2), ValueError, r"preference: expected one number per task \(3\), found shape \[2\]"),
    ],
)
def test_errors_of_preferences(name: str, preference: object, error: type[Exception], text: str) -> None:
    kind = getattr(fastmtl, name)
    with pytest.raises(error, match=text):
        kind(3, preference=preference)
    with pytest.raises(error, match=text):
        kind(3).prefer(preference)
    if isinstance(preference, list):
        with pytest.raises(ValueError, match=text):
            kind(3, preference=torch.tensor(preference, dtype=torch.float64))
    with pytest.raises(TypeError, match="preference: expected one number per task, found None"):
        kind(3).prefer(None)
