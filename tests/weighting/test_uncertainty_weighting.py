"""Uncertainty weighting against its formula."""

from __future__ import annotations

import math

import pytest
import torch

from fastmtl import UncertaintyWeighting
from fastmtl.weighting.base import UNCHANGED_CALLS

KINDS = ["regression", "classification", "regression"]


def test_value_and_every_slope() -> None:
    weighting = UncertaintyWeighting(3, KINDS)
    s = torch.tensor([0.3, -1.2, 2.0])
    weighting.s.data.copy_(s)
    losses = torch.tensor([1.5, 0.2, 4.0], requires_grad=True)
    total = weighting(losses)
    factor = torch.tensor([0.5, 1.0, 0.5])
    expected = sum(
        f * math.exp(-x) * v + x / 2 for f, x, v in zip([0.5, 1, 0.5], s.tolist(), losses.tolist(), strict=True)
    )
    assert total.item() == pytest.approx(expected, rel=1e-6)
    total.backward()
    torch.testing.assert_close(losses.grad, factor * torch.exp(-s))
    torch.testing.assert_close(weighting.s.grad, 0.5 - factor * torch.exp(-s) * losses.detach())


SIGMA = [0.4, 1.0, 2.5]  # of three tasks
# Per variant: s from sigma; the scalar's term from the loss and sigma, as written in its source; its slope in s.
SOURCES = {
    "gal": (
        lambda sigma: 2 * math.log(sigma),
        lambda loss, sigma: loss / sigma**2 + math.log(sigma**2),
        lambda loss, sigma: 1 - loss / sigma**2,
    ),
    "liebel": (
        lambda sigma: sigma,
        lambda loss, sigma: 0.5 / sigma**2 * loss + math.log(1 + sigma**2),
        lambda loss, sigma: 2 * sigma / (1 + sigma**2) - loss / sigma**3,
    ),
    "article": (
        lambda sigma: math.log(sigma),
        lambda loss, sigma: loss / (2 * sigma**2) + math.log(1 + sigma),
        lambda loss, sigma: sigma / (1 + sigma) - loss / sigma**2,
    ),
}


@pytest.mark.parametrize("absent", [None, 1])
@pytest.mark.parametrize("variant", SOURCES)
def test_variants(variant: str, absent: int | None) -> None:
    s, term, slope = SOURCES[variant]
    weighting = UncertaintyWeighting(3, variant=variant).double()
    assert weighting.s.tolist() == [s(1.0)] * 3
    weighting.s.data.copy_(torch.tensor([s(x) for x in SIGMA]))
    values = [1.5, 0.2, 4.0]
    losses = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in values]
    total = weighting([None if t == absent else x for t, x in enumerate(losses)])
    total.backward()
    present = [t for t in range(3) if t != absent]
    assert total.item() == pytest.approx(sum(term(values[t], SIGMA[t]) for t in present), rel=1e-6)
    for t in present:
        weight = (1 if variant == "gal" else 0.5) / SIGMA[t] ** 2
        assert losses[t].grad.item() == pytest.approx(weight, rel=1e-6)
        assert weighting.s.grad[t].item() == pytest.approx(slope(values[t], SIGMA[t]), rel=1e-6)
    assert absent is None or weighting.s.grad[absent] == 0


def test_variants_are_related_as_documented() -> None:
    losses = torch.tensor([1.5, 0.2, 4.0])
    regression, gal = UncertaintyWeighting(3, "regression", 0.3), UncertaintyWeighting(3, init=0.3, variant="gal")
    torch.testing.assert_close(gal(losses), 2 * regression(losses))
    tiny = 1e-6 * losses  # where the others fall below 0
    for variant, positive in (("kendall", False), ("gal", False), ("liebel", True), ("article", True)):
        weighting = UncertaintyWeighting(3, init=1e-2 if positive else -4.0, variant=variant)
        assert (weighting(tiny) > 0) == positive


def test_optimum_is_the_loss_itself() -> None:
    """d/ds = 0 where the variance equals the loss (regression) or twice the loss (classification)."""
    weighting = UncertaintyWeighting(2, KINDS[:2])
    weighting.s.data.copy_(torch.tensor([3.0, 2 * 3.0]).log())
    weighting(torch.tensor([3.0, 3.0])).backward()
    torch.testing.assert_close(weighting.s.grad, torch.zeros(2), atol=1e-6, rtol=0)


