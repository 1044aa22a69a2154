"""The reference against SciPy, exact arithmetic and the algorithms on gradient vectors; then our kernels against it."""

import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from scipy import optimize, stats

from fastmtl import _extension, ops, reference

# Rows are tasks.
J = np.array([[-4.0, 1, 1], [6, 1, 1]])
STAR = np.array([[1.0, 0], [-np.sqrt(0.75), 0.5], [-np.sqrt(0.75), -0.5]])  # at 0, 150 and 210 degrees
STAR_ORDER = torch.tensor([[1, 2, 0], [0, 2, 1], [0, 1, 2]])
RNG = torch.tensor([3, 14])


def gramian(*jacobians: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack([g @ g.T for g in jacobians]))


def direction(jacobian: np.ndarray, weights: torch.Tensor) -> np.ndarray:
    return weights[0].numpy() @ jacobian


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


# ---- gram and combine ------------------------------------------------------------------------------------------------


def per_parameter_rows() -> tuple[list[list[torch.Tensor | None]], list[int], np.ndarray]:
    """Three tasks, parameters of different shapes in two groups, some rows absent; and the same as dense [4, 3, 6]."""
    shapes, groups = [(2, 3), (5,), (), (2, 2)], [0, 1, 1, 0]
    dense = normal(4, 3, 6)
    absent = {(0, 1), (1, 0), (3, 0), (3, 1), (3, 2)}
    rows: list[list[torch.Tensor | None]] = []
    for p, shape in enumerate(shapes):
        size = int(np.prod(shape))
        dense[p, :, size:] = 0
        rows.append([])
        for t in range(3):
            if (p, t) in absent:
                dense[p, t] = 0
            rows[p].append(None if (p, t) in absent else torch.from_numpy(dense[p, t, :size].reshape(shape).copy()))
    return rows, groups, dense


def test_gram_sums_parameters_by_group() -> None:
    rows, groups, dense = per_parameter_rows()
    products = dense @ dense.transpose(0, 2, 1)
    expected = np.stack([products[0] + products[3], products[1] + products[2]])
    np.testing.assert_allclose(reference.gram(rows, groups), expected, rtol=1e-14)
    np.testing.assert_allclose(reference.gram(rows), expected.sum(0)[None], rtol=1e-14)


def test_gram_widens_before_it_multiplies() -> None:
    g = torch.tensor([[1e30, 1.0], [1e-30, 3.0]])
    np.testing.assert_allclose(reference.gram(g), gramian(g.double().numpy()), rtol=1e-15)
    half = torch.tensor([[2048.0, 1.0]], dtype=torch.float16)
    assert reference.gram(half).item() == 2048.0**2 + 1


def test_combine_weighs_each_group_with_its_own() -> None:
    rows, groups, dense = per_parameter_rows()
    weights = normal(2, 3, seed=1)
    out = reference.combine(rows, torch.from_numpy(weights), groups)
    assert out[3] is None
    for p in range(3):
        like = next(g for g in rows[p] if g is not None)
        expected = (weights[groups[p]] @ dense[p])[: like.numel()].reshape(like.shape)
        np.testing.assert_allclose(out[p], expected, rtol=1e-14)


def test_combine_does_not_read_rows_of_weight_zero() -> None:
    g = torch.tensor([[torch.inf, torch.nan], [1.0, 2.0]])
    (out,) = reference.combine(g, torch.tensor([0.0, 2.0]))
    assert out is not None
    assert out.tolist() == [2.0, 4.0]
    assert out.dtype == torch.float32


HALF_ROWS = torch.tensor([[1.0, 3.0], [2.0**-12, -3.0]], dtype=torch.bfloat16)  # 1 + 2^-12 takes 13 bits


def test_combine_rounds_once_and_to_the_dtype_that_is_asked_for() -> None:
    weights = torch.tensor([1.0, 1.0])
    for dtype, expected in ((None, 1.0), (torch.bfloat16, 1.0), (torch.float32, 1 + 2.0**-12)):
        (out,) = reference.combine(HALF_ROWS, weights, dtype=dtype)
        assert out is not None
        assert out.dtype == (dtype or torch.bfloat16)
        assert out.tolist() == [expected, 0.0]


