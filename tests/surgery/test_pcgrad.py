"""PCGrad against Algorithm 1 on gradient vectors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastmtl
from fastmtl import PCGrad, reference
from tests.asserts import assert_invariant_under_permutation, assert_invariant_under_scaling, assert_same_state


def pcgrad_on_vectors(jacobian: Tensor, order: Tensor, include_self: bool = False) -> Tensor:
    """Algorithm 1 to the letter, one pair after the other."""
    total = torch.zeros(jacobian.shape[1], dtype=jacobian.dtype)
    for i in range(len(jacobian)):
        g = jacobian[i].clone()
        for j in order[i].tolist():
            if j == i and not include_self:
                continue
            product = g @ jacobian[j]
            if product < 0:
                g = g - product / (jacobian[j] @ jacobian[j]) * jacobian[j]
        total = total + g
    return total


def random_order(num_tasks: int) -> Tensor:
    return torch.stack([torch.randperm(num_tasks) for _ in range(num_tasks)])


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 7, 20, 40])
def test_against_vectors(num_tasks: int, include_self: bool) -> None:
    for size in (num_tasks // 2 + 1, num_tasks + 30):
        jacobian, order = torch.randn(num_tasks, size, dtype=torch.float64), random_order(num_tasks)
        out = fastmtl.aggregate(jacobian, PCGrad(order=order, include_self=include_self))
        torch.testing.assert_close(out.grads, pcgrad_on_vectors(jacobian, order, include_self), rtol=1e-9, atol=1e-9)


def test_drawn_orders_are_used_by_the_algorithm() -> None:
    """With the orders that the state says, for random and shared ones."""
    jacobian = torch.randn(6, 4, dtype=torch.float64)
    for kind in ("random", "shared"):
        method = PCGrad(order=kind)
        for _ in range(3):
            order = reference.visiting_order(1, 6, kind, method.rng)[0]
            out = fastmtl.aggregate(jacobian, method)
            torch.testing.assert_close(out.grads, pcgrad_on_vectors(jacobian, order), rtol=1e-9, atol=1e-9)


def test_fixed_order_is_0_1_2() -> None:
    jacobian = torch.randn(6, 4, dtype=torch.float64)
    expected = pcgrad_on_vectors(jacobian, torch.arange(6).expand(6, 6))
    for _ in range(2):
        torch.testing.assert_close(fastmtl.aggregate(jacobian, PCGrad(order="fixed")).grads, expected)


def test_orders_per_group() -> None:
    parts = [torch.randn(5, 3, dtype=torch.float64) for _ in range(2)]
    orders = torch.stack([random_order(5), random_order(5)])
    out = fastmtl.aggregate(parts, PCGrad(order=orders), groups=[0, 1])
    for found, part, order in zip(out.grads, parts, orders, strict=True):
        torch.testing.assert_close(found, pcgrad_on_vectors(part, order), rtol=1e-9, atol=1e-9)


def test_groups_draw_different_orders() -> None:
    part = torch.randn(8, 3, dtype=torch.float64)
    out = fastmtl.aggregate([part] * 4, PCGrad(), groups=[0, 1, 2, 3])
    assert len({tuple(w.tolist()) for w in out.weights}) > 1


def test_without_conflict_it_is_the_sum() -> None:
    jacobian = torch.rand(5, 9, dtype=torch.float64)
    assert fastmtl.aggregate(jacobian, PCGrad()).weights.tolist() == [1.0] * 5


def test_mean_is_the_sum_over_the_present_tasks() -> None:
    jacobian, order = torch.randn(4, 3, dtype=torch.float64), random_order(4)
    gramian, mask = jacobian @ jacobian.T, torch.tensor([True, False, True, True])
    total, mean = PCGrad(order=order), PCGrad(order=order, reduction="mean")
    torch.testing.assert_close(mean(gramian), total(gramian) / 4)
    torch.testing.assert_close(mean(gramian, mask=mask), total(gramian, mask=mask) / 3)


def test_a_zero_gradient_never_projects_and_stays_zero() -> None:
    jacobian = torch.randn(4, 3, dtype=torch.float64)
    jacobian[1] = 0
    order = random_order(4)
    out = fastmtl.aggregate(jacobian, PCGrad(order=order))
    torch.testing.assert_close(out.grads, pcgrad_on_vectors(jacobian[[0, 2, 3]], _without(order, 1)))
    assert out.weights[1] == 1


def _without(order: Tensor, task: int) -> Tensor:
    rows = [[j - (j > task) for j in row if j != task] for i, row in enumerate(order.tolist()) if i != task]
    return torch.tensor(rows)


def test_masked_tasks_are_as_if_they_were_not_there() -> None:
    jacobian, order = torch.randn(5, 3, dtype=torch.float64), random_order(5)
    gramian = jacobian @ jacobian.T
    gramian[2] = gramian[:, 2] = math.nan
    weights = PCGrad(order=order)(gramian, mask=torch.tensor([True, True, False, True, True]))
    assert weights[2] == 0
    rest = [0, 1, 3, 4]
    torch.testing.assert_close(weights[rest] @ jacobian[rest], pcgrad_on_vectors(jacobian[rest], _without(order, 2)))


def test_properties() -> None:
    jacobian = torch.randn(6, 4, dtype=torch.float64)
    gramian = jacobian @ jacobian.T
    for factor in (1e-6, 1e6):
        assert_invariant_under_scaling(PCGrad(order="fixed"), gramian, factor)
    two = gramian[:2, :2] - torch.eye(2) * 0.0
    assert_invariant_under_permutation(PCGrad(), two, torch.tensor([1, 0]))
    permutation, order = torch.randperm(6), random_order(6)
    renamed = torch.argsort(permutation)[order[permutation]]
    left = PCGrad(order=renamed)(gramian[permutation][:, permutation])
    torch.testing.assert_close(left, PCGrad(order=order)(gramian)[permutation])


# ---- randomness and state --------------------------------------------------------------------------------------------


def history(method: PCGrad, steps: int) -> list[list[float]]:
    g = torch.Generator().manual_seed(1)
    jacobians = [torch.randn(9, 4, dtype=torch.float64, generator=g) for _ in range(6)]
    return [fastmtl.aggregate(jacobians[int(method.rng[1]) % 6], method).weights.tolist() for _ in range(steps)]


def test_orders_are_fresh_in_each_step() -> None:
    jacobian, method = torch.randn(9, 4, dtype=torch.float64), PCGrad()
    seen = {tuple(fastmtl.aggregate(jacobian, method).weights.tolist()) for _ in range(5)}
    assert len(seen) == 5
    assert method.rng[1] == 5


def test_the_seed_comes_from_the_generator_at_construction() -> None:
    torch.manual_seed(3)
    a = PCGrad()
    torch.manual_seed(3)
    b = PCGrad()
    c = PCGrad()
    assert torch.equal(a.rng, b.rng)
    assert not torch.equal(b.rng, c.rng)
    d, e = (PCGrad(generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(d.rng, e.rng)
    assert history(a, 3) == history(b, 3) != history(c, 3)


def test_a_step_leaves_torchs_generator_alone() -> None:
    method, before = PCGrad(), torch.get_rng_state()
    history(method, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_checkpoint_resumes_the_orders() -> None:
    method = PCGrad()
    history(method, 2)
    fresh = PCGrad()
    fresh.load_state_dict(method.state_dict(), strict=True)
    assert history(fresh, 3) == history(method, 3)
    assert_same_state(fresh, method)


def test_a_step_that_is_not_finite_does_not_advance() -> None:
    method = PCGrad()
    gramian = torch.eye(3, dtype=torch.float64)
    gramian[0, 0] = math.inf
    assert method(gramian).isnan().all()
    assert method.rng[1] == 0


def test_casting_the_model_keeps_the_seed() -> None:
    for cast in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.float()):
        method = PCGrad()
        before = method.rng.clone()
        assert torch.equal(cast(method).rng, before)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"reduction": "max"}, "reduction.*'max'"),
        ({"order": "sorted"}, "order.*'sorted'"),
        ({"order": torch.zeros(2, 2)}, "permutation"),
        ({"order": torch.tensor([[0, 1], [1, 2]])}, "permutation"),
        ({"order": torch.arange(3)}, r"shape \[T, T\]"),
        ({"rescale": "sum"}, "rescale.*'sum'"),
    ],
)
def test_errors(options: dict, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        PCGrad(**options)


def test_a_jacobian_is_told_apart_from_a_gramian() -> None:
    method = PCGrad()
    with pytest.raises(ValueError, match=r"symmetric.*fastmtl.aggregate"):
        method(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    with pytest.raises(ValueError, match=r"gramian: expected shape.*found \[2, 3\]"):
        method(torch.ones(2, 3))
    with pytest.raises(TypeError, match=r"gramian.*list"):
        method([[1.0]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"order: expected shape \[3, 3\]"):
        PCGrad(order=torch.tensor([[0, 1], [1, 0]]))(torch.eye(3))
    assert method.rng[1] == 0
