"""Projection onto the dual cone: against exact rational arithmetic, SciPy, and its optimality conditions."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import optimize

from fastmtl import ops, reference, solvers
from tests.samplers import FULL_RANK, SAMPLERS, Jacobian, Sampler, opposite, random, rank_deficient, with_norms
from tests.solvers import oracles
from tests.solvers.test_bounded_min_norm import few_digits
from tests.solvers.test_min_norm import gramian, noisy

Array = NDArray[np.float64]


def everyone_and_mean(num_tasks: int) -> Array:
    """What UPGrad projects, then what DualProj does."""
    return np.vstack([np.eye(num_tasks), np.full(num_tasks, 1 / num_tasks)])


def nearest(jacobian: Jacobian, combinations: Array) -> Array:
    """The points themselves, by non-negative least squares."""
    norms = np.sqrt((jacobian**2).sum(1))
    directions = jacobian / np.where(norms > 0, norms, 1)[:, None]
    points = combinations @ jacobian
    for point in points:
        length = np.sqrt(point @ point)
        if length > 0:
            shares, _ = optimize.nnls(directions.T, -point / length, maxiter=1000 * len(norms))
            point += length * (shares @ directions)
    return points


def assert_optimal(jacobian: Jacobian, combinations: Array, weights: Array, gap: Array) -> None:
    """No conflict, nothing added that is not needed, and what the solver says of itself."""
    long = jacobian.astype(np.longdouble)
    norms = np.sqrt((long**2).sum(1))
    for u, v, stated in zip(combinations, weights.astype(np.longdouble), gap, strict=True):
        assert (v >= u).all()
        length, products = np.sqrt(((u @ long) ** 2).sum()), long @ (v @ long)
        rounding = 2e-15 * float(v @ norms) ** 2
        tolerance = max(1e-9 * float(length) ** 2, rounding)
        conflict = length * (-products[norms > 0] / norms[norms > 0]).max(initial=0)
        assert conflict <= tolerance
        assert (v - u) @ np.abs(products) <= tolerance
        assert 0 <= stated <= tolerance


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 8, 20, 33, 64, 128])
@pytest.mark.parametrize("spread", [0, 6])
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_optimal(sampler: Sampler, spread: float, num_tasks: int) -> None:
    rng = np.random.default_rng(21)
    jacobian = with_norms(rng, sampler(rng, num_tasks), spread)
    combinations = everyone_and_mean(num_tasks)
    assert_optimal(jacobian, combinations, *solvers.dual_cone(gramian(jacobian), combinations))


@pytest.mark.parametrize("num_tasks", [256, 512])
def test_many_tasks(num_tasks: int) -> None:
    rng = np.random.default_rng(22)
    jacobian = with_norms(rng, random(rng, num_tasks))
    combinations = everyone_and_mean(num_tasks)[-3:]
    assert_optimal(jacobian, combinations, *solvers.dual_cone(gramian(jacobian), combinations))


def exactly(m: Array, u: Array) -> Array:
    """The weights, rounded once: every support tried, its optimality conditions solved and checked in rationals."""
    exact = [[oracles.Fraction(float(x)) for x in row] for row in m]
    start = [oracles.Fraction(float(x)) for x in u]
    tasks = range(len(u))
    slope = [sum(exact[i][j] * start[j] for j in tasks) for i in tasks]
    for size in range(len(u) + 1):
        for support in oracles.combinations(tasks, size):
            solution = oracles.solve_exactly([[*(exact[i][j] for j in support), -slope[i]] for i in support])
            if solution is None or min(solution, default=0) < 0:
                continue
            v = start.copy()
            for i, more in zip(support, solution, strict=True):
                v[i] += more
            if all(sum(exact[i][j] * v[j] for j in tasks) >= 0 for i in tasks):
                return np.array([float(x) for x in v])
    raise AssertionError("no support is optimal: the Gramian is not positive semidefinite")


@pytest.mark.parametrize("spread", [0, 6])
@pytest.mark.parametrize("sampler", FULL_RANK.values(), ids=FULL_RANK)
def test_weights_in_exact_arithmetic(sampler: Sampler, spread: float) -> None:
    rng = np.random.default_rng(23)
    for num_tasks in (1, 2, 3, 4, 5):
        for _ in range(3):
            m = gramian(few_digits(with_norms(rng, sampler(rng, num_tasks), spread)))
            combinations = everyone_and_mean(num_tasks)
            weights, _ = solvers.dual_cone(m, combinations)
            for u, v in zip(combinations, weights, strict=True):
                expected = exactly(m, u)
                np.testing.assert_allclose(v, expected, rtol=1e-11, atol=1e-13 * expected.max())


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_same_point_as_scipy(sampler: Sampler) -> None:
    rng = np.random.default_rng(24)
    for num_tasks in (2, 3, 6, 12, 25):
        jacobian = with_norms(rng, sampler(rng, num_tasks), 2)
        combinations = np.vstack([everyone_and_mean(num_tasks), rng.standard_normal((2, num_tasks))])
        weights, _ = solvers.dual_cone(gramian(jacobian), combinations)
        norms = np.sqrt((jacobian**2).sum(1))
        for u, v, point in zip(combinations, weights, nearest(jacobian, combinations), strict=True):
            scale = np.abs(u) @ norms  # 1e-8 of it is what the Gramian knows of a sum that cancels
            rounding = 1e-8 * scale + 3e-15 * (np.abs(v) @ norms) ** 2 / max(scale, 1e-300)
            np.testing.assert_allclose(v @ jacobian, point, rtol=0, atol=rounding)


@pytest.mark.parametrize(
    ("jacobian", "combination", "expected"),
    [
        ([[-4.0, 1, 1], [6, 1, 1]], [1, 0], [1, 22 / 38]),
        ([[-4.0, 1, 1], [6, 1, 1]], [0.5, 0.5], [0.5 + 2 / 18, 0.5]),
        ([[1.0, 0], [0, 1]], [0.3, 0.7], [0.3, 0.7]),  # no conflict
        ([[1.0, 0], [1, 1]], [1, -1], [1, -0.5]),  # a negative coefficient
        ([[1.0, 2], [-2, -4]], [1, 0], [1, 0.5]),  # opposite: nothing is left
        ([[1.0, 0], [0, 0]], [0.5, 0.5], [0.5, 0.5]),  # a zero gradient
        ([[0.0, 0], [0, 0]], [0.5, 0.5], [0.5, 0.5]),
        ([[3.0]], [0.5], [0.5]),
        ([[3.0]], [-0.5], [0.0]),
    ],
)
def test_values(jacobian: list, combination: list, expected: list) -> None:
    weights, gap = solvers.dual_cone(gramian(np.array(jacobian)), combination)
    np.testing.assert_allclose(weights, expected, atol=1e-15)
    assert gap < 1e-13


def test_narrow_cone() -> None:
    """Two gradients that nearly oppose each other leave next to nothing of the third: exactly, or within the noise."""
    for angle in (1e-2, 1e-3, 1e-4):
        jacobian = np.array([[0.0, -1, 1], [1, angle, 0], [-1, angle, 0]])
        weights, _ = solvers.dual_cone(gramian(jacobian), [1.0, 0, 0])
        np.testing.assert_allclose(weights, [1, 0.5 / angle, 0.5 / angle], rtol=1e-7)
        guarded, gap = solvers.dual_cone(gramian(jacobian), [1.0, 0, 0], noise=1e-6)
        if angle == 1e-2:
            assert guarded.tolist() == weights.tolist()
        else:
            assert guarded[1:].max() < 1 / np.sqrt(3e-6)
            assert (jacobian @ (guarded @ jacobian)).min() >= -np.sqrt(3e-6)
            assert gap > 1e-6  # of the Gramian as it is


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS.values() if s.__name__ != "zero_rows"])
def test_noisy_gramian(sampler: Sampler) -> None:
    """Rounding in float32 does not let weights grow until the sum of the true gradients is anything."""
    rng = np.random.default_rng(25)
    for num_tasks in [2, 3, 4, 5, 8, 16, 32] * 4:
        jacobian = with_norms(rng, sampler(rng, num_tasks), 3)
        combinations = np.eye(num_tasks)
        weights, _ = solvers.dual_cone(noisy(rng, jacobian), combinations, noise=5e-7)
        norms = np.sqrt((jacobian**2).sum(1))
        directions = weights @ jacobian / norms[:, None]
        conflicts = directions @ (jacobian / norms[:, None]).T
        ridge = 5e-7 * num_tasks
        spread = (weights * norms / norms[:, None]).sum(1)
        assert (conflicts.min(1) >= -np.sqrt(ridge) - 3e-7 * spread).all()
        assert (np.sqrt((directions**2).sum(1)) <= 1.01).all()


def test_noise_matters_where_it_can_only() -> None:
    rng = np.random.default_rng(26)
    for sampler in (random, opposite):
        m = gramian(sampler(rng, 9))
        for noise in (1e-12, 1e-7):
            guarded, gap = solvers.dual_cone(m, np.eye(9), noise=noise)
            plain, plain_gap = solvers.dual_cone(m, np.eye(9))
            assert guarded.tolist() == plain.tolist()
            assert gap.tolist() == plain_gap.tolist()


def test_without_conflict_nothing_is_added() -> None:
    rng = np.random.default_rng(27)
    for num_tasks in (1, 5, 40):
        jacobian = rng.uniform(0, 1, (num_tasks, 50))
        combinations = rng.uniform(0, 1, (4, num_tasks))
        weights, gap = solvers.dual_cone(gramian(jacobian), combinations)
        assert weights.tolist() == combinations.tolist()
        assert (gap == 0).all()


def test_permutation_and_scale() -> None:
    rng = np.random.default_rng(28)
    for num_tasks in (3, 10, 40):
        m, u = gramian(random(rng, num_tasks)), rng.uniform(0, 1, num_tasks)
        weights, gap = solvers.dual_cone(m, u)
        order = rng.permutation(num_tasks)
        np.testing.assert_allclose(solvers.dual_cone(m[np.ix_(order, order)], u[order])[0], weights[order], atol=1e-12)
        for factor in (1e-200, 2.0**-80, 1e7, 1e150):
            scaled, scaled_gap = solvers.dual_cone(m * factor, u)
            np.testing.assert_allclose(scaled, weights, atol=1e-12)
            np.testing.assert_allclose(scaled_gap / factor, gap, atol=1e-10)
            np.testing.assert_allclose(solvers.dual_cone(m, u * 1e5)[0], weights * 1e5, rtol=1e-12)


def test_lengths_do_not_change_which_directions_conflict() -> None:
    """D M D with v D^-1: the same point, whatever the lengths."""
    rng = np.random.default_rng(29)
    for num_tasks in (2, 8, 30):
        m, u = gramian(random(rng, num_tasks)), rng.uniform(0, 1, num_tasks)
        lengths = np.exp(rng.uniform(-15, 15, num_tasks))
        found, _ = solvers.dual_cone(lengths[:, None] * m * lengths, u / lengths)
        np.testing.assert_allclose(found * lengths, solvers.dual_cone(m, u)[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -1e6])
def test_mask_is_the_problem_without_the_absent(garbage: float) -> None:
    rng = np.random.default_rng(30)
    for num_tasks in (2, 5, 20, 40):
        m, u = gramian(random(rng, num_tasks)), rng.uniform(0, 1, (3, num_tasks))
        mask = rng.random(num_tasks) < 0.6
        mask[rng.integers(num_tasks)] = True
        alone, gap_alone = solvers.dual_cone(m[np.ix_(mask, mask)], u[:, mask])
        m[~mask] = m[:, ~mask] = u[:, ~mask] = garbage
        weights, gap = solvers.dual_cone(m, u, mask)
        assert (weights[:, ~mask] == 0).all()
        np.testing.assert_allclose(weights[:, mask], alone, atol=1e-13)
        np.testing.assert_allclose(gap, gap_alone, atol=1e-12)
    weights, gap = solvers.dual_cone(np.full((3, 3), np.nan), np.ones(3), np.zeros(3, dtype=bool))
    assert (weights.tolist(), float(gap)) == ([0, 0, 0], 0)


def test_not_finite() -> None:
    m = np.stack([np.eye(3)] * 3)
    m[1, 0, 2] = m[1, 2, 0] = np.nan
    u = np.ones((3, 2, 3))
    u[2, 1, 0] = np.inf
    weights, gap = solvers.dual_cone(m, u)
    finite = np.array([[True, True], [False, False], [True, False]])
    assert (weights[finite] == 1).all()
    assert np.isnan(weights[~finite]).all()
    assert np.isnan(gap[~finite]).all()
    assert (gap[finite] == 0).all()
    for solve in (ops.dual_cone, reference.dual_cone):
        found, found_gap = solve(torch.from_numpy(m), torch.from_numpy(u))
        np.testing.assert_array_equal(found, weights)
        np.testing.assert_array_equal(found_gap, gap)


def test_shapes() -> None:
    m = gramian(random(np.random.default_rng(31), 4))
    stack = np.stack([m, 2 * m])
    for batch, problem in (((), m), ((2,), stack), ((2, 1), stack[:, None])):
        one, gap = solvers.dual_cone(problem, np.ones((*batch, 4)))
        assert (one.shape, gap.shape) == ((*batch, 4), batch)
        for count in (0, 1, 3):
            several, gap = solvers.dual_cone(problem, np.ones((*batch, count, 4)))
            assert (several.shape, gap.shape) == ((*batch, count, 4), (*batch, count))
            assert (several == one[..., None, :]).all()
    assert solvers.dual_cone(np.zeros((2, 0, 0)), np.zeros((2, 3, 0)))[0].shape == (2, 3, 0)


@pytest.mark.parametrize("noise", [0.0, 1e-6])
@pytest.mark.parametrize("sampler", [random, rank_deficient, opposite])
def test_operator_and_reference_agree(sampler: Sampler, noise: float) -> None:
    rng = np.random.default_rng(32)
    for num_tasks in (1, 2, 5, 12):
        jacobian = np.stack([sampler(rng, num_tasks) for _ in range(3)])
        m = torch.from_numpy(gramian(jacobian))
        mask = torch.from_numpy(rng.random((3, num_tasks)) < 0.8)
        mask[:, 0] = True
        u = torch.from_numpy(rng.uniform(0, 1, (3, 4, num_tasks)))
        found, gap = ops.dual_cone(m, u, mask, noise)
        expected, expected_gap = reference.dual_cone(m, u, mask, noise)
        for k in range(3):  # where gradients are dependent the weights are not unique
            points = [x[k].numpy() @ jacobian[k] for x in (found, expected)]
            np.testing.assert_allclose(*points, rtol=0, atol=1e-6 if sampler is rank_deficient else 1e-9)
        torch.testing.assert_close(gap, expected_gap, rtol=1e-6, atol=1e-8)
        np.testing.assert_array_equal(found, solvers.dual_cone(m.numpy(), u.numpy(), mask.numpy(), noise)[0])
        np.testing.assert_array_equal(ops.dual_cone(m, u.mT.contiguous().mT, mask, noise)[0], found)


def test_every_thread_and_instruction_set() -> None:
    m, u = gramian(random(np.random.default_rng(33), 60)), everyone_and_mean(60)
    threads = torch.get_num_threads()
    expected, _ = solvers.dual_cone(m, u)
    before = solvers._C.build_info()["cpu_capability"]
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert solvers.dual_cone(m, u)[0].tolist() == expected.tolist()
        for name in ("portable", "avx2", "avx512"):
            if solvers._C.set_cpu_capability(name):
                np.testing.assert_allclose(solvers.dual_cone(m, u)[0], expected, rtol=0, atol=1e-12)
    finally:
        torch.set_num_threads(threads)
        solvers._C.set_cpu_capability(before)


@pytest.mark.parametrize(
    ("combinations", "options", "error", "message"),
    [
        (np.ones(2), {}, ValueError, r"combinations: expected shape \[R, 3\] or \[3\], found \[2\]"),
        (np.ones((1, 1, 3)), {}, ValueError, r"combinations: .* found \[1, 1, 3\]"),
        (["a", "b", "c"], {}, TypeError, "combinations: expected an array of real numbers"),
        (np.ones(3), {"noise": -1.0}, ValueError, r"noise: expected a number in \[0, 1\], found -1"),
        (np.ones(3), {"noise": "no"}, TypeError, "noise: expected a number, found 'no'"),
    ],
)
def test_errors(combinations: object, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        solvers.dual_cone(np.eye(3), combinations, **options)


def test_errors_of_the_operator() -> None:
    m = torch.eye(3, dtype=torch.float64)[None]
    for u in (torch.ones(3), torch.ones(1, 3), torch.ones(1, 2, 2), torch.ones(2, 2, 3)):
        for solve in (ops.dual_cone, reference.dual_cone):
            with pytest.raises(ValueError, match=r"combinations: expected shape \[1, R, 3\], found"):
                solve(m, u)
    with pytest.raises(ValueError, match="noise"):
        ops.dual_cone(m, torch.ones(1, 1, 3), noise=2.0)
