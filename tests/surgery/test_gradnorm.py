"""GradNorm against equations 1 and 2 by autograd, and its state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastmtl import GradNorm
from tests.asserts import assert_same_state, assert_untouched


class Literal:
    """The paper's Algorithm 1 with torch's own optimizers; the target is a constant, so no gradient leaks into it.

    The weights are made to sum to T every ``steps_per_epoch`` steps.
    """

    def __init__(
        self, num_tasks: int, alpha: float, lr: float, optimizer: str, min_weight: float, steps_per_epoch: int
    ) -> None:
        self.weights = torch.ones(num_tasks, dtype=torch.float64, requires_grad=True)
        kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam
        self.optimizer = kind([self.weights], lr=lr)
        self.alpha, self.min_weight = alpha, min_weight
        self.count, self.steps_per_epoch = 0, steps_per_epoch
        self.initial: Tensor | None = None

    def step(self, jacobian: Tensor, losses: Tensor) -> Tensor:
        used = self.weights.detach().clone()
        if self.initial is None:
            self.initial = losses.clone()
        size = (self.weights.unsqueeze(1) * jacobian).norm(dim=1)
        ratio = losses / self.initial
        target = (size.mean() * (ratio / ratio.mean()) ** self.alpha).detach()
        (self.weights.grad,) = torch.autograd.grad((size - target).abs().sum(), self.weights)
        self.optimizer.step()
        with torch.no_grad():
            self.weights.clamp_(min=self.min_weight)
            self.count += 1
            if self.count % self.steps_per_epoch == 0:
                self.weights.mul_(len(losses) / self.weights.sum())
        return used


def steps(num_steps: int, num_tasks: int = 4) -> list[tuple[Tensor, Tensor]]:
    scale = torch.logspace(-1, 1, num_tasks, dtype=torch.float64).unsqueeze(1)
    return [
        (torch.randn(num_tasks, 6, dtype=torch.float64) * scale, torch.rand(num_tasks, dtype=torch.float64) + 0.1)
        for _ in range(num_steps)
    ]


EPOCHS = {"renormalize": "epoch", "steps_per_epoch": 3}
OPTIONS = [
    {},
    {"alpha": 0.5},
    {"lr": 0.1},
    {"optimizer": "adam"},
    {"lr": 5.0, "min_weight": 0.2},
    EPOCHS,
    {**EPOCHS, "optimizer": "adam"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_against_the_equations(options: dict) -> None:
    method = GradNorm(**options)
    defaults = {"alpha": 1.5, "lr": 0.025, "optimizer": "sgd", "min_weight": 1e-3, "steps_per_epoch": 1}
    literal = Literal(4, **{k: options.get(k, default) for k, default in defaults.items()})
    for i, (jacobian, losses) in enumerate(steps(20)):
        found = method(jacobian @ jacobian.T, losses=losses)
        torch.testing.assert_close(found, literal.step(jacobian, losses), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(method.weights, literal.weights.detach(), rtol=1e-9, atol=1e-12)
        sums_to_four = math.isclose(method.weights.sum(), 4.0, rel_tol=1e-12)
        assert sums_to_four == ("renormalize" not in options or i % 3 == 2)


def test_both_ways_to_end_an_epoch_are_one() -> None:
    by_itself, by_call = GradNorm(renormalize="epoch", steps_per_epoch=4), GradNorm(renormalize="epoch")
    by_call.end_epoch()  # nothing yet to renormalise
    for i, (jacobian, losses) in enumerate(steps(10)):
        gramian = jacobian @ jacobian.T
        assert torch.equal(by_itself(gramian, losses=losses), by_call(gramian, losses=losses))
        if i % 4 == 3:
            by_call.end_epoch()
    assert_same_state(by_itself, by_call)


def test_renormalised_after_each_step_the_end_of_an_epoch_is_nothing() -> None:
    method = GradNorm()
    for jacobian, losses in steps(3):
        method(jacobian @ jacobian.T, losses=losses)
    with assert_untouched(method):
        method.end_epoch()


def test_absent_tasks_are_renormalised_too() -> None:
    method, mask = GradNorm(renormalize="epoch", steps_per_epoch=2), torch.tensor([True, False, True, True])
    for jacobian, losses in steps(2):
        method(jacobian @ jacobian.T, losses=losses, mask=mask)
    assert method.weights[1] != 1
    torch.testing.assert_close(method.weights.sum(), torch.tensor(4.0, dtype=torch.float64))


def test_every_option_makes_a_difference() -> None:
    data, found = steps(40), []
    for options in OPTIONS:
        method = GradNorm(**options)
        for jacobian, losses in data:
            method(jacobian @ jacobian.T, losses=losses)
        found.append(method.weights.clone())
    for i, a in enumerate(found):
        assert not any(torch.allclose(a, b) for b in found[:i])


def test_balances_what_it_is_meant_to_balance() -> None:
    """With equal rates, the weighted norms become equal."""
    method, gramian = GradNorm(lr=0.01), torch.diag(torch.tensor([1.0, 4.0, 16.0], dtype=torch.float64))
    for _ in range(2000):
        weights = method(gramian, losses=torch.ones(3))
    sizes = weights * gramian.diagonal().sqrt()
    torch.testing.assert_close(sizes, sizes.mean().expand(3), rtol=0.1, atol=0)


def test_slower_tasks_get_larger_gradients() -> None:
    method, gramian = GradNorm(lr=0.01), torch.eye(2, dtype=torch.float64)
    method(gramian, losses=torch.tensor([1.0, 1.0]))
    for _ in range(50):
        weights = method(gramian, losses=torch.tensor([0.9, 0.1]))
    assert weights[0] > weights[1]


def test_absent_tasks_keep_their_weight_and_take_no_part_in_the_means() -> None:
    data, mask = steps(6), torch.tensor([True, False, True, True])
    rest = mask.nonzero().flatten()
    method, alone = GradNorm(), GradNorm()
    for jacobian, losses in data:
        gramian = jacobian @ jacobian.T
        losses = losses.clone()
        losses[1] = gramian[1, 1] = math.nan
        found = method(gramian, losses=losses, mask=mask)
        assert found[1] == 0
        expected = alone(gramian[rest][:, rest], losses=losses[rest])
        torch.testing.assert_close(found[rest], expected)
        assert method.weights[1] == 1
    assert method.initial_losses[1].isnan()


def test_absent_tasks_keep_their_moments() -> None:
    method, alone = GradNorm(optimizer="adam"), GradNorm(optimizer="adam")
    data, mask = steps(8), torch.tensor([True, False, True, True])
    for jacobian, losses in data[:4]:
        for m in (method, alone):
            m(jacobian @ jacobian.T, losses=losses)
    before = method.moments[:, 1].clone()
    assert (before != 0).all()
    for jacobian, losses in data[4:]:
        method(jacobian @ jacobian.T, losses=losses, mask=mask)
    assert torch.equal(method.moments[:, 1], before)
    assert (method.moments[:, mask] != alone.moments[:, mask]).all()


def test_without_adam_there_are_no_moments() -> None:
    assert "moments" not in GradNorm().state_dict()


def test_a_task_that_comes_late_starts_with_its_own_first_loss() -> None:
    method, gramian = GradNorm(), torch.eye(3, dtype=torch.float64)
    method(gramian, losses=torch.tensor([2.0, math.nan, 3.0]), mask=torch.tensor([True, False, True]))
    method(gramian, losses=torch.tensor([1.0, 5.0, 1.0]))
    assert method.initial_losses.tolist() == [2.0, 5.0, 3.0]


def test_losses_of_zero() -> None:
    """Already solved, at the start or later: no division by it."""
    gramian = torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))
    for first, then in (([0.0, 1.0, 1.0], [0.0, 0.5, 0.5]), ([1.0, 1.0, 1.0], [0.0, 0.5, 0.5]), ([0.0] * 3, [0.0] * 3)):
        method = GradNorm()
        for losses in (first, then, then):
            assert method(gramian, losses=torch.tensor(losses)).isfinite().all()
        assert method.weights.isfinite().all()
        assert (method.weights > 0).all()


def test_zero_gradients() -> None:
    method = GradNorm()
    for _ in range(3):
        assert method(torch.zeros(2, 2), losses=torch.ones(2)).tolist() == [1, 1]


# ---- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"optimizer": "adam"}, EPOCHS])
def test_a_fresh_object_resumes_bitwise(options: dict) -> None:
    """Also in the middle of an epoch."""
    data = steps(8)
    method, fresh = GradNorm(**options), GradNorm(**options)
    GradNorm(**options).load_state_dict(method.state_dict(), strict=True)  # also before the first step
    for jacobian, losses in data[:4]:
        method(jacobian @ jacobian.T, losses=losses)
    fresh.load_state_dict(method.state_dict(), strict=True)
    for jacobian, losses in data[4:]:
        a, b = (m(jacobian @ jacobian.T, losses=losses) for m in (method, fresh))
        assert torch.equal(a, b)
    assert_same_state(method, fresh)


def test_casting_the_model_keeps_the_state() -> None:
    method = GradNorm()
    for jacobian, losses in steps(3):
        method(jacobian @ jacobian.T, losses=losses)
    before = {name: x.clone() for name, x in method.state_dict().items()}
    torch.nn.ModuleList([method]).half()
    for name, x in method.state_dict().items():
        assert x.dtype == before[name].dtype
        assert torch.equal(x, before[name])


@pytest.mark.parametrize("where", ["gramian", "losses"])
@pytest.mark.parametrize("options", [{}, {"optimizer": "adam"}, EPOCHS])
def test_a_step_that_is_not_finite_moves_nothing(where: str, options: dict) -> None:
    method = GradNorm(**options)
    for jacobian, losses in steps(5):  # the next one would end an epoch
        method(jacobian @ jacobian.T, losses=losses)
    before = {name: x.clone() for name, x in method.state_dict().items()}
    gramian, losses = torch.eye(4, dtype=torch.float64), torch.ones(4)
    (gramian[0] if where == "gramian" else losses)[0] = math.inf
    assert method(gramian, losses=losses).isnan().all()
    for name, x in method.state_dict().items():
        assert torch.equal(x, before[name])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"lr": 0.0}, r"lr: expected a number in \(0, inf\), found 0.0"),
        ({"lr": math.nan}, "lr: .*nan"),
        ({"lr": math.inf}, "lr: .*inf"),
        ({"alpha": math.nan}, "alpha: .*nan"),
        ({"alpha": -1}, r"alpha: expected a number in \[0, inf\), found -1"),
        ({"optimizer": "lbfgs"}, "'lbfgs'"),
        ({"min_weight": 1.0}, "min_weight.*1.0"),
        ({"renormalize": "never"}, "renormalize: .*'never'"),
        ({"steps_per_epoch": 7}, "steps_per_epoch: 7 has no effect without renormalize='epoch'"),
        ({"renormalize": "epoch", "steps_per_epoch": 0}, "steps_per_epoch: expected at least 1, found 0"),
    ],
)
def test_errors(options: dict, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        GradNorm(**options)


def test_errors_of_a_call() -> None:
    with pytest.raises(RuntimeError, match=r"GradNorm.end_epoch: epochs end by themselves every 3 steps"):
        GradNorm(**EPOCHS).end_epoch()
    method = GradNorm()
    with pytest.raises(ValueError, match="GradNorm needs the values"):
        method(torch.eye(2))
    with pytest.raises(ValueError, match=r"losses: expected 2 tasks, found 3"):
        method(torch.eye(2), losses=torch.ones(3))
    with pytest.raises(ValueError, match="only one group of parameters, found 2"):
        method(torch.eye(2).expand(2, 2, 2), losses=torch.ones(2))
    assert method.weights.numel() == 0
