"""Linear programs over the simplex against SciPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import linprog

from fastmtl import ops, reference, solvers
from tests.samplers import SAMPLERS, Sampler, random, with_norms

Floats = NDArray[np.float64]
BOTH = {"kernels": ops.simplex_lp, "reference": reference.simplex_lp}


class Program:
    """One problem, as EPO poses them: 0 balances, 1 and 2 descend, 3 has no bounds, 4 may be without a solution."""

    def __init__(self, sampler: Sampler, num_tasks: int, seed: int, kind: int) -> None:
        rng = np.random.default_rng(seed)
        g = with_norms(rng, sampler(rng, num_tasks), 2 * (seed % 2))
        self.m = (g @ g.T + (g @ g.T).T) / 2
        anchor = rng.standard_normal(num_tasks)
        self.e = self.m @ (anchor - anchor.mean())
        self.q = self.e if kind == 0 else self.m.sum(0)
        self.b, self.f = np.zeros(num_tasks), -np.inf
        if kind == 0:
            self.b = np.where(self.e > 0, -np.inf, self.e)
            self.b[rng.integers(num_tasks)] = 0
        elif kind == 2:
            self.f = min(0.0, self.e.max())
        elif kind == 3:
            self.b = np.full(num_tasks, -np.inf)
        elif kind == 4:
            self.b, self.f = self.m.diagonal() * rng.uniform(-0.5, 0.5), 0.2 * self.e.max()

    def arguments(self) -> tuple[torch.Tensor, ...]:
        values = (self.m, self.q, self.b, self.e, np.array(self.f))
        return tuple(torch.from_numpy(np.array(x)).unsqueeze(0) for x in values)

    def rows(self) -> tuple[Floats, Floats]:
        """The inequalities ``rows @ w >= right``, scaled by their largest coefficient when written as ``>= 0``."""
        rows, right = np.vstack([self.m, self.e]), np.append(self.b, self.f)
        rows, right = rows[right > -np.inf], right[right > -np.inf]
        scale = np.abs(rows - right[:, None]).max(1, initial=0.0)
        scale[scale == 0] = 1
        return rows / scale[:, None], right / scale

    def check(self, weights: torch.Tensor, violation: torch.Tensor) -> None:
        w, missed = weights[0].numpy(), float(violation[0])
        assert (w >= 0).all()
        assert w.sum() == pytest.approx(1, abs=1e-12)
        rows, right = self.rows()
        scale = np.abs(self.q).max() or 1.0
        best = linprog(
            -self.q / scale,
            A_ub=-rows,
            b_ub=-right,
            A_eq=np.ones((1, len(w))),
            b_eq=[1],
            bounds=(0, None),
            method="highs",
        )
        if missed > 0:
            assert best.status == 2
            return
        assert best.status == 0
        assert (rows @ w >= right - 2e-9).all()
        assert self.q @ w / scale >= -best.fun - 1e-8


@pytest.mark.parametrize("solve", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_against_scipy(sampler: Sampler, solve: Any) -> None:
    for num_tasks in (1, 2, 3, 6, 15):
        for seed in range(2):
            for kind in range(4):
                program = Program(sampler, num_tasks, seed, kind)
                program.check(*solve(*program.arguments()))


@pytest.mark.parametrize("solve", BOTH.values(), ids=BOTH)
def test_programs_without_a_solution_are_told(solve: Any) -> None:
    told = 0
    for seed in range(40):
        program = Program(random, 5, seed, 4)
        weights, violation = solve(*program.arguments())
        program.check(weights, violation)
        told += bool(violation > 0)
    assert 3 < told < 37


def test_the_least_violation_is_returned() -> None:
    program = Program(random, 4, 0, 4)
    program.b[:] = 3 * program.m.diagonal().max()
    weights, violation = ops.simplex_lp(*program.arguments())
    rows, right = program.rows()
    # The variable one more, v, is what all rows may miss.
    rows = np.hstack([rows, np.ones((len(rows), 1))])
    best = linprog([0] * 4 + [1], A_ub=-rows, b_ub=-right, A_eq=[[1] * 4 + [0]], b_eq=[1], bounds=(0, None))
    assert float(violation) == pytest.approx(best.fun, rel=1e-9)
    assert float((right - rows[:, :4] @ weights[0].numpy()).max()) == pytest.approx(best.fun, rel=1e-9)


@pytest.mark.parametrize("num_tasks", [32, 128])
def test_many_tasks(num_tasks: int) -> None:
    for kind in (0, 1, 2):
        program = Program(random, num_tasks, kind, kind)
        program.check(*ops.simplex_lp(*program.arguments()))


@pytest.mark.parametrize("solve", BOTH.values(), ids=BOTH)
def test_masks_and_batches(solve: Any) -> None:
    """Several problems at once, each as without its absent tasks."""
    programs = [Program(random, 6, seed, seed % 3) for seed in range(6)]
    mask = torch.rand(6, 6) < 0.7
    mask[:, 0], mask[5] = True, False
    batch = [torch.cat(x) for x in zip(*(p.arguments() for p in programs), strict=True)]
    absent = ~(mask.unsqueeze(-1) & mask.unsqueeze(-2))
    batch[0][absent] = torch.nan
    for x in batch[1:4]:
        x[~mask] = torch.nan
    weights, violation = solve(*batch, mask)
    assert (weights[~mask] == 0).all()
    assert violation[5] == 0
    for k, program in enumerate(programs[:5]):
        rest = mask[k].numpy()
        program.m, program.q = program.m[np.ix_(rest, rest)], program.q[rest]
        program.b, program.e = program.b[rest], program.e[rest]
        program.check(weights[k : k + 1, mask[k]], violation[k : k + 1])


@pytest.mark.parametrize("solve", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("argument", range(5))
def test_what_is_not_finite(solve: Any, argument: int) -> None:
    for value in (torch.nan, torch.inf):
        arguments = [x.clone() for x in Program(random, 4, 2, 2).arguments()]
        arguments[argument].view(-1)[0] = value
        weights, violation = solve(*arguments)
        assert weights.isnan().all()
        assert violation.isnan().all()


def test_compiled_and_not_differentiable() -> None:
    arguments = Program(random, 4, 2, 2).arguments()
    compiled = torch.compile(ops.simplex_lp, backend="aot_eager", fullgraph=True)
    for found, expected in zip(compiled(*arguments), ops.simplex_lp(*arguments), strict=True):
        assert torch.equal(found, expected)
    gramian = arguments[0].requires_grad_()
    with pytest.raises(RuntimeError, match="not differentiable"):
        ops.simplex_lp(gramian, *arguments[1:])[0].sum().backward()


def test_shapes_are_checked() -> None:
    arguments = list(Program(random, 4, 2, 2).arguments())
    for i, name in enumerate(("objective", "bounds", "extra", "extra_bound"), 1):
        wrong = [*arguments]
        wrong[i] = torch.zeros(3, 7, dtype=torch.float64)
        with pytest.raises(ValueError, match=f"{name}: "):
            ops.simplex_lp(*wrong)


def test_numpy_entry() -> None:
    arguments = Program(random, 6, 1, 2).arguments()
    found, missed = solvers.simplex_lp(*(x[0].numpy() for x in arguments))
    expected, violation = ops.simplex_lp(*arguments)
    np.testing.assert_array_equal(found, expected[0])
    assert missed == violation[0]
    with pytest.raises(ValueError, match=r"extra: expected shape \[6\], found \[5\]"):
        solvers.simplex_lp(*(x[0].numpy() for x in arguments[:3]), np.ones(5), 0.0)
