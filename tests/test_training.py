"""Training with every method: the literal algorithm of its paper on the gradients of a net, and resumed runs."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, nnls
from torch import Tensor

import fastmtl
from fastmtl import LossWeighting
from fastmtl.surgery.row_method import RowMethod
from fastmtl.surgery.several_batches import SeveralBatches
from tests.asserts import assert_same_state
from tests.nets import Net, mlp
from tests.test_ways_in import METHODS, T, make

STEPS = 12
Direction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""From gradients [T, P] and losses [T] to the trunk's gradient [P] and the heads' factors [T] (None: plain)."""
Scalar = Callable[[Sequence[Tensor]], Tensor]


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(8, 5, dtype=torch.float64, generator=generator) for _ in range(STEPS)]


def net_and_optimizer() -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = mlp(T)
    return net, torch.optim.SGD(net.parameters(), lr=0.02)


# ---- the papers' algorithms, on vectors ------------------------------------------------------------------------------

ORDER = torch.tensor([[2, 0, 1], [0, 2, 1], [1, 0, 2]])


def pcgrad(grads: Tensor, losses: Tensor) -> tuple[Tensor, None]:
    """Yu et al. 2020, Algorithm 1."""
    total = torch.zeros_like(grads[0])
    for i in range(T):
        g = grads[i].clone()
        for j in ORDER[i].tolist():
            if i != j and g @ grads[j] < 0:
                g -= (g @ grads[j]) / (grads[j] @ grads[j]) * grads[j]
        total += g
    return total, None


class GradVacOfThePaper:
    """Wang et al. 2021, Algorithm 1."""

    def __init__(self, beta: float) -> None:
        self.beta, self.targets = beta, np.zeros((T, T))

    def __call__(self, grads: Tensor, losses: Tensor) -> tuple[Tensor, None]:
        total = torch.zeros_like(grads[0])
        for i in range(T):
            g = grads[i].clone()
            for j in ORDER[i].tolist():
                if i == j:
                    continue
                cosine = float(g @ grads[j] / (g.norm() * grads[j].norm()))
                target = self.targets[i, j]
                if cosine < target:
                    up = g.norm() * (target * math.sqrt(1 - cosine**2) - cosine * math.sqrt(1 - target**2))
                    g = g + up / (grads[j].norm() * math.sqrt(1 - target**2)) * grads[j]
                self.targets[i, j] = (1 - self.beta) * target + self.beta * cosine
            total += g
        return total, None


def simplex_minimum(grads: Tensor, bounds: Sequence[float]) -> Tensor:
    """argmin |sum_t w_t g_t|^2, sum w = 1, w >= bounds, by SciPy."""
    g = grads.numpy() / float(grads.norm())
    start = np.array(bounds) + (1 - sum(bounds)) / T
    found = minimize(
        lambda w: np.sum((w @ g) ** 2),
        start,
        jac=lambda w: 2 * g @ (w @ g),
        bounds=[(b, 1) for b in bounds],
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(T)},
        method="SLSQP",
        options={"ftol": 1e-16, "maxiter": 500},
    )
    return torch.tensor(found.x)


def mgda(grads: Tensor, losses: Tensor) -> tuple[Tensor, None]:
    """Sener and Koltun 2018, equation 3."""
    return simplex_minimum(grads, [0] * T) @ grads, None


