"""Parameter level on several ranks of torch.distributed: equal to one process on the whole batch."""

from __future__ import annotations

import itertools
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastmtl
from fastmtl import exchange, passes
from tests.nets import Net, mlp, net
from tests.ranks import Ranks, processes

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")

FEW = 6
SAMPLES = 16
METHODS: dict[str, Callable[[], Any]] = {
    "PCGrad": fastmtl.PCGrad,
    "GradVac": fastmtl.GradVac,
    "MGDA": fastmtl.MGDA,
    "PELTR": lambda: fastmtl.PELTR(lower_bounds=[0.2, 0.1, 0.0]),
    "GradNorm": fastmtl.GradNorm,
    "UncertaintyWeighting": lambda: fastmtl.UncertaintyWeighting(3),
    "Amortized": lambda: fastmtl.Amortized(fastmtl.PCGrad(), update_every=3),
    "DWA": lambda: fastmtl.DWA(3, steps_per_epoch=4),
}
SLICES = {1: [16], 2: [8, 8], 3: [6, 5, 5], 4: [4, 4, 4, 4]}
UNEQUAL = {1: [16], 2: [5, 11], 4: [1, 7, 3, 5]}


class Outputs(nn.Module):
    """What is wrapped: from samples to each task's outputs."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.net.features(x)
        return [head(z) for head in self.net.heads]


def place() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def make(dtype: torch.dtype = torch.float64, trunk: str | None = None) -> Net:
    torch.manual_seed(5)
    return mlp(dtype=dtype) if trunk is None else net(trunk, dtype=dtype)


def labelled(labels: str) -> Tensor:
    """Which sample has a label of which task, bool ``[SAMPLES, 3]``."""
    i, t = torch.arange(SAMPLES).unsqueeze(1), torch.arange(3)
    if labels == "some":
        return (7 * i + t) % 3 > 0
    if labels == "absent":  # a quarter of the samples has none at all, tasks 1 and 2 are in one quarter each
        return torch.where(t == 0, (i < 4) | (i >= 8), torch.where(t == 1, i < 4, i >= 12))
    return torch.ones(SAMPLES, 3, dtype=torch.bool)


def losses_of(outputs: Callable[[Tensor], list[Tensor]], step: int, labels: str, dtype: torch.dtype) -> list[Any]:
    """The local losses of this rank's samples of a step; None for tasks without a sample."""
    rank, size = place()
    torch.manual_seed(100 + step)
    counts = (UNEQUAL if labels == "some" else SLICES)[size]
    here = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    x, has = torch.randn(SAMPLES, 5).to(dtype)[here], labelled(labels)[here]
    sums: list[Tensor | None] = []
    for t, z in enumerate(outputs(x)):
        errors = (z[has[:, t]] - (-1) ** t * (t + 1)) ** 2
        sums.append(errors.sum() if len(errors) else None)
    if labels == "overflow" and step % 5 == 2 and rank == size - 1:
        sums[2] = sums[2] * float("inf")
    return fastmtl.distributed.mean(sums, has.sum(0))


def state(net: Net, method: Any) -> list[Tensor]:
    return [*(p.detach().clone() for p in net.parameters()), *(x.clone() for x in method.state_dict().values())]


