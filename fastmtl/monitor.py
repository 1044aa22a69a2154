"""Monitor: what the tasks did to each other during training, recorded at next to no cost, and told in plain words."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmtl import diagnosis
from fastmtl.checks import whole
from fastmtl.engine import Method, check_method
from fastmtl.watch import Seen, unwatch, watch

Record = dict[str, Any]
"""One recorded step: see `Monitor`."""
Writer = Callable[[Record], None]

LARGE = (
    64  # tasks; beyond it, what costs T^3 or T^2 characters is left out of the records but the last of each hand-over
)


class Monitor:
    """Records what a method sees and does: the reasons why a method helps, or none is needed.

    Each recorded step keeps the T x T Gramian, the weights and the losses, on the device; every
    ``flush_every`` records they are fetched together (one synchronisation), reduced to a ``Record`` each, and handed to
    the writers. The method's computation, its state, and its checkpoints are as without a monitor.

    Record (numbers are None where unknown; with K groups those of the whole, from the summed Gramians):
        ``step``: which training step, from 1. Per task, ``[T]``: ``weights`` (means over the groups), ``losses``,
        ``norms`` of the gradients. Over pairs of tasks present: ``conflicts``: share with a negative dot product;
        ``strong_conflicts``: share with a cosine below -0.1; ``mean_cosine``, ``min_cosine``;
        ``magnitude_similarity``: mean of ``2 |g_i| |g_j| / (|g_i|^2 + |g_j|^2)`` (Yu et al., NeurIPS 2020, Definition
        3). ``agreement``: ``|sum g|^2 / sum |g|^2``, 0 where gradients cancel, 1 where they are orthogonal, T where
        equal. ``condition``: condition number of the matrix of cosines. ``cosines``: the matrix ``[T][T]`` (for up to
        64 tasks; for more it and ``condition`` are in the last record of each hand-over only).

    Args:
        method: Whatever is handed to `fastmtl.backward`, `FeatureSurgery`, `TaskGradients.combine`, or called.
        writers: Where records go besides `records`: a path that ends in ``.jsonl`` or ``.csv``, a
            ``torch.utils.tensorboard.SummaryWriter``, any callable that takes a ``Record``; or a sequence of these.
            None: nowhere.
        every: Record one step in so many.
        flush_every: Fetch after so many records.

    Attributes:
        records: All records that were fetched, in order.
        names: The tasks', from the first step on.

    Raises:
        TypeError, ValueError: Not a method, an unknown kind of writer, a number out of range.

    Note:
        Cost: a few microseconds in a recorded step, and a hand-over of about 0.2 ms per record. Memory on the device:
        ``flush_every`` Gramians. Behind `FeatureSurgery`, losses are known if `total` gets them, and over several ranks
        only where the method needs them; attach the monitor before the layer is compiled. Several ranks record the same
        each: give the writers to one. A step that takes no Gramian (a loss weighting, `Sum`, between the updates of
        `Amortized`) has no norms and cosines; one of an elementwise method (`GradDrop`, `TrimmedMean`), which has no
        weights, is not recorded.

    Example:
        >>> import torch, fastmtl
        >>> method = fastmtl.PCGrad()
        >>> with fastmtl.Monitor(method) as monitor:
        ...     _ = method(torch.tensor([[1., -9.], [-9., 100.]]))
        >>> monitor.records[0]["conflicts"], monitor.records[0]["norms"]
        (1.0, [1.0, 10.0])
    """

    def __init__(self, method: Method, writers: Any = None, every: int = 1, flush_every: int = 100) -> None:
        check_method(method)
        self.method = method
        self.every, self.flush_every = whole("every", every, 1), whole("flush_every", flush_every, 1)
        self._writers = _writers(writers)
        self.records: list[Record] = []
        self.names: tuple[str, ...] = ()
        self._steps = 0
        self._waiting: list[tuple[int, list[Tensor | None]]] = []
        watch(method, self._see)

    def flush(self) -> None:
        """Fetch what waits on the device and hand it to the writers."""
        waiting, self._waiting = self._waiting, []
        flat = [x for _, tensors in waiting for x in tensors]
        fetched = iter([None if x is None else x.numpy() for x in _to_host(flat)])
        for i, (step, tensors) in enumerate(waiting):
            weights, gramian, mask, losses = (next(fetched) for _ in tensors)
            record = _record(step, weights, gramian, mask, losses, whole=i == len(waiting) - 1)
            self.records.append(record)
            for write in self._writers:
                write(record)

    def close(self) -> None:
        """Flush, and watch no more."""
        unwatch(self.method, self._see)
        self.flush()
        for write in self._writers:
            if isinstance(write, _File):
                write.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def report(self) -> str:
        """In plain words, which of magnitude, velocity and direction is the trouble, on what evidence, and the cures.

        Raises:
            ValueError: Nothing was recorded.
        """
        self.flush()
        return diagnosis.report(self.records, self.names)

    def plot(self, path: str | Path | None = None) -> Any:
        """A figure of weights, gradient norms, losses, conflicts and the mean cosines; needs matplotlib.

        Args:
            path: Where to save it; None: only return it.

        Returns:
            The ``matplotlib.figure.Figure``.

        Raises:
            ValueError: Nothing was recorded.
        """
        self.flush()
        figure = diagnosis.plot(self.records, self.names)
        if path is not None:
            figure.savefig(path, dpi=110)
        return figure

    def _see(self, seen: Seen) -> None:
        self._steps += 1
        if not self.names:
            self.names = tuple(seen.names)
            for write in self._writers:
                if isinstance(write, _File):
                    write.begin(self.names, type(self.method).__name__)
        if (self._steps - 1) % self.every:
            return
        losses = None if seen.losses is None or not seen.losses.present else seen.losses.values()
        gramian = None if seen.gramian is None else seen.gramian.clone()  # a caller may reuse its memory
        self._waiting.append((self._steps, [seen.weights.clone(), gramian, seen.mask, losses]))
        if len(self._waiting) >= self.flush_every:
            self.flush()


def _to_host(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """All of them on the CPU, with one synchronisation per device."""
    devices = {x.device for x in tensors if x is not None and x.device.type == "cuda"}
    moved = [None if x is None else x.to("cpu", non_blocking=True) for x in tensors]
    for device in devices:
        torch.cuda.synchronize(device)
    return moved


def _record(step: int, weights: Any, gramian: Any, mask: Any, losses: Any, whole: bool) -> Record:
    """The numbers of one step, from NumPy arrays."""
    record: Record = {"step": step, "weights": _numbers(weights.mean(0)), "losses": _numbers(losses)}
    record |= dict.fromkeys(MEASURES) | {"norms": None, "cosines": None}
    if gramian is None:
        return record
    if mask is not None:
        gramian = np.where(mask[:, :, None] & mask[:, None, :], gramian, 0.0)
        there = mask.any(0)
    else:
        there = np.ones(gramian.shape[-1], dtype=bool)
    gramian = gramian.sum(0)
    norms = np.sqrt(np.clip(gramian.diagonal(), 0, None))
    record["norms"] = _numbers(np.where(there, norms, np.nan))
    some = np.flatnonzero(there & (norms > 0))
    if len(some) < 2 or not np.isfinite(gramian[np.ix_(some, some)]).all():
        return record
    m, n = gramian[np.ix_(some, some)], norms[some]
    cosines = np.clip(m / n[:, None] / n, -1, 1)
    pairs = np.triu_indices(len(some), 1)
    found = cosines[pairs]
    ratio = n[pairs[0]] / n[pairs[1]]
    record["conflicts"] = float((m[pairs] < 0).mean())
    record["strong_conflicts"] = float((found < diagnosis.STRONG).mean())
    record["mean_cosine"], record["min_cosine"] = float(found.mean()), float(found.min())
    record["magnitude_similarity"] = float((2 / (ratio + 1 / ratio)).mean())
    record["agreement"] = float(m.sum() / m.trace())
    if whole or len(there) <= LARGE:
        smallest, largest = np.linalg.eigvalsh(cosines)[[0, -1]]
        record["condition"] = float(largest / smallest) if smallest > 1e-15 * largest else None
        full = np.full(gramian.shape, np.nan)
        full[np.ix_(some, some)] = cosines
        record["cosines"] = [_numbers(row) for row in full]
    return record


MEASURES = (
    "conflicts",
    "strong_conflicts",
    "mean_cosine",
    "min_cosine",
    "magnitude_similarity",
    "agreement",
    "condition",
)


def _numbers(values: Any) -> list[float | None] | None:
    """What JSON can hold: None for what is not finite."""
    return None if values is None else [x if math.isfinite(x) else None for x in values.tolist()]


def _writers(writers: Any) -> list[Writer]:
    if writers is None:
        return []
    if isinstance(writers, Sequence) and not isinstance(writers, str):
        return [_writer(each) for each in writers]
    return [_writer(writers)]


def _writer(writer: Any) -> Writer:
    if isinstance(writer, str | Path):
        kinds: Mapping[str, type[_File]] = {".jsonl": JSONLines, ".csv": CSV}
        kind = kinds.get(Path(writer).suffix)
        if kind is None:
            raise ValueError(f"writers: expected a path that ends in .jsonl or .csv, found {str(writer)!r}")
        return kind(Path(writer))
    if callable(getattr(writer, "add_scalar", None)):
        return TensorBoard(writer)
    if callable(writer):
        return writer
    raise TypeError(f"writers: expected a path, a SummaryWriter or a callable, found {writer!r}")


class _File:
    """A file that records are appended to, complete after each."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", newline="", encoding="utf-8")
        self.names: tuple[str, ...] = ()

    def begin(self, names: tuple[str, ...], method: str) -> None:
        """Before the first record."""
        self.names = names

    def close(self) -> None:
        """No more records."""
        self._file.close()

    def __call__(self, record: Record) -> None:
        """Append a record."""
        raise NotImplementedError