def test_combine_into_existing_tensors_rounds_once() -> None:
    rows, weights = reference.as_rows([HALF_ROWS, torch.ones(2, 3)]), torch.tensor([1.0, 1.0])
    # bfloat16 has no number between 1 and 1 + 2^-7, and the middle, 1 + 2^-8, goes to 1: only the 2^-12, which a sum
    # rounded by itself has lost, brings it above.
    for start, dtype, expected in ((16.0, torch.float32, 17 + 2.0**-12), (2.0**-8, torch.bfloat16, 1 + 2.0**-7)):
        out = [torch.full((2,), start, dtype=dtype), torch.full((3,), 5.0, requires_grad=True)]
        reference.combine_(rows, weights, out)
        assert out[0].tolist() == [expected, start]
        assert out[1].tolist() == [7.0] * 3


def test_combine_leaves_unreached_targets_alone() -> None:
    out = [torch.ones(2), torch.ones(3)]
    reference.combine_(reference.as_rows([[None, None], [None, torch.ones(3)]]), torch.ones(2), out)
    assert [x.tolist() for x in out] == [[1.0] * 2, [2.0] * 3]


def test_dtypes_that_gradients_do_not_combine_into() -> None:
    for dtype in (torch.float64, torch.float16):
        with pytest.raises(ValueError, match=rf"dtype: parameter 0: .*bfloat16 or torch.float32 .*found {dtype}"):
            reference.combine(HALF_ROWS, torch.ones(2), dtype=dtype)
        out = [torch.zeros(3), torch.zeros(2, dtype=dtype)]
        with pytest.raises(ValueError, match=rf"out\[1\]: .*bfloat16 or torch.float32 .*found {dtype}"):
            reference.combine_(reference.as_rows([torch.ones(2, 3), HALF_ROWS]), torch.ones(2), out)
        assert not out[0].any()
    with pytest.raises(ValueError, match=r"out: expected one tensor per parameter \(1\), found 0"):
        reference.combine_(reference.as_rows(HALF_ROWS), torch.ones(2), [])


def test_gram_and_combine_are_differentiable() -> None:
    g = torch.from_numpy(normal(3, 4)).requires_grad_()
    w = torch.from_numpy(normal(3, seed=1))
    assert torch.autograd.gradcheck(lambda x: reference.gram(x), (g,))
    assert torch.autograd.gradcheck(lambda x: reference.combine(x, w)[0], (g,))


# ---- Random orders ---------------------------------------------------------------------------------------------------


# From the published test vectors of Random123 (kat_vectors, philox4x32 10).
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    words = [np.array([int(word, 16)], dtype=np.uint64) for word in counter.split()]
    key0, key1 = (int(word, 16) for word in key.split())
    assert [int(x[0]) for x in reference.philox4x32(words, (key0, key1))] == [
        int(word, 16) for word in expected.split()
    ]


def shuffled(num_tasks: int, problem: int, row: int, seed: int, step: int) -> list[int]:
    """One order by the recipe of csrc/solvers/order.h, word by word."""
    order = list(range(num_tasks))
    for n in range(num_tasks - 1):
        block, word = divmod(n, 4)
        counter = [block | row << 16, problem, step % 2**32, step % 2**64 >> 32]
        key = (seed % 2**32, seed % 2**64 >> 32)
        u = int(reference.philox4x32([np.array([c], dtype=np.uint64) for c in counter], key)[word][0])
        last, other = num_tasks - 1 - n, u * (num_tasks - n) >> 32
        order[last], order[other] = order[other], order[last]
    return order


@pytest.mark.parametrize("num_tasks", [1, 2, 5, 6, 19])
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (2**40 + 7, 2**33 + 1), (-1, -(2**63))])
def test_random_orders_follow_the_recipe(num_tasks: int, seed: int, step: int) -> None:
    drawn = reference.visiting_order(2, num_tasks, "random", torch.tensor([seed, step]))
    expected = [[shuffled(num_tasks, k, i, seed, step) for i in range(num_tasks)] for k in range(2)]
    assert drawn.tolist() == expected


def test_random_orders_are_uniform() -> None:
    drawn = reference.visiting_order(3000, 4, "random", RNG).reshape(-1, 4)
    _, counts = drawn.unique(dim=0, return_counts=True)
    assert counts.numel() == 24
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_orders_of_rows_problems_steps_and_seeds_are_unrelated() -> None:
    draws = [reference.visiting_order(3, 16, "random", torch.tensor(rng)) for rng in ([1, 1], [1, 2], [2, 1])]
    assert len(torch.cat(draws).reshape(-1, 16).unique(dim=0)) == 3 * 3 * 16


