"""CRMOGM: the paper's recursion over the method's weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import fastmtl
from fastmtl import CRMOGM, MGDA, Amortized, GradientMethod, GradNorm, GradVac, PCGrad
from tests import nets
from tests.asserts import assert_same_state, assert_untouched
from tests.nets import assert_grads, task_gradients, weighted_sum


def gramian(*shape: int) -> Tensor:
    jacobian = torch.randn(*shape, 6, dtype=torch.float64)
    return jacobian @ jacobian.mT


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("num_tasks", [1, 2, 32])
def test_the_papers_recursion(num_tasks: int, alpha: float) -> None:
    method, average = CRMOGM(MGDA(), alpha), None
    for _ in range(6):
        m = gramian(num_tasks)
        new = MGDA()(m).tolist()
        average = new if average is None else [alpha * a + (1 - alpha) * x for a, x in zip(average, new, strict=True)]
        torch.testing.assert_close(method(m), torch.tensor(average, dtype=torch.float64))


def test_alpha_may_be_set_between_steps() -> None:
    method = CRMOGM(MGDA())
    first = method(gramian(3))
    method.alpha = 0.5
    m = gramian(3)
    torch.testing.assert_close(method(m), 0.5 * first + 0.5 * MGDA()(m))
    method.alpha = 1.5
    with assert_untouched(method), pytest.raises(ValueError, match=r"alpha: expected a number in \[0, 1\], found 1.5"):
        method(m)


def test_the_noise_of_the_weights_gets_less() -> None:
    """What the paper is about: with batches of noise around one problem, the weights' variance falls."""
    torch.manual_seed(1)
    truth = torch.randn(3, 6, dtype=torch.float64)
    alone, smooth = MGDA(), CRMOGM(MGDA(), 0.9)
    found: dict[str, list[Tensor]] = {"alone": [], "smooth": []}
    for _ in range(300):
        jacobian = truth + 0.5 * torch.randn_like(truth)
        found["alone"].append(alone(jacobian @ jacobian.T))
        found["smooth"].append(smooth(jacobian @ jacobian.T))
    variance = {name: torch.stack(w[50:]).var(0).sum() for name, w in found.items()}
    # of an average with decay a of independent values: (1 - a) / (1 + a) = 1/19
    assert variance["smooth"] < 0.15 * variance["alone"]


def test_absent_tasks_keep_what_they_had() -> None:
    method = CRMOGM(MGDA(), 0.5)
    first = method(gramian(3))
    m, mask = gramian(3), torch.tensor([True, False, True])
    m[1] = m[:, 1] = float("nan")
    found = method(m, mask=mask)
    assert found[1] == 0
    torch.testing.assert_close(found[mask], 0.5 * first[mask] + 0.5 * MGDA()(m, mask=mask)[mask])
    m = gramian(3)
    expected = 0.5 * torch.stack([found[0], first[1], found[2]]) + 0.5 * MGDA()(m)
    torch.testing.assert_close(method(m), expected)


def test_a_task_that_comes_later_starts_with_its_own() -> None:
    method = CRMOGM(MGDA(), 0.5)
    first = method(gramian(2), mask=torch.tensor([True, False]))
    assert first.tolist() == [1, 0]
    m = gramian(2)
    new = MGDA()(m)
    torch.testing.assert_close(method(m), torch.stack([0.5 + 0.5 * new[0], new[1]]))


def test_groups() -> None:
    together, apart = CRMOGM(MGDA()), [CRMOGM(MGDA()) for _ in range(3)]
    for _ in range(4):
        m = gramian(3, 5)
        torch.testing.assert_close(together(m), torch.stack([one(x) for one, x in zip(apart, m, strict=True)]))
    with pytest.raises(ValueError, match=r"weights: the state is of shape \[3, 5\], this step needs \[1, 5\]"):
        together(gramian(5))


def test_a_step_that_is_not_finite_leaves_no_trace() -> None:
    method, m = CRMOGM(GradVac()), gramian(3)
    method(gramian(3))
    with assert_untouched(method):
        assert method(m * float("nan")).isnan().all()
        assert method(torch.where(torch.eye(3) == 1, float("inf"), m)).isnan().all()


