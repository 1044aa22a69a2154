"""Min-norm with lower bounds: against exact rational arithmetic, SciPy, and its optimality conditions."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import optimize

from fastmtl import ops, reference, solvers
from tests.samplers import FULL_RANK, SAMPLERS, Sampler, nearly_parallel, random, with_norms
from tests.solvers import oracles
from tests.solvers.test_min_norm import gramian

Array = NDArray[np.float64]
SLACKS = [1.0, 0.5, 0.1, 1e-3, 1e-6, 1e-9, 1e-12, 0.0]


def random_bounds(rng: np.random.Generator, num_tasks: int, slack: float) -> Array:
    """Bounds that leave ``slack``, some of them 0."""
    bounds = rng.dirichlet(np.ones(num_tasks)) * (rng.random(num_tasks) < 0.7)
    return bounds * (1 - slack) / bounds.sum() if bounds.any() else np.full(num_tasks, (1 - slack) / num_tasks)


def left_of(bounds: Array) -> float:
    return max(1 - float(bounds.sum()), 0.0)


def few_digits(jacobian: Array) -> Array:
    """Rounded to 10 bits: the Gramian is then free of rounding, and positive semidefinite to the last bit."""
    mantissa, exponent = np.frexp(jacobian)
    rounded: Array = np.ldexp(np.round(mantissa * 1024) / 1024, exponent)
    return rounded


def gap_of(jacobian: Array, weights: Array, bounds: Array) -> float:
    """<x, x - u> for the u within the bounds that makes it largest: zero at the optimum and nowhere else."""
    products = jacobian.astype(np.longdouble) @ (weights.astype(np.longdouble) @ jacobian)
    return float((weights - bounds) @ products - left_of(bounds) * products.min())


def smallest_squared_norm(jacobian: Array, bounds: Array) -> float:
    """Of the corners of the region that the bounds leave."""
    corners = bounds @ jacobian + left_of(bounds) * jacobian
    return float((corners**2).sum(1).min())


def assert_feasible(weights: Array, bounds: Array) -> None:
    assert (weights >= bounds).all()
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-12)


@pytest.mark.parametrize("slack", SLACKS)
@pytest.mark.parametrize("spread", [0, 6])
@pytest.mark.parametrize("sampler", FULL_RANK.values(), ids=FULL_RANK)
def test_weights_in_exact_arithmetic(sampler: Sampler, spread: float, slack: float) -> None:
    """Also where almost nothing is left beside the bounds."""
    rng = np.random.default_rng(11)
    for num_tasks in (2, 3, 4, 5):
        jacobian = few_digits(with_norms(rng, sampler(rng, num_tasks), spread))
        m, bounds = gramian(jacobian), random_bounds(rng, num_tasks, slack)
        weights, _ = solvers.min_norm(m, lower_bounds=bounds)
        assert_feasible(weights, bounds)
        tolerance = 1e-8 if sampler is nearly_parallel else 1e-13
        np.testing.assert_allclose(weights, oracles.bounded_min_norm(m, bounds), rtol=0, atol=tolerance)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 8, 20, 33, 64, 128])
@pytest.mark.parametrize("spread", [0, 6])
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_optimal(sampler: Sampler, spread: float, num_tasks: int) -> None:
    rng = np.random.default_rng(12)
    for slack in (0.9, 0.5, 0.01, 1e-6, 0.0):
        jacobian = with_norms(rng, sampler(rng, num_tasks), spread)
        bounds = random_bounds(rng, num_tasks, slack)
        weights, gap = solvers.min_norm(gramian(jacobian), lower_bounds=bounds)
        assert_feasible(weights, bounds)
        norms = np.sqrt((jacobian**2).sum(1))
        rounding = 1e-16 * num_tasks * norms.max() * (weights @ norms)  # of the products that the gap is made of
        tolerance = 1e-9 * smallest_squared_norm(jacobian, bounds) + rounding
        assert gap_of(jacobian, weights, bounds) <= tolerance
        assert 0 <= gap <= tolerance


@pytest.mark.parametrize("num_tasks", [2, 3, 6])
def test_never_longer_than_what_scipy_finds(num_tasks: int) -> None:
    rng = np.random.default_rng(13)
    for slack in (0.8, 0.3, 0.01):
        for _ in range(4):
            m, bounds = gramian(random(rng, num_tasks)), random_bounds(rng, num_tasks, slack)
            weights, _ = solvers.min_norm(m, lower_bounds=bounds)
            found = optimize.minimize(
                lambda w, m=m: w @ m @ w,
                bounds + left_of(bounds) / num_tasks,
                jac=lambda w, m=m: 2 * m @ w,
                bounds=[(c, None) for c in bounds],
                constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
                method="SLSQP",
                options={"ftol": 1e-15, "maxiter": 500},
            )
            value = weights @ m @ weights
            assert value <= found.fun * (1 + 1e-12)
            np.testing.assert_allclose(value, found.fun, rtol=1e-6)


def test_bounds_of_zero_are_no_bounds() -> None:
    rng = np.random.default_rng(14)
    for num_tasks in (1, 3, 10, 40):
        m = gramian(random(rng, num_tasks))
        bounded, gap = solvers.min_norm(m, lower_bounds=np.zeros(num_tasks))
        plain, plain_gap = solvers.min_norm(m)
        np.testing.assert_allclose(bounded, plain, atol=1e-13)
        np.testing.assert_allclose(gap, plain_gap, atol=1e-12)


@pytest.mark.parametrize(
    ("jacobian", "bounds", "expected"),
    [
        ([[-4.0, 1, 1], [6, 1, 1]], [0.7, 0.2], [0.7, 0.3]),  # without bounds .6, .4
        ([[-4.0, 1, 1], [6, 1, 1]], [0.1, 0.2], [0.6, 0.4]),
        ([[1.0, 0], [0, 1]], [0.5, 0.5], [0.5, 0.5]),  # nothing left
        ([[1.0, 2], [-1, -2]], [0.3, 0.3], [0.5, 0.5]),  # opposite
        ([[1.0, 2], [-1, -2]], [0.6, 0.3], [0.6, 0.4]),
        ([[1.0, 0], [0, 0], [0, 2]], [0.1, 0, 0.2], [0.1, 0.7, 0.2]),  # a zero gradient takes what is left
        ([[3.0]], [0.5], [1]),
    ],
)
def test_values(jacobian: list, bounds: list, expected: list) -> None:
    weights, gap = solvers.min_norm(gramian(np.array(jacobian)), lower_bounds=bounds)
    np.testing.assert_allclose(weights, expected, atol=1e-15)
    assert gap < 1e-14


@pytest.mark.parametrize("num_tasks", [2, 3, 7])
def test_identical_and_zero_gradients(num_tasks: int) -> None:
    for m in (np.full((num_tasks, num_tasks), 2.0), np.zeros((num_tasks, num_tasks))):
        for slack in SLACKS:
            bounds = random_bounds(np.random.default_rng(15), num_tasks, slack)
            weights, gap = solvers.min_norm(m, lower_bounds=bounds)
            assert_feasible(weights, bounds)
            assert gap <= 1e-15


def test_permutation_and_scale() -> None:
    rng = np.random.default_rng(16)
    for num_tasks in (3, 10, 40):
        for slack in (0.5, 1e-4):
            m, bounds = gramian(random(rng, num_tasks)), random_bounds(rng, num_tasks, slack)
            weights, _ = solvers.min_norm(m, lower_bounds=bounds)
            order = rng.permutation(num_tasks)
            permuted, _ = solvers.min_norm(m[np.ix_(order, order)], lower_bounds=bounds[order])
            np.testing.assert_allclose(permuted, weights[order], atol=1e-13)
            for factor in (1e-200, 2.0**-80, 1e7, 1e150):
                np.testing.assert_allclose(solvers.min_norm(m * factor, lower_bounds=bounds)[0], weights, atol=1e-13)


@pytest.mark.parametrize("exponent", [1023, 996, -996, -1029])
def test_ends_of_the_range(exponent: int) -> None:
    """Sums of the Gramian's entries overflow, or the inverse of its squared norms does."""
    rng = np.random.default_rng(19)
    for num_tasks in (1, 2, 3, 5):
        m = gramian(few_digits(random(rng, num_tasks)))
        m = np.ldexp(m, exponent - int(np.ceil(np.log2(m.max()))))
        for slack in (0.8, 1e-3, 1e-10, 1e-15):
            bounds = random_bounds(rng, num_tasks, slack)
            weights, gap = solvers.min_norm(m, lower_bounds=bounds)
            assert weights.sum() == pytest.approx(1, abs=1e-15)
            np.testing.assert_allclose(weights, oracles.bounded_min_norm(m, bounds), rtol=0, atol=1e-13)
            assert 0 <= gap <= 1e-13 * m.max()


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -1e6])
def test_the_bounds_of_absent_tasks_are_dropped(garbage: float) -> None:
    rng = np.random.default_rng(17)
    for num_tasks in (2, 5, 20, 40):
        m, bounds = gramian(random(rng, num_tasks)), random_bounds(rng, num_tasks, 0.2)
        mask = rng.random(num_tasks) < 0.6
        mask[rng.integers(num_tasks)] = True
        alone, gap_alone = solvers.min_norm(m[np.ix_(mask, mask)], lower_bounds=bounds[mask])
        m[~mask] = m[:, ~mask] = garbage
        weights, gap = solvers.min_norm(m, mask, bounds)
        assert (weights[~mask] == 0).all()
        np.testing.assert_allclose(weights[mask], alone, atol=1e-13)
        np.testing.assert_allclose(gap, gap_alone, atol=1e-12)
    weights, gap = solvers.min_norm(np.full((3, 3), np.nan), np.zeros(3, dtype=bool), [0.2, 0.2, 0.2])
    assert (weights.tolist(), float(gap)) == ([0, 0, 0], 0)