def peltr(grads: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    """Lin et al. 2019, the problem (4) that the PECsolver relaxes; the heads' losses are weighted too."""
    weights = simplex_minimum(grads, PELTR_BOUNDS)
    return weights @ grads, weights


def peltr_relaxed(grads: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    """Lin et al. 2019: the equality-constrained problem by its KKT system, then the nearest feasible point."""
    c, m = np.array(PELTR_BOUNDS), (grads @ grads.T).numpy()
    kkt = np.block([[m, np.ones((T, 1))], [np.ones((1, T)), np.zeros((1, 1))]])
    x = np.linalg.solve(kkt, np.concatenate([-m @ c, [1 - c.sum()]]))[:T]
    heavy = 1e6  # a heavy row for the equality makes it a non-negative least squares problem
    nearest, _ = nnls(np.vstack([np.eye(T), heavy * np.ones((1, T))]), np.concatenate([x, [heavy * (1 - c.sum())]]))
    weights = torch.tensor(nearest + c)
    return weights @ grads, weights


class GradNormOfThePaper:
    """Chen et al. 2018, Algorithm 1: equation 2 differentiated by autograd, the target a constant."""

    def __init__(self, lr: float) -> None:
        self.weights = torch.ones(T, dtype=torch.float64, requires_grad=True)
        self.optimizer = torch.optim.SGD([self.weights], lr=lr)
        self.initial: Tensor | None = None

    def __call__(self, grads: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        used = self.weights.detach().clone()
        if self.initial is None:
            self.initial = losses
        norms = (self.weights[:, None] * grads).norm(dim=1)
        rate = losses / self.initial
        target = (norms.mean() * (rate / rate.mean()) ** 1.5).detach()
        self.optimizer.zero_grad()
        (norms - target).abs().sum().backward()
        self.optimizer.step()
        with torch.no_grad():
            self.weights.clamp_(min=1e-3)  # the one deviation
            self.weights *= T / self.weights.sum()
        return used @ grads, used


class FrankWolfeOfThePaper:
    """Sener and Koltun 2018, Algorithm 2, on gradient vectors."""

    def __init__(self, max_iter: int) -> None:
        self.max_iter = max_iter

    def __call__(self, grads: Tensor, losses: Tensor) -> tuple[Tensor, None]:
        weights = torch.full((T,), 1 / T, dtype=torch.float64)
        for _ in range(self.max_iter):
            mean = weights @ grads
            t = int((grads @ mean).argmin())
            gap = mean - grads[t]
            step = float(gap @ mean / (gap @ gap)) if float(gap @ gap) > 0 else 0.0
            weights = (1 - min(max(step, 0), 1)) * weights
            weights[t] += min(max(step, 0), 1)
        return weights @ grads, None


class DWAOfThePaper:
    """Liu, Johns, Davison 2019, equation 7, an epoch being `epoch` steps."""

    def __init__(self, epoch: int) -> None:
        self.epoch, self.history = epoch, []

    def __call__(self, losses: Sequence[Tensor]) -> Tensor:
        e = len(self.history) // self.epoch
        weights = np.ones(T)
        if e >= 2:
            mean = [np.mean(self.history[k * self.epoch : (k + 1) * self.epoch], axis=0) for k in (e - 1, e - 2)]
            exponent = np.exp(mean[0] / mean[1] / 2)
            weights = T * exponent / exponent.sum()
        self.history.append([x.item() for x in losses])
        return sum(float(w) * x for w, x in zip(weights, losses, strict=True))


class LBTWOfThePaper:
    """Liu, Liang, Gitter 2019: the loss over the first loss, to the power alpha."""

    def __init__(self) -> None:
        self.first: list[float] | None = None

    def __call__(self, losses: Sequence[Tensor]) -> Tensor:
        values = [x.item() for x in losses]
        self.first = self.first or values
        return sum((v / f) ** 0.5 * x for v, f, x in zip(values, self.first, losses, strict=True))


class HTWOfTheArticle(LBTWOfThePaper):
    """Kongyoung et al. 2020: the abridged linear schedule for the main task, LBTW for the others."""

    def __init__(self, main: int, total_steps: int) -> None:
        super().__init__()
        self.main, self.total_steps, self.step = main, total_steps, 0

    def __call__(self, losses: Sequence[Tensor]) -> Tensor:
        weight = self.step / self.total_steps if self.step < 0.1 * self.total_steps else 1.0
        self.step += 1
        others = super().__call__(losses)
        value = losses[self.main].item()
        assert self.first is not None
        return others + (weight - (value / self.first[self.main]) ** 0.5) * losses[self.main]


class UncertaintyOfThePaper:
    """Kendall, Gal, Cipolla 2018, equations 7 and 10, for two regressions and a classification; trained by SGD."""

    def __init__(self) -> None:
        self.s = torch.zeros(T, dtype=torch.float64, requires_grad=True)

    def __call__(self, losses: Sequence[Tensor]) -> Tensor:
        sigma = torch.exp(self.s / 2)
        factor = (0.5, 1.0, 0.5)
        return sum(f * x / s**2 + s.log() for f, x, s in zip(factor, losses, sigma, strict=True))


KINDS = ["regression", "classification", "regression"]
PELTR_BOUNDS = [0.1, 0.05, 0.2]
LITERAL: dict[str, tuple[Callable[[], Any], Callable[[], Direction | Scalar]]] = {
    "PCGrad": (lambda: fastmtl.PCGrad(order=ORDER), lambda: pcgrad),
    "GradVac": (lambda: fastmtl.GradVac(beta=0.2, order=ORDER), lambda: GradVacOfThePaper(0.2)),
    "MGDA": (lambda: fastmtl.MGDA(), lambda: mgda),
    "MGDA by Frank-Wolfe": (
        lambda: fastmtl.MGDA(solver="frank_wolfe", max_iter=5000, tol=0),
        lambda: FrankWolfeOfThePaper(5000),
    ),
    "PELTR": (lambda: fastmtl.PELTR(PELTR_BOUNDS), lambda: peltr),
    "PELTR, relaxed": (lambda: fastmtl.PELTR(PELTR_BOUNDS, solver="relaxed"), lambda: peltr_relaxed),
    "GradNorm": (lambda: fastmtl.GradNorm(), lambda: GradNormOfThePaper(0.025)),
    "DWA": (lambda: fastmtl.DWA(T, steps_per_epoch=3), lambda: DWAOfThePaper(3)),
    "LBTW": (lambda: fastmtl.LBTW(T), lambda: LBTWOfThePaper()),
    "HTW": (lambda: fastmtl.HTW(T, main=1, total_steps=50), lambda: HTWOfTheArticle(1, 50)),
    "UncertaintyWeighting": (lambda: fastmtl.UncertaintyWeighting(T, KINDS), lambda: UncertaintyOfThePaper()),
}
TOLERANCE = {"MGDA": 1e-4, "PELTR": 1e-4, "PELTR, relaxed": 1e-5, "MGDA by Frank-Wolfe": 1e-4}  # of the oracles


def literal_step(net: Net, losses: list[Tensor], oracle: Direction | Scalar, weighs_losses: bool) -> None:
    if weighs_losses:
        oracle(losses).backward()  # type: ignore[union-attr, call-arg, arg-type]
        return
    trunk = list(net.trunk.parameters())
    grads = [torch.autograd.grad(x, trunk, retain_graph=True) for x in losses]
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in grads])
    direction, factors = oracle(flat, torch.stack(losses).detach())  # type: ignore[misc]
    for p, part in zip(trunk, direction.split([p.numel() for p in trunk]), strict=True):
        p.grad = part.view_as(p)
    heads = list(net.heads.parameters())
    total = sum(losses) if factors is None else sum(f * x for f, x in zip(factors, losses, strict=True))
    for p, g in zip(heads, torch.autograd.grad(total, heads), strict=True):
        p.grad = g


@pytest.mark.parametrize("name", LITERAL)
def test_training_as_in_the_paper(name: str) -> None:
    """The same net after a dozen steps, and another one than by the summed loss."""
    make_method, make_oracle = LITERAL[name]
    method, oracle = make_method(), make_oracle()
    nets = {}
    for who in ("fastmtl", "paper", "sum"):
        net, optimizer = net_and_optimizer()
        own = {"fastmtl": list(method.parameters()), "paper": [oracle.s] if hasattr(oracle, "s") else [], "sum": []}
        if own[who]:
            optimizer.add_param_group({"params": own[who]})
        for x in batches():
            optimizer.zero_grad()
            losses = net.losses(x)
            if who == "fastmtl":
                fastmtl.backward(losses, method, net.trunk)
            elif who == "paper":
                literal_step(net, losses, oracle, isinstance(method, LossWeighting))
            else:
                sum(losses).backward()
            optimizer.step()
        nets[who] = torch.cat([p.detach().flatten() for p in net.parameters()])
    tolerance = TOLERANCE.get(name, 1e-9)
    if name == "UncertaintyWeighting":
        tolerance = 1e-5  # s is a float32 parameter
    assert (nets["fastmtl"] - nets["paper"]).norm() <= tolerance * nets["paper"].norm()
    assert (nets["sum"] - nets["paper"]).norm() > 10 * tolerance * nets["paper"].norm()


# ---- interrupted and resumed -----------------------------------------------------------------------------------------


EPOCHS = {
    "DWA": {"window": None, "steps_per_epoch": 2},
    "LBTW": {"reset_each_epoch": True, "steps_per_epoch": 3},
    "HTW": {"reset_each_epoch": True, "steps_per_epoch": 3},
}


class Run:
    """A training run with Adam; the layer trains by the same method at feature level."""

    def __init__(self, name: str, way: str, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.net = mlp(T, torch.float32)
        options = {"scale_heads": False} if way == "layer" and getattr(make(name), "scale_heads", False) else {}
        self.method = make(name, seed, **options, **EPOCHS.get(name, {}))
        self.layer = fastmtl.FeatureSurgery(self.method, T) if way == "layer" else None
        groups = [{"params": list(self.net.parameters())}]
        if list(self.method.parameters()):
            groups.append(self.method.parameter_group())
        self.optimizer = torch.optim.Adam(groups, lr=0.01)

    def train(self, inputs: Sequence[Tensor]) -> None:
        for x in inputs:
            self.optimizer.zero_grad()
            if self.layer is None:
                fastmtl.backward(self.net.losses(x.float()), self.method, self.net.trunk)
            else:
                features = self.layer(self.net.trunk(x.float()))
                heads = zip(self.net.heads, features, strict=True)
                losses = [((head(z) - (-1) ** t * (t + 1)) ** 2).mean() for t, (head, z) in enumerate(heads)]
                self.layer.total(losses).backward()
            self.optimizer.step()

    def parts(self) -> dict[str, Any]:
        method = self.method if self.layer is None else self.layer
        return {"net": self.net, "method": method, "optimizer": self.optimizer}


def ways(name: str) -> list[str]:
    method = getattr(fastmtl, name)
    return ["backward"] if issubclass(method, RowMethod | SeveralBatches) else ["backward", "layer"]


@pytest.mark.parametrize(("name", "way"), [(name, way) for name in METHODS for way in ways(name)])
def test_interrupted_and_resumed(name: str, way: str) -> None:
    """Five steps, a checkpoint on disk, seven more by new objects of another seed: bitwise the uninterrupted run."""
    inputs = batches()
    straight, before, after = Run(name, way), Run(name, way), Run(name, way, seed=1)
    straight.train(inputs)
    before.train(inputs[:5])
    file = io.BytesIO()
    torch.save({key: part.state_dict() for key, part in before.parts().items()}, file)
    file.seek(0)
    for key, state in torch.load(file).items():
        after.parts()[key].load_state_dict(state)
    after.train(inputs[5:])
    for p, q in zip(straight.net.parameters(), after.net.parameters(), strict=True):
        assert torch.equal(p, q)
    assert_same_state(straight.method, after.method)