def train(
    name: str, dtype: torch.dtype = torch.float64, labels: str = "all", way: str = "backward", **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and the method's state after some steps; each step's weights."""
    rank, size = place()
    trunk = options.pop("trunk", None)
    net = make(dtype, trunk)
    torch.manual_seed(rank)  # methods draw their seeds: the first rank's is to be used
    method = METHODS[name]()
    for p in method.parameters():  # likewise
        p.data += rank
    optimizer = torch.optim.SGD([*net.parameters(), *method.parameters()], lr=0.02)
    scaler = torch.amp.GradScaler("cpu", growth_interval=4) if options.pop("scaled", False) else None
    scales = []
    model: nn.Module = Outputs(net)
    if size > 1 and options.get("filler") != "backward":
        # what a step here leaves unused is no matter; ordinary steps use all
        model = DistributedDataParallel(model, find_unused_parameters=labels == "absent")
    if options.pop("lean", False):
        options["gramian_params"] = net.trunk[2]
    weights = []
    for step in range(options.pop("steps", FEW)):
        optimizer.zero_grad()
        if way == "mixed" and step % 4 == 1:
            torch.stack(losses_of(model, step, labels, dtype)).sum().backward()
        elif way == "task_gradients":
            rows = fastmtl.TaskGradients(net.trunk, 3, heads=net.heads, scaler=scaler)
            for t in range(3):
                with model.no_sync() if size > 1 else nullcontext():
                    loss = losses_of(model, step, labels, dtype)[t]
                if loss is not None:
                    rows.backward(t, loss)
            weights.append(rows.combine(method, **options).weights)
        else:
            losses = losses_of(model, step, labels, dtype)
            shared = None if way == "discover" else net.trunk
            weights.append(fastmtl.backward(losses, method, shared, model=model, scaler=scaler, **options).weights)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
            scales.append(torch.tensor(scaler.get_scale()))
    return [*state(net, method), *scales], weights


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with processes(4) as found:
        yield found


def compare(ranks: Ranks, size: int, rtol: float, *args: Any, **options: Any) -> None:
    """The ranks equal one process on the whole batch, and each other bit for bit."""
    expected, weights = train(*args, **options)
    found = ranks.run(size, train_with, args, options)
    for other in found[1:]:
        for a, b in zip([*other[0], *other[1]], [*found[0][0], *found[0][1]], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    for a, b in zip([*found[0][0], *found[0][1]], [*expected, *weights], strict=True):
        torch.testing.assert_close(
            a, b, rtol=rtol, atol=rtol * float(b.double().nan_to_num().abs().max()), equal_nan=True
        )
    assert not torch.equal(expected[0], make(options.get("dtype", torch.float64), options.get("trunk")).trunk[0].weight)


def train_with(args: tuple, options: dict[str, Any]) -> Any:
    return train(*args, **options)


SIX = ["PCGrad", "GradVac", "MGDA", "PELTR", "GradNorm", "UncertaintyWeighting"]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("method", SIX)
def test_equals_one_process(ranks: Ranks, size: int, method: str) -> None:
    compare(ranks, size, 1e-9, method, steps=20)
    compare(ranks, size, 1e-4, method, steps=20, dtype=torch.float32)


@pytest.mark.parametrize("method", [*SIX, "Amortized", "DWA"])
def test_unequal_batches_and_missing_labels(ranks: Ranks, method: str) -> None:
    compare(ranks, 2, 1e-9, method, labels="some")
    compare(ranks, 4, 1e-9, method, labels="some")


@pytest.mark.parametrize("method", [*SIX, "Amortized"])
def test_tasks_absent_on_some_ranks_and_a_rank_without_any(ranks: Ranks, method: str) -> None:
    compare(ranks, 4, 1e-9, method, labels="absent")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("PCGrad", {"groups": "layer"}),
        ("GradVac", {"groups": "tensor"}),
        ("PCGrad", {"way": "discover"}),
        ("PCGrad", {"way": "discover", "labels": "absent"}),
        ("UncertaintyWeighting", {"way": "discover"}),
        ("GradNorm", {"lean": True}),
        ("PCGrad", {"lean": True, "labels": "absent"}),
        ("Amortized", {}),
        ("Amortized", {"max_norm": 0.5}),
        ("MGDA", {"max_norm": 0.5}),
        ("MGDA", {"chunk_size": 2, "labels": "absent"}),
        ("PCGrad", {"labels": "overflow", "nonfinite": "drop_task"}),
        ("PCGrad", {"labels": "overflow", "nonfinite": "drop_task", "lean": True}),
        ("PCGrad", {"labels": "overflow", "nonfinite": "skip"}),
        ("PCGrad", {"way": "mixed"}),
        ("GradNorm", {"way": "mixed"}),
        ("PCGrad", {"filler": "backward"}),
        ("PCGrad", {"way": "task_gradients"}),
        ("GradNorm", {"way": "task_gradients", "labels": "absent"}),
        ("UncertaintyWeighting", {"way": "task_gradients", "labels": "absent"}),
    ],
    ids=str,
)
def test_options(ranks: Ranks, method: str, options: dict[str, Any]) -> None:
    compare(ranks, 4 if options.get("labels") == "absent" else 2, 1e-9, method, **options)


@pytest.mark.parametrize(
    ("method", "way"),
    [*((method, "backward") for method in SIX), ("GradNorm", "task_gradients"), ("DWA", "task_gradients")],
)
def test_overflow_on_one_rank(ranks: Ranks, method: str, way: str) -> None:
    options: dict[str, Any] = {"labels": "overflow", "scaled": True, "way": way, "steps": 20}
    compare(ranks, 2, 1e-9, method, **options)
    scales = train(method, **options)[0][-20:]
    skipped = [b < a for a, b in itertools.pairwise(scales)]
    assert skipped == [step % 5 == 2 for step in range(1, 20)]


@pytest.mark.parametrize("method", ["PCGrad", "GradNorm", "UncertaintyWeighting"])
def test_a_single_rank_is_no_ranks(ranks: Ranks, method: str) -> None:
    compare(ranks, 1, 0.0, method)


def test_narrow_rows(ranks: Ranks) -> None:
    compare(ranks, 2, 2e-2, "PCGrad", dtype=torch.float32, row_dtype=torch.bfloat16)


def bytes_moved() -> dict[str, int]:
    """Numbers that each kind of call has as its larger tensor, in one step."""
    moved: dict[str, int] = defaultdict(int)

    def counted(kind: str, call: Any, whole: int) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            tensor = args[whole]
            moved[kind] += tensor.numel()
            return call(*args, **options)

        return run

    net = make()
    method = fastmtl.MGDA()
    before = exchange._reduce_scatter, exchange._all_gather, dist.all_reduce
    for step in range(2):
        losses = losses_of(DistributedDataParallel(Outputs(net)), step, "all", torch.float64)
        if step == 1:
            exchange._reduce_scatter = counted("reduce_scatter", before[0], 1)
            exchange._all_gather = counted("all_gather", before[1], 0)
            dist.all_reduce = counted("all_reduce", before[2], 0)
        fastmtl.backward(losses, method, net.trunk)
    exchange._reduce_scatter, exchange._all_gather, dist.all_reduce = before
    return dict(moved)


def test_numbers_moved(ranks: Ranks) -> None:
    trunk, heads = (sum(p.numel() for p in module.parameters()) for module in (make().trunk, make().heads))
    for size in (2, 4):
        padded = -(-trunk // size) * size
        for moved in ranks.run(size, bytes_moved):
            assert moved == {
                "reduce_scatter": 3 * padded,
                "all_gather": padded + size * 4,  # whether all mean the same step
                # presence and losses, reached parameters, the Gramian; heads: reached, and their gradients
                "all_reduce": 2 * 3 + 3 * 4 + 3 * 3 + 6 + heads,
            }


def large_buckets(bucket_bytes: int) -> list[Tensor]:
    """A step in buckets of this size."""
    before, exchange.BUCKET_BYTES = exchange.BUCKET_BYTES, bucket_bytes
    net = make()
    try:
        fastmtl.backward(losses_of(Outputs(net), 0, "all", torch.float64), fastmtl.MGDA(), net.trunk, groups="layer")
    finally:
        exchange.BUCKET_BYTES = before
    return [p.grad for p in net.parameters()]


def test_buckets(ranks: Ranks) -> None:
    one = large_buckets(1)
    for bucket_bytes in (1, 64, 10**9):
        for found in ranks.run(4, large_buckets, bucket_bytes):
            torch.testing.assert_close(found, one, rtol=1e-12, atol=1e-13)


def raised(what: str) -> tuple[str, str, float, bool]:
    """Kind and text of the error, seconds, and whether everything is as before."""
    rank, size = place()
    net = make()
    model: nn.Module = Outputs(net)
    losses: Any = losses_of(model, 0, "all", torch.float64)
    method: Any = fastmtl.GradNorm(alpha=1.0 if what == "option" and rank == 1 else 1.5)
    options: dict[str, Any] = {}
    last = rank == size - 1
    if what == "tasks" and last:
        losses = losses[:2]
    if what == "names":
        losses = dict(zip("acb" if last else "abc", losses, strict=True))
    if what == "parameters" and last:
        net.trunk[0].bias.requires_grad_(False)
    if what == "method" and last:
        method = fastmtl.MGDA()
    if what == "max_norm":
        options["max_norm"] = 1.0 + rank
    if what == "groups":
        method, options["groups"] = fastmtl.PCGrad(), [net.trunk[0], net.trunk[2]][:: -1 if last else 1]
    if what == "heads":
        losses[rank % 2] = None
    if what == "call" and last:
        rows = fastmtl.TaskGradients(net.trunk, 3)
    if what == "groups, discovered":
        method, options["model"], options["shared_params"] = fastmtl.PCGrad(), net, None
        options["groups"] = [net.trunk[0], [net.trunk[2], net.heads]][:: -1 if last else 1]
    if what in ("none", "refused", "few"):  # before anything moves: the first rank's seed, too
        torch.manual_seed(rank)
        method = fastmtl.PCGrad()
    if what == "none":
        losses = [None] * 3
    if what == "refused":
        method = fastmtl.UncertaintyWeighting(3)
        for p in method.parameters():
            p.data += rank
        options["max_norm"] = 1.0
    if what == "few":
        options |= {"model": net, "shared_params": None, "gramian_params": net.trunk[2]}
    if what == "sizes":
        method.register_parameter("more", nn.Parameter(torch.zeros(2 + last)))
    if what == "infinite":
        losses[1] = losses[1] * float("nan") if last else losses[1]
        method, options["nonfinite"] = fastmtl.PCGrad(), "raise"
    if what == "static":
        model = DistributedDataParallel(model, static_graph=True)
        losses = losses_of(model, 0, "all", torch.float64)
    if what == "static, model":
        options["model"] = DistributedDataParallel(model, static_graph=True)
    if what == "filler":
        options |= {"model": DistributedDataParallel(model), "filler": "backward"}
        losses = losses_of(options["model"], 0, "all", torch.float64)
    if what == "sparse":
        net = Net(nn.Sequential(nn.Embedding(4, 6, sparse=True)), 6, 3).double()
        one = nn.Parameter(torch.ones((), dtype=torch.float64))
        z = net.features(torch.tensor([rank])) if last else one
        losses, options["model"] = [(one * z * (t + 1)).sum() for t in range(3)], net
        method = fastmtl.PCGrad()
        options["shared_params"] = [net.trunk[0].weight, one]
    before = [x.clone() for x in method.state_dict().values()]
    start = time.monotonic()
    try:
        if what == "static, TaskGradients":
            model = DistributedDataParallel(model, static_graph=True)
            rows = fastmtl.TaskGradients(net.trunk, 3)
            rows.backward(0, sum(losses_of(model, 0, "all", torch.float64)))  # a second pass is refused by torch
            rows.combine(fastmtl.PCGrad())
        elif what == "call" and last:
            for t in range(3):
                rows.backward(t, losses[t], retain_graph=True)
            rows.combine(fastmtl.PCGrad())
        else:
            fastmtl.backward(losses, method, **{"shared_params": net.trunk, **options})
    except (RuntimeError, ValueError, TypeError, FloatingPointError) as error:
        untouched = all(torch.equal(a, b) for a, b in zip(before, method.state_dict().values(), strict=True))
        clean = untouched and all(p.grad is None for p in net.trunk.parameters())
        return type(error).__name__, str(error), time.monotonic() - start, clean
    return "nothing", "", 0.0, False


@pytest.mark.parametrize(
    ("what", "kind", "words"),
    [
        ("tasks", "RuntimeError", ["rank 2", "rank 0", "tasks", "task 2"]),
        ("names", "RuntimeError", ["rank 2", "tasks", "c, where rank 0 has b"]),
        ("parameters", "RuntimeError", ["rank 2", "shared_params", "2.weight", "0.bias"]),
        ("method", "RuntimeError", ["rank 2", "method", "MGDA", "GradNorm"]),
        ("option", "RuntimeError", ["rank 1", "method", "'alpha': 1.0", "'alpha': 1.5"]),
        ("max_norm", "RuntimeError", ["rank 1", "rank 2", "max_norm=3.0", "max_norm=1.0"]),
        ("groups", "RuntimeError", ["rank 2", "group", "[1, 1, 0, 0]"]),
        ("groups, discovered", "RuntimeError", ["rank 2", "group", "[1, 1, 0, 0, 0, 0, 0, 0, 0, 0]"]),
        ("sizes", "RuntimeError", ["rank 2", "method", "'more': [3]", "'more': [2]"]),
        ("heads", "RuntimeError", ["rank 1", "model=", "task 0"]),
        ("call", "RuntimeError", ["rank 2", "TaskGradients.combine", "fastmtl.backward"]),
        ("none", "ValueError", ["all absent"]),
        ("refused", "ValueError", ["max_norm", "UncertaintyWeighting"]),
        ("few", "ValueError", ["gramian_params", "pass shared_params= too"]),
        ("infinite", "FloatingPointError", ["task 1"]),
        ("static", "ValueError", ["static_graph=True"]),
        ("static, model", "ValueError", ["static_graph=True"]),
        ("static, TaskGradients", "ValueError", ["static_graph=True"]),
        ("filler", "ValueError", ["filler='backward'", "pass model.module"]),
        ("sparse", "TypeError", ["sparse", "[4, 6]"]),
    ],
)
def test_every_rank_is_told(ranks: Ranks, what: str, kind: str, words: list[str]) -> None:
    found = ranks.run(3, raised, what)
    for name, text, seconds, clean in found:
        assert name == kind, text
        assert all(word in text for word in words), text
        assert seconds < 5
        assert clean
    assert len({text for _, text, *_ in found}) == 1


class Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise ArithmeticError("broken")


def broken(name: str, options: dict[str, Any]) -> tuple[str, float, bool, list[Tensor]]:
    """A step in which the last rank's second task breaks, and another: the error, seconds, and what became of it."""
    rank, size = place()
    net, method = make(), METHODS[name]()
    if options.pop("lean", False):
        options["gramian_params"] = net.trunk[2]
    shared = None if options.pop("discover", False) else net.trunk
    before = [x.clone() for x in method.state_dict().values()]
    text, start = "", time.monotonic()
    for step in range(2):
        losses = losses_of(Outputs(net), step, "all", torch.float64)
        if step == 0 and rank == size - 1:
            losses[1] = Breaks.apply(losses[1])
        try:
            fastmtl.backward(losses, method, shared, model=net, **options)
        except (RuntimeError, ArithmeticError) as error:
            text, seconds = f"{type(error).__name__}: {error}", time.monotonic() - start
            clean = all(map(torch.equal, before, method.state_dict().values()))
            clean = clean and all(p.grad is None for p in net.parameters())
    return text, seconds, clean, [p.grad for p in net.parameters()]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("GradNorm", {}),
        ("PCGrad", {"groups": "layer"}),
        ("GradNorm", {"lean": True}),
        ("UncertaintyWeighting", {}),
        ("MGDA", {"chunk_size": 2}),
        ("MGDA", {"discover": True}),
    ],
    ids=str,
)
def test_a_backward_pass_that_fails_on_one_rank(ranks: Ranks, method: str, options: dict[str, Any]) -> None:
    *others, last = ranks.run(3, broken, method, options)
    for text, *_ in others:
        assert text == "RuntimeError: rank 2 failed in its backward passes: ArithmeticError: broken"
    assert last[0] == "ArithmeticError: broken"
    for _, seconds, clean, grads in (*others, last):
        assert seconds < 5
        assert clean
        assert all(map(torch.equal, grads, others[0][3]))  # of the next step, in which all take part


