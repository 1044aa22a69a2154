"""Min-norm by its optimality conditions, taken from the gradients and not from the Gramian, and against SciPy."""

import time

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import optimize

from fastmtl import solvers
from tests.samplers import DEGENERATE, FULL_RANK, SAMPLERS, Jacobian, Sampler, random, rank_deficient, with_norms

SIZES = [*range(1, 13), 16, 20, 31, 32, 33, 48, 64, 97, 128]
Array = NDArray[np.float64]


def stack_of(sampler: Sampler, num_tasks: int, count: int, spread: float = 0) -> Array:
    rng = np.random.default_rng(num_tasks)
    return np.stack([with_norms(rng, sampler(rng, num_tasks), spread) for _ in range(count)])


def gramian(jacobians: Array) -> Array:
    m: Array = jacobians @ jacobians.swapaxes(-1, -2)
    return (m + m.swapaxes(-1, -2)) / 2


def smallest_squared_norm(jacobians: Array) -> Array:
    return (jacobians**2).sum(-1).min(-1)


def true_gap(jacobians: Array, weights: Array) -> Array:
    """|x|^2 - min_t <g_t, x>: zero at the optimum and nowhere else."""
    x = np.einsum("...t,...tp->...p", weights.astype(np.longdouble), jacobians)
    products = np.einsum("...tp,...p->...t", jacobians.astype(np.longdouble), x)
    return ((x * x).sum(-1) - products.min(-1)).astype(np.float64)


def assert_on_simplex(weights: Array) -> None:
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-13)


def assert_optimal(jacobians: Array, tolerance: float) -> None:
    """`tolerance`: of the smallest squared norm."""
    weights, gap = solvers.min_norm(gramian(jacobians))
    assert_on_simplex(weights)
    bound = tolerance * smallest_squared_norm(jacobians)
    assert (true_gap(jacobians, weights) <= bound).all()
    assert (gap >= 0).all()
    assert (gap <= bound).all()


