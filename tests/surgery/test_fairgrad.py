"""FairGrad by its properties. (The solver itself: tests/solvers.)"""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import least_squares
from torch import Tensor

import fastmtl
from fastmtl import FairGrad
from tests.asserts import assert_invariant_under_permutation, assert_non_conflicting, assert_untouched

ALPHAS = [0.1, 0.5, 1.0, 2.0, 10.0]
CONFLICT = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)  # no direction is good for both


@pytest.fixture
def jacobian() -> Tensor:
    return torch.randn(5, 12, dtype=torch.float64)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_everyone_gains_as_the_equations_say(jacobian: Tensor, alpha: float) -> None:
    out = fastmtl.aggregate(jacobian, FairGrad(alpha))
    assert_non_conflicting(jacobian, out.grads)
    gains = jacobian @ out.grads
    torch.testing.assert_close(gains, out.weights ** (-1 / alpha), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_code_of_the_paper(jacobian: Tensor, alpha: float) -> None:
    """`least_squares` on the equations as they stand, run until it stops for rounding."""
    m = (jacobian @ jacobian.T).numpy()
    found = least_squares(
        lambda w: m @ w - w ** (-1 / alpha), [0.2] * 5, bounds=(0, float("inf")), xtol=1e-15, ftol=1e-15, gtol=1e-15
    )
    weights = FairGrad(alpha)(torch.from_numpy(m))
    torch.testing.assert_close(weights, torch.from_numpy(found.x), rtol=1e-5, atol=1e-7)


def test_fairer_with_alpha(jacobian: Tensor) -> None:
    """As alpha grows the sum of the gains falls, and the least one rises, along directions of one length."""
    sums, least = [], []
    for alpha in ALPHAS:
        grads = fastmtl.aggregate(jacobian, FairGrad(alpha)).grads
        gains = jacobian @ (grads / grads.norm())
        sums.append(float(gains.sum()))
        least.append(float(gains.min()))
    assert sums == sorted(sums, reverse=True)
    assert least == sorted(least)


def test_preferences_move_the_gains(jacobian: Tensor) -> None:
    plain = jacobian @ fastmtl.aggregate(jacobian, FairGrad()).grads
    more = fastmtl.aggregate(jacobian, FairGrad(preference=[1, 1, 4, 1, 1]))
    gains = jacobian @ more.grads
    assert gains[2] / gains.sum() > plain[2] / plain.sum()
    without = fastmtl.aggregate(jacobian[[0, 1, 3, 4]], FairGrad())
    none = fastmtl.aggregate(jacobian, FairGrad(preference=torch.tensor([1.0, 1, 0, 1, 1])))
    assert none.weights[2] == 0
    torch.testing.assert_close(none.grads, without.grads)


def test_permutation_and_groups(jacobian: Tensor) -> None:
    m = jacobian @ jacobian.T
    for alpha in ALPHAS:
        assert_invariant_under_permutation(FairGrad(alpha), m, torch.randperm(5))
    both = torch.stack([m, m.diagonal().diag()])
    method = FairGrad(2.0)
    weights = method(both, mask=torch.tensor([[True] * 5, [True] * 4 + [False]]))
    torch.testing.assert_close(weights[0], FairGrad(2.0)(m))
    torch.testing.assert_close(weights[1, :4], m.diagonal()[:4] ** (-2 / 3))
    assert weights[1, 4] == 0
    assert method.weights.shape == (2, 5)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_one_and_many_tasks(alpha: float) -> None:
    g = torch.randn(1, 9, dtype=torch.float64)
    torch.testing.assert_close(FairGrad(alpha)(g @ g.T), g.square().sum(1) ** (-alpha / (1 + alpha)))
    for num_tasks in (2, 32, 128):
        jacobian = torch.randn(num_tasks, 2 * num_tasks, dtype=torch.float64)
        assert_non_conflicting(jacobian, fastmtl.aggregate(jacobian, FairGrad(alpha)).grads)


def test_identical_gradients() -> None:
    g = torch.randn(7, dtype=torch.float64)
    weights = fastmtl.aggregate(g.expand(3, 7), FairGrad()).weights
    torch.testing.assert_close(weights, torch.full((3,), (3 * float(g @ g)) ** -0.5, dtype=torch.float64))


def test_the_last_weights_where_there_is_no_fair_direction(jacobian: Tensor) -> None:
    method = FairGrad()
    assert method(CONFLICT @ CONFLICT.T).tolist() == [1, 1]  # none yet
    solved = method((jacobian @ jacobian.T)[:2, :2])
    for hopeless in (CONFLICT, 3 * CONFLICT, torch.tensor([[0.0, 0], [2, 1]], dtype=torch.float64)):
        assert torch.equal(method(hopeless @ hopeless.T), solved)
    again = FairGrad()
    again.load_state_dict(method.state_dict())
    assert torch.equal(again(CONFLICT @ CONFLICT.T), solved)


def test_who_was_absent_keeps_the_weight_it_had(jacobian: Tensor) -> None:
    method = FairGrad()
    m = jacobian @ jacobian.T
    first = method(m)
    mask = torch.tensor([True, False, True, True, True])
    second = method(m, mask=mask)
    assert second[1] == 0
    kept = method(torch.zeros(5, 5))
    assert torch.equal(kept, torch.where(mask, second, first))


def test_state_moves_on_finite_training_steps_only(jacobian: Tensor) -> None:
    method, m = FairGrad(), jacobian @ jacobian.T
    solved = method(m)
    with assert_untouched(method):
        assert method(m * torch.tensor(float("nan"))).isnan().all()
    method.eval()
    with assert_untouched(method):
        assert not torch.equal(method(2 * m), solved)
        assert torch.equal(method(0 * m), solved)
    method.train()
    method(2 * m)
    assert not torch.equal(method.weights[0], solved)


def test_errors(jacobian: Tensor) -> None:
    for options, error, text in (
        ({"alpha": 0}, ValueError, r"alpha: expected a number in \[0.1, 10\], found 0"),
        ({"alpha": True}, TypeError, "alpha: expected a number, found True"),
        ({"preference": 2}, TypeError, "preference: expected one number per task, found 2"),
        ({"preference": [1, -1]}, ValueError, "preference of task 1: .* found -1"),
        ({"rescale": "one"}, ValueError, "rescale: expected"),
    ):
        with pytest.raises(error, match=text):
            FairGrad(**options)
    method = FairGrad(preference=[1, 2])
    with assert_untouched(method), pytest.raises(ValueError, match=r"preference: one for each of 2 tasks, .* 5"):
        fastmtl.aggregate(jacobian, method)
