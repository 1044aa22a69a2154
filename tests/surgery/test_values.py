"""Pinned values: one file of numbers known from the papers' formulas and from exact solvers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastmtl
from fastmtl import (
    EPO,
    IMTLG,
    MGDA,
    PELTR,
    AlignedMTL,
    CAGrad,
    ConFIG,
    Constant,
    DualProj,
    FairGrad,
    GradNorm,
    GradVac,
    Krum,
    Mean,
    MoDo,
    NashMTL,
    PCGrad,
    SDMGrad,
    Sum,
    UPGrad,
)

JACOBIAN = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], dtype=torch.float64)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("method", "weights", "direction"),
    [
        (MGDA(), (0.6, 0.4), (0, 1, 1)),
        (MGDA("frank_wolfe"), (0.6, 0.4), (0, 1, 1)),
        (PELTR((0.7, 0.2)), (0.7, 0.3), (-1, 1, 1)),
        (PELTR((0.7, 0.2), "relaxed"), (0.7, 0.3), (-1, 1, 1)),
        (NashMTL(rescale="sum_to_one"), (0.5923, 0.4077), (0.0767, 1, 1)),  # of norm 1: (.0542, .7061, .7061)
        (CAGrad(0.5), (0.7041, 0.5), (0.1835, 1.2041, 1.2041)),
        (FairGrad(1.0), (0.5915, 0.4071), (0.0766, 0.9985, 0.9985)),
        (PCGrad(), (2.2222, 1.5789), (0.5848, 3.8012, 3.8012)),
        (GradVac(), (2.2222, 1.5789), (0.5848, 3.8012, 3.8012)),
        (UPGrad(), (1.1111, 0.7895), (0.2924, 1.9006, 1.9006)),
        (DualProj(), (0.6111, 0.5), (0.5556, 1.1111, 1.1111)),
        (PCGrad(reduction="mean"), (1.1111, 0.7895), (0.2924, 1.9006, 1.9006)),
        (Sum(), (1, 1), (2, 2, 2)),
        (Mean(), (0.5, 0.5), (1, 1, 1)),
        (Constant([3, 2]), (3, 2), (0, 5, 5)),
        (AlignedMTL(), (0.5591, 0.4083), (0.2133, 0.9673, 0.9673)),
        (ConFIG(), (1.2265, 0.8441), (0.1588, 2.0706, 2.0706)),
        (IMTLG(), (0.5923, 0.4077), (0.0767, 1.0, 1.0)),
        (fastmtl.PCD(), (1.8481, 1.0954), (-0.8200, 2.9434, 2.9434)),
        (PCGrad(rescale="sum_to_one"), (0.5846, 0.4154), (0.1538, 1.0, 1.0)),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, torch.nn.Module) else "",
)
def test_two_tasks(method: fastmtl.GradientMethod, weights: tuple, direction: tuple) -> None:
    out = fastmtl.aggregate(JACOBIAN, method)
    torch.testing.assert_close(out.weights, tensor(*weights), rtol=0, atol=5e-5)
    torch.testing.assert_close(out.grads, tensor(*direction), rtol=0, atol=1e-4)


def test_two_tasks_exactly() -> None:
    """PCGrad of two conflicting tasks: w_1 = 1 - g_1.g_2 / |g_1|^2."""
    weights = fastmtl.aggregate(JACOBIAN, PCGrad()).weights
    torch.testing.assert_close(weights, tensor(1 + 22 / 18, 1 + 22 / 38), rtol=1e-14, atol=0)


@pytest.mark.parametrize(("include_self", "direction"), [(False, (-0.558013, 0.216506)), (True, (-0.433013, 0.216506))])
def test_pcgrad_of_three_tasks_in_a_given_order(include_self: bool, direction: tuple) -> None:
    angles = tensor(0, 150, 210) * math.pi / 180
    jacobian = torch.stack([angles.cos(), angles.sin()], 1)
    order = torch.tensor([[1, 2, 0], [0, 2, 1], [0, 1, 2]])
    out = fastmtl.aggregate(jacobian, PCGrad(order=order, include_self=include_self))
    torch.testing.assert_close(out.grads, tensor(*direction), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", [MGDA(), MGDA("frank_wolfe", max_iter=10000, tol=0), PELTR(0.05)])
def test_min_norm_of_orthogonal_tasks(method: fastmtl.GradientMethod) -> None:
    out = fastmtl.aggregate(torch.diag(tensor(1, 2, 3)), method)
    torch.testing.assert_close(out.weights, tensor(0.734694, 0.183673, 0.081633), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("normalization", "apply_to", "weights"),
    [
        ("l2", "raw", (0.5, 0.5)),
        ("l2", "normalized", (0.5, 0.25)),
        ("loss", "raw", (16 / 17, 1 / 17)),  # lengths (2, 8)
        ("loss", "normalized", (32 / 17, 4 / 17)),
        ("loss+", "raw", (0.8, 0.2)),  # lengths (2, 4)
        ("loss+", "normalized", (1.6, 0.4)),
    ],
)
def test_mgda_normalized(normalization: str, apply_to: str, weights: tuple) -> None:
    """Gradients of length (1, 2) at right angles, losses (0.5, 0.25)."""
    method = MGDA(normalization=normalization, apply_to=apply_to)
    found = method(torch.diag(tensor(1, 4)), losses=tensor(0.5, 0.25))
    torch.testing.assert_close(found, tensor(*weights))


@pytest.mark.parametrize(
    ("method", "weights"),
    [
        (Krum(1), (0, 1, 0, 0, 0)),  # scores 1.25, 0.5, 1.25, 21.25, 117
        (Krum(1, 2), (0.5, 0.5, 0, 0, 0)),
        (Krum(0), (0, 0, 1, 0, 0)),  # scores 17.25, 12.75, 10.25, 37.25, 207.25 over three others
        (Krum(1, distance="euclidean"), (0, 1, 0, 0, 0)),
    ],
)
def test_krum_on_a_line(method: fastmtl.GradientMethod, weights: tuple) -> None:
    """Gradients 0, 0.5, 1, 4, 10 along one direction."""
    line = tensor(0, 0.5, 1, 4, 10)
    assert method(torch.outer(line, line)).tolist() == list(weights)


@pytest.mark.parametrize(
    ("method", "losses", "weights"),
    [
        (EPO(), (1, 1), (1 / 3, 2 / 3)),  # descent: w_1 - w_2 / 2 >= 0 holds as an equality
        (EPO([1, 3]), (1, 1), (0, 1)),  # Ma = (-1.24, 2.06)
        (EPO([1, 3]), (3, 1), (1 / 3, 2 / 3)),
        (EPO([3, 1]), (1, 1), (1, 0)),
    ],
)
def test_epo(method: fastmtl.GradientMethod, losses: tuple, weights: tuple) -> None:
    found = method(torch.tensor([[1.0, -0.5], [-0.5, 2.0]]), losses=tensor(*losses))
    torch.testing.assert_close(found, tensor(*weights))


@pytest.mark.parametrize(
    ("method", "weights"),
    [
        (MoDo(2, rho=0), (0.475, 0.525)),  # 0.5 - 0.1 * (3, 2) / 2 = (0.35, 0.4), projected
        (MoDo(2, gamma=1, rho=1), (0.25, 0.75)),  # 0.5 - (3, 2) / 2 - 0.5 = (-1.5, -1)
        (SDMGrad(2, lam=0.5, num_steps=200), (0.6, 0.9)),  # 3 (w_1 + 1/4) = 2 (w_2 + 1/4)
        (SDMGrad(2, lam=0, num_steps=200), (0.4, 0.6)),
        (SDMGrad(2, lam=0.5, num_steps=200, preference=[1, 3]), (0.6, 0.9)),
        (SDMGrad(2, lam=1, num_steps=1, lr=0.1, scale_free=False), (0.95, 1.05)),  # 0.5 - 0.1 * (3, 2), plus 0.5
    ],
)
def test_several_batches(method: fastmtl.GradientMethod, weights: tuple) -> None:
    """Gradients (1, 0), (0, 2) on the first batch, (3, 0), (0, 1) on the second."""
    jacobian = tensor(1, 0, 0, 2, 3, 0, 0, 1, 7, 8, 9, 10).view(6, 2)
    found = fastmtl.aggregate(jacobian, method).weights
    torch.testing.assert_close(found, tensor(0, 0, 0, 0, *weights), rtol=0, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_gradnorm_after_one_step(scale: float) -> None:
    """|g| = (1, 2, 4), L/L0 = (.9, .5, .8); the step uses the weights from before."""
    method = GradNorm(alpha=1.5, lr=0.025)
    gramian = torch.diag(tensor(1, 4, 16))
    first = method(gramian, losses=tensor(1, 1, 1) * scale)
    torch.testing.assert_close(first, tensor(1, 1, 1))
    method.weights.fill_(1.0)
    used = method(gramian, losses=tensor(0.9, 0.5, 0.8) * scale)
    torch.testing.assert_close(used, tensor(1, 1, 1))
    torch.testing.assert_close(method.weights, tensor(1.069565, 0.991304, 0.939130), rtol=0, atol=1e-6)
