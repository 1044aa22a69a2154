"""Many processes: the layer and the loss weightings under DDP and FSDP2, against one process on the whole batch."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastmtl
from benchmarks import distributed as benchmark
from tests.ranks import TIMEOUT, Ranks, processes

TASKS, BATCH, STEPS = 3, 12, 20
Wrap = Callable[[nn.Module], Any]


def generator() -> torch.Generator:
    """Another seed on each rank; the single process has that of the first."""
    return torch.Generator().manual_seed(dist.get_rank() if dist.is_initialized() else 0)


METHODS: dict[str, Callable[[], Any]] = {
    "PCGrad": lambda: fastmtl.PCGrad(generator=generator()),
    "GradVac": lambda: fastmtl.GradVac(generator=generator()),
    "MGDA": fastmtl.MGDA,
    "PELTR": lambda: fastmtl.PELTR([0.1, 0.2, 0.3], scale_heads=False),
    "GradNorm": lambda: fastmtl.GradNorm(scale_heads=False),
    "UncertaintyWeighting": lambda: fastmtl.UncertaintyWeighting(TASKS),
    "DWA": lambda: fastmtl.DWA(TASKS, steps_per_epoch=4),
}
MORE_METHODS = METHODS | {
    "GradNorm, Adam": lambda: fastmtl.GradNorm(scale_heads=False, optimizer="adam"),
    "Amortized": lambda: fastmtl.Amortized(fastmtl.PCGrad(generator=generator()), update_every=3),
    "LBTW": lambda: fastmtl.LBTW(TASKS),
    "HTW": lambda: fastmtl.HTW(TASKS, main=1, total_steps=STEPS),
    "RLW": lambda: fastmtl.RLW(TASKS, generator=generator()),
    "STCH": lambda: fastmtl.STCH(TASKS, variant="log", warmup_epochs=0, steps_per_epoch=3),
    "FAMO": lambda: fastmtl.FAMO(TASKS, after="next_batch"),
}


class Model(nn.Module):
    """Its total loss. Labels that are missing are NaN."""

    def __init__(self, method: Any, **options: Any) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6))
        self.surgery = fastmtl.FeatureSurgery(method, TASKS, **options)
        self.heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(TASKS))

    def forward(self, x: Tensor, y: Tensor, losses: str) -> Tensor:
        """``losses``: ``"means"``: of each rank's samples; else of all; ``"None"``: where there is no sample here."""
        zs = self.surgery(self.trunk(x))
        if losses == "means":
            each = [
                ((head(z)[:, 0] - y[:, t]) ** 2).mean() for t, (head, z) in enumerate(zip(self.heads, zs, strict=True))
            ]
            return self.surgery.total(each)
        sums: list[Tensor | None] = []
        counts = []
        for t, (head, z) in enumerate(zip(self.heads, zs, strict=True)):
            here = ~y[:, t].isnan()
            absent = losses == "None" and not here.any()
            sums.append(None if absent else ((head(z[here])[:, 0] - y[here, t]) ** 2).sum())
            counts.append(here.sum())
        return self.surgery.total(fastmtl.distributed.mean(sums, counts))


def ddp(model: nn.Module, **options: Any) -> nn.Module:
    return DistributedDataParallel(model, **options)


def fsdp(model: Any) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (model.trunk, *model.heads, model):
        fully_shard(part, mesh=mesh)
    return model


SYNC_BUFFERS = "forward_sync_buffers"  # before torch 2.13: broadcast_buffers
if SYNC_BUFFERS not in signature(DistributedDataParallel).parameters:
    SYNC_BUFFERS = "broadcast_buffers"

WRAPS = {"DDP": ddp, "FSDP2": fsdp}


def whole_batches(dtype: torch.dtype, missing: bool = False) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, BATCH, 5, generator=random, dtype=torch.float64)
    sizes = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    y = sizes * (1 + 0.3 * torch.randn(STEPS, BATCH, TASKS, generator=random, dtype=torch.float64) + x[..., :3])
    if missing:
        y[torch.rand(y.shape, generator=random) < 0.3] = float("nan")
        y[::3, :3, 0] = float("nan")  # the first task is absent from the first rank
        y[1::5, :3] = float("nan")  # all are
        y[2::5, 3:, 1:] = float("nan")  # all but one are, from the others
        y[3::7, :, 2] = float("nan")  # the last is, from all
    return [(a.to(dtype), b.to(dtype)) for a, b in zip(x, y, strict=True)]


