"""The operators on tensors of every layout against float64 PyTorch. (Solvers by value: tests/solvers.)"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastmtl
from fastmtl import _C, ops
from fastmtl.rows import Rows
from tests.asserts import assert_untouched

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPS = {d: torch.finfo(d).eps for d in DTYPES}
TASKS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 17, 33, 40, 64, 101]

Params = list[list[Tensor | None]]  # [param][task]


def wide(params: Params) -> list[Tensor]:
    """Per parameter ``[T, size]`` in float64; a missing row is zeros."""
    out = []
    for rows in params:
        like = next(r for r in rows if r is not None)
        out.append(
            torch.stack([torch.zeros_like(like) if r is None else r for r in rows]).unsqueeze(1).flatten(1).double()
        )
    return out


def assert_gram(found: Tensor, params: Params, groups: list[int] | None = None) -> None:
    """Within rounding of the exact Gramian, entry by entry relative to the norms."""
    flat = wide(params)
    groups = [0] * len(flat) if groups is None else groups
    exact = torch.zeros_like(found)
    for g, k in zip(flat, groups, strict=True):
        exact[k] += g @ g.T
    all_double = all(r.dtype == torch.float64 for rows in params for r in rows if r is not None)
    norms = exact.diagonal(dim1=-2, dim2=-1).sqrt()
    bound = (1e-13 if all_double else 1e-6) * norms.unsqueeze(-1) * norms.unsqueeze(-2)
    assert found.dtype == torch.float64
    assert not found.requires_grad
    assert ((found - exact).abs() <= bound).all(), ((found - exact).abs() - bound).max()
    assert torch.equal(found, found.mT)


def assert_combined(found: Tensor, rows: list[Tensor | None], weights: Tensor, added_to: Tensor | None = None) -> None:
    """Within rounding of the exact weighted sum, element by element relative to the terms."""
    (flat,) = wide([rows])
    like = next(r for r in rows if r is not None)
    assert found.dtype == like.dtype
    assert found.shape == like.shape
    terms = weights.double().unsqueeze(1) * flat
    exact, size = terms.sum(0), terms.abs().sum(0)
    if added_to is not None:
        exact, size = exact + added_to.flatten().double(), size + added_to.flatten().double().abs()
    eps = max(EPS[like.dtype], EPS[torch.float64])
    sums = len(rows) * EPS[torch.float64 if like.dtype == torch.float64 else torch.float32]
    bound = (eps + sums) * size + torch.finfo(like.dtype).smallest_normal
    error = (found.flatten().double() - exact).abs()
    assert (error <= bound).all(), (error - bound).max()


def assert_not_rounded(
    found: Tensor, rows: list[Tensor | None], weights: Tensor, added_to: Tensor | None = None
) -> None:
    """The float32 sum of 16-bit rows, or what it was added to: no trace of 16 bits, which would be 5e-4 or 4e-3."""
    (flat,) = wide([rows])
    terms = weights.double().unsqueeze(1) * flat
    if added_to is not None:
        terms = torch.cat([terms, added_to.flatten().double().unsqueeze(0)])
    assert found.dtype == torch.float32
    error = (found.flatten().double() - terms.sum(0)).abs()
    assert (error <= 1e-6 * terms.abs().sum(0)).all(), error.max()


def random_params(num_tasks: int, sizes: list[int], dtype: torch.dtype) -> Params:
    return [[torch.randn(n).to(dtype) for _ in range(num_tasks)] for n in sizes]


@pytest.fixture(params=["avx512", "avx2", "portable"])
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this CPU has; the portable one is everywhere."""
    before = _C.build_info()["cpu_capability"]
    if not _C.set_cpu_capability(request.param):
        assert request.param != "portable"
        pytest.skip(f"this CPU lacks {request.param}")
    yield request.param
    assert _C.set_cpu_capability(before)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_tasks_and_size(capability: str, dtype: torch.dtype) -> None:
    for num_tasks in TASKS:
        sizes = [0, 1, 2, 7, 8, 15, 16, 17, 33, 255, 257, 515, 1031, 2]
        params = random_params(num_tasks, sizes, dtype)
        rows = ops.as_rows(params)
        assert_gram(ops.gram(rows), params)
        weights = torch.randn(num_tasks)
        weights[torch.rand(num_tasks) < 0.2] = 0
        for found, p in zip(ops.combine(rows, weights), params, strict=True):
            assert_combined(found, p, weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tasks", [2, 9, 101])
def test_long_rows(capability: str, dtype: torch.dtype, num_tasks: int) -> None:
    params = random_params(num_tasks, [20_011], dtype)
    assert_gram(ops.gram(params), params)
    weights = torch.randn(num_tasks, dtype=torch.float64)
    assert_combined(ops.combine(params, weights)[0], params[0], weights)


def test_a_long_sum_of_one_sign_does_not_drift() -> None:
    """float32 alone would stop growing at 2^24 terms of 1 and be off by 1e-5 long before."""
    x = torch.full((2, 3_000_000), 1.1)
    exact = 3e6 * x[0, 0].double() ** 2
    assert (ops.gram(x) / exact - 1).abs().max() < 2e-7


def test_tiny_and_huge_elements_within_the_stated_range() -> None:
    for scale in (1e-18, 1e17):
        x = torch.randn(3, 100, dtype=torch.float64) * scale
        params: Params = [[*x.float()]]
        assert_gram(ops.gram(x.float()), params)


def test_gramian_is_not_finite_where_a_row_is_not() -> None:
    x = torch.randn(3, 50)
    x[1, 7] = math.inf
    x[2, 9] = math.nan
    finite = ops.gram(x)[0].isfinite()
    assert finite.tolist() == [[True, False, False], [False] * 3, [False] * 3]


# ---- layouts ---------------------------------------------------------------------------------------------------------


def transposed(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def misaligned(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def with_gaps(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0]


def gaps_and_transposed(x: Tensor) -> Tensor:
    return with_gaps(x.transpose(-1, -2)).transpose(-1, -2)


def expanded(x: Tensor) -> Tensor:
    return x[:, :, :1, :1].expand(x.shape)


def flipped_strides(x: Tensor) -> Tensor:
    return x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)


LAYOUTS = [transposed, channels_last, misaligned, with_gaps, gaps_and_transposed, expanded, flipped_strides]
SHAPE = (3, 2, 5, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_layout_for_all_tasks(layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    params: Params = [[layout(torch.randn(SHAPE).to(dtype)) for _ in range(4)] for _ in range(2)]
    weights = torch.randn(4)
    assert_gram(ops.gram(params), params)
    for found, p in zip(ops.combine(params, weights), params, strict=True):
        assert_combined(found, p, weights)


def test_strides_that_differ_between_tasks() -> None:
    """A flat read of each row would pair the wrong elements."""
    for a, b in itertools.permutations([torch.clone, *LAYOUTS], 2):
        params: Params = [[a(torch.randn(SHAPE)), b(torch.randn(SHAPE)), a(torch.randn(SHAPE))]]
        weights = torch.randn(3)
        assert_gram(ops.gram(params), params)
        assert_combined(ops.combine(params, weights)[0], params[0], weights)


def test_result_has_the_rows_strides() -> None:
    for layout in (torch.clone, transposed, channels_last, flipped_strides):
        rows = [layout(torch.randn(SHAPE)) for _ in range(2)]
        assert ops.combine([rows], torch.ones(2))[0].stride() == rows[0].stride()


@pytest.mark.parametrize("dtype", DTYPES)
def test_stacked_rows(dtype: torch.dtype) -> None:
    """Of any layout, also where the tasks are not the outermost dimension in memory."""
    for layout in (torch.clone, transposed, channels_last, with_gaps, gaps_and_transposed, expanded, flipped_strides):
        stacked = [layout(torch.randn(SHAPE).to(dtype)), torch.randn(3).to(dtype), torch.randn(3, 7).to(dtype)]
        params: Params = [[*x] for x in stacked]
        weights = torch.randn(3)
        assert_gram(ops.gram(stacked), params)
        for found, p in zip(ops.combine(stacked, weights), params, strict=True):
            assert_combined(found, p, weights)


def test_jacobian_stacked_and_separate_agree() -> None:
    jacobian = torch.randn(5, 37)
    a, b = jacobian[:, :12], jacobian[:, 12:]
    mixed = [a, [*b]]
    separate = [[*a], [*b]]
    exact = jacobian.double() @ jacobian.double().T
    for grads in (jacobian, jacobian.T.contiguous().T, [a, b], mixed, separate):
        torch.testing.assert_close(ops.gram(grads)[0], exact, rtol=1e-6, atol=1e-6)
    weights = torch.randn(5)
    total = ops.combine(jacobian, weights)
    assert total.shape == (37,)
    for grads in ([a, b], mixed, separate):
        torch.testing.assert_close(torch.cat(ops.combine(grads, weights)), total)


def test_rows_may_be_the_same_tensor() -> None:
    x = torch.randn(11)
    params: Params = [[x, x, x[:1].expand(11)]]
    assert_gram(ops.gram(params), params)
    assert_combined(ops.combine(params, torch.ones(3))[0], params[0], torch.ones(3))


def test_dtypes_may_differ_between_parameters() -> None:
    params: Params = [[torch.randn(9).to(d) for _ in range(3)] for d in DTYPES]
    assert_gram(ops.gram(params), params)
    for found, p in zip(ops.combine(params, torch.ones(3)), params, strict=True):
        assert_combined(found, p, torch.ones(3))


def test_scalar_and_empty_parameters() -> None:
    params: Params = [[torch.randn(()), torch.randn(())], [torch.randn(0, 3), torch.randn(0, 3)]]
    assert_gram(ops.gram(params), params)
    total = ops.combine(params, torch.tensor([2.0, -1.0]))
    torch.testing.assert_close(total[0], 2 * params[0][0] - params[0][1])
    assert total[1].shape == (0, 3)
    assert torch.equal(ops.gram(torch.randn(3, 0)), torch.zeros(1, 3, 3, dtype=torch.float64))
    assert ops.combine(torch.randn(3, 0), torch.ones(3)).shape == (0,)


# ---- groups, missing rows, weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [[0, 0, 0, 0], [0, 1, 2, 3], [1, 0, 1, 0], [3, 3, 0, 0]])
def test_groups(groups: list[int]) -> None:
    """In any order, also with none in between."""
    params = random_params(3, [5, 700, 1, 64], torch.float32)
    num_groups = max(groups) + 1
    gramian = ops.gram(params, groups)
    assert gramian.shape == (num_groups, 3, 3)
    assert_gram(gramian, params, groups)
    weights = torch.randn(num_groups, 3)
    for found, p, k in zip(ops.combine(params, weights, groups), params, groups, strict=True):
        assert_combined(found, p, weights[k])


def test_missing_rows() -> None:
    params = random_params(4, [5, 70, 3], torch.float32)
    params[0][1] = params[1][0] = params[1][3] = None
    missing: Params = [*params, [None] * 4]
    assert_gram(ops.gram(missing), params)
    *found, last = ops.combine(missing, torch.ones(4))
    assert last is None
    for f, p in zip(found, params, strict=True):
        assert_combined(f, p, torch.ones(4))


def test_no_row_at_all() -> None:
    nothing: Params = [[None, None], [None, None]]
    assert torch.equal(ops.gram(nothing), torch.zeros(1, 2, 2, dtype=torch.float64))
    assert ops.combine(nothing, torch.ones(2)) == [None, None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 16, 1000])
def test_a_row_of_weight_0_is_not_read(capability: str, dtype: torch.dtype, size: int) -> None:
    for num_tasks in (1, 2, 5, 11):
        rows = [torch.randn(size).to(dtype) for _ in range(num_tasks)]
        poisoned = [*rows, torch.full((size,), math.nan).to(dtype), torch.full((size,), -math.inf).to(dtype)]
        for zero in (0.0, -0.0):
            weights = torch.cat([torch.randn(num_tasks), torch.full((2,), zero)])
            assert_combined(ops.combine([poisoned], weights)[0], rows, weights[:num_tasks])


def test_all_weights_0_give_zeros() -> None:
    total = ops.combine(torch.full((2, 5), math.nan), torch.zeros(2))
    assert torch.equal(total, torch.zeros(5))


def test_a_nan_weight_gives_nan_also_for_zero_rows() -> None:
    for rows in (torch.zeros(2, 40), torch.randn(2, 40)):
        assert ops.combine(rows, torch.tensor([math.nan, 1.0])).isnan().all()


def test_no_input_is_written() -> None:
    for layout in (torch.clone, *LAYOUTS):
        params: Params = [[layout(torch.randn(SHAPE)) for _ in range(3)], [torch.randn(5), None, torch.randn(5)]]
        weights = torch.randn(1, 3, dtype=torch.float64)
        before = [[None if r is None else r.clone() for r in p] for p in params]
        weights_before = weights.clone()
        ops.gram(params)
        ops.combine(params, weights)
        ops.combine_(ops.as_rows(params), weights, [torch.zeros(SHAPE), torch.zeros(5)])
        assert torch.equal(weights, weights_before)
        for p, q in zip(params, before, strict=True):
            assert all(r is s is None or torch.equal(r, s) for r, s in zip(p, q, strict=True))


def test_results_are_new_memory() -> None:
    row = torch.randn(6)
    (total,) = ops.combine([[row]], torch.ones(1))
    assert total.data_ptr() != row.data_ptr()


# ---- combine_ --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", [torch.clone, transposed, channels_last, misaligned, with_gaps, flipped_strides])
def test_accumulates_in_place(target: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """Whatever the layouts of the rows and of the target; memory between the target's elements stays."""
    for layout in (torch.clone, transposed, with_gaps, expanded):
        rows: list[Tensor | None] = [layout(torch.randn(SHAPE).to(dtype)) for _ in range(3)]
        rows[1] = None
        out = target(torch.randn(SHAPE).to(dtype))
        before, pointer, whole = out.clone(), out.data_ptr(), out.untyped_storage().nbytes()
        weights = torch.randn(3)
        ops.combine_(ops.as_rows([rows]), weights, [out])
        assert out.data_ptr() == pointer
        assert out.untyped_storage().nbytes() == whole
        assert_combined(out, rows, weights, before)
    if target is with_gaps:
        assert out.as_strided(SHAPE, out.stride(), 1).isnan().all()


def test_accumulates_stacked_rows_and_groups() -> None:
    stacked = [torch.randn(3, 4, 5), torch.randn(3, 7)]
    out = [torch.randn(4, 5), torch.randn(7)]
    before = [x.clone() for x in out]
    weights = torch.randn(2, 3)
    ops.combine_(ops.as_rows(stacked, [1, 0]), weights, out)
    for found, rows, w, b in zip(out, stacked, (weights[1], weights[0]), before, strict=True):
        assert_combined(found, [*rows], w, b)


def test_accumulates_into_a_leaf_that_requires_grad() -> None:
    leaf = torch.zeros(4, requires_grad=True)
    ops.combine_(ops.as_rows([[torch.ones(4)]]), torch.ones(1), [leaf])
    assert torch.equal(leaf, torch.ones(4))


@pytest.mark.parametrize(
    ("out", "error"),
    [
        ([torch.zeros(4), torch.zeros(4)], "parameter 1, task 0.*shape \\[5\\], expected \\[4\\]"),
        ([torch.zeros(4)], "one output per parameter"),
        ([torch.zeros(4), torch.zeros(5, dtype=torch.float64)], "parameter 1, task 0.*dtype"),
    ],
)
def test_a_target_that_does_not_fit_raises_before_anything_is_written(out: list[Tensor], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        ops.combine_(ops.as_rows([[torch.ones(4)], [torch.ones(5)]]), torch.ones(1), out)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in out)


# ---- float32 results of 16-bit rows ----------------------------------------------------------------------------------

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF)
def test_wide_for_every_number_of_tasks_and_size(capability: str, dtype: torch.dtype) -> None:
    for num_tasks in TASKS:
        sizes = [0, 1, 2, 7, 8, 15, 16, 17, 33, 255, 257, 515, 1031, 2]
        params = [[misaligned(x) for x in rows] for rows in random_params(num_tasks, sizes, dtype)]
        params[3][0] = params[5][-1] = None
        rows, weights = ops.as_rows(params), torch.randn(num_tasks)
        weights[torch.rand(num_tasks) < 0.2] = 0
        out = [torch.randn(n) for n in sizes]
        before = [x.clone() for x in out]
        ops.combine_(rows, weights, out)
        new = ops.combine(rows, weights, dtype=torch.float32)
        for found, added, p, b in zip(new, out, params, before, strict=True):
            if num_tasks == 1 and p[0] is None:
                assert found is None
                assert torch.equal(added, b)
                continue
            assert_not_rounded(found, p, weights)
            assert_not_rounded(added, p, weights, b)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("target", [torch.clone, transposed, channels_last, misaligned, with_gaps, flipped_strides])
def test_wide_in_every_layout(target: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    weights = torch.randn(3)
    for layout in (torch.clone, *LAYOUTS):
        rows: list[Tensor | None] = [layout(torch.randn(SHAPE).to(dtype)) for _ in range(3)]
        rows[1] = None
        out = target(torch.randn(SHAPE))
        before = out.clone()
        ops.combine_(ops.as_rows([rows]), weights, [out])
        assert_not_rounded(out, rows, weights, before)
        (new,) = ops.combine([rows], weights, dtype=torch.float32)
        assert_not_rounded(new, rows, weights)
        assert new.stride() == ops.combine([rows], weights)[0].stride()


@pytest.mark.parametrize("dtype", HALF)
def test_wide_stacked_rows_and_groups(dtype: torch.dtype) -> None:
    for layout in (torch.clone, transposed, channels_last, with_gaps, expanded, flipped_strides):
        stacked = [layout(torch.randn(SHAPE).to(dtype)), torch.randn(3, 7).to(dtype)]
        out = [torch.randn(SHAPE[1:]), torch.randn(7)]
        before, weights = [x.clone() for x in out], torch.randn(2, 3)
        ops.combine_(ops.as_rows(stacked, [1, 0]), weights, out)
        new = ops.combine(stacked, weights, [1, 0], torch.float32)
        for p, w in ((0, weights[1]), (1, weights[0])):
            assert_not_rounded(out[p], [*stacked[p]], w, before[p])
            assert_not_rounded(new[p], [*stacked[p]], w)
    jacobian, weights = torch.randn(4, 9).to(dtype), torch.randn(4)
    assert_not_rounded(ops.combine(jacobian, weights, dtype=torch.float32), [*jacobian], weights)


@pytest.mark.parametrize("dtype", HALF)
def test_wide_results_written_past_the_caches(capability: str, dtype: torch.dtype) -> None:
    jacobian, weights = torch.randn(2, 2_100_000 + 13).to(dtype)[:, 13:], torch.randn(2)
    assert_not_rounded(ops.combine([[*jacobian]], weights, dtype=torch.float32)[0], [*jacobian], weights)


@pytest.mark.parametrize("dtype", HALF)
def test_wide_does_not_read_a_row_of_weight_0(capability: str, dtype: torch.dtype) -> None:
    for size in (1, 16, 1000):
        rows = [torch.randn(size).to(dtype) for _ in range(5)]
        poisoned = [*rows, torch.full((size,), math.nan).to(dtype), torch.full((size,), -math.inf).to(dtype)]
        weights = torch.cat([torch.randn(5), torch.zeros(2)])
        total = torch.ones(size)
        ops.combine_(ops.as_rows([poisoned]), weights, [total])
        assert_not_rounded(total, rows, weights[:5], torch.ones(size))
        assert_not_rounded(ops.combine([poisoned], weights, dtype=torch.float32)[0], rows, weights[:5])


def test_wide_where_dtypes_differ_between_parameters() -> None:
    """Of mixed precision: those of 32 bits stay; and some outputs of one dtype may be wide."""
    dtypes = [*HALF, torch.float32]
    params: Params = [[torch.randn(9).to(d) for _ in range(3)] for d in dtypes]
    weights = torch.randn(3)
    for found, p in zip(ops.combine(params, weights, dtype=torch.float32), params, strict=True):
        assert_not_rounded(found, p, weights)
    params = random_params(3, [40, 40], torch.bfloat16)
    out = [torch.zeros(40), torch.zeros(40, dtype=torch.bfloat16)]
    ops.combine_(ops.as_rows(params), weights, out)
    assert_not_rounded(out[0], params[0], weights)
    assert_combined(out[1], params[1], weights)


@pytest.mark.parametrize("dtype", DTYPES)
def test_their_own_dtype_may_be_named(dtype: torch.dtype) -> None:
    jacobian, weights = torch.randn(3, 50).to(dtype), torch.randn(3)
    assert torch.equal(ops.combine(jacobian, weights, dtype=dtype), ops.combine(jacobian, weights))


def test_dtypes_that_gradients_do_not_combine_into() -> None:
    both = [torch.ones(1, 3).half(), torch.ones(1, 3).double()]
    for grads, dtype, error in (
        (torch.ones(1, 3), torch.bfloat16, "parameter 0: expected torch.float32 .*found torch.bfloat16"),
        (torch.ones(1, 3), torch.float64, "parameter 0: expected torch.float32 .*found torch.float64"),
        (torch.ones(1, 3).half(), torch.float64, "parameter 0: .*float16 or torch.float32 .*found torch.float64"),
        (torch.ones(1, 3).half(), torch.bfloat16, "parameter 0: .*float16 or torch.float32 .*found torch.bfloat16"),
        (both, torch.float32, "parameter 1: expected torch.float64 .*found torch.float32"),
    ):
        with pytest.raises(ValueError, match=f"dtype: {error}"):
            ops.combine(grads, torch.ones(1), dtype=dtype)
    with pytest.raises(TypeError, match=r"dtype: expected a torch\.dtype, found str"):
        ops.combine(torch.ones(1, 3), torch.ones(1), dtype="float32")  # type: ignore[arg-type]


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    ("rows", "out"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float64),
        (torch.bfloat16, torch.float16),
        (torch.int16, torch.float32),
    ],
)
def test_targets_that_rows_are_not_added_to(rows: torch.dtype, out: torch.dtype, stacked: bool) -> None:
    targets = [torch.zeros(2, dtype=rows if rows.is_floating_point else out), torch.zeros(4, dtype=out)]
    grads = [torch.ones(1, 2).to(targets[0].dtype), torch.ones(1, 4, dtype=rows)]
    with pytest.raises(ValueError, match=r"parameter 1.*(another dtype than the output|expected float32)"):
        ops.combine_(ops.as_rows(grads if stacked else [[*g] for g in grads]), torch.ones(1), targets)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in targets)


def test_rows_of_two_dtypes_are_not_added_to_a_wide_target() -> None:
    for first, second in itertools.permutations([torch.bfloat16, torch.float32, torch.float16], 2):
        rows: Params = [[torch.ones(4, dtype=first), torch.ones(4, dtype=second)]]
        with pytest.raises(ValueError, match="parameter 0, task 1: gradient of another dtype"):
            ops.combine_(ops.as_rows(rows), torch.ones(2), [torch.zeros(4)])


@pytest.mark.parametrize("dtype", HALF)
def test_wide_without_kernels(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(ops._extension, "kernels_on", lambda device: False)
    rows, weights, total = torch.randn(3, 50).to(dtype), torch.randn(3), torch.ones(50)
    ops.combine_(ops.as_rows(rows), weights, [total])
    assert_not_rounded(total, [*rows], weights, torch.ones(50))
    assert_not_rounded(ops.combine(rows, weights, dtype=torch.float32), [*rows], weights)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grads", "error"),
    [
        ([[torch.ones(3), torch.ones(3)], [torch.ones(2), torch.ones(4)]], r"parameter 1, task 1.*\[4\].*\[2\]"),
        ([[torch.ones(3), torch.ones(3).double()]], "parameter 0, task 1.*dtype"),
        ([[torch.ones(3, dtype=torch.int32)]], "parameter 0: expected float32, float64, bfloat16 or float16"),
        ([torch.ones(2, 3), torch.ones(3, 3)], r"different numbers of tasks: \[2, 3\]"),
        ([], "at least one parameter"),
        ([torch.ones(())], r"grads\[0\].*scalar"),
        (torch.ones(0, 3), "at least one task"),
    ],
)
def test_gradients_that_do_not_fit(grads: list, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        ops.gram(grads)


@pytest.mark.parametrize("grads", [["ab"], [[1.0, 2.0]], [3]])
def test_gradients_that_are_no_tensors(grads: list) -> None:
    with pytest.raises(TypeError, match=r"grads\[0\]"):
        ops.gram(grads)


def test_groups_that_do_not_fit() -> None:
    for groups, error in (([0], "one index per parameter"), ([0, -1], ">= 0, found -1")):
        with pytest.raises(ValueError, match=error):
            ops.gram([torch.ones(2, 3), torch.ones(2, 3)], groups)


def test_weights_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"expected shape \[1, 2\], found \[3\]"):
        ops.combine(torch.ones(2, 5), torch.ones(3))
    with pytest.raises(ValueError, match=r"expected shape \[2, 2\], found \[2\]"):
        ops.combine([torch.ones(2, 5), torch.ones(2, 5)], torch.ones(2), groups=[0, 1])
    with pytest.raises(TypeError, match="weights: expected a tensor, found list"):
        ops.combine(torch.ones(2, 5), [1.0, 1.0])  # type: ignore[arg-type]


def test_the_raw_operators_check_what_they_read() -> None:
    """Also a wrong call past the wrappers must not read outside of a tensor."""
    raw, x = torch.ops.fastmtl, torch.ones(2, 3)
    weights, gramian = torch.ones(1, 2, dtype=torch.float64), torch.eye(3, dtype=torch.float64).unsqueeze(0)
    wrong = [
        (lambda: raw.gram([x], 3, True, None, 1), r"shape \[3, ...\], found \[2, 3\]"),
        (lambda: raw.gram([*x], 0, False, None, 1), "at least one task"),
        (lambda: raw.gram([*x], 2, False, [1], 1), "group 1 is not in 0..0"),
        (lambda: raw.gram([*x], 2, False, [0, 0], 1), "one group per parameter"),
        (lambda: raw.combine([x], 2, True, None, weights.float()), "weights: expected float64"),
        (lambda: raw.combine([x], 2, True, None, weights.expand(3, 2)[:, :1]), "weights"),
        (lambda: raw.combine([None, None, *x], 2, False, None, weights), "parameter 0: no task has a gradient"),
        (lambda: raw.min_norm(gramian.float(), None), "gramian: expected float64"),
        (lambda: raw.min_norm(gramian[:, :2], None), "gramian"),
        (lambda: raw.min_norm(gramian.expand(2, 3, 3), None), "contiguous"),
        (lambda: raw.min_norm(gramian, torch.ones(1, 2, dtype=torch.bool)), "mask"),
        (lambda: raw.pcgrad(gramian, None, None, None, 0, False, False), "rng"),
        (lambda: raw.pcgrad(gramian, None, torch.zeros(2, 2, dtype=torch.int64), None, 1, False, False), "order"),
        (lambda: raw.gradvac(gramian, None, None, None, 1, gramian[:, :2], 0.1, False, True), "targets"),
    ]
    for call, error in wrong:
        with pytest.raises(ValueError, match=error):
            call()


def test_unknown_order() -> None:
    with pytest.raises(ValueError, match=r"order.*'sideways'"):
        ops.pcgrad(torch.eye(2, dtype=torch.float64).unsqueeze(0), order="sideways")


# ---- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_tasks", "sizes"), [(2, [1_500_000]), (5, [700_000, 3, 200_001]), (20, [997] * 300), (110, [30_000, 5])]
)
def test_any_number_of_threads_gives_the_same_bits(
    set_threads: Callable[[int], None], num_tasks: int, sizes: list[int]
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        params = random_params(num_tasks, sizes, dtype)
        rows = ops.as_rows(params)
        weights = torch.randn(1, num_tasks, dtype=torch.float64)
        results = []
        for threads in (1, 2, 3, 1):
            set_threads(threads)
            totals = [*ops.combine(rows, weights), *ops.combine(rows, weights, dtype=torch.float32)]
            results.append((ops.gram(rows), totals))
        assert_gram(results[0][0], params)
        for gramian, totals in results[1:]:
            assert torch.equal(gramian, results[0][0])
            assert all(map(torch.equal, totals, results[0][1]))


def test_solvers_give_the_same_bits_for_any_number_of_threads(set_threads: Callable[[int], None]) -> None:
    g = torch.randn(40, 30, 25, dtype=torch.float64)
    gramian, rng = g @ g.mT, torch.tensor([7, 1])
    targets = torch.zeros_like(gramian)
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        pcgrad, gradvac = ops.pcgrad(gramian, None, "random", rng), ops.gradvac(gramian, targets, None, "random", rng)
        results.append([*ops.min_norm(gramian), pcgrad, *gradvac])
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_instruction_sets_agree() -> None:
    before = _C.build_info()["cpu_capability"]
    params = random_params(11, [4099, 77], torch.float32)
    weights, found = torch.randn(11), []
    for name in ("avx512", "avx2", "portable"):
        if _C.set_cpu_capability(name):
            assert _C.build_info()["cpu_capability"] == name
            found.append((ops.gram(params), ops.combine(params, weights)))
    assert _C.set_cpu_capability(before)
    assert not _C.set_cpu_capability("abacus")
    for gramian, totals in found:
        torch.testing.assert_close(gramian, found[0][0], rtol=1e-6, atol=1e-3)
        for a, b in zip(totals, found[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ---- torch.library, torch.compile ------------------------------------------------------------------------------------


def example_calls() -> dict[str, list[tuple]]:
    stacked: list[Tensor | None] = [torch.randn(3, 4, 5), torch.randn(3, 2)]
    separate = [torch.randn(4).to(torch.bfloat16), None, torch.randn(4).to(torch.bfloat16), *torch.randn(3, 2, 2)]
    gapped: list[Tensor | None] = [gaps_and_transposed(torch.randn(3, 4, 5)), expanded(torch.randn(3, 2, 4, 5))]
    apart = [gaps_and_transposed(torch.randn(4, 5)) for _ in range(3)]
    half: list[Tensor | None] = [x.to(torch.bfloat16) for x in gapped]
    weights, two = torch.randn(1, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    g = torch.randn(2, 3, 4, dtype=torch.float64)
    gramian, mask, rng = g @ g.mT, torch.tensor([[True, True, True], [True, False, True]]), torch.tensor([3, 4])
    order = torch.arange(3).expand(3, 3).contiguous()
    targets = torch.zeros_like(gramian)
    return {
        "gram": [
            (stacked, 3, True, None, 1),
            (separate, 3, False, [1, 0], 2),
            (gapped, 3, True, None, 1),
            (apart, 3, False, None, 1),
        ],
        "combine": [
            (stacked, 3, True, None, weights),
            (separate, 3, False, [1, 0], two),
            (gapped, 3, True, None, weights),
            (apart, 3, False, None, weights),
            (separate, 3, False, [1, 0], two, True),
            (half, 3, True, None, weights, True),
            ([x.half() for x in apart], 3, False, None, weights, True),
        ],
        "combine_": [
            (stacked, 3, True, None, weights, [torch.randn(4, 5), torch.randn(2)]),
            (apart, 3, False, None, weights, [with_gaps(torch.randn(4, 5))]),
            (separate, 3, False, [1, 0], two, [torch.randn(4), torch.randn(2, 2)]),
        ],
        "min_norm": [(gramian, None), (gramian, mask)],
        "dual_cone": [(gramian, None, targets, 0.0), (gramian, mask, targets[:, :1].contiguous(), 1e-6)],
        "pcgrad": [(gramian, mask, None, rng, 0, False, True), (gramian, None, order, None, 1, True, False)],
        "gradvac": [(gramian, mask, None, rng, 0, targets, 0.1, False, True)],
        "simplex_lp": [(gramian, mask, two, two, two, two[:, 0].contiguous())],
        "krum": [(gramian, None, 0, 2, False), (gramian, mask, 1, 1, True)],
        "projected_gradient": [
            (gramian, mask, two.abs(), None, None, 0.1, 0.0, 0.0, 1, False),
            (gramian, None, two.abs(), two, two[0, :1].contiguous(), 0.1, 0.5, 0.1, 3, True),
            (torch.zeros(2, 6, 6, dtype=torch.float64), None, two.abs(), None, None, 0.1, 0.5, 0.1, 3, True),
        ],
        "random_weights": [(mask, rng, n) for n in range(5)],
    }


@pytest.mark.parametrize("name", list(example_calls()))
def test_opcheck(name: str) -> None:
    """PyTorch's own checks: schema, fake kernel, autograd registration, tracing."""
    for args in example_calls()[name]:
        results = torch.library.opcheck(getattr(torch.ops.fastmtl, name).default, args)
        assert set(results.values()) == {"SUCCESS"}


def everything(jacobian: Tensor, params: list[Tensor], apart: list[Tensor], rng: Tensor) -> list[Tensor]:
    """Every public operator, with Python-side checks included."""
    gramian = ops.gram(jacobian)
    per_layer = ops.gram(params, [0, 1])
    separate = ops.gram([apart])
    targets = torch.zeros_like(gramian)
    weights, gap = ops.min_norm(gramian)
    pcgrad = ops.pcgrad(per_layer, None, "random", rng)
    gradvac, moved = ops.gradvac(gramian, targets, None, "shared", rng)
    steps = ops.projected_gradient(gramian, weights, None, weights, num_steps=3, scale_free=True)
    others = [ops.krum(per_layer), steps, ops.random_weights(rng, per_layer[:, 0] > -9, "normal")]
    total = torch.zeros(3, 4)
    ops.combine_(ops.as_rows([apart]), weights, [total])
    half = [x.half() for x in apart]
    ops.combine_(ops.as_rows([half]), weights, [total])
    return [
        *(gramian, per_layer, separate, weights, gap, pcgrad, gradvac, moved, total),
        ops.combine(jacobian, gradvac + weights),
        *ops.combine([half], weights, dtype=torch.float32),
        *ops.combine(params, pcgrad, [0, 1]),
        *others,
    ]


def test_compile_without_a_graph_break() -> None:
    args = (
        torch.randn(3, 12),
        [torch.randn(3, 4), torch.randn(3, 2, 2)],
        [*torch.randn(3, 3, 4)],
        torch.tensor([5, 0]),
    )
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for found, expected in zip(compiled(*args), everything(*args), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_compile_with_inductor_on_rows_with_gaps() -> None:
    def both(a: Tensor, b: Tensor, weights: Tensor) -> list[Tensor]:
        return [ops.gram([[a, b]]), *ops.combine([[a, b]], weights)]

    rows = [gaps_and_transposed(torch.randn(6, 5)) for _ in range(2)]
    weights = torch.randn(1, 2, dtype=torch.float64)
    for found, expected in zip(torch.compile(both, fullgraph=True)(*rows, weights), both(*rows, weights), strict=True):
        assert torch.equal(found, expected)


def test_fake_tensors_have_the_real_ones_shapes_dtypes_and_strides() -> None:
    for name, calls in example_calls().items():
        op = getattr(torch.ops.fastmtl, name).default
        for args in calls:
            real = op(*args)
            with FakeTensorMode() as mode:

                def fake(x: object, mode: FakeTensorMode = mode) -> object:
                    if isinstance(x, list):
                        return [fake(y) for y in x]
                    return mode.from_tensor(x) if isinstance(x, Tensor) else x

                traced = op(*map(fake, args))
            if real is None:
                assert traced is None
                continue
            flat = lambda r: [r] if isinstance(r, Tensor) else list(r)  # noqa: E731
            for a, b in zip(flat(traced), flat(real), strict=True):
                assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device), name


# ---- derivatives -----------------------------------------------------------------------------------------------------


def test_backward_through_an_operator_says_that_there_is_none() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"fastmtl.ops.gram is not differentiable"):
        ops.gram(x).sum().backward()
    with pytest.raises(RuntimeError, match=r"fastmtl.ops.combine is not differentiable"):
        ops.combine(x, torch.ones(3)).sum().backward()
    gramian = torch.eye(3, dtype=torch.float64).unsqueeze(0).requires_grad_()
    results = {
        "min_norm": ops.min_norm(gramian)[0],
        "dual_cone": ops.dual_cone(gramian, torch.eye(3)[None])[0],
        "pcgrad": ops.pcgrad(gramian, order="fixed"),
        "gradvac": ops.gradvac(gramian, torch.zeros(1, 3, 3, dtype=torch.float64), order="fixed")[0],
        "krum": ops.krum(gramian),
        "projected_gradient": ops.projected_gradient(gramian, torch.ones(1, 3, dtype=torch.float64)),
    }
    for name, result in results.items():
        with pytest.raises(RuntimeError, match=f"fastmtl.ops.{name} is not differentiable"):
            result.sum().backward()


def test_weights_of_a_loss_weighting_may_require_grad() -> None:
    weights = torch.ones(2, requires_grad=True)
    assert not ops.combine(torch.ones(2, 3), weights).requires_grad


def test_rows_select() -> None:
    rows = Rows([*torch.randn(6, 2)], 2, groups=[0, 1, 0], num_groups=2)
    some = rows.select([2, 0])
    assert some.groups == [0, 0]
    assert some.num_groups == 2
    assert all(map(torch.equal, some.grads, [rows.grads[4], rows.grads[5], rows.grads[0], rows.grads[1]]))


def test_precision() -> None:
    """The CPU knows one only; a wrong name is refused by each way in, before anything moves."""
    grads = torch.randn(12, 1000)
    assert torch.equal(ops.gram(grads, precision="fast"), ops.gram(grads))
    x = torch.nn.Parameter(torch.ones(3))
    method = fastmtl.GradVac()
    rows = fastmtl.TaskGradients([x], num_tasks=1)
    rows.backward(0, x.sum())
    calls = [
        lambda: ops.gram(grads, precision="tf32"),
        lambda: fastmtl.aggregate(grads, method, precision="tf32"),
        lambda: fastmtl.backward([x.sum()], method, [x], precision="tf32"),
        lambda: fastmtl.FeatureSurgery(method, 2, precision="tf32"),
        lambda: rows.combine(method, precision="tf32"),
    ]
    for call in calls:
        with assert_untouched(method, params=[x]), pytest.raises(ValueError, match=r"precision.*'tf32'"):
            call()
    assert rows.combine(method, precision="fast").weights.tolist() == [1.0]


def test_weights_on_another_device() -> None:
    with pytest.raises(ValueError, match="weights: on meta, the gradients on cpu"):
        ops.combine(torch.ones(2, 3), torch.ones(2, device="meta"))


@pytest.mark.parametrize("implementation", [fastmtl.ops, fastmtl.reference], ids=["ops", "reference"])
def test_is_symmetric(implementation: Any) -> None:
    """To the rounding of float32 relative to the norms; what is not finite does not count."""
    torch.manual_seed(0)
    rows = torch.randn(2, 9, 30, dtype=torch.float64) * torch.logspace(-6, 6, 9)[:, None]
    m = rows @ rows.mT
    assert implementation.is_symmetric(m)
    norms = m.diagonal(dim1=-2, dim2=-1).sqrt()
    for entry in ((0, 1, 0), (1, 8, 7), (1, 0, 8)):
        k, i, j = entry
        for factor, expected in ((5e-6, True), (2e-5, False), (float("nan"), True), (float("inf"), True)):
            other = m.clone()
            other[entry] += factor * norms[k, i] * norms[k, j]
            assert implementation.is_symmetric(other) == expected
    assert implementation.is_symmetric(torch.zeros(1, 3, 3, dtype=torch.float64))
    assert not implementation.is_symmetric(torch.tensor([[[0.0, 1e-300], [0.0, 0.0]]], dtype=torch.float64))
