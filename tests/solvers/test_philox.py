"""The random generator against its published values, and the visiting orders against their specification."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from fastmtl import _C, solvers


@pytest.mark.parametrize(
    "line",
    [  # Random123, tests/kat_vectors, philox4x32 10: counter, key, result
        "00000000 00000000 00000000 00000000 00000000 00000000   6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        "ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff   408f276d 41c83b0e a20bc7c6 6d5451fd",
        "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0   d16cfe09 94fdcceb 5001e420 24126ea1",
    ],
)
def test_published_values(line: str) -> None:
    words = [int(word, 16) for word in line.split()]
    assert _C.philox(words[:4], words[4:6]) == tuple(words[6:])


def specified_order(num_tasks: int, seed: int, step: int, problem: int, row: int) -> list[int]:
    """csrc/solvers/order.h, word for word."""
    low = 0xFFFFFFFF
    draws: list[int] = []
    for block in range(-(-num_tasks // 4)):
        draws += _C.philox([block | row << 16, problem & low, step & low, step >> 32], [seed & low, seed >> 32])
    order = list(range(num_tasks))
    for n in range(num_tasks - 1):
        m = num_tasks - 1 - n
        r = draws[n] * (m + 1) >> 32
        order[m], order[r] = order[r], order[m]
    return order


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 5, 6, 9, 33, 130])
@pytest.mark.parametrize(("seed", "step", "problem"), [(0, 0, 0), (2**63 + 12345, 7, 3), (99, 2**40 + 1, 2**31)])
def test_order_is_as_specified(num_tasks: int, seed: int, step: int, problem: int) -> None:
    orders = solvers.visiting_order(num_tasks, seed, step, problem)
    assert orders.tolist() == [specified_order(num_tasks, seed, step, problem, row) for row in range(num_tasks)]


def test_no_tasks() -> None:
    assert solvers.visiting_order(0).shape == (0, 0)


def test_every_permutation_is_equally_likely() -> None:
    count = Counter(tuple(row) for step in range(6000) for row in solvers.visiting_order(4, seed=5, step=step).tolist())
    assert set(count) == set(permutations(range(4)))
    assert stats.chisquare(list(count.values())).pvalue > 1e-3


def test_every_task_is_equally_likely_at_every_position() -> None:
    orders = np.concatenate([solvers.visiting_order(17, seed, step=1) for seed in range(1000)])
    for position in orders.T:
        assert stats.chisquare(np.bincount(position, minlength=17)).pvalue > 1e-4


def test_orders_differ_between_seeds_steps_problems_and_rows() -> None:
    calls = [(0, 0, 0), (1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 2**32, 0), (0, 0, 1)]
    rows = [tuple(row) for call in calls for row in solvers.visiting_order(16, *call).tolist()]
    assert len(set(rows)) == len(calls) * 16


@pytest.mark.parametrize("bad", [{"num_tasks": -1}, {"num_tasks": 65537}, {"num_tasks": 2, "seed": 2**64}])
def test_out_of_range(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=str(max(bad.values(), key=abs))):
        solvers.visiting_order(**bad)