def test_not_finite() -> None:
    m = np.stack([np.eye(3)] * 3)
    m[1, 0, 2] = m[1, 2, 0] = np.nan
    weights, gap = solvers.min_norm(m, lower_bounds=[0.5, 0, 0])
    assert np.isnan(weights[1]).all()
    assert np.isnan(gap[1])
    assert_feasible(weights[[0, 2]], np.array([0.5, 0, 0]))
    for inner in (1e200, -1e200):  # of no gradients: its products overflow in any unit
        for c in (0.0, 0.1):
            weights, gap = solvers.min_norm(np.array([[1e-200, inner], [inner, 1e-200]]), lower_bounds=[c, c])
            assert np.isnan(weights).all()
            assert np.isnan(gap)
    bounds = torch.tensor([[0.2, torch.nan, 0.0]], dtype=torch.float64)
    for solve in (ops.min_norm, reference.min_norm):
        weights, gap = solve(torch.eye(3, dtype=torch.float64)[None], None, bounds)
        assert weights.isnan().all()
        assert gap.isnan().all()


def test_operator_and_reference_agree() -> None:
    rng = np.random.default_rng(18)
    for num_tasks in (1, 2, 5, 12):
        m = torch.from_numpy(np.stack([gramian(random(rng, num_tasks)) for _ in range(3)]))
        mask = torch.from_numpy(rng.random((3, num_tasks)) < 0.8)
        mask[:, 0] = True
        for slack in (1.0, 0.4, 0.01):
            one = torch.from_numpy(random_bounds(rng, num_tasks, slack))
            each = torch.from_numpy(np.stack([random_bounds(rng, num_tasks, slack) for _ in range(3)]))
            for bounds in (one, each, one.float() * 0.9):
                found, gap = ops.min_norm(m, mask, bounds)
                expected, expected_gap = reference.min_norm(m, mask, bounds)
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
                torch.testing.assert_close(gap, expected_gap, rtol=0, atol=1e-10)
                alone = solvers.min_norm(m.numpy(), mask.numpy(), bounds.double().numpy())[0]
                np.testing.assert_array_equal(found, alone)


