"""Draws of a training step: against the published generator, and their distributions."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastmtl
from fastmtl import random, reference
from fastmtl.random import DISTRIBUTIONS, new_rng, random_weights
from tests.asserts import assert_on_simplex

EVERYONE = torch.ones(1, 5, dtype=torch.bool)
RNG = torch.tensor([3, 0])


def rng(seed: int = 3, step: int = 0) -> Tensor:
    return torch.tensor([seed, step])


@pytest.mark.parametrize(
    "line",
    [  # Random123, tests/kat_vectors, philox4x32 10: counter, key, result
        "00000000 00000000 00000000 00000000 00000000 00000000   6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        "ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff   408f276d 41c83b0e a20bc7c6 6d5451fd",
        "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0   d16cfe09 94fdcceb 5001e420 24126ea1",
    ],
)
def test_published_values(line: str) -> None:
    words = [int(word, 16) for word in line.split()]
    for run in (random.philox4x32, torch.compile(random.philox4x32, backend="aot_eager", fullgraph=True)):
        assert run(torch.tensor(words[:4]), torch.tensor(words[4:6])).tolist() == words[6:]


class Sent(TorchDispatchMode):
    """Counts tensors made from numbers on the host: on a GPU each is a copy that waits."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += func is torch.ops.aten.lift_fresh.default
        return func(*args, **kwargs or {})


def test_nothing_is_sent_to_the_device() -> None:
    with Sent() as sent:
        torch.tensor([1, 2])
        assert sent.count == 1
        for distribution in DISTRIBUTIONS:
            random_weights(RNG, EVERYONE, distribution)
        random.dirichlet(RNG, torch.ones(3, dtype=torch.float64))
        assert sent.count == 1
        weighting = fastmtl.COSMOS(3)
        for _ in range(3):
            weighting.sample([1, 2, 3])  # the concentration, once
        assert sent.count == 2