@pytest.mark.parametrize("num_tasks", SIZES)
@pytest.mark.parametrize("spread", [0, 6])
@pytest.mark.parametrize("sampler", FULL_RANK.values(), ids=FULL_RANK)
def test_optimal_at_full_rank(sampler: Sampler, spread: float, num_tasks: int) -> None:
    assert_optimal(stack_of(sampler, num_tasks, max(2, 60 // num_tasks), spread), 1e-9)


@pytest.mark.parametrize("num_tasks", SIZES)
@pytest.mark.parametrize("sampler", DEGENERATE.values(), ids=DEGENERATE)
def test_optimal_on_degenerate_problems(sampler: Sampler, num_tasks: int) -> None:
    assert_optimal(stack_of(sampler, num_tasks, max(2, 60 // num_tasks)), 1e-9)


@pytest.mark.parametrize("num_tasks", [160, 256, 512])
def test_optimal_for_many_tasks(num_tasks: int) -> None:
    assert_optimal(stack_of(random, num_tasks, 1), 1e-9)


@pytest.mark.parametrize("num_tasks", [2, 3, 5, 8, 16, 40])
@pytest.mark.parametrize("spread", [0, 2])
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_same_point_as_scipy(sampler: Sampler, spread: float, num_tasks: int) -> None:
    # min |J^T u|^2 + m (1 - sum u)^2 over u >= 0, whose solution is the min-norm point up to its length.
    for jacobian in stack_of(sampler, num_tasks, 8, spread):
        weights, _ = solvers.min_norm(gramian(jacobian))
        m = smallest_squared_norm(jacobian)
        rest = np.sqrt(m) if m > 0 else 1.0
        u, _ = optimize.nnls(np.vstack([jacobian.T, np.full(num_tasks, rest)]), np.append(0 * jacobian[0], rest))
        expected = u / u.sum() @ jacobian
        np.testing.assert_allclose(weights @ jacobian, expected, atol=1e-6 * rest)
        assert (weights @ jacobian) @ (weights @ jacobian) <= expected @ expected + 1e-9 * m + 1e-30


@pytest.mark.parametrize("num_tasks", [2, 3, 6])
def test_same_value_as_slsqp(num_tasks: int) -> None:
    for m in gramian(stack_of(random, num_tasks, 10)):
        weights, _ = solvers.min_norm(m)
        found = optimize.minimize(
            lambda w, m=m: w @ m @ w,
            np.full(num_tasks, 1 / num_tasks),
            jac=lambda w, m=m: 2 * m @ w,
            bounds=[(0, None)] * num_tasks,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        np.testing.assert_allclose(weights @ m @ weights, found.fun, rtol=1e-7)


@pytest.mark.parametrize(
    ("jacobian", "expected"),
    [
        ([[-4.0, 1, 1], [6, 1, 1]], [0.6, 0.4]),
        ([[1.0, 0, 0], [0, 2, 0], [0, 0, 3]], [36 / 49, 9 / 49, 4 / 49]),
        ([[1.0, 0], [2, 1]], [1, 0]),  # the shorter one alone
        ([[3.0]], [1]),
        ([[1.0, 0], [0, 0], [0, 1]], [0, 1, 0]),  # a zero gradient
        ([[0.0, 0], [1, 0], [0, 0]], [1, 0, 0]),  # two: the first
    ],
)
def test_values(jacobian: list[list[float]], expected: list[float]) -> None:
    weights, gap = solvers.min_norm(gramian(np.array(jacobian)))
    np.testing.assert_allclose(weights, expected, atol=1e-15)
    assert gap < 1e-13


@pytest.mark.parametrize("exponent", [-24, -9, 9, 24])
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_scale_invariant(sampler: Sampler, exponent: int) -> None:
    jacobian = sampler(np.random.default_rng(1), 12)
    before, gap_before = solvers.min_norm(gramian(jacobian))
    scale = 2.0 ** round(exponent / np.log10(2))
    after, gap_after = solvers.min_norm(gramian(jacobian) * scale)
    np.testing.assert_allclose(after @ jacobian, before @ jacobian, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(gap_after / scale, gap_before, atol=1e-10)


def test_equivariant_under_permutation() -> None:
    rng = np.random.default_rng(2)
    for num_tasks in (3, 10, 50):
        m = gramian(random(rng, num_tasks))
        order = rng.permutation(num_tasks)
        permuted, _ = solvers.min_norm(m[np.ix_(order, order)])
        np.testing.assert_allclose(permuted, solvers.min_norm(m)[0][order], atol=1e-10)


def noisy(rng: np.random.Generator, jacobian: Jacobian) -> Array:
    """A Gramian as float32 arithmetic would give it: not positive semidefinite, if it was singular."""
    m = gramian(jacobian)
    norms = np.sqrt(m.diagonal())
    noise = 3e-7 * rng.uniform(-1, 1, m.shape) * norms * norms[:, None]
    return m + (noise + noise.T) / 2


@pytest.mark.parametrize("spread", [0, 6])
@pytest.mark.parametrize("sampler", [s for s in SAMPLERS.values() if s.__name__ != "zero_rows"])
def test_noisy_gramian(sampler: Sampler, spread: float) -> None:
    rng = np.random.default_rng(3)
    for num_tasks in [2, 3, 3, 3, 3, 4, 5, 5, 8, 8, 16, 32, 64]:
        for _ in range(4):
            jacobian = with_norms(rng, sampler(rng, num_tasks), spread)
            m = noisy(rng, jacobian)
            weights, _ = solvers.min_norm(m)
            assert_on_simplex(weights)
            assert weights @ m @ weights <= m.diagonal().min() * (1 + 1e-9)  # no worse than the shortest task alone
            largest = np.sqrt((jacobian**2).sum(-1)) * weights
            if spread == 0:  # as good as the noise allows
                assert true_gap(jacobian, weights) <= 1e-6 * max(m.diagonal().max(), largest.sum() ** 2)


@pytest.mark.parametrize("num_tasks", [3, 4, 5, 8])
@pytest.mark.parametrize("sampler", [SAMPLERS["parallel"], SAMPLERS["rank_deficient"]])
def test_dependent_up_to_noise(sampler: Sampler, num_tasks: int) -> None:
    """Where tasks depend on each other but for noise, and their lengths magnify it: never worse than the shortest."""
    rng = np.random.default_rng(num_tasks)
    m = np.stack([noisy(rng, with_norms(rng, sampler(rng, num_tasks))) for _ in range(1000)])
    weights, _ = solvers.min_norm(m)
    assert_on_simplex(weights)
    squared_norm = np.einsum("ki,kij,kj->k", weights, m, weights)
    assert (squared_norm <= m.diagonal(axis1=1, axis2=2).min(1) * (1 + 1e-9)).all()


def test_dependent_with_lengths_far_apart() -> None:
    """Beyond what is promised (full rank), but it should not be far off."""
    gaps = []
    for num_tasks in (3, 5, 8, 13, 20, 32):
        rng = np.random.default_rng(300 + num_tasks)
        m = gramian(np.stack([with_norms(rng, rank_deficient(rng, num_tasks)) for _ in range(250)]))
        weights = solvers.min_norm(m)[0].astype(np.longdouble)
        products = np.einsum("kij,kj->ki", m, weights)
        gap = np.einsum("ki,ki->k", weights, products) - products.min(-1)
        gaps.append(gap / m.diagonal(axis1=1, axis2=2).min(1))
    assert np.max(gaps) < 1e-6  # without building the tableau anew: 4e-6


def test_cycling_is_bounded() -> None:
    rng = np.random.default_rng(4)
    problems = np.stack([noisy(rng, DEGENERATE["rank_deficient"](rng, 64)) for _ in range(50)])
    start = time.perf_counter()
    solvers.min_norm(problems)
    assert time.perf_counter() - start < 5  # about 0.02 s


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, -1e6, 1e-6])
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_mask_is_the_problem_without_the_absent(garbage: float, sampler: Sampler) -> None:
    rng = np.random.default_rng(5)
    for num_tasks in (1, 2, 5, 20):
        m = gramian(sampler(rng, num_tasks))
        mask = rng.random(num_tasks) < 0.6
        mask[rng.integers(num_tasks)] = True
        alone, gap_alone = solvers.min_norm(m[np.ix_(mask, mask)])
        m[~mask] = m[:, ~mask] = garbage
        weights, gap = solvers.min_norm(m, mask)
        assert (weights[~mask] == 0).all()
        np.testing.assert_allclose(weights[mask], alone, atol=1e-9)
        np.testing.assert_allclose(gap, gap_alone, atol=1e-10)


def test_empty_mask() -> None:
    weights, gap = solvers.min_norm(np.full((3, 3), np.nan), np.zeros(3, dtype=bool))
    assert weights.tolist() == [0, 0, 0]
    assert gap == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [(0, 0), (2, 2), (0, 2), (4, 1)])
def test_not_finite(bad: float, where: tuple[int, int]) -> None:
    m = gramian(stack_of(random, 5, 3))
    m[1, where[0], where[1]] = m[1, where[1], where[0]] = bad
    weights, gap = solvers.min_norm(m)
    assert np.isnan(weights[1]).all()
    assert np.isnan(gap[1])
    assert_on_simplex(weights[[0, 2]])


def test_extreme_but_finite() -> None:
    for scale in (1e-300, 1e300):
        np.testing.assert_allclose(solvers.min_norm(scale * np.diag([1.0, 4]))[0], [0.8, 0.2], rtol=1e-14)
    assert solvers.min_norm(np.diag([1e-300, 1e300]))[0].tolist() == [1, 0]


def test_stacks() -> None:
    m = gramian(stack_of(random, 4, 6)).reshape(2, 3, 4, 4)
    weights, gap = solvers.min_norm(m)
    assert weights.shape == (2, 3, 4)
    assert gap.shape == (2, 3)
    for index in np.ndindex(2, 3):
        assert weights[index].tolist() == solvers.min_norm(m[index])[0].tolist()
    assert solvers.min_norm(np.zeros((0, 4, 4)))[0].shape == (0, 4)
    assert solvers.min_norm(np.zeros((2, 0, 0)))[0].shape == (2, 0)


def test_threads_do_not_share() -> None:
    torch.set_num_threads(2)
    m = gramian(stack_of(random, 40, 150))
    weights, _ = solvers.min_norm(m)
    targets = np.zeros_like(m)
    stacked = (weights, solvers.pcgrad(m, "fixed"), *solvers.gradvac(m, targets, order="fixed"))
    for k, single in enumerate(m):
        alone = (solvers.min_norm(single)[0], solvers.pcgrad(single, "fixed"), *solvers.gradvac(single, order="fixed"))
        for ours, expected in zip(stacked, alone, strict=True):
            np.testing.assert_array_equal(ours[k], expected)


def test_every_instruction_set() -> None:
    """Equal to rounding, for all solvers."""
    compiled = solvers._C
    m = gramian(stack_of(random, 20, 5))
    bounds, targets = np.full(20, 0.01), np.full_like(m, 0.1)

    def solve() -> list[Array]:
        solved = [solvers.min_norm(m)[0], solvers.min_norm(m, lower_bounds=bounds)[0], solvers.pcgrad(m)]
        return [*solved, solvers.frank_wolfe(m, max_iter=20)[0], *solvers.gradvac(m, targets)]

    before = compiled.build_info()["cpu_capability"]
    expected = solve()
    try:
        for name in ("portable", "avx2", "avx512"):
            if compiled.set_cpu_capability(name):
                for ours, theirs in zip(solve(), expected, strict=True):
                    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)
    finally:
        compiled.set_cpu_capability(before)


def test_any_layout_and_type() -> None:
    m = gramian(stack_of(random, 4, 1))[0]
    expected = solvers.min_norm(m)[0]
    strided = np.zeros((8, 8))
    strided[::2, ::2] = m
    np.testing.assert_array_equal(solvers.min_norm(strided[::2, ::2])[0], expected)
    np.testing.assert_allclose(solvers.min_norm(m.astype(np.float32))[0], expected, atol=1e-5)
    np.testing.assert_allclose(solvers.min_norm([[1, 0], [0, 4]])[0], [0.8, 0.2], atol=1e-15)


@pytest.mark.parametrize(
    ("gramian", "mask", "error", "message"),
    [
        (np.eye(3)[:2], None, ValueError, r"\[\.\.\., T, T\], found \[2, 3\]"),
        (np.ones(3), None, ValueError, r"found \[3\]"),
        ([[1.0, 2], [3, 4]], None, ValueError, r"symmetric matrix, found 2.0 at \[0, 1\] but 3.0 at \[1, 0\]"),
        (np.eye(3), [True, False], ValueError, r"mask: expected shape \[3\], found \[2\]"),
        (np.eye(3), [1, 0, 1], TypeError, "mask: expected an array of bool, found dtype int64"),
        (np.eye(2) * 1j, None, TypeError, "real numbers, found dtype complex128"),
        ([["a"]], None, TypeError, "real numbers, found dtype <U1"),
    ],
)
def test_errors(gramian: object, mask: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        solvers.min_norm(gramian, mask)  # type: ignore[arg-type]
