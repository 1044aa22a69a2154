"""Real modules x way in x number type x compiled: every cell against plain autograd; and docs/training.md's table."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fastmtl
from tests.nets import Tied, Twice, conv_batchnorm

T, BATCH, WIDTH, VOCABULARY = 3, 8, 6, 11
STEPS = 2

# ---- modules: trunks from [BATCH, 5] numbers, or tokens, to [BATCH, WIDTH] features ----------------------------------


class Recurrent(nn.Module):
    """Two layers over a short sequence; the last output and the final state are both used."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(5, WIDTH, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(1, 4, dtype=x.dtype).reshape(1, 3, 1)
        out, state = self.rnn(x.unsqueeze(1) * steps)
        return out[:, -1] + (state[0] if isinstance(state, tuple) else state)[0]


class Encoder(nn.Module):
    """A transformer over three positions."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=dropout, batch_first=True)
        self.embed = nn.Linear(5, 3 * WIDTH)
        self.encoder = nn.TransformerEncoder(layer, num_layers=1, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.embed(x).unflatten(1, (3, WIDTH))).mean(1)


class Checkpointed(nn.Module):
    """Its activations are computed again in every backward pass, with the same dropout."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.2), nn.Linear(7, WIDTH))
        self.use_reentrant: bool | None = use_reentrant  # None: no checkpointing

    def forward(self, x: Tensor) -> Tensor:
        if self.use_reentrant is None:
            return self.inner(x)
        return checkpoint(self.inner, x.clone().requires_grad_(), use_reentrant=self.use_reentrant)


