"""GradVac on the Gramian against GradVac on the gradients."""

import numpy as np
import pytest

from fastmtl import solvers
from tests.samplers import SAMPLERS, Sampler, identical, random, rank_deficient, with_norms
from tests.solvers.oracles import assert_same_direction, every_order, gradvac, random_orders

VARIANTS = [(False, True), (True, True), (False, False), (True, False)]  # ema_first, ema_always


def random_targets(rng: np.random.Generator, num_tasks: int) -> np.ndarray:
    return rng.uniform(-0.3, 0.7, (num_tasks, num_tasks))


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 7, 16, 33, 64])
@pytest.mark.parametrize("spread", [0, 6])
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_same_as_pair_by_pair(sampler: Sampler, spread: float, num_tasks: int) -> None:
    rng = np.random.default_rng(num_tasks)
    # At a cosine of -1 (two stationary gradients have it too), sqrt(1 - phi^2) turns rounding into its square root.
    tolerance = 1e-6 if sampler.__name__ in ("parallel", "opposite", "pareto_stationary") else 1e-9
    for repeat in range(max(2, 12 // num_tasks)):
        jacobian = with_norms(rng, sampler(rng, num_tasks), spread)
        orders = random_orders(rng, num_tasks)
        targets = random_targets(rng, num_tasks)
        ema_first, ema_always = VARIANTS[repeat % 4]
        options = {"beta": 0.1, "ema_first": ema_first, "ema_always": ema_always}
        weights, after = solvers.gradvac(jacobian @ jacobian.T, targets, order=orders, **options)  # type: ignore[arg-type]
        turned, expected = gradvac(jacobian, orders, targets, **options)  # type: ignore[arg-type]
        assert_same_direction(weights, jacobian, turned, tolerance)
        np.testing.assert_allclose(after, expected.astype(float), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("ema_first", "ema_always"), VARIANTS)
def test_several_steps(ema_first: bool, ema_always: bool) -> None:
    rng = np.random.default_rng(1)
    targets = expected = np.zeros((6, 6))
    for _ in range(30):
        jacobian, orders = rng.standard_normal((6, 12)) + 0.3, random_orders(rng, 6)
        options = {"beta": 0.2, "ema_first": ema_first, "ema_always": ema_always}
        weights, targets = solvers.gradvac(jacobian @ jacobian.T, targets, order=orders, **options)  # type: ignore[arg-type]
        turned, expected = gradvac(jacobian, orders, expected, **options)  # type: ignore[arg-type]
        assert_same_direction(weights, jacobian, turned, 1e-12)
        np.testing.assert_allclose(targets, expected.astype(float), atol=1e-12)
    assert np.abs(targets).max() > 0.1


def test_first_step_is_pcgrad() -> None:
    rng = np.random.default_rng(2)
    for num_tasks in (2, 5, 32):
        jacobian = random(rng, num_tasks)
        m = jacobian @ jacobian.T
        np.testing.assert_allclose(solvers.gradvac(m, seed=4)[0], solvers.pcgrad(m, seed=4), rtol=1e-11)


def test_every_kind_of_order() -> None:
    rng = np.random.default_rng(3)
    jacobian, targets = random(rng, 9), random_targets(rng, 9)
    for options, orders in every_order(jacobian):
        weights, after = solvers.gradvac(jacobian @ jacobian.T, targets, **options)  # type: ignore[arg-type]
        turned, expected = gradvac(jacobian, orders, targets)
        assert_same_direction(weights, jacobian, turned, 1e-12)
        np.testing.assert_allclose(after, expected.astype(float), atol=1e-12)


def test_two_tasks_reach_their_target() -> None:
    jacobian = np.array([[1.0, 0], [-0.5, 1]])
    targets = np.array([[9.0, 0.3], [0.8, 9]])  # the diagonal has no meaning
    weights, after = solvers.gradvac(jacobian @ jacobian.T, targets, beta=0.01)
    turned, _ = gradvac(jacobian, np.array([[1, 0], [0, 1]]), targets)
    for i, j in ((0, 1), (1, 0)):
        cosine = turned[i] @ jacobian[j] / np.sqrt(turned[i] @ turned[i] * (jacobian[j] @ jacobian[j]))
        assert abs(float(cosine) - targets[i, j]) < 1e-12
    np.testing.assert_allclose(weights @ jacobian, turned.sum(0).astype(float), rtol=1e-12)
    before = -0.5 / np.sqrt(1.25)
    np.testing.assert_allclose(after, [[9, 0.99 * 0.3 + 0.01 * before], [0.99 * 0.8 + 0.01 * before, 9]], rtol=1e-14)


def test_zero_gradients_are_passed_over() -> None:
    jacobian = np.array([[1.0, 0], [0, 0], [-1, 1]])
    targets = np.full((3, 3), 0.5)
    weights, after = solvers.gradvac(jacobian @ jacobian.T, targets)
    assert weights[1] == 1
    assert (after[1] == 0.5).all()
    assert (after[:, 1] == 0.5).all()
    assert (after[[0, 2], [2, 0]] != 0.5).all()


def test_a_gradient_that_vanishes_moves_no_further_target() -> None:
    # Task 0 meets its own opposite: nothing is left of it but rounding, which has no cosine with task 2.
    jacobian = np.array([[1 / 3, 0.1], [-2 / 3, -0.2], [0.7, 0.3]])
    order = [[1, 2, 0], [0, 2, 1], [0, 1, 2]]
    _, after = solvers.gradvac(jacobian @ jacobian.T, order=order)
    np.testing.assert_allclose(after[0, 1], -0.01, rtol=1e-12)
    assert after[0, 2] == 0


@pytest.mark.parametrize("target", [1 - 1e-9, 1.0, 1.5])
def test_targets_next_to_one(target: float) -> None:
    rng = np.random.default_rng(4)
    jacobian = identical(rng, 6) * rng.uniform(0.1, 3, (6, 1))
    weights, _ = solvers.gradvac(jacobian @ jacobian.T, np.full((6, 6), target))
    np.testing.assert_allclose(weights, 1)  # parallel already: nothing to correct but rounding
    jacobian = random(rng, 2)
    weights, after = solvers.gradvac(jacobian @ jacobian.T, np.full((2, 2), target))
    turned, expected = gradvac(jacobian, np.array([[1, 0], [0, 1]]), np.full((2, 2), target))
    assert_same_direction(weights, jacobian, turned, 1e-9)
    np.testing.assert_allclose(after, expected.astype(float), rtol=1e-12)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, -1e6, 1e-6])
