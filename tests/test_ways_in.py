"""Every method through every way in, in every number type; and the table of it in docs/methods.md."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmtl
from fastmtl import GradientMethod, LossWeighting, RowMethod
from fastmtl.methods import all_methods
from tests.asserts import assert_untouched
from tests.nets import Net, mlp

T = 3
DTYPES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}  # relative
# Methods that go by weights; those that work on the rows are in tests/surgery/test_row_method.py.
METHODS = sorted(name for name, each in all_methods().items() if not issubclass(each, RowMethod))
ROW_METHODS = sorted(set(all_methods()) - set(METHODS))
# What a method cannot do without, and options by which a short run shows its effect.
OPTIONS: dict[str, dict[str, Any]] = {
    "COSMOS": {"num_tasks": T, "preference": [1, 2, 3]},
    "ConstantWeighting": {"weights": [1.0, 0.2, 3.0]},
    "DWA": {"num_tasks": T, "window": 1},
    "EqualWeighting": {"num_tasks": T},
    "FAMO": {"num_tasks": T, "lr": 0.2, "after": "next_batch"},
    "GeometricMean": {"num_tasks": T},
    "HTW": {"num_tasks": T, "main": 1, "total_steps": 20},
    "IMTLL": {"num_tasks": T, "init": 0.5},
    "LBTW": {"num_tasks": T},
    "LogLoss": {"num_tasks": T},
    "PBI": {"num_tasks": T, "preference": [1, 2, 3]},
    "RLW": {"num_tasks": T},
    "ReLoBRaLo": {"num_tasks": T, "alpha": 0.5, "temperature": 1.0},
    "STCH": {"num_tasks": T, "preference": [1, 2, 3], "mu": 1.0},
    "SoftAdapt": {"num_tasks": T, "beta": 1.0},
    "UncertaintyWeighting": {"num_tasks": T, "init": 0.5},
    "GradNorm": {"lr": 0.2},
    "PELTR": {"lower_bounds": [0.1, 0.2, 0.3]},
    "Constant": {"weights": [0.5, 2.0, -1.0]},
    "EPO": {"preference": [1.0, 2.0, 0.5]},
    "Krum": {"num_byzantine": 0},
    "MoDo": {"num_tasks": 1},  # on three batches
    "SDMGrad": {"num_tasks": 1},
}
Method = GradientMethod | LossWeighting


def make(name: str, seed: int = 5, **options: Any) -> Method:
    torch.manual_seed(seed)
    return getattr(fastmtl, name)(**{**OPTIONS.get(name, {}), **options})


def rows_of(losses: Sequence[Tensor], wrt: Sequence[Tensor]) -> Tensor:
    """``[T, P]`` float64, by one backward pass per task."""
    grads = [torch.autograd.grad(loss, wrt, retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in grads]).double()


def expected_weights(method: Method, losses: Sequence[Tensor], gramian: Tensor) -> Tensor:
    values = torch.stack([x.detach().double() for x in losses])
    if isinstance(method, LossWeighting):
        values.requires_grad_()
        return torch.autograd.grad(method(values), values)[0].double()
    return method(gramian, losses=values)


def flat_grads(params: Sequence[Tensor]) -> Tensor:
    return torch.cat([p.grad.flatten() for p in params]).double()


class Way:
    """One way in: a training step with it, against the definition."""

    def __init__(self, net: Net, method: Method, oracle: Method, tolerance: float) -> None:
        self.net, self.method, self.oracle, self.tolerance = net, method, oracle, tolerance
        self.trunk, self.heads = list(net.trunk.parameters()), list(net.heads.parameters())

    def weights(self, losses: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Fill ``.grad``; the weights ``[K, T]`` and what they should be."""
        raise NotImplementedError

    def combined(self, weights: Tensor, losses: list[Tensor]) -> Tensor:
        return weights[0] @ rows_of(losses, self.trunk)

    def step(self, x: Tensor) -> None:
        self.net.zero_grad()
        losses = self.net.losses(x)
        found, expected = self.weights(losses)
        torch.testing.assert_close(found, expected, rtol=self.tolerance, atol=self.tolerance)
        self.close(flat_grads(self.trunk), self.combined(found, losses))
        scaled = isinstance(self.method, LossWeighting) or self.method.scale_heads
        head_rows = torch.stack(
            [rows_of([x], list(h.parameters()))[0] for x, h in zip(losses, self.net.heads, strict=True)]
        )
        factors = found[0] if scaled else torch.ones(T)
        self.close(flat_grads(self.heads), (factors.unsqueeze(1) * head_rows).flatten())

    def close(self, found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=0, atol=self.tolerance * float(expected.abs().max()))


