"""Krum against the paper's algorithm on gradient vectors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastmtl
from fastmtl import Krum
from tests.asserts import assert_invariant_under_permutation, assert_invariant_under_scaling, assert_on_simplex
from tests.samplers import SAMPLERS, with_norms


def krum_on_vectors(g: np.ndarray, f: int, m: int, squared: bool = True) -> np.ndarray:
    """Sections 4 and 5 to the letter: scores over the n - f - 2 closest others, the m smallest, the first of ties."""
    n = len(g)
    scores = []
    for i in range(n):
        d = sorted(float(((g[i] - g[j]) ** 2).sum()) for j in range(n) if j != i)[: n - f - 2]
        scores.append(sum(d) if squared else sum(map(math.sqrt, d)))
    weights = np.zeros(n)
    weights[sorted(range(n), key=lambda i: (scores[i], i))[:m]] = 1 / m
    return weights


@pytest.mark.parametrize("distance", ["squared", "euclidean"])
@pytest.mark.parametrize(
    ("num_tasks", "f", "m"), [(3, 0, 1), (5, 1, 1), (7, 2, 3), (32, 4, 8), (32, 29, 32), (512, 100, 5)]
)
def test_against_vectors(num_tasks: int, f: int, m: int, distance: str) -> None:
    for seed in range(3 if num_tasks < 100 else 1):
        g = (
            np.random.default_rng(seed).standard_normal((num_tasks, 12))
            * (1 + 3 * (np.arange(num_tasks) % 4 == 1))[:, None]
        )
        found = fastmtl.aggregate(torch.from_numpy(g), Krum(f, m, distance)).weights
        np.testing.assert_array_equal(found, krum_on_vectors(g, f, m, distance == "squared"))


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_no_other_choice_scores_better(sampler: Any) -> None:
    """Ties aside: on all kinds of gradients, by their scores, to rounding."""
    for num_tasks, f, m in ((6, 1, 1), (9, 2, 4)):
        for spread in (0, 3):
            rng = np.random.default_rng(5)
            g = with_norms(rng, sampler(rng, num_tasks), spread)
            weights = fastmtl.aggregate(torch.from_numpy(g), Krum(f, m)).weights
            assert_on_simplex(weights)
            d = ((g[:, None] - g[None]) ** 2).sum(-1)
            np.fill_diagonal(d, np.inf)
            scores = np.sort(d, 1)[:, : num_tasks - f - 2].sum(1)
            chosen = weights.numpy() > 0
            assert chosen.sum() == m
            noise = 1e-12 * (g**2).sum(1).max() * num_tasks
            assert scores[chosen].max() <= scores[~chosen].min() + noise


def test_it_leaves_out_what_is_wrong() -> None:
    """2 f + 2 < n: f gradients, whatever they are, do not get in while the others are close to each other."""
    rng = np.random.default_rng(0)
    for size in (10.0, 1e6):
        g = rng.standard_normal(20) + 0.1 * rng.standard_normal((9, 20))
        wrong = [1, 4, 8]
        g[wrong] = size * rng.standard_normal(20)  # in league
        weights = fastmtl.aggregate(torch.from_numpy(g), Krum(3, 4)).weights
        assert (weights[wrong] == 0).all()


def test_ties_go_to_the_first() -> None:
    g = torch.ones(5, 3)
    assert Krum(1, 2)(g @ g.T).tolist() == [0.5, 0.5, 0, 0, 0]
    assert Krum(1, 2)(torch.zeros(5, 5)).tolist() == [0.5, 0.5, 0, 0, 0]
    corners = torch.eye(4)
    assert Krum(0)(corners).tolist() == [1, 0, 0, 0]
    for dtype in (torch.float32, torch.bfloat16):  # equal gradients are at distance 0, however long
        twins = torch.randn(6, 1000).repeat_interleave(2, 0).to(dtype) * 1e3
        weights = fastmtl.aggregate(twins, Krum(9, 2)).weights
        assert weights.tolist() == [0.5, 0.5] + [0.0] * 10


def test_absent_tasks() -> None:
    g = torch.randn(7, 5, dtype=torch.float64)
    gramian = g @ g.T
    gramian[3], gramian[:, 3] = math.nan, math.inf
    mask = torch.tensor([True, True, True, False, True, True, True])
    rest = [0, 1, 2, 4, 5, 6]
    found = Krum(2, 2)(gramian, mask=mask)
    np.testing.assert_array_equal(found[rest], krum_on_vectors(g[rest].numpy(), 2, 2))
    assert found[3] == 0
    several = torch.stack([mask, torch.ones(7, dtype=torch.bool)])
    both = Krum(2, 2)(torch.stack([gramian, g @ g.T]), mask=several)
    assert torch.equal(both[0], found)
    np.testing.assert_array_equal(both[1], krum_on_vectors(g.numpy(), 2, 2))


def test_very_few_present() -> None:
    """Each has one neighbour at least, and no more are chosen than there are."""
    g = torch.tensor([[0.0], [1.0], [1.5], [9.0]], dtype=torch.float64)
    for present, f, m, expected in (
        ([1, 1, 1, 0], 1, 1, [0, 1, 0, 0]),  # neighbours at 1, 0.5, 0.5
        ([1, 0, 0, 1], 1, 1, [1, 0, 0, 0]),
        ([0, 0, 1, 0], 1, 1, [0, 0, 1, 0]),
        ([1, 0, 0, 1], 0, 4, [0.5, 0, 0, 0.5]),
        ([0, 0, 0, 0], 0, 1, [0, 0, 0, 0]),
    ):
        assert Krum(f, m)(g @ g.T, mask=torch.tensor(present).bool()).tolist() == expected


def test_properties() -> None:
    g = torch.randn(8, 5, dtype=torch.float64)
    gramian, method = g @ g.T, Krum(2, 3)
    assert_invariant_under_permutation(method, gramian, torch.randperm(8))
    for factor in (1e-6, 1e6):
        assert_invariant_under_scaling(method, gramian, factor)
    moved = g + torch.randn(5, dtype=torch.float64)  # distances do not see a common part
    assert torch.equal(method(moved @ moved.T), method(gramian))
    gramian[2, 2] = math.inf
    assert method(gramian).isnan().all()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((-1,), ValueError, "num_byzantine: expected at least 0, found -1"),
        ((1.0,), TypeError, "num_byzantine: expected a whole number, found 1.0"),
        ((1, 0), ValueError, "num_selected: expected at least 1, found 0"),
        ((1, 1, "l1"), ValueError, "distance: expected 'squared' or 'euclidean', found 'l1'"),
    ],
)
def test_errors(arguments: tuple, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Krum(*arguments)


@pytest.mark.parametrize(("f", "m", "least"), [(2, 1, 5), (0, 6, 6)])
def test_too_few_tasks(f: int, m: int, least: int) -> None:
    gramian: Tensor = torch.eye(4)
    with pytest.raises(ValueError, match=f"num_byzantine: {f} wrong.*at least {least} tasks, found 4"):
        Krum(f, m)(gramian)
