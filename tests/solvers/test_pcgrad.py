"""PCGrad on the Gramian against PCGrad on the gradients."""

import numpy as np
import pytest

from fastmtl import solvers
from tests.samplers import DEGENERATE, SAMPLERS, Sampler, random, rank_deficient, with_norms
from tests.solvers.oracles import assert_same_direction, every_order, pcgrad, random_orders

SIZES = [1, 2, 3, 4, 7, 16, 33, 64]


@pytest.mark.parametrize("num_tasks", SIZES)
@pytest.mark.parametrize("spread", [0, 6])
@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_same_as_pair_by_pair(sampler: Sampler, include_self: bool, spread: float, num_tasks: int) -> None:
    rng = np.random.default_rng(num_tasks)
    for _ in range(max(1, 12 // num_tasks)):
        jacobian = with_norms(rng, sampler(rng, num_tasks), spread)
        orders = random_orders(rng, num_tasks)
        weights = solvers.pcgrad(jacobian @ jacobian.T, orders, include_self=include_self)
        assert_same_direction(weights, jacobian, pcgrad(jacobian, orders, include_self), 1e-13)


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_many_tasks_in_few_dimensions(dimension: int) -> None:
    rng = np.random.default_rng(dimension)
    for num_tasks in (8, 64):
        jacobian = rng.standard_normal((num_tasks, dimension))
        orders = random_orders(rng, num_tasks)
        weights = solvers.pcgrad(jacobian @ jacobian.T, orders)
        assert_same_direction(weights, jacobian, pcgrad(jacobian, orders), 1e-13)


def test_every_kind_of_order() -> None:
    jacobian = rank_deficient(np.random.default_rng(1), 9)
    results = set()
    for options, orders in every_order(jacobian):
        weights = solvers.pcgrad(jacobian @ jacobian.T, **options)  # type: ignore[arg-type]
        assert_same_direction(weights, jacobian, pcgrad(jacobian, orders), 1e-13)
        results.add(weights.tobytes())
    assert len(results) == 4  # the first two are the same


@pytest.mark.parametrize(("include_self", "expected"), [(False, -0.558013), (True, -0.433013)])
def test_values(include_self: bool, expected: float) -> None:
    jacobian = np.array([[1, 0], [-np.sqrt(0.75), 0.5], [-np.sqrt(0.75), -0.5]])  # at 0, 150 and 210 degrees
    order = [[1, 2, 0], [0, 2, 1], [0, 1, 2]]
    weights = solvers.pcgrad(jacobian @ jacobian.T, order, include_self=include_self)
    np.testing.assert_allclose(weights @ jacobian, [expected, 0.216506], atol=1e-6)


def test_two_tasks() -> None:
    jacobian = np.array([[-4.0, 1, 1], [6, 1, 1]])
    weights = solvers.pcgrad(jacobian @ jacobian.T)
    np.testing.assert_allclose(weights, [20 / 9, 30 / 19], rtol=1e-14)
    np.testing.assert_allclose(solvers.pcgrad(jacobian @ jacobian.T, reduction="mean"), [10 / 9, 15 / 19], rtol=1e-14)


def test_no_conflict_is_the_plain_sum() -> None:
    jacobian = np.abs(random(np.random.default_rng(2), 10))
    assert (solvers.pcgrad(jacobian @ jacobian.T) == 1).all()


def test_two_projections_of_each_other_are_orthogonal_to_the_other() -> None:
    jacobian = np.array([[1.0, 0.2], [-1.0, 1]])
    weights = solvers.pcgrad(jacobian @ jacobian.T)
    first, second = pcgrad(jacobian, np.array([[1, 0], [0, 1]]))
    np.testing.assert_allclose([first @ jacobian[1], second @ jacobian[0]], 0, atol=1e-15)
    np.testing.assert_allclose(weights @ jacobian, (first + second).astype(float), rtol=1e-14)


def test_zero_gradients_project_nobody() -> None:
    rng = np.random.default_rng(3)
    jacobian = DEGENERATE["zero_rows"](rng, 12)
    zero = ~jacobian.any(1)
    weights = solvers.pcgrad(jacobian @ jacobian.T, seed=1)
    assert (weights[zero] == 1).all()
    m = jacobian @ jacobian.T
    m[zero, :] -= 1e-18  # as a negative rounding error would look
    m[:, zero] -= 1e-18
    np.fill_diagonal(m, (jacobian**2).sum(1))
    np.testing.assert_allclose(solvers.pcgrad(m, seed=1), weights, rtol=1e-14)


def test_scale_invariant() -> None:
    jacobian = random(np.random.default_rng(4), 20)
    m = jacobian @ jacobian.T
    for exponent in (-80, -3, 5, 80):
        np.testing.assert_array_equal(solvers.pcgrad(m * 2.0**exponent), solvers.pcgrad(m))


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, -1e6, 1e-6])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("include_self", [False, True])
def test_mask_is_the_problem_without_the_absent(garbage: float, include_self: bool, reduction: str) -> None:
    rng = np.random.default_rng(5)
    for num_tasks in (1, 2, 5, 20):
        jacobian = rng.standard_normal((num_tasks, 3))
        mask = rng.random(num_tasks) < 0.6
        order = random_orders(rng, num_tasks)
        rank = np.cumsum(mask) - 1
        left = [[rank[j] for j in order[i] if mask[j]] for i in np.flatnonzero(mask)]
        options = {"include_self": include_self, "reduction": reduction}
        m = jacobian @ jacobian.T
        alone = solvers.pcgrad(m[np.ix_(mask, mask)], np.array(left, dtype=int).reshape(mask.sum(), -1), **options)
        m[~mask] = m[:, ~mask] = garbage
        weights = solvers.pcgrad(m, order, mask=mask, **options)
        assert (weights[~mask] == 0).all()
        np.testing.assert_allclose(weights[mask], alone, rtol=1e-12)