class ParameterLevel(Way):
    def weights(self, losses: list[Tensor]) -> tuple[Tensor, Tensor]:
        rows = rows_of(losses, self.gramian_params())
        out = fastmtl.backward(losses, self.method, self.net.trunk, retain_graph=True, **self.arguments())
        return out.weights.unsqueeze(0), expected_weights(self.oracle, losses, rows @ rows.T).unsqueeze(0)

    def gramian_params(self) -> Sequence[Tensor]:
        return self.trunk

    def arguments(self) -> dict[str, Any]:
        return {}


class LeanGramian(ParameterLevel):
    def gramian_params(self) -> Sequence[Tensor]:
        return list(self.net.trunk[-1].parameters())

    def arguments(self) -> dict[str, Any]:
        return {"gramian_params": self.net.trunk[-1]}


class Groups(ParameterLevel):
    def weights(self, losses: list[Tensor]) -> tuple[Tensor, Tensor]:
        gramians = [(rows := rows_of(losses, list(m.parameters()))) @ rows.T for m in self.layers()]
        out = fastmtl.backward(losses, self.method, self.net.trunk, retain_graph=True, groups="layer")
        if isinstance(self.oracle, LossWeighting):
            return out.weights, expected_weights(self.oracle, losses, gramians[0]).expand(2, -1)
        return out.weights, expected_weights(self.oracle, losses, torch.stack(gramians))

    def layers(self) -> list[torch.nn.Module]:
        return [self.net.trunk[0], self.net.trunk[2]]

    def combined(self, weights: Tensor, losses: list[Tensor]) -> Tensor:
        layers = self.layers()
        return torch.cat([w @ rows_of(losses, list(m.parameters())) for w, m in zip(weights, layers, strict=True)])


