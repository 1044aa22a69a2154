"""fp64 answers on the inputs that are timed: straight from the definitions, nothing of fastmtl in here."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1 << 18  # columns widened at a time


def gramian(rows: Tensor) -> Tensor:
    """``rows @ rows.T`` in float64, for rows ``[T, P]``."""
    total = torch.zeros(rows.shape[0], rows.shape[0], dtype=torch.float64)
    for block in rows.split(BLOCK, dim=1):
        wide = block.double()
        total += wide @ wide.T
    return total


def combination(weights: Tensor, rows: Tensor) -> Tensor:
    """``weights @ rows`` in float64, ``[P]``."""
    return torch.cat([weights.double() @ block.double() for block in rows.split(BLOCK, dim=1)])


def gramian_error(found: Tensor, expected: Tensor) -> float:
    """Largest error of an entry over the product of the two norms."""
    norms = expected.diagonal().sqrt()
    return float(((found.double() - expected).abs() / (norms[:, None] * norms)).max())


def vector_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the error over the norm of what is expected."""
    return float((found.double() - expected).norm() / expected.norm())


def pcgrad_weights(m: Tensor, orders: Tensor) -> Tensor:
    """PCGrad (Yu et al. 2020, Algorithm 1) on a Gramian; row i of ``orders`` is whom task i meets, itself skipped."""
    coefficients = torch.eye(len(m), dtype=torch.float64)
    for i, c in enumerate(coefficients):
        for j in orders[i].tolist():
            product = float(m[j] @ c)
            if j != i and product < 0:
                c[j] -= product / float(m[j, j])
    return coefficients.sum(0)


def duality_gap(m: Tensor, weights: Tensor) -> float:
    """How far convex weights are from the min-norm point, relative to the smallest squared norm of a gradient."""
    w = weights.double()
    v = m @ w
    return float((w @ v - v.min()) / m.diagonal().min())


def dual_cone_weights(m: Tensor, combinations: Tensor) -> Tensor:
    """``argmin v^T M v`` over ``v >= u`` for each row u ``[R, T]``, by Hildreth's cyclic descent until it stands."""
    v = combinations.clone()
    products = v @ m
    for _ in range(10_000):
        before = v.clone()
        for t in range(len(m)):
            step = (v[:, t] - products[:, t] / m[t, t]).maximum(combinations[:, t]) - v[:, t]
            v[:, t] += step
            products += step[:, None] * m[t]
        if (v - before).abs().max() < 1e-15:
            break
    return v


def direction_error(m: Tensor, found: Tensor, expected: Tensor) -> float:
    """Norm of the error of ``sum_t w_t g_t`` over its norm."""
    error = found.double() - expected
    return float(((error @ m @ error).clamp(min=0) / (expected @ m @ expected)).sqrt())


def aligned_weights(m: Tensor) -> Tensor:
    """AlignedMTL's weights for a Gramian of full rank."""
    values, vectors = torch.linalg.eigh(m)
    return vectors @ ((values[0] / values).sqrt() * vectors.mean(0))


def equal_cosines_weights(m: Tensor) -> Tensor:
    """The weights of a direction with the same cosine to every gradient, of full rank; of any length."""
    return torch.linalg.solve(m, m.diagonal().sqrt())


def config_weights(m: Tensor) -> Tensor:
    """ConFIG's weights for a Gramian of full rank."""
    weights = equal_cosines_weights(m)
    products = m @ weights
    return weights * products.sum() / (weights @ products)


def fairness_error(m: Tensor, weights: Tensor, alpha: float) -> float:
    """The largest ``|(Mw)_t - w_t^(-1/alpha)|``, against the absolute terms that ``(Mw)_t`` is summed from."""
    return float(((m @ weights - weights ** (-1 / alpha)).abs() / (m.abs() @ weights)).max())


def conflict_averse_gap(m: Tensor, weights: Tensor, c: float) -> float:
    """CAGrad's dual objective less the least gain, over the largest squared norm: how far either is from optimal."""
    mean = torch.full_like(weights, 1 / len(m))
    share = (weights - mean) / (weights - mean).sum()
    dual = mean @ m @ share + c * (mean @ m @ mean).sqrt() * (share @ m @ share).sqrt()
    return float((dual - (m @ weights).min()).abs() / m.diagonal().max())


def krum_weights(m: Tensor, num_byzantine: int) -> Tensor:
    """One for the task whose ``T - f - 2`` nearest others are closest in sum (Blanchard et al. 2017, section 4)."""
    scores = []
    for i in range(len(m)):
        distances = [float(m[i, i] + m[j, j] - 2 * m[i, j]) ** 0.5 for j in range(len(m)) if j != i]
        scores.append(sum(sorted(distances)[: len(m) - num_byzantine - 2]))
    return torch.eye(len(m), dtype=torch.float64)[scores.index(min(scores))]


def projected_steps(
    a: Tensor, w: Tensor, pull: Tensor, lr: float, momentum: float, ridge: float, num_steps: int
) -> Tensor:
    """Projected gradient steps on the simplex (SDMGrad, MoDo), each projection by bisection for the threshold."""
    velocity = torch.zeros_like(w)
    for _ in range(num_steps):
        velocity = momentum * velocity + a @ (w + pull) + ridge * w
        x = w - lr * velocity
        low, high = float(x.min()) - 1, float(x.max())
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if float((x - middle).clamp(min=0).sum()) > 1 else (low, middle)
        w = (x - high).clamp(min=0)
    return w
