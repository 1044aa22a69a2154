"""Frank-Wolfe against the literal loop of its paper, and against what it converges to."""

import numpy as np
import pytest
import torch

from fastmtl import ops, reference, solvers
from tests.samplers import SAMPLERS, Sampler, random
from tests.solvers import oracles
from tests.solvers.test_min_norm import assert_on_simplex, gramian

STARTS = ["uniform", "pair"]
# Where all tasks are alike, which of them is taken is up to rounding.
NO_TIES = {name: sampler for name, sampler in SAMPLERS.items() if name != "strictly_conflicting"}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 33])
@pytest.mark.parametrize("sampler", NO_TIES.values(), ids=NO_TIES)
def test_the_loop_of_the_paper(sampler: Sampler, num_tasks: int, start: str) -> None:
    rng = np.random.default_rng(21)
    for max_iter, tol in ((0, 1e-5), (1, 1e-5), (7, 1e-5), (30, 0.05)):
        jacobian = sampler(rng, num_tasks)
        m = gramian(jacobian)
        weights, gap = solvers.frank_wolfe(m, None, max_iter, tol, start)
        expected = oracles.frank_wolfe(m, max_iter, tol, start)
        assert_on_simplex(weights)
        scale = np.sqrt(m.diagonal().max())
        np.testing.assert_allclose(weights @ jacobian, expected @ jacobian, rtol=0, atol=1e-6 * scale)
        products = m @ weights
        np.testing.assert_allclose(gap, weights @ products - products.min(), atol=1e-12 * scale**2)


@pytest.mark.parametrize("start", STARTS)
def test_it_converges_to_the_exact_point(start: str) -> None:
    rng = np.random.default_rng(22)
    for num_tasks in (3, 10):
        m = gramian(random(rng, num_tasks))
        exact = solvers.min_norm(m)[0]
        gaps = []
        for steps in (10, 100, 1000, 10000):
            weights, gap = solvers.frank_wolfe(m, max_iter=steps, tol=0, start=start)
            assert weights @ m @ weights - exact @ m @ exact <= 2 * gap + 1e-12
            gaps.append(float(gap))
        assert gaps[-1] < 0.01 * gaps[0]
        np.testing.assert_allclose(weights, exact, atol=1e-2)


def test_two_tasks_take_one_step() -> None:
    for m in gramian(np.random.default_rng(23).standard_normal((20, 2, 3))):
        for start in STARTS:
            weights, _ = solvers.frank_wolfe(m, max_iter=1, start=start)
            np.testing.assert_allclose(weights, solvers.min_norm(m)[0], atol=1e-12)


def test_every_option_makes_a_difference() -> None:
    m = gramian(random(np.random.default_rng(24), 8))
    found = [
        solvers.frank_wolfe(m, **options)[0] for options in ({}, {"max_iter": 12}, {"tol": 0.1}, {"start": "pair"})
    ]
    for i, a in enumerate(found):
        assert not any(np.allclose(a, b, atol=1e-6) for b in found[:i])


@pytest.mark.parametrize("start", STARTS)
def test_masks_and_what_is_not_finite(start: str) -> None:
    rng = np.random.default_rng(25)
    for num_tasks in (2, 5, 20):
        m = gramian(random(rng, num_tasks))
        mask = rng.random(num_tasks) < 0.6
        mask[rng.integers(num_tasks)] = True
        alone, gap_alone = solvers.frank_wolfe(m[np.ix_(mask, mask)], max_iter=20, start=start)
        m[~mask] = m[:, ~mask] = np.nan
        weights, gap = solvers.frank_wolfe(m, mask, max_iter=20, start=start)
        assert (weights[~mask] == 0).all()
        np.testing.assert_allclose(weights[mask], alone, atol=1e-12)
        np.testing.assert_allclose(gap, gap_alone, atol=1e-12)
        weights, gap = solvers.frank_wolfe(m, start=start)
        assert np.isnan(weights).all() != mask.all()
    weights, gap = solvers.frank_wolfe(np.full((3, 3), np.nan), np.zeros(3, dtype=bool), start=start)
    assert (weights.tolist(), float(gap)) == ([0, 0, 0], 0)


@pytest.mark.parametrize("start", STARTS)
def test_operator_and_reference_agree(start: str) -> None:
    rng = np.random.default_rng(26)
    for num_tasks in (1, 2, 6, 15):
        m = torch.from_numpy(np.stack([gramian(random(rng, num_tasks)) for _ in range(3)]))
        mask = torch.from_numpy(rng.random((3, num_tasks)) < 0.7)
        m[2, 0, 0] = torch.nan
        for options in ({}, {"max_iter": 6}, {"tol": 0.05}):
            for found, expected in zip(
                ops.frank_wolfe(m, mask, start=start, **options),
                reference.frank_wolfe(m, mask, start=start, **options),
                strict=True,
            ):
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_iter": -1}, "max_iter: .* found -1"),
        ({"tol": -0.1}, "tol: .* found -0.1"),
        ({"tol": float("nan")}, "tol: .* found nan"),
        ({"start": "zero"}, "start: expected .* found 'zero'"),
    ],
)
def test_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solvers.frank_wolfe(np.eye(3), **options)
    with pytest.raises(ValueError, match=message):
        ops.frank_wolfe(torch.eye(3, dtype=torch.float64)[None], **options)


def test_operators_trace() -> None:
    m = torch.from_numpy(np.stack([gramian(random(np.random.default_rng(27), 4)) for _ in range(2)]))
    bounds = torch.full((2, 4), 0.1, dtype=torch.float64)
    torch.library.opcheck(torch.ops.fastmtl.frank_wolfe, (m, None, 20, 1e-5, True))
    torch.library.opcheck(torch.ops.fastmtl.min_norm, (m, None, bounds))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def both(m: torch.Tensor) -> torch.Tensor:
        return ops.min_norm(m, None, bounds[0])[0] + ops.frank_wolfe(m)[0]

    torch.testing.assert_close(both(m), ops.min_norm(m, None, bounds)[0] + ops.frank_wolfe(m)[0])


def test_steps_are_whole() -> None:
    with pytest.raises(TypeError, match=r"max_iter: expected a whole number, found 2\.5"):
        solvers.frank_wolfe(np.eye(2), max_iter=2.5)  # type: ignore[arg-type]