def test_more_than_is_there() -> None:
    """The operators cannot look at the values without waiting for them; the bounds are then the weights."""
    bounds = torch.tensor([0.7, 0.6], dtype=torch.float64)
    for solve in (ops.min_norm, reference.min_norm):
        assert solve(torch.eye(2, dtype=torch.float64)[None], None, bounds)[0].tolist() == [[0.7, 0.6]]


@pytest.mark.parametrize(
    ("bounds", "error", "message"),
    [
        ([0.1, 0.2], ValueError, r"lower_bounds: expected shape \[3\], found \[2\]"),
        ([0.1, -0.2, 0.3], ValueError, "expected 0 to 1, found -0.2 for task 1"),
        ([0.1, 0.2, np.nan], ValueError, "expected 0 to 1, found nan for task 2"),
        ([0.5, 0.6, 0.0], ValueError, "sum of at most 1, found 1.1"),
        (["a", "b", "c"], TypeError, "lower_bounds: expected an array of real numbers"),
    ],
)
def test_errors(bounds: list, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        solvers.min_norm(np.eye(3), lower_bounds=bounds)
    if error is ValueError and len(bounds) == 2:
        for solve in (ops.min_norm, reference.min_norm):
            with pytest.raises(ValueError, match="lower_bounds: expected shape"):
                solve(torch.eye(3, dtype=torch.float64)[None], None, torch.tensor(bounds))
