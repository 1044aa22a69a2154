"""grad_drop and trimmed_mean on tensors of every layout, against the literal algorithms in float64 NumPy."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from fastmtl import _C, ops, reference
from fastmtl.rows import Rows

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
RNG = torch.tensor([0x1234567890ABCDEF, 5])
SIZES = [(5,), (1023,), (33, 65), (3000,), (), (2, 0)]

Op = Callable[[Any, Tensor], Any]
OPS: dict[str, Op] = {
    "grad_drop": lambda rows, weights: ops.grad_drop(rows, weights, RNG),
    "grad_drop, leak": lambda rows, weights: ops.grad_drop(rows, weights, RNG, leaks(weights.shape[-1])),
    "trimmed_mean, 1": lambda rows, weights: ops.trimmed_mean(rows, weights, 1),
    "trimmed_mean, 3": lambda rows, weights: ops.trimmed_mean(rows, weights, 3),
    "trimmed_mean, 6": lambda rows, weights: ops.trimmed_mean(rows, weights, 6),
}


def leaks(num_tasks: int) -> Tensor:
    return torch.linspace(0, 1, num_tasks, dtype=torch.float64) ** 2


@functools.cache
def uniform(number: int, size: int) -> np.ndarray:
    """csrc/grad_drop.h."""
    seed, step = (int(x) for x in RNG)
    block = np.arange(size // 4 + 1, dtype=np.uint64)
    counter = [block, *(np.full_like(block, x) for x in (number, step & 0xFFFFFFFF, step >> 32))]
    words = reference.philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return np.array([(int(words[i % 4][i // 4]) >> 9) * 2.0**-23 + 2.0**-24 for i in range(size)])


def literal_grad_drop(rows: np.ndarray, leak: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Algorithm 1 of the paper, with its sums over the batch left out."""
    with np.errstate(invalid="ignore"):
        purity = 0.5 * (1 + rows.sum(0) / np.abs(rows).sum(0))
    out = np.zeros(rows.shape[1])
    for g, share in zip(rows, leak, strict=True):
        mask = (purity > u) * (g > 0) + (purity < u) * (g < 0)
        out += (share + (1 - share) * mask) * g
    return out


def literal_trimmed_mean(rows: np.ndarray, trim: int) -> np.ndarray:
    k = min(trim, (len(rows) - 1) // 2)
    return stats.trim_mean(rows, k / len(rows) + 1e-9, axis=0)


def expected(name: str, rows: Sequence[Tensor | None], weights: Tensor, number: int) -> np.ndarray:
    tasks = [t for t, x in enumerate(rows) if x is not None and weights[t] != 0]
    flat = np.stack([(weights[t] * rows[t].double()).flatten().numpy() for t in tasks])
    if "trimmed" in name:
        return literal_trimmed_mean(flat, int(name[-1]))
    leak = leaks(len(rows)).numpy()[tasks] if "leak" in name else np.zeros(len(tasks))
    return literal_grad_drop(flat, leak, uniform(number, flat.shape[1]))


def assert_close(found: Tensor, wanted: np.ndarray, rows: Sequence[Tensor | None], dtype: torch.dtype) -> None:
    """Within rounding relative to the terms."""
    size = sum(x.double().abs() for x in rows if x is not None).flatten().numpy()
    work = 1e-14 if dtype == torch.float64 else 1e-6
    eps = torch.finfo(found.dtype).eps
    error = np.abs(found.double().flatten().numpy() - wanted)
    assert (error <= work * size + eps * np.abs(wanted) + torch.finfo(found.dtype).smallest_normal).all(), error.max()


@pytest.fixture(params=["avx512", "avx2", "portable"])
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.build_info()["cpu_capability"]
    if not _C.set_cpu_capability(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    _C.set_cpu_capability(before)


def random_rows(num_tasks: int, dtype: torch.dtype, missing: bool = True) -> list[list[Tensor | None]]:
    generator = torch.Generator().manual_seed(num_tasks)
    params: list[list[Tensor | None]] = []
    for p, size in enumerate(SIZES):
        rows = [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for _ in range(num_tasks)]
        holes = missing and num_tasks > 2
        params.append([None if holes and (p + t) % 4 == 3 else x for t, x in enumerate(rows)])
    return params


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 17, 33])
@pytest.mark.parametrize("name", OPS)
def test_literal(name: str, num_tasks: int, dtype: torch.dtype, capability: str) -> None:
    params = random_rows(num_tasks, dtype)
    weights = torch.ones(num_tasks, dtype=torch.float64)
    if num_tasks > 3:
        weights[1], weights[2] = 0.0, 0.5
    for number, (found, rows) in enumerate(zip(OPS[name](params, weights), params, strict=True)):
        assert found.dtype == dtype
        assert found.shape == SIZES[number]
        assert_close(found, expected(name, rows, weights, number), rows, dtype)