def test_shared_and_fixed_orders() -> None:
    random = reference.visiting_order(2, 7, "random", RNG)
    assert torch.equal(reference.visiting_order(2, 7, "shared", RNG), random[:, :1].expand(2, 7, 7))
    assert torch.equal(reference.visiting_order(2, 7, "fixed"), torch.arange(7).expand(2, 7, 7))
    assert torch.equal(reference.visiting_order(2, 7, random[1]), random[1].expand(2, 7, 7))


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("random", "rng"),
        ("sorted", "sorted"),
        (torch.zeros(2, 3, dtype=torch.int64), r"\[2, 3\]"),
        (torch.zeros(3, 3, dtype=torch.int64), "permutations"),
    ],
)
def test_bad_orders_are_named(order: torch.Tensor | str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reference.visiting_order(1, 3, order)


# ---- The min-norm point ----------------------------------------------------------------------------------------------


def test_min_norm_published_values() -> None:
    w, gap = reference.min_norm(gramian(J))
    np.testing.assert_allclose(w[0], [0.6, 0.4], atol=1e-15)
    np.testing.assert_allclose(direction(J, w), [0, 1, 1], atol=1e-14)
    assert abs(gap.item()) < 1e-13
    w, _ = reference.min_norm(gramian(np.diag([1.0, 2, 3])))
    np.testing.assert_allclose(w[0], np.array([36, 9, 4]) / 49, atol=1e-15)


def nnls_weights(jacobian: np.ndarray) -> np.ndarray:
    """The least-distance problem as non-negative least squares: |G^T z|^2 + (1 - sum z)^2, then z / sum z."""
    right = np.zeros(jacobian.shape[1] + 1)
    right[-1] = 1
    z, _ = optimize.nnls(np.vstack([jacobian.T, np.ones(len(jacobian))]), right)
    return z / z.sum()


@pytest.mark.parametrize(("num_tasks", "size"), [(1, 3), (2, 5), (3, 2), (6, 40), (20, 60), (20, 7)])
def test_min_norm_is_scipy_nnls(num_tasks: int, size: int) -> None:
    for seed in range(5):
        g = normal(num_tasks, size, seed=seed) + 0.3
        w, gap = reference.min_norm(gramian(g))
        expected = nnls_weights(g)
        np.testing.assert_allclose(direction(g, w), expected @ g, atol=1e-7)  # the accuracy of nnls on rank-deficient g
        if num_tasks <= size:
            np.testing.assert_allclose(w[0], expected, atol=1e-9)
        assert abs(gap.item()) < 1e-12


def test_min_norm_is_scipy_slsqp() -> None:
    g = normal(5, 8) + 0.5
    result = optimize.minimize(
        lambda w: w @ g @ g.T @ w,
        np.full(5, 0.2),
        jac=lambda w: 2 * g @ g.T @ w,
        bounds=[(0, 1)] * 5,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-14},
    )
    w, _ = reference.min_norm(gramian(g))
    np.testing.assert_allclose(w[0], result.x, atol=1e-5)
    assert np.sum(direction(g, w) ** 2) <= result.fun * (1 + 1e-12)


def solve_exactly(system: list[list[Fraction]], right: list[Fraction]) -> list[Fraction] | None:
    """Gauss-Jordan elimination; None if singular."""
    n = len(right)
    rows = [[*row, b] for row, b in zip(system, right, strict=True)]
    for c in range(n):
        pivot = next((r for r in range(c, n) if rows[r][c] != 0), None)
        if pivot is None:
            return None
        rows[c], rows[pivot] = rows[pivot], rows[c]
        rows[c] = [x / rows[c][c] for x in rows[c]]
        for r in range(n):
            if r != c:
                rows[r] = [x - rows[r][c] * y for x, y in zip(rows[r], rows[c], strict=True)]
    return [row[n] for row in rows]


