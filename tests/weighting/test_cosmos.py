"""COSMOS against its formula, and the preferences that it draws."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity

from fastmtl import COSMOS, ConstantWeighting
from tests.asserts import assert_same_state, assert_untouched
from tests.weighting.literal import leaves, random_losses, step


@pytest.mark.parametrize("absent", [0.0, 0.4])
@pytest.mark.parametrize("penalty", [0.01, 8.0])
def test_value_and_slopes(penalty: float, absent: float) -> None:
    preference = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    weighting = COSMOS(4, penalty, preference.tolist())
    for losses in random_losses(10, absent=absent):
        there = [t for t, x in enumerate(losses) if x is not None]
        r, x = preference[there], torch.tensor([losses[t] for t in there], dtype=torch.float64, requires_grad=True)
        expected = r @ x - penalty * cosine_similarity(r, x, 0)
        expected.backward()
        items = leaves(losses)
        total = weighting(items)
        total.backward()
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(torch.stack([items[t].grad for t in there]), x.grad, rtol=1e-9, atol=1e-14)


def test_without_a_penalty_it_is_the_weighted_sum() -> None:
    losses = [1.0, 2.0, 3.0]
    assert step(COSMOS(3, 0.0, [1, 1, 2]), losses) == pytest.approx(step(ConstantWeighting([0.25, 0.25, 0.5]), losses))


def test_in_the_preferences_direction_the_penalty_has_no_slope() -> None:
    r = [0.5, 0.3, 0.2]
    assert step(COSMOS(3, 5.0, r), [10 * x for x in r]) == pytest.approx(r, rel=1e-9)
    assert step(COSMOS(3, 5.0, r), [0.0, 0.0, 0.0]) == pytest.approx(r)  # of no direction


def test_preferences_are_drawn_anew_and_again() -> None:
    weighting, other = (COSMOS(3, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    seen = []
    for _ in range(5):
        r = weighting.sample(1.2)
        assert torch.equal(r, weighting.preference)
        assert float(r.sum()) == pytest.approx(1)
        assert torch.equal(r, other.sample(1.2))
        seen.append(r.tolist())
    assert len({tuple(r) for r in seen}) == 5
    resumed = COSMOS(3)
    resumed.load_state_dict(weighting.state_dict())
    assert torch.equal(weighting.sample([1, 2, 3]), resumed.sample([1, 2, 3]))
    assert_same_state(weighting, resumed)


def test_evaluation_draws_nothing() -> None:
    weighting = COSMOS(3)
    r = weighting.sample()
    with assert_untouched(weighting):
        with torch.no_grad():
            assert torch.equal(weighting.sample(), r)
        assert torch.equal(weighting.eval().sample(), r)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"penalty: .*-1"):
        COSMOS(2, -1)
    weighting = COSMOS(2)
    with assert_untouched(weighting):
        for concentration in (0, [1, 0], [1, 1, 1]):
            with pytest.raises(ValueError, match="concentration: expected 2 numbers above 0"):
                weighting.sample(concentration)
        with pytest.raises(TypeError, match="concentration"):
            weighting.sample("ones")
