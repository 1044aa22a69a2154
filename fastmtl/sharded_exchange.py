"""Parameter level over many ranks where parameters are sharded (`fastmtl.sharded`).

A `DTensor`'s gradient is whole with respect to its mesh, and each rank has its shard of every task's: so nothing is
exchanged but the Gramian. With ``n`` different shards of a parameter on ``W`` ranks, each is there ``W / n`` times; the
sum of ``n / W`` times each rank's Gramian counts it once. One all-reduce of ``K T^2`` numbers, whatever the parameters'
layouts, gives every rank the same bits.

Gradients of parameters whose mesh has not all of the ranks (plain ones; tensor parallelism, each of several meshes with
its slice of the batch) are averaged over the ranks that hold the same shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastmtl import ops
from fastmtl.distributed import Group, Ranks, members_of, ranks_over
from fastmtl.engine import unscaled
from fastmtl.exchange import Collected, Exchange, Row, gather
from fastmtl.rows import Rows
from fastmtl.sharded import Layout, layouts, shard_of

SAME_TASKS = "tasks with a loss (sharded parameters need all on all ranks; a sum over no sample, 0, is one)"


def ranks_of_sharded(process_group: Group, params: Sequence[Tensor]) -> Ranks | None:
    """The ranks that share a batch or hold its parameters.

    Returns:
        None if there is one rank only.

    Raises:
        ValueError: Neither the process group nor a mesh has them all.
    """
    groups = [members_of(process_group), *{layout.ranks for layout in layouts(params) if layout.ranks}]
    everyone = max(groups, key=len)
    for members in groups:
        if not set(members) <= set(everyone):
            raise ValueError(
                f"process_group: ranks {list(everyone)} and {list(members)} share a batch or a parameter's mesh; pass "
                "'auto' or a group that has them all (with tensor parallelism: each data rank's whole mesh)"
            )
    return ranks_over(everyone) if len(everyone) > 1 else None


class ShardedExchange(Exchange):
    """As `Exchange`, where some parameters are sharded. The gradients it is given are this rank's shards.

    Args:
        params: All whose gradients it will be given.
        others: As for `Exchange`.

    Raises:
        ValueError: The ranks hold some shards more often than others.
    """

    def __init__(self, params: Sequence[Tensor], *others: Any) -> None:
        super().__init__(*others)
        found = dict.fromkeys(layouts(params))
        world = tuple(dist.get_process_group_ranks(self.ranks.group))
        self._partners: dict[Layout, Ranks | None] = {  # with whom to average
            layout: None if layout.ranks == world else self.ranks for layout in found
        }
        apart = [layout for layout in found if layout.ranks not in ((), world)]
        if apart:
            places = gather([layout.place for layout in apart], self.ranks, self.device)
            for layout, column in zip(apart, places, strict=True):
                members = [rank for rank, place in zip(world, column, strict=True) if place == layout.place]
                if len(members) * layout.shards != self.ranks.size:
                    raise ValueError(
                        f"process_group: its {self.ranks.size} ranks do not hold the {layout.shards} shards of a "
                        "parameter equally often; pass a group that has every mesh whole"
                    )
                self._partners[layout] = ranks_over(members)

    @contextmanager
    def passes(self, num_tasks: int, num_params: int, shards: Collected | None = None) -> Iterator[None]:
        """Within, this rank runs its backward passes, which send on their own: an error there stays on this rank."""
        yield

    def collect(
        self,
        params: Sequence[Tensor],
        groups: list[int] | None = None,
        num_groups: int = 1,
        row_dtype: torch.dtype | None = None,
        argument: str = "shared_params",
    ) -> ShardedRows:
        """See `Exchange.collect`."""
        return ShardedRows(self, params, groups, num_groups, row_dtype, argument)

    def average(self, params: Sequence[Tensor], grads: Row, ranks: Ranks | None = None) -> list[Tensor | None]:
        """See `Exchange.average`."""
        found = list(grads)
        layout = layouts(params)
        for partners in dict.fromkeys(self._partners[each] for each in layout):
            if partners is not None:
                some = [i for i, each in enumerate(layout) if self._partners[each] is partners]
                shards = [shard_of(params[i], params[i]) for i in some]
                for i, g in zip(some, super().average(shards, [grads[i] for i in some], partners), strict=True):
                    found[i] = g
        return found

    def gram(self, params: Sequence[Tensor], rows: Rows, precision: str = "full") -> Tensor:
        """See `Exchange.gram`."""
        layout = layouts(params)
        shards = sorted({each.shards for each in layout})
        k = rows.num_groups
        groups = rows.groups or [0] * len(layout)
        apart = [shards.index(each.shards) * k + group for each, group in zip(layout, groups, strict=True)]
        parts = ops.gram(replace(rows, groups=apart, num_groups=k * len(shards)), precision=precision)
        counted = [part * (n / self.ranks.size) for part, n in zip(parts.split(k), shards, strict=True)]
        return self.ranks.sum(torch.stack(counted).sum(0))


class ShardedRows:
    """This rank's shards of all tasks' gradients; see `Collected`. Memory: ``T P / n`` of ``n`` shards."""

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
        self.groups = groups
        self.num_groups = num_groups
        self.row_dtype = row_dtype
        self.argument = argument
        self._tasks: list[Row | None] = [None] * len(exchange.present)

    def add(self, task: int, row: Row) -> Row:
        """See `Collected`."""
        n = len(self.params)
        averages = self.exchange.average(self.params, row[:n])
        narrow = self.row_dtype
        if narrow is not None:
            averages = [g.to(narrow) if g is not None and g.dtype is torch.float32 else g for g in averages]
        self._tasks[task] = averages
        return [*([None] * n), *row[n:]]

    def end(self) -> None:
        """See `Collected`."""

    def gramian(self, precision: str, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Collected`."""
        self._rows = Rows.by_task(self._tasks, self.groups, self.num_groups)
        if all(g is None for g in self._rows.grads):
            raise ValueError(f"{self.argument}: no loss reaches any of them on any rank")
        gramian = self.exchange.gram(self.params, self._rows, precision)
        return unscaled(gramian, scale), self._rows.mask()

    def combined(self, weights: Tensor) -> list[Tensor | None]:
        """See `Collected`."""
        reached = self._rows.reached()
        found = {p: torch.zeros_like(shard_of(self.params[p], self.params[p])) for p in reached}
        ops.combine_(self._rows.select(reached), weights, [*found.values()])
        return [found.get(p) for p in range(len(self.params))]