def smallest_square(m: list[list[Fraction]]) -> Fraction:
    """The smallest squared norm in the hull, exactly: the least over all affinely independent supports."""
    candidates = []
    for size in range(1, len(m) + 1):
        for support in itertools.combinations(range(len(m)), size):
            system = [[m[i][j] for j in support] + [Fraction(1)] for i in support]
            solution = solve_exactly(
                [*system, [Fraction(1)] * size + [Fraction(0)]], [Fraction(0)] * size + [Fraction(1)]
            )
            if solution is not None and min(solution[:size]) >= 0:
                candidates.append(-solution[size])
    return min(candidates)


def degenerate_jacobians() -> list[np.ndarray]:
    """Small integers times powers of two, whose Gramians are exact: dependent, opposed, equal and zero tasks."""
    rng = np.random.default_rng(0)
    jacobians = []
    for n in range(60):
        g = rng.integers(-3, 4, (rng.integers(2, 5), rng.integers(1, 5))).astype(float)
        if n % 4 == 1:
            g *= 2.0 ** rng.integers(-20, 21, (len(g), 1))
        if n % 4 == 2:
            g[1] = -g[0] * 2.0 ** rng.integers(-3, 25)
        if n % 4 == 3:
            g[1] = g[0]
        jacobians.append(g)
    return jacobians


@pytest.mark.parametrize("solver", [reference.min_norm, ops.min_norm], ids=["reference", "ops"])
def test_min_norm_is_exact_on_degenerate_problems(solver: Callable) -> None:
    for g in degenerate_jacobians():
        m = [[Fraction(x) for x in row] for row in (g @ g.T).tolist()]
        weights, _ = solver(gramian(g))
        assert weights.min() >= 0
        assert abs(weights.sum().item() - 1) < 1e-14
        w = [Fraction(x) for x in weights[0].tolist()]
        square = sum(a * b * m[i][j] for i, a in enumerate(w) for j, b in enumerate(w))
        excess = float(square - smallest_square(m))
        assert excess <= 1e-13 * min(float(m[i][i]) for i in range(len(g))), g


@pytest.mark.parametrize(("num_tasks", "size"), [(64, 80), (64, 20), (128, 300)])
def test_min_norm_closes_the_gap_on_large_problems(num_tasks: int, size: int) -> None:
    g = normal(num_tasks, size)
    g[1::2] = g[::2] if size == 20 else g[1::2]
    m = gramian(g, g.astype(np.float32).astype(float))
    w, gap = reference.min_norm(m)
    assert (w >= 0).all()
    products = np.einsum("kij,kj->ki", m.numpy(), w.numpy())
    expected = (w.numpy() * products).sum(1) - products.min(1)
    assert (expected <= 1e-12 * m.diagonal(dim1=1, dim2=2).numpy().min(1)).all()
    np.testing.assert_allclose(gap, expected, atol=1e-12)


def test_min_norm_ends_on_a_gramian_that_rounding_made_indefinite() -> None:
    g = normal(64, 30).astype(np.float32)
    w, gap = reference.min_norm(torch.from_numpy(g @ g.T).double()[None])
    assert np.linalg.norm(direction(g.astype(float), w)) < 1e-2 * np.linalg.norm(g, axis=1).min()
    assert gap.item() < 1e-4


def test_min_norm_of_gradients_of_very_different_size() -> None:
    scales = 10.0 ** np.arange(-8, 9, 2)
    w, _ = reference.min_norm(gramian(np.diag(scales)))
    expected = scales**-2.0 / (scales**-2.0).sum()
    np.testing.assert_allclose(w[0], expected, rtol=1e-12)


# ---- PCGrad and GradVac ----------------------------------------------------------------------------------------------


def pcgrad_on_vectors(jacobian: np.ndarray, order: np.ndarray, include_self: bool = False) -> np.ndarray:
    total = np.zeros(jacobian.shape[1])
    for i, row in enumerate(jacobian):
        g = row.copy()
        for j in order[i]:
            other = jacobian[j]
            if (j != i or include_self) and g @ other < 0:
                g = g - g @ other / (other @ other) * other
        total += g
    return total


