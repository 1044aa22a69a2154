"""RandomGradWeights: which draws are used in which step. (The draws themselves: tests/test_random.py.)"""

from __future__ import annotations

import copy
import math

import pytest
import torch

import fastmtl
from fastmtl import RandomGradWeights
from fastmtl.random import DISTRIBUTIONS, random_weights
from tests import nets
from tests.asserts import assert_on_simplex, assert_same_state
from tests.nets import assert_grads, task_gradients, weighted_sum


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("num_tasks", [1, 2, 32, 512])
def test_weights_are_the_draws_of_seed_and_step(num_tasks: int, distribution: str) -> None:
    method = RandomGradWeights(distribution)
    seed = int(method.rng[0])
    gramian = torch.eye(num_tasks, dtype=torch.float64).expand(2, -1, -1)
    everyone = torch.ones(2, num_tasks, dtype=torch.bool)
    for step in range(3):
        weights = method(gramian)
        expected = random_weights(torch.tensor([seed, step]), everyone, distribution)
        torch.testing.assert_close(weights, expected, rtol=1e-14, atol=0)
        assert_on_simplex(weights)


def test_the_gradients_do_not_matter_nor_the_way_in() -> None:
    torch.manual_seed(0)
    method = RandomGradWeights()
    others = [copy.deepcopy(method) for _ in range(3)]
    model = nets.mlp()
    for _ in range(3):
        x = torch.randn(4, 5, dtype=torch.float64)
        losses = model.losses(x)
        rows = task_gradients(losses, model.trunk.parameters())
        model.zero_grad()
        out = fastmtl.backward(losses, method, model.trunk)
        assert out.gramian is None
        assert_grads(model.trunk.parameters(), weighted_sum(rows, out.weights))
        skipping = fastmtl.backward(model.losses(x), others[0], model.trunk, nonfinite="skip")
        assert skipping.gramian is not None
        collected = fastmtl.TaskGradients(model.trunk, 3)
        for t, loss in enumerate(model.losses(x)):
            collected.backward(t, loss, retain_graph=True)
        found = [skipping.weights, collected.combine(others[1]).weights, others[2](torch.eye(3))]
        for weights in found:
            assert torch.equal(weights, out.weights)
    for other in others:
        assert_same_state(method, other)


def test_a_resumed_run_draws_the_same() -> None:
    method, fresh = RandomGradWeights(), RandomGradWeights()
    gramian = torch.eye(4)
    assert not torch.equal(method(gramian), fresh(gramian))
    method(gramian)
    fresh.load_state_dict(method.state_dict())
    for _ in range(3):
        assert torch.equal(method(gramian), fresh(gramian))


def test_the_seed_is_drawn_at_construction_only() -> None:
    generator = torch.Generator().manual_seed(3)
    a = RandomGradWeights(generator=generator)
    b = RandomGradWeights(generator=generator)
    c = RandomGradWeights(generator=torch.Generator().manual_seed(3))
    assert torch.equal(a.rng, c.rng)
    assert not torch.equal(a.rng, b.rng)
    before = torch.get_rng_state()
    a(torch.eye(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_that_is_not_finite_does_not_advance() -> None:
    method, gramian = RandomGradWeights(), torch.eye(3)
    gramian[0, 0] = math.nan
    assert method(gramian).isnan().all()
    assert method.rng[1] == 0


def test_evaluation_does_not_advance() -> None:
    method, model = RandomGradWeights().eval(), nets.mlp()
    for _ in range(2):
        fastmtl.backward(model.losses(torch.randn(4, 5, dtype=torch.float64)), method, model.trunk)
        method(torch.eye(3))
    assert method.rng[1] == 0


def test_an_error_does_not_advance() -> None:
    method, model = RandomGradWeights(), nets.mlp()
    with pytest.raises(ValueError, match="no loss reaches"):
        fastmtl.backward(model.losses(torch.randn(4, 5, dtype=torch.float64)), method, torch.nn.Linear(2, 2))
    assert method.rng[1] == 0


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"distribution.*'cauchy'"):
        RandomGradWeights("cauchy")
    with pytest.raises(TypeError, match="generator"):
        RandomGradWeights(generator=3)  # type: ignore[arg-type]