def own_slice(unequal: bool) -> slice:
    """Of the batch, this rank's part."""
    if not dist.is_initialized():
        return slice(None)
    rank, size = dist.get_rank(), dist.get_world_size()
    if not unequal:
        return slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    bounds = {2: [0, 3, 12], 4: [0, 3, 4, 6, 12]}[size]
    return slice(bounds[rank], bounds[rank + 1])


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and the method's state, whole."""
    model = getattr(model, "module", model)
    state = {name: x for name, x in model.state_dict().items() if isinstance(x, Tensor)}
    return {name: (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone() for name, x in state.items()}


def make(method: str, dtype: torch.dtype, wrap: Wrap | None, **options: Any) -> tuple[Any, torch.optim.Optimizer]:
    """A model, wrapped where there are ranks; the options are of the layer."""
    torch.manual_seed(0)
    weighting = MORE_METHODS[method]()
    for p in weighting.parameters():  # float32 whatever the model is cast to
        p.data = p.data.to(dtype)
    model: Any = Model(weighting, **options).to(dtype)
    if wrap is not None and dist.is_initialized():
        model = wrap(model)
    return model, torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.5)


def steps(
    model: Any,
    optimizer: torch.optim.Optimizer,
    dtype: torch.dtype = torch.float64,
    losses: str = "means",
    accumulate: int = 1,
    which: range = range(STEPS),
) -> dict[str, Tensor]:
    """Steps on this rank's part of the batches; in one process on all."""
    inner = getattr(model, "_orig_mod", model)
    part = own_slice(unequal=losses != "means")
    batches = whole_batches(dtype, missing=losses != "means")
    for i in which:
        x, y = batches[i]
        last = i % accumulate == accumulate - 1
        if hasattr(inner, "set_requires_gradient_sync"):
            inner.set_requires_gradient_sync(last)
        with nullcontext() if last or not hasattr(inner, "no_sync") else inner.no_sync():
            model(x[part], y[part], losses).backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
    return state_of(inner)


def train(wrap: str | None, method: str, dtype: torch.dtype = torch.float64, **options: Any) -> dict[str, Tensor]:
    """20 steps."""
    return steps(*make(method, dtype, WRAPS[wrap] if wrap else None), dtype, **options)


def train_ddp(method: str, options: dict[str, Any], **others: Any) -> dict[str, Tensor]:
    """The same, with options of DDP."""
    return steps(*make(method, torch.float64, partial(ddp, **options)), **others)


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest, relative to the largest entry of a tensor."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for name, x in expected.items():
        a, b = found[name].double(), x.double()
        assert a.shape == b.shape, name
        assert torch.equal(a.isnan(), b.isnan()), name
        if b.numel():
            a, b = a.nan_to_num(), b.nan_to_num()
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)))
    return worst


def assert_one_process(found: list[dict[str, Tensor]], expected: dict[str, Tensor], bound: float) -> None:
    """Every rank has the same bits, and what a single process has."""
    for other in found[1:]:
        for name, x in found[0].items():
            torch.testing.assert_close(other[name], x, rtol=0, atol=0, equal_nan=True, msg=name)
    worst = difference(found[0], expected)
    print(f"largest difference {worst:.1e}")
    assert worst <= bound


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with processes(4) as pool:
        yield pool


def cases(quick: Callable[..., bool], **axes: Iterable) -> pytest.MarkDecorator:
    """All combinations; `make test` runs the quick ones, `make test-dist` all."""
    combinations = [
        pytest.param(*case, id="-".join(map(str, case)), marks=[] if quick(*case) else pytest.mark.slow)
        for case in itertools.product(*axes.values())
    ]
    return pytest.mark.parametrize(",".join(axes), combinations)


FEW = ("PCGrad", "GradNorm", "UncertaintyWeighting")
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4}


