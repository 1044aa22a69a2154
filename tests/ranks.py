"""Processes that run a function as the ranks of ``torch.distributed``, on gloo. They are started once."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 60  # seconds for one function


def _serve(rank: int, pipe: Connection) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    while True:
        try:
            function, size, store = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            limit = timedelta(seconds=TIMEOUT / 2)
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=limit)
            found = function()
            dist.barrier()
            dist.destroy_process_group()
            pipe.send_bytes(pickle.dumps((True, found)))  # not send: it would share the tensors' memory
        except BaseException:
            pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
            return


class Ranks:
    """Up to so many processes, new ones after a failure."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size = size
        self._folder = folder
        self._runs = 0
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, size: int, function: Callable, *args: Any, **kwargs: Any) -> list[Any]:
        """What the function returns on each rank, of a fresh process group of this size.

        Raises:
            AssertionError: It raised somewhere, or hangs; with the ranks' tracebacks.
        """
        if not self._processes:
            self._start()
        self._runs += 1
        pipes = self._pipes[:size]
        for pipe in pipes:
            pipe.send_bytes(pickle.dumps((partial(function, *args, **kwargs), size, self._folder / str(self._runs))))
        found: dict[int, tuple[bool, Any]] = {}
        left = list(pipes)
        while left and (ready := wait(left, TIMEOUT if not found or all(ok for ok, _ in found.values()) else 5)):
            for pipe in ready:
                rank = pipes.index(pipe)
                try:
                    found[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    found[rank] = False, "died"
                left.remove(pipe)
        if len(found) == size and all(ok for ok, _ in found.values()):
            return [found[rank][1] for rank in range(size)]
        self.stop()
        texts = [
            f"rank {r}: {found[r][1] if r in found else 'hangs'}" for r in range(size) if not found.get(r, (0,))[0]
        ]
        raise AssertionError("\n".join(texts))

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def stop(self) -> None:
        """End them."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], []


@contextmanager
def processes(size: int) -> Iterator[Ranks]:
    """They end with the block."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = Ranks(size, Path(folder))
        try:
            yield ranks
        finally:
            ranks.stop()
