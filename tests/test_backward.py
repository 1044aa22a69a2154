"""Parameter level: ``.grad`` against separate float64 autograd calls, and what happens when something is wrong."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmtl
from fastmtl import MGDA, GradNorm, GradVac, PCGrad, UncertaintyWeighting
from tests import nets
from tests.asserts import assert_on_simplex, assert_same_state, assert_untouched
from tests.nets import assert_grads, jacobian_of, task_gradients, weighted_sum

METHODS: dict[str, Callable[[], fastmtl.GradientMethod]] = {
    "PCGrad": PCGrad,
    "GradVac": GradVac,
    "MGDA": MGDA,
    "GradNorm": lambda: GradNorm(scale_heads=False),
}
STATEFUL = ["PCGrad", "GradVac", "GradNorm"]


def inputs(rows: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 5, dtype=dtype)


def ones(n: int) -> list[float]:
    return [1.0] * n


class Fixed(fastmtl.GradientMethod):
    """Weights known beforehand, so that the test knows what must come out."""

    def __init__(self, weights: list, scale_heads: bool = False) -> None:
        super().__init__()
        self.fixed = torch.tensor(weights, dtype=torch.float64)
        self.scale_heads = scale_heads
        self.register_state("calls")

    def solve(self, step: fastmtl.Step) -> Tensor:
        calls = self.state("calls", step.gramian, (1,), 0.0)
        step.commit(calls, calls + 1)
        weights = self.fixed.expand(step.gramian.shape[:2])
        return torch.where(step.present, weights, 0.0)


# ---- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filler", ["grad", "backward", "auto"])
@pytest.mark.parametrize("method", METHODS)
def test_shared_gradients_are_the_weighted_sum_and_heads_plain(method: str, filler: str) -> None:
    model = nets.mlp()
    losses = model.losses(inputs())
    shared = task_gradients(losses, model.trunk.parameters())
    heads = task_gradients(losses, model.heads.parameters())
    jacobian = jacobian_of(shared, model.trunk.parameters())
    out = fastmtl.backward(losses, METHODS[method](), model.trunk, filler=filler)
    torch.testing.assert_close(out.gramian, jacobian @ jacobian.T, rtol=1e-12, atol=0)
    assert_grads(model.trunk.parameters(), weighted_sum(shared, out.weights))
    assert_grads(model.heads.parameters(), weighted_sum(heads, ones(3)))
    assert all(a is p.grad for a, p in zip(out.grads, model.trunk.parameters(), strict=True))
    assert out.weights.shape == (3,)


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_those_of_the_method_on_the_gramian(method: str) -> None:
    model, make = nets.mlp(), METHODS[method]
    torch.manual_seed(5)
    one = make()
    torch.manual_seed(5)
    other = make()
    losses = model.losses(inputs())
    jacobian = jacobian_of(task_gradients(losses, model.trunk.parameters()), model.trunk.parameters())
    out = fastmtl.backward(losses, one, model.trunk)
    expected = other(jacobian @ jacobian.T, losses=torch.stack(losses))
    torch.testing.assert_close(out.weights, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("trunk", list(nets.TRUNKS))
def test_trunks_of_every_kind(trunk: str) -> None:
    model = nets.net(trunk)
    state, x = copy.deepcopy(model.state_dict()), inputs()
    out = fastmtl.backward(model.losses(x), MGDA(), model.trunk)
    model.load_state_dict(state)
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p.grad = None
    if trunk == "reentrant":
        twin.trunk.use_reentrant = False
    losses = twin.losses(x)
    shared = task_gradients(losses, twin.trunk.parameters())
    assert_on_simplex(out.weights)
    assert_grads(model.trunk.parameters(), weighted_sum(shared, out.weights))
    assert_grads(model.heads.parameters(), weighted_sum(task_gradients(losses, twin.heads.parameters()), ones(3)))


def test_reentrant_checkpointing_needs_the_backward_filler() -> None:
    """Why ``filler="auto"`` looks at the graph: the other filler finds nothing."""
    model = nets.net("reentrant")
    out = fastmtl.backward(model.losses(inputs()), MGDA(), model.trunk)
    assert (out.gramian.diagonal() > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    model = nets.mlp(dtype=dtype)
    losses = model.losses(inputs(dtype=dtype))
    shared = task_gradients(losses, model.trunk.parameters())
    out = fastmtl.backward(losses, MGDA(), model.trunk)
    expected = weighted_sum([[g.double() for g in task] for task in shared], out.weights)
    for p, e in zip(model.trunk.parameters(), expected, strict=True):
        assert p.grad.dtype == dtype
        torch.testing.assert_close(p.grad.double(), e, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_with_weights_1_it_is_the_sum_of_the_losses_backward() -> None:
    model, x = nets.mlp(), inputs()
    fastmtl.backward(model.losses(x), Fixed(ones(3)), model.trunk)
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    sum(model.losses(x)).backward()
    assert_grads(model.parameters(), found)


def test_losses_as_a_tensor_of_one_graph() -> None:
    x = nn.Parameter(torch.ones(3))
    jacobian = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    out = fastmtl.backward(jacobian @ x, MGDA(), [x])
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 1.0, 1.0]))
    torch.testing.assert_close(out.weights, torch.tensor([0.6, 0.4], dtype=torch.float64))


def test_every_leaf_gets_what_loss_backward_gives_it() -> None:
    """Inputs that require a gradient, parameters in no module, a loss that is a leaf."""
    model = nets.mlp()
    x, temperature = inputs().requires_grad_(), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    a, b, c = model.losses(x)
    losses = [a * temperature, b, c + temperature, temperature]
    others = [x, temperature, *model.heads.parameters()]
    expected = weighted_sum(task_gradients(losses, others), ones(4))
    fastmtl.backward(losses, MGDA(), model.trunk)
    assert_grads(others, expected)


# ---- accumulation, absent tasks, tasks that miss a group -------------------------------------------------------------


@pytest.mark.parametrize("filler", ["grad", "backward"])
def test_adds_to_existing_gradients_in_place(filler: str) -> None:
    model = nets.mlp()
    before = [torch.randn_like(p) for p in model.parameters()]
    for p, g in zip(model.parameters(), before, strict=True):
        p.grad = g.clone()
    some = next(model.trunk.parameters())
    some.grad = torch.randn(some.shape[::-1], dtype=some.dtype).T  # of other strides than the parameter
    before[0] = some.grad.clone()
    kept = [p.grad for p in model.parameters()]
    losses = model.losses(inputs())
    shared = task_gradients(losses, model.trunk.parameters())
    heads = task_gradients(losses, model.heads.parameters())
    out = fastmtl.backward(losses, PCGrad(), model.trunk, filler=filler)
    added = weighted_sum(shared, out.weights) + weighted_sum(heads, ones(3))
    assert_grads(model.parameters(), [b + a for b, a in zip(before, added, strict=True)])
    assert all(p.grad is g for p, g in zip(model.parameters(), kept, strict=True))


def test_new_gradients_have_the_parameters_strides() -> None:
    model = nets.net("conv_batchnorm").to(memory_format=torch.channels_last)
    fastmtl.backward(model.losses(inputs()), MGDA(), model.trunk)
    assert all(p.grad.stride() == p.stride() for p in model.parameters())
    x = nn.Parameter(torch.randn(3, 4))
    losses = [(x.t() * y).sum() for y in torch.randn(2, 4, 3)]
    assert torch.autograd.grad(losses[0], x, retain_graph=True)[0].stride() == (1, 3)  # or this would test nothing
    fastmtl.backward(losses, MGDA(), [x])
    assert x.grad.stride() == (4, 1)


@pytest.mark.parametrize("filler", ["grad", "backward"])
@pytest.mark.parametrize("method", METHODS)
def test_absent_tasks(method: str, filler: str) -> None:
    """They get weight 0 and the others what they would get alone; the parameters of their heads stay without."""
    model, make = nets.mlp(4), METHODS[method]
    a, _, c, d = model.losses(inputs())
    torch.manual_seed(5)
    first = make()
    torch.manual_seed(5)
    second = make()
    losses = [a, None, c, d]
    shared = task_gradients(losses, model.trunk.parameters())
    heads = task_gradients(losses, model.heads.parameters())
    out = fastmtl.backward(losses, first, model.trunk, filler=filler, retain_graph=True)
    assert out.weights[1] == 0
    assert_grads(model.trunk.parameters(), weighted_sum(shared, out.weights))
    assert_grads(model.heads.parameters(), weighted_sum(heads, ones(4)))
    if method in ("MGDA", "GradNorm"):  # no random order that depends on T
        model.zero_grad()
        alone = fastmtl.backward([a, c, d], second, model.trunk)
        torch.testing.assert_close(out.weights[[0, 2, 3]], alone.weights)


def test_absent_is_not_zero() -> None:
    """A task that is there with a zero gradient is a vertex for the min-norm point."""
    model = nets.mlp(3)
    a, b, _ = model.losses(inputs())
    zero = model.heads[2].weight.sum() + 0.0 * sum(p.sum() for p in model.trunk.parameters())
    present = fastmtl.backward([a, b, zero], MGDA(), model.trunk, retain_graph=True)
    torch.testing.assert_close(present.weights, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    absent = fastmtl.backward([a, b, None], MGDA(), model.trunk)
    assert absent.weights[2] == 0
    assert_on_simplex(absent.weights[:2])


def test_a_task_that_reaches_no_shared_parameter_has_weight_0_and_its_head_trains() -> None:
    model = nets.mlp(3)
    a, b, _ = model.losses(inputs())
    alone = model.heads[2].weight.sum() * 3
    for make in METHODS.values():
        model.zero_grad()
        out = fastmtl.backward([a, b, alone], make(), model.trunk, retain_graph=True)
        assert out.weights[2] == 0
        assert (model.heads[2].weight.grad == 3).all()
        assert out.weights[:2].isfinite().all()


@pytest.mark.parametrize("argument", ["shared_params", "gramian_params"])
def test_parameters_of_another_model_are_refused(argument: str) -> None:
    """They would go without gradients, and the real trunk would count as heads."""
    model = nets.mlp(2)
    other = copy.deepcopy(model)
    arguments = {"shared_params": model.trunk, argument: other.trunk}
    with pytest.raises(ValueError, match=f"{argument}: no loss reaches"):
        fastmtl.backward(model.losses(inputs()), MGDA(), **arguments)
    assert all(p.grad is None for m in (model, other) for p in m.parameters())


def test_options_that_a_loss_weighting_cannot_honour_are_refused() -> None:
    model = nets.mlp(2)
    for option in ({"max_norm": 1.0}, {"nonfinite": "skip"}, {"gramian_params": model.trunk}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}: UncertaintyWeighting is a loss weighting"):
            fastmtl.backward(model.losses(inputs()), fastmtl.UncertaintyWeighting(2), model.trunk, **option)


def test_discovery_starts_anew_for_another_number_of_tasks() -> None:
    model = nets.mlp(3)
    early = lambda: model.trunk[0](inputs()).pow(2).mean()  # noqa: E731
    fastmtl.backward([model.losses(inputs())[0], early()], MGDA(), model=model)  # shares the first layer only
    out = fastmtl.backward([*model.losses(inputs())[:2], early()], MGDA(), model=model)
    assert len(out.grads) == len(list(model.trunk.parameters()))


def test_a_failing_head_leaves_shared_grads_alone() -> None:
    model = nets.mlp(2)
    model.heads[0].weight.grad = torch.zeros_like(model.heads[0].weight).to_sparse()
    before = model.heads[0].weight.grad
    with pytest.raises(TypeError, match="sparse"):
        fastmtl.backward(model.losses(inputs()), MGDA(), model.trunk)
    assert all(p.grad is None for p in model.trunk.parameters())
    assert model.heads[0].weight.grad is before


def test_a_task_that_misses_the_trunk_still_trains_its_own_head() -> None:
    model = nets.mlp(3)
    losses = [*model.losses(inputs())[:2], (model.heads[2].weight * 3).sum()]
    fastmtl.backward(losses, fastmtl.GradNorm(), model.trunk)
    assert (model.heads[2].weight.grad == 3).all()


@pytest.mark.parametrize("filler", ["grad", "backward"])
def test_parameters_that_no_task_reaches_keep_none(filler: str) -> None:
    model = nets.mlp()
    model.trunk.unused = nn.Linear(2, 2).double()
    losses = [((h(model.trunk[:3](x)) - 1) ** 2).mean() for h, x in zip(model.heads, inputs(3), strict=True)]
    out = fastmtl.backward(losses, PCGrad(), model.trunk, filler=filler)
    assert [g is None for g in out.grads] == [False] * 4 + [True] * 2
    assert model.trunk.unused.weight.grad is None


def test_a_task_that_misses_a_group_has_weight_0_there() -> None:
    model = nets.mlp(3)
    a, b, _ = model.losses(inputs())
    early = model.trunk[0](inputs()).pow(2).mean()  # reaches the first layer only
    losses = [a, b, early]
    shared = task_gradients(losses, model.trunk.parameters())
    out = fastmtl.backward(losses, MGDA(), model.trunk, groups="layer")
    assert out.weights[1, 2] == 0
    assert out.weights[0, 2] > 0
    assert_on_simplex(out.weights)
    expected = weighted_sum([s[:2] for s in shared], out.weights[0]) + weighted_sum(
        [s[2:] for s in shared], out.weights[1]
    )
    assert_grads(model.trunk.parameters(), expected)


# ---- shared parameters, groups ---------------------------------------------------------------------------------------


def test_shared_params_as_module_names_and_tensors() -> None:
    model = nets.mlp()
    losses, found = model.losses(inputs()), []
    for params in (model.trunk, "trunk", ["trunk.0", "trunk.2"], model.trunk.parameters()):
        model.zero_grad()
        fastmtl.backward(losses, MGDA(), params, model=model, retain_graph=True)
        found.append([p.grad for p in model.parameters()])
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


def test_shared_parameters_are_found() -> None:
    model = nets.mlp()
    losses = model.losses(inputs())
    fastmtl.backward(losses, MGDA(), model.trunk, retain_graph=True)
    expected = [p.grad for p in model.parameters()]
    for _ in range(3):
        model.zero_grad()
        out = fastmtl.backward(losses, MGDA(), model=model, retain_graph=True)
        assert len(out.grads) == 4
        assert_grads(model.parameters(), expected, rtol=1e-14)


def test_discovery_with_absent_tasks_is_not_remembered() -> None:
    """Task 1 reaches the second layer only together with task 2: without it, that layer looks like a head."""
    model = nets.mlp(3)

    def losses(x: Tensor) -> list[Tensor]:
        early, late = model.trunk[0](x), model.trunk(x)
        return [early.pow(2).mean(), (model.heads[1](late) - 1).pow(2).mean(), (model.heads[2](late) + 1).pow(2).mean()]

    a, b, c = losses(inputs())
    assert len(fastmtl.backward([a, b, None], MGDA(), model=model, retain_graph=True).grads) == 2
    assert len(fastmtl.backward([a, b, c], MGDA(), model=model, retain_graph=True).grads) == 4
    assert len(fastmtl.backward([a, b, None], MGDA(), model=model).grads) == 4


def test_discovery_follows_freezing_and_unfreezing() -> None:
    model = nets.mlp(2)
    model.trunk[0].requires_grad_(False)
    for frozen, shared in ((True, 2), (False, 4), (True, 2)):
        model.trunk[0].requires_grad_(not frozen)
        model.zero_grad()
        losses = model.losses(inputs())
        gradients = task_gradients(losses, [p for p in model.trunk.parameters() if p.requires_grad])
        out = fastmtl.backward(losses, MGDA(), model=model)
        assert len(out.grads) == shared
        for found, expected in zip(out.grads, weighted_sum(gradients, out.weights), strict=True):
            torch.testing.assert_close(found, expected)


def test_discovery_keeps_no_model_alive() -> None:
    model = nets.mlp(2)
    fastmtl.backward(model.losses(inputs()), MGDA(), model=model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_nothing_to_share() -> None:
    model = nets.mlp(2)
    losses = [h.weight.sum() for h in model.heads]
    with assert_untouched(model), pytest.raises(ValueError, match="nothing to share"):
        fastmtl.backward(losses, MGDA(), model=model)
    with pytest.raises(ValueError, match="shared_params: missing"):
        fastmtl.backward(losses, MGDA())


def test_groups_are_solved_apart() -> None:
    model = nets.mlp()
    x = inputs()
    for groups, members in (
        ("layer", [[0, 1], [2, 3]]),
        ("tensor", [[0], [1], [2], [3]]),
        (["trunk.2", "trunk.0"], [[2, 3], [0, 1]]),
        ([[model.trunk[0].weight, model.trunk[2]], [model.trunk[0].bias]], [[0, 2, 3], [1]]),
    ):
        model.zero_grad()
        losses = model.losses(x)
        params = [*model.trunk.parameters()]
        shared = task_gradients(losses, params)
        out = fastmtl.backward(losses, MGDA(), model.trunk, model=model, groups=groups)
        assert out.weights.shape == (len(members), 3)
        for k, group in enumerate(members):
            jacobian = jacobian_of([[s[p] for p in group] for s in shared], [params[p] for p in group])
            torch.testing.assert_close(out.gramian[k], jacobian @ jacobian.T, rtol=1e-12, atol=0)
            torch.testing.assert_close(out.weights[k], MGDA()(jacobian @ jacobian.T), rtol=1e-9, atol=1e-12)
            expected = weighted_sum([[s[p] for p in group] for s in shared], out.weights[k])
            assert_grads([params[p] for p in group], expected)


def test_one_group_named_all_is_no_group() -> None:
    model = nets.mlp()
    out = fastmtl.backward(model.losses(inputs()), MGDA(), model.trunk, groups="all")
    assert out.weights.shape == (3,)


# ---- scale_heads, rescale, max_norm, retain_graph --------------------------------------------------------------------


@pytest.mark.parametrize("filler", ["grad", "backward"])
def test_scale_heads(filler: str) -> None:
    model, weights = nets.mlp(), [0.5, 2.0, -1.0]
    losses = model.losses(inputs())
    everything = task_gradients(losses, model.parameters())
    out = fastmtl.backward(losses, Fixed(weights, scale_heads=True), model.trunk, filler=filler)
    assert out.weights.tolist() == weights
    assert_grads(model.parameters(), weighted_sum(everything, weights))


def test_scale_heads_knows_one_group_only() -> None:
    model = nets.mlp()
    method = Fixed(ones(3), scale_heads=True)
    with (
        assert_untouched(model, method),
        pytest.raises(ValueError, match="Fixed: scale_heads needs one group, found 2"),
    ):
        fastmtl.backward(model.losses(inputs()), method, model.trunk, groups="layer")


@pytest.mark.parametrize(("rescale", "total"), [("sum_to_num_tasks", 3.0), ("sum_to_one", 1.0)])
def test_rescale(rescale: str, total: float) -> None:
    model = nets.mlp()
    losses = model.losses(inputs())
    torch.manual_seed(3)
    plain = fastmtl.backward(losses, PCGrad(), model.trunk, retain_graph=True).weights
    model.zero_grad()
    torch.manual_seed(3)
    shared = task_gradients(losses, model.trunk.parameters())
    out = fastmtl.backward(losses, PCGrad(rescale=rescale), model.trunk)
    torch.testing.assert_close(out.weights, plain * (total / plain.sum()))
    assert_grads(model.trunk.parameters(), weighted_sum(shared, out.weights))


def test_rescale_counts_present_tasks_only() -> None:
    model = nets.mlp()
    a, _, c = model.losses(inputs())
    out = fastmtl.backward([a, None, c], MGDA(rescale="sum_to_num_tasks"), model.trunk)
    torch.testing.assert_close(out.weights.sum(), torch.tensor(2.0, dtype=torch.float64))


@pytest.mark.parametrize("groups", [None, "layer"])
def test_max_norm(groups: str | None) -> None:
    """As ``clip_grad_norm_`` on this step's shared gradient."""
    model, x = nets.mlp(), inputs()
    fastmtl.backward(model.losses(x), MGDA(), model.trunk, groups=groups)
    full = torch.cat([p.grad.flatten() for p in model.trunk.parameters()])
    heads = [p.grad.clone() for p in model.heads.parameters()]
    for factor in (0.3, 0.999, 1.001, 50.0):
        model.zero_grad()
        fastmtl.backward(model.losses(x), MGDA(), model.trunk, groups=groups, max_norm=float(full.norm()) * factor)
        found = torch.cat([p.grad.flatten() for p in model.trunk.parameters()])
        torch.testing.assert_close(found, full * min(1.0, factor))
        assert_grads(model.heads.parameters(), heads)