@cases(lambda w, m, d, size: size == 2 and d == torch.float64, wrap=WRAPS, method=METHODS, dtype=BOUNDS, size=(2, 4))
def test_equals_one_process(ranks: Ranks, size: int, wrap: str, method: str, dtype: torch.dtype) -> None:
    found = ranks.run(size, train, wrap, method, dtype)
    assert_one_process(found, train(None, method, dtype), BOUNDS[dtype])


@cases(lambda w, m, size: size == 4 and (w == "DDP" or m in FEW), wrap=WRAPS, method=MORE_METHODS, size=(2, 4))
def test_unequal_batches_and_missing_labels(ranks: Ranks, size: int, wrap: str, method: str) -> None:
    # A task is absent from one rank, all are from one, one is from all.
    if wrap == "DDP":
        found = ranks.run(size, train_ddp, method, {"find_unused_parameters": True}, losses="None")
    else:
        found = ranks.run(size, train, wrap, method, losses="zeros")
    assert_one_process(found, train(None, method, losses="None"), 1e-9)


def losses_apart_from_the_features() -> tuple[Tensor, Tensor]:
    """On the last rank none reads them."""
    surgery = fastmtl.FeatureSurgery(fastmtl.MGDA(), 2)
    z, other = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)
    a, b = surgery(z)
    last = dist.get_rank() == dist.get_world_size() - 1
    surgery.total([other.sum(), other.sum()] if last else [a[0], 2 * b[1]]).backward()
    assert z.grad is not None
    assert surgery.result is not None
    return z.grad, surgery.result.weights


def test_a_rank_whose_losses_do_not_read_the_features(ranks: Ranks) -> None:
    (first, weights), (last, same) = ranks.run(2, losses_apart_from_the_features)
    torch.testing.assert_close(weights, torch.tensor([0.8, 0.2], dtype=torch.float64))
    assert torch.equal(weights, same)
    torch.testing.assert_close(first, torch.tensor([0.8, 0.4]))
    assert torch.equal(last, torch.zeros(2))


def hsdp(model: Any) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for part in (model.trunk, *model.heads, model):
        fully_shard(part, mesh=mesh)
    return model


def train_scaled(wrap: str | None, method: str) -> tuple[dict[str, Tensor], list[float]]:
    """With a loss scale; a label on the last rank overflows in some steps. Also the scales."""
    scaler = torch.amp.GradScaler("cpu", growth_interval=4)
    model, optimizer = make(method, torch.float64, WRAPS[wrap] if wrap else None, scaler=scaler)
    scales = []
    for i, (x, y) in enumerate(whole_batches(torch.float64)):
        y[-1, 1] *= 1e200 if i % 5 == 2 else 1.0
        part = own_slice(unequal=False)
        scaler.scale(model(x[part], y[part], "means")).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return state_of(model), scales


@cases(lambda wrap, method: method in FEW, wrap=WRAPS, method=METHODS)
def test_overflow_on_one_rank(ranks: Ranks, wrap: str, method: str) -> None:
    found = ranks.run(2, train_scaled, wrap, method)
    expected, scales = train_scaled(None, method)
    assert [b < a for a, b in itertools.pairwise(scales)] == [i % 5 == 2 for i in range(1, STEPS)]
    assert all(each == scales for _, each in found)
    assert_one_process([state for state, _ in found], expected, 1e-9)


@cases(lambda wrap, method: wrap == "DDP", wrap=WRAPS, method=FEW)
def test_a_single_rank_is_no_ranks(ranks: Ranks, wrap: str, method: str) -> None:
    assert_one_process(ranks.run(1, train, wrap, method), train(None, method), 0.0)


def train_hsdp(method: str) -> dict[str, Tensor]:
    return steps(*make(method, torch.float64, hsdp))


@pytest.mark.parametrize("method", ["PCGrad", "UncertaintyWeighting"])
def test_sharded_within_and_copied_between_groups(ranks: Ranks, method: str) -> None:
    assert_one_process(ranks.run(4, train_hsdp, method), train(None, method), 1e-9)


