"""What does surgery add to a whole training step, and what does TorchJD 0.18 take for the same one?

Multilayer perceptrons with T linear heads on the same batch, squared error, eager mode; forward and backward, no
optimizer. Ratios at parameter level are to T plain backward passes, and, in a table of their own from the same samples,
to fastmtl; at feature level, for loss weightings and in the table of all ways to one ordinary step on the summed loss.
Amortised means ``Amortized(PCGrad(), update_every=10)``, the mean of ten steps in a row, and one of the nine that do
not solve. ``chunk_size`` is compared with whole passes one by one, also on a small net with a small batch, and on a
convolutional one (two layers of 32 and 64 channels with batch normalization, images of 32 x 32). TorchJD is told its
parameters, which spares it a search, and runs in the settings named: so many tasks per ``vmap``, the Gramian summed up
over parameters (lean) or of the concatenated Jacobian. The error is that of all gradients of the trunk, relative to
their norm, with the same visiting orders, against surgery in fp64 on the gradients of T separate backward passes (to
the parameters, or to the features and from there on in one pass).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import fastmtl
from benchmarks import oracle
from benchmarks.harness import Report, check, main
from benchmarks.peers import seeded_orders, torchjd, torchjd_backward

MODELS = [("3 x 256", 256, 256), ("3 x 512", 512, 1024)]  # name, width, batch
NUM_TASKS = (8, 40)
PASSES = "T x loss.backward()"
TORCHJD = [
    (None, False),
    (None, True),
    (1, True),
]  # chunk, lean: as it comes, and the fastest two
UPDATE_EVERY = 10
CHUNKS = (1, 8, 40)


class Net(nn.Module):
    """A trunk, T heads, linear unless told otherwise, and a batch to train on."""

    def __init__(
        self, trunk: nn.Module, inputs: Tensor, num_tasks: int, head: Callable[[int], nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.trunk = trunk
        width = trunk(inputs[:2]).shape[1]
        self.heads = nn.ModuleList([nn.Linear(width, 1) if head is None else head(width) for _ in range(num_tasks)])
        self.inputs = nn.Buffer(inputs)
        self.targets = nn.Buffer(torch.randn(num_tasks, len(inputs), 1))

    def losses(self, copies: Callable[[Tensor], tuple[Tensor, ...]] | None = None) -> list[Tensor]:
        """One loss per task; ``copies`` makes the features that each head reads."""
        features = self.trunk(self.inputs)
        each = (features,) * len(self.heads) if copies is None else copies(features)
        return [
            nn.functional.mse_loss(head(z), y)
            for head, z, y in zip(self.heads, each, self.targets.unbind(0), strict=True)
        ]

    def loss(self, task: int) -> Tensor:
        """The loss of one task, by a forward pass of its own."""
        return nn.functional.mse_loss(self.heads[task](self.trunk(self.inputs)), self.targets[task])

    def clear(self) -> None:
        """Forget the gradients."""
        for p in self.parameters():
            p.grad = None

    def trunk_grads(self) -> Tensor:
        """All gradients of the trunk, flat, float64."""
        return torch.cat([p.grad.flatten() for p in self.trunk.parameters() if p.grad is not None]).double()

    def torchjd_steps(self, settings: Sequence[tuple[int | None, bool]]) -> dict[str, Callable[[], None]]:
        """TorchJD's forward and backward with PCGrad, by name of the setting; none where it is not installed."""
        steps: dict[str, Callable[[], None]] = {}
        if torchjd is None:
            return steps
        heads = [list(head.parameters()) for head in self.heads]
        for chunk, lean in settings:
            backward = torchjd_backward(torchjd.PCGrad(), list(self.trunk.parameters()), heads, chunk, lean)

            def step(backward: Callable[[Sequence[Tensor], Tensor], None] = backward) -> None:
                seen = []
                losses = self.losses(lambda z: seen.append(z) or (z,) * len(heads))  # type: ignore[func-returns-value]
                backward(losses, seen[0])

            steps[f"TorchJD, {chunk or 'all'} at once{', lean' * lean}"] = step
        return steps


def mlp(width: int, depth: int = 3) -> nn.Module:
    """Linear layers of equal width, each followed by ReLU."""
    return nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())))