def set_back(name: str, way: str, cause: str) -> tuple[str, bool, list[Tensor]]:
    """The error of a second step in which the last rank cannot write gradients, whether the method's state and the
    gradients were left alone, and the state after a third step."""
    rank, size = place()
    net, method = make(), METHODS[name]()
    last = rank == size - 1
    text, clean = "", False
    for step in range(3):
        net.zero_grad()
        before = numbers(method)
        losses = losses_of(Outputs(net), step, "all", torch.float64)
        rows = fastmtl.TaskGradients(net.trunk, 3, heads=net.heads)
        for t in range(3 * (way == "task_gradients")):
            rows.backward(t, losses[t], retain_graph=True)
        with pytest.MonkeyPatch.context() as patch:
            if cause == ".grad" and last:  # sparse in a way that no kernel reads
                net.trunk[0].weight.grad = None if step != 1 else torch.zeros(7, 5, dtype=torch.float64).to_sparse()
            if cause == "memory" and last and step == 1:
                for module in ("exchange", "backward", "task_gradients"):
                    patch.setattr(sys.modules[f"fastmtl.{module}"], "accumulate", out_of_memory)
            try:
                if way == "task_gradients":
                    rows.combine(method)
                else:
                    fastmtl.backward(losses, method, net.trunk)
            except (RuntimeError, TypeError, MemoryError) as error:
                text = f"{type(error).__name__}: {error}"
                clean = all(map(torch.equal, before, numbers(method)))
                clean = clean and all(p.grad is None or p.grad.is_sparse for p in net.parameters())
    return text, clean, numbers(method)


