"""Assertions by property, for whatever claims to have it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Weigh = Callable[[Tensor], Tensor]
"""From a Gramian [T, T] to weights [T]; must not remember earlier calls."""


def assert_on_simplex(weights: Tensor, atol: float = 1e-12) -> None:
    """Non-negative along the last dimension, and of sum 1."""
    assert (weights >= 0).all(), weights
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)), rtol=0, atol=atol)


def assert_non_conflicting(jacobian: Tensor, direction: Tensor, rtol: float = 1e-9) -> None:
    """No task's gradient opposes the direction."""
    scale = jacobian.norm(dim=1) * direction.norm()
    products = jacobian @ direction
    assert (products >= -rtol * scale).all(), products / scale


def assert_invariant_under_permutation(weigh: Weigh, gramian: Tensor, permutation: Tensor, atol: float = 1e-9) -> None:
    """Renaming the tasks renames the weights."""
    renamed = weigh(gramian[permutation][:, permutation])
    torch.testing.assert_close(renamed, weigh(gramian)[permutation], rtol=0, atol=atol)


def assert_invariant_under_scaling(weigh: Weigh, gramian: Tensor, factor: float, atol: float = 1e-9) -> None:
    """Scaling all gradients alike (a loss scale, another unit) leaves the weights alone."""
    torch.testing.assert_close(weigh(gramian * factor**2), weigh(gramian), rtol=0, atol=atol)


def assert_same_state(module: nn.Module, other: nn.Module) -> None:
    """Bitwise equal ``state_dict``, NaN and shapes included."""
    _assert_same_tensors(dict(module.state_dict()), dict(other.state_dict()))


@contextmanager
def assert_untouched(*modules: nn.Module, params: Iterable[Tensor] = ()) -> Iterator[None]:
    """Within, no state, no value and no ``.grad`` of the modules and parameters changes, by one bit."""
    params = [*params, *(p for m in modules for p in m.parameters())]
    states = [{name: x.clone() for name, x in m.state_dict().items()} for m in modules]
    grads = [(p.grad, None if p.grad is None else p.grad.clone()) for p in params]
    yield
    for module, state in zip(modules, states, strict=True):
        _assert_same_tensors(dict(module.state_dict()), state)
    for p, (grad, value) in zip(params, grads, strict=True):
        assert p.grad is grad
        if grad is not None:
            assert torch.equal(grad, value)


def _assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