class LoRA(nn.Module):
    """A frozen linear layer and a trainable update of rank 2."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Linear(base.in_features, 2, bias=False)
        self.b = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


class Strided(nn.Module):
    """Its gradients are transposed, of stride 0, or the same tensor for two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.transposed = nn.Parameter(torch.randn(5, WIDTH))
        self.same = nn.ParameterList(torch.randn(BATCH, WIDTH) for _ in range(2))
        self.expanded = nn.Parameter(torch.randn(BATCH, 3, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        z = nn.functional.linear(x, self.transposed.t())
        return z + self.same[0] + self.same[1] + self.expanded.sum(1)


class Tokens(nn.Module):
    """An embedding, pooled; ``bag``: by `nn.EmbeddingBag`."""

    def __init__(self, sparse: bool, bag: bool = False) -> None:
        super().__init__()
        self.embedding = (nn.EmbeddingBag if bag else nn.Embedding)(VOCABULARY, WIDTH, sparse=sparse)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        z = self.embedding(tokens)
        return self.mix(z if z.dim() == 2 else z.mean(1))


def sequence(activation: nn.Module, *norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), *norm, activation, nn.Linear(7, WIDTH))


@dataclass(frozen=True)
class Case:
    """A module under test.

    Attributes:
        trunk: Makes it.
        last: The submodule or parameter of the trunk that ``gramian_params=`` names.
        width: Of its features.
        tied: The heads' outputs are multiplied with the weight of the trunk's embedding.
    """

    trunk: Callable[[], nn.Module]
    last: str
    width: int = WIDTH
    tied: bool = False


class MultiTask(nn.Module):
    """The module, a head per task, and losses of different sizes, in conflict."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.trunk = case.trunk()
        self.heads = nn.ModuleList(nn.Linear(case.width, WIDTH if case.tied else 1) for _ in range(T))

    def losses(self, features: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        return [self.loss(t, z, x) for t, z in enumerate(features)]

    def loss(self, t: int, z: Tensor, x: Tensor) -> Tensor:
        out = self.heads[t](z)
        if self.case.tied:
            logits = nn.functional.linear(out, self.trunk.embedding.weight)
            return nn.functional.cross_entropy(logits, (x[:, 0] + t) % VOCABULARY)
        return nn.functional.mse_loss(out, torch.full_like(out, (-1) ** t * (t + 1)))

    def plain(self) -> MultiTask:
        """A copy with the same parameters, in the same order, and nothing that plain autograd has trouble with."""
        twin = copy.deepcopy(self)
        for module in twin.modules():
            if isinstance(module, Checkpointed):
                module.use_reentrant = None
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                module.sparse = False
        return twin


MODULES: dict[str, Case] = {
    "MLP, LayerNorm": Case(lambda: sequence(nn.Tanh(), nn.LayerNorm(7)), "3"),
    "`Conv2d`, `BatchNorm2d`": Case(conv_batchnorm, "5"),
    "`RNN`": Case(lambda: Recurrent(nn.RNN), "rnn"),
    "`LSTM`": Case(lambda: Recurrent(nn.LSTM), "rnn"),
    "`GRU`": Case(lambda: Recurrent(nn.GRU), "rnn"),
    "`TransformerEncoder`": Case(lambda: Encoder(0.0), "encoder.layers.0"),
    "the same with dropout": Case(lambda: Encoder(0.3), "encoder.layers.0"),
    "checkpointing, `use_reentrant=False`": Case(lambda: Checkpointed(False), "inner.3"),
    "checkpointing, `use_reentrant=True`": Case(lambda: Checkpointed(True), "inner.3"),
    "weight in two modules": Case(Tied, "a", width=5),
    "module used twice": Case(Twice, "layer", width=5),
    "transposed, expanded parameters": Case(Strided, "expanded"),
    "LoRA adapters": Case(lambda: nn.Sequential(LoRA(nn.Linear(5, 7)), nn.Tanh(), LoRA(nn.Linear(7, WIDTH))), "2"),
    "`Embedding`": Case(lambda: Tokens(sparse=False), "mix"),
    "`Embedding`, weight tied to the heads": Case(lambda: Tokens(sparse=False), "embedding", tied=True),
    "`Embedding(sparse=True)`": Case(lambda: Tokens(sparse=True), "mix"),
    "`EmbeddingBag(sparse=True)`": Case(lambda: Tokens(sparse=True, bag=True), "mix"),
}

# ---- number types ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Numbers:
    """What a step computes in, and how near it must come to plain autograd in the same numbers, relative.

    Attributes:
        dtype: Of the parameters.
        autocast: None: no autocast.
        scale: Of the `GradScaler`; None: none.
        tolerance: Eager, for gradients of parameters.
        rounded: Where what is combined lies within the graph, in ``autocast``'s numbers, or a compiler has changed the
            order of operations.
    """

    dtype: torch.dtype
    autocast: torch.dtype | None
    scale: float | None
    tolerance: float
    rounded: float

    def cast(self) -> Any:
        return nullcontext() if self.autocast is None else torch.autocast("cpu", self.autocast)

    def scaler(self) -> torch.amp.GradScaler | None:
        return None if self.scale is None else torch.amp.GradScaler("cpu", init_scale=self.scale)


NUMBERS = {
    "fp64": Numbers(torch.float64, None, None, 1e-12, 1e-12),
    "fp32": Numbers(torch.float32, None, None, 1e-5, 1e-5),
    "bf16 autocast": Numbers(torch.float32, torch.bfloat16, None, 1e-5, 0.03),
    "fp16 autocast": Numbers(torch.float32, torch.float16, 2.0**10, 1e-5, 0.004),
}


# ---- ways in ---------------------------------------------------------------------------------------------------------

Trunk = Callable[[Tensor], Tensor]


@dataclass
class Step:
    """One training step: the net, how its trunk is called, a batch per task, the method, the numbers."""

    net: MultiTask
    trunk: Trunk
    batches: Tensor
    method: fastmtl.GradientMethod
    numbers: Numbers
    scaler: torch.amp.GradScaler | None

    def one_batch(self) -> list[Tensor]:
        with self.numbers.cast():
            return self.net.losses([self.trunk(self.batches[0])] * T, self.batches[0])

    def task_batch(self, t: int) -> Tensor:
        with self.numbers.cast():
            return self.net.loss(t, self.trunk(self.batches[t]), self.batches[t])

    def last(self) -> list[Tensor]:
        name = self.net.case.last
        found = [p for n, p in self.net.trunk.named_parameters() if n == name or n.startswith(name + ".")]
        return [p for p in found if p.requires_grad]


def through_backward(step: Step, **options: Any) -> fastmtl.Result:
    return fastmtl.backward(
        step.one_batch(), step.method, step.net.trunk, model=step.net, scaler=step.scaler, **options
    )


def through_task_gradients(step: Step) -> fastmtl.Result:
    rows = fastmtl.TaskGradients(step.net.trunk, T, scaler=step.scaler)
    for t in range(T):
        rows.backward(t, step.task_batch(t))
    return rows.combine(step.method)


def through_layer(step: Step) -> fastmtl.Result:
    surgery = fastmtl.FeatureSurgery(step.method, T, scaler=step.scaler)
    with step.numbers.cast():
        features = surgery(step.trunk(step.batches[0]))
        total = surgery.total(step.net.losses(features, step.batches[0]))
    (total if step.scaler is None else step.scaler.scale(total)).backward()
    return surgery.result


@dataclass(frozen=True)
class Way:
    """A way in.

    Attributes:
        run: One step.
        within: What is combined lies within the graph, in the numbers of autocast.
        method: Makes the method.
        by_hand: Losses of one batch ("losses"), of a batch per task ("batches"), or at the features ("features").
        last: The Gramian is over `Step.last`.
    """

    run: Callable[[Step], fastmtl.Result]
    within: bool = False
    method: Callable[[], fastmtl.GradientMethod] = fastmtl.PCGrad
    by_hand: str = "losses"
    last: bool = False


WAYS: dict[str, Way] = {
    "`backward`": Way(through_backward),
    "`chunk_size=`": Way(lambda step: through_backward(step, chunk_size=2)),
    "`gramian_params=`": Way(lambda step: through_backward(step, gramian_params=step.last()), within=True, last=True),
    "`Amortized`": Way(through_backward, within=True, method=lambda: fastmtl.Amortized(fastmtl.PCGrad(), 2)),
    "`TaskGradients`": Way(through_task_gradients, by_hand="batches"),
    "`FeatureSurgery`": Way(through_layer, within=True, by_hand="features"),
}


# ---- what is refused -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refused:
    """Cells that raise, and why; None: any.

    Attributes:
        reason: A footnote of the table.
        error: Its type and words.
        plain: Plain autograd on this machine raises it, too; where it does not, the cell has to work.
    """

    reason: str
    error: tuple[type[Exception] | tuple[type[Exception], ...], str]
    modules: tuple[str, ...]
    ways: tuple[str, ...] | None = None
    numbers: tuple[str, ...] | None = None
    compiled: bool | None = None
    plain: bool = False

    def holds(self, module: str, way: str, numbers: str, compiled: bool) -> bool:
        pairs = ((way, self.ways), (numbers, self.numbers))
        return (
            module in self.modules
            and all(some is None or x in some for x, some in pairs)
            and self.compiled in (None, compiled)
        )


REFUSED = [
    Refused(
        "Not in fp16 on every CPU: PyTorch has no `LSTM` for it there.",
        (RuntimeError, "primitive"),
        ("`LSTM`",),
        numbers=("fp16 autocast",),
        plain=True,
    ),
    Refused(
        "Random operations within the checkpoint cannot be passed for several tasks at once: leave dropout out of it, "
        "or take `chunk_size=1`.",
        (RuntimeError, "chunk_size=2.*cannot be batched; use chunk_size=1"),
        ("checkpointing, `use_reentrant=False`",),
        ("`chunk_size=`",),
    ),
    Refused(
        "What lies within a reentrant checkpoint is not in the graph that `chunk_size=` cuts.",
        ((RuntimeError, ValueError), "chunk_size=2.*(reentrant|cannot be batched)"),
        ("checkpointing, `use_reentrant=True`",),
        ("`chunk_size=`",),
    ),
    Refused(
        "Not compiled in autocast: the compiled backward cannot be passed for several tasks at once.",
        (RuntimeError, "chunk_size=2.*cannot be batched; use chunk_size=1"),
        ("the same with dropout",),
        ("`chunk_size=`",),
        ("bf16 autocast", "fp16 autocast"),
        compiled=True,
    ),
    Refused(
        "PyTorch cannot make several tasks' sparse gradients at once: take `chunk_size=1`.",
        (RuntimeError, "chunk_size=2.*cannot be batched; use chunk_size=1"),
        ("`Embedding(sparse=True)`", "`EmbeddingBag(sparse=True)`"),
        ("`chunk_size=`",),
    ),
]
MARKS = "¹²³⁴⁵⁶⁷⁸⁹"


def refusal(module: str, way: str, numbers: str, compiled: bool) -> Refused | None:
    return next((r for r in REFUSED if r.holds(module, way, numbers, compiled)), None)


def cell(module: str, way: str) -> str:
    """``yes``, in every number type, eager and compiled, or ``–``; with marks for what does not hold of it."""
    found = [refusal(module, way, numbers, compiled) for numbers in NUMBERS for compiled in (False, True)]
    marks = "".join(mark for mark, r in zip(MARKS, REFUSED, strict=False) if r in found)
    return ("–" if None not in found else "yes") + marks


def table() -> str:
    lines = [" | ".join(["| module", *WAYS]) + " |", "|---" * (1 + len(WAYS)) + "|"]
    lines += [" | ".join([f"| {module}", *(cell(module, way) for way in WAYS)]) + " |" for module in MODULES]
    return "\n".join([*lines, "", *(f"{mark} {r.reason}  " for mark, r in zip(MARKS, REFUSED, strict=False))])


def test_the_docs_have_this_table() -> None:
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    assert table() in page, "docs/training.md should have:\n" + table()


def check(net: MultiTask, trunk: Trunk, module: str, way: str, numbers: str) -> None:
    """The cell is as the table says."""
    refused = refusal(module, way, numbers, trunk is not net.trunk)
    if refused is not None and refused.plain and plain_autograd_works(net, NUMBERS[numbers]):
        refused = None
    if refused is None:
        run(net, trunk, WAYS[way], NUMBERS[numbers])
    else:
        with pytest.raises(refused.error[0], match=refused.error[1]):
            run(net, trunk, WAYS[way], NUMBERS[numbers])
        assert all(p.grad is None for p in net.parameters())


def plain_autograd_works(net: MultiTask, numbers: Numbers) -> bool:
    step = Step(net, net.trunk, torch.randn(T, BATCH, 5, dtype=numbers.dtype), fastmtl.PCGrad(), numbers, None)
    try:
        torch.autograd.grad(sum(step.one_batch()), [p for p in net.parameters() if p.requires_grad])
    except RuntimeError:
        return False
    return True


# ---- the same by hand ------------------------------------------------------------------------------------------------


def gradients(loss: Tensor, wrt: Sequence[Tensor], scale: float, cotangent: Tensor | None = None) -> list[Tensor]:
    """Float64, zeros where not reached; the scale goes through the graph and is taken out again."""
    found = torch.autograd.grad(loss * scale, wrt, cotangent, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p).double() if g is None else g.double() / scale for g, p in zip(found, wrt, strict=True)]


def gramian_of(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    return flat @ flat.T


def by_hand(way: Way, step: Step, weights: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The Gramian and the gradients of all parameters, given the weights, by one `autograd.grad` per task."""
    net, scale = step.net, step.numbers.scale or 1.0
    trunk, heads = list(net.trunk.parameters()), list(net.heads.parameters())
    shared = [p for p in trunk if p.requires_grad]
    if way.by_hand == "features":
        with step.numbers.cast():
            features = step.trunk(step.batches[0])
            leaf = features.detach().requires_grad_()
            losses = net.losses([leaf] * T, step.batches[0])
        rows = [gradients(loss, [leaf], scale) for loss in losses]
        plain = gradients(sum(losses), [*shared, *heads], scale)  # tied weights are reached through the heads, too
        combined = (sum(w * row[0] for w, row in zip(weights, rows, strict=True)) * scale).to(features.dtype)
        arrived = torch.autograd.grad(features, shared, combined, allow_unused=True)
        return gramian_of(rows), [
            *(a + b.double() / scale for a, b in zip(plain, arrived, strict=False)),
            *plain[len(shared) :],
        ]
    losses = [step.task_batch(t) for t in range(T)] if way.by_hand == "batches" else step.one_batch()
    rows = [gradients(loss, [*shared, *heads], scale) for loss in losses]
    n = len(shared)
    kept = [i for i, p in enumerate(shared) if any(p is q for q in step.last())] if way.last else range(n)
    weighted = [sum(w * g for w, g in zip(weights, column, strict=True)) for column in zip(*rows, strict=True)]
    return gramian_of([[row[i] for i in kept] for row in rows]), [
        *weighted[:n],
        *(sum(column) for column in [*zip(*rows, strict=True)][n:]),
    ]


def new_net(module: str, numbers: Numbers) -> MultiTask:
    torch.manual_seed(0)
    return MultiTask(MODULES[module]).to(numbers.dtype)


def run(net: MultiTask, trunk: Trunk, way: Way, numbers: Numbers) -> None:
    """Training steps, each against the same step by hand on a plain copy."""
    method, scaler = way.method(), numbers.scaler()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    tolerance = numbers.rounded if way.within or trunk is not net.trunk else numbers.tolerance
    held = None
    for seed in range(STEPS):
        batches = torch.randn(T, BATCH, 5, dtype=numbers.dtype)
        if hasattr(net.trunk, "embedding"):
            batches = torch.randint(VOCABULARY, (T, BATCH, 4))
        twin, before = net.plain(), copy.deepcopy(method)
        optimizer.zero_grad()
        torch.manual_seed(seed)  # of dropout
        out = way.run(Step(net, trunk, batches, method, numbers, scaler))
        torch.manual_seed(seed)
        gramian, expected = by_hand(way, Step(twin, twin.trunk, batches, before, numbers, None), out.weights)
        if out.gramian is None:  # between two updates of an amortized method
            assert torch.equal(out.weights, held)
        else:
            held = out.weights
            torch.testing.assert_close(held, before(out.gramian), rtol=1e-6, atol=1e-6)
            sizes = gramian.diagonal().sqrt()
            assert (sizes > 0).all()
            assert_near(out.gramian / sizes / sizes.unsqueeze(1), gramian / sizes / sizes.unsqueeze(1), tolerance)
        params = [p for p in net.parameters() if p.requires_grad]
        largest = max(float(e.abs().max()) for e in expected)  # a bias before BatchNorm has but noise
        for p, e in zip(params, expected, strict=True):
            grad = p.grad.to_dense() if p.grad.is_sparse else p.grad
            assert_near(grad.double() / (numbers.scale or 1.0), e, tolerance * largest)
        assert all(p.grad is None for p in net.parameters() if not p.requires_grad)
        for (name, found), value in zip(net.named_buffers(), twin.buffers(), strict=True):  # BatchNorm's statistics
            torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6, msg=name)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == numbers.scale  # no overflow hid anything


