"""Loss weightings, one file each."""

from fastmtl.weighting.base import LossWeighting, WeightedSum
from fastmtl.weighting.uncertainty_weighting import UncertaintyWeighting

__all__ = ["LossWeighting", "UncertaintyWeighting", "WeightedSum"]