def gradvac_on_vectors(
    jacobian: np.ndarray, targets: np.ndarray, order: np.ndarray, beta: float, ema_first: bool, ema_always: bool
) -> tuple[np.ndarray, np.ndarray]:
    total, targets = np.zeros(jacobian.shape[1]), targets.copy()
    for i, row in enumerate(jacobian):
        g = row.copy()
        for j in order[i]:
            if j == i:
                continue
            other, size = jacobian[j], np.linalg.norm(g)
            cosine = g @ other / size / np.linalg.norm(other)
            average = (1 - beta) * targets[i, j] + beta * cosine
            target = targets[i, j]
            if ema_first and (ema_always or cosine < target):
                target = average
            if cosine < target:
                sine, target_sine = np.sqrt(1 - cosine**2), np.sqrt(1 - target**2)
                amount = size * (target * sine - cosine * target_sine) / (np.linalg.norm(other) * target_sine)
                g = g + amount * other
            if ema_always or cosine < target:
                targets[i, j] = average
        total += g
    return total, targets


def test_pcgrad_published_values() -> None:
    w = reference.pcgrad(gramian(J), rng=RNG)
    np.testing.assert_allclose(w[0], [2.2222, 1.5789], atol=1e-4)
    np.testing.assert_allclose(direction(J, w), [0.5848, 3.8012, 3.8012], atol=1e-4)
    w = reference.pcgrad(gramian(STAR), order=STAR_ORDER)
    np.testing.assert_allclose(direction(STAR, w), [-0.558013, 0.216506], atol=1e-6)
    w = reference.pcgrad(gramian(STAR), order=STAR_ORDER, include_self=True)
    np.testing.assert_allclose(direction(STAR, w), [-0.433013, 0.216506], atol=1e-6)


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize(("num_tasks", "size"), [(2, 3), (5, 4), (12, 3), (12, 40)])
def test_pcgrad_is_the_algorithm_on_vectors(num_tasks: int, size: int, include_self: bool) -> None:
    g = normal(num_tasks, size)
    order = reference.visiting_order(1, num_tasks, "random", RNG)
    expected = pcgrad_on_vectors(g, order[0].numpy(), include_self)
    for kwargs in ({"rng": RNG}, {"order": order}, {"order": order[0]}):
        w = reference.pcgrad(gramian(g), include_self=include_self, **kwargs)
        np.testing.assert_allclose(direction(g, w), expected, atol=1e-12)
    mean = reference.pcgrad(gramian(g), None, "random", RNG, include_self, "mean")
    np.testing.assert_allclose(mean, w / num_tasks, rtol=1e-12)


def test_pcgrad_never_projects_on_a_zero_gradient() -> None:
    g = np.vstack([J[0], np.zeros(3), J[1]])
    w = reference.pcgrad(gramian(g), rng=RNG)
    np.testing.assert_allclose(w[0, [0, 2]], reference.pcgrad(gramian(J), rng=RNG)[0], rtol=1e-15)
    assert w[0, 1] == 1


RULES = [(first, always) for first in (False, True) for always in (False, True)]