@pytest.mark.parametrize("trim", [1, 5, 100, 255])
def test_many_tasks(trim: int, capability: str) -> None:
    rows = torch.randn(512, 301)
    found = ops.trimmed_mean(rows, torch.ones(512), trim)
    np.testing.assert_allclose(found.numpy(), literal_trimmed_mean(rows.double().numpy(), trim), atol=1e-6)
    summed = torch.where(rows > 0, rows, 0.0).double().sum(0), torch.where(rows < 0, rows, 0.0).double().sum(0)
    dropped = ops.grad_drop(rows, torch.ones(512), RNG).double()
    assert (torch.stack([(dropped - s).abs() for s in summed]).amin(0) < 1e-3).all()


@pytest.mark.parametrize("name", OPS)
def test_reference_is_a_twin(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params, weights = random_rows(9, torch.float64), torch.ones(9, dtype=torch.float64)
    ours = OPS[name](params, weights)
    monkeypatch.setattr("fastmtl._extension.kernels_on", lambda device: False)
    for found, twin in zip(ours, OPS[name](params, weights), strict=True):
        torch.testing.assert_close(found, twin)


@pytest.mark.parametrize("name", OPS)
def test_bitwise_the_same_for_any_threads_and_instructions(name: str) -> None:
    """Sums are taken in one order, and the random numbers go by place."""
    rows, weights = torch.randn(5, 300_007), torch.ones(5)
    before, results = _C.build_info()["cpu_capability"], []
    threads = torch.get_num_threads()
    try:
        for target in ("avx512", "avx2", "portable"):
            for number in (1, 2, 3):
                if _C.set_cpu_capability(target):
                    torch.set_num_threads(number)
                    results.append(OPS[name](rows, weights))
    finally:
        _C.set_cpu_capability(before)
        torch.set_num_threads(threads)
    assert len(results) >= 3
    assert all(torch.equal(results[0], x) for x in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_layouts(name: str, dtype: torch.dtype) -> None:
    """Misaligned, strided, aliasing, channels-last, stacked rows."""
    weights = torch.ones(4)
    memory = torch.randn(4, 5003).to(dtype)
    flat = [memory[t, 1 + t : 4001 + t] for t in range(4)]  # no alignment to speak of
    assert_close(OPS[name]([flat], weights)[0], expected(name, flat, weights, 0), flat, dtype)
    jacobian = memory[:, 3:1000]
    rows = list(jacobian.unbind(0))
    assert_close(OPS[name](jacobian, weights), expected(name, rows, weights, 0), rows, dtype)
    gaps = [x[::3] for x in flat]
    assert_close(OPS[name]([gaps], weights)[0], expected(name, gaps, weights, 0), gaps, dtype)
    same = [flat[0], flat[0], memory[0, :1].expand(4000), flat[1]]
    assert_close(OPS[name]([same], weights)[0], expected(name, same, weights, 0), same, dtype)
    images = [x[:1440].view(3, 6, 8, 10).contiguous(memory_format=torch.channels_last) for x in flat]
    found = OPS[name]([images], weights)[0]
    assert found.stride() == images[0].stride()
    in_memory = [x.permute(0, 2, 3, 1) for x in images]
    assert_close(found.permute(0, 2, 3, 1), expected(name, in_memory, weights, 0), in_memory, dtype)


@pytest.mark.parametrize("name", OPS)
def test_large_outputs_go_past_the_caches(name: str) -> None:
    """Above 8 MB, from addresses of every alignment."""
    weights, memory = torch.ones(3), torch.randn(3, 2_200_000)
    for shift in (0, 3):
        rows = memory[:, shift:]
        large = OPS[name](rows, weights)
        small = OPS[name](rows[:, :10_000].contiguous(), weights)
        assert torch.equal(large[:10_000], small)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_widened(dtype: torch.dtype) -> None:
    rows, weights = torch.randn(6, 1500).to(dtype), torch.ones(6)
    each = list(rows.unbind(0))
    for leak in (None, leaks(6)):
        name = "grad_drop" if leak is None else "grad_drop, leak"
        found = ops.grad_drop(rows, weights, RNG, leak, widen=True)
        assert found.dtype == torch.float32
        assert_close(found, expected(name, each, weights, 0), each, dtype)
    found = ops.trimmed_mean(rows, weights, 2, widen=True)
    np.testing.assert_allclose(found.numpy(), literal_trimmed_mean(rows.double().numpy(), 2), atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite(value: float) -> None:
    """grad_drop: NaN or infinite where an element is; trimmed_mean: infinities are extremes, NaN stays."""
    rows, weights = torch.randn(9, 37), torch.ones(9)
    rows[4, 5] = value
    for leak in (None, leaks(9)):
        assert not ops.grad_drop(rows, weights, RNG, leak)[5].isfinite()
        assert ops.grad_drop(rows, weights, RNG, leak).isfinite().sum() == 36
    for trim in (1, 2, 4):
        found = ops.trimmed_mean(rows, weights, trim)
        assert found.isfinite()[torch.arange(37) != 5].all()
        assert bool(found[5].isnan()) == math.isnan(value)
    rows[4, 5] = 1.0
    poisoned, off = torch.full((37,), value), torch.tensor([1.0] * 9 + [0.0])
    for name, op in OPS.items():
        if "leak" not in name:
            assert torch.equal(op([[*rows, poisoned]], off)[0], op([list(rows)], weights)[0]), "weight 0 was read"


@pytest.mark.parametrize("name", OPS)
def test_no_task(name: str) -> None:
    some: list[list[Tensor | None]] = [[torch.ones(3), None], [None, None], [None, torch.ones(2)]]
    found = OPS[name](some, torch.tensor([1.0, 0.0]))
    assert found[1] is None
    assert torch.equal(found[0], torch.ones(3))
    assert torch.equal(found[2], torch.zeros(2))


def test_groups_weigh() -> None:
    params = [[torch.randn(4) for _ in range(3)] for _ in range(2)]
    weights = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    assert torch.equal(ops.trimmed_mean(params, weights, 1, groups=[0, 1])[1], params[1][1])
    assert torch.equal(ops.grad_drop(params, weights, RNG, groups=[0, 1])[1], params[1][1])


def test_registered_as_they_should_be() -> None:
    rows = [torch.randn(4, 3), None, torch.randn(4, 3), torch.randn(2), torch.randn(2), torch.randn(2)]
    weights = torch.ones(1, 3, dtype=torch.float64)
    for leak in (None, leaks(3)):
        torch.library.opcheck(torch.ops.fastmtl.grad_drop, (rows, 3, False, None, weights, RNG, leak))
    torch.library.opcheck(torch.ops.fastmtl.trimmed_mean, (rows, 3, False, None, weights, 1))
    stacked = [torch.randn(3, 5).bfloat16()]
    torch.library.opcheck(torch.ops.fastmtl.trimmed_mean, (stacked, 3, True, None, weights, 1, True))
    torch.library.opcheck(torch.ops.fastmtl.grad_drop, (stacked, 3, True, None, weights, RNG, None, True))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda g: ops.grad_drop(g, torch.ones(3), RNG), "weights: expected shape"),
        (lambda g: ops.grad_drop(g, torch.ones(2), RNG[:1]), "rng: expected shape"),
        (lambda g: ops.grad_drop(g, torch.ones(2), RNG.double()), "rng: wrong dtype"),
        (lambda g: ops.grad_drop(g, torch.ones(2), RNG, torch.ones(3).double()), "leak: expected shape"),
        (lambda g: ops.trimmed_mean(g, torch.ones(2), -1), "trim: expected at least 0"),
        (lambda g: ops.trimmed_mean([[g[0], g[1, :2]]], torch.ones(2), 1), "task 1: gradient of shape"),
    ],
)
def test_refused(call: Callable[[Tensor], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call(torch.randn(2, 5))


def test_by_rows() -> None:
    """What the engine passes."""
    rows = Rows([torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([9.0])], 3)
    assert ops.trimmed_mean(rows, torch.ones(3), 1)[0].item() == 3