def train_in_pairs(method: str) -> dict[str, Tensor]:
    """Two pairs of ranks, each pair with the whole batch."""
    group = [dist.new_group([0, 1]), dist.new_group([2, 3])][dist.get_rank() // 2]
    part = slice(6) if dist.get_rank() % 2 == 0 else slice(6, None)
    model, optimizer = make(method, torch.float64, partial(ddp, process_group=group), process_group=group)
    for x, y in whole_batches(torch.float64):
        model(x[part], y[part], "means").backward()
        optimizer.step()
        optimizer.zero_grad()
    return state_of(model)


@pytest.mark.parametrize("method", ["MGDA", "DWA"])
def test_group_of_some_ranks(ranks: Ranks, method: str) -> None:
    assert_one_process(ranks.run(4, train_in_pairs, method), train(None, method), 1e-9)


def train_apart(method: str) -> dict[str, Tensor]:
    return steps(*make(method, torch.float64, ddp, process_group=None))


@pytest.mark.parametrize("method", ["PCGrad", "MGDA", "DWA"])
def test_ranks_left_alone_are_not_one_process(ranks: Ranks, method: str) -> None:
    found = ranks.run(2, train_apart, method)
    assert difference(found[0], train(None, method)) > 1e-6


@cases(
    lambda method, options: method == "GradNorm",
    method=FEW,
    options=[
        {"find_unused_parameters": True},
        {"static_graph": True},
        {"gradient_as_bucket_view": True},
        {"bucket_cap_mb": 1e-4},
        {"bucket_cap_mb": 1e-4, "find_unused_parameters": True, "gradient_as_bucket_view": True},
        {SYNC_BUFFERS: False},
    ],
)
def test_options_of_ddp(ranks: Ranks, method: str, options: dict[str, Any]) -> None:
    found = ranks.run(2, train_ddp, method, options)
    assert_one_process(found, train(None, method), 1e-9)


@cases(lambda wrap, method: method in FEW, wrap=WRAPS, method=METHODS)
def test_accumulation_without_synchronisation(ranks: Ranks, wrap: str, method: str) -> None:
    found = ranks.run(2, train, wrap, method, accumulate=2)
    assert_one_process(found, train(None, method, accumulate=2), 1e-9)


def train_compiled(wrap: str, method: str) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.compile
        model, optimizer = make(method, torch.float64, WRAPS[wrap])
        return steps(torch.compile(model, backend="aot_eager"), optimizer)


@cases(lambda wrap, method: method == "GradNorm", wrap=WRAPS, method=["PCGrad", "GradNorm", "DWA"])
def test_compiled(ranks: Ranks, wrap: str, method: str) -> None:
    found = ranks.run(2, train_compiled, wrap, method)
    assert_one_process(found, train(None, method), 1e-9)


def load_or_save(folder: Path, wrap: str, method: str, load: bool) -> dict[str, Tensor]:
    """The first half, which is saved; or the second half."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer = make(method, torch.float64, WRAPS[wrap])
    if not load:
        steps(model, optimizer, which=range(STEPS // 2))
    state, moments = get_state_dict(model, optimizer)
    saved = {"model": state, "optimizer": moments}
    if not load:
        dcp.save(saved, checkpoint_id=folder)
        return {}
    dcp.load(saved, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    return steps(model, optimizer, which=range(STEPS // 2, STEPS))


@cases(lambda w, m: w == "FSDP2" and m in ("GradVac", "GradNorm, Adam", "Amortized"), wrap=WRAPS, method=MORE_METHODS)
def test_resumed_on_fewer_ranks(ranks: Ranks, tmp_path: Path, wrap: str, method: str) -> None:
    ranks.run(4, load_or_save, tmp_path, wrap, method, False)
    found = ranks.run(2, load_or_save, tmp_path, wrap, method, True)
    assert_one_process(found, train(None, method), 1e-9)


def count_bytes(method: str) -> list[int]:
    """Bytes of each all-reduce that Python calls in one step: those of DDP are called in C++."""
    model, optimizer = make(method, torch.float64, ddp)
    steps(model, optimizer, which=range(1))
    original, found = dist.all_reduce, []

    def all_reduce(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(x.numel() * x.element_size())
        return original(x, *args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        steps(model, optimizer, which=range(1, 2))
    finally:
        dist.all_reduce = original
    return found


@pytest.mark.parametrize(
    ("method", "numbers"),
    [("MGDA", TASKS**2 + TASKS), ("GradNorm", TASKS**2 + 2 * TASKS), ("DWA", 2 * TASKS)],
)
def test_one_small_all_reduce_per_step(ranks: Ranks, method: str, numbers: int) -> None:
    assert ranks.run(2, count_bytes, method) == [[8 * numbers]] * 2


@pytest.mark.parametrize("way", [way for way in benchmark.WAYS if way[0] in "fF"])
def test_benchmark(ranks: Ranks, way: str) -> None:
    wrap = benchmark.WAYS[way][1]
    case = way, "GradNorm", torch.float64
    found, plain = (
        ranks.run(4, benchmark.train, case),
        ranks.run(4, benchmark.train, (f"summed loss, {wrap}", "sum", torch.float64)),
    )
    assert {sent for _, sent in found} == {benchmark.formula(case, 4, plain[0][1])}
    assert all(benchmark.difference(params, found[0][0]) == 0 for params, _ in found)
    assert benchmark.difference(found[0][0], benchmark.train(case)[0]) < 1e-9


class Weighted(nn.Module):
    """Its losses; the weighting is within, its parameters are not used by the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(5, 6)
        self.heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(TASKS))
        self.weighting = fastmtl.UncertaintyWeighting(TASKS)
        self.weighting.s.data = self.weighting.s.data.double()

    def forward(self, x: Tensor, y: Tensor) -> list[Tensor]:
        z = self.trunk(x).tanh()
        return [((head(z)[:, 0] - y[:, t]) ** 2).mean() for t, head in enumerate(self.heads)]