def numbers(method: Any) -> list[Tensor]:
    return [x.clone().nan_to_num(-1.0) for x in method.state_dict().values()]


def out_of_memory(*args: Any, **options: Any) -> None:
    raise MemoryError("none left")


WAYS = [("GradNorm", "backward"), ("DWA", "backward"), ("GradNorm", "task_gradients"), ("DWA", "task_gradients")]


@pytest.mark.parametrize(("method", "way"), WAYS)
def test_a_gradient_that_one_rank_cannot_be_added_to(ranks: Ranks, method: str, way: str) -> None:
    (text, clean, state), (cause, unmoved, other) = ranks.run(2, set_back, method, way, ".grad")
    assert cause.startswith("TypeError: a parameter of shape [7, 5]: sparse gradients")
    assert text == f"RuntimeError: rank 1 failed in its backward passes: {cause}"
    assert clean
    assert unmoved
    assert all(map(torch.equal, state, other))


@pytest.mark.parametrize(("method", "way"), WAYS)
def test_state_is_aligned_after_an_error_of_one_rank_alone(ranks: Ranks, method: str, way: str) -> None:
    (text, _, state), (cause, unmoved, other) = ranks.run(2, set_back, method, way, "memory")
    assert (text, cause) == ("", "MemoryError: none left")
    assert unmoved
    assert all(map(torch.equal, state, other))


