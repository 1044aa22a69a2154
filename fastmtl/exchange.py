"""Parameter level over many ranks: each task's gradients are averaged over them, and each rank keeps a shard.

In place of T averages of P numbers (``2 T P`` moved per rank), T reduce-scatters leave each rank ``P / W`` numbers of
each task. The shards' Gramians sum to the whole one, each rank combines its shard, and one all-gather of P numbers puts
the combined gradient together: ``(T + 1) P``. Every rank solves the same problem, so all hold the same ``.grad``, bit
for bit.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastmtl import ops
from fastmtl.accumulate import accumulate
from fastmtl.distributed import Ranks
from fastmtl.engine import Method, decide, restored_on_error, unscaled
from fastmtl.losses import Losses
from fastmtl.rows import Rows, constant_mask
from fastmtl.sharded import is_sharded
from fastmtl.surgery.base import GradientMethod

Subjects = Mapping[str, Sequence[str]]
"""What ranks must have in common, in words, by subject."""

BUCKET_BYTES = 25 * 2**20

# Their names up to torch 2.12 are deprecated from 2.13 on.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)

Row = Sequence[Tensor | None]
_NONE, _DENSE, _SPARSE, _FAILED = 0, 1, 2, 255  # what a rank has for a gradient; of several ranks the largest counts

_aligned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Exchange:
    """One step's word with the other ranks. The constructor is the first collective: all ranks or none get past it.

    Args:
        ranks: All that share the batch.
        method: Its state becomes the first rank's, when first seen.
        losses: This rank's, perhaps of no task; None: unknown.
        present: Which tasks this rank has.
        names: The tasks' names.
        device: Where the parameters lie.
        call: What all ranks must have in common besides tasks and method.
        static_graph: The model is a ``DistributedDataParallel`` made so.
        unproven: See `fastmtl.passes.Passes.unproven`.

    Attributes:
        names: The tasks'.
        present: Which tasks are there on some rank.
        losses: Averages over the ranks, None where a task is on none; None: unknown on some rank.
        unproven: On some rank.

    Raises:
        RuntimeError: Ranks differ; the text names a rank and the difference, on every rank.
        ValueError: No task on any rank; ``static_graph``.
    """

    def __init__(
        self,
        ranks: Ranks,
        method: Method,
        losses: Losses | None,
        present: Sequence[bool],
        names: Sequence[str],
        device: torch.device,
        call: Subjects,
        static_graph: bool = False,
        unproven: bool = False,
    ) -> None:
        self.ranks = ranks
        self.names = tuple(names)
        self.device = device
        wrapper = ["static_graph=True"] if static_graph else []
        subjects = {
            "call": call["call"],
            "tasks": names,
            "method": describe(method),
            "DistributedDataParallel": wrapper,
            **call,
        }
        flags = [method not in _aligned, losses is None, unproven]
        new, unknown, self.unproven = handshake(ranks, subjects, flags, device)
        if static_graph:
            raise ValueError(
                "DistributedDataParallel(static_graph=True) expects one backward pass per forward pass, in which each "
                "parameter's gradient is made once; drop static_graph=True, or use FeatureSurgery"
            )
        here = torch.tensor(present, dtype=torch.bool, device=device)
        values = torch.zeros(len(names), dtype=torch.float64, device=device)
        if losses is not None and losses.present:
            values = losses.values().to(device)
        there, average, _ = ranks.agree(here, values)
        assert average is not None
        self.present: list[bool] = there.tolist()
        if not any(self.present):
            raise ValueError(f"losses: expected at least one on some rank, found {len(names)} tasks, all absent")
        if new:
            ranks.align(method, device)
            _aligned.add(method)
        items = [x if p else None for x, p in zip(average.unbind(), self.present, strict=True)]
        self.losses = None if unknown else Losses(self.names, tuple(items))

    def collect(
        self,
        params: Sequence[Tensor],
        groups: list[int] | None = None,
        num_groups: int = 1,
        row_dtype: torch.dtype | None = None,
        argument: str = "shared_params",
    ) -> Collected:
        """A place for all tasks' gradients.

        Args:
            params: P numbers in all.
            groups: Per parameter the index of its group; None: one group.
            num_groups: K.
            row_dtype: What averaged float32 gradients are stored in; None: float32.
            argument: Whose parameters these are, for errors.
        """
        return Shards(self, params, groups, num_groups, row_dtype, argument)

    def most(
        self, marks: Sequence[Sequence[int]], ranks: Ranks | None = None, error: Exception | None = None
    ) -> list[list[int]]:
        """The elementwise maximum over the ranks of a matrix of numbers 0..254; synchronises with the host.

        Args:
            marks: The matrix.
            ranks: None: all.
            error: What keeps this rank from going on: the matrix is not read then.

        Raises:
            RuntimeError: A rank has an error; on every rank.
        """
        table = torch.tensor(marks, dtype=torch.uint8, device=self.device)
        if table.numel() == 0:
            return table.tolist()
        if error is not None:
            table.fill_(_FAILED)
        dist.all_reduce(table, op=dist.ReduceOp.MAX, group=(ranks or self.ranks).group)
        found: list[list[int]] = table.tolist()
        if found[0][0] == _FAILED:
            words: list[Any] = [None] * self.ranks.size
            dist.all_gather_object(words, error and f"{type(error).__name__}: {error}", group=self.ranks.group)
            rank = next(r for r, text in enumerate(words) if text is not None)
            name = dist.get_global_rank(self.ranks.group, rank)
            raise RuntimeError(f"rank {name} failed in its backward passes: {words[rank]}")
        return found

    @contextmanager
    def passes(self, num_tasks: int, num_params: int, shards: Collected | None = None) -> Iterator[None]:
        """Within, this rank runs its backward passes: an error there becomes one on every rank.

        Args:
            num_tasks: Rows of the next matrix of `most`; 1 for that of `average`.
            num_params: Its columns.
            shards: Where the tasks' gradients are collected meanwhile.
        """
        try:
            yield
        except Exception as error:
            if shards is not None:
                shards.end()
            with suppress(RuntimeError):  # the same error, as it is told to the others
                self.most([[_NONE] * num_params] * num_tasks, error=error)
            raise

    def gram(self, params: Sequence[Tensor], rows: Rows, precision: str = "full") -> Tensor:
        """The Gramian ``[K, T, T]`` of averaged gradients as `average` returns them.

        Args:
            params: Parameters.
            rows: Their gradients.
            precision: See `fastmtl.ops.gram`.
        """
        return ops.gram(rows, precision=precision)

    def average(self, params: Sequence[Tensor], grads: Row, ranks: Ranks | None = None) -> list[Tensor | None]:
        """The average of gradients over the ranks; None where no rank has one.

        Args:
            params: Parameters.
            grads: This rank's gradients, or None.
            ranks: None: all.

        Raises:
            TypeError: A gradient is sparse.
        """
        if not params:
            return []
        ranks = ranks or self.ranks
        (marks,) = self.most([[_mark(g) for g in grads]], ranks)
        _refuse_sparse(params, marks)
        some = [i for i, mark in enumerate(marks) if mark]
        averages: list[Tensor | None] = [None] * len(params)
        work = []
        for bucket in _buckets([params[i] for i in some], 1):
            flat = bucket.zeros()
            bucket.fill(flat, [grads[i] for i in some], ranks.size)
            work.append(dist.all_reduce(flat, group=ranks.group, async_op=True))
            for i, slot in bucket.slots(flat):
                averages[some[i]] = slot
        for each in work:
            each.wait()
        return averages


@contextmanager
def aligned_after_errors(method: Method) -> Iterator[None]:
    """An error within, which other ranks may have got past, has the next step give all ranks the first one's state."""
    try:
        yield
    except BaseException:
        _aligned.discard(method)
        raise


