"""Who looks on while a method weighs tasks: the ways in tell, `fastmtl.Monitor` listens."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastmtl.losses import Losses


@dataclass(frozen=True)
class Seen:
    """One step of training, as its tensors lie on the device.

    Attributes:
        names: The tasks'.
        weights: ``[K, T]`` float64.
        gramian: ``[K, T, T]`` float64, of the raw losses' gradients; None where none was taken.
        mask: bool ``[K, T]``: which task reaches which group; None: all.
        losses: None where the way in has none.
    """

    names: Sequence[str]
    weights: Tensor
    gramian: Tensor | None = None
    mask: Tensor | None = None
    losses: Losses | None = None


class Watcher(Protocol):
    """What is told of each step."""

    def __call__(self, seen: Seen) -> None:
        """A step was taken."""


# Not attributes of the methods: copies and checkpoints of a method take no watcher along.
_watchers: weakref.WeakKeyDictionary[Any, list[Watcher]] = weakref.WeakKeyDictionary()


def watch(method: Any, watcher: Watcher) -> None:
    """Tell the watcher of each training step of the method from now on."""
    _watchers.setdefault(method, []).append(watcher)


def unwatch(method: Any, watcher: Watcher) -> None:
    """Tell it no more."""
    if watcher in _watchers.get(method, []):
        _watchers[method].remove(watcher)


def is_watched(method: Any) -> bool:
    """Whether anybody watches."""
    return bool(_watchers and _watchers.get(method))


def tell(method: Any, names: Sequence[str], weights: Tensor | None, **seen: Any) -> None:
    """A step of training; see `Seen`. Costs a look into a dictionary where nobody watches."""
    if torch.compiler.is_compiling() or weights is None or not _watchers or not method.training:
        return
    for watcher in _watchers.get(method, ()):
        watcher(Seen(names, weights.detach(), **seen))
