"""Sparse gradients at parameter level, against the same model with dense ones, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmtl
from fastmtl import MGDA, GradNorm, GradVac, PCGrad, UncertaintyWeighting
from fastmtl.rows import ThroughBackward, ThroughGrad
from fastmtl.sparse import Coalescer, compact
from tests.asserts import assert_untouched

T, ROWS, WIDTH = 3, 40, 4
SHAPE = (ROWS, WIDTH)


class Table(nn.Module):
    """Token numbers ``[batch, length]`` to one vector per sample."""

    def __init__(self, kind: str, sparse: bool) -> None:
        super().__init__()
        self.kind = kind
        if kind in ("sum", "mean", "weighted"):
            mode = "sum" if kind == "weighted" else kind
            self.table: nn.Module = nn.EmbeddingBag(ROWS, WIDTH, mode=mode, sparse=sparse)
        else:
            self.table = nn.Embedding(ROWS, WIDTH, padding_idx=2 if kind == "padding" else None, sparse=sparse)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.kind == "weighted":
            return self.table(tokens, per_sample_weights=torch.linspace(0.5, 1.5, tokens.numel()).view(tokens.shape))
        vectors: Tensor = self.table(tokens)
        return vectors if vectors.dim() == 2 else vectors.mean(1)


class Net(nn.Module):
    """A table and a linear layer that the tasks share, and a linear head for each."""

    def __init__(self, kind: str, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.trunk = nn.Sequential(Table(kind, sparse), nn.Linear(WIDTH, 5), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(T))

    @property
    def table(self) -> Tensor:
        return self.trunk[0].table.weight

    def loss(self, task: int, z: Tensor) -> Tensor:
        return ((self.heads[task](z) - (-1) ** task * (task + 1)) ** 2).mean()

    def losses(self, tokens: Tensor) -> list[Tensor]:
        """One per task, of different sizes and in conflict."""
        z = self.trunk(tokens)
        return [self.loss(t, z) for t in range(T)]


@pytest.fixture(autouse=True)
def _float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tokens(samples: int = 6, seed: int = 0) -> Tensor:
    """Token numbers with duplicates, within and between samples, over a part of the table."""
    return torch.randint(0, ROWS // 2, (samples, 5), generator=torch.Generator().manual_seed(seed))


def assert_sparse(grad: Tensor | None, touched: Tensor | Sequence[int]) -> None:
    """A gradient with exactly these rows, each once, in order, and flagged so."""
    assert grad is not None
    assert grad.is_sparse
    assert grad.is_coalesced()
    assert grad.indices()[0].tolist() == torch.as_tensor(touched).flatten().unique().tolist()


def assert_same_grads(found: nn.Module, expected: nn.Module, rtol: float = 1e-10) -> None:
    for (name, a), b in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            torch.testing.assert_close(a.grad.to_dense(), b.grad, rtol=rtol, atol=rtol * float(b.grad.abs().max()))


def per_task(losses: Sequence[Tensor], param: Tensor) -> list[Tensor]:
    return [torch.autograd.grad(x, param, retain_graph=True)[0] for x in losses]


# ---- every way in ----------------------------------------------------------------------------------------------------


def at_once(net: Net, method: Any, **options: Any) -> fastmtl.Result:
    return fastmtl.backward(net.losses(tokens()), method, net.trunk, **options)


def lean(net: Net, method: Any) -> fastmtl.Result:
    return at_once(net, method, gramian_params=net.trunk[1])


def batch_per_task(net: Net, method: Any) -> fastmtl.Result:
    kept = fastmtl.TaskGradients(net.trunk, T, heads=net.heads)
    for micro in range(2):
        for t in range(T):
            kept.backward(t, net.loss(t, net.trunk(tokens(seed=10 * micro + t))))
    return kept.combine(method)


def layer(net: Net, method: Any) -> fastmtl.Result:
    surgery = fastmtl.FeatureSurgery(method, T)
    surgery.total([net.loss(t, z) for t, z in enumerate(surgery(net.trunk(tokens())))]).backward()
    assert surgery.result is not None
    return surgery.result


WAYS: dict[str, Callable[[Net, Any], fastmtl.Result]] = {
    "backward": at_once,
    "backward, filler": lambda net, method: at_once(net, method, filler="backward"),
    "backward, groups": lambda net, method: at_once(net, method, groups="tensor"),
    "backward, gramian_params": lean,
    "backward, chunk_size=1": lambda net, method: at_once(net, method, chunk_size=1),
    "backward, max_norm": lambda net, method: at_once(net, method, max_norm=0.01),
    "TaskGradients": batch_per_task,
    "FeatureSurgery": layer,
}
METHODS: dict[str, Callable[[], Any]] = {
    "PCGrad": lambda: PCGrad(order="fixed"),
    "MGDA": MGDA,
    "GradVac": lambda: GradVac(order="fixed"),
    "UncertaintyWeighting": lambda: UncertaintyWeighting(T, init=0.5),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["embedding", "padding", "sum", "mean", "weighted"])
@pytest.mark.parametrize("way", WAYS)
def test_as_with_dense_gradients(way: str, kind: str, method: str) -> None:
    if method == "UncertaintyWeighting" and way in ("backward, gramian_params", "backward, max_norm"):
        with pytest.raises(ValueError, match="looks at no gradients"):
            WAYS[way](Net(kind, True), METHODS[method]())
        return
    net, dense = Net(kind, True), Net(kind, False)
    found, expected = WAYS[way](net, METHODS[method]()), WAYS[way](dense, METHODS[method]())
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-8, atol=1e-10)
    assert_same_grads(net, dense)
    if expected.gramian is not None:
        assert (expected.gramian < 0).any()  # in conflict
        torch.testing.assert_close(found.gramian, expected.gramian, rtol=1e-10, atol=1e-12)
    if way == "FeatureSurgery":  # what autograd made, which is left as it is
        assert net.table.grad.is_sparse
        return
    seeds = [10 * m + t for m in range(2) for t in range(T)] if way == "TaskGradients" else [0]
    touched = torch.cat([tokens(seed=s).flatten() for s in seeds])
    assert_sparse(net.table.grad, touched[touched != 2] if kind == "padding" else touched)
    assert found.grads[0] is net.table.grad


def test_aggregate() -> None:
    net = Net("embedding", True)
    losses = net.losses(tokens())
    table, weight = per_task(losses, net.table), per_task(losses, net.trunk[1].weight)
    assert all(g.is_sparse and not g.is_coalesced() for g in table)
    before = [g.clone() for g in table]
    found = fastmtl.aggregate([table, weight], MGDA())
    expected = fastmtl.aggregate([[g.to_dense() for g in table], weight], MGDA())
    torch.testing.assert_close(found.gramian, expected.gramian)
    assert_sparse(found.grads[0], tokens())
    for a, b in zip(found.grads, expected.grads, strict=True):
        torch.testing.assert_close(a.to_dense(), b)
    for g, b in zip(table, before, strict=True):
        assert torch.equal(g._indices(), b._indices())
        assert torch.equal(g._values(), b._values())


def test_operators_and_reference_take_sparse_rows() -> None:
    net = Net("embedding", True)
    table = per_task(net.losses(tokens()), net.table)
    dense = torch.stack([g.to_dense().flatten() for g in table])
    weights = torch.tensor([1.0, 0.0, -2.0])
    for ops in (fastmtl.ops, fastmtl.reference):
        torch.testing.assert_close(ops.gram([table])[0], dense @ dense.T)
        (out,) = ops.combine([table], weights)
        assert_sparse(out, tokens())
        torch.testing.assert_close(out.to_dense().flatten(), weights @ dense)


# ---- one parameter's rows --------------------------------------------------------------------------------------------


def coo(indices: Sequence[int], values: Sequence[Any] | Tensor, shape: Sequence[int] = (6, 2)) -> Tensor:
    values = torch.as_tensor(values, dtype=torch.float64).reshape(len(indices), *shape[1:])
    return torch.sparse_coo_tensor(torch.tensor([list(indices)]), values, list(shape), check_invariants=True)


def test_blocks_over_the_union_and_sums_of_duplicates() -> None:
    a, b = coo([4, 1, 4], [[1, 2], [3, 4], [10, 20]]), coo([5], [[7, 8]])
    blocks, touched = compact([a, None, b, coo([], [])])
    assert (touched.indices.tolist(), touched.shape) == ([1, 4, 5], (6, 2))
    assert blocks[0].tolist() == [[3, 4], [11, 22], [0, 0]]
    assert blocks[1] is None
    assert blocks[2].tolist() == [[0, 0], [0, 0], [7, 8]]
    assert blocks[3].tolist() == [[0, 0]] * 3


def test_one_sort_for_equal_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    sorts = []
    sort = Tensor.sort
    monkeypatch.setattr(Tensor, "sort", lambda self, **options: sorts.append(self) or sort(self, **options))
    net = Net("embedding", True)
    fastmtl.backward(net.losses(tokens()), MGDA(), net.trunk)
    assert len(sorts) == 1


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 2, 3), (6, 0)])
def test_any_dense_dimensions(shape: tuple[int, ...]) -> None:
    grads = [coo(i, torch.randn(len(i), *shape[1:]), shape) for i in ([1, 1, 5], [2, 0], [])]
    weights = torch.tensor([1.0, 2.0, 3.0])
    (out,) = fastmtl.ops.combine([grads], weights)
    torch.testing.assert_close(out.to_dense(), sum(w * g.to_dense() for w, g in zip(weights, grads, strict=True)))
    assert_sparse(out, [0, 1, 2, 5])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("existing", [None, "sparse", "dense"])
def test_number_types_and_existing_gradients(dtype: torch.dtype, existing: str | None) -> None:
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    net, dense = Net("embedding", True).to(dtype), Net("embedding", False).to(dtype)
    start = torch.zeros(SHAPE, dtype=dtype)
    start[[0, 39]] = 0.5
    if existing is not None:
        net.table.grad = start.to_sparse(1) if existing == "sparse" else start.clone()
        dense.table.grad = start.clone()
    was = net.table.grad
    for each in (net, dense):
        fastmtl.backward(each.losses(tokens()), MGDA(), each.trunk)
    assert net.table.grad.dtype == dtype
    assert_same_grads(net, dense, tolerance)
    if existing == "dense":
        assert net.table.grad is was
    else:
        extra = torch.tensor([0, 39]) if existing else torch.tensor([], dtype=torch.int64)
        assert_sparse(net.table.grad, torch.cat([tokens().flatten(), extra]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("existing", [False, True])
def test_narrow_rows_of_a_wider_table(dtype: torch.dtype, existing: bool) -> None:
    net, exact = Net("sum", True).float(), Net("sum", True).float()
    for each in (net, exact):
        if existing:
            each.table.grad = coo([0, 39], torch.ones(2, WIDTH), SHAPE).float()
        # Weights that do not depend on the rounding of the rows.
        at_once(each, fastmtl.PELTR([0.2, 0.3, 0.5]), row_dtype=dtype if each is net else None)
    assert net.table.grad.dtype == torch.float32
    also = torch.tensor([0, 39] if existing else [], dtype=torch.int64)
    assert_sparse(net.table.grad, torch.cat([tokens().flatten(), also]))
    error = (net.table.grad - exact.table.grad).to_dense()
    assert 0 < error.norm() < 0.01 * exact.table.grad.values().norm()
    assert not torch.equal(net.table.grad.values(), net.table.grad.values().to(dtype).float())  # the sum is not rounded


def test_half_precision_sums_duplicates_in_float32() -> None:
    ones = torch.ones(4097, 1, dtype=torch.bfloat16)
    grad = torch.sparse_coo_tensor(torch.zeros(1, 4097, dtype=torch.int64), ones, (3, 1), check_invariants=True)
    assert Coalescer().one(grad).values().item() == 4096  # 4097 rounded; bfloat16 sums end at 256


def test_a_dense_gradient_added_to_a_sparse_one_is_dense() -> None:
    net = Net("embedding", True)
    net.table.grad = coo([1], [[1.0] * WIDTH], SHAPE)
    loss = (net.table**2).sum()
    fastmtl.backward([loss, 2 * loss], fastmtl.MGDA(), [net.table])
    expected = 2 * net.table.detach()
    expected[1] += 1
    torch.testing.assert_close(net.table.grad, expected)


# ---- which task reaches what -----------------------------------------------------------------------------------------


def test_absent_is_not_empty() -> None:
    table = nn.Embedding(*SHAPE, sparse=True)
    own = [table(torch.tensor([3, 3])).sum(), table(torch.tensor([7])).pow(2).sum()]
    nothing = table(torch.tensor([], dtype=torch.int64)).sum()
    out = fastmtl.backward([own[0], None, nothing], MGDA(), table, retain_graph=True)
    assert out.weights.tolist() == [0, 0, 1]  # zero gradient: the shortest point
    assert_sparse(table.weight.grad, [3])
    assert (table.weight.grad.to_dense() == 0).all()
    table.weight.grad = None
    out = fastmtl.backward([own[0], None, own[1]], PCGrad(), table)
    assert out.weights.tolist() == [1, 0, 1]
    assert out.gramian[0].tolist() == [4 * WIDTH, 0, 0]
    assert_sparse(table.weight.grad, [3, 7])


def test_no_task_touches_a_row() -> None:
    table = nn.Embedding(*SHAPE, sparse=True)
    empty = torch.tensor([], dtype=torch.int64)
    out = fastmtl.backward([table(empty).sum(), table(empty).sum()], PCGrad(), table)
    assert (out.gramian == 0).all()
    assert out.weights.tolist() == [1, 1]
    assert_sparse(table.weight.grad, [])
    assert table.weight.grad.shape == SHAPE


@pytest.mark.parametrize("dense_tasks", [(1,), (0, 1, 2)])
def test_weight_tied_to_an_output_is_dense(dense_tasks: tuple[int, ...]) -> None:
    net, dense = Net("embedding", True), Net("embedding", False)
    for each in (net, dense):
        losses = each.losses(tokens())
        for t in dense_tasks:
            losses[t] = losses[t] + (each.trunk[0](tokens()) @ each.table.T).logsumexp(-1).mean()
        fastmtl.backward(losses, PCGrad(order="fixed"), each.trunk)
    assert net.table.grad.layout is torch.strided
    assert_same_grads(net, dense)


def test_micro_batches_of_which_some_are_dense() -> None:
    net, dense = Net("embedding", True), Net("embedding", False)
    for each in (net, dense):
        kept = fastmtl.TaskGradients(each.trunk, T)
        for t in range(T):
            for micro in range(3):
                loss = each.loss(t, each.trunk(tokens(seed=t)))
                kept.backward(t, loss + (each.table**2).sum() if micro == t else loss)
        kept.combine(MGDA())
    assert_same_grads(net, dense)


def test_rows_do_not_share_memory_with_the_input() -> None:
    net, dense = Net("embedding", True), Net("embedding", False)
    for each, buffer in ((net, tokens()), (dense, tokens())):
        kept = fastmtl.TaskGradients(each.trunk, T)
        for t in range(T):
            buffer.copy_(tokens(seed=t))  # as a data loader with a static buffer
            kept.backward(t, each.loss(t, each.trunk(buffer)))
        kept.combine(MGDA())
    assert_same_grads(net, dense)


@pytest.mark.parametrize("through", [ThroughGrad, ThroughBackward])
def test_rows_are_kept_without_duplicates(through: Callable[[Any], Any]) -> None:
    net = Net("embedding", True)
    with through([net.table]) as run:
        for loss in net.losses(tokens()):
            assert_sparse(run([loss], [None], True)[0], tokens())


def test_micro_batches_do_not_grow_what_is_kept() -> None:
    net = Net("embedding", True)
    kept = fastmtl.TaskGradients(net.trunk, T)
    for _ in range(5):
        kept.backward(0, net.loss(0, net.trunk(tokens())))
    (row,) = [r for r in kept._rows if r is not None]
    assert row[0]._nnz() == len(tokens().unique())


# ---- heads -----------------------------------------------------------------------------------------------------------


class SparseHeads(nn.Module):
    """A linear trunk; a table of each task's own, and one that the first two tasks share."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.trunk = nn.Linear(WIDTH, WIDTH)
        self.own = nn.ModuleList(nn.Embedding(*SHAPE, sparse=sparse) for _ in range(T))
        self.common = nn.Embedding(*SHAPE, sparse=sparse)

    def losses(self, z: Tensor) -> list[Tensor]:
        z = self.trunk(z)
        scores = [(own(tokens()) * z).sum(-1) for own in self.own]
        scores[:2] = [s + (self.common(tokens(seed=t)) * z).sum(-1) for t, s in enumerate(scores[:2])]
        return [((s - (-1) ** t * (t + 1)) ** 2).mean() for t, s in enumerate(scores)]


