"""Many processes: what the ranks of ``torch.distributed`` agree on before each solves the same problem.

Each rank has a slice of one batch, and local losses whose average over the ranks is the loss of the whole batch, as
``DistributedDataParallel`` has it (`mean` makes them so). What a method sees is then what a single process would see.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastmtl.losses import numbered
from fastmtl.state import Stateful

Group = Any
"""A ``torch.distributed.ProcessGroup``; ``"auto"``: all ranks, if there are several; None: this rank alone."""


class Ranks:
    """The ranks that share a batch, on a process group that nothing else uses.

    Its collectives may fall between those of ``DistributedDataParallel``, in another order on each rank.

    Attributes:
        group: The process group.
        size: W.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.size: int = dist.get_world_size(group)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in place, the same bits on each."""
        dist.all_reduce(x, group=self.group)
        return x

    @torch.no_grad()
    def align(self, module: torch.nn.Module, device: torch.device) -> None:
        """Give all ranks the first one's buffers and whole parameters, by way of the device: seeds, above all."""
        first = dist.get_global_rank(self.group, 0)
        for state in itertools.chain(module.buffers(), module.parameters()):
            if state.numel() > 0 and not hasattr(state, "full_tensor"):  # which is sharded, not copied
                value = state.detach().to(device, copy=True)
                dist.broadcast(value, first, group=self.group)
                state.copy_(value)
        for part in module.modules():
            if isinstance(part, Stateful):
                part.forget()

    def agree(
        self, present: Tensor, losses: Tensor | None, gramian: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the whole batch has of the tasks; one all-reduce of at most ``T^2 + 2 T`` numbers.

        Args:
            present: Whether a task is there, bool ``[T]``, on this rank.
            losses: ``[T]`` float64; those of absent tasks are not read. None: nobody needs them.
            gramian: ``[T, T]`` float64; rows and columns of absent tasks are not read. None: nobody needs it.

        Returns:
            The same: a task is there if it is on some rank; losses are averages over the ranks, to which absent ones
            add 0, and NaN where a task is there on none; the Gramian is that of the average loss's gradients.
        """
        parts = [present.double()]
        if losses is not None:
            parts.append(torch.where(present, losses.to(present.device), 0.0))
        if gramian is not None:
            pairs = present.unsqueeze(-1) & present
            parts.append(torch.where(pairs, gramian, 0.0).flatten() / self.size)
        total = self.sum(torch.cat(parts))
        t = len(present)
        there = total[:t] > 0
        if losses is not None:
            losses = torch.where(there, total[t : 2 * t] / self.size, float("nan"))
        if gramian is not None:
            gramian = total[-t * t :].view(t, t) / self.size
        return there, losses, gramian


# Per default group (kept, so that its id stays its own) and ranks: ours.
_own: dict[tuple[int, tuple[int, ...]], tuple[Any, Ranks]] = {}


def check_group(process_group: Group) -> None:
    """Refuse what is not a `Group`.

    Raises:
        TypeError: See above.
    """
    named = process_group is None or (isinstance(process_group, str) and process_group == "auto")
    if not named and not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        raise TypeError(
            f"process_group: expected a torch.distributed.ProcessGroup, 'auto' or None, found {process_group!r}"
        )


def several(process_group: Group) -> bool:
    """Whether there is more than one rank."""
    if process_group is None or not dist.is_available() or not dist.is_initialized():
        return False
    return dist.get_world_size(None if process_group == "auto" else process_group) > 1


def ranks_of(process_group: Group) -> Ranks | None:
    """Our own process group over the ranks of another, made when first asked for, by all of them together.

    Returns:
        None if there is one rank only.

    Raises:
        TypeError: Not a process group.
    """
    check_group(process_group)
    return ranks_over(members_of(process_group)) if several(process_group) else None


def ranks_over(members: Sequence[int]) -> Ranks:
    """Our own process group over some ranks, given by their global numbers, ascending."""
    world = dist.group.WORLD
    key = (id(world), tuple(members))
    if key not in _own:
        group = dist.new_group(list(members), timeout=_timeout(world), use_local_synchronization=True)
        _own[key] = world, Ranks(group)
    return _own[key][1]


def _timeout(group: Any) -> timedelta | None:
    """How long its collectives wait, which no public way tells; None: unknown, so torch's default."""
    devices = getattr(group, "_device_types", [])
    options = group._get_backend(devices[0]).options if devices else None
    return getattr(options, "_timeout", None)


def members_of(process_group: Group) -> tuple[int, ...]:
    """The global numbers of the ranks of a group, ascending; of one process without ``torch.distributed``: 0."""
    check_group(process_group)
    if not dist.is_available() or not dist.is_initialized():
        return (0,)
    if process_group is None:
        return (dist.get_rank(),)
    return tuple(sorted(dist.get_process_group_ranks(dist.group.WORLD if process_group == "auto" else process_group)))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def agree_on_losses(
    process_group: Group, losses: Sequence[Tensor | None], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which tasks are on any rank, bool ``[T]``, and the averages of their losses, ``[T]`` float64. See `Ranks`."""
    ranks = ranks_of(process_group)
    assert ranks is not None
    zero = torch.zeros((), dtype=torch.float64, device=device)
    here = torch.stack([zero if x is None else zero + 1 for x in losses]) > 0
    values = torch.stack([zero if x is None else x.detach().double() for x in losses])
    there, means, _ = ranks.agree(here, values)
    assert means is not None
    return there, means


def mean(loss_sum: Any, count: Any, process_group: Group = "auto") -> Any:
    """Local losses whose average over the ranks is the mean over all samples of all ranks.

    ``DistributedDataParallel`` averages gradients over ranks. The mean of each rank's own samples is right for it only
    where all ranks have equally many: with unequal batches, or samples labelled for some tasks, samples would count
    unequally. So each task's sum is multiplied by ``W / N_t``, for its N_t samples on all W ranks.

    Args:
        loss_sum: The sum of a task's losses over this rank's samples, a scalar; or a sequence or mapping of those, one
            per task. None: no sample here; a sum over no sample (0, with a graph) does as well, and lets this rank pass
            the task's head, as FSDP demands.
        count: The number of those samples, likewise; a number or a tensor.
        process_group: See `Group`.

    Returns:
        Likewise: a scalar; None where no rank has a sample (absent), or ``loss_sum`` is None.

    Raises:
        TypeError: Not tensors.
        ValueError: Names or numbers of tasks that do not fit; a negative count.
        RuntimeError: A rank has other tasks, or another order; on every rank.

    Note:
        Cost: one all-gather of W numbers, to make sure that all ranks have the same tasks; one all-reduce of T numbers;
        a host synchronisation after each. All ranks must call it.

    Example:
        >>> import torch, fastmtl
        >>> fastmtl.distributed.mean(torch.tensor(6.), 3)  # one process: the mean
        tensor(2.)
    """
    if isinstance(loss_sum, Mapping):
        if not isinstance(count, Mapping) or set(count) != set(loss_sum):
            raise ValueError(f"count: expected one per task ({', '.join(map(str, loss_sum))}), found {count!r}")
        counts = [count[name] for name in loss_sum]
        return dict(zip(loss_sum, _means([*loss_sum.values()], counts, loss_sum, process_group), strict=True))
    if isinstance(loss_sum, Tensor) and loss_sum.dim() == 1:
        loss_sum = loss_sum.unbind(0)
    if not isinstance(loss_sum, Sequence):
        return _means([loss_sum], [count], numbered(1), process_group)[0]
    counts = list(count)
    if len(counts) != len(loss_sum):
        raise ValueError(f"count: expected {len(loss_sum)}, found {len(counts)}")
    return _means(loss_sum, counts, numbered(len(counts)), process_group)


def _means(
    sums: Sequence[Tensor | None], counts: Sequence[Any], names: Iterable[Any], process_group: Group
) -> list[Tensor | None]:
    """See `mean`."""
    for t, x in enumerate(sums):
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"loss_sum of task {t}: expected a tensor, found {type(x).__name__}")
    device = next((x.device for x in sums if x is not None), device_of(process_group))
    here = torch.stack([torch.as_tensor(n, dtype=torch.float64, device=device) for n in counts])
    ranks = ranks_of(process_group)
    if ranks is not None:
        _check_same_tasks(ranks, [*map(str, names)], device)
    everywhere = (here if ranks is None else ranks.sum(here.clone())).tolist()
    if min(everywhere, default=0) < 0:
        raise ValueError(f"count: expected numbers of samples, found {everywhere}")
    size = 1 if ranks is None else ranks.size
    return [None if x is None or n == 0 else x * (size / n) for x, n in zip(sums, everywhere, strict=True)]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _check_same_tasks(ranks: Ranks, names: Sequence[str], device: torch.device) -> None:
    from fastmtl.exchange import handshake

    handshake(ranks, {"call": ["fastmtl.distributed.mean"], "tasks": names}, [], device)


def device_of(process_group: Group) -> torch.device:
    """Where collectives take tensors from, for a rank that has none."""
    ranks = ranks_of(process_group)
    if ranks is None or not torch.cuda.is_available() or "gloo" in dist.get_backend(ranks.group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