def train_weighted(wrap: Wrap | None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    net: Any = Weighted().double()
    model = net if wrap is None else wrap(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    part = own_slice(unequal=False)
    for x, y in whole_batches(torch.float64)[:4]:
        fastmtl.backward(model(x[part], y[part]), net.weighting, net.trunk, model=net)
        optimizer.step()
        optimizer.zero_grad()
    return state_of(net)


@pytest.mark.parametrize("wrap", WRAPS)
def test_backward_with_a_learned_weighting_within_the_wrapped_module(ranks: Ranks, wrap: str) -> None:
    assert_one_process(ranks.run(2, train_weighted, WRAPS[wrap]), train_weighted(None), 1e-9)


def evaluate() -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Only the first rank does."""
    model, _ = make("DWA", torch.float64, None)
    before = state_of(model)
    x, y = whole_batches(torch.float64)[0]
    if dist.get_rank() == 0:
        with torch.no_grad():
            model(x, y, "means")
        model.eval()
        return model(x, y, "means").item(), before, state_of(model)
    return 0.0, before, before


def told_outside_the_call() -> list[Any]:
    """Preferences drawn before each call, losses told after it; the mean of the ranks' losses is 1, 2 and 3."""
    factor = 1 + 0.4 * (2 * dist.get_rank() - 1) if dist.is_initialized() else 1.0
    losses = factor * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    cosmos, famo = fastmtl.COSMOS(3, generator=generator()), fastmtl.FAMO(3)
    drawn = []
    for _ in range(3):
        drawn.append(cosmos.sample())
        cosmos(losses)
        famo(losses)
        with torch.no_grad():
            famo.update(losses * torch.tensor([0.9, 0.5, 0.7]))
    return [drawn, dict(cosmos.state_dict()), dict(famo.state_dict())]


def test_what_a_weighting_draws_and_is_told_outside_its_call(ranks: Ranks) -> None:
    expected = told_outside_the_call()
    for found in ranks.run(2, told_outside_the_call):
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-12, atol=0)


def test_evaluation_is_each_ranks_own(ranks: Ranks) -> None:
    (value, before, after), _ = ranks.run(2, evaluate)
    model, _ = make("DWA", torch.float64, None)
    x, y = whole_batches(torch.float64)[0]
    assert value == pytest.approx(model.eval()(x, y, "means").item(), rel=1e-12)
    assert difference(after, before) == 0


def odd_one_out(what: str) -> str:
    """What the last rank has other than the others is an error on all."""
    odd = dist.get_rank() == dist.get_world_size() - 1
    methods = {
        "method": fastmtl.MGDA() if odd else fastmtl.PCGrad(),
        "option": fastmtl.GradNorm(alpha=1.0 if odd else 1.5, scale_heads=False),
        "weighting": fastmtl.DWA(2, temperature=1.0 if odd else 2.0),
        "number of tasks": fastmtl.LBTW(3) if odd else fastmtl.LBTW(2),
    }
    tasks = 3 if odd and what in ("tasks", "number of tasks") else 2
    surgery = fastmtl.FeatureSurgery(methods.get(what, fastmtl.MGDA()), tasks)
    z = torch.ones(2, requires_grad=True)
    names = "xyz" if odd and what == "names" else "abc"
    with pytest.raises(RuntimeError) as error:
        surgery.total({name: copy.sum() for name, copy in zip(names, surgery(z), strict=False)}).backward()
    return str(error.value)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("method", "rank 3 has other method: MGDA"),
        ("option", "rank 3 has other method: GradNorm"),
        ("weighting", "rank 3 has other method: DWA"),
        ("tasks", "rank 3 has other tasks: c, where rank 0 has none"),
        ("number of tasks", "rank 3 has other tasks: c, where rank 0 has none"),
        ("names", "rank 3 has other tasks: x, where rank 0 has a"),
    ],
)
def test_a_rank_that_differs_is_named_on_all(ranks: Ranks, what: str, text: str) -> None:
    for error in ranks.run(4, odd_one_out, what):
        assert text in error


