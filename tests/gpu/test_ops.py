"""The operators on a GPU against float64 PyTorch, and against their CPU kernels."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.random import DISTRIBUTIONS

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TASKS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 24, 25, 32, 33, 40, 48, 49, 56, 57, 64, 65, 130, 512]
SIZES = [1, 4099, 20, 2048]

Params = list[list[Tensor | None]]


def random_params(num_tasks: int, sizes: list[int], dtype: torch.dtype, missing: bool, shift: int) -> Params:
    """Rows on the GPU, per parameter and task; each starts `shift` elements into its memory."""
    params: Params = []
    for p, size in enumerate(sizes):
        rows: list[Tensor | None] = []
        for t in range(num_tasks):
            row = torch.randn(size + shift, device="cuda").to(dtype)[shift:]
            rows.append(None if missing and (p + t) % 3 == 1 else row)
        params.append(rows)
    return params


def wide(rows: list[Tensor | None], size: int) -> Tensor:
    """``[T, size]`` in float64, zeros for what is missing."""
    return torch.stack([torch.zeros(size, device="cuda").double() if r is None else r.double() for r in rows])


def assert_gram(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    norms = exact.diagonal(dim1=-2, dim2=-1).sqrt()
    bound = (1e-13 if dtype == torch.float64 else 2e-6) * norms.unsqueeze(-1) * norms.unsqueeze(-2)
    assert ((found - exact).abs() <= bound).all(), ((found - exact).abs() - bound).max()
    assert torch.equal(found, found.mT)


def assert_combined(found: Tensor, flat: Tensor, weights: Tensor) -> None:
    assert found.is_cuda
    terms = weights.double().unsqueeze(1) * flat
    exact, size = terms.sum(0), terms.abs().sum(0)
    single = torch.finfo(torch.float64 if found.dtype == torch.float64 else torch.float32).eps
    bound = torch.finfo(found.dtype).eps * exact.abs() + single * len(flat) * size
    if found.dtype == torch.float16:
        bound = bound + 2.0**-24  # half of the spacing of its smallest numbers, and more
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", TASKS)
def test_gram_and_combine(num_tasks: int, dtype: torch.dtype) -> None:
    for missing, shift in ((False, 0), (True, 0), (True, 1)):
        if missing and num_tasks == 1:
            continue
        params = random_params(num_tasks, SIZES, dtype, missing, shift)
        groups = [0, 1, 1, 0]
        flat = [wide(rows, size) for rows, size in zip(params, SIZES, strict=True)]
        exact = torch.zeros(2, num_tasks, num_tasks, dtype=torch.float64, device="cuda")
        for g, k in zip(flat, groups, strict=True):
            exact[k] += g @ g.T
        assert_gram(ops.gram(params, groups), exact, dtype)

        weights = torch.randn(2, num_tasks, device="cuda")
        weights[:, ::4] = 0
        out = ops.combine(params, weights, groups)
        for found, g, k in zip(out, flat, groups, strict=True):
            if found is not None:
                assert_combined(found, g, weights[k])
        if dtype.itemsize == 2:  # not rounded to 16 bits, new and added
            wide_out = ops.combine(params, weights, groups, torch.float32)
            total = [torch.ones(size, device="cuda") for size in SIZES]
            ops.combine_(ops.as_rows(params, groups), weights, total)
            for found, added, g, k in zip(wide_out, total, flat, groups, strict=True):
                if found is not None:
                    assert found.dtype == torch.float32
                    assert_combined(found, g, weights[k])
                one = torch.ones(1, device="cuda")
                assert_combined(added, torch.cat([g, torch.ones_like(g[:1])]), torch.cat([weights[k], one]))


@pytest.mark.parametrize("num_tasks", [2, 8, 40])
def test_many_parameters(num_tasks: int) -> None:
    """More than one kernel's table holds; unaligned rows of stacked tensors; two types."""
    dtypes = [torch.float32, torch.bfloat16]
    grads = [torch.randn(num_tasks, 1 + p % 13, device="cuda").to(dtypes[p % 2]) for p in range(700)]
    flat = torch.cat([g.double() for g in grads], 1)
    assert_gram(ops.gram(grads), (flat @ flat.T).unsqueeze(0), torch.float32)
    weights = torch.randn(num_tasks, device="cuda")
    for found, g in zip(ops.combine(grads, weights), grads, strict=True):
        assert_combined(found, g.double(), weights)


def test_one_group_per_parameter() -> None:
    grads = [torch.randn(3, 5 + p % 4, device="cuda") for p in range(2500)]
    exact = torch.stack([g.double() @ g.double().T for g in grads])
    assert_gram(ops.gram(grads, list(range(2500))), exact, torch.float32)