class Collected(Protocol):
    """All tasks' gradients, averaged over the ranks.

    Attributes:
        exchange: Of this step.
        params: The parameters.
    """

    exchange: Exchange
    params: Sequence[Tensor]

    def add(self, task: int, row: Row) -> Row:
        """Take this rank's gradients of a task, tasks in ascending order.

        Args:
            task: Its index.
            row: Gradients of ``params``, then of other parameters.

        Returns:
            The latter, after a None for each of the former.
        """

    def end(self) -> None:
        """There are no more of this rank."""

    def gramian(self, precision: str, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The Gramian ``[K, T, T]`` of the raw losses' averaged gradients, and which task reaches which group.

        Raises:
            TypeError: A gradient is sparse.
            ValueError: No gradient on any rank.
        """

    def combined(self, weights: Tensor) -> list[Tensor | None]:
        """The parameters' gradients, summed with the weights ``[K, T]``; None where no task on any rank reaches."""


class Shards:
    """This rank's shards of all tasks' averaged gradients; see `Exchange.collect`, `Collected`.

    A task's reduce-scatter runs while the next task's backward pass does. Memory: ``T P / W`` for the shards, and P for
    the task on its way.
    """

    def __init__(
        self,
        exchange: Exchange,
        params: Sequence[Tensor],
        groups: list[int] | None,
        num_groups: int,
        row_dtype: torch.dtype | None,
        argument: str,
    ) -> None:
        self.exchange = exchange
        self.params = params
        self.groups = [0] * len(params) if groups is None else groups
        self.num_groups = num_groups
        self.row_dtype = row_dtype
        self.argument = argument
        size = exchange.ranks.size
        self._buckets = _buckets(params, size)
        self._flats = [bucket.zeros() for bucket in self._buckets]
        self._marks = [[_NONE] * len(params) for _ in exchange.present]
        self._shards: list[list[Tensor] | None] = [None] * len(exchange.present)
        self._sent = 0  # tasks
        self._work: list[Any] = []
        self._on_its_way: list[Tensor] = []  # the shards of the last one
        place = dist.get_rank(exchange.ranks.group)
        self._pieces = [  # bucket, from, to, group: in each of which the shard lies in one group
            (b, start, stop, group)
            for b, bucket in enumerate(self._buckets)
            for start, stop, group in bucket.pieces(self.groups, place, size)
        ]

    def add(self, task: int, row: Row) -> Row:
        """See `Collected`."""
        n = len(self.params)
        while self._sent < task:
            self._send(None)
        self._send(row[:n])
        return [*([None] * n), *row[n:]]

    def end(self) -> None:
        """See `Collected`."""
        while self._sent < len(self._shards):
            self._send(None)
        self._wait()

    def gramian(self, precision: str, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Collected`."""
        self.end()
        self._marks = self.exchange.most(self._marks)
        _refuse_sparse(self.params, [max(marks) for marks in zip(*self._marks, strict=True)])
        if not any(map(any, self._marks)):
            raise ValueError(f"{self.argument}: no loss reaches any of them on any rank")
        gramian = self.exchange.ranks.sum(ops.gram(self._rows(), precision=precision))
        present = [[False] * len(self._marks) for _ in range(self.num_groups)]
        for t, marks in enumerate(self._marks):
            for mark, group in zip(marks, self.groups, strict=True):
                present[group][t] |= mark > 0
        mask = None if all(map(all, present)) else constant_mask(present, self.exchange.device)
        return unscaled(gramian, scale), mask

    def combined(self, weights: Tensor) -> list[Tensor | None]:
        """See `Collected`."""
        parts = [flat.new_zeros(len(flat) // self.exchange.ranks.size) for flat in self._flats]
        ops.combine_(self._rows(), weights, [parts[b][start:stop] for b, start, stop, _ in self._pieces])
        self._shards = [None] * len(self._shards)
        for flat, part in zip(self._flats, parts, strict=True):
            self._work.append(_all_gather(flat, part, group=self.exchange.ranks.group, async_op=True))
        for work in self._work:
            work.wait()
        slots = {i: slot for b, flat in zip(self._buckets, self._flats, strict=True) for i, slot in b.slots(flat)}
        reached = [any(marks) for marks in zip(*self._marks, strict=True)]
        return [slots[i] if reached[i] else None for i in range(len(self.params))]

    def _send(self, row: Row | None) -> None:
        """Start to average the next task's gradients: zeros where only other ranks have some."""
        task = self._sent
        self._sent += 1
        if not self.exchange.present[task]:
            return
        self._wait()
        if row is not None:
            self._marks[task] = [_mark(g) for g in row]
        size, group = self.exchange.ranks.size, self.exchange.ranks.group
        shards = [torch.empty_like(flat[: len(flat) // size]) for flat in self._flats]  # out of memory: none is sent
        for bucket, flat, shard in zip(self._buckets, self._flats, shards, strict=True):
            bucket.fill(flat, row, size)
            self._work.append(_reduce_scatter(shard, flat, group=group, async_op=True))
        self._shards[task] = self._on_its_way = shards

    def _wait(self) -> None:
        """Finish the task on its way."""
        for work in self._work:
            work.wait()
        self._work = []
        if self.row_dtype is not None:
            narrow = [x.to(self.row_dtype) if x.dtype is torch.float32 else x for x in self._on_its_way]
            self._on_its_way[:] = narrow

    def _rows(self) -> Rows:
        grads = [
            None if shards is None else shards[b][start:stop]
            for b, start, stop, _ in self._pieces
            for shards in self._shards
        ]
        return Rows(grads, len(self._shards), groups=[group for *_, group in self._pieces], num_groups=self.num_groups)


def finish(
    shards: Collected,
    heads: Sequence[Tensor],
    tasks: Sequence[Row | None],
    method: GradientMethod,
    scale: Tensor | None,
    nonfinite: str,
    max_norm: float | None,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Weigh the tasks and add their gradients to ``.grad``.

    Args:
        shards: Of the shared parameters, all tasks of this rank added.
        heads: The other parameters.
        tasks: This rank's gradients of the heads, per task.
        method: See `fastmtl.engine.decide`, as for the remaining ones.
        scale: The loss scale.
        nonfinite: See above.
        max_norm: See above.
        precision: See `fastmtl.ops.gram`.

    Returns:
        Weights ``[K, T]`` and the Gramian ``[K, T, T]``.
    """
    exchange = shards.exchange
    gramian, mask = shards.gramian(precision, scale)
    with restored_on_error(method):
        decision = decide(method, gramian, mask, exchange.losses, exchange.names, nonfinite, max_norm)
        if not decision.skip:
            plain = exchange.average(heads, weighted(tasks, len(heads), decision.for_heads(method)))
            combined = shards.combined(decision.weights)
            accumulate((shards.params, Rows.by_task([combined]), None), (heads, Rows.by_task([plain]), None))
    return decision.weights, gramian


def weighted(tasks: Sequence[Row | None], num_params: int, weights: Tensor | None) -> Row:
    """This rank's sum over its tasks, with the weights ``[1, T]``; None: all count 1."""
    if num_params == 0 or all(row is None for row in tasks):
        return [None] * num_params
    rows = Rows.by_task(tasks)
    if not rows.reached():
        return [None] * num_params
    if weights is None:
        weights = torch.ones(1, rows.num_tasks, device=rows.device)
    return ops.combine(rows, weights)


def describe_params(params: Mapping[str, Tensor]) -> list[str]:
    """In words, what all ranks must have in common of parameters."""
    return [f"{name} {describe_param(p)}" for name, p in params.items()]


def describe_param(param: Any) -> str:
    """The same, of one without a name."""
    words = f"{list(param.shape)} {param.dtype}"
    return f"{words} {param.placements} on {list(param.device_mesh.shape)}" if is_sharded(param) else words


def has_static_graph(losses: Iterable[Tensor], model: nn.Module | None = None) -> bool:
    """Whether the losses come from a ``DistributedDataParallel(static_graph=True)``, as its first steps show."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return bool(model.static_graph)
    stack = [x.grad_fn for x in losses if x.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if type(node).__name__ == "_DDPSinkBackward":
            wrapper = node.ddp_weakref()  # type: ignore[attr-defined]
            return wrapper is not None and bool(wrapper.static_graph)
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                stack.append(after)
    return False


@dataclass(frozen=True)
class _Bucket:
    """Some parameters' gradients, one after the other in flat memory, padded to equal parts.

    Attributes:
        params: Indices.
        shapes: Of each.
        like: A tensor of their dtype and device.
        size: Numbers in all.
    """

    params: list[int]
    shapes: list[torch.Size]
    like: Tensor
    size: int

    def zeros(self) -> Tensor:
        return self.like.new_zeros(self.size)

    def slots(self, flat: Tensor) -> list[tuple[int, Tensor]]:
        """Each parameter's index and place."""
        sizes = [shape.numel() for shape in self.shapes]
        parts = flat[: sum(sizes)].split(sizes)
        return [(i, part.view(shape)) for i, part, shape in zip(self.params, parts, self.shapes, strict=True)]

    @torch.no_grad()
    def fill(self, flat: Tensor, grads: Row | None, divisor: int) -> None:
        """Put gradients, divided, in their places, and zeros in those of None."""
        for i, slot in self.slots(flat):
            g = None if grads is None else grads[i]
            if g is None or g.is_sparse:
                slot.zero_()
            else:
                torch.div(g, divisor, out=slot)

    def pieces(self, groups: Sequence[int], part: int, parts: int) -> list[tuple[int, int, int]]:
        """Where in one of equal parts which group lies: from, to, group; padding is the last one's."""
        first, length = part * (self.size // parts), self.size // parts
        pieces: list[tuple[int, int, int]] = []
        end = 0
        for k, (i, shape) in enumerate(zip(self.params, self.shapes, strict=True)):
            start, end = end, self.size if k == len(self.params) - 1 else end + shape.numel()
            low, high = max(start - first, 0), min(end - first, length)
            if low >= high:
                continue
            if pieces and pieces[-1][2] == groups[i]:
                low = pieces.pop()[0]
            pieces.append((low, high, groups[i]))
        return pieces


def _buckets(params: Sequence[Tensor], parts: int) -> list[_Bucket]:
    """Buckets of one dtype each, of about `BUCKET_BYTES`."""
    open_ones: dict[torch.dtype, tuple[list[int], int]] = {}
    full: list[list[int]] = []
    for i, p in enumerate(params):
        members, count = open_ones.pop(p.dtype, ([], 0))
        members.append(i)
        count += p.numel() * p.element_size()
        if count >= BUCKET_BYTES:
            full.append(members)
        else:
            open_ones[p.dtype] = members, count
    full += [members for members, _ in open_ones.values()]
    buckets = []
    for members in full:
        shapes = [params[i].shape for i in members]
        length = max(1, -(-sum(shape.numel() for shape in shapes) // parts))
        buckets.append(_Bucket(members, shapes, params[members[0]].detach(), length * parts))
    return buckets


def _mark(grad: Tensor | None) -> int:
    return _NONE if grad is None else _SPARSE if grad.is_sparse else _DENSE


def _refuse_sparse(params: Sequence[Tensor], marks: Sequence[int]) -> None:
    for p, mark in zip(params, marks, strict=True):
        if mark == _SPARSE:
            raise TypeError(
                f"a parameter of shape {list(p.shape)}: sparse gradients are not supported over several ranks; "
                "use nn.Embedding(sparse=False)"
            )


def gather(numbers: Sequence[int], ranks: Ranks, device: torch.device) -> list[list[int]]:
    """Each number's value on every rank; synchronises with the host."""
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    everyone = mine.new_empty(ranks.size * len(mine))
    _all_gather(everyone, mine, group=ranks.group)
    return everyone.view(ranks.size, -1).T.tolist()


def handshake(ranks: Ranks, subjects: Subjects, flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Make sure that all ranks mean the same step; one all-gather of a few numbers, and a host synchronisation.

    Args:
        ranks: All.
        subjects: What must be the same everywhere, in words.
        flags: May differ.
        device: Where the numbers lie.

    Returns:
        Each flag: whether it is set on some rank.

    Raises:
        RuntimeError: See `Exchange`.
    """
    found, *flagged = gather([_hash(subjects), *map(int, flags)], ranks, device)
    if len(set(found)) == 1:
        return [any(each) for each in flagged]
    words: list[Any] = [None] * ranks.size
    dist.all_gather_object(words, subjects, group=ranks.group)
    usual = found.index(Counter(found).most_common(1)[0][0])
    others = [r for r in range(ranks.size) if found[r] != found[usual]]
    texts = [_difference(ranks, words, r, usual) for r in others[:4]]
    more = f"; and {len(others) - 4} more ranks" if len(others) > 4 else ""
    raise RuntimeError(f"ranks disagree: {'; '.join(texts)}{more}")


def _difference(ranks: Ranks, words: Sequence[Subjects], rank: int, usual: int) -> str:
    """The first difference between two ranks, in words."""
    for subject in [*words[rank], *words[usual]]:
        mine, theirs = (list(words[r].get(subject, ())) for r in (rank, usual))
        if mine != theirs:
            longest = max(len(mine), len(theirs))
            pairs = [[x[i] if i < len(x) else "none" for x in (mine, theirs)] for i in range(longest)]
            found, expected = next(pair for pair in pairs if pair[0] != pair[1])
            names = [dist.get_global_rank(ranks.group, r) for r in (rank, usual)]
            return f"rank {names[0]} has other {subject}: {found}, where rank {names[1]} has {expected}"
    raise AssertionError("equal")


def _hash(subjects: Subjects) -> int:
    words = repr([(subject, list(entries)) for subject, entries in subjects.items()])
    digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def describe(method: Method) -> list[str]:
    """A method's options, and what of its state is not on the device."""
    words = []
    for module in method.modules():
        options = {k: _plain(v) for k, v in vars(module).items() if k[0] != "_" and k != "process_group"}
        owned = {**module._buffers, **module._parameters}
        state = {k: list(v.shape) for k, v in owned.items() if v is not None}
        words.append(f"{type(module).__name__} {options} {state}")
    return words


def _plain(value: Any) -> Any:
    """What of an option's value is the same on every rank, whatever the process and the device."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, bool | int | float | str) else type(value).__name__