def amortized_apart_then_together() -> Tensor:
    method = fastmtl.Amortized(fastmtl.MGDA(), update_every=9)
    gramian = torch.diag(torch.tensor([1.0, 3.0 if dist.get_rank() == 0 else 4.0], dtype=torch.float64))
    method(gramian)
    method(gramian)
    together = fastmtl.distributed.ranks_of("auto")
    assert together is not None
    together.align(method, gramian.device)
    return method(gramian)


def test_amortized_weights_of_a_rank_alone_do_not_outlive_the_first_ranks(ranks: Ranks) -> None:
    for weights in ranks.run(2, amortized_apart_then_together):
        torch.testing.assert_close(weights, torch.tensor([0.75, 0.25], dtype=torch.float64))


def differ_after(copied: Callable[[Any], Any]) -> list[str]:
    """A copy of what has met the other ranks, changed on one of them."""
    odd, losses = dist.get_rank() == 1, torch.ones(2)
    weighting = fastmtl.DWA(2)
    weighting(losses)
    weighting = copied(weighting)
    weighting.temperature = 3.0 if odd else 2.0
    surgery = fastmtl.FeatureSurgery(fastmtl.MGDA(), 2)
    z = torch.ones(2, requires_grad=True)
    surgery.total([x.sum() for x in surgery(z)]).backward()
    surgery = copied(surgery)
    surgery.method = fastmtl.PCGrad() if odd else surgery.method
    texts = []
    for call in (lambda: weighting(losses), lambda: surgery.total([x.sum() for x in surgery(z)]).backward()):
        with pytest.raises(RuntimeError) as error:
            call()
        texts.append(str(error.value))
    return texts


