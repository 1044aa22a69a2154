"""The methods of other libraries beside ours, as docs/methods.md has them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import fastmtl

# Public names of TorchJD 0.18 (torchjd.aggregation, torchjd.scalarization) and LibMTL 1.1.5 (LibMTL.weighting).
TORCHJD = [
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "Constant",
    "CRMOGMWeighting",
    "DualProj",
    "ExcessMTL",
    "FairGrad",
    "GradDrop",
    "GradVac",
    "IMTLG",
    "Krum",
    "Mean",
    "MGDA",
    "MoDoWeighting",
    "NashMTL",
    "PCD",
    "PCGrad",
    "Random",
    "SDMGradWeighting",
    "Sum",
    "TrimmedMean",
    "UPGrad",
    "scalarization.Constant",
    "scalarization.COSMOS",
    "scalarization.DWA",
    "scalarization.FAMO",
    "scalarization.GeometricMean",
    "scalarization.IMTLL",
    "scalarization.Mean",
    "scalarization.PBI",
    "scalarization.Random",
    "scalarization.STCH",
    "scalarization.Sum",
    "scalarization.UW",
]
LIBMTL = [
    "EW",
    "GradNorm",
    "MGDA",
    "UW",
    "DWA",
    "GLS",
    "GradDrop",
    "PCGrad",
    "GradVac",
    "IMTL",
    "CAGrad",
    "Nash_MTL",
    "RLW",
    "MoCo",
    "Aligned_MTL",
    "DB_MTL",
    "STCH",
    "ExcessMTL",
    "FairGrad",
    "FAMO",
    "MoDo",
    "SDMGrad",
    "UPGrad",
]


def table() -> list[list[str]]:
    """Rows of the docs' table: names of fastmtl, TorchJD, LibMTL, without backticks."""
    text = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
    lines = text[text.index("| fastmtl | TorchJD") :].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([re.sub(r"[`()]", "", cell).strip() for cell in line.strip("|").split("|")])
    return rows


@pytest.mark.parametrize(("column", "names"), [(1, TORCHJD), (2, LIBMTL)], ids=["TorchJD", "LibMTL"])
def test_none_is_missing(column: int, names: list[str]) -> None:
    found = [name.strip() for row in table() for name in row[column].split(",")]
    assert sorted(x for x in found if x not in ("–", "")) == sorted(names)


def test_ours_exist() -> None:
    for ours, *_ in table():
        for name in ours.split(","):
            assert hasattr(fastmtl, name.strip().split()[0]), name


@pytest.mark.skipif(importlib.util.find_spec("torchjd") is None, reason="TorchJD is not installed")
def test_the_list_of_torchjd_is_whole() -> None:
    """Where it is installed: its weightings are those of its aggregators, but for those that have none."""
    aggregation = importlib.import_module("torchjd.aggregation").__all__
    bases = {"Aggregator", "GramianWeightedAggregator", "WeightedAggregator", "Weighting"}
    names = {x for x in aggregation if x not in bases and x.removesuffix("Weighting") not in {*aggregation} - {x}}
    scalarization = {*importlib.import_module("torchjd.scalarization").__all__} - {"Scalarizer"}
    assert names | {f"scalarization.{x}" for x in scalarization} == {*TORCHJD}