def test_empty_mask() -> None:
    for reduction in ("sum", "mean"):
        weights = solvers.pcgrad(np.full((3, 3), np.nan), mask=np.zeros(3, dtype=bool), reduction=reduction)
        assert weights.tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(bad: float) -> None:
    jacobian = random(np.random.default_rng(6), 5)
    m = np.stack([jacobian @ jacobian.T] * 3)
    expected = solvers.pcgrad(m, "fixed")
    m[1, 0, 4] = m[1, 4, 0] = bad
    weights = solvers.pcgrad(m, "fixed", mask=np.array([[True] * 5, [True] * 4 + [False], [True] * 5]))
    assert np.isfinite(weights).all()
    weights = solvers.pcgrad(m, "fixed")
    assert np.isnan(weights[1]).all()
    np.testing.assert_array_equal(weights[[0, 2]], expected[[0, 2]])


def test_stacks_draw_for_each_problem() -> None:
    jacobian = rank_deficient(np.random.default_rng(7), 12)
    m = np.stack([jacobian @ jacobian.T] * 6).reshape(2, 3, 12, 12)
    weights = solvers.pcgrad(m, seed=3, step=4)
    assert weights.shape == (2, 3, 12)
    orders = np.stack([solvers.visiting_order(12, 3, 4, problem=k) for k in range(6)])
    np.testing.assert_array_equal(weights, solvers.pcgrad(m, orders.reshape(2, 3, 12, 12)))
    for k, single in enumerate(weights.reshape(6, 12)):
        np.testing.assert_array_equal(single, solvers.pcgrad(m[0, 0], orders[k]))
    assert len({single.tobytes() for single in weights.reshape(6, 12)}) == 6


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"order": "sorted"}, ValueError, r"one of \['fixed', 'random', 'shared'\], found 'sorted'"),
        ({"order": [[0, 1]]}, ValueError, r"order: expected shape \[2, 2\]"),
        ({"order": [[0, 1], [1, 1]]}, ValueError, r"a permutation of 0\.\.1"),
        ({"order": [[0, 1], [0, 2]]}, ValueError, r"a permutation of 0\.\.1"),
        ({"order": [[0.0, 1], [0, 1]]}, TypeError, "integers, found dtype float64"),
        ({"reduction": "max"}, ValueError, "'sum' or 'mean', found 'max'"),
        ({"seed": 2**64}, ValueError, "seed: expected a 64-bit integer"),
        ({"mask": np.ones((2, 2), dtype=bool)}, ValueError, r"mask: expected shape \[2\], found \[2, 2\]"),
    ],
)
def test_errors(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        solvers.pcgrad(np.eye(2), **options)  # type: ignore[arg-type]
