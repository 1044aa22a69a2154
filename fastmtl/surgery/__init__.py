"""Gradient methods, one file each."""

from fastmtl.surgery.amortized import Amortized
from fastmtl.surgery.base import GradientMethod, Step
from fastmtl.surgery.constant import Constant, Mean, Sum
from fastmtl.surgery.gradnorm import GradNorm
from fastmtl.surgery.gradvac import GradVac
from fastmtl.surgery.krum import Krum
from fastmtl.surgery.mgda import MGDA
from fastmtl.surgery.pcgrad import PCGrad
from fastmtl.surgery.peltr import PELTR
from fastmtl.surgery.random_grad_weights import RandomGradWeights

__all__ = [
    "MGDA",
    "PELTR",
    "Amortized",
    "Constant",
    "GradNorm",
    "GradVac",
    "GradientMethod",
    "Krum",
    "Mean",
    "PCGrad",
    "RandomGradWeights",
    "Step",
    "Sum",
]
