"""What all methods that work on the per-task gradients themselves have in common."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmtl
from fastmtl import GradDrop, RowMethod, TrimmedMean
from tests.asserts import assert_same_state, assert_untouched
from tests.nets import mlp
from tests.test_ways_in import ROW_METHODS, make

ELEMENTWISE: dict[str, Callable[[], RowMethod]] = {
    "GradDrop": GradDrop,
    "GradDrop, leak": lambda: GradDrop(leak=[0.1, 0.2, 0.3]),
    "TrimmedMean": TrimmedMean,
}
METHODS: dict[str, Callable[[], RowMethod]] = {
    **{name: lambda name=name: make(name) for name in ROW_METHODS},  # type: ignore[misc]
    **ELEMENTWISE,
}
T = 3


class Scaler:
    """A loss scale, as of torch.amp.GradScaler."""

    def __init__(self, scale: float) -> None:
        self.value = scale

    def scale(self, x: Tensor) -> Tensor:
        return x * self.value


def inputs() -> Tensor:
    return torch.randn(8, 5, dtype=torch.float64)


def step(net: Any, method: RowMethod, x: Tensor, **options: Any) -> tuple[fastmtl.Result, list[Tensor]]:
    net.zero_grad()
    out = fastmtl.backward(net.losses(x), method, net.trunk, **options)
    return out, [p.grad.clone() for p in net.parameters()]


def assert_all_close(found: Sequence[Tensor], wanted: Sequence[Tensor], **options: Any) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, **options)


@pytest.mark.parametrize("name", METHODS)
def test_refused_where_only_a_gramian_goes(name: str) -> None:
    method, net = METHODS[name](), mlp(T)
    text = type(method).__name__
    with assert_untouched(method, net):
        with pytest.raises(ValueError, match=f"{text} works on the per-task gradients.*fastmtl.aggregate"):
            method(torch.eye(T))
        with pytest.raises(ValueError, match=f"gramian_params: {text}"):
            fastmtl.backward(net.losses(inputs()), method, net.trunk, gramian_params=net.trunk[-1])
        with pytest.raises(ValueError, match=f"method: {text}"):
            fastmtl.Amortized(method)
        with pytest.raises(ValueError, match=f"method: {text}"):
            fastmtl.CRMOGM(method)
        with pytest.raises(ValueError, match=f"FeatureSurgery: {text}|scale_heads=False"):
            fastmtl.FeatureSurgery(method, T)


@pytest.mark.parametrize("scale", [2.0**16, 2.0**-10])
@pytest.mark.parametrize("name", METHODS)
def test_the_loss_scale_makes_no_difference(name: str, scale: float) -> None:
    torch.manual_seed(1)
    net = mlp(T)
    method = METHODS[name]()
    twin = copy.deepcopy(method)
    for _ in range(3):
        x = inputs()
        plain = step(net, method, x)[1]
        scaled = step(net, twin, x, scaler=Scaler(scale))[1]
        assert_all_close([g / scale for g in scaled], plain)
    assert_same_state_closely(method, twin)


def assert_same_state_closely(a: torch.nn.Module, b: torch.nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(left[key], right[key], equal_nan=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", METHODS)
def test_an_overflow_leaves_no_trace(name: str, value: float) -> None:
    """What is not finite arrives in .grad, and the next step is as if it had not been."""
    net, method = mlp(T), METHODS[name]()
    step(net, method, inputs())
    twin = copy.deepcopy(method)
    x = inputs()
    bad = x.clone()
    bad[0, 0] = value
    grads = step(net, method, bad)[1]
    assert not all(g.isfinite().all() for g in grads)
    assert_same_state(method, twin)
    assert_all_close(step(net, method, x)[1], step(net, twin, x)[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_policies_for_what_is_not_finite(name: str) -> None:
    torch.manual_seed(3)
    net, method = mlp(T), METHODS[name]()
    twin, x = copy.deepcopy(method), inputs()

    def losses() -> list[Tensor]:
        a, b, c = net.losses(x)
        return [a, b * math.nan, c]

    with assert_untouched(method, net):
        with pytest.raises(FloatingPointError, match="task 1"):
            fastmtl.backward(losses(), method, net.trunk, nonfinite="raise")
        fastmtl.backward(losses(), method, net.trunk, nonfinite="skip")
    fastmtl.backward(losses(), method, net.trunk, nonfinite="drop_task")
    dropped = [p.grad.clone() for p in net.trunk.parameters()]
    net.zero_grad()
    a, _, c = net.losses(x)
    fastmtl.backward([a, None, c], twin, net.trunk)
    assert_all_close(dropped, [p.grad for p in net.trunk.parameters()])
    assert_same_state_closely(method, twin)


@pytest.mark.parametrize("name", METHODS)
def test_evaluation_moves_nothing(name: str) -> None:
    net, method = mlp(T), METHODS[name]()
    for steps in range(2):
        method.train()
        for _ in range(steps):
            step(net, method, inputs())
        x = inputs()
        expected = step(net, copy.deepcopy(method), x)[1]
        method.eval()
        with assert_untouched(method):
            for _ in range(2):
                assert_all_close(step(net, method, x)[1], expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_a_call_that_raises_moves_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, method = mlp(T), METHODS[name]()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr("fastmtl.operate.accumulate", fail)
            with assert_untouched(method, net), pytest.raises(MemoryError):
                fastmtl.backward(net.losses(inputs()), method, net.trunk)
        step(net, method, inputs())
        net.zero_grad()


@pytest.mark.parametrize("name", METHODS)
def test_state_goes_through_a_checkpoint(name: str) -> None:
    net, method = mlp(T), METHODS[name]()
    for _ in range(3):
        step(net, method, inputs())
    resumed = METHODS[name]()
    resumed.load_state_dict(copy.deepcopy(method.state_dict()))
    assert_same_state(method, resumed)
    for _ in range(2):
        x = inputs()
        assert_all_close(step(net, method, x)[1], step(net, resumed, x)[1], rtol=0, atol=0)
    fresh = METHODS[name]()
    before = copy.deepcopy(fresh.state_dict())
    method.load_state_dict(before)  # back to the first step
    assert_same_state(method, fresh)


@pytest.mark.parametrize("name", METHODS)
def test_max_norm(name: str) -> None:
    net, method = mlp(T), METHODS[name]()
    twin, x = copy.deepcopy(method), inputs()
    trunk = len(list(net.trunk.parameters()))
    free = torch.cat([g.flatten() for g in step(net, method, x)[1][:trunk]])
    bound = 0.5 * float(free.norm())
    held = torch.cat([g.flatten() for g in step(net, twin, x, max_norm=bound)[1][:trunk]])
    torch.testing.assert_close(held, 0.5 * free)


@pytest.mark.parametrize("name", METHODS)
def test_adds_to_gradients_that_are_there(name: str) -> None:
    net, method = mlp(T), METHODS[name]()
    twin, x = copy.deepcopy(method), inputs()
    fresh = step(net, method, x)[1]
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    fastmtl.backward(net.losses(x), twin, net.trunk)
    assert_all_close([p.grad for p in net.parameters()], [1 + g for g in fresh])


@pytest.mark.parametrize("name", METHODS)
def test_row_dtype(name: str) -> None:
    torch.manual_seed(2)
    net = mlp(T).float()
    method = METHODS[name]()
    twin = copy.deepcopy(method)
    for _ in range(2):
        x = inputs().float()
        narrow, wide = step(net, method, x, row_dtype=torch.bfloat16)[1], step(net, twin, x)[1]
        trunk = len(list(net.trunk.parameters()))
        assert all(g.dtype == torch.float32 for g in narrow)
        if "GradDrop" in name:  # where the signs nearly balance, rounding may turn the choice
            continue
        assert_all_close(narrow[:trunk], wide[:trunk], rtol=0, atol=0.05 * max(float(g.abs().max()) for g in wide))


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_methods_have_no_weights(name: str) -> None:
    out = step(mlp(T), METHODS[name](), inputs(), groups="layer")[0]
    assert out.weights is None
    assert out.gramian is None
    assert "weights=None" in repr(out)
    with pytest.raises(ValueError, match="cosines"):
        _ = out.cosines


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_sparse_gradients(name: str) -> None:
    """As the dense ones of the touched rows."""

    def sparse(*indices: int) -> Tensor:
        return torch.sparse_coo_tensor([list(indices)], torch.randn(len(indices), 2), (10, 2), check_invariants=False)

    method = METHODS[name]()
    rows = [sparse(1, 3), sparse(3, 7), sparse(1, 7)]
    twin = copy.deepcopy(method)
    (found,) = fastmtl.aggregate([rows], method).grads
    blocks = [r.to_dense()[[1, 3, 7]] for r in rows]
    assert found.is_sparse
    assert torch.equal(found.to_dense()[[1, 3, 7]], fastmtl.aggregate([blocks], twin).grads[0])
    assert found.coalesce().indices().tolist() == [[1, 3, 7]]