def test_max_norm_bounds_nearly_opposed_gradients_in_low_precision() -> None:
    """The squared norm from the Gramian cancels; rounding must not let the result exceed the bound."""
    for gap in (1e-2, 1e-4, 1e-6):
        x = nn.Parameter(torch.zeros(1000))
        a = torch.randn(1000)
        losses = torch.stack([a, -a + gap * torch.randn(1000)]) @ x
        fastmtl.backward(losses, Fixed(ones(2)), [x], max_norm=1e-3)
        assert float(x.grad.norm()) <= 1e-3 * (1 + 1e-2)


def test_max_norm_of_a_zero_gradient_is_no_division_by_zero() -> None:
    x = nn.Parameter(torch.zeros(3))
    fastmtl.backward(torch.zeros(2, 3) @ x, Fixed(ones(2)), [x], max_norm=1.0)
    assert torch.equal(x.grad, torch.zeros(3))


@pytest.mark.parametrize("kind", [PCGrad, lambda: UncertaintyWeighting(3), "lean"])
def test_the_graph_is_freed_unless_retained(kind: object) -> None:
    model = nets.mlp()
    losses = model.losses(inputs())
    method = MGDA() if kind == "lean" else kind()  # type: ignore[operator]
    more = {"gramian_params": model.trunk[2]} if kind == "lean" else {}
    fastmtl.backward(losses, method, model.trunk, retain_graph=True, **more)
    first = [p.grad.clone() for p in model.heads.parameters()]
    fastmtl.backward(losses, method, model.trunk, **more)
    assert_grads(model.heads.parameters(), [2 * g for g in first])
    with assert_untouched(model), pytest.raises(RuntimeError, match="its graph was freed"):
        fastmtl.backward(losses, method, model.trunk, **more)


