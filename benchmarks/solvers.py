"""How long does a method think about a ready Gramian, and how good is its answer?

Gramians of random gradients whose norms differ by an order of magnitude. Ratios are to fastmtl's method object, which
also checks its input; ``ops`` is what a training step calls. GradVac's targets, and the weights of SDMGrad and MoDo,
move as the calls go on, for all. The error is that of the weights, relative to their norm: for PCGrad and GradVac with
the same visiting orders, and with SDMGrad and MoDo of the first step. That of min-norm is the duality gap over the
smallest squared norm: 0 at the optimum; that of UPGrad and DualProj the error of the direction, relative to its norm;
that of NashMTL and FairGrad the largest error of an equation, against the terms it is summed from; that of CAGrad the
duality gap over the largest squared norm. SDMGrad and MoDo get the Gramian of all their batches, TorchJD's the products
of two. EPO, which TorchJD has not, and the weights that look at no gradients have no error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastmtl
from benchmarks import oracle, peers
from benchmarks.harness import Report, check, main
from benchmarks.peers import seeded_orders, torchjd

NUM_TASKS = (2, 8, 32, 64, 128)
CONVERGED, ITERATIONS = (8, 64), 10_000  # where TorchJD's Frank-Wolfe is also run that long, which takes long
BETA = 0.01  # of GradVac
RADIUS = 0.4  # of CAGrad


def random_gramian(num_tasks: int) -> Tensor:
    """A full-rank Gramian, float64."""
    rows = torch.randn(num_tasks, 4 * num_tasks, dtype=torch.float64)
    rows *= torch.logspace(-0.5, 0.5, num_tasks, dtype=torch.float64)[:, None]
    return rows @ rows.T


def run(report: Report) -> None:
    for num_tasks in NUM_TASKS:
        gramian = random_gramian(num_tasks)
        _pcgrad(report, gramian)
        _gradvac(report, gramian)
        _min_norm(report, gramian)
        _upgrad(report, gramian)
        _dualproj(report, gramian)
        _fairgrad(report, gramian, 1.0, "NashMTL")
        _fairgrad(report, gramian, 2.0, "FairGrad, alpha = 2")
        _cagrad(report, gramian)
        _aligned_mtl(report, gramian)
        _imtl_g(report, gramian)
        _config(report, gramian)
        _epo(report, gramian)
        if num_tasks > 3:
            _krum(report, gramian)
        _sdmgrad(report, num_tasks)
        _modo(report, num_tasks)
        _plain(report, gramian)


def _pcgrad(report: Report, gramian: Tensor) -> None:
    method, rng, batch = fastmtl.PCGrad(), torch.tensor([1, 0]), gramian[None]
    orders = seeded_orders(len(gramian))
    providers: dict[str, Callable[[], Any]] = {
        "fastmtl": lambda: method(gramian),
        "fastmtl.ops": lambda: fastmtl.ops.pcgrad(batch, rng=rng),
    }
    found = {
        "fastmtl": fastmtl.PCGrad(order=orders)(gramian),
        "fastmtl.ops": fastmtl.ops.pcgrad(batch, order=orders)[0],
    }
    if torchjd is not None:
        weighting = torchjd.PCGradWeighting()
        providers["TorchJD"] = lambda: weighting(gramian)
        torch.manual_seed(0)
        found["TorchJD"] = weighting(gramian)
    _report(report, "PCGrad", gramian, providers, _errors(found, oracle.pcgrad_weights(gramian, orders)))


def _gradvac(report: Report, gramian: Tensor) -> None:
    method, rng, batch = fastmtl.GradVac(beta=BETA), torch.tensor([1, 0]), gramian[None]
    targets = torch.zeros_like(batch)
    orders = seeded_orders(len(gramian), others_only=True)

    def ops() -> None:
        nonlocal targets
        _, targets = fastmtl.ops.gradvac(batch, targets, rng=rng, beta=BETA)

    providers: dict[str, Callable[[], Any]] = {"fastmtl": lambda: method(gramian), "fastmtl.ops": ops}
    found = {
        "fastmtl": fastmtl.GradVac(beta=BETA, order=orders)(gramian),
        "fastmtl.ops": fastmtl.ops.gradvac(batch, targets, order=orders, beta=BETA)[0][0],
    }
    if torchjd is not None:
        weighting = torchjd.GradVacWeighting(beta=BETA)
        providers["TorchJD"] = lambda: weighting(gramian)
        torch.manual_seed(0)
        found["TorchJD"] = weighting(gramian)
    # The first step, with targets of 0, is PCGrad's.
    _report(report, "GradVac", gramian, providers, _errors(found, oracle.pcgrad_weights(gramian, orders)))


def _min_norm(report: Report, gramian: Tensor) -> None:
    method, batch = fastmtl.MGDA(), gramian[None]
    providers: dict[str, Callable[[], Any]] = {
        "fastmtl": lambda: method(gramian),
        "fastmtl.ops": lambda: fastmtl.ops.min_norm(batch)[0][0],
    }
    if torchjd is not None:
        default = torchjd.MGDAWeighting()
        providers["TorchJD"] = lambda: default(gramian)
        if len(gramian) in CONVERGED:
            longer = torchjd.MGDAWeighting(epsilon=1e-12, max_iters=ITERATIONS)
            providers[f"TorchJD, {ITERATIONS:,} iterations"] = lambda: longer(gramian)
    errors = {name: oracle.duality_gap(gramian, f()) for name, f in providers.items()}
    for name in ("fastmtl", "fastmtl.ops"):
        check(name, errors[name], 1e-9)
    _report(report, "MGDA", gramian, providers, errors)


def _upgrad(report: Report, gramian: Tensor) -> None:
    each = torch.eye(len(gramian), dtype=torch.float64)[None] / len(gramian)
    _dual_cone(report, gramian, fastmtl.UPGrad(), each)


def _dualproj(report: Report, gramian: Tensor) -> None:
    mean = torch.full((1, 1, len(gramian)), 1 / len(gramian), dtype=torch.float64)
    _dual_cone(report, gramian, fastmtl.DualProj(), mean)


def _dual_cone(report: Report, gramian: Tensor, method: fastmtl.GradientMethod, combinations: Tensor) -> None:
    name, batch = type(method).__name__, gramian[None]
    providers: dict[str, Callable[[], Any]] = {
        "fastmtl": lambda: method(gramian),
        "fastmtl.ops": lambda: fastmtl.ops.dual_cone(batch, combinations, noise=5e-7)[0].sum(1)[0],
    }
    if torchjd is not None:
        try:
            weighting = getattr(torchjd, f"{name}Weighting")()
            providers["TorchJD"] = lambda: weighting(gramian)
        except ImportError as error:  # its solver is an extra
            print(f"NO COMPARISON WITH TORCHJD's {name}: {error}")
    expected = oracle.dual_cone_weights(gramian, combinations[0]).sum(0)
    errors = {by: oracle.direction_error(gramian, f(), expected) for by, f in providers.items()}
    for by in ("fastmtl", "fastmtl.ops"):
        check(by, errors[by], 1e-9)
    _report(report, name, gramian, providers, errors)


def _fairgrad(report: Report, gramian: Tensor, alpha: float, name: str) -> None:
    method, batch = fastmtl.FairGrad(alpha), gramian[None]
    providers: dict[str, Callable[[], Any]] = {
        "fastmtl": lambda: method(gramian),
        "fastmtl.ops": lambda: fastmtl.ops.fairgrad(batch, alpha=alpha)[0][0],
    }
    if torchjd is not None and alpha == 1 and peers.installed("cvxpy", "ecos"):
        factor = torch.linalg.cholesky(gramian)

        def nash_mtl() -> Tensor:
            """Its weights, from its combination of gradients that have this Gramian; brought to length sqrt(T)."""
            found = torchjd.NashMTL(len(gramian), max_norm=0.0)(factor)
            weights = torch.linalg.solve(factor.mT, found)
            return weights * (len(gramian) / (weights @ gramian @ weights)).sqrt()

        providers["TorchJD"] = nash_mtl
    if torchjd is not None:
        weighting = torchjd.FairGradWeighting(alpha)
        providers["TorchJD FairGrad"] = lambda: weighting(gramian)
    errors = {by: oracle.fairness_error(gramian, f(), alpha) for by, f in providers.items()}
    for by in ("fastmtl", "fastmtl.ops"):
        check(by, errors[by], 1e-9)
    _report(report, name, gramian, providers, errors)


def _cagrad(report: Report, gramian: Tensor) -> None:
    method, batch = fastmtl.CAGrad(RADIUS), gramian[None]
    providers: dict[str, Callable[[], Any]] = {
        "fastmtl": lambda: method(gramian),
        "fastmtl.ops": lambda: fastmtl.ops.cagrad(batch, c=RADIUS)[0][0],
        "SciPy SLSQP": lambda: peers.slsqp_cagrad(gramian, RADIUS),
    }
    if torchjd is not None and peers.installed("cvxpy", "clarabel"):
        weighting = torchjd.CAGradWeighting(c=RADIUS)
        providers["TorchJD"] = lambda: weighting(gramian)
    errors = {by: oracle.conflict_averse_gap(gramian, f(), RADIUS) for by, f in providers.items()}
    for by in ("fastmtl", "fastmtl.ops"):
        check(by, errors[by], 1e-9)
    _report(report, "CAGrad", gramian, providers, errors)


def _aligned_mtl(report: Report, gramian: Tensor) -> None:
    method, batch = fastmtl.AlignedMTL(), gramian[None]
    providers: dict[str, Callable[[], Any]] = {
        "fastmtl": lambda: method(gramian),
        "fastmtl.ops": lambda: fastmtl.ops.aligned_mtl(batch)[0],
    }
    if torchjd is not None:
        weighting = torchjd.AlignedMTLWeighting()
        providers["TorchJD"] = lambda: weighting(gramian)
    found = {name: f() for name, f in providers.items()}
    _report(report, "AlignedMTL", gramian, providers, _errors(found, oracle.aligned_weights(gramian)))


def _imtl_g(report: Report, gramian: Tensor) -> None:
    method, batch = fastmtl.IMTLG(), gramian[None]
    providers: dict[str, Callable[[], Any]] = {
        "fastmtl": lambda: method(gramian),
        "fastmtl.ops": lambda: fastmtl.ops.equal_cosines(batch, length="sum_to_one")[0],
    }
    if torchjd is not None:
        weighting = torchjd.IMTLGWeighting()
        providers["TorchJD"] = lambda: weighting(gramian)
    expected = oracle.equal_cosines_weights(gramian)
    found = {name: f() for name, f in providers.items()}
    _report(report, "IMTLG", gramian, providers, _errors(found, expected / expected.sum()))


def _config(report: Report, gramian: Tensor) -> None:
    method, batch = fastmtl.ConFIG(), gramian[None]
    providers: dict[str, Callable[[], Any]] = {
        "fastmtl": lambda: method(gramian),
        "fastmtl.ops": lambda: fastmtl.ops.equal_cosines(batch)[0],
    }
    found = {name: f() for name, f in providers.items()}
    if torchjd is not None:
        aggregator = torchjd.ConFIG()
        jacobian = torch.linalg.cholesky(gramian)  # TorchJD's wants gradients: the smallest with this Gramian
        providers["TorchJD"] = lambda: aggregator(jacobian)
        found["TorchJD"] = torch.linalg.solve(jacobian.T, aggregator(jacobian))
    _report(report, "ConFIG", gramian, providers, _errors(found, oracle.config_weights(gramian)))


def _epo(report: Report, gramian: Tensor) -> None:
    method, losses = fastmtl.EPO(), torch.ones(len(gramian), dtype=torch.float64)
    _report(report, "EPO", gramian, {"fastmtl": lambda: method(gramian, losses=losses)}, {})


def _krum(report: Report, gramian: Tensor) -> None:
    method, batch = fastmtl.Krum(num_byzantine=1, distance="euclidean"), gramian[None]
    providers: dict[str, Callable[[], Any]] = {
        "fastmtl": lambda: method(gramian),
        "fastmtl.ops": lambda: fastmtl.ops.krum(batch, None, 1, 1, "euclidean")[0],
    }
    if torchjd is not None:
        weighting = torchjd.KrumWeighting(n_byzantine=1)
        providers["TorchJD"] = lambda: weighting(gramian)
    found = {name: f() for name, f in providers.items()}
    _report(report, "Krum", gramian, providers, _errors(found, oracle.krum_weights(gramian, 1)))


def _batches(num_tasks: int, count: int) -> Tensor:
    """The Gramian of so many batches: a mean gradient per task, and noise."""
    rows = torch.randn(num_tasks, 4 * num_tasks, dtype=torch.float64)
    each = rows + 0.3 * torch.randn(count, *rows.shape, dtype=torch.float64)
    flat = each.flatten(0, 1) / (4 * num_tasks) ** 0.5
    return flat @ flat.T


def _sdmgrad(report: Report, num_tasks: int) -> None:
    gramian = _batches(num_tasks, 3)
    options: dict[str, Any] = {"lr": 0.5, "momentum": 0.5}
    cross = gramian[:num_tasks, num_tasks : 2 * num_tasks].contiguous()
    new = lambda: fastmtl.SDMGrad(num_tasks, rescale="sum_to_one", **options)  # noqa: E731
    method = new()
    providers: dict[str, Callable[[], Any]] = {"fastmtl": lambda: method(gramian)}
    found = {"fastmtl": new()(gramian)[2 * num_tasks :]}
    if torchjd is not None:
        weighting = torchjd.SDMGradWeighting(**options)
        providers["TorchJD"] = lambda: weighting(cross)
        found["TorchJD"] = torchjd.SDMGradWeighting(**options)(cross)
    scaled = cross / cross.diagonal().clamp(min=0).sqrt().mean() ** 2
    p = torch.full((num_tasks,), 1 / num_tasks, dtype=torch.float64)
    expected = (oracle.projected_steps(scaled, p, 0.3 * p, 0.5, 0.5, 0.0, 20) + 0.3 * p) / 1.3
    _report(report, "SDMGrad", cross, providers, _errors(found, expected))


def _modo(report: Report, num_tasks: int) -> None:
    gramian = _batches(num_tasks, 3)
    cross = gramian[:num_tasks, num_tasks : 2 * num_tasks].contiguous()
    method = fastmtl.MoDo(num_tasks)
    providers: dict[str, Callable[[], Any]] = {"fastmtl": lambda: method(gramian)}
    found = {"fastmtl": fastmtl.MoDo(num_tasks)(gramian)[2 * num_tasks :]}
    if torchjd is not None:
        weighting = torchjd.MoDoWeighting()
        providers["TorchJD"] = lambda: weighting(cross)
        found["TorchJD"] = torchjd.MoDoWeighting()(cross)
    p = torch.full((num_tasks,), 1 / num_tasks, dtype=torch.float64)
    _report(report, "MoDo", cross, providers, _errors(found, oracle.projected_steps(cross, p, 0 * p, 0.1, 0.0, 0.1, 1)))


def _plain(report: Report, gramian: Tensor) -> None:
    """What looks at no gradients."""
    weights = torch.linspace(1, 2, len(gramian), dtype=torch.float64)
    for name, method, theirs in (
        ("Sum", fastmtl.Sum(), ("SumWeighting",)),
        ("Mean", fastmtl.Mean(), ("MeanWeighting",)),
        ("Constant", fastmtl.Constant(weights), ("ConstantWeighting", weights)),
        ("RandomGradWeights", fastmtl.RandomGradWeights(), ("RandomWeighting",)),
    ):
        providers: dict[str, Callable[[], Any]] = {"fastmtl": lambda method=method: method(gramian)}  # type: ignore[misc]
        if torchjd is not None:
            weighting = getattr(torchjd, theirs[0])(*theirs[1:])
            providers["TorchJD"] = lambda weighting=weighting: weighting(gramian)  # type: ignore[misc]
        _report(report, name, gramian, providers, {})


def _errors(found: dict[str, Tensor], expected: Tensor) -> dict[str, float]:
    return {name: check(name, oracle.vector_error(w, expected), 1e-7) for name, w in found.items()}


def _report(
    report: Report, method: str, gramian: Tensor, providers: dict[str, Callable[[], Any]], errors: dict[str, float]
) -> None:
    report.measure("solver", method, (len(gramian), 0), providers, "fastmtl", errors, "float64")


if __name__ == "__main__":
    main(run, threads=1, clock="cpu")
