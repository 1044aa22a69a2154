"""``python -m fastmtl demo``: many tasks, one trunk, every method, one table."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from .dataset import Dataset

__all__ = ["main"]


class UsageError(ValueError):
    """A wrong option."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, printed by ``main``."""

    def error(self, message: str) -> NoReturn:
        """Raises UsageError."""
        raise UsageError(message)


def positive(text: str) -> int:
    """Converts a command-line value to a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def seed(text: str) -> int:
    """Converts a command-line value to a seed."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0..{2**32 - 1}")
    return int(text)


def parse(argv: Sequence[str], methods: Sequence[str]) -> argparse.Namespace:
    """Returns the options. Raises UsageError with one line for a wrong one."""

    def chosen(text: str) -> tuple[str, ...]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        for name in names:
            if name not in methods:
                raise argparse.ArgumentTypeError(f"unknown method {name!r}; known: {', '.join(methods)}")
        return tuple(name for name in methods if name in names or name == "sum")

    parser = Parser(prog="python -m fastmtl demo", description="Trains one net for many tasks by every method.")
    parser.add_argument(
        "--methods",
        type=chosen,
        default=tuple(methods),
        metavar="A,B",
        help=f"methods to compare with summed loss, out of {', '.join(methods)} (default: all)",
    )
    parser.add_argument(
        "--data",
        default="reviews",
        metavar="NAME",
        help="reviews (25 tasks), groceries (150 tasks), or a file in the format of reviews.npz (%(default)s)",
    )
    parser.add_argument("--steps", type=positive, help="training steps of each method (reviews 420, groceries 400)")
    parser.add_argument("--seed", type=seed, default=0, help="of the split, the nets and the batches (%(default)s)")
    parser.add_argument(
        "--threads",
        type=positive,
        default=1,
        help="threads of PyTorch (%(default)s: the net is small, and a busy machine disturbs one thread least)",
    )
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for the plots (./%(default)s)")
    parser.add_argument("--quick", action="store_true", help="16 steps only: shows the course, no results")
    return parser.parse_args(argv)


def load(name: str, seed: int) -> Dataset:
    """Returns a data set by its name or file. Raises DataError with one line."""
    from . import groceries, reviews

    if name == "groceries":
        return groceries.make_dataset(groceries.load())
    return reviews.make_dataset(reviews.load(reviews.REVIEWS if name == "reviews" else Path(name)), seed)


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], object]]:
    """Shows a progress bar where tqdm is installed. Yields what advances it by a number of steps."""
    try:
        from tqdm import tqdm
    except ImportError:
        print("no progress bar: tqdm is not installed (pip install tqdm)")
        yield lambda steps: None
        return
    with tqdm(total=total, unit="step", desc="training", disable=None) as bar:  # None: silent in a log
        yield bar.update


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo.

    Args:
        argv: the options after ``demo``; ``sys.argv[1:]`` if None.

    Returns:
        The exit status: 0, or 2 after one line on stderr for a wrong option, unreadable data or output folder.
    """
    import torch

    from . import train
    from .dataset import DataError
    from .methods import METHODS, Settings
    from .report import notes, table

    try:
        options = parse(sys.argv[1:] if argv is None else argv, list(METHODS))
        options.out.mkdir(parents=True, exist_ok=True)
        if not os.access(options.out, os.W_OK):
            raise UsageError(f"cannot write to {options.out}")
        data = load(options.data, options.seed)
    except (UsageError, DataError) as error:
        print(f"fastmtl demo: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"fastmtl demo: cannot write to {options.out}: {error.strerror}", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)

    timed_turns = max(1, 200 // len(data.tasks))  # the loop over pairs is slow where tasks are many
    settings = Settings(options.methods, options.steps or data.steps, options.seed, lr=data.lr, timed_turns=timed_turns)
    if options.quick:
        settings = Settings(options.methods, 16, options.seed, probes=1, timed_turns=1, single_epochs=1)
    print(
        f"{len(data.train.labels):,} {data.title} to train on, {len(data.validation.labels):,} to choose the "
        f"single-task nets' epochs, {len(data.held_out.labels):,} held out; {len(data.tasks)} tasks; "
        f"{settings.steps} steps of {settings.batch} {data.unit} by each method, "
        f"{options.threads} thread{'s' if options.threads > 1 else ''}"
    )
    with progress(train.total_steps(data, settings)) as advance:
        outcome = train.run(data, settings, advance)
    print(f"\n{table(outcome, data)}\n\n{notes(outcome, data, judge=not options.quick)}")
    try:
        from .plots import save_all
    except ImportError as error:
        print(f"no plots: matplotlib is not installed (pip install matplotlib; {error})")
    else:
        print("plots: " + ", ".join(str(path) for path in save_all(outcome, data, options.out)))
    return 0
