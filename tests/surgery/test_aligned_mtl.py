"""AlignedMTL by what its paper promises. (Its weights on all kinds of Gramians: tests/solvers/test_spectral.py.)"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastmtl
from fastmtl import AlignedMTL
from tests.asserts import (
    assert_invariant_under_permutation,
    assert_invariant_under_scaling,
    assert_non_conflicting,
)

MODES = ("min", "median", "rmse")


def jacobian(num_tasks: int = 5, dim: int = 20) -> Tensor:
    lengths = torch.logspace(-1, 1, num_tasks, dtype=torch.float64).unsqueeze(1)
    return lengths * torch.randn(num_tasks, dim, dtype=torch.float64)


def aligned(g: Tensor, mode: str) -> Tensor:
    """The rows made by unit preferences: what each task's gradient is replaced by."""
    n = len(g)
    return torch.stack([fastmtl.aggregate(g, AlignedMTL(mode, preference=row)).grads for row in torch.eye(n).tolist()])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_tasks", [1, 2, 8, 32])
def test_condition_number_becomes_one(num_tasks: int, mode: str) -> None:
    """Equation 8: the aligned gradients are orthogonal, of the length of one of the singular values, or their mean."""
    g = jacobian(num_tasks, 50)
    found = aligned(g, mode)
    sigma = torch.linalg.svdvals(g).flip(0)
    length = {"min": sigma[0], "median": sigma[(num_tasks - 1) // 2], "rmse": sigma.square().mean().sqrt()}[mode]
    torch.testing.assert_close(found @ found.T, length**2 * torch.eye(num_tasks, dtype=torch.float64))


def test_no_closer_orthogonal_gradients() -> None:
    """The aligned gradients are the nearest of their length (the Procrustes problem): rotated ones lie further off."""
    g = jacobian()
    found = aligned(g, "min")
    distance = (g - found).norm()
    length = found[0].norm()
    for size in (1e-3, 0.1, 1.0):
        for _ in range(50):
            skew = torch.randn(20, 20, dtype=torch.float64) * size
            other = found @ torch.matrix_exp(skew - skew.T)
            torch.testing.assert_close(other.norm(dim=1), length.expand(5))
            assert (g - other).norm() >= distance * (1 - 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_no_aligned_gradient_is_opposed(mode: str) -> None:
    g = jacobian()
    direction = fastmtl.aggregate(g, AlignedMTL(mode)).grads
    assert_non_conflicting(aligned(g, mode), direction)


def test_properties() -> None:
    g = jacobian()
    for method in (AlignedMTL(), AlignedMTL("median"), AlignedMTL("rmse")):
        assert_invariant_under_permutation(method, g @ g.T, torch.randperm(5))
        for factor in (1e-6, 1e6):
            assert_invariant_under_scaling(method, g @ g.T, factor)
        assert not method.state_dict()


def test_orthogonal_gradients_in_closed_form() -> None:
    m = torch.diag(torch.tensor([1.0, 4.0, 9.0, 16.0], dtype=torch.float64))
    for mode, scale in (("min", 1.0), ("median", 4.0), ("rmse", 7.5)):
        expected = 0.25 * (scale / m.diagonal()).sqrt()
        torch.testing.assert_close(AlignedMTL(mode)(m), expected)
        preference = torch.tensor([3.0, 0.0, 1.0, 2.0], dtype=torch.float64)
        torch.testing.assert_close(AlignedMTL(mode, preference)(m), 4 * preference * expected)


def test_identical_and_zero_gradients() -> None:
    one = torch.randn(7, dtype=torch.float64)
    out = fastmtl.aggregate(torch.stack([one] * 4), AlignedMTL())
    torch.testing.assert_close(out.weights, torch.full((4,), 0.25, dtype=torch.float64))
    torch.testing.assert_close(fastmtl.aggregate(one.unsqueeze(0), AlignedMTL()).weights, torch.ones(1).double())
    two = torch.stack([one, torch.zeros_like(one)])
    torch.testing.assert_close(fastmtl.aggregate(two, AlignedMTL()).weights, torch.tensor([0.5, 0]).double())
    assert fastmtl.aggregate(0 * two, AlignedMTL()).weights.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dependent_gradients_are_found_in_any_dtype(dtype: torch.dtype) -> None:
    """The third is a multiple of the first, to the last bit: rank 2, and the weights do not vanish."""
    for seed in range(20):
        torch.manual_seed(seed)
        g = torch.randn(2, 5000).to(dtype)
        g = torch.cat([g, -2 * g[:1]])
        exact = g.double()
        u, sigma, v = torch.linalg.svd(exact, full_matrices=False)
        expected = sigma[1] * (torch.full((3,), 1 / 3).double() @ u[:, :2]) @ v[:2]
        out = fastmtl.aggregate(g, AlignedMTL()).grads.double()
        tolerance = 0.02 if dtype == torch.bfloat16 else 1e-4
        assert (out - expected).norm() <= tolerance * expected.norm()


def test_groups_masks_and_what_is_not_finite() -> None:
    g = torch.randn(3, 4, 9, dtype=torch.float64)
    m = g @ g.mT
    method = AlignedMTL(preference=[1, 2, 3, 4])
    mask = torch.tensor([[True] * 4, [True, False, True, True], [False] * 4])
    found = method(m, mask=mask)
    torch.testing.assert_close(found[0], method(m[0]))
    few = AlignedMTL(preference=[1, 3, 4])(m[1][[0, 2, 3]][:, [0, 2, 3]])
    torch.testing.assert_close(found[1], torch.stack([few[0], few[0] * 0, few[1], few[2]]))
    assert found[2].tolist() == [0] * 4
    m[0, 1, 1] = float("nan")
    assert method(m, mask=mask)[0].isnan().all()
    assert method(m, mask=mask)[1].isfinite().all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale_mode": "max"}, ValueError, "scale_mode: expected 'min', 'median' or 'rmse', found 'max'"),
        ({"preference": 1.0}, TypeError, "preference: expected one number per task, found 1.0"),
        ({"preference": [1, -1]}, ValueError, "preference of task 1: .* found -1"),
    ],
)
def test_errors(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AlignedMTL(**options)
    with pytest.raises(ValueError, match="preference: one for each of 3 tasks, but this step has 2"):
        AlignedMTL(preference=[1, 1, 1])(torch.eye(2))
