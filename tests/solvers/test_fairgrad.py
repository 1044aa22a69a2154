"""alpha-fair weights: by their equations, closed forms, SciPy, and what alpha-fairness is defined by."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import optimize

from fastmtl import ops, reference, solvers
from tests.samplers import FULL_RANK, SAMPLERS, Sampler, random, with_norms
from tests.solvers.test_min_norm import gramian

Array = NDArray[np.float64]
ALPHAS = [0.1, 0.5, 1.0, 2.0, 10.0]
WITH_SOLUTION = {name: f for name, f in SAMPLERS.items() if name in FULL_RANK or name in ("duplicated", "identical")}
WITHOUT = {name: f for name, f in SAMPLERS.items() if name in ("opposite", "zero_rows", "pareto_stationary")}


def wrong(m: Array, w: Array, alpha: float, preference: Array | float = 1.0) -> float:
    """The largest error of an equation, against the terms that its left side is summed from."""
    wide, x = m.astype(np.longdouble), w.astype(np.longdouble)
    return float((np.abs(wide @ x - (x / preference) ** (-1 / alpha)) / (np.abs(wide) @ x)).max())


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 33, 64])
@pytest.mark.parametrize("spread", [0, 3])
@pytest.mark.parametrize("sampler", WITH_SOLUTION.values(), ids=WITH_SOLUTION)
def test_equations(sampler: Sampler, spread: float, num_tasks: int, alpha: float) -> None:
    rng = np.random.default_rng(31)
    m = gramian(with_norms(rng, sampler(rng, num_tasks), spread))
    weights, error = solvers.fairgrad(m, alpha)
    assert (weights > 0).all()
    assert wrong(m, weights, alpha) <= 1e-11
    assert 0 <= error <= 1e-11


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("num_tasks", [2, 3, 8, 40])
@pytest.mark.parametrize("sampler", WITHOUT.values(), ids=WITHOUT)
def test_no_solution(sampler: Sampler, num_tasks: int, alpha: float) -> None:
    """0 in the convex hull: some task cannot gain without a loss of another."""
    rng = np.random.default_rng(32)
    for spread in (0, 3):
        weights, error = solvers.fairgrad(gramian(with_norms(rng, sampler(rng, num_tasks), spread)), alpha)
        assert (weights == 0).all()
        assert error == np.inf


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_solution_exactly_where_a_direction_is_good_for_all(alpha: float) -> None:
    """More tasks than dimensions: such a direction is there or not, which linear programming tells."""
    rng = np.random.default_rng(33)
    outcomes = []
    for _ in range(60):
        jacobian = rng.standard_normal((8, 4)) + 0.2
        best = optimize.linprog(
            np.array([0.0, 0, 0, 0, -1]),
            np.hstack([-jacobian, np.linalg.norm(jacobian, axis=1, keepdims=True)]),
            np.zeros(8),
            bounds=[(-1, 1)] * 4 + [(None, 1)],
        )
        exists = -best.fun > 1e-4
        assert bool(np.isfinite(solvers.fairgrad(gramian(jacobian), alpha)[1])) == exists
        outcomes.append(exists)
    assert 10 < sum(outcomes) < 50


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("num_tasks", [2, 3, 6])
def test_no_direction_is_fairer(num_tasks: int, alpha: float) -> None:
    """The definition: of all directions in the ball, d has the largest sum of utilities, weighted by preference."""
    rng = np.random.default_rng(34)
    jacobian = random(rng, num_tasks)
    preference = rng.uniform(0.5, 2, num_tasks)
    weights, _ = solvers.fairgrad(gramian(jacobian), alpha, preference)
    direction = weights @ jacobian
    direction /= np.linalg.norm(direction)

    def loss(d: Array) -> float:
        gains = np.maximum(jacobian @ d / np.linalg.norm(d), 1e-9)
        return -float(preference @ (np.log(gains) if alpha == 1 else gains ** (1 - alpha) / (1 - alpha)))

    for start in (direction, direction + 0.02 * rng.standard_normal(direction.shape)):
        found = optimize.minimize(loss, start, method="BFGS", options={"gtol": 1e-9}).x
        assert loss(direction) <= loss(found) + 1e-12 * abs(loss(found))
        np.testing.assert_allclose(found / np.linalg.norm(found), direction, atol=1e-4)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_never_worse_than_least_squares(alpha: float) -> None:
    """The paper's code: ``least_squares`` on the equations as they stand."""
    rng = np.random.default_rng(35)
    for num_tasks in (2, 4, 8):
        m = gramian(random(rng, num_tasks))

        def rest(x: Array, m: Array = m) -> Array:
            return m @ x - x ** (-1 / alpha)

        found = optimize.least_squares(rest, np.ones(num_tasks) / num_tasks, bounds=(0, np.inf))
        weights, _ = solvers.fairgrad(m, alpha)
        assert np.abs(rest(weights)).max() <= np.abs(rest(found.x)).max() + 1e-11 * m.max()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_orthogonal_tasks_in_closed_form(alpha: float) -> None:
    norms, preference = np.array([1e-3, 0.5, 1.0, 70.0]), np.array([1.0, 2.0, 0.1, 3.0])
    weights, error = solvers.fairgrad(np.diag(norms**2), alpha, preference)
    np.testing.assert_allclose(
        weights, preference ** (1 / (1 + alpha)) * norms ** (-2 * alpha / (1 + alpha)), rtol=1e-11
    )
    assert error < 1e-11