def conv() -> nn.Module:
    """Images ``[batch, 3, height, width]`` to 64 features."""
    first = (nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2))
    second = (nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*first, *second)


def run(report: Report) -> None:
    for num_tasks in NUM_TASKS:
        _chunks(report, "8 x 64, batch 32", Net(mlp(64, 8), torch.randn(32, 64), num_tasks))
        _chunks(report, "3 x 256, batch 256", Net(mlp(256), torch.randn(256, 256), num_tasks))
        _chunks(report, "conv, batch 32", Net(conv(), torch.randn(32, 3, 32, 32), num_tasks))
    for name, width, batch in MODELS:
        for num_tasks in NUM_TASKS:
            net = Net(mlp(width), torch.randn(batch, width), num_tasks)
            _parameter_level(report, f"{name}, batch {batch}", net)
            _feature_level(report, f"{name}, batch {batch}", net)
            _ways(report, f"{name}, batch {batch}", net)
    _loss_weightings(report)


def _parameter_level(report: Report, name: str, net: Net) -> None:
    num_tasks = len(net.heads)

    def ours(method: fastmtl.PCGrad) -> None:
        fastmtl.backward(net.losses(), method, net.trunk)

    def accumulated() -> None:
        for t, loss in enumerate(net.losses()):
            loss.backward(retain_graph=t + 1 < num_tasks)

    method = fastmtl.PCGrad()
    theirs = net.torchjd_steps(TORCHJD)
    providers = {"fastmtl.backward": lambda: ours(method), PASSES: accumulated, **theirs}

    expected = _expected(net, seeded_orders(num_tasks))
    errors = {}
    checked = {"fastmtl.backward": lambda: ours(fastmtl.PCGrad(order=seeded_orders(num_tasks))), **theirs}
    for provider, step in checked.items():
        net.clear()
        torch.manual_seed(0)
        step()
        errors[provider] = check(provider, oracle.vector_error(net.trunk_grads(), expected), 1e-4)
    times = report.time({provider: _from_no_grads(net, step) for provider, step in providers.items()})
    shape = (num_tasks, len(expected))
    passes = {provider: times[provider] for provider in ("fastmtl.backward", PASSES)}
    report.record(f"backward, {name}", "PCGrad", shape, passes, PASSES, errors)
    if theirs:
        del times[PASSES]
        report.record(f"backward against TorchJD, {name}", "PCGrad", shape, times, "fastmtl.backward", errors)


def _ways(report: Report, name: str, net: Net) -> None:
    num_tasks = len(net.heads)
    layer = fastmtl.FeatureSurgery(fastmtl.PCGrad(), num_tasks)

    def step(method: fastmtl.GradientMethod) -> Callable[[], None]:
        return _from_no_grads(net, lambda: fastmtl.backward(net.losses(), method, net.trunk))

    def plain() -> None:
        torch.stack(net.losses()).sum().backward()

    def amortized(update_every: int, order: Tensor | str = "random") -> Callable[[], None]:
        return step(fastmtl.Amortized(fastmtl.PCGrad(order=order), update_every))

    cycle, between, checked = amortized(UPDATE_EVERY), amortized(10**9), amortized(10**9, seeded_orders(num_tasks))

    def whole_cycle() -> None:
        for _ in range(UPDATE_EVERY):
            cycle()

    expected = _expected(net, seeded_orders(num_tasks))
    for _ in range(2):  # the second with the first one's weights, of the same losses
        checked()
    ours = f"Amortized, k = {UPDATE_EVERY}"
    errors = {ours: check(ours, oracle.vector_error(net.trunk_grads(), expected), 1e-4)}
    between()  # solves
    providers = {
        "summed loss": _from_no_grads(net, plain),
        "fastmtl.backward": step(fastmtl.PCGrad()),
        ours: whole_cycle,
        "Amortized, between updates": between,
        "FeatureSurgery": _from_no_grads(net, lambda: layer.total(net.losses(layer)).backward()),
    }
    times = report.time(providers)
    times[ours] = [seconds / UPDATE_EVERY for seconds in times[ours]]
    report.record(f"ways, {name}", "PCGrad", (num_tasks, len(expected)), times, "summed loss", errors)