@pytest.mark.parametrize("existing", [None, "sparse", "dense"])
@pytest.mark.parametrize("method", [MGDA, GradNorm])
def test_sparse_heads(method: Callable[[], Any], existing: str | None) -> None:
    net, dense = SparseHeads(True), SparseHeads(False)
    z, start = torch.randn(5, WIDTH), coo([0, 30], torch.randn(2, WIDTH), SHAPE)
    for each in (net, dense):
        for p in [*each.own.parameters(), *each.common.parameters()] if existing else []:
            p.grad = start.clone() if existing == "sparse" and each is net else start.to_dense()
        fastmtl.backward(each.losses(z), method(), each.trunk)
    assert_same_grads(net, dense)
    if existing != "dense":
        also = torch.tensor([0, 30] if existing else [], dtype=torch.int64)
        for own in net.own:
            assert_sparse(own.weight.grad, torch.cat([tokens().flatten(), also]))
        both = torch.cat([tokens(seed=0).flatten(), tokens(seed=1).flatten(), also])
        assert_sparse(net.common.weight.grad, both)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_gradients_of_heads_share_no_memory(chunk_size: int | None) -> None:
    shared, a, b = nn.Linear(1, 1), nn.Embedding(5, 2, sparse=True), nn.Embedding(5, 2, sparse=True)
    one = torch.tensor([3])
    loss = (a(one) + b(one)).pow(2).sum() + shared.weight.sum()  # autograd hands both the same tensor
    expected = torch.autograd.grad(loss, [a.weight], retain_graph=True)[0].to_dense()
    fastmtl.backward([loss, shared.weight.sum()], MGDA(), shared, chunk_size=chunk_size)
    a.weight.grad._values().mul_(2)
    one.zero_()
    torch.testing.assert_close(b.weight.grad.to_dense(), expected)