def pickled(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_meet_anew(ranks: Ranks, copied: Callable[[Any], Any]) -> None:
    for texts in ranks.run(2, differ_after, copied):
        assert "rank 1 has other method: DWA" in texts[0]
        assert "rank 1 has other method: PCGrad" in texts[1]


def error_in_the_first_step() -> Tensor:
    """On one rank; the losses have been exchanged."""
    method = fastmtl.RLW(2, generator=generator())
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(fastmtl.ops, "combine", None)
        with nullcontext() if dist.get_rank() == 0 else pytest.raises(TypeError):
            fastmtl.aggregate(torch.eye(2), method, losses=torch.ones(2))
    fastmtl.aggregate(torch.eye(2), method, losses=torch.ones(2))
    return method.rng[0]


def test_ranks_that_met_go_on_after_an_error_on_one(ranks: Ranks) -> None:
    first, last = ranks.run(2, error_in_the_first_step)
    assert torch.equal(first, last)


# ---- mean ------------------------------------------------------------------------------------------------------------


def means() -> list[Any]:
    rank = dist.get_rank()
    a = torch.tensor(3.0 + rank, requires_grad=True)
    found = fastmtl.distributed.mean({"a": a, "b": None, "c": torch.tensor(2.0)}, {"a": 1 + rank, "b": 0, "c": rank})
    alone = fastmtl.distributed.mean(a, torch.tensor(2), process_group=None)
    nobody = fastmtl.distributed.mean([torch.zeros(()), a], [0, 4])
    slope = torch.autograd.grad(found["a"], a)[0]
    return [{k: None if x is None else x.item() for k, x in found.items()}, alone.item(), nobody[0], slope.item()]


def test_mean(ranks: Ranks) -> None:
    for rank, (found, alone, nobody, slope) in enumerate(ranks.run(2, means)):
        assert list(found) == ["a", "b", "c"]
        assert found["a"] == pytest.approx((3 + rank) * 2 / 3)  # averages to 7 / 3
        assert found["b"] is None
        assert found["c"] == 4  # the sums on both ranks over the one sample
        assert alone == pytest.approx((3 + rank) / 2)
        assert nobody is None
        assert slope == pytest.approx(2 / 3)


def mean_of_other_tasks(tasks: list[Any]) -> str:
    """Names or a number of tasks per rank. The call after that is in order."""
    mine, one = tasks[dist.get_rank()], torch.tensor(1.0)
    named = isinstance(mine, str)
    with pytest.raises(RuntimeError) as error:
        fastmtl.distributed.mean(*((dict.fromkeys(mine, x) if named else [x] * mine) for x in (one, 1)))
    assert fastmtl.distributed.mean(3 * one, 1 + dist.get_rank()) == 2
    return str(error.value)


@pytest.mark.parametrize(
    ("tasks", "text"),
    [
        ((2, 3), "rank 1 has other tasks: task 2, where rank 0 has none"),
        (("ab", "ba"), "rank 1 has other tasks: b, where rank 0 has a"),
    ],
)
def test_mean_of_other_tasks_is_named_on_all(ranks: Ranks, tasks: list[Any], text: str) -> None:
    for error in ranks.run(2, mean_of_other_tasks, tasks):
        assert text in error


def test_mean_of_one_process() -> None:
    assert fastmtl.distributed.mean(torch.tensor([6.0, 8.0]), [3, 4]) == [2.0, 2.0]
    assert fastmtl.distributed.mean([None, torch.tensor(0.0)], [0, 0]) == [None, None]


@pytest.mark.parametrize(
    ("loss_sum", "count", "error", "text"),
    [
        ([torch.tensor(1.0)], [1, 2], ValueError, "count: expected 1, found 2"),
        ({"a": torch.tensor(1.0)}, {"b": 1}, ValueError, r"count: expected one per task \(a\)"),
        ({"a": torch.tensor(1.0)}, [1], ValueError, r"count: expected one per task \(a\)"),
        ([torch.tensor(1.0), 2.0], [1, 2], TypeError, "loss_sum of task 1: expected a tensor, found float"),
        (torch.tensor(1.0), -1, ValueError, "count: expected numbers of samples"),
    ],
)
def test_mean_refuses(loss_sum: Any, count: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        fastmtl.distributed.mean(loss_sum, count)


# ---- our own process group -------------------------------------------------------------------------------------------


def timeouts() -> list[Any]:
    ours = fastmtl.distributed.ranks_of("auto")
    assert ours is not None
    return [group._get_backend(torch.device("cpu")).options._timeout for group in (dist.group.WORLD, ours.group)]


def test_our_process_group_waits_as_long_as_the_default_one(ranks: Ranks) -> None:
    for theirs, ours in ranks.run(2, timeouts):
        assert ours == theirs == timedelta(seconds=TIMEOUT / 2)


def device_behind_any_backend() -> str:
    """Of a group that was made without a backend's name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend", lambda group: "undefined")
        patch.setattr(torch.cuda, "is_available", lambda: False)
        return str(fastmtl.distributed.device_of("auto"))


def test_device_without_cuda_is_the_cpu(ranks: Ranks) -> None:
    assert ranks.run(2, device_behind_any_backend) == ["cpu", "cpu"]


def test_process_group_is_checked() -> None:
    with pytest.raises(TypeError, match=r"process_group: expected .* found 'world'"):
        fastmtl.FeatureSurgery(fastmtl.MGDA(), 2, process_group="world")
