"""What every gradient method promises in evaluation mode."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

import fastmtl
from fastmtl import (
    CRMOGM,
    EPO,
    IMTLG,
    MGDA,
    PCD,
    PELTR,
    AlignedMTL,
    CAGrad,
    ConFIG,
    Constant,
    DualProj,
    FairGrad,
    GradientMethod,
    GradNorm,
    GradVac,
    Krum,
    Mean,
    MoDo,
    NashMTL,
    PCGrad,
    RandomGradWeights,
    SDMGrad,
    Sum,
    UPGrad,
)
from tests.asserts import assert_untouched

T = 6
METHODS: dict[str, Callable[[], GradientMethod]] = {
    "AlignedMTL": AlignedMTL,
    "ConFIG": ConFIG,
    "IMTLG": IMTLG,
    "PCD": PCD,
    "CRMOGM": lambda: CRMOGM(MGDA()),
    "MGDA": lambda: MGDA("frank_wolfe", normalization="loss+"),
    "PELTR": lambda: PELTR(0.1),
    "UPGrad": lambda: UPGrad([1, 2, 0, 4, 5, 6]),
    "DualProj": DualProj,
    "PCGrad": PCGrad,
    "PCGrad, shared": lambda: PCGrad(order="shared", rescale="sum_to_one"),
    "CAGrad": CAGrad,
    "FairGrad": lambda: FairGrad(2.0),
    "NashMTL": NashMTL,
    "GradVac": lambda: GradVac(beta=0.3),
    "Sum": Sum,
    "Mean": Mean,
    "Constant": lambda: Constant([1, 2, 3, 4, 5, 6]),
    "RandomGradWeights": RandomGradWeights,
    "EPO": EPO,
    "Krum": lambda: Krum(1, 2),
    "SDMGrad": lambda: SDMGrad(2, lr=0.01, num_steps=2),
    "MoDo": lambda: MoDo(2, gamma=0.001),
    "GradNorm": GradNorm,
    "GradNorm, adam": lambda: GradNorm(optimizer="adam"),
    "GradNorm, epochs": lambda: GradNorm(renormalize="epoch", steps_per_epoch=2),
}


@pytest.mark.parametrize("num_steps", [0, 3])  # validation before the first step of training, too
@pytest.mark.parametrize("name", METHODS)
def test_evaluation_moves_nothing(name: str, num_steps: int) -> None:
    """The weights are those of the step that would be next."""
    method, losses = METHODS[name](), torch.rand(T) + 0.1
    for _ in range(num_steps):
        fastmtl.aggregate(torch.randn(T, 6), method, losses=losses * torch.rand(T))
    jacobian = torch.randn(T, 6, dtype=torch.float64)
    expected = fastmtl.aggregate(jacobian, copy.deepcopy(method), losses=losses).weights
    torch.nn.ModuleList([method]).eval()
    with assert_untouched(method):
        for _ in range(3):
            assert torch.equal(fastmtl.aggregate(jacobian, method, losses=losses).weights, expected)
        assert torch.equal(method(fastmtl.ops.gram(jacobian)[0], losses=losses), expected)
        x = torch.ones(6, dtype=torch.float64, requires_grad=True)
        fastmtl.backward(jacobian @ x, method, [x])
    before = {key: x.clone() for key, x in method.train().state_dict().items()}
    assert torch.equal(fastmtl.aggregate(jacobian, method, losses=losses).weights, expected)
    moved = [key for key, x in method.state_dict().items() if not torch.equal(x, before[key])]
    assert bool(moved) == bool(before)  # all but methods without state