def test_two_tasks_in_closed_form() -> None:
    """Nash: equal shares of ``|d|^2`` and so ``w_t |g_t|`` equal: the bisector."""
    for _ in range(20):
        jacobian = np.random.default_rng(36).standard_normal((2, 5))
        norms = np.linalg.norm(jacobian, axis=1)
        cosine = jacobian[0] @ jacobian[1] / norms.prod()
        np.testing.assert_allclose(solvers.fairgrad(gramian(jacobian))[0], 1 / norms / np.sqrt(1 + cosine), rtol=1e-12)


def test_ends_of_alpha() -> None:
    """Towards 0 the weights are the preferences; towards infinity the gains are equal: the min-norm point's."""
    rng = np.random.default_rng(37)
    jacobian = random(rng, 4) * 0.1 + 1
    m, preference = gramian(jacobian), np.array([1.0, 2, 3, 4])
    least = solvers.fairgrad(m, 0.1, preference)[0]
    np.testing.assert_allclose(least / least.sum(), preference / preference.sum(), atol=0.15)
    inside = gramian(np.eye(5) + 0.2)  # the min-norm point has all tasks in its support
    gains = inside @ solvers.fairgrad(inside, 10.0)[0]
    np.testing.assert_allclose(gains, gains.mean(), rtol=1e-10)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_scale_and_permutation(alpha: float) -> None:
    rng = np.random.default_rng(38)
    for num_tasks in (1, 3, 10, 40):
        m = gramian(random(rng, num_tasks))
        weights, _ = solvers.fairgrad(m, alpha)
        order = rng.permutation(num_tasks)
        np.testing.assert_allclose(solvers.fairgrad(m[np.ix_(order, order)], alpha)[0], weights[order], rtol=1e-10)
        for factor in (1e-150, 2.0**-80, 1e7, 1e150):
            scaled, _ = solvers.fairgrad(m * factor, alpha)
            np.testing.assert_allclose(scaled, weights * factor ** (-alpha / (1 + alpha)), rtol=1e-9)
        proportions = solvers.fairgrad(m * 2.0**64, alpha)[0] / weights
        np.testing.assert_allclose(proportions, proportions[0], rtol=1e-15)


def test_nash_is_invariant_to_the_scale_of_each_task() -> None:
    rng = np.random.default_rng(39)
    for num_tasks in (2, 9, 40):
        jacobian = random(rng, num_tasks)
        weights, _ = solvers.fairgrad(gramian(jacobian))
        for spread in (3, 20):
            factors = np.exp(rng.uniform(-spread, spread, num_tasks))
            scaled, _ = solvers.fairgrad(gramian(jacobian * factors[:, None]))
            np.testing.assert_allclose(scaled * factors, weights, rtol=1e-9)


@pytest.mark.parametrize("num_tasks", [128, 512])
def test_many_tasks(num_tasks: int) -> None:
    m = gramian(random(np.random.default_rng(40), num_tasks))
    for alpha in (1.0, 3.0):
        weights, error = solvers.fairgrad(m, alpha)
        assert wrong(m, weights, alpha) < 1e-12
        assert error < 1e-12


