"""fastmtl: train one PyTorch model on many tasks.

A gradient method is rows -> Gramian -> weights -> combine. The ways in: `backward` (parameter level),
`FeatureSurgery` (feature level), `TaskGradients` (one batch per task), `aggregate` (gradients at hand).
"""

from importlib import metadata as _metadata

from fastmtl import distributed, ops, reference, solvers
from fastmtl.aggregate import aggregate
from fastmtl.backward import backward
from fastmtl.labels import labelled_losses
from fastmtl.layer import FeatureSurgery
from fastmtl.methods import from_name
from fastmtl.monitor import Monitor
from fastmtl.result import Result
from fastmtl.surgery import (
    CRMOGM,
    DBMTL,
    EPO,
    IMTLG,
    MGDA,
    PCD,
    PELTR,
    AlignedMTL,
    Amortized,
    CAGrad,
    ConFIG,
    Constant,
    DualProj,
    ExcessMTL,
    FairGrad,
    GradDrop,
    GradientMethod,
    GradNorm,
    GradVac,
    Krum,
    MConFIG,
    Mean,
    MoCo,
    MoDo,
    NashMTL,
    PCGrad,
    RandomGradWeights,
    RowMethod,
    SDMGrad,
    Step,
    Sum,
    TrimmedMean,
    UPGrad,
)
from fastmtl.task_gradients import TaskGradients
from fastmtl.weighting import (
    COSMOS,
    DWA,
    FAMO,
    HTW,
    IMTLL,
    LBTW,
    PBI,
    RLW,
    STCH,
    ConstantWeighting,
    EqualWeighting,
    GeometricMean,
    LogLoss,
    LossWeighting,
    ReLoBRaLo,
    SoftAdapt,
    UncertaintyWeighting,
)

try:
    __version__ = _metadata.version("fastmtl")
except _metadata.PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "unknown"

__all__ = [
    "COSMOS",
    "CRMOGM",
    "DBMTL",
    "DWA",
    "EPO",
    "FAMO",
    "HTW",
    "IMTLG",
    "IMTLL",
    "LBTW",
    "MGDA",
    "PBI",
    "PCD",
    "PELTR",
    "RLW",
    "STCH",
    "AlignedMTL",
    "Amortized",
    "CAGrad",
    "ConFIG",
    "Constant",
    "ConstantWeighting",
    "DualProj",
    "EqualWeighting",
    "ExcessMTL",
    "FairGrad",
    "FeatureSurgery",
    "GeometricMean",
    "GradDrop",
    "GradNorm",
    "GradVac",
    "GradientMethod",
    "Krum",
    "LogLoss",
    "LossWeighting",
    "MConFIG",
    "Mean",
    "MoCo",
    "MoDo",
    "Monitor",
    "NashMTL",
    "PCGrad",
    "RandomGradWeights",
    "ReLoBRaLo",
    "Result",
    "RowMethod",
    "SDMGrad",
    "SoftAdapt",
    "Step",
    "Sum",
    "TaskGradients",
    "TrimmedMean",
    "UPGrad",
    "UncertaintyWeighting",
    "aggregate",
    "backward",
    "distributed",
    "from_name",
    "labelled_losses",
    "ops",
    "reference",
    "solvers",
]
