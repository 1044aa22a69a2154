"""AlignedMTL's weights and the direction of equal cosines: by their definitions on the gradients' singular values."""

import numpy as np
import pytest
import scipy.linalg
import torch

from fastmtl import ops, reference, solvers
from tests.samplers import DEGENERATE, FULL_RANK, SAMPLERS, Jacobian, Sampler, random, square, with_norms
from tests.solvers.oracles import Array
from tests.solvers.test_min_norm import gramian

MODES = ["min", "median", "rmse"]
LENGTHS = ["projections", "sum_to_one"]
SIZES = [1, 2, 3, 8, 33, 70]


def aligned_direction(jacobian: Jacobian, preference: Array, mode: str) -> Array:
    """The nearest gradients with equal singular values, summed by preference."""
    u, sigma, v = np.linalg.svd(jacobian, full_matrices=False)
    kept = sigma**2 > sigma.max(initial=0) ** 2 * len(jacobian) * 2.0**-23
    squares = np.sort(sigma[kept] ** 2)
    if squares.size == 0:
        return np.zeros(jacobian.shape[1])
    scale = {"min": squares[0], "median": squares[(len(squares) - 1) // 2], "rmse": squares.mean()}[mode]
    return np.sqrt(scale) * (preference @ u[:, kept]) @ v[kept]


def config_direction(jacobian: Jacobian, preference: Array) -> Array:
    """ConFIG's equations 2 and 3, on the gradients; zero where there is no direction."""
    norms = np.sqrt((jacobian**2).sum(1))
    units = jacobian[norms > 0] / norms[norms > 0, None]
    along = np.linalg.pinv(units, rcond=1e-3) @ preference[norms > 0]
    length = np.sqrt(along @ along)
    return along * 0 if length < 1e-9 else (jacobian @ along).sum() / length**2 * along


def lengths(jacobian: Jacobian) -> float:
    return float(np.sqrt((jacobian**2).sum(1)).max())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_tasks", SIZES)
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_aligned(sampler: Sampler, num_tasks: int, mode: str) -> None:
    rng = np.random.default_rng(31)
    jacobian = sampler(rng, num_tasks)
    for preference in (None, rng.uniform(0, 1, num_tasks)):
        weights = solvers.aligned_mtl(gramian(jacobian), preference=preference, scale_mode=mode)
        before = np.full(num_tasks, 1 / num_tasks) if preference is None else preference
        expected = aligned_direction(jacobian, before, mode)
        np.testing.assert_allclose(weights @ jacobian, expected, rtol=0, atol=1e-7 * lengths(jacobian))


@pytest.mark.parametrize("num_tasks", SIZES)
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_equal_cosines(sampler: Sampler, num_tasks: int) -> None:
    rng = np.random.default_rng(32)
    jacobian = with_norms(rng, sampler(rng, num_tasks), 3)
    for preference in (None, rng.uniform(0.1, 1, num_tasks)):
        weights = solvers.equal_cosines(gramian(jacobian), preference=preference)
        expected = config_direction(jacobian, np.ones(num_tasks) if preference is None else preference)
        np.testing.assert_allclose(weights @ jacobian, expected, rtol=0, atol=1e-6 * lengths(jacobian) * num_tasks)
        short = solvers.equal_cosines(gramian(jacobian), preference=preference, length="sum_to_one")
        if short.any():
            np.testing.assert_allclose(short.sum(), 1, rtol=1e-9)
            np.testing.assert_allclose(short * weights.sum(), weights, rtol=1e-6, atol=1e-9 * np.abs(weights).max())


@pytest.mark.parametrize("num_tasks", [2, 40, 200, 512])
def test_precise_to_rounding(num_tasks: int) -> None:
    """Against SciPy's eigenvectors and Cholesky solution."""
    jacobian = random(np.random.default_rng(33), num_tasks)
    m = gramian(jacobian)
    values, vectors = scipy.linalg.eigh(m)
    expected = np.sqrt(values[0]) * (vectors / np.sqrt(values)) @ vectors.T @ np.full(num_tasks, 1 / num_tasks)
    weights = solvers.aligned_mtl(m)
    assert np.abs(weights - expected).max() <= 1e-13 * num_tasks * np.abs(expected).max()
    norms = np.sqrt(m.diagonal())
    expected = scipy.linalg.solve(m, norms, assume_a="pos")
    weights = solvers.equal_cosines(m, length="sum_to_one")
    np.testing.assert_allclose(weights, expected / expected.sum(), rtol=0, atol=1e-12 * np.abs(weights).max())


def test_small_beside_large() -> None:
    """Lengths over three orders of magnitude: the small ones as precisely as the large ones."""
    rng = np.random.default_rng(34)
    for _ in range(20):
        directions, _ = np.linalg.qr(rng.standard_normal((12, 6)))
        jacobian = directions.T * np.logspace(0, 3, 6)[rng.permutation(6), None]
        m = gramian(jacobian)
        weights = solvers.aligned_mtl(m)  # M is diagonal up to rounding
        np.testing.assert_allclose(weights, 1 / 6 * np.sqrt(m.diagonal().min() / m.diagonal()), rtol=1e-9)


def test_hardest_matrices_fit_the_log_of_rotations() -> None:
    """Spectra in clusters, graded, of Wilkinson's matrix: none runs out of room, which would be NaN."""
    rng = np.random.default_rng(35)
    for n in (2, 3, 5, 16, 64, 150):
        wilkinson = np.diag(np.abs(np.arange(n) - n // 2).astype(float)) + np.eye(n, k=1) + np.eye(n, k=-1)
        rotation, _ = np.linalg.qr(rng.standard_normal((n, n)))
        spectra = (
            np.ones(n),
            np.linspace(1, 2, n),
            np.logspace(-6, 0, n),
            np.logspace(-16, 0, n),
            1 + 1e-9 * rng.standard_normal(n),
            np.where(np.arange(n) % 2, 1.0, 1e-3),
            rng.uniform(0.1, 1, n),
        )
        matrices = [(rotation * spectrum) @ rotation.T for spectrum in spectra]
        matrices += [wilkinson @ wilkinson.T, wilkinson + n * np.eye(n), np.ones((n, n)) + 1e-8 * np.eye(n)]
        matrices += [scipy.linalg.hilbert(n), np.minimum.outer(np.arange(1.0, n + 1), np.arange(1.0, n + 1))]
        for m in matrices:
            symmetric = (m + m.T) / 2
            found = [solvers.aligned_mtl(symmetric), solvers.equal_cosines(symmetric)]
            assert np.isfinite(found).all()


@pytest.mark.parametrize("sampler", FULL_RANK.values(), ids=FULL_RANK)
def test_any_unit(sampler: Sampler) -> None:
    m = gramian(sampler(np.random.default_rng(36), 7))
    for solve in (solvers.aligned_mtl, solvers.equal_cosines):
        weights = solve(m)
        for factor in (2.0**-900, 2.0**-300, 2.0**300, 2.0**900):
            np.testing.assert_allclose(solve(m * factor), weights, rtol=1e-12)


def test_masks_and_what_is_not_finite() -> None:
    rng = np.random.default_rng(37)
    preference = rng.uniform(0.1, 1, 20)
    for num_tasks in (2, 5, 20):
        for sampler in (random, DEGENERATE["rank_deficient"]):
            m = gramian(sampler(rng, num_tasks))
            mask = rng.random(num_tasks) < 0.6
            mask[rng.integers(num_tasks)] = True
            p = preference[:num_tasks]
            for solve, options in (
                (solvers.aligned_mtl, {}),
                (solvers.aligned_mtl, {"preference": p, "scale_mode": "median"}),
                (solvers.equal_cosines, {"length": "sum_to_one"}),
                (solvers.equal_cosines, {"preference": p}),
            ):
                few = {k: v[mask] if k == "preference" else v for k, v in options.items()}
                alone = solve(m[np.ix_(mask, mask)], **few)
                broken = m.copy()
                broken[~mask] = broken[:, ~mask] = np.nan
                weights = solve(broken, mask, **options)
                assert (weights[~mask] == 0).all()
                np.testing.assert_allclose(weights[mask], alone, rtol=1e-12, atol=1e-14)
                assert np.isnan(solve(broken, **options)).all() != mask.all()
    for solve in (solvers.aligned_mtl, solvers.equal_cosines):
        assert solve(np.full((3, 3), np.nan), np.zeros(3, dtype=bool)).tolist() == [0, 0, 0]
        assert solve(np.zeros((3, 3))).tolist() == [0, 0, 0]
        assert solve(np.array([[1.0, np.inf], [np.inf, 1.0]])).tolist() == pytest.approx([np.nan] * 2, nan_ok=True)
        assert solve(np.zeros((0, 0))).shape == (0,)
        assert solve(np.zeros((0, 3, 3))).shape == (0, 3)


def test_operators_and_reference_agree() -> None:
    rng = np.random.default_rng(38)
    for num_tasks in (1, 2, 6, 15):
        m = torch.from_numpy(
            np.stack([gramian(s(rng, num_tasks)) for s in (random, square, DEGENERATE["duplicated"], random)])
        )
        mask = torch.from_numpy(rng.random((4, num_tasks)) < 0.7)
        m[3, 0, 0] = torch.nan
        for preference in (None, torch.rand(num_tasks, dtype=torch.float64), torch.rand(4, num_tasks).double()):
            for name, option in (("aligned_mtl", MODES), ("equal_cosines", LENGTHS)):
                for value in option:
                    found = getattr(ops, name)(m, mask, preference, value)
                    expected = getattr(reference, name)(m, mask, preference, value)
                    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8, equal_nan=True)


@pytest.mark.parametrize(
    ("solve", "options", "message"),
    [
        ("aligned_mtl", {"scale_mode": "max"}, "scale_mode: expected 'min', 'median' or 'rmse', found 'max'"),
        ("equal_cosines", {"length": "one"}, "length: expected 'projections' or 'sum_to_one', found 'one'"),
        ("aligned_mtl", {"preference": np.ones(4)}, r"preference: expected shape .*\[3\], found \[4\]"),
        ("equal_cosines", {"preference": np.ones((2, 3))}, r"preference: expected shape .*\[3\], found \[2, 3\]"),
    ],
)
def test_errors(solve: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(solvers, solve)(np.eye(3), **options)
    tensors = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    for module in (ops,) if "preference" not in options else (ops, reference):
        with pytest.raises(ValueError, match=message):
            getattr(module, solve)(torch.eye(3, dtype=torch.float64)[None], **tensors)


def test_operators_trace() -> None:
    m = torch.from_numpy(np.stack([gramian(random(np.random.default_rng(39), 4)) for _ in range(2)]))
    p = torch.rand(4, dtype=torch.float64)
    for rule in range(5):
        torch.library.opcheck(torch.ops.fastmtl.spectral, (m, None, None, rule))

    def both(m: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return ops.aligned_mtl(m, None, p, "rmse") + ops.equal_cosines(m, preference=p)

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(m, p), both(m, p))
    with pytest.raises(RuntimeError, match="not differentiable"):
        ops.equal_cosines(m.clone().requires_grad_()).sum().backward()


def test_without_the_binary_it_is_the_same_call(monkeypatch: pytest.MonkeyPatch) -> None:
    m = torch.from_numpy(gramian(random(np.random.default_rng(40), 5)))[None]
    found = ops.aligned_mtl(m), ops.equal_cosines(m)
    monkeypatch.setattr("fastmtl._extension.kernels_on", lambda device: False)
    for a, b in zip((ops.aligned_mtl(m), ops.equal_cosines(m)), found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