def _chunks(report: Report, name: str, net: Net) -> None:
    num_tasks = len(net.heads)
    orders = seeded_orders(num_tasks)
    expected = _expected(net, orders)
    providers: dict[str, Callable[[], None]] = {}
    errors = {}
    for chunk in (None, *(c for c in CHUNKS if c <= num_tasks)):

        def step(method: fastmtl.GradientMethod, chunk: int | None = chunk) -> Callable[[], None]:
            return _from_no_grads(net, lambda: fastmtl.backward(net.losses(), method, net.trunk, chunk_size=chunk))

        provider = f"chunk_size={chunk}"
        step(fastmtl.PCGrad(order=orders))()
        errors[provider] = check(provider, oracle.vector_error(net.trunk_grads(), expected), 1e-4)
        providers[provider] = step(fastmtl.PCGrad())
    shape = (num_tasks, len(expected))
    report.measure(f"chunk_size, {name}", "PCGrad", shape, providers, "chunk_size=None", errors)


def _expected(net: Net, orders: Tensor) -> Tensor:
    """PCGrad's gradient of the trunk: one backward pass per task, then the algorithm in fp64."""
    params = list(net.trunk.parameters())
    grads = [torch.autograd.grad(loss, params, retain_graph=True) for loss in net.losses()]
    rows = torch.stack([torch.cat([g.flatten() for g in row]) for row in grads]).double()
    return oracle.pcgrad_weights(rows @ rows.T, orders) @ rows


def _from_no_grads(net: Net, step: Callable[[], object]) -> Callable[[], None]:
    def cleared() -> None:
        net.clear()
        step()

    return cleared


def _loss_weightings(report: Report) -> None:
    name, width, batch = MODELS[0]
    for num_tasks in NUM_TASKS:
        net = Net(mlp(width), torch.randn(batch, width), num_tasks)

        def step(combine: Callable[[list[Tensor]], Tensor], net: Net = net) -> Callable[[], None]:
            return _from_no_grads(net, lambda: combine(net.losses()).backward())

        providers = {"summed loss": step(lambda losses: torch.stack(losses).sum())}
        for weighting in weightings(num_tasks):
            providers[type(weighting).__name__] = step(weighting)
        size = sum(p.numel() for p in net.trunk.parameters())
        question = f"loss weighting, {name}, batch {batch}"
        report.measure(question, "loss weightings", (num_tasks, size), providers, "summed loss")


def weightings(num_tasks: int) -> list[fastmtl.LossWeighting]:
    """One of each kind."""
    return [
        fastmtl.UncertaintyWeighting(num_tasks),
        fastmtl.DWA(num_tasks, steps_per_epoch=10),
        fastmtl.LBTW(num_tasks),
        fastmtl.HTW(num_tasks, main=0, total_steps=1000),
    ]


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

    features = net.trunk(net.inputs)
    leaf = features.detach().requires_grad_()
    losses = net.losses(lambda _: (leaf,) * num_tasks)
    rows = torch.stack([torch.autograd.grad(loss, leaf)[0].flatten() for loss in losses]).double()
    gramian = rows @ rows.T
    orders = torch.arange(num_tasks).expand(num_tasks, -1)
    methods: list[tuple[str, fastmtl.GradientMethod]] = [
        ("PCGrad", fastmtl.PCGrad(order="fixed")),
        ("MGDA", fastmtl.MGDA()),
    ]
    for method, fixed in methods:
        surgery = fastmtl.FeatureSurgery(fixed, num_tasks)
        through(surgery)()
        found = net.trunk_grads()
        if method == "PCGrad":
            weights = oracle.pcgrad_weights(gramian, orders)
        else:
            assert surgery.result is not None
            weights = surgery.result.weights
            check("duality gap", oracle.duality_gap(gramian, weights), 1e-4)
        net.clear()
        features.backward((weights @ rows).to(features.dtype).view_as(features), retain_graph=True)
        error = check(name, oracle.vector_error(found, net.trunk_grads()), 1e-4)
        providers = {
            "summed loss": plain,
            "FeatureSurgery": through(fastmtl.FeatureSurgery(getattr(fastmtl, method)(), num_tasks)),
        }
        shape = (num_tasks, rows.shape[1])
        report.measure(f"layer, {name}", method, shape, providers, "summed loss", {"FeatureSurgery": error})


if __name__ == "__main__":
    main(run, threads=1, clock="cpu", rounds=9)
