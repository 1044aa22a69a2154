"""Mixed precision: autocast, loss scales, overflow and recovery, for every method through every way in."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmtl
from fastmtl import GradientMethod, LossWeighting
from fastmtl.surgery.gramian_free import GramianFree
from tests.asserts import assert_same_state
from tests.test_ways_in import METHODS, OPTIONS, T

FIRST, FITS, HUGE = 2.0**16, 2.0**10, 2.0**60  # what a GradScaler starts with; no overflow; overflow of every gradient
EPOCHS = {"steps_per_epoch": 2}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in METHODS},
    "DWA, epochs": ("DWA", {"window": None, **EPOCHS}),
    "LBTW, epochs": ("LBTW", {"reset_each_epoch": True, **EPOCHS}),
    "GradNorm, Adam": ("GradNorm", {"optimizer": "adam"}),
    "GradNorm, epochs": ("GradNorm", {"renormalize": "epoch", **EPOCHS}),
    "Amortized": ("Amortized", {"update_every": 2}),
}

# How far training in 16 bits may stray, of the way from the start; else 0.05. Held weights make GradVac's jumps, at a
# cosine of 0, last longer; PBI has a kink; LogLoss weighs by 1 / L, so its steps overshoot where a loss comes near 0.
# So do those of NashMTL and FairGrad, by 1 / |g|.
NEAR = {"Amortized": 0.1, "PBI": 0.1, "LogLoss": 0.4, "NashMTL": 0.1, "FairGrad": 0.1}


def make(variant: str, way: str) -> GradientMethod | LossWeighting:
    name, options = VARIANTS[variant]
    options = {**OPTIONS.get(name, {}), **options}
    if way == "layer" and name in ("GradNorm", "PELTR"):
        options["scale_heads"] = False
    torch.manual_seed(5)  # of PCGrad and GradVac
    if name == "Amortized":
        options["method"] = fastmtl.GradVac()
    return getattr(fastmtl, name)(**options)


class Run:
    """Training of a net with both kinds of normalization; one optimizer, also for learned loss weights.

    Args:
        variant: The method.
        way: "backward", "chunks" (``chunk_size=``), "last layer" (``gramian_params=``), "task gradients", "layer", or
            "scalar" (a weighting alone).
        autocast: Its dtype, or None.
        scale: The first loss scale, or None for no scaler.
    """

    def __init__(self, variant: str, way: str, autocast: torch.dtype | None = None, scale: float | None = FITS) -> None:
        torch.manual_seed(0)
        self.trunk = nn.Sequential(
            nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6)
        )
        self.heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(T))
        self.method, self.way, self.autocast = make(variant, way), way, autocast
        self.scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        if self.scaler is not None:
            self.scaler.scale(torch.zeros(()))  # makes the scale, which may then be set
        self.layer = fastmtl.FeatureSurgery(self.method, T, scaler=self.scaler) if way == "layer" else None
        self.optimizer = torch.optim.SGD([*self.parameters(), *self.method.parameters()], lr=0.02)

    def parameters(self) -> list[Tensor]:
        return [*self.trunk.parameters(), *self.heads.parameters()]

    def losses(self, x: Tensor, broken: float | None) -> list[Tensor]:
        with nullcontext() if self.autocast is None else torch.autocast("cpu", self.autocast):
            z = self.trunk(x)
            features = [z] * T if self.layer is None else self.layer(z)
            out = [head(z) for head, z in zip(self.heads, features, strict=True)]
            losses = [nn.functional.mse_loss(y, torch.full_like(y, (-1) ** t * (t + 1))) for t, y in enumerate(out)]
        if broken is not None:
            losses[1] = losses[1] * broken
        return losses

    def step(self, x: Tensor, broken: float | None = None, update: bool = True) -> None:
        """One step; ``broken``: the second loss is multiplied by it; ``update=False``: leave the parameters alone."""
        self.optimizer.zero_grad()
        losses, result = self.losses(x, broken), None
        if self.way in ("layer", "scalar"):
            total = self.method(losses) if self.layer is None else self.layer.total(losses)
            (total if self.scaler is None else self.scaler.scale(total)).backward()
            result = None if self.layer is None else self.layer.result
        elif self.way == "task gradients":
            rows = fastmtl.TaskGradients(self.trunk, T, heads=self.heads, scaler=self.scaler)
            for t, loss in enumerate(losses):
                rows.backward(t, loss, retain_graph=True)
            result = rows.combine(self.method)
        else:
            options = {"last layer": {"gramian_params": self.trunk[-1]}, "chunks": {"chunk_size": 2}}.get(self.way, {})
            result = fastmtl.backward(losses, self.method, self.trunk, scaler=self.scaler, **options)
        self.looks = result is not None and result.gramian is not None  # at gradients
        gramian = result.gramian if result is not None and result.gramian is not None else torch.zeros(1)
        self.saw_finite = bool(torch.stack(losses).isfinite().all() and gramian.isfinite().all())
        if not update:
            return
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def flat(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.parameters()])


def batches(steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(16, 5, generator=generator) for _ in range(steps)]


# Those of the article go every way; the others, which differ in `solve` only, two ways.
EVERY_WAY = (
    "UncertaintyWeighting",
    "DWA",
    "HTW",
    "LBTW",
    "GradNorm",
    "MGDA",
    "PELTR",
    "PCGrad",
    "GradVac",
    "Amortized",
)


def ways(variant: str) -> list[str]:
    name = VARIANTS[variant][0]
    method = getattr(fastmtl, name)
    if issubclass(method, LossWeighting):
        return ["backward", "task gradients", "layer", "scalar"] if name in EVERY_WAY else ["backward", "scalar"]
    layer = [] if method.several_batches else ["layer"]  # whose features have no products
    if name not in EVERY_WAY:
        return ["backward", *layer]
    more = ["chunks"] if variant in ("GradNorm", "GradVac", "PCGrad") else []  # which concerns rows, not methods
    return ["backward", *more, "last layer", "task gradients", *layer]


PAIRS = [(variant, way) for variant in VARIANTS for way in ways(variant)]
every_pair = pytest.mark.parametrize(("variant", "way"), PAIRS)


# ---- the scale -------------------------------------------------------------------------------------------------------


@every_pair
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_a_scale_changes_not_one_bit(variant: str, way: str, autocast: torch.dtype | None) -> None:
    """A power of two passes through every operation exactly, where exponents are as wide as float32's.

    Neither does it matter whether the step is taken within autocast.
    """
    runs = [Run(variant, way, autocast, scale) for scale in (None, 1.0, FIRST, FIRST)]
    for x in batches(3):
        for run in runs[:-1]:
            run.step(x)
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            runs[-1].step(x)
    for run in runs[1:]:
        assert torch.equal(run.flat(), runs[0].flat())
        assert_same_state(run.method, runs[0].method)


# ---- overflow --------------------------------------------------------------------------------------------------------


def overflow_of_the_scale(run: Run, x: Tensor) -> None:
    """Losses are finite; gradients overflow in float16."""
    run.scaler.update(HUGE)
    run.step(x)


def infinite_input(run: Run, x: Tensor) -> None:
    run.step(torch.full_like(x, math.inf))


def infinite_loss(run: Run, x: Tensor) -> None:
    run.step(x, broken=math.inf)


@pytest.mark.parametrize(
    ("break_", "at"),
    [(overflow_of_the_scale, 0), (overflow_of_the_scale, 2), (infinite_input, 2), (infinite_loss, 0)],
)
@pytest.mark.parametrize(("variant", "way"), [pair for pair in PAIRS if pair[0] != "Amortized"])  # its steps count
def test_overflow_and_recovery(variant: str, way: str, break_: Callable[[Run, Tensor], None], at: int) -> None:
    """Nothing moves but the scale; afterwards training goes on as if that step had not been."""
    hurt, spared = (Run(variant, way, torch.float16) for _ in range(2))
    for step, x in enumerate(batches(5)):
        if step == at:
            values, before = [p.detach().clone() for p in hurt.parameters()], copy.deepcopy(hurt.method)
            break_(hurt, -x)
            assert not torch.cat([p.grad.flatten() for p in hurt.trunk.parameters()]).isfinite().any()
            assert hurt.scaler.get_scale() == (HUGE if break_ is overflow_of_the_scale else FITS) / 2
            assert all(map(torch.equal, hurt.parameters(), values))
            assert hurt.looks or isinstance(before, LossWeighting | GramianFree)
            assert hurt.saw_finite == (not hurt.looks and break_ is overflow_of_the_scale)
            if hurt.saw_finite:  # it sees losses only, if anything, and these were fine
                spared.step(-x, update=False)
                before = spared.method
            for name, state in before.state_dict().items():  # what had no shape yet takes one: the end shows which
                torch.testing.assert_close(
                    hurt.method.state_dict()[name] if state.numel() else state, state, rtol=0, atol=0, equal_nan=True
                )
            hurt.scaler.update(FITS)
        for run in (hurt, spared):
            run.step(x)
    assert hurt.scaler.get_scale() == FITS
    assert all(map(torch.equal, hurt.parameters(), spared.parameters()))
    assert_same_state(hurt.method, spared.method)


# ---- whole training --------------------------------------------------------------------------------------------------


@every_pair
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_training_is_close_to_fp32(variant: str, way: str, autocast: torch.dtype) -> None:
    """Twenty steps, from the scale that a `GradScaler` starts with: the first ones overflow and are skipped."""
    run = Run(variant, way, autocast, FIRST if autocast == torch.float16 else None)
    reference = Run(variant, way, scale=None)
    start, skipped = run.flat(), 0
    for x in batches(20):
        before = run.flat()
        run.step(x)
        stepped = not torch.equal(run.flat(), before)
        skipped += not stepped
        if run.saw_finite:  # an overflow may lie where a method does not look: in a head, or below the layer
            reference.step(x, update=stepped)
    assert skipped == (0 if run.scaler is None else round(math.log2(FIRST / run.scaler.get_scale())))
    assert skipped < 10
    near = NEAR.get(variant, 0.05)
    assert (run.flat() - reference.flat()).norm() < near * (reference.flat() - start).norm()
    for found, expected in zip(run.method.buffers(), reference.method.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0.05, equal_nan=True)


@every_pair
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_state_stays_wide_in_a_narrow_model(variant: str, way: str, dtype: torch.dtype) -> None:
    """Also a learned weight, which steps of 1e-3 would not move in bfloat16."""
    run = Run(variant, way, scale=None)
    first, *rest = batches(3)
    run.step(first)
    learned = [(p.clone(), p.grad.clone()) for p in run.method.parameters()]
    nn.ModuleList([run.trunk, run.heads, run.method if run.layer is None else run.layer]).to(dtype)
    for p, (value, grad) in zip(run.method.parameters(), learned, strict=True):
        assert torch.equal(p, value)
        assert torch.equal(p.grad, grad)
    for x in rest:
        run.step(x.to(dtype))
    assert all(p.dtype == dtype for p in run.parameters())
    for name, x in run.method.state_dict().items():
        wide = torch.int64 if name.endswith(("rng", "steps", "extra_state")) else torch.float64
        assert x.dtype == (torch.float32 if name == "s" else wide), name