class FeatureLevel(Way):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.surgery = fastmtl.FeatureSurgery(self.method, T)

    def step(self, x: Tensor) -> None:
        self.x = x
        super().step(x)

    def head_losses(self, features: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(self.net.heads, features, strict=True)
        return [((head(z) - (-1) ** t * (t + 1)) ** 2).mean() for t, (head, z) in enumerate(pairs)]

    def weights(self, losses: list[Tensor]) -> tuple[Tensor, Tensor]:
        features = self.net.trunk(self.x).detach().requires_grad_()
        rows = rows_of(self.head_losses([features] * T), [features])
        expected = expected_weights(self.oracle, losses, rows @ rows.T).unsqueeze(0)
        total = self.surgery.total(self.head_losses(self.surgery(self.net.trunk(self.x))))
        total.backward()
        if isinstance(self.method, LossWeighting):
            torch.testing.assert_close(self.method.weights, expected[0], rtol=self.tolerance, atol=0)
        return self.surgery.result.weights.unsqueeze(0), expected


class OneBatchPerTask(Way):
    heads_given = False

    def weights(self, losses: list[Tensor]) -> tuple[Tensor, Tensor]:
        rows = rows_of(losses, self.trunk)
        heads = self.net.heads if self.heads_given else None
        collected = fastmtl.TaskGradients(self.net.trunk, T, heads=heads)
        for t, loss in enumerate(losses):
            collected.backward(t, loss, retain_graph=True)
        out = collected.combine(self.method)
        return out.weights.unsqueeze(0), expected_weights(self.oracle, losses, rows @ rows.T).unsqueeze(0)


class OneBatchPerTaskWithHeads(OneBatchPerTask):
    heads_given = True


class AtHand(Way):
    def step(self, x: Tensor) -> None:
        losses = self.net.losses(x)
        jacobian = rows_of(losses, self.trunk).to(x.dtype)
        rows = jacobian.double()
        before = jacobian.clone()
        out = fastmtl.aggregate(jacobian, self.method, losses=[x.detach() for x in losses])
        weights = expected_weights(self.oracle, losses, rows @ rows.T)
        torch.testing.assert_close(out.weights, weights, rtol=self.tolerance, atol=self.tolerance)
        self.close(out.grads.double(), out.weights @ rows)
        assert torch.equal(jacobian, before)


# Per column of the table the way in, and what helps where it is refused as it comes.
COLUMNS: dict[str, list[tuple[str, Callable[..., Way], dict[str, Any]]]] = {
    "`backward`": [("yes", ParameterLevel, {})],
    "`groups=`": [("yes", Groups, {}), ("`scale_heads=False`", Groups, {"scale_heads": False})],
    "`gramian_params=`": [("yes", LeanGramian, {})],
    "`FeatureSurgery`": [("yes", FeatureLevel, {}), ("`scale_heads=False`", FeatureLevel, {"scale_heads": False})],
    "`TaskGradients`": [("yes", OneBatchPerTask, {}), ("`heads=`", OneBatchPerTaskWithHeads, {})],
    "`aggregate`": [("yes", AtHand, {})],
}


def run_method(name: str, way: Callable[..., Way], options: dict[str, Any], dtype: torch.dtype) -> None:
    """Three steps; ValueError where the way in refuses the method."""
    torch.manual_seed(0)
    net = mlp(T).to(dtype)
    inputs = torch.randn(3, 8, 5, dtype=torch.float64).to(dtype)
    method, oracle = make(name, **options), make(name, **options)
    steps = way(net, method, oracle, DTYPES[dtype])
    for x in inputs:
        steps.step(x)


@pytest.mark.parametrize("name", METHODS)
def test_another_order_of_named_tasks(name: str) -> None:
    """What is kept per task goes by position: refused, and nothing has moved, unless nothing is kept."""
    method, net = make(name), mlp(T)
    a, b, c = net.losses(torch.randn(8, 5, dtype=torch.float64))
    fastmtl.backward({"a": a, "b": b, "c": c}, method, net.trunk, retain_graph=True)
    if isinstance(method, GradientMethod) and not method.positional:
        fastmtl.backward({"b": b, "a": a, "c": c}, method, net.trunk, retain_graph=True)
        return
    for losses in ({"b": b, "a": a, "c": c}, {"a": a, "b": b, "d": c}):
        with assert_untouched(method, net), pytest.raises(ValueError, match=f"{name}.*a, b, c.*found"):
            fastmtl.backward(losses, method, net.trunk, retain_graph=True)
    fastmtl.backward({"a": a, "b": None, "c": c}, method, net.trunk)


def run_row_method(name: str, way: Callable[..., Way], options: dict[str, Any], dtype: torch.dtype) -> None:
    """Three steps against `fastmtl.aggregate` with the rows in float64."""
    torch.manual_seed(0)
    net, method, oracle = mlp(T).to(dtype), make(name, **options), make(name, **options)
    trunk, heads = [*net.trunk.parameters()], [*net.heads.parameters()]
    for x in torch.randn(3, 8, 5, dtype=torch.float64).to(dtype):
        net.zero_grad()
        losses = net.losses(x)
        values = [x.detach() for x in losses]
        rows = [[torch.autograd.grad(loss, p, retain_graph=True)[0].double() for loss in losses] for p in trunk]
        plain = [torch.autograd.grad(sum(losses), p, retain_graph=True)[0] for p in heads]
        groups = [0, 0, 1, 1] if way is Groups else None
        expected = fastmtl.aggregate(rows, oracle, losses=values, groups=groups).grads
        if way in (ParameterLevel, Groups, LeanGramian):
            arguments = {Groups: {"groups": "layer"}, LeanGramian: {"gramian_params": net.trunk[-1]}}.get(way, {})
            fastmtl.backward(losses, method, net.trunk, retain_graph=True, **arguments)
        elif way is AtHand:
            out = fastmtl.aggregate([[g.to(dtype) for g in p] for p in rows], method, losses=values)
            for p, grad in zip(trunk, out.grads, strict=True):
                p.grad = grad
        elif way is FeatureLevel:
            fastmtl.FeatureSurgery(method, T)
        else:
            collected = fastmtl.TaskGradients(
                net.trunk, T, heads=net.heads if way is OneBatchPerTaskWithHeads else None
            )
            for t, loss in enumerate(losses):
                collected.backward(t, loss, retain_graph=True)
            collected.combine(method)
        for p, wanted in zip(trunk, expected, strict=True):
            torch.testing.assert_close(p.grad.double(), wanted, rtol=0, atol=DTYPES[dtype] * float(wanted.abs().max()))
        if not method.scale_heads and way is not AtHand:
            for p, wanted in zip(heads, plain, strict=True):
                torch.testing.assert_close(p.grad, wanted)


def cell(name: str, column: str) -> str:
    run = run_row_method if name in ROW_METHODS else run_method
    for text, way, options in COLUMNS[column]:
        if inspect.signature(getattr(fastmtl, name)).parameters.keys() >= options.keys():
            try:
                run(name, way, options, torch.float64)
            except ValueError:
                continue
            return text
    return "–"


def table() -> list[str]:
    lines = [" | ".join(["| method", *COLUMNS]) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name in sorted(METHODS + ROW_METHODS):
        lines.append(" | ".join([f"| `{name}`", *(cell(name, column) for column in COLUMNS)]) + " |")
    return lines


def test_docs_have_this_table() -> None:
    docs = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
    assert "\n".join(table()) in docs, "docs/methods.md should have:\n" + "\n".join(table())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("name", [*METHODS, *ROW_METHODS])
def test_every_way_in(name: str, column: str, dtype: torch.dtype) -> None:
    """As the table says: refused, or the weighted sum of the gradients by the method's own weights."""
    run = run_row_method if name in ROW_METHODS else run_method
    ways = {text: (way, options) for text, way, options in COLUMNS[column]}
    text = cell(name, column)
    if text == "–":
        way, options = COLUMNS[column][0][1:]
        with pytest.raises(ValueError, match=name):
            run(name, way, options, dtype)
    else:
        run(name, *ways[text], dtype)