@pytest.mark.parametrize("size", [2**23, 2**23 + 3])  # whole loads; single ones
@pytest.mark.parametrize("num_tasks", [2, 7, 24, 40, 64])
def test_large(num_tasks: int, size: int) -> None:
    """Many columns per block."""
    jacobian = torch.randn(num_tasks, size, device="cuda") + 0.1
    exact = sum(part.double() @ part.double().T for part in jacobian.split(2**20, 1))
    assert isinstance(exact, Tensor)
    assert_gram(ops.gram(jacobian), exact.unsqueeze(0), torch.float32)
    weights = torch.rand(num_tasks, device="cuda")
    torch.testing.assert_close(ops.combine(jacobian, weights), weights @ jacobian, rtol=1e-4, atol=1e-4)


def test_more_than_2_31_elements() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 12e9:
        pytest.skip(f"needs 12 GB of free GPU memory, found {free / 1e9:.1f}")
    row = torch.zeros(1, 2**31 + 5, dtype=torch.bfloat16, device="cuda")
    row[0, -3:] = 2
    assert ops.gram(row).item() == 12
    out = ops.combine(row, torch.tensor([3.0], device="cuda"))
    assert out[-4:].tolist() == [0, 6, 6, 6]
    for num_tasks in (9, 57):  # the same memory as every row
        assert (ops.gram([[row[0]] * num_tasks]) == 12).all()


def test_row_of_weight_zero_is_not_read_and_nan_weights_propagate() -> None:
    jacobian = torch.ones(3, 5000, device="cuda")
    jacobian[1] = torch.inf
    out = ops.combine(jacobian, torch.tensor([1.0, 0.0, 2.0], device="cuda"))
    assert torch.equal(out, torch.full_like(out, 3))
    assert ops.combine(jacobian, torch.tensor([1.0, 0.0, torch.nan], device="cuda")).isnan().all()


def test_mixed_devices_are_named() -> None:
    rows: Params = [[torch.ones(5, device="cuda"), torch.ones(5)]]
    for call in (lambda: ops.gram(rows), lambda: ops.combine(rows, torch.ones(2, device="cuda"))):
        with pytest.raises(ValueError, match=r"task 1: on cpu, the others on cuda:0.*one device"):
            call()
    with pytest.raises(ValueError, match="weights: on cpu"):
        ops.combine(torch.ones(2, 5, device="cuda"), torch.ones(2))


def test_equal_terms_keep_their_precision() -> None:
    """Where the tensor cores' rounding toward zero would add up."""
    for num_tasks, size in itertools.product((8, 9, 40, 64), (1_000_000, 1_000_003)):
        jacobian = torch.full((num_tasks, size), 0.3, device="cuda")
        exact = jacobian.double() @ jacobian.double().T
        assert_gram(ops.gram(jacobian), exact.unsqueeze(0), torch.float32)