def test_adam_moves_absent_tasks_on() -> None:
    """As documented: their gradient is 0, not missing; without momentum they stay."""
    for kind, moves in ((torch.optim.Adam, True), (torch.optim.SGD, False)):
        weighting = UncertaintyWeighting(2)
        optimizer = kind([weighting.parameter_group(lr=0.1)])
        seen = []
        for losses in ([torch.tensor(3.0)] * 2, [torch.tensor(3.0), None]):
            optimizer.zero_grad()
            weighting(losses).backward()
            optimizer.step()
            seen.append(weighting.s[1].item())
        assert seen[0] != 0
        assert (seen[1] != seen[0]) == moves


def test_absent_tasks_take_no_part() -> None:
    weighting = UncertaintyWeighting(3, KINDS, init=0.7)
    a, c = torch.tensor(1.0), torch.tensor(2.0)
    total = weighting([a, None, c])
    assert total.item() == pytest.approx(0.5 * math.exp(-0.7) * 3 + 0.7)
    total.backward()
    assert weighting.s.grad[1] == 0
    assert (weighting.s.grad[[0, 2]] != 0).all()


def test_slopes() -> None:
    weighting = UncertaintyWeighting(3, KINDS, init=0.7)
    with torch.no_grad():  # works wherever it is called
        total, weights = weighting.slopes((torch.tensor(1.0), None, torch.tensor(2.0)))
    torch.testing.assert_close(weights, torch.tensor([0.5, 0, 0.5]).double() * math.exp(-0.7), rtol=1e-6, atol=0)
    assert weights.dtype == torch.float64
    total.backward()
    assert weighting.s.grad is not None


def test_low_precision_losses_are_widened() -> None:
    losses = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    assert UncertaintyWeighting(3)(losses).dtype == torch.float32
    assert UncertaintyWeighting(3)(losses.double()).dtype == torch.float64


def test_learns_the_weights_with_an_optimizer() -> None:
    weighting = UncertaintyWeighting(2, "regression")
    group = weighting.parameter_group(lr=0.5)
    assert group["weight_decay"] == 0
    optimizer = torch.optim.SGD([group], lr=1e-9, weight_decay=10.0)
    for _ in range(200):
        optimizer.zero_grad()
        weighting(torch.tensor([4.0, 0.25])).backward()
        optimizer.step()
    torch.testing.assert_close(weighting.s.detach().exp(), torch.tensor([4.0, 0.25]), rtol=1e-3, atol=0)


def test_state_dict_is_the_parameter_alone() -> None:
    weighting = UncertaintyWeighting(2, init=1.5)
    assert [*weighting.state_dict()] == ["s"]
    fresh = UncertaintyWeighting(2)
    fresh.load_state_dict(weighting.state_dict(), strict=True)
    assert torch.equal(fresh.s, weighting.s)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"num_tasks.*0"):
        UncertaintyWeighting(0)
    with pytest.raises(ValueError, match=r"kind of task 1.*'ranking'"):
        UncertaintyWeighting(2, ["regression", "ranking"])
    with pytest.raises(ValueError, match=r"kind: expected one per task \(3\), found 2"):
        UncertaintyWeighting(3, ["regression", "ranking"])
    with pytest.raises(ValueError, match=r"variant: .*'softplus'"):
        UncertaintyWeighting(2, variant="softplus")
    with pytest.raises(ValueError, match="kind: variant='gal' knows none, found 'regression'"):
        UncertaintyWeighting(2, "regression", variant="gal")
    with pytest.raises(ValueError, match="init: variant='liebel' divides by it"):
        UncertaintyWeighting(2, init=0.0, variant="liebel")
    with pytest.raises(ValueError, match=r"init: .* found nan"):
        UncertaintyWeighting(2, init=math.nan)
    for losses in ([torch.tensor(1.0)], [torch.tensor(1.0), None, None]):
        with pytest.raises(ValueError, match="losses: expected 2 tasks, found"):
            UncertaintyWeighting(2)(losses)


def test_warns_once_if_no_optimizer_moves_it() -> None:
    def train(weighting: UncertaintyWeighting, steps: int, optimizer: torch.optim.Optimizer | None) -> None:
        for _ in range(steps):
            weighting([torch.tensor(1.0, requires_grad=True), torch.tensor(2.0)]).backward()
            if optimizer is not None:
                optimizer.step()

    forgotten = UncertaintyWeighting(2)
    with pytest.warns(UserWarning, match="are they in an optimizer"):
        train(forgotten, UNCHANGED_CALLS + 2, None)
    train(forgotten, UNCHANGED_CALLS, None)  # once is enough: warnings are errors here
    learned = UncertaintyWeighting(2)
    train(learned, UNCHANGED_CALLS + 2, torch.optim.SGD([learned.parameter_group()], lr=0.1))
