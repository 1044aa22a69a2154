"""What does surgery add to a whole training step?

Multilayer perceptrons with T linear heads on the same batch, squared error, eager mode; forward and backward, no
optimizer. Ratios at parameter level are to T plain backward passes, the fastest way found to do them; at feature level
to one ordinary step on the summed loss. The error is that of all gradients of the trunk, relative to their norm, with
fixed visiting orders, in fp64 (parameter level: from T separate backward passes; feature level: through the features).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastmtl
from benchmarks import oracle
from benchmarks.harness import Report, check, main

MODELS = [("3 x 256", 256, 256), ("3 x 512", 512, 1024)]  # name, width, batch
NUM_TASKS = (8, 40)


class Net(nn.Module):
    """A trunk of three layers, T linear heads, and a batch to train on."""

    def __init__(self, width: int, batch: int, num_tasks: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(width, width), nn.ReLU())))
        self.heads = nn.ModuleList([nn.Linear(width, 1) for _ in range(num_tasks)])
        self.inputs = nn.Buffer(torch.randn(batch, width))
        self.targets = nn.Buffer(torch.randn(num_tasks, batch, 1))

    def losses(self, copies: Callable[[Tensor], tuple[Tensor, ...]] | None = None) -> list[Tensor]:
        """One loss per task; ``copies`` makes the features that each head reads."""
        features = self.trunk(self.inputs)
        each = (features,) * len(self.heads) if copies is None else copies(features)
        return [
            nn.functional.mse_loss(head(z), y)
            for head, z, y in zip(self.heads, each, self.targets.unbind(0), strict=True)
        ]

    def clear(self) -> None:
        """Forget the gradients."""
        for p in self.parameters():
            p.grad = None

    def trunk_grads(self) -> Tensor:
        """All gradients of the trunk, flat, float64."""
        return torch.cat([p.grad.flatten() for p in self.trunk.parameters() if p.grad is not None]).double()


def run(report: Report) -> None:
    for name, width, batch in MODELS:
        for num_tasks in NUM_TASKS:
            net = Net(width, batch, num_tasks)
            _parameter_level(report, f"{name}, batch {batch}", net)
            _feature_level(report, f"{name}, batch {batch}", net)


def _parameter_level(report: Report, name: str, net: Net) -> None:
    method, num_tasks = fastmtl.PCGrad(), len(net.heads)
    trunk = list(net.trunk.parameters())

    def ours(method: fastmtl.PCGrad = method) -> None:
        net.clear()
        fastmtl.backward(net.losses(), method, net.trunk)

    def accumulated() -> None:
        net.clear()
        losses = net.losses()
        for t, loss in enumerate(losses):
            loss.backward(retain_graph=t + 1 < num_tasks)

    def separate() -> list[tuple[Tensor, ...]]:
        return [
            torch.autograd.grad(loss, [*trunk, *head.parameters()], retain_graph=t + 1 < num_tasks)
            for t, (loss, head) in enumerate(zip(net.losses(), net.heads, strict=True))
        ]

    orders = torch.arange(num_tasks).expand(num_tasks, -1)
    ours(fastmtl.PCGrad(order="fixed"))
    exact = copy.deepcopy(net).double()
    params = list(exact.trunk.parameters())
    grads = [torch.autograd.grad(loss, params, retain_graph=True) for loss in exact.losses()]
    rows = torch.stack([torch.cat([g.flatten() for g in row]) for row in grads])
    expected = oracle.pcgrad_weights(rows @ rows.T, orders) @ rows
    error = check(name, oracle.vector_error(net.trunk_grads(), expected), 1e-4)
    providers = {"fastmtl.backward": ours, "T x loss.backward()": accumulated, "T x autograd.grad()": separate}
    report.measure(
        f"backward, {name}",
        "PCGrad",
        (num_tasks, rows.shape[1]),
        providers,
        ["T x loss.backward()", "T x autograd.grad()"],
        {"fastmtl.backward": error},
    )


def _feature_level(report: Report, name: str, net: Net) -> None:
    num_tasks = len(net.heads)

    def plain() -> None:
        net.clear()
        torch.stack(net.losses()).sum().backward()

    def through(surgery: fastmtl.FeatureSurgery) -> Callable[[], None]:
        def step() -> None:
            net.clear()
            surgery.total(net.losses(surgery)).backward()

        return step

    exact = copy.deepcopy(net).double()
    features = exact.trunk(exact.inputs)
    leaf = features.detach().requires_grad_()
    losses = exact.losses(lambda _: (leaf,) * num_tasks)
    rows = torch.stack([torch.autograd.grad(loss, leaf)[0].flatten() for loss in losses])
    gramian = rows @ rows.T
    orders = torch.arange(num_tasks).expand(num_tasks, -1)
    methods: list[tuple[str, fastmtl.GradientMethod]] = [
        ("PCGrad", fastmtl.PCGrad(order="fixed")),
        ("MGDA", fastmtl.MGDA()),
    ]
    for method, fixed in methods:
        surgery = fastmtl.FeatureSurgery(fixed, num_tasks)
        through(surgery)()
        if method == "PCGrad":
            weights = oracle.pcgrad_weights(gramian, orders)
        else:
            assert surgery.result is not None
            weights = surgery.result.weights
            check("duality gap", oracle.duality_gap(gramian, weights), 1e-4)
        exact.clear()
        features.backward((weights @ rows).view_as(features), retain_graph=True)
        error = check(name, oracle.vector_error(net.trunk_grads(), exact.trunk_grads()), 1e-4)
        providers = {
            "summed loss": plain,
            "FeatureSurgery": through(fastmtl.FeatureSurgery(getattr(fastmtl, method)(), num_tasks)),
        }
        shape = (num_tasks, rows.shape[1])
        report.measure(f"layer, {name}", method, shape, providers, "summed loss", {"FeatureSurgery": error})


if __name__ == "__main__":
    main(run, threads=1, clock="cpu", rounds=9)
