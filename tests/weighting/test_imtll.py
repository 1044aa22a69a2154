"""IMTL-L against its formula."""

from __future__ import annotations

import math

import pytest
import torch

from fastmtl import IMTLL, UncertaintyWeighting


@pytest.mark.parametrize("absent", [None, 1])
def test_value_and_every_slope(absent: int | None) -> None:
    weighting, s, values = IMTLL(3).double(), [0.3, -1.2, 2.0], [1.5, 0.2, 4.0]
    assert weighting.s.tolist() == [0, 0, 0]
    weighting.s.data.copy_(torch.tensor(s))
    s = weighting.s.tolist()
    losses = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in values]
    total = weighting([None if t == absent else x for t, x in enumerate(losses)])
    total.backward()
    present = [t for t in range(3) if t != absent]
    assert total.item() == pytest.approx(sum(math.exp(s[t]) * values[t] - s[t] for t in present), rel=1e-6)
    for t in range(3):
        slope = math.exp(s[t]) * values[t] - 1 if t in present else 0.0
        assert weighting.s.grad[t].item() == pytest.approx(slope, rel=1e-6)
        assert t == absent or losses[t].grad.item() == pytest.approx(math.exp(s[t]), rel=1e-6)


def test_learning_brings_every_scaled_loss_to_1() -> None:
    weighting, losses = IMTLL(3), torch.tensor([4.0, 0.25, 1.0])
    group = weighting.parameter_group(lr=0.5)
    assert group["weight_decay"] == 0
    optimizer = torch.optim.SGD([group], lr=1e-9, weight_decay=10.0)
    for _ in range(200):
        optimizer.zero_grad()
        weighting(losses).backward()
        optimizer.step()
    torch.testing.assert_close(weighting.weights.float() * losses, torch.ones(3), rtol=1e-4, atol=0)


def test_with_the_sign_turned_it_is_uncertainty_weighting() -> None:
    losses = torch.tensor([1.5, 0.2, 4.0])
    torch.testing.assert_close(IMTLL(3, init=0.7)(losses), UncertaintyWeighting(3, init=-0.7, variant="gal")(losses))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"init: .*inf"):
        IMTLL(2, init=math.inf)
    with pytest.raises(ValueError, match=r"IMTLL.s: on cpu, the losses on meta"):
        IMTLL(2)(torch.ones(2, device="meta"))