@pytest.mark.parametrize("num_tasks", [8, 9, 40, 100])
def test_fast_is_less_precise_but_no_worse_than_tf32(num_tasks: int) -> None:
    jacobian = torch.randn(num_tasks, 100_003, device="cuda")
    exact = jacobian.double() @ jacobian.double().T
    norms = exact.diagonal().sqrt()
    errors = [
        ((ops.gram(jacobian, precision=precision)[0] - exact) / (norms[:, None] * norms)).abs().max().item()
        for precision in ("full", "fast")
    ]
    assert errors[0] < 1e-6
    assert errors[1] < 1e-3
    assert num_tasks <= 8 or errors[1] > errors[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_the_same_in_every_run(dtype: torch.dtype) -> None:
    for num_tasks, size in itertools.product((3, 8, 40, 64), (300_000, 300_007)):
        jacobian = torch.randn(num_tasks, size, device="cuda").to(dtype)
        weights = torch.randn(num_tasks, device="cuda")
        gramian, combined = ops.gram(jacobian), ops.combine(jacobian, weights)
        for _ in range(20):
            assert torch.equal(ops.gram(jacobian), gramian)
            assert torch.equal(ops.combine(jacobian, weights), combined)


@pytest.mark.parametrize("num_tasks", [1, 2, 5, 31, 32, 33, 64, 110])
def test_solvers_agree_with_their_cpu_kernels(num_tasks: int) -> None:
    jacobian = torch.randn(3, num_tasks, num_tasks + 20, dtype=torch.float64)
    gramian = jacobian @ jacobian.mT
    mask = torch.rand(3, num_tasks) < 0.8
    mask[:, 0] = True
    rng = torch.tensor([2**40 + 1, 7])
    targets = torch.rand(3, num_tasks, num_tasks, dtype=torch.float64) - 0.5
    on_gpu = gramian.cuda(), mask.cuda(), rng.cuda(), targets.cuda()

    def close(found: Tensor, expected: Tensor, atol: float) -> None:
        assert found.is_cuda
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-9, atol=atol)

    close(ops.min_norm(on_gpu[0], on_gpu[1])[0], ops.min_norm(gramian, mask)[0], 1e-7)
    bounds = torch.full((num_tasks,), 0.5 / num_tasks, dtype=torch.float64)
    expected = ops.min_norm(gramian, mask, bounds)[0]
    close(ops.min_norm(on_gpu[0], on_gpu[1], bounds.cuda())[0], expected, 1e-7)
    each = torch.eye(num_tasks, dtype=torch.float64).expand(3, -1, -1)
    for noise in (0.0, 5e-7):
        close(
            ops.dual_cone(on_gpu[0], each.cuda(), on_gpu[1], noise)[0],
            ops.dual_cone(gramian, each, mask, noise)[0],
            1e-7,
        )
    for start in ("uniform", "pair"):
        expected = ops.frank_wolfe(gramian, mask, 50, 0.0, start)[0]
        close(ops.frank_wolfe(on_gpu[0], on_gpu[1], 50, 0.0, start)[0], expected, 1e-9)
    for distance in ops.DISTANCES:
        expected = ops.krum(gramian, mask, num_tasks // 4, 2, distance)
        close(ops.krum(on_gpu[0], on_gpu[1], num_tasks // 4, 2, distance), expected, 0)
    start, pull = torch.rand(2, 3, num_tasks, dtype=torch.float64)
    options = {"lr": 0.1, "momentum": 0.5, "ridge": 0.1, "num_steps": 9, "scale_free": True}
    expected = ops.projected_gradient(gramian, start, mask, pull, **options)
    close(ops.projected_gradient(on_gpu[0], start.cuda(), on_gpu[1], pull.cuda(), **options), expected, 1e-9)
    two = torch.cat([jacobian, jacobian.flip(2)], 1)
    pair, both = two @ two.mT, mask.repeat(1, 2)
    expected = ops.projected_gradient(pair, start, both, **options)
    close(ops.projected_gradient(pair.cuda(), start.cuda(), both.cuda(), **options), expected, 1e-9)
    for distribution in DISTRIBUTIONS:
        expected = ops.random_weights(rng, mask, distribution)
        close(ops.random_weights(on_gpu[2], on_gpu[1], distribution), expected, 1e-12)
    program = gramian.sum(-1), torch.zeros_like(start), start, torch.full((3,), 0.1, dtype=torch.float64)
    weights, missed = ops.simplex_lp(gramian, *program, mask)
    found, found_missed = ops.simplex_lp(on_gpu[0], *(x.cuda() for x in program), on_gpu[1])
    close(found_missed, missed, 1e-9)
    close((found * program[0].cuda()).nansum(-1), (weights * program[0]).nansum(-1), 1e-7)
    for mode in ops.SCALE_MODES:
        close(ops.aligned_mtl(*on_gpu[:2], None, mode), ops.aligned_mtl(gramian, mask, None, mode), 1e-7)
    for length in ops.LENGTHS:
        close(ops.equal_cosines(*on_gpu[:2], None, length), ops.equal_cosines(gramian, mask, None, length), 1e-7)
    for order in ("random", "shared", "fixed"):
        close(ops.pcgrad(on_gpu[0], on_gpu[1], order, on_gpu[2]), ops.pcgrad(gramian, mask, order, rng), 1e-9)
        found = ops.gradvac(on_gpu[0], on_gpu[3], on_gpu[1], order, on_gpu[2])
        for x, y in zip(found, ops.gradvac(gramian, targets, mask, order, rng), strict=True):
            close(x, y, 1e-9)


def test_solvers_give_nan_where_the_gramian_is_not_finite() -> None:
    gramian = torch.eye(4, dtype=torch.float64, device="cuda").repeat(2, 1, 1)
    gramian[1, 2, 3] = gramian[1, 3, 2] = torch.inf
    targets = torch.full_like(gramian, 0.25)
    weights, moved = ops.gradvac(gramian, targets, order="fixed")
    for w in (
        weights,
        ops.min_norm(gramian)[0],
        ops.dual_cone(gramian, gramian[:1].expand(2, -1, -1))[0],
        ops.pcgrad(gramian, order="fixed"),
        ops.krum(gramian),
        ops.projected_gradient(gramian, torch.ones_like(gramian[0, :2])),
    ):
        assert w[0].isfinite().all()
        assert w[1].isnan().all()
    assert torch.equal(moved[1], targets[1])
