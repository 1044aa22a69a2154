"""Gradient methods, one file each."""

from fastmtl.surgery.aligned_mtl import AlignedMTL
from fastmtl.surgery.amortized import Amortized
from fastmtl.surgery.base import GradientMethod, Step
from fastmtl.surgery.cagrad import CAGrad
from fastmtl.surgery.config import ConFIG
from fastmtl.surgery.constant import Constant, Mean, Sum
from fastmtl.surgery.cr_mogm import CRMOGM
from fastmtl.surgery.dbmtl import DBMTL
from fastmtl.surgery.dualproj import DualProj
from fastmtl.surgery.epo import EPO
from fastmtl.surgery.excessmtl import ExcessMTL
from fastmtl.surgery.fairgrad import FairGrad
from fastmtl.surgery.grad_drop import GradDrop
from fastmtl.surgery.gradnorm import GradNorm
from fastmtl.surgery.gradvac import GradVac
from fastmtl.surgery.imtl_g import IMTLG
from fastmtl.surgery.krum import Krum
from fastmtl.surgery.m_config import MConFIG
from fastmtl.surgery.mgda import MGDA
from fastmtl.surgery.moco import MoCo
from fastmtl.surgery.modo import MoDo
from fastmtl.surgery.nash_mtl import NashMTL
from fastmtl.surgery.pcd import PCD
from fastmtl.surgery.pcgrad import PCGrad
from fastmtl.surgery.peltr import PELTR
from fastmtl.surgery.random_grad_weights import RandomGradWeights
from fastmtl.surgery.row_method import RowMethod
from fastmtl.surgery.sdmgrad import SDMGrad
from fastmtl.surgery.trimmed_mean import TrimmedMean
from fastmtl.surgery.upgrad import UPGrad

__all__ = [
    "CRMOGM",
    "DBMTL",
    "EPO",
    "IMTLG",
    "MGDA",
    "PCD",
    "PELTR",
    "AlignedMTL",
    "Amortized",
    "CAGrad",
    "ConFIG",
    "Constant",
    "DualProj",
    "ExcessMTL",
    "FairGrad",
    "GradDrop",
    "GradNorm",
    "GradVac",
    "GradientMethod",
    "Krum",
    "MConFIG",
    "Mean",
    "MoCo",
    "MoDo",
    "NashMTL",
    "PCGrad",
    "RandomGradWeights",
    "RowMethod",
    "SDMGrad",
    "Step",
    "Sum",
    "TrimmedMean",
    "UPGrad",
]