@pytest.mark.parametrize(("ema_first", "ema_always"), RULES)
@pytest.mark.parametrize(("num_tasks", "size"), [(2, 3), (5, 9), (12, 40)])
def test_gradvac_is_the_algorithm_on_vectors(num_tasks: int, size: int, ema_first: bool, ema_always: bool) -> None:
    g = normal(num_tasks, size)
    targets = np.random.default_rng(1).uniform(0, 0.8, (num_tasks, num_tasks))
    order = reference.visiting_order(1, num_tasks, "random", RNG)[0].numpy()
    expected, moved = gradvac_on_vectors(g, targets, order, 0.2, ema_first, ema_always)
    w, new_targets = reference.gradvac(
        gramian(g), torch.from_numpy(targets)[None], None, "random", RNG, 0.2, ema_first, ema_always
    )
    np.testing.assert_allclose(direction(g, w), expected, rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(new_targets[0], moved, atol=1e-12)
    assert not np.array_equal(moved, targets)


def test_gradvac_with_targets_of_zero_is_pcgrad() -> None:
    m = gramian(normal(9, 5))
    w, _ = reference.gradvac(m, torch.zeros_like(m), rng=RNG)
    np.testing.assert_allclose(w, reference.pcgrad(m, rng=RNG), rtol=1e-10)


def test_gradvac_turns_the_gradient_to_the_target_cosine() -> None:
    g = np.array([[1.0, 0, 0], [0.1, 2, 1]])
    targets = torch.tensor([[[0.0, 0.7], [-1.0, 0.0]]], dtype=torch.float64)
    w, _ = reference.gradvac(gramian(g), targets, order="fixed")
    turned = g[0] + (w[0, 1].item() - 1) * g[1]
    assert abs(turned @ g[1] / np.linalg.norm(turned) / np.linalg.norm(g[1]) - 0.7) < 1e-14


def test_gradvac_skips_what_has_no_direction() -> None:
    g = np.array([[1.0, 2, 0], [0, 0, 0], [-0.7, -1.4, 0]])  # after meeting task 2, task 0 has vanished; and vice versa
    targets = torch.full((1, 3, 3), 0.5, dtype=torch.float64)
    w, moved = reference.gradvac(gramian(g), torch.zeros_like(targets), order=torch.tensor([[2, 1, 0]] * 3))
    np.testing.assert_allclose(w[0], [1 + 0.7, 1, 1 + 1 / 0.7], rtol=1e-14)
    w, moved = reference.gradvac(gramian(g), targets, order="fixed")
    changed = moved != targets
    assert changed.nonzero().tolist() == [[0, 0, 2], [0, 2, 0]]
    assert w.isfinite().all()


@pytest.mark.parametrize("target", [1.0, 1 - 1e-9, 5.0])
def test_gradvac_is_finite_for_targets_of_one(target: float) -> None:
    m = gramian(np.array([[1.0, 2], [1, 2], [-1, 0.5]]))
    w, moved = reference.gradvac(m, torch.full_like(m, target), rng=RNG)
    assert w.isfinite().all()
    assert w.abs().max() < 1e6  # two corrections in a row, of about 700 |g'| / |g_j| each
    assert moved.isfinite().all()


# ---- What all solvers have in common ---------------------------------------------------------------------------------


def projected_gradient(lib: Any, m: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """From equal weights of the tasks present."""
    present = torch.ones(m.shape[:2], dtype=torch.bool) if mask is None else mask
    start = present.to(m.dtype) / present.sum(-1, keepdim=True).clamp(min=1)
    weights: torch.Tensor = lib.projected_gradient(m, start, mask, start, 0.01, 0.5, 0.1, 9, True)
    return weights


def simplex_lp(lib: Any, m: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The longest way down for the first present task, where none goes up."""
    first = m[:, 0].detach().contiguous()
    weights: torch.Tensor = lib.simplex_lp(m, first, torch.zeros_like(first), first, first[:, 0] - torch.inf, mask)[0]
    return weights


SOLVERS: dict[str, Callable] = {
    "min_norm": lambda lib, m, mask: lib.min_norm(m, mask)[0],
    "dual_cone": lambda lib, m, mask: lib.dual_cone(m, torch.full_like(m[:, :1], 0.5), mask)[0][:, 0],
    "pcgrad": lambda lib, m, mask: lib.pcgrad(m, mask, "fixed"),
    "pcgrad_mean": lambda lib, m, mask: lib.pcgrad(m, mask, "fixed", None, True, "mean"),
    "krum": lambda lib, m, mask: lib.krum(m, mask, 0, 2),
    "projected_gradient": lambda lib, m, mask: projected_gradient(lib, m, mask),
    "simplex_lp": lambda lib, m, mask: simplex_lp(lib, m, mask),
    "gradvac": lambda lib, m, mask: lib.gradvac(m, torch.full_like(m, 0.3), mask, "fixed")[0],
}
each_solver = pytest.mark.parametrize("name", SOLVERS)
each_library = pytest.mark.parametrize("lib", [reference, ops], ids=["reference", "ops"])


@each_library
@each_solver
def test_absent_tasks_leave_the_problem_unread(name: str, lib: object) -> None:
    g = normal(6, 9)
    present = [0, 2, 3, 5]
    m = gramian(g, g)
    m[:, [1, 4]] = torch.nan
    m[:, :, [1, 4]] = torch.inf
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, present] = True  # the second problem is empty
    w = SOLVERS[name](lib, m, mask)
    np.testing.assert_allclose(w[0, present], SOLVERS[name](lib, gramian(g[present]), None)[0], rtol=1e-9)
    assert w[0, [1, 4]].eq(0).all()
    assert w[1].eq(0).all()


@each_library
@each_solver
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_gramians_give_nan_in_their_group_only(name: str, lib: object, bad: float) -> None:
    m = gramian(normal(4, 5), normal(4, 5))
    m[0, 1, 2] = m[0, 2, 1] = bad
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[0, 0] = False
    w = SOLVERS[name](lib, m, mask)
    assert w[0].isnan().all()
    np.testing.assert_allclose(w[1], SOLVERS[name](lib, m[1:], None)[0], rtol=1e-12)


@each_library
def test_gradvac_state_outlives_non_finite_gramians_and_absence(lib: object) -> None:
    m = gramian(normal(4, 5), normal(4, 5))
    m[0, 1, 2] = m[0, 2, 1] = torch.nan
    targets = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (2, 4, 4)))
    mask = torch.tensor([[True] * 4, [True, True, False, True]])
    _, moved = lib.gradvac(m, targets, mask, rng=RNG)  # type: ignore[attr-defined]
    assert torch.equal(moved[0], targets[0])
    assert torch.equal(moved[1, 2], targets[1, 2])
    assert torch.equal(moved[1, :, 2], targets[1, :, 2])
    assert torch.equal(moved.diagonal(dim1=1, dim2=2), targets.diagonal(dim1=1, dim2=2))
    assert (moved[1] != targets[1]).sum() == 6


@each_library
def test_zero_gradients(lib: object) -> None:
    g = np.vstack([J[0], np.zeros(3), J[1]])
    w, gap = lib.min_norm(gramian(g))  # type: ignore[attr-defined]
    assert w.tolist() == [[0, 1, 0]]
    assert gap.item() == 0
    zero = gramian(np.zeros((3, 2)))
    w, gap = lib.min_norm(zero)  # type: ignore[attr-defined]
    assert w.sum() == 1
    assert gap.item() == 0
    assert lib.pcgrad(zero, order="fixed").tolist() == [[1, 1, 1]]  # type: ignore[attr-defined]
    w, moved = lib.gradvac(zero, torch.full_like(zero, 0.5), order="fixed")  # type: ignore[attr-defined]
    assert w.tolist() == [[1, 1, 1]]
    assert moved.eq(0.5).all()


@each_library
def test_a_norm_that_underflowed_counts_as_zero(lib: object) -> None:
    m = torch.tensor([[[1, -1e-170], [-1e-170, 0]]], dtype=torch.float64)
    assert lib.pcgrad(m, order="fixed").tolist() == [[1, 1]]  # type: ignore[attr-defined]
    w, moved = lib.gradvac(m, torch.full_like(m, 0.5), order="fixed")  # type: ignore[attr-defined]
    assert w.tolist() == [[1, 1]]
    assert moved.eq(0.5).all()
    assert lib.min_norm(m)[0].tolist() == [[0, 1]]  # type: ignore[attr-defined]


@each_solver
def test_solvers_keep_the_dtype_and_refuse_backward(name: str) -> None:
    m = gramian(J).float().requires_grad_()
    w = SOLVERS[name](reference, m, None)
    assert w.dtype == torch.float32
    with pytest.raises(RuntimeError, match="not differentiable"):
        w.sum().backward()


@each_solver
def test_solvers_run_inside_a_compiled_function(name: str) -> None:
    m = gramian(normal(4, 6))
    compiled = torch.compile(lambda x: 2 * SOLVERS[name](reference, x, None), backend="eager")
    assert torch.equal(compiled(m), 2 * SOLVERS[name](reference, m, None))


@each_solver
def test_wrong_shapes_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"gramian: .* \[2, 3, 4\]"):
        SOLVERS[name](reference, torch.zeros(2, 3, 4), None)
    with pytest.raises(ValueError, match=r"mask: .* \[3, 2\]"):
        SOLVERS[name](reference, torch.zeros(2, 3, 3), torch.ones(3, 2, dtype=torch.bool))


# ---- Our kernels against the reference -------------------------------------------------------------------------------

needs_kernels = pytest.mark.skipif(
    not _extension.kernels_on("cpu"), reason="no compiled extension: fastmtl.ops is the reference itself"
)


def scaled(g: np.ndarray) -> np.ndarray:
    return g * 10.0 ** np.random.default_rng(5).uniform(-5, 5, (len(g), 1))


def repeated(g: np.ndarray) -> np.ndarray:
    return g[np.arange(len(g)) // 2]


def opposed(g: np.ndarray) -> np.ndarray:
    return np.vstack([g[:-1], -2.7 * g[:1]])


def with_zero(g: np.ndarray) -> np.ndarray:
    return np.vstack([g[:-1], 0 * g[:1]])


each_kind = pytest.mark.parametrize("kind", [np.asarray, scaled, repeated, opposed, with_zero])
each_size = pytest.mark.parametrize(("num_tasks", "size"), [(2, 1), (3, 7), (8, 4), (33, 50), (40, 12)])


@needs_kernels
@each_kind
@each_size
def test_kernels_find_the_same_min_norm_point(kind: Callable, num_tasks: int, size: int) -> None:
    jacobians = [kind(normal(num_tasks, size, seed=seed)) for seed in range(3)]
    mask = torch.from_numpy(np.random.default_rng(1).random((3, num_tasks)) < 0.8)
    ours, gap = ops.min_norm(gramian(*jacobians), mask)
    theirs, their_gap = reference.min_norm(gramian(*jacobians), mask)
    for k, g in enumerate(jacobians):
        present = mask[k].numpy()
        shortest = np.linalg.norm(g[present], axis=1).min(initial=np.inf)
        tolerance = 1e-10 * shortest if shortest > 0 else 0.0
        assert np.linalg.norm((ours[k] - theirs[k]).numpy() @ g) <= tolerance
        # The gap is a difference of products with every task, the longest one included.
        largest = np.linalg.norm(g[present], axis=1).max(initial=0)
        assert abs(gap[k] - their_gap[k]) <= 1e-12 * largest * (shortest if shortest > 0 else 0)
        if kind is np.asarray and num_tasks < size:
            np.testing.assert_allclose(ours[k], theirs[k], atol=1e-12)


@needs_kernels
@each_kind
@each_size
@pytest.mark.parametrize("order", ["random", "shared", "fixed"])
def test_kernels_compute_the_same_pcgrad_and_gradvac(kind: Callable, num_tasks: int, size: int, order: str) -> None:
    m = gramian(*(kind(normal(num_tasks, size, seed=seed)) for seed in range(2)))
    lengths = m.diagonal(dim1=1, dim2=2).sqrt()
    mask = torch.from_numpy(np.random.default_rng(2).random((2, num_tasks)) < 0.8)
    targets = torch.from_numpy(np.random.default_rng(3).uniform(-0.9, 0.9, m.shape))

    def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
        scale = (theirs.abs() * lengths).amax(1, keepdim=True)
        assert ((ours - theirs).abs() * lengths <= 1e-10 * scale).all()

    for include_self, reduction in [(False, "sum"), (True, "mean")]:
        args = (m, mask, order, RNG, include_self, reduction)
        assert_same(ops.pcgrad(*args), reference.pcgrad(*args))
    for rule in RULES:
        ours, our_targets = ops.gradvac(m, targets, mask, order, RNG, 0.1, *rule)
        theirs, their_targets = reference.gradvac(m, targets, mask, order, RNG, 0.1, *rule)
        assert_same(ours, theirs)
        np.testing.assert_allclose(our_targets, their_targets, atol=1e-10)


@needs_kernels
@pytest.mark.parametrize("order", ["random", "shared"])
@pytest.mark.parametrize("num_tasks", [3, 17, 70])
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (2**40 + 7, 2**33 + 1), (-1, -(2**63))])
def test_kernels_draw_the_same_orders_bit_for_bit(order: str, num_tasks: int, seed: int, step: int) -> None:
    m = gramian(*(normal(num_tasks, 2 * num_tasks, seed=k) for k in range(3)))
    targets = torch.full_like(m, 0.9)  # every meeting corrects, so that each later one sees every earlier one
    rng = torch.tensor([seed, step])
    explicit = reference.visiting_order(3, num_tasks, order, rng)
    drawn = ops.gradvac(m, targets, None, order, rng)
    given = ops.gradvac(m, targets, None, explicit)
    assert torch.equal(drawn[0], given[0])
    assert torch.equal(drawn[1], given[1])

    # The comparison sees a single exchange of neighbours.
    i = num_tasks - 1
    at = [p for p in range(num_tasks) if explicit[2, i, p] != i][:2]
    explicit[2, i, at] = explicit[2, i, at[::-1]]
    assert not torch.equal(drawn[1][2, i], ops.gradvac(m, targets, None, explicit)[1][2, i])