class JSONLines(_File):
    """A line per record, after a line with the tasks' names; `diagnosis.read` reads it."""

    def begin(self, names: tuple[str, ...], method: str) -> None:
        """Before the first record."""
        super().begin(names, method)
        self._line({"tasks": list(names), "method": method})

    def __call__(self, record: Record) -> None:
        """Append a record."""
        self._line(record)

    def _line(self, data: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(data) + "\n")
        self._file.flush()


class CSV(_File):
    """A row per record; columns ``weights/<task>``, ``norms/<task>``, ``losses/<task>``; no matrices."""

    def begin(self, names: tuple[str, ...], method: str) -> None:
        """Before the first record."""
        super().begin(names, method)
        per_task = [f"{what}/{name}" for what in diagnosis.PER_TASK for name in names]
        self._rows = csv.writer(self._file)
        self._rows.writerow(["step", *MEASURES, *per_task])

    def __call__(self, record: Record) -> None:
        """Append a record."""
        nothing = [None] * len(self.names)
        per_task = [x for what in diagnosis.PER_TASK for x in record[what] or nothing]
        self._rows.writerow([record["step"], *(record[name] for name in MEASURES), *per_task])
        self._file.flush()


class TensorBoard:
    """Scalars under ``fastmtl/``, per task where there are at most `LARGE`."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def __call__(self, record: Record) -> None:
        """Hand a record on."""
        step = record["step"]
        for name in MEASURES:
            if record[name] is not None:
                self._writer.add_scalar(f"fastmtl/{name}", record[name], step)
        for what in diagnosis.PER_TASK:
            values = record[what] or []
            for t, value in enumerate(values if len(values) <= LARGE else []):
                if value is not None:
                    self._writer.add_scalar(f"fastmtl/{what}/{t}", value, step)