def assert_near(found: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("module", MODULES)
def test_eager(module: str, way: str, numbers: str) -> None:
    net = new_net(module, NUMBERS[numbers])
    check(net, net.trunk, module, way, numbers)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_batchnorm_within_a_checkpoint_counts_every_pass(use_reentrant: bool) -> None:
    """As the docs warn: PyTorch computes its statistics again whenever it computes the activations again."""
    inner, heads = nn.Sequential(nn.Linear(5, WIDTH), nn.BatchNorm1d(WIDTH)), [nn.Linear(WIDTH, 1) for _ in range(T)]

    def losses() -> list[Tensor]:
        z = checkpoint(inner, torch.randn(BATCH, 5).requires_grad_(), use_reentrant=use_reentrant)
        return [head(z).square().mean() for head in heads]

    sum(losses()).backward()
    assert inner[1].num_batches_tracked == 2
    fastmtl.backward(losses(), fastmtl.MGDA(), inner)
    assert inner[1].num_batches_tracked == 2 + 1 + T


@pytest.fixture
def compiler() -> Iterator[None]:
    """Its own warnings are not ours."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\..*")
        yield


@lru_cache(maxsize=1)
def compiled(module: str, numbers: str, backend: str) -> tuple[MultiTask, Trunk, Any]:
    """A net, its compiled trunk, and the counter of what was compiled; kept for the next way in."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    net = new_net(module, NUMBERS[numbers])
    return net, torch.compile(net.trunk, backend=counter), counter


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("module", MODULES)
def test_compiled(module: str, way: str, numbers: str) -> None:
    net, trunk, counter = compiled(module, numbers, "aot_eager")
    check(net, trunk, module, way, numbers)
    assert counter.frame_count > 0


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("way", ["`TaskGradients`", "`FeatureSurgery`"])
def test_compiled_by_inductor(way: str) -> None:
    """With generated code, whose buffers are used again."""
    net, trunk, counter = compiled("MLP, LayerNorm", "fp32", "inductor")
    run(net, trunk, WAYS[way], NUMBERS["fp32"])
    assert counter.frame_count > 0


@pytest.mark.parametrize("module", [m for r in REFUSED if "take `chunk_size=1`" in r.reason for m in r.modules])
def test_what_cannot_be_batched_goes_one_by_one(module: str) -> None:
    net = new_net(module, NUMBERS["fp64"])
    run(net, net.trunk, Way(lambda step: through_backward(step, chunk_size=1)), NUMBERS["fp64"])