def test_shared_tables_are_discovered() -> None:
    net = SparseHeads(True)
    out = fastmtl.backward(net.losses(torch.randn(5, WIDTH)), MGDA(), model=net)
    assert len(out.grads) == 3  # with the trunk's two
    assert out.grads[2] is net.common.weight.grad
    assert_sparse(out.grads[2], torch.cat([tokens(seed=0), tokens(seed=1)]))


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), lambda p: torch.optim.Adagrad(p, 0.1)],
    ids=["SGD", "Adagrad"],
)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of the optimizer's own tensors
def test_optimizers_step_as_with_dense_gradients(optimizer: Callable[[Any], Any], scaled: bool) -> None:
    net, dense = Net("sum", True), Net("sum", False)
    for each in (net, dense):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12) if scaled else None
        method, step = GradVac(order="fixed"), optimizer(each.parameters())
        for seed in range(4):
            step.zero_grad()
            fastmtl.backward(each.losses(tokens(seed=seed)), method, each.trunk, scaler=scaler)
            if scaler is None:
                step.step()
            else:
                scaler.step(step)
                scaler.update()
    assert_sparse(net.table.grad, tokens(seed=3))
    for a, b in zip(net.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_sparse_adam_takes_the_gradient() -> None:
    net, plain = Net("sum", True), Net("sum", True)
    seen: list[Tensor] = []
    for each in (net, plain):
        optimizer = torch.optim.SparseAdam([each.table], lr=0.1)
        for seed in range(3):
            each.zero_grad()
            losses = each.losses(tokens(seed=seed))
            if each is net:
                seen.append(fastmtl.backward(losses, MGDA(), each.trunk).weights)
            else:
                torch.dot(seen[seed], torch.stack(losses)).backward()
            optimizer.step()
    torch.testing.assert_close(net.table, plain.table, rtol=1e-9, atol=1e-12)


def test_an_overflow_reaches_the_scaler() -> None:
    net, scaler = Net("embedding", True), torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    before = copy.deepcopy(net.state_dict())
    losses = net.losses(tokens())
    fastmtl.backward([losses[0] * float("inf"), *losses[1:]], MGDA(), net.trunk, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**11
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("nonfinite", ["skip", "raise", "drop_task", "propagate"])
def test_policies_for_values_that_are_not_finite(nonfinite: str) -> None:
    net, dense = Net("embedding", True), Net("embedding", False)

    def step(each: Net) -> None:
        first, *others = each.losses(tokens())
        fastmtl.backward([first * float("nan"), *others], PCGrad(order="fixed"), each.trunk, nonfinite=nonfinite)

    if nonfinite == "raise":
        with assert_untouched(net), pytest.raises(FloatingPointError, match="task 0"):
            step(net)
        return
    step(net)
    step(dense)
    if nonfinite == "propagate":
        assert_sparse(net.table.grad, tokens())
        assert net.table.grad.values().isnan().all()
    else:
        assert_same_grads(net, dense)


def test_bitwise_repeatable() -> None:
    grads = []
    for _ in range(2):
        net = Net("sum", True).float()
        fastmtl.backward(net.losses(tokens(64)), PCGrad(order="fixed"), net.trunk)
        grads.append(net.table.grad.to_dense())
    assert torch.equal(*grads)


# ---- memory ----------------------------------------------------------------------------------------------------------


def largest_allocation(call: Callable[[], object]) -> int:
    """Bytes of the largest tensor that PyTorch allocates meanwhile."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    return max(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")


@pytest.mark.parametrize(
    "way", ["backward", "gramian_params", "TaskGradients", "aggregate", "heads", "head", "existing"]
)
def test_nothing_is_as_large_as_the_table(way: str) -> None:
    rows, width = 500_000, 8
    size = rows * width * 4
    last = nn.Linear(width, 1).float()

    def step(sparse: bool) -> Callable[[], object]:
        table = nn.Embedding(rows, width, sparse=sparse, _weight=torch.zeros(rows, width, dtype=torch.float32))

        def losses() -> list[Tensor]:
            z = table(torch.randint(0, rows, (64,)))
            return [last(z - 1).pow(2).mean(), last(z + 1).pow(2).mean()]

        def kept() -> None:
            rows = fastmtl.TaskGradients(table, 2)
            for t in (0, 1, 0, 1):
                rows.backward(t, losses()[t])
            rows.combine(MGDA())

        def twice() -> None:
            for _ in range(2):
                fastmtl.backward(losses(), MGDA(), table)

        return {
            "backward": lambda: fastmtl.backward(losses(), MGDA(), table),
            "gramian_params": lambda: fastmtl.backward(losses(), MGDA(), [table, last], gramian_params=last),
            "TaskGradients": kept,
            "aggregate": lambda: fastmtl.aggregate([per_task(losses(), table.weight)], MGDA()),
            "heads": lambda: fastmtl.backward(losses(), MGDA(), last),
            "head": lambda: fastmtl.backward([losses()[0], last.weight.sum()], MGDA(), last),
            "existing": twice,
        }[way]

    assert largest_allocation(step(sparse=False)) >= size  # or else this test measures nothing
    assert largest_allocation(step(sparse=True)) < size / 100


# ---- refused ---------------------------------------------------------------------------------------------------------


def test_several_sparse_dimensions_are_refused_by_name() -> None:
    linear = nn.Linear(3, 3, bias=False)
    loss = torch.gather(linear.weight, 1, torch.tensor([[0], [1], [1]]), sparse_grad=True).pow(2).sum()
    method = GradVac()
    with assert_untouched(linear, method), pytest.raises(TypeError, match=r"^weight: .*found 2 sparse dimensions"):
        fastmtl.backward([loss, 2 * loss], method, linear)
    kept = fastmtl.TaskGradients(linear, 2)
    loss = torch.gather(linear.weight, 1, torch.tensor([[0], [1], [1]]), sparse_grad=True).pow(2).sum()
    with assert_untouched(linear), pytest.raises(TypeError, match=r"^weight: .*found 2 sparse dimensions"):
        kept.backward(0, loss)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_other_layouts_are_refused_by_place() -> None:
    dense = torch.eye(3)
    for other, found in ((dense.to_sparse_csr(), "sparse_csr"), (dense.to_sparse(2), "2 sparse dimensions")):
        with pytest.raises(TypeError, match=rf"grads\[1\]\[0\]: .*found {found}"):
            fastmtl.aggregate([[dense, dense], [other, dense]], MGDA())
        with pytest.raises(TypeError, match=r"grads\[0\]: .*T sparse tensors"):
            fastmtl.aggregate([other], MGDA())
        with pytest.raises(TypeError, match=r"grads\[0\]: .*T sparse tensors"):
            fastmtl.aggregate(other, MGDA())


def test_sparse_gradients_of_several_shapes() -> None:
    with pytest.raises(ValueError, match=r"grads\[0\]\[1\]: expected the shape .* \[6, 2\], found \[7, 2\]"):
        fastmtl.aggregate([[coo([1], [[1, 2]]), coo([1], [[1, 2]], (7, 2))]], MGDA())


def test_batched_passes_are_refused() -> None:
    net = Net("embedding", True)
    with assert_untouched(net), pytest.raises(RuntimeError, match=r"chunk_size=2.*use chunk_size=1 or None"):
        at_once(net, MGDA(), chunk_size=2)
