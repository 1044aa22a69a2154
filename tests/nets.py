"""Small multi-task networks, and their per-task gradients by plain autograd."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Net(nn.Module):
    """A trunk and one linear head per task."""

    def __init__(self, trunk: nn.Module, width: int, num_tasks: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(num_tasks))

    def features(self, x: Tensor) -> Tensor:
        return self.trunk(x)

    def losses(self, x: Tensor) -> list[Tensor]:
        """One per task, of different sizes and in conflict."""
        z = self.features(x)
        return [((head(z) - (-1) ** t * (t + 1)) ** 2).mean() for t, head in enumerate(self.heads)]


def mlp(num_tasks: int = 3, dtype: torch.dtype = torch.float64) -> Net:
    trunk = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6))
    return Net(trunk, 6, num_tasks).to(dtype)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x.unsqueeze(1).expand(-1, 3, -1))[0][:, -1]


class Tied(nn.Module):
    """One matrix in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class Twice(nn.Module):
    """One module in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6))
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_(x.requires_grad or self.use_reentrant)
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


def conv_batchnorm() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 1, 5)),
        nn.Conv2d(1, 4, (1, 3)),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12, 6),
    )


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(5, 6), nn.Unflatten(1, (1, 6)), layer, nn.Flatten())


TRUNKS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6)), 6),
    "conv_batchnorm": (conv_batchnorm, 6),
    "lstm": (Recurrent, 6),
    "transformer": (transformer, 6),
    "tied": (Tied, 5),
    "twice": (Twice, 5),
    "checkpointed": (lambda: Checkpointed(use_reentrant=False), 6),
    "reentrant": (lambda: Checkpointed(use_reentrant=True), 6),
}


def net(trunk: str, num_tasks: int = 3, dtype: torch.dtype = torch.float64) -> Net:
    make, width = TRUNKS[trunk]
    return Net(make(), width, num_tasks).to(dtype)


def task_gradients(losses: Sequence[Tensor | None], params: Iterable[Tensor]) -> list[list[Tensor | None] | None]:
    """The oracle: per task each parameter's gradient by its own autograd call, None for what is not reached."""
    params = list(params)
    return [
        None if x is None else list(torch.autograd.grad(x, params, retain_graph=True, allow_unused=True))
        for x in losses
    ]


def jacobian_of(gradients: Sequence[Sequence[Tensor | None] | None], params: Iterable[Tensor]) -> Tensor:
    """``[T, P]`` with zeros for what is not reached."""
    params = list(params)
    rows = [[None] * len(params) if g is None else g for g in gradients]
    flat = [
        torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(row, params, strict=True)])
        for row in rows
    ]
    return torch.stack(flat).detach()


def weighted_sum(
    gradients: Sequence[Sequence[Tensor | None] | None], weights: Sequence[float] | Tensor
) -> list[Tensor | None]:
    """``sum_t w_t g_t`` per parameter; None where no task reaches it."""
    present = [(w, row) for w, row in zip(weights, gradients, strict=True) if row is not None]
    totals: list[Tensor | None] = []
    for p in range(len(present[0][1])):
        terms = [w * row[p] for w, row in present if row[p] is not None]
        totals.append(sum(terms[1:], terms[0]) if terms else None)
    return totals


def assert_grads(params: Iterable[Tensor], expected: Sequence[Tensor | None], rtol: float = 1e-12) -> None:
    """``.grad`` is as expected, to rounding of float64 unless told otherwise; None where None is expected."""
    params = list(params)
    for p, e in zip(params, expected, strict=True):
        if e is None:
            assert p.grad is None
        else:
            assert p.grad is not None
            atol = rtol * max(1e-30, float(e.abs().max())) if e.numel() else 0.0
            torch.testing.assert_close(p.grad, e.to(p.dtype), rtol=rtol, atol=atol)
