"""Loss weightings, one file each."""

from fastmtl.weighting.base import LossWeighting, WeightedSum
from fastmtl.weighting.dwa import DWA
from fastmtl.weighting.htw import HTW
from fastmtl.weighting.lbtw import LBTW
from fastmtl.weighting.uncertainty_weighting import UncertaintyWeighting

__all__ = ["DWA", "HTW", "LBTW", "LossWeighting", "UncertaintyWeighting", "WeightedSum"]
