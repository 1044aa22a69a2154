"""CAGrad's weights: by duality, against SciPy's general-purpose solver, and at the ends."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import optimize

from fastmtl import ops, reference, solvers
from tests.samplers import FULL_RANK, SAMPLERS, Sampler, random, with_norms
from tests.solvers.test_min_norm import gramian

Array = NDArray[np.float64]
RADII = [0.05, 0.4, 0.9, 3.0]


def objective(m: Array, c: float, w: Array) -> float:
    """The paper's dual, equation 4."""
    mean = np.full(len(m), 1 / len(m))
    return float(mean @ m @ w + c * np.sqrt(max(mean @ m @ mean, 0)) * np.sqrt(max(w @ m @ w, 0)))


@pytest.mark.parametrize("c", RADII)
@pytest.mark.parametrize("spread", [0, 3])
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_optimal(sampler: Sampler, spread: float, c: float) -> None:
    """The direction is in the ball, and its least gain is what the dual problem bounds it by."""
    rng = np.random.default_rng(51)
    for num_tasks in (1, 2, 3, 8, 33, 64):
        jacobian = with_norms(rng, sampler(rng, num_tasks), spread)
        m, mean = gramian(jacobian), jacobian.mean(0)
        weights, gap = solvers.cagrad(m, c)
        direction = weights @ jacobian
        radius, longest = c * np.linalg.norm(mean), np.linalg.norm(jacobian, axis=1).max()
        assert np.linalg.norm(direction - mean) <= radius + 1e-7 * longest
        assert (weights >= 1 / num_tasks - 1e-15).all()
        assert 0 <= gap <= 1e-7 * longest**2


@pytest.mark.parametrize("c", RADII)
@pytest.mark.parametrize("sampler", FULL_RANK.values(), ids=FULL_RANK)
def test_never_worse_than_scipy(sampler: Sampler, c: float) -> None:
    rng = np.random.default_rng(52)
    for num_tasks in (2, 3, 5, 8):
        m = gramian(sampler(rng, num_tasks))
        share = solvers.cagrad(m, c)[0] - 1 / num_tasks
        w = share / share.sum()
        found = optimize.minimize(
            lambda w, m=m: objective(m, c, w),
            np.full(num_tasks, 1 / num_tasks),
            bounds=[(0, 1)] * num_tasks,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 500},
        )
        assert objective(m, c, w) <= found.fun + 1e-10 * m.max()


@pytest.mark.parametrize("num_tasks", [128, 256])
def test_many_tasks(num_tasks: int) -> None:
    m = gramian(random(np.random.default_rng(53), num_tasks))
    _, gap = solvers.cagrad(m)
    assert gap <= 1e-10 * m.max()


def test_ends() -> None:
    rng = np.random.default_rng(54)
    m = gramian(random(rng, 5))
    np.testing.assert_array_equal(solvers.cagrad(m, 0.0)[0], np.full(5, 0.2))
    opposite = np.array([[1.0, -1], [-1, 1]])  # the mean gradient is 0
    assert solvers.cagrad(opposite)[0].tolist() == [0.5, 0.5]
    assert solvers.cagrad(np.zeros((3, 3)))[0] == pytest.approx([1 / 3] * 3)
    np.testing.assert_allclose(solvers.cagrad(np.array([[4.0]]), 0.4)[0], [1.4])


def test_nearest_to_the_mean_where_only_no_gain_is_possible() -> None:
    """c >= 1 and 0 in the hull: the mean's projection onto what conflicts with nobody."""
    jacobian = np.array([[1.0, 0.0], [-3.0, 0.0], [0.0, 3.0]])
    weights, gap = solvers.cagrad(gramian(jacobian), 1.0)
    np.testing.assert_allclose(weights @ jacobian, [0, 1], atol=1e-12)
    assert gap <= 1e-12


@pytest.mark.parametrize("c", RADII)
def test_scale_permutation_and_masks(c: float) -> None:
    rng = np.random.default_rng(55)
    for num_tasks in (2, 9, 40):
        m = gramian(random(rng, num_tasks))
        weights, _ = solvers.cagrad(m, c)
        order = rng.permutation(num_tasks)
        np.testing.assert_allclose(solvers.cagrad(m[np.ix_(order, order)], c)[0], weights[order], atol=1e-9)
        for factor in (1e-150, 2.0**-80, 1e150):
            np.testing.assert_allclose(solvers.cagrad(m * factor, c)[0], weights, atol=1e-9)
        mask = np.arange(num_tasks) % 3 != 1
        alone, _ = solvers.cagrad(m[np.ix_(mask, mask)], c)
        m[~mask] = m[:, ~mask] = np.nan
        masked, _ = solvers.cagrad(m, c, mask)
        np.testing.assert_allclose(masked[mask], alone, atol=1e-9)
        assert (masked[~mask] == 0).all()
        assert np.isnan(solvers.cagrad(m, c)[0]).all()
    assert solvers.cagrad(np.eye(3), c, np.zeros(3, dtype=bool))[0].tolist() == [0, 0, 0]


def test_operator_and_reference_agree() -> None:
    rng = np.random.default_rng(56)
    for num_tasks in (1, 2, 6, 12):
        m = torch.from_numpy(np.stack([gramian(random(rng, num_tasks)) for _ in range(3)]))
        mask = torch.from_numpy(rng.random((3, num_tasks)) < 0.7)
        m[2, 0, 0] = torch.nan
        for c in RADII:
            found, expected = ops.cagrad(m, mask, c)[0], reference.cagrad(m, mask, c)[0]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, equal_nan=True)


def test_errors_and_tracing() -> None:
    m = torch.from_numpy(gramian(random(np.random.default_rng(57), 4)))[None]
    for c, error in ((-0.1, ValueError), (float("nan"), ValueError), ("a", TypeError)):
        with pytest.raises(error, match="c: expected a number"):
            ops.cagrad(m, None, c)
        with pytest.raises(error, match="c: expected a number"):
            solvers.cagrad(m[0].numpy(), c)
    torch.library.opcheck(torch.ops.fastmtl.cagrad, (m, None, 0.4))
