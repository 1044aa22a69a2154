"""Gradient methods, one file each."""

from fastmtl.surgery.amortized import Amortized
from fastmtl.surgery.base import GradientMethod, Step
from fastmtl.surgery.gradnorm import GradNorm
from fastmtl.surgery.gradvac import GradVac
from fastmtl.surgery.mgda import MGDA
from fastmtl.surgery.pcgrad import PCGrad
from fastmtl.surgery.peltr import PELTR

__all__ = ["MGDA", "PELTR", "Amortized", "GradNorm", "GradVac", "GradientMethod", "PCGrad", "Step"]