@pytest.mark.parametrize(("ema_first", "ema_always"), VARIANTS)
def test_mask_is_the_problem_without_the_absent(garbage: float, ema_first: bool, ema_always: bool) -> None:
    rng = np.random.default_rng(5)
    options = {"beta": 0.1, "ema_first": ema_first, "ema_always": ema_always}
    for num_tasks in (1, 2, 5, 20):
        jacobian, targets = random(rng, num_tasks), random_targets(rng, num_tasks)
        mask = rng.random(num_tasks) < 0.6
        order = random_orders(rng, num_tasks)
        rank = np.cumsum(mask) - 1
        left = np.array([[rank[j] for j in order[i] if mask[j]] for i in np.flatnonzero(mask)], dtype=int)
        left = left.reshape(mask.sum(), mask.sum())
        both = np.ix_(mask, mask)
        m = jacobian @ jacobian.T
        alone, after_alone = solvers.gradvac(m[both], targets[both], order=left, **options)  # type: ignore[arg-type]
        m[~mask] = m[:, ~mask] = garbage
        weights, after = solvers.gradvac(m, targets, order=order, mask=mask, **options)  # type: ignore[arg-type]
        assert (weights[~mask] == 0).all()
        np.testing.assert_allclose(weights[mask], alone, rtol=1e-10)
        np.testing.assert_allclose(after[both], after_alone, rtol=1e-10)
        absent = ~(mask[:, None] & mask)
        np.testing.assert_array_equal(after[absent], targets[absent])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_leaves_the_targets(bad: float) -> None:
    rng = np.random.default_rng(6)
    jacobian, targets = random(rng, 5), random_targets(rng, 5)
    m = np.stack([jacobian @ jacobian.T] * 3)
    expected, moved = solvers.gradvac(m, np.stack([targets] * 3), order="fixed")
    m[1, 0, 4] = m[1, 4, 0] = bad
    weights, after = solvers.gradvac(m, np.stack([targets] * 3), order="fixed")
    assert np.isnan(weights[1]).all()
    np.testing.assert_array_equal(after[1], targets)
    np.testing.assert_array_equal(weights[[0, 2]], expected[[0, 2]])
    np.testing.assert_array_equal(after[[0, 2]], moved[[0, 2]])


def test_scale_invariant() -> None:
    rng = np.random.default_rng(7)
    jacobian, targets = random(rng, 20), random_targets(rng, 20)
    m = jacobian @ jacobian.T
    expected, moved = solvers.gradvac(m, targets)
    for exponent in (-80, -4, 6, 80):
        weights, after = solvers.gradvac(m * 2.0**exponent, targets)
        np.testing.assert_array_equal(weights, expected)
        np.testing.assert_array_equal(after, moved)


def test_stacks_draw_for_each_problem() -> None:
    rng = np.random.default_rng(8)
    jacobian = rank_deficient(rng, 12)
    m = np.stack([jacobian @ jacobian.T] * 6).reshape(2, 3, 12, 12)
    targets = rng.uniform(-0.2, 0.4, m.shape)
    before = targets.copy()
    weights, after = solvers.gradvac(m, targets, seed=3, step=4)
    np.testing.assert_array_equal(targets, before)
    assert weights.shape == (2, 3, 12)
    assert after.shape == m.shape
    for k, index in enumerate(np.ndindex(2, 3)):
        order = solvers.visiting_order(12, 3, 4, problem=k)
        single, single_after = solvers.gradvac(m[index], targets[index], order=order)
        np.testing.assert_array_equal(weights[index], single)
        np.testing.assert_array_equal(after[index], single_after)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"beta": -0.1}, ValueError, "beta: expected 0 to 1, found -0.1"),
        ({"beta": float("nan")}, ValueError, "beta: expected 0 to 1, found nan"),
        ({"targets": np.zeros((3, 3))}, ValueError, r"targets: expected shape \[2, 2\], found \[3, 3\]"),
        ({"targets": np.zeros((2, 2), dtype=bool)}, TypeError, "targets: expected an array of real numbers"),
        ({"order": "sorted"}, ValueError, "found 'sorted'"),
    ],
)
def test_errors(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        solvers.gradvac(np.eye(2), **options)  # type: ignore[arg-type]