@pytest.mark.parametrize("count", [1, 4, 5, 70])
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (2**62 - 5, 7), (2**33 + 1, 2**40 + 1)])
def test_uniforms_are_as_specified(count: int, seed: int, step: int) -> None:
    found = random.uniforms(rng(seed, step), 3, count)
    low = 2**32 - 1
    for k, row in enumerate(found):
        blocks = -(-count // 4)
        counter = [np.arange(blocks), np.full(blocks, k), np.full(blocks, step & low), np.full(blocks, step >> 32)]
        words = reference.philox4x32([x.astype(np.uint64) for x in counter], (seed & low, seed >> 32))
        expected = (np.stack(words, 1).reshape(-1)[:count].astype(np.float64) + 0.5) / 2**32
        assert row.tolist() == expected.tolist()


def test_in_float32_too_nothing_is_0_or_1() -> None:
    found = random.uniforms(rng(), 50, 2000, torch.float32)
    assert found.dtype == torch.float32
    assert 0 < float(found.min()) < float(found.max()) < 1
    assert random.normals(rng(), 50, 2000, torch.float32).isfinite().all()


def test_normals_are_normal_and_independent() -> None:
    drawn = random.normals(rng(), 4, 2501)
    assert drawn.shape == (4, 2501)
    assert stats.kstest(drawn.flatten().numpy(), "norm").pvalue > 1e-3
    pairs = drawn[:, :2500].reshape(-1, 2)
    for a, b in ((pairs[:, 0], pairs[:, 1]), (pairs[:, 0].abs(), pairs[:, 1].abs())):
        assert stats.pearsonr(a.numpy(), b.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_weights(distribution: str) -> None:
    """On the simplex of those that are present; others in every step, group and seed, the same for the same."""
    present = torch.rand(6, 9) < 0.6
    present[:, 2] = True
    present[0] = False
    weights = random_weights(rng(), present, distribution)
    assert_on_simplex(weights[1:])
    assert (weights[~present] == 0).all()
    assert torch.equal(weights, random_weights(rng(), present, distribution))
    everyone = torch.ones(3, 60, dtype=torch.bool)
    seen = [random_weights(rng(*x), everyone, distribution) for x in ((3, 0), (4, 0), (3, 1), (3 + 2**32, 0))]
    different = {tuple(w.tolist()) for each in seen for w in each}
    assert len(different) == 12 or (distribution == "constrained_bernoulli" and len(different) > 6)
    compiled = torch.compile(random_weights, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(rng(), present, distribution), weights)


def test_softmax_of_the_draws() -> None:
    assert torch.allclose(random_weights(rng(), EVERYONE, "normal"), random.normals(rng(), 1, 5).softmax(-1))
    assert torch.allclose(random_weights(rng(), EVERYONE, "uniform"), random.uniforms(rng(), 1, 5).softmax(-1))
    some = torch.tensor([[True, False, True, True, False]])
    expected = random.normals(rng(), 1, 5).masked_fill(~some, -torch.inf).softmax(-1)
    assert torch.allclose(random_weights(rng(), some, "normal"), expected)


def test_dirichlet_is_uniform_on_the_simplex() -> None:
    weights = random_weights(rng(), torch.ones(4000, 5, dtype=torch.bool), "dirichlet")
    for t in range(5):
        assert stats.kstest(weights[:, t].numpy(), stats.beta(1, 4).cdf).pvalue > 1e-3


@pytest.mark.parametrize("distribution", ["bernoulli", "constrained_bernoulli"])
def test_every_choice_of_tasks_is_equally_likely(distribution: str) -> None:
    present = torch.tensor([True, False, True, True]).expand(7000, 4)
    weights = random_weights(rng(), present, distribution)
    count = Counter(tuple((w > 0).tolist()) for w in weights)
    assert len(count) == (7 if distribution == "bernoulli" else 3)
    assert stats.chisquare(list(count.values())).pvalue > 1e-3
    for w in weights[:100]:
        assert len(set(w[w > 0].tolist())) == 1


def test_the_seed_comes_from_the_generator() -> None:
    seeds = [new_rng(torch.Generator().manual_seed(4)) for _ in range(2)]
    assert torch.equal(*seeds)
    torch.manual_seed(4)
    assert torch.equal(new_rng(), seeds[0])
    assert not torch.equal(new_rng(), seeds[0])
    with pytest.raises(TypeError, match=r"generator: expected a torch\.Generator, found 3"):
        new_rng(3)  # type: ignore[arg-type]


def test_unknown_distribution() -> None:
    with pytest.raises(ValueError, match=r"distribution: expected 'normal', .*, found 'cauchy'"):
        random_weights(rng(), EVERYONE, "cauchy")


@pytest.mark.parametrize("concentration", [[1.0, 1.0, 1.0], [0.2, 0.5, 0.9], [1.2, 7.0, 30.0], [0.01, 0.02, 5.0]])
def test_dirichlet(concentration: list[float]) -> None:
    """Each component alone is of a beta distribution."""
    each = torch.tensor(concentration, dtype=torch.float64)
    drawn = torch.stack([random.dirichlet(rng(7, step), each) for step in range(500)])
    assert_on_simplex(drawn)
    for t, a in enumerate(concentration):
        law = stats.beta(a, sum(concentration) - a)
        assert abs(float(drawn[:, t].mean()) - law.mean()) < 4 * law.std() / 500**0.5
        if min(concentration) > 0.1:  # else many draws differ from 1 by less than float64 can tell
            assert stats.kstest(drawn[:, t].numpy(), law.cdf).pvalue > 1e-4


def test_dirichlet_proposals_fail_next_to_never() -> None:
    """One proposal in twenty at most is refused, so eight in a row in one of 10^10."""
    each = torch.full((2000,), 1.0, dtype=torch.float64)
    one, many = (random.dirichlet(rng(), each, tries) for tries in (1, 8))
    assert float((one == 0).double().mean()) < 0.06
    assert (many > 0).all()
