"""Loss weightings, one file each."""

from fastmtl.weighting.base import LossWeighting, WeightedSum
from fastmtl.weighting.constant_weighting import ConstantWeighting
from fastmtl.weighting.cosmos import COSMOS
from fastmtl.weighting.dwa import DWA
from fastmtl.weighting.equal_weighting import EqualWeighting
from fastmtl.weighting.famo import FAMO
from fastmtl.weighting.geometric_mean import GeometricMean
from fastmtl.weighting.htw import HTW
from fastmtl.weighting.imtll import IMTLL
from fastmtl.weighting.lbtw import LBTW
from fastmtl.weighting.learned import LearnedWeighting
from fastmtl.weighting.log_loss import LogLoss
from fastmtl.weighting.pbi import PBI
from fastmtl.weighting.relobralo import ReLoBRaLo
from fastmtl.weighting.rlw import RLW
from fastmtl.weighting.scalarization import Scalarization
from fastmtl.weighting.softadapt import SoftAdapt
from fastmtl.weighting.stch import STCH
from fastmtl.weighting.uncertainty_weighting import UncertaintyWeighting

__all__ = [
    "COSMOS",
    "DWA",
    "FAMO",
    "HTW",
    "IMTLL",
    "LBTW",
    "PBI",
    "RLW",
    "STCH",
    "ConstantWeighting",
    "EqualWeighting",
    "GeometricMean",
    "LearnedWeighting",
    "LogLoss",
    "LossWeighting",
    "ReLoBRaLo",
    "Scalarization",
    "SoftAdapt",
    "UncertaintyWeighting",
    "WeightedSum",
]