def test_grad_filler_fires_no_hooks_and_both_leave_strangers_alone() -> None:
    model = nets.mlp()
    calls = []
    for p in model.trunk.parameters():
        p.register_post_accumulate_grad_hook(lambda p: calls.append(p))
    fastmtl.backward(model.losses(inputs()), PCGrad(), model.trunk, filler="grad")
    assert not calls
    fastmtl.backward(model.losses(inputs()), PCGrad(), model.trunk, filler="backward")
    assert calls


# ---- gramian_params --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filler", ["grad", "backward"])
@pytest.mark.parametrize("method", [*METHODS, "GradNorm, heads too"])
def test_gramian_on_the_shared_parameters_themselves_changes_nothing(method: str, filler: str) -> None:
    model, x = nets.mlp(), inputs()
    make = METHODS.get(method, GradNorm)
    found = []
    for more in ({}, {"gramian_params": model.trunk}):
        torch.manual_seed(5)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        out = fastmtl.backward(model.losses(x), make(), model.trunk, filler=filler, **more)
        found.append([out.weights, out.gramian, *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("filler", ["grad", "backward"])
def test_gramian_on_the_last_shared_layer(filler: str) -> None:
    model = nets.mlp()
    last = [*model.trunk[2].parameters()]
    losses = model.losses(inputs())
    jacobian = jacobian_of(task_gradients(losses, last), last)
    shared = task_gradients(losses, model.trunk.parameters())
    heads = task_gradients(losses, model.heads.parameters())
    out = fastmtl.backward(losses, MGDA(), model.trunk, gramian_params=model.trunk[2], filler=filler)
    torch.testing.assert_close(out.gramian, jacobian @ jacobian.T, rtol=1e-12, atol=0)
    torch.testing.assert_close(out.weights, MGDA()(jacobian @ jacobian.T))
    assert_grads(model.trunk.parameters(), weighted_sum(shared, out.weights), rtol=1e-10)
    assert_grads(model.heads.parameters(), weighted_sum(heads, ones(3)), rtol=1e-10)


def test_gramian_params_with_absent_tasks() -> None:
    model = nets.mlp()
    a, _, c = model.losses(inputs())
    losses = [a, None, c]
    shared = task_gradients(losses, model.trunk.parameters())
    out = fastmtl.backward(losses, MGDA(), model.trunk, gramian_params=model.trunk[2])
    assert out.weights[1] == 0
    assert_grads(model.trunk.parameters(), weighted_sum(shared, out.weights), rtol=1e-10)
    assert model.heads[1].weight.grad is None


def test_gramian_params_must_know_the_heads_unless_they_are_scaled_too() -> None:
    """Or they would pass for shared, and be weighted."""
    model = nets.mlp()
    more = {"model": model, "gramian_params": model.trunk[2]}
    losses = model.losses(inputs())
    with assert_untouched(model), pytest.raises(ValueError, match="gramian_params: pass shared_params="):
        fastmtl.backward(losses, MGDA(), **more)
    everything = task_gradients(losses, model.parameters())
    out = fastmtl.backward(losses, Fixed([0.5, 2.0, -1.0], scale_heads=True), retain_graph=True, **more)
    assert_grads(model.parameters(), weighted_sum(everything, out.weights))
    model.zero_grad()
    fastmtl.backward(losses, MGDA(), model=model, retain_graph=True)  # finds them
    model.zero_grad()
    fastmtl.backward(losses, MGDA(), **more)
    assert_grads(model.heads.parameters(), weighted_sum([e[4:] for e in everything], ones(3)))


def test_gramian_params_know_one_group_only() -> None:
    model = nets.mlp()
    with pytest.raises(ValueError, match="gramian_params"):
        fastmtl.backward(model.losses(inputs()), MGDA(), model.trunk, gramian_params=model.trunk[2], groups="layer")


# ---- loss weightings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filler", ["grad", "backward"])
@pytest.mark.parametrize("absent", [None, 1])
def test_a_loss_weighting_as_method_is_its_scalar_backward(filler: str, absent: int | None) -> None:
    model, x = nets.mlp(), inputs()
    weighting = UncertaintyWeighting(3, ["regression", "classification", "regression"], init=0.3)

    def losses() -> list[Tensor | None]:
        return [None if t == absent else loss for t, loss in enumerate(model.losses(x))]

    weighting(losses()).backward()
    params = [*model.parameters(), *weighting.parameters()]
    expected = [None if p.grad is None else p.grad.clone() for p in params]
    for p in params:
        p.grad = None
    out = fastmtl.backward(losses(), weighting, model.trunk, filler=filler)
    assert_grads(params, expected, rtol=1e-6)  # s is float32
    assert out.gramian is None
    assert out.weights.shape == (3,)
    slopes = torch.exp(-torch.tensor(0.3)) * torch.tensor([0.5, 1.0, 0.5])
    if absent is not None:
        slopes[absent] = 0
    torch.testing.assert_close(out.weights, slopes.double(), rtol=1e-6, atol=0)


# ---- scaler ----------------------------------------------------------------------------------------------------------


def train(method: fastmtl.GradientMethod, scale: float | None, **more: Any) -> tuple:
    """Weights, Gramians and (unscaled) gradients of some steps, and the method afterwards."""
    torch.manual_seed(1)
    model = nets.mlp()
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = []
    for _ in range(3):
        optimizer.zero_grad()
        losses = model.losses(inputs())
        out = fastmtl.backward(losses, method, "trunk", model=model, scaler=scaler, **more)
        grads = [p.grad / (scale or 1.0) for p in model.parameters()]
        history.append((out.weights, out.gramian, *grads))
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    return history, method


@pytest.mark.parametrize("more", [{}, {"filler": "backward"}, {"max_norm": 0.05}, {"gramian_params": "trunk.2"}])
@pytest.mark.parametrize("method", [*METHODS, "GradNorm, heads too"])
def test_no_method_sees_the_scale(method: str, more: dict) -> None:
    make = METHODS.get(method, GradNorm)
    runs = []
    for scale in (None, 1.0, 2.0**16):
        torch.manual_seed(5)
        runs.append(train(make(), scale, **more))
    (expected, reference), *others = runs
    for history, state in others:
        for found_step, step in zip(history, expected, strict=True):
            for a, b in zip(found_step, step, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        for a, b in zip(state.state_dict().values(), reference.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_loss_weighting_and_its_own_parameters_are_scaled_too() -> None:
    model, x = nets.mlp(), inputs()
    weighting = UncertaintyWeighting(3)
    params = [*model.parameters(), *weighting.parameters()]
    fastmtl.backward(model.losses(x), weighting, model.trunk)
    expected = [p.grad * 1024 for p in params]
    for p in params:
        p.grad = None
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    fastmtl.backward(model.losses(x), weighting, model.trunk, scaler=scaler)
    assert_grads(params, expected, rtol=1e-6)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("method", STATEFUL)
def test_an_overflow_leaves_the_state_alone_and_training_recovers(method: str, lean: bool) -> None:
    model = nets.mlp(dtype=torch.float32)
    solver, optimizer = METHODS[method](), torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    more = {"gramian_params": model.trunk[2]} if lean else {}

    def step(overflow: bool) -> fastmtl.Result:
        optimizer.zero_grad()
        losses = model.losses(inputs(dtype=torch.float32))
        if overflow:
            losses[1] = losses[1] * 3e38
        out = fastmtl.backward(losses, solver, model.trunk, scaler=scaler, **more)
        scaler.step(optimizer)
        scaler.update()
        return out

    step(False)
    values = [p.detach().clone() for p in model.parameters()]
    before = {name: x.clone() for name, x in solver.state_dict().items()}
    out = step(True)
    assert out.weights.isnan().all()
    assert scaler.get_scale() == 2.0**9
    assert all(map(torch.equal, model.parameters(), values))
    for name, x in solver.state_dict().items():
        assert torch.equal(x, before[name]), name
    assert step(False).weights.isfinite().all()
    assert any(not torch.equal(x, before[name]) for name, x in solver.state_dict().items())


@pytest.mark.parametrize("method", STATEFUL)
def test_an_overflow_in_the_very_first_step(method: str) -> None:
    """State that starts with the first step starts with the first finite one."""
    torch.manual_seed(5)
    hurt = METHODS[method]()
    torch.manual_seed(5)
    spared = METHODS[method]()
    for solver, bad in ((hurt, True), (spared, False)):
        torch.manual_seed(2)
        model, x = nets.mlp(), inputs()
        if bad:
            losses = model.losses(x)
            fastmtl.backward([losses[0] * math.inf, *losses[1:]], solver, model.trunk)
        fastmtl.backward(model.losses(x), solver, model.trunk)
    assert_same_state(hurt, spared)


def test_scaler_and_policies_that_hide_overflows_exclude_each_other() -> None:
    model = nets.mlp()
    for policy in ("skip", "drop_task", "raise"):
        with assert_untouched(model), pytest.raises(ValueError, match=f"nonfinite='{policy}' would hide overflows"):
            fastmtl.backward(
                model.losses(inputs()), MGDA(), model.trunk, scaler=torch.amp.GradScaler("cpu"), nonfinite=policy
            )


# ---- nonfinite -------------------------------------------------------------------------------------------------------


def broken(model: nets.Net, how: str) -> list[Tensor]:
    """Losses of which the second has a gradient that is not finite, or only a value."""
    losses = model.losses(inputs())
    if how == "gradient":
        losses[1] = losses[1] * math.nan
    else:
        losses[1] = losses[1] + math.inf
    return losses


def test_propagate() -> None:
    for make in METHODS.values():
        model = nets.mlp()
        out = fastmtl.backward(broken(model, "gradient"), make(), model.trunk)
        assert out.weights.isnan().all()
        assert all(p.grad.isnan().all() for p in model.trunk.parameters())


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("how", ["gradient", "value"])
@pytest.mark.parametrize("method", METHODS)
def test_drop_task(method: str, how: str, lean: bool) -> None:
    """As if the task were absent: for the weights, for the trunk, and for the heads."""
    model = nets.mlp()
    more = {"gramian_params": model.trunk[2]} if lean else {}
    torch.manual_seed(5)
    a, b, c = broken(model, how)
    shared = task_gradients([a, None, c], model.trunk.parameters())
    out = fastmtl.backward([a, b, c], METHODS[method](), model.trunk, nonfinite="drop_task", **more)
    assert out.weights[1] == 0
    assert out.weights[[0, 2]].isfinite().all()
    assert_grads(model.trunk.parameters(), weighted_sum(shared, out.weights), rtol=1e-10)
    assert all((p.grad is None or (p.grad == 0).all()) for p in model.heads[1].parameters())
    assert all(p.grad.isfinite().all() and (p.grad != 0).any() for t in (0, 2) for p in model.heads[t].parameters())


def test_drop_task_where_all_are_broken() -> None:
    model = nets.mlp()
    losses = [x * math.nan for x in model.losses(inputs())]
    out = fastmtl.backward(losses, MGDA(), model.trunk, nonfinite="drop_task")
    assert out.weights.tolist() == [0, 0, 0]
    assert all((p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("how", ["gradient", "value"])
@pytest.mark.parametrize("method", METHODS)
def test_skip_and_raise_change_nothing(method: str, how: str, lean: bool) -> None:
    model, solver = nets.mlp(), METHODS[method]()
    more = {"gramian_params": model.trunk[2]} if lean else {}
    fastmtl.backward(model.losses(inputs()), solver, model.trunk)
    with assert_untouched(model, solver):
        out = fastmtl.backward(broken(model, how), solver, model.trunk, nonfinite="skip", **more)
        assert out.weights.tolist() == [0, 0, 0]
        losses = dict(zip(["depth", "normals", "seg"], broken(model, how), strict=True))
        with pytest.raises(FloatingPointError, match=r"not finite: normals$"):
            fastmtl.backward(losses, solver, model.trunk, nonfinite="raise", **more)


@pytest.mark.parametrize("policy", ["skip", "drop_task", "raise"])
def test_policies_do_not_disturb_finite_steps(policy: str) -> None:
    model, x = nets.mlp(), inputs()
    plain = fastmtl.backward(model.losses(x), MGDA(), model.trunk)
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    out = fastmtl.backward(model.losses(x), MGDA(), model.trunk, nonfinite=policy)
    assert torch.equal(out.weights, plain.weights)
    assert_grads(model.parameters(), expected, rtol=1e-14)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "error"),
    [
        ({"method": MGDA}, TypeError, "construct it"),
        ({"method": "mgda"}, TypeError, "expected a fastmtl method"),
        ({"filler": "magic"}, ValueError, "'magic'"),
        ({"max_norm": 0.0}, ValueError, "max_norm.*0.0"),
        ({"max_norm": math.nan}, ValueError, "max_norm.*nan"),
        ({"nonfinite": "ignore"}, ValueError, "'ignore'"),
        ({"shared_params": "trunk.9"}, ValueError, "'trunk.9'"),
        ({"groups": "module"}, ValueError, "'module'"),
        ({"groups": ["trunk.0"]}, ValueError, "in no group"),
        ({"gramian_params": "nowhere"}, ValueError, "'nowhere'"),
    ],
)
def test_wrong_options_change_nothing(options: dict, kind: type[Exception], error: str) -> None:
    model, method = nets.mlp(), PCGrad()
    fastmtl.backward(model.losses(inputs()), method, model.trunk)
    arguments = {"method": method, "shared_params": "trunk", "model": model, **options}
    with assert_untouched(model, method), pytest.raises(kind, match=error):
        fastmtl.backward(model.losses(inputs()), **arguments)


@pytest.mark.parametrize("filler", ["grad", "backward"])
@pytest.mark.parametrize("lean", [False, True])
def test_a_graph_already_freed_changes_nothing(filler: str, lean: bool) -> None:
    """Of the second task: the first one's pass has gone through by then."""
    model, method = nets.mlp(), GradVac()
    fastmtl.backward(model.losses(inputs()), method, model.trunk)
    a, b, c = model.losses(inputs())[0], model.losses(inputs())[1], model.losses(inputs())[2]
    b.backward()
    more = {"gramian_params": model.trunk[2]} if lean else {}
    with assert_untouched(model, method), pytest.raises(RuntimeError, match="its graph was freed"):
        fastmtl.backward([a, b, c], method, model.trunk, filler=filler, **more)


@pytest.mark.parametrize("method", [PCGrad, lambda: GradNorm(scale_heads=False), GradNorm])
def test_a_graph_freed_below_the_gramians_layer_changes_nothing(method: Callable) -> None:
    """The short passes succeed and the weights are known when the long pass fails."""
    model, solver = nets.mlp(), method()
    fastmtl.backward(model.losses(inputs()), solver, model.trunk)
    early = model.trunk[1](model.trunk[0](inputs()))
    late = model.trunk[2](early)
    losses = [head(late).pow(2).mean() for head in model.heads]
    early.sum().backward()
    with assert_untouched(model, solver), pytest.raises(RuntimeError, match="its graph was freed"):
        fastmtl.backward(losses, solver, model.trunk, gramian_params=model.trunk[2])


@pytest.mark.parametrize("method", STATEFUL)
def test_a_call_that_raises_keeps_the_states_tensors(method: str) -> None:
    """The objects, not just their values: a captured CUDA graph goes on writing where it was captured."""
    model, solver = nets.mlp(), METHODS[method]()
    fastmtl.backward(model.losses(inputs()), solver, model.trunk)
    before = dict(solver.named_buffers())

    def fail(grad: Tensor) -> None:
        raise MemoryError("out of memory")

    features = model.trunk[1](model.trunk[0](inputs()))
    features.register_hook(fail)  # in the long pass, when the state has moved
    losses = [head(model.trunk[2](features)).pow(2).mean() for head in model.heads]
    with assert_untouched(model, solver), pytest.raises(MemoryError):
        fastmtl.backward(losses, solver, model.trunk, gramian_params=model.trunk[2])
    assert before
    assert all(buffer is before[name] for name, buffer in solver.named_buffers())


def test_a_wrong_loss_changes_nothing_and_is_named() -> None:
    model, method = nets.mlp(), GradNorm()
    fastmtl.backward(model.losses(inputs()), method, model.trunk)
    for wrong, error in ((torch.tensor(1.0), "no graph"), (torch.ones(2, requires_grad=True), r"scalar.*\[2\]")):
        a, _, c = model.losses(inputs())
        with assert_untouched(model, method), pytest.raises(ValueError, match=f"loss of normals: .*{error}"):
            fastmtl.backward({"depth": a, "normals": wrong, "seg": c}, method, model.trunk)


def test_another_number_of_tasks_than_the_state_has() -> None:
    for name in ("GradVac", "GradNorm"):
        model, method = nets.mlp(), METHODS[name]()
        losses = model.losses(inputs())
        fastmtl.backward(losses, method, model.trunk, retain_graph=True)
        with assert_untouched(model, method), pytest.raises(ValueError, match=f"{name}.*one method object per set"):
            fastmtl.backward(losses[:2], method, model.trunk)


def test_several_groups_for_a_method_of_one() -> None:
    model, method = nets.mlp(), GradNorm(scale_heads=False)
    with assert_untouched(model, method), pytest.raises(ValueError, match="GradNorm knows only one group"):
        fastmtl.backward(model.losses(inputs()), method, model.trunk, groups="layer")


# ---- Result ----------------------------------------------------------------------------------------------------------


def test_cosines() -> None:
    model = nets.mlp()
    losses = model.losses(inputs())
    jacobian = jacobian_of(task_gradients(losses, model.trunk.parameters()), model.trunk.parameters())
    unit = jacobian / jacobian.norm(dim=1, keepdim=True)
    out = fastmtl.backward(losses, MGDA(), model.trunk)
    torch.testing.assert_close(out.cosines, unit @ unit.T)
    assert not any(x.requires_grad for x in (out.weights, out.gramian, *out.grads))
    weighted = fastmtl.backward(model.losses(inputs()), UncertaintyWeighting(3), model.trunk)
    with pytest.raises(ValueError, match="no Gramian"):
        _ = weighted.cosines


def test_cosines_of_a_zero_gradient() -> None:
    out = fastmtl.aggregate(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), MGDA())
    assert out.cosines.tolist() == [[1.0, 0.0], [0.0, 0.0]]