def proofs() -> list[str]:
    """The errors of steps through a compiled trunk: of the last rank the first step's gradients are not finite, and in
    the second repeated passes differ; then how many passes the last two steps took."""
    rank, size = place()
    net = make()
    trunk = torch.compile(net.trunk, backend="aot_eager")
    found, count = [], [0]
    for step in range(4):
        z = trunk(torch.full((2, 5), float("inf") if step == 0 and rank == size - 1 else 0.5, dtype=torch.float64))
        losses = [head(z).square().mean() for head in net.heads]
        count[0] = 0
        losses[0].register_hook(lambda g: count.__setitem__(0, count[0] + 1))
        with pytest.MonkeyPatch.context() as patch:
            if step == 1 and rank == size - 1:
                patch.setattr(passes, "_same", lambda first, again: passes.Proof.OTHER)
            try:
                fastmtl.backward(losses, fastmtl.MGDA(), net.trunk, nonfinite="drop_task")
                found.append(str(count[0]))
            except RuntimeError as error:
                found.append(str(error))
    return found


def test_ranks_prove_together_that_passes_can_be_repeated(ranks: Ranks) -> None:
    for unknown, other, *counts in ranks.run(2, proofs):
        assert "no finite gradient yet" in unknown
        assert "a repeated backward pass gave another gradient" in other
        assert counts == ["3", "1"]


def alone(rank: int | None = None) -> list[Tensor]:
    net, rank = make(), place()[0] if rank is None else rank
    torch.manual_seed(rank)
    losses = net.losses(torch.randn(2, 5, dtype=torch.float64))
    fastmtl.backward(losses, fastmtl.MGDA(), net.trunk, process_group=None)
    return [p.grad for p in net.parameters()]


def test_each_rank_for_itself(ranks: Ranks) -> None:
    for rank, found in enumerate(ranks.run(2, alone)):
        assert all(torch.equal(a, b) for a, b in zip(found, alone(rank), strict=True))
