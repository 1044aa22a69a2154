"""RLW: what its weights are, and that they are random."""

from __future__ import annotations

import pytest
import torch

from fastmtl import RLW
from fastmtl.random import DISTRIBUTIONS, normals
from tests.weighting.literal import step


def made(num_tasks: int, distribution: str = "normal", seed: int = 3) -> RLW:
    return RLW(num_tasks, distribution, torch.Generator().manual_seed(seed))


def test_the_softmax_of_normal_draws() -> None:
    weighting = made(5)
    seed = int(weighting.rng[0])
    for i in range(4):
        draws = normals(torch.tensor([seed, i]), 1, 5)[0].exp()
        assert step(weighting, [1.0] * 5) == pytest.approx((draws / draws.sum()).tolist(), rel=1e-12)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_on_average_the_mean_loss(distribution: str) -> None:
    weighting, count = made(3, distribution), 200
    seen = torch.tensor([step(weighting, [1.0, 2.0, 3.0]) for _ in range(count)])
    assert (seen >= 0).all()
    torch.testing.assert_close(seen.sum(1), torch.ones(count))
    assert ((seen.mean(0) - 1 / 3).abs() < 5 * seen.std(0) / count**0.5).all()
    assert (seen.std(0) > 0.05).all()


def test_absent_tasks_leave_the_others_in_proportion() -> None:
    a, b = step(made(3), [1.0, 1.0, 1.0]), step(made(3), [1.0, None, 1.0])
    assert b[0] + b[2] == pytest.approx(1)
    assert b[0] / b[2] == pytest.approx(a[0] / a[2])


def test_the_seed_decides() -> None:
    assert step(made(3), [1.0] * 3) == step(made(3), [1.0] * 3) != step(made(3, seed=4), [1.0] * 3)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    step(made(3), [1.0] * 3)
    assert torch.equal(before, torch.get_rng_state())


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"distribution: .*'cauchy'"):
        RLW(3, "cauchy")
    with pytest.raises(TypeError, match=r"generator: expected a torch.Generator, found 3"):
        RLW(3, generator=3)