@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0])
def test_masks_preferences_of_zero_and_what_is_not_finite(alpha: float) -> None:
    rng = np.random.default_rng(41)
    for num_tasks in (2, 5, 20, 40):
        m = gramian(random(rng, num_tasks))
        mask = rng.random(num_tasks) < 0.6
        mask[rng.integers(num_tasks)] = True
        alone, _ = solvers.fairgrad(m[np.ix_(mask, mask)], alpha)
        np.testing.assert_allclose(solvers.fairgrad(m, alpha, mask.astype(float))[0][mask], alone, rtol=1e-10)
        m[~mask] = m[:, ~mask] = np.nan
        weights, error = solvers.fairgrad(m, alpha, mask=mask)
        assert (weights[~mask] == 0).all()
        np.testing.assert_allclose(weights[mask], alone, rtol=1e-10)
        assert error < 1e-11
        if not mask.all():
            weights, error = solvers.fairgrad(m, alpha)
            assert np.isnan(weights).all()
            assert np.isnan(error)
    for options in ({"mask": np.zeros(3, dtype=bool)}, {"preference": [0, 0, 0]}):
        weights, error = solvers.fairgrad(np.eye(3), alpha, **options)
        assert (weights.tolist(), float(error)) == ([0, 0, 0], 0)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 3.0])
def test_operator_and_reference_agree(alpha: float) -> None:
    rng = np.random.default_rng(42)
    for num_tasks in (1, 2, 6, 15):
        m = torch.from_numpy(np.stack([gramian(random(rng, num_tasks)) for _ in range(4)]))
        m[3] = -m[3].abs()  # no Gramian; no solution
        m[3].diagonal().abs_()
        mask = torch.from_numpy(rng.random((4, num_tasks)) < 0.7)
        mask[3] = True
        m[2, 0, 0] = torch.nan
        if num_tasks > 1:
            for preference in (None, torch.linspace(0, 2, num_tasks)):
                found, error = ops.fairgrad(m, mask, preference, alpha)
                expected, expected_error = reference.fairgrad(m, mask, preference, alpha)
                torch.testing.assert_close(found[:3], expected[:3], rtol=1e-7, atol=1e-12, equal_nan=True)
                assert torch.equal(error.isinf(), expected_error.isinf())
                assert torch.equal(error.isnan(), expected_error.isnan())
                assert (expected_error[error.isfinite()] < 1e-8).all()
                host = None if preference is None else preference.numpy()
                np.testing.assert_array_equal(found, solvers.fairgrad(m.numpy(), alpha, host, mask.numpy())[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": 0.05}, ValueError, r"alpha: expected a number in \[0.1, 10\], found 0.05"),
        ({"alpha": 11}, ValueError, "alpha: .* found 11"),
        ({"alpha": "1"}, TypeError, "alpha: expected a number, found '1'"),
        ({"preference": [1, 2]}, ValueError, r"preference: expected shape \[3\], found \[2\]"),
        ({"preference": [1, -2, 1]}, ValueError, "preference: .* found -2.0 for task 1"),
        ({"preference": [1, 2, np.nan]}, ValueError, "preference: .* found nan for task 2"),
        ({"preference": ["a"] * 3}, TypeError, "preference: expected an array of real numbers"),
    ],
)
def test_errors(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        solvers.fairgrad(np.eye(3), **options)
    if "alpha" in options:
        with pytest.raises(error, match=message):
            ops.fairgrad(torch.eye(3, dtype=torch.float64)[None], **options)


def test_operators_check_the_shape_of_preferences() -> None:
    with pytest.raises(ValueError, match=r"preference: expected shape \[3\], found \[2\]"):
        ops.fairgrad(torch.eye(3, dtype=torch.float64)[None], None, torch.ones(2))


def test_operator_traces() -> None:
    m = torch.from_numpy(np.stack([gramian(random(np.random.default_rng(43), 4)) for _ in range(2)]))
    preference = torch.ones(4, dtype=torch.float64)
    torch.library.opcheck(torch.ops.fastmtl.fairgrad, (m, None, preference, 2.0))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def both(m: torch.Tensor) -> torch.Tensor:
        return ops.fairgrad(m, None, preference, 0.5)[0]

    torch.testing.assert_close(both(m), ops.fairgrad(m, None, preference, 0.5)[0])