def test_evaluation_and_checkpoints() -> None:
    method = CRMOGM(GradVac(beta=0.3))
    with assert_untouched(method.eval()):
        method(gramian(4))
    method.train()
    for _ in range(3):
        method(gramian(4))
    other = CRMOGM(GradVac(beta=0.3))
    other.load_state_dict(method.state_dict())
    assert_same_state(method, other)
    m = gramian(4)
    with assert_untouched(method.eval()):
        expected = copy.deepcopy(method).train()(m)
        assert torch.equal(method(m), expected)
    for _ in range(3):
        m = gramian(4)
        assert torch.equal(method.train()(m), other(m))


@pytest.mark.parametrize("inner", [MGDA, PCGrad, lambda: GradNorm(lr=0.2), lambda: MGDA(normalization="loss")])
def test_in_training(inner: type[GradientMethod]) -> None:
    """The sum of the gradients by smoothed weights; heads and losses as the method wants them."""
    torch.manual_seed(0)
    method = CRMOGM(inner(), 0.6)
    torch.manual_seed(0)
    alone, average = inner(), None
    assert (method.needs_losses, method.scale_heads) == (alone.needs_losses, alone.scale_heads)
    assert method.single_group == alone.single_group
    model = nets.net("mlp")
    shared, heads = [*model.trunk.parameters()], [*model.heads.parameters()]
    for _ in range(3):
        model.zero_grad()
        losses = model.losses(torch.randn(4, 5, dtype=torch.float64))
        shared_rows, head_rows = task_gradients(losses, shared), task_gradients(losses, heads)
        out = fastmtl.backward(losses, method, model.trunk)
        assert out.gramian is not None
        new = alone(out.gramian, losses=torch.stack(losses).detach())
        average = new if average is None else 0.6 * average + 0.4 * new
        torch.testing.assert_close(out.weights, average)
        assert_grads(shared, weighted_sum(shared_rows, average), rtol=1e-9)
        factors = average if alone.scale_heads else torch.ones(3)
        assert_grads(heads, weighted_sum(head_rows, factors), rtol=1e-9)


def test_in_the_layer_and_amortized() -> None:
    surgery = fastmtl.FeatureSurgery(CRMOGM(MGDA(), 0.5), 2)
    expected = None
    for _ in range(3):
        z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        a, b = surgery(z)
        surgery.total([(a**2).sum(), (b - 1).abs().sum()]).backward()
        rows = torch.stack([2 * z.detach().flatten(), (z.detach() - 1).sign().flatten()])
        new = MGDA()(rows @ rows.T)
        expected = new if expected is None else 0.5 * expected + 0.5 * new
        torch.testing.assert_close(surgery.result.weights, expected)
    amortized = Amortized(CRMOGM(MGDA(), 0.5), update_every=2)
    first, second = amortized(gramian(3)), amortized(gramian(3))
    assert torch.equal(first, second)


@pytest.mark.parametrize("inner", [fastmtl.SDMGrad, fastmtl.MoDo])
def test_the_layer_refuses_what_it_refuses_alone(inner: type[GradientMethod]) -> None:
    """Features of different batches have no products, whoever asks for them."""
    alone = inner(2, scale_heads=False)
    for method in (CRMOGM(alone), Amortized(alone), Amortized(CRMOGM(alone))):
        with pytest.raises(ValueError, match=rf"{type(method).__name__}: needs the gradients of several batches"):
            fastmtl.FeatureSurgery(method, 6)


def test_errors() -> None:
    for method, message in (
        (MGDA, r"method: expected a gradient method .*construct it: MGDA\(\)"),
        (fastmtl.DWA(2), "method: expected a gradient method"),
        (Amortized(MGDA()), "method: Amortized wraps weights itself"),
        (CRMOGM(MGDA()), "method: CRMOGM wraps weights itself"),
    ):
        with pytest.raises(TypeError, match=message):
            CRMOGM(method)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"alpha: expected a number in \[0, 1\], found -0.1"):
        CRMOGM(MGDA(), -0.1)
    with pytest.raises(TypeError, match="alpha: expected a number, found '1'"):
        CRMOGM(MGDA(), "1")  # type: ignore[arg-type]
