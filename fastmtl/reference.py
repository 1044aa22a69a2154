"""The operators of `fastmtl.ops` in plain PyTorch and NumPy, under the same names and signatures.

The oracle of the tests, and what runs where no extension was built or a device has no kernels of ours (slowly, with
host synchronisations). Devices without float64 (MPS) compute in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmtl.random import random_weights as random_weights  # in plain PyTorch
from fastmtl.rows import Gradients, Rows, as_rows
from fastmtl.simplex import project_onto_simplex


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _task_rows(rows: Rows, p: int) -> list[Tensor | None]:
    if rows.stacked:
        stacked = rows.grads[p]
        assert stacked is not None
        return list(stacked.unbind(0))
    return rows.grads[p * rows.num_tasks : (p + 1) * rows.num_tasks]


def gram(grads: Gradients | Rows, groups: Sequence[int] | None = None, precision: str = "full") -> Tensor:
    """As `fastmtl.ops.gram`; differentiable, and always in full precision."""
    rows = as_rows(grads, groups)
    dtype = _wide(rows.device)
    zero = torch.zeros(rows.num_tasks, rows.num_tasks, dtype=dtype, device=rows.device)
    gramian = [zero] * rows.num_groups
    for p in rows.reached():
        g = _task_rows(rows, p)
        like = next(x for x in g if x is not None)
        flat = torch.stack([torch.zeros_like(like) if x is None else x for x in g]).reshape(len(g), -1).to(dtype)
        k = 0 if rows.groups is None else rows.groups[p]
        gramian[k] = gramian[k] + flat @ flat.T
    return torch.stack(gramian)


def combine(
    grads: Gradients | Rows, weights: Tensor, groups: Sequence[int] | None = None, dtype: torch.dtype | None = None
) -> list[Tensor | None]:
    """As `fastmtl.ops.combine`, always a list; differentiable in the gradients; reads the weights on the host."""
    rows = as_rows(grads, groups)
    if dtype is not None:
        check_dtype(dtype, rows)
    totals = _totals(rows, weights)
    return [None if x is None else rows.unpack(p, x.to(dtype or rows.dtype(p))) for p, x in enumerate(totals)]


def combine_(rows: Rows, weights: Tensor, out: Sequence[Tensor]) -> None:
    """As `fastmtl.ops.combine_`; reads the weights on the host."""
    if len(out) != rows.num_params:
        raise ValueError(f"out: expected one tensor per parameter ({rows.num_params}), found {len(out)}")
    for p in rows.reached():
        _check_output(f"out[{p}]", out[p].dtype, rows.dtype(p))
    with torch.no_grad():
        for target, total in zip(out, _totals(rows, weights), strict=True):
            if total is not None:
                target.add_(total)  # added in the wider of the two dtypes


def check_dtype(dtype: torch.dtype, rows: Rows) -> None:
    """Raise where not all of the gradients combine into this dtype."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, found {type(dtype).__name__}")
    for p in rows.reached():
        _check_output(f"dtype: parameter {p}", dtype, rows.dtype(p))


def _check_output(name: str, dtype: torch.dtype, own: torch.dtype) -> None:
    """Gradients combine into their own dtype; those of 16 bits also into float32."""
    possible = {own, torch.float32} if own.itemsize == 2 else {own}
    if dtype not in possible:
        expected = " or ".join(sorted(map(str, possible)))
        raise ValueError(f"{name}: expected {expected} for gradients of {own}, found {dtype}")


def _totals(rows: Rows, weights: Tensor) -> list[Tensor | None]:
    """Per parameter the weighted sum, not rounded to the gradients' dtype."""
    host = weights.reshape(rows.num_groups, rows.num_tasks).tolist()
    out: list[Tensor | None] = [None] * rows.num_params
    for p in rows.reached():
        g = _task_rows(rows, p)
        like = next(x for x in g if x is not None)
        total = torch.zeros_like(like, dtype=_wide(rows.device))
        for w, x in zip(host[0 if rows.groups is None else rows.groups[p]], g, strict=True):
            if x is not None and w != 0:
                total = total + w * x.to(total.dtype)
        out[p] = total
    return out


def grad_drop(
    grads: Gradients | Rows,
    weights: Tensor,
    rng: Tensor,
    leak: Tensor | None = None,
    groups: Sequence[int] | None = None,
    widen: bool = False,
    f: Callable[[Tensor], Tensor] | None = None,
) -> list[Tensor | None]:
    """As `fastmtl.ops.grad_drop`, always a list; reads weights, ``rng`` and ``leak`` on the host."""
    rows = as_rows(grads, groups)
    seed, step = rng.tolist()
    leaks = [0.0] * rows.num_tasks if leak is None else leak.tolist()
    out: list[Tensor | None] = [None] * rows.num_params
    for number, p in enumerate(rows.reached()):
        terms = _terms(rows, p, weights)
        like = _dense_like(next(x for x in _task_rows(rows, p) if x is not None))
        positive, negative, up, down = (torch.zeros_like(like, dtype=_wide(rows.device)) for _ in range(4))
        for task, x in terms:
            above = x > 0
            positive += torch.where(above, x, 0.0)
            negative += torch.where(above, 0.0, x)
            up += torch.where(above, x, leaks[task] * x)
            down += torch.where(above, leaks[task] * x, x)
        total = positive - negative
        purity = torch.where(total == 0, 0.5, positive / total)
        uniform = _uniform(like, number, seed, step).to(total)
        chosen = torch.where((purity if f is None else f(purity)) > uniform, up, down) + total * 0
        out[p] = rows.unpack(p, _rounded(like, chosen, widen))
    return out


def _uniform(like: Tensor, number: int, seed: int, step: int) -> Tensor:
    """The numbers on (0, 1) of csrc/grad_drop.h for a dense tensor, float64 on the CPU."""
    block = np.arange(-(-like.numel() // 4), dtype=np.uint64)
    low, high = _halves(step)
    counter = [block & _LOW, np.full_like(block, number), np.full_like(block, low), np.full_like(block, high)]
    words = np.stack(philox4x32(counter, _halves(seed)), -1).reshape(-1)
    uniform = torch.from_numpy(((words >> np.uint64(9)) + 0.5) * 2.0**-23)
    return torch.as_strided(uniform, like.shape, like.stride())


def trimmed_mean(
    grads: Gradients | Rows,
    weights: Tensor,
    trim: int,
    groups: Sequence[int] | None = None,
    widen: bool = False,
) -> list[Tensor | None]:
    """As `fastmtl.ops.trimmed_mean`, always a list; reads the weights on the host."""
    rows = as_rows(grads, groups)
    out: list[Tensor | None] = [None] * rows.num_params
    for p in rows.reached():
        like = _dense_like(next(x for x in _task_rows(rows, p) if x is not None))
        mean = torch.zeros_like(like, dtype=_wide(rows.device))
        terms = [x for _, x in _terms(rows, p, weights)]
        if terms:
            k = min(trim, (len(terms) - 1) // 2)
            values = torch.stack(terms)
            mean = values.sort(0).values[k : len(terms) - k].mean(0)
            mean = torch.where(values.isnan().any(0), math.nan, mean)
        out[p] = rows.unpack(p, _rounded(like, mean, widen))
    return out


def _terms(rows: Rows, p: int, weights: Tensor) -> list[tuple[int, Tensor]]:
    """A parameter's rows of a weight other than 0, with their tasks, multiplied by it, in the wide type."""
    host = weights.reshape(rows.num_groups, rows.num_tasks).tolist()[0 if rows.groups is None else rows.groups[p]]
    wide = _wide(rows.device)
    each = enumerate(zip(host, _task_rows(rows, p), strict=True))
    return [(t, w * x.to(wide)) for t, (w, x) in each if x is not None and w != 0]


def _rounded(like: Tensor, x: Tensor, widen: bool) -> Tensor:
    dtype = torch.float32 if widen and like.dtype.itemsize == 2 else like.dtype
    return torch.empty_like(like, dtype=dtype).copy_(x)


def _dense_like(row: Tensor) -> Tensor:
    """An empty tensor with the layout that the kernels give the outcome of rows like this one."""
    like = torch.empty_like(row)
    return like if like.stride() == row.stride() else torch.empty_like(row, memory_format=torch.contiguous_format)


# ---- The T x T solvers: on the host, in float64, by other algorithms than our kernels' -------------------------------

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def min_norm(gramian: Tensor, mask: Tensor | None = None, lower_bounds: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `fastmtl.ops.min_norm`, by Wolfe's algorithm; with bounds, on the points that the bounds leave.

    Those are ``c^T G + s g_t`` with ``s = 1 - sum c``: with little left, the weights are precise to about 1e-8 only.

    Reference:
        Wolfe: Finding the Nearest Point in a Polytope. Mathematical Programming 11, 1976. Here on the Gramian.
    """
    problems = _problems(gramian, mask)
    weights, gap = np.zeros(gramian.shape[:2]), np.zeros(gramian.shape[0])
    bounds = _given("lower_bounds", lower_bounds, gramian)
    bounds = np.zeros(gramian.shape[:2]) if bounds is None else bounds
    for k, tasks, m in problems:
        c = bounds[k, tasks]
        if not (np.isfinite(m).all() and np.isfinite(c).all()):
            weights[k], gap[k] = np.nan, np.nan
        elif tasks.size:
            slack = max(1 - c.sum(), 0.0)
            shift = slack * (m @ c)
            share = slack * _nearest_point(slack**2 * m + shift + shift[:, None] + c @ m @ c)
            weights[k, tasks] = c + share
            products = m @ (c + share)
            gap[k] = max(share @ products - slack * products.min(), 0.0)
    return _like(gramian, weights), _like(gramian, gap)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def frank_wolfe(
    gramian: Tensor, mask: Tensor | None = None, max_iter: int = 250, tol: float = 1e-5, start: str = "uniform"
) -> tuple[Tensor, Tensor]:
    """As `fastmtl.ops.frank_wolfe`, step by step."""
    weights, gap = np.zeros(gramian.shape[:2]), np.zeros(gramian.shape[0])
    for k, tasks, m in _problems(gramian, mask):
        if not np.isfinite(m).all():
            weights[k], gap[k] = np.nan, np.nan
        elif tasks.size:
            w = _frank_wolfe_start(m, start)
            for _ in range(max_iter):
                t = int((m @ w).argmin())
                vertex = np.eye(tasks.size)[t]
                change = _step_to_shortest(w @ m @ w, m[t] @ w, m[t, t]) * (vertex - w)
                w = w + change
                if not change.any() or np.abs(change).sum() < tol:
                    break
            products = m @ w
            weights[k, tasks], gap[k] = w, max(w @ products - products.min(), 0.0)
    return _like(gramian, weights), _like(gramian, gap)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def dual_cone(
    gramian: Tensor, combinations: Tensor, mask: Tensor | None = None, noise: float = 0.0
) -> tuple[Tensor, Tensor]:
    """As `fastmtl.ops.dual_cone`, as non-negative least squares by the algorithm of Lawson and Hanson.

    Reference:
        Lawson, Hanson: Solving Least Squares Problems. 1974, chapter 23. Here on the Gramian.
    """
    problems = _problems(gramian, mask)
    u = _to_host(combinations)
    if u.ndim != 3 or (u.shape[0], u.shape[2]) != tuple(gramian.shape[:2]):
        expected = f"[{gramian.shape[0]}, R, {gramian.shape[1]}]"
        raise ValueError(f"combinations: expected shape {expected}, found {list(u.shape)}")
    weights, gap = np.zeros(u.shape), np.zeros(u.shape[:2])
    for k, tasks, m in problems:
        for r, start in enumerate(u[k][:, tasks]):
            if not (np.isfinite(m).all() and np.isfinite(start).all()):
                weights[k, r], gap[k, r] = np.nan, np.nan
            elif tasks.size:
                weights[k, r, tasks], gap[k, r] = _project(m, start, noise)
    return _like(gramian, weights), _like(gramian, gap)


def _project(m: Floats, u: Floats, noise: float) -> tuple[Floats, float]:
    """One combination's weights, and how far they are from optimal."""
    norms = np.sqrt(np.maximum(m.diagonal(), 0))
    inverse = np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)
    length = float(np.abs(u) @ norms)
    if length == 0:
        return u, 0.0
    unit = max(math.sqrt(max(float(u @ m @ u), 0)), 1e-8 * length)
    cosines, opposed = inverse[:, None] * m * inverse, -inverse * (m @ u) / unit
    smallest = 1e-12 + 1e-15 * length / unit
    for ridge in (0.0, noise * len(m)):
        v = u + unit * inverse * _nonnegative(cosines + ridge * np.eye(len(m)), opposed, smallest)
        products = m @ v
        gap = float(max((v - u) @ np.abs(products), unit * max(-inverse * products), 0))
        if noise == 0 or (noise * ((v * norms / unit) ** 2).sum() <= 1e-2 and gap <= noise * unit**2):
            break
    return v, gap


def _nonnegative(a: Floats, b: Floats, smallest: float) -> Floats:
    """``argmin 1/2 z^T A z - b^T z`` over ``z >= 0``; slopes up to ``smallest`` are rounding."""
    z: Floats = np.zeros_like(b)
    support, reached = np.zeros(len(b), dtype=bool), 0.0
    tried = support.copy()  # who entered since the objective last fell
    while True:
        slope = np.where(support | tried, 0.0, b - a @ z)
        enters = int(slope.argmax())
        if slope[enters] <= smallest:
            return z
        before, before_support = z, support.copy()
        support[enters] = True
        while True:
            solution = np.zeros_like(z)
            solution[support] = np.linalg.lstsq(a[np.ix_(support, support)], b[support], rcond=1e-13)[0]
            blocked = support & (solution <= 0)
            if not blocked.any():
                break
            step = (z[blocked] / np.maximum(z[blocked] - solution[blocked], 1e-300)).min()
            z = np.maximum(z + step * (solution - z), 0)
            support &= ~(blocked & (z <= 1e-15 * (1 + np.abs(solution))))
            z[~support] = 0
        now = float(0.5 * solution @ a @ solution - b @ solution)
        if now < reached - 1e-15:
            z, reached = solution, now
            tried[:] = False
        else:
            z, support = before, before_support
            tried[enters] = True


def _step_to_shortest(start: Any, inner: Any, end: Any) -> Any:
    """How far from one point towards another the shortest point lies, from their squares and inner product."""
    if inner >= start:
        return 0.0
    return 1.0 if inner >= end else (start - inner) / (start + end - 2 * inner)


def _frank_wolfe_start(m: Floats, start: str) -> Floats:
    vertices = np.eye(len(m))
    if start == "uniform" or len(m) == 1:
        return vertices.mean(0)
    pairs = [
        a + _step_to_shortest(m[i, i], m[i, j], m[j, j]) * (b - a)
        for i, a in enumerate(vertices)
        for j, b in enumerate(vertices[i + 1 :], i + 1)
    ]
    return min(pairs, key=lambda w: float(w @ m @ w))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def cagrad(gramian: Tensor, mask: Tensor | None = None, c: float = 0.4) -> tuple[Tensor, Tensor]:
    """As `fastmtl.ops.cagrad`, by bisection for theta (csrc/solvers/cagrad.h), each step by Wolfe's algorithm."""
    weights, gap = np.zeros(gramian.shape[:2]), np.zeros(gramian.shape[0])
    for k, tasks, m in _problems(gramian, mask):
        if not np.isfinite(m).all():
            weights[k], gap[k] = np.nan, np.nan
        elif tasks.size:
            weights[k, tasks], gap[k] = _conflict_averse(m, c)
    return _like(gramian, weights), _like(gramian, gap)


def _conflict_averse(m: Floats, c: float) -> tuple[Floats, float]:
    mean = np.full(len(m), 1 / len(m))
    inner = m @ mean
    kappa = c * math.sqrt(max(mean @ inner, 0))
    if kappa**2 <= 1e-14 * c**2 * np.abs(m).mean():
        return mean, 0.0

    def nearest(theta: float) -> Floats:
        shift = theta * inner
        return _nearest_point(m + shift + shift[:, None] + theta**2 * (mean @ inner))

    def norm(w: Floats) -> float:
        return math.sqrt(max(float(w @ m @ w), 0))

    low, high = 0.0, 1.001 * math.sqrt(m.diagonal().max()) / kappa
    for _ in range(80):
        theta = (low + high) / 2
        if norm(nearest(theta)) > kappa * theta:
            low = theta
        else:
            high = theta
    w = nearest(high)
    solution: Floats = mean + w / high
    objective = inner @ w + kappa * norm(w)
    return solution, max(float(objective - (m @ solution).min()), 0.0)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def fairgrad(
    gramian: Tensor, mask: Tensor | None = None, preference: Tensor | None = None, alpha: float = 1.0
) -> tuple[Tensor, Tensor]:
    """As `fastmtl.ops.fairgrad`, by descent on the logarithms of the equations, from near the min-norm point."""
    weights, error = np.zeros(gramian.shape[:2]), np.zeros(gramian.shape[0])
    p = np.ones(gramian.shape[1]) if preference is None else _to_host(preference)
    for k, present, m in _problems(gramian, mask):
        counts = p[present] > 0
        tasks, m_counts = present[counts], m[np.ix_(counts, counts)]
        if not np.isfinite(m).all():
            weights[k], error[k] = np.nan, np.nan
        elif tasks.size:
            found = _fair(m_counts, p[tasks], 1 / alpha)
            error[k] = np.inf
            if found is not None:
                wrong = np.abs(m_counts @ found - (found / p[tasks]) ** (-1 / alpha))
                weights[k, tasks], error[k] = found, (wrong / (np.abs(m_counts) @ found)).max()
    return _like(gramian, weights), _like(gramian, error)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def simplex_lp(
    gramian: Tensor,
    objective: Tensor,
    bounds: Tensor,
    extra: Tensor,
    extra_bound: Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `fastmtl.ops.simplex_lp`, with one artificial variable per bound; where none fits, their sum is smallest."""
    weights, violation = np.zeros(gramian.shape[:2]), np.zeros(gramian.shape[0])
    q, b, e, f = map(_to_host, (objective, bounds, extra, extra_bound))
    for k, tasks, m in _problems(gramian, mask):
        rows = np.vstack([m, e[k, tasks]])
        right = np.append(b[k, tasks], f[k])
        held = right != -np.inf
        rows, right = rows[held], right[held]
        if not np.isfinite(np.concatenate([m.ravel(), q[k, tasks], rows.ravel(), right])).all():
            weights[k], violation[k] = np.nan, np.nan
        elif tasks.size:
            rows = rows - right[:, None]  # as the weights sum to 1
            largest = np.abs(rows).max(1, initial=0.0)
            rows = rows[largest > 0] / largest[largest > 0, None]
            w = _maximize_on_simplex(q[k, tasks], rows)
            weights[k, tasks] = w
            missed = float((-rows @ w).max(initial=0.0))
            violation[k] = missed if missed > 1e-9 else 0.0
    return _like(gramian, weights), _like(gramian, violation)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def pcgrad(
    gramian: Tensor,
    mask: Tensor | None = None,
    order: Tensor | str = "random",
    rng: Tensor | None = None,
    include_self: bool = False,
    reduction: str = "sum",
) -> Tensor:
    """As `fastmtl.ops.pcgrad`, pair by pair."""
    problems = _problems(gramian, mask)
    weights = np.zeros(gramian.shape[:2])
    orders = visiting_order(gramian.shape[0], gramian.shape[1], order, rng).numpy()
    for k, tasks, m in problems:
        if not np.isfinite(m).all():
            weights[k] = np.nan
            continue
        for i, others in _meetings(tasks, orders[k], include_self):
            c = np.eye(tasks.size)[i]
            for j in others:
                product = m[j] @ c
                if product < 0 and m[j, j] > 0:
                    c[j] -= product / m[j, j]
            weights[k, tasks] += c / tasks.size if reduction == "mean" else c
    return _like(gramian, weights)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def gradvac(
    gramian: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    order: Tensor | str = "random",
    rng: Tensor | None = None,
    beta: float = 0.01,
    ema_first: bool = False,
    ema_always: bool = True,
) -> tuple[Tensor, Tensor]:
    """As `fastmtl.ops.gradvac`, pair by pair."""
    problems = _problems(gramian, mask)
    if targets.shape != gramian.shape:
        raise ValueError(f"targets: expected shape {list(gramian.shape)}, found {list(targets.shape)}")
    weights, moved = np.zeros(gramian.shape[:2]), _to_host(targets).copy()
    orders = visiting_order(gramian.shape[0], gramian.shape[1], order, rng).numpy()
    for k, tasks, m in problems:
        if not np.isfinite(m).all():
            weights[k] = np.nan
            continue
        norms = np.sqrt(np.maximum(m.diagonal(), 0))
        for i, others in _meetings(tasks, orders[k], False):
            c = np.eye(tasks.size)[i]
            for j in others:
                norm = math.sqrt(max(0.0, c @ m @ c))
                # Below a millionth of what it was made of, the direction of g' is noise; it then has no cosine.
                if norms[j] == 0 or norm <= 1e-6 * (np.abs(c) @ norms):
                    continue
                cosine = min(1.0, max(-1.0, float(m[j] @ c) / (norm * norms[j])))
                entry = k, tasks[i], tasks[j]
                old = moved[entry]
                new = (1 - beta) * old + beta * cosine
                target = min(new if ema_first else old, 1 - 1e-6)  # nothing finite turns g' all the way to g_j
                if cosine < target:
                    sine, target_sine = math.sqrt(1 - cosine**2), math.sqrt(1 - target**2)
                    c[j] += norm * (target * sine - cosine * target_sine) / (norms[j] * target_sine)
                if ema_always or cosine < target:
                    moved[entry] = new
            weights[k, tasks] += c
    return _like(gramian, weights), _like(gramian, moved)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def aligned_mtl(
    gramian: Tensor, mask: Tensor | None = None, preference: Tensor | None = None, scale_mode: str = "min"
) -> Tensor:
    """As `fastmtl.ops.aligned_mtl`, by the eigenvectors."""
    weights = np.zeros(gramian.shape[:2])
    given = _given("preference", preference, gramian)
    for k, tasks, m in _problems(gramian, mask):
        if not np.isfinite(m).all():
            weights[k] = np.nan
        elif m.any():
            values, vectors = np.linalg.eigh(m)
            kept = values > values.max() * tasks.size * 2.0**-23
            values, vectors = values[kept], vectors[:, kept]
            scale = {"min": values.min(), "median": values[(values.size - 1) // 2], "rmse": values.mean()}[scale_mode]
            before = np.full(tasks.size, 1 / tasks.size) if given is None else given[k, tasks]
            weights[k, tasks] = vectors @ (np.sqrt(scale / values) * (vectors.T @ before))
    return _like(gramian, weights)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def equal_cosines(
    gramian: Tensor, mask: Tensor | None = None, preference: Tensor | None = None, length: str = "projections"
) -> Tensor:
    """As `fastmtl.ops.equal_cosines`, by the pseudo-inverse of the cosines."""
    weights = np.zeros(gramian.shape[:2])
    given = _given("preference", preference, gramian)
    for k, tasks, m in _problems(gramian, mask):
        if not np.isfinite(m).all():
            weights[k] = np.nan
            continue
        long = m.diagonal() > 0
        tasks, m = tasks[long], m[np.ix_(long, long)]
        norms = np.sqrt(m.diagonal())
        cosines = m / norms[:, None] / norms
        np.fill_diagonal(cosines, 1)
        goal = np.ones(tasks.size) if given is None else given[k, tasks]
        x = np.linalg.pinv(cosines, rcond=1e-6, hermitian=True) @ goal  # less cannot be told from 0 in float32
        reached = cosines @ x
        if reached @ reached <= 1e-12 * (goal @ goal):
            continue
        w = x / norms
        if length == "projections":
            weights[k, tasks] = w * (norms @ reached) / (x @ reached)
        elif abs(w.sum()) > 1e-12 * np.abs(w).sum():
            weights[k, tasks] = w / w.sum()
    return _like(gramian, weights)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def krum(
    gramian: Tensor,
    mask: Tensor | None = None,
    num_byzantine: int = 0,
    num_selected: int = 1,
    distance: str = "squared",
) -> Tensor:
    """As `fastmtl.ops.krum`, task by task."""
    weights = np.zeros(gramian.shape[:2])
    for k, tasks, m in _problems(gramian, mask):
        if not np.isfinite(m).all():
            weights[k] = np.nan
            continue
        n = tasks.size
        sums = m.diagonal()[:, None] + m.diagonal()
        distances = sums - 2 * m
        distances = np.where(distances > 1e-14 * sums, distances, 0)  # less is rounding
        if distance == "euclidean":
            distances = np.sqrt(distances)
        neighbours = max(n - num_byzantine - 2, 1)
        scores = [sum(sorted(np.delete(distances[i], i))[:neighbours]) for i in range(n)]
        selected = sorted(range(n), key=lambda i: scores[i])[:num_selected]
        weights[k, tasks[selected]] = 1 / max(len(selected), 1)
    return _like(gramian, weights)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def projected_gradient(
    gramian: Tensor,
    start: Tensor,
    mask: Tensor | None = None,
    pull: Tensor | None = None,
    lr: float = 0.1,
    momentum: float = 0.0,
    ridge: float = 0.0,
    num_steps: int = 1,
    scale_free: bool = False,
    rate: Tensor | None = None,
) -> Tensor:
    """As `fastmtl.ops.projected_gradient`, step by step."""
    _problems(gramian, mask)  # its checks
    t = start.shape[-1]
    batches = gramian.shape[-1] // max(t, 1)
    if start.shape != (gramian.shape[0], t) or batches * t != gramian.shape[-1]:
        raise ValueError(f"start: expected [K, T] for {gramian.shape[-1]} rows, found {list(start.shape)}")
    present = None if mask is None else mask.unflatten(-1, (batches, t)).all(-2)
    first, second = gramian[:, :t, :t], gramian[:, :t, t : 2 * t]
    added = np.zeros(start.shape) if pull is None else _to_host(pull)
    length = lr * (1.0 if rate is None else float(_to_host(rate)[0]))
    weights = _to_host(start).copy()
    for k, tasks, a in _problems(first if batches < 2 else second, present):
        w, p = weights[k, tasks], added[k, tasks]
        if not w.size:
            continue
        if not (np.isfinite(a).all() and np.isfinite(w + p).all()):
            weights[k] = np.nan
            continue
        norms = np.sqrt(a.diagonal().clip(min=0))
        if scale_free and norms.any():
            a = a / norms.mean() ** 2
        velocity, everyone = np.zeros_like(w), torch.ones(1, w.size, dtype=torch.bool)
        total = torch.from_numpy(w.sum(keepdims=True)).unsqueeze(0)
        for _ in range(num_steps):
            velocity = momentum * velocity + a @ (w + p) + ridge * w
            w = project_onto_simplex(torch.from_numpy(w - length * velocity).unsqueeze(0), everyone, total)[0].numpy()
        weights[k, tasks] = w
    return _like(gramian, weights)


def _given(name: str, values: Tensor | None, gramian: Tensor) -> Floats | None:
    """Numbers ``[T]`` or ``[K, T]`` as ``[K, T]``."""
    if values is None:
        return None
    if values.shape not in (gramian.shape[:2], gramian.shape[1:2]):
        expected = f"{list(gramian.shape[:2])} or {list(gramian.shape[1:2])}"
        raise ValueError(f"{name}: expected shape {expected}, found {list(values.shape)}")
    return np.broadcast_to(_to_host(values), gramian.shape[:2])


def visiting_order(num_groups: int, num_tasks: int, order: Tensor | str, rng: Tensor | None = None) -> Tensor:
    """The order in which each task meets the others, as the solvers of `fastmtl.ops` draw it.

    Args:
        num_groups: K.
        num_tasks: T, at most 65,536.
        order: As for `fastmtl.ops.pcgrad`.
        rng: As for `fastmtl.ops.pcgrad`.

    Returns:
        ``[K, T, T]`` int64 on the CPU: row i of problem k is task i's permutation of 0..T-1.

    Raises:
        ValueError: An explicit order of another shape, or a row that is no permutation; a random one without ``rng``;
            an unknown word.

    Reference:
        Fisher-Yates shuffles of Philox words, specified in csrc/solvers/order.h.
    """
    shape = (num_groups, num_tasks, num_tasks)
    identity = np.broadcast_to(np.arange(num_tasks), shape)
    if isinstance(order, Tensor):
        if order.shape not in (shape, shape[1:]):
            raise ValueError(f"order: expected shape {list(shape)} or {list(shape[1:])}, found {list(order.shape)}")
        explicit = order.cpu().expand(shape)
        if not np.array_equal(explicit.sort(-1).values.numpy(), identity):
            raise ValueError(f"order: expected permutations of 0..{num_tasks - 1} as rows, found {order.tolist()}")
        return explicit
    if order not in ("random", "shared", "fixed"):
        raise ValueError(f"order: expected a tensor, 'random', 'shared' or 'fixed', found {order!r}")
    if order == "fixed":
        return torch.from_numpy(identity.copy())
    if rng is None:
        raise ValueError("rng: a random order needs the tensor [seed, step]")
    seed, step = rng.tolist()
    rows = num_tasks if order == "random" else 1
    drawn = _shuffles(num_groups, rows, num_tasks, seed, step)
    return torch.from_numpy(np.broadcast_to(drawn, shape).copy())


def _maximize_on_simplex(q: Floats, rows: Floats) -> Floats:
    """``argmax q.w`` over the simplex with ``rows @ w >= 0``; where there is none, the smallest sum of violations.

    Reference:
        The simplex method in two phases, by Bland's rule: New Finite Pivoting Rules for the Simplex Method.
        Mathematics of Operations Research 2, 1977.
    """
    (m, n), size = rows.shape, len(rows) + 1
    tableau = np.zeros((size, n + m + size + 1))  # weights, slacks, artificial variables, right-hand side
    tableau[:m, :n], tableau[:m, n : n + m] = -rows, np.eye(m)
    tableau[m, :n] = tableau[m, -1] = 1
    tableau[:, n + m : -1] = np.eye(size)
    basis = np.append(np.arange(n, n + m), n + m + m)
    # The slacks are a basis but for sum w = 1; an artificial one takes the place of a slack that would be negative.
    start = int(q.argmax())
    tableau[:m] -= np.outer(tableau[:m, start], tableau[m])
    tableau[:m, n + m + m] = 0
    basis[m] = start
    for i in np.flatnonzero(tableau[:m, -1] < 0):
        tableau[i] *= -1
        tableau[i, n + m + i] = 1
        basis[i] = n + m + i
    first = np.zeros(tableau.shape[1] - 1)
    first[n + m : n + m + m] = -1
    scale = np.abs(q).max()
    second = np.append(q / scale if scale > 0 else q, np.zeros(m))
    last = n + m + m  # beyond: the artificial variable of the sum, which has left
    _bland(tableau, basis, first[:last])
    if tableau[basis >= n + m, -1].sum() <= 1e-9:
        for late in np.flatnonzero(basis >= n + m).tolist():  # at 0: whatever may take its place
            column = int(np.abs(tableau[late, : n + m]).argmax())
            if abs(tableau[late, column]) > 1e-10:
                _exchange(tableau, basis, late, column)
        _bland(tableau, basis, second)
    w = np.zeros(n)
    inside = basis < n
    w[basis[inside]] = tableau[inside, -1].clip(min=0)
    shares: Floats = w / w.sum()
    return shares


def _bland(tableau: Floats, basis: Ints, objective: Floats) -> None:
    """Pivot until the objective over the first columns, 0 for others in the basis, is largest."""
    costs = np.append(objective, np.zeros(tableau.shape[1] - 1 - len(objective)))
    while True:
        slopes = objective - costs[basis] @ tableau[:, : len(objective)]
        slopes[basis[basis < len(objective)]] = 0
        rising = np.flatnonzero(slopes > 1e-11)
        if rising.size == 0:
            return
        column = int(rising[0])
        candidates = np.flatnonzero(tableau[:, column] > 1e-10)
        if candidates.size == 0:
            return
        ratios = tableau[candidates, -1].clip(min=0) / tableau[candidates, column]
        ties = candidates[ratios <= ratios.min() * (1 + 1e-12)]
        _exchange(tableau, basis, int(ties[basis[ties].argmin()]), column)


def _exchange(tableau: Floats, basis: Ints, row: int, column: int) -> None:
    tableau[row] /= tableau[row, column]
    others = np.arange(len(tableau)) != row
    tableau[others] -= np.outer(tableau[others, column], tableau[row])
    basis[row] = column


class _Solution(torch.autograd.Function):
    """A solver's result as a tensor like the Gramian it belongs to. Backward raises, as for the operators."""

    @staticmethod
    def forward(ctx: Any, gramian: Tensor, values: Floats) -> Tensor:
        return torch.from_numpy(values).to(gramian.dtype).to(gramian.device)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("the solvers of fastmtl.reference are not differentiable")


def _like(gramian: Tensor, values: Floats) -> Tensor:
    solution: Tensor = _Solution.apply(gramian, values)
    return solution


def _to_host(x: Tensor) -> Floats:
    host: Floats = x.detach().cpu().double().numpy()
    return host


def _problems(gramian: Tensor, mask: Tensor | None) -> list[tuple[int, Ints, Floats]]:
    """Per problem its index, the tasks present, and the Gramian among them."""
    if gramian.dim() != 3 or gramian.shape[1] != gramian.shape[2]:
        raise ValueError(f"gramian: expected shape [K, T, T], found {list(gramian.shape)}")
    if mask is not None and mask.shape != gramian.shape[:2]:
        raise ValueError(f"mask: expected shape {list(gramian.shape[:2])}, found {list(mask.shape)}")
    present = np.ones(gramian.shape[:2], dtype=bool) if mask is None else mask.cpu().numpy()
    tasks = [np.flatnonzero(p) for p in present]
    return [(k, tasks[k], m[np.ix_(tasks[k], tasks[k])]) for k, m in enumerate(_to_host(gramian))]


def _meetings(tasks: Ints, orders: Ints, include_self: bool) -> Iterator[tuple[int, list[int]]]:
    """Per present task its position among the tasks present, and the positions of those it meets, in its order."""
    position = {int(task): i for i, task in enumerate(tasks)}
    for task, i in position.items():
        yield i, [position[int(j)] for j in orders[task] if int(j) in position and (include_self or int(j) != task)]


def _shuffles(num_groups: int, rows: int, num_tasks: int, seed: int, step: int) -> Ints:
    """Permutations ``[K, rows, T]``, all at once, by the recipe of csrc/solvers/order.h."""
    blocks = -(-(num_tasks - 1) // 4)
    problem, row, block = np.indices((num_groups, rows, blocks), dtype=np.uint64)
    low, high = _halves(step)
    words = philox4x32(
        [block | row << 16, problem & _LOW, np.full_like(block, low), np.full_like(block, high)], _halves(seed)
    )
    draws = np.stack(words, -1).reshape(num_groups, rows, 4 * blocks)
    order = np.broadcast_to(np.arange(num_tasks), (num_groups, rows, num_tasks)).copy()
    k, i = np.indices((num_groups, rows))
    for n, last in enumerate(range(num_tasks - 1, 0, -1)):
        other = (draws[..., n] * np.uint64(last + 1) >> 32).astype(np.int64)
        order[k, i, last], order[k, i, other] = order[k, i, other], order[k, i, last]
    return order


_LOW = np.uint64(0xFFFFFFFF)


def _halves(x: int) -> tuple[int, int]:
    return x & 0xFFFFFFFF, x >> 32 & 0xFFFFFFFF


def philox4x32(counter: Sequence[NDArray[np.uint64]], key: tuple[int, int]) -> list[NDArray[np.uint64]]:
    """Philox4x32-10: four random 32-bit words per counter, held in uint64.

    Args:
        counter: Its four words, arrays of one shape (of at least one dimension), values below 2^32.
        key: Its two words.

    Reference:
        Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3. SC 2011.
    """
    x0, x1, x2, x3 = counter
    key0, key1 = key
    for _ in range(10):
        product0, product1 = x0 * np.uint64(0xD2511F53), x2 * np.uint64(0xCD9E8D57)
        x0, x1 = (product1 >> np.uint64(32)) ^ x1 ^ np.uint64(key0), product1 & _LOW
        x2, x3 = (product0 >> np.uint64(32)) ^ x3 ^ np.uint64(key1), product0 & _LOW
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return [x0, x1, x2, x3]


def _fair(m: Floats, p: Floats, exponent: float) -> Floats | None:
    """``w > 0`` with ``(m w)_t = (w_t / p_t)^-exponent``, or None, by Newton's method with step halving in log(w).

    Each step makes all the equations' logarithms smaller in sum of squares. In cosines, as in csrc/solvers/fairgrad.h.
    """
    norms = np.sqrt(m.diagonal())
    if not norms.all():
        return None
    cosines = m / norms[:, None] / norms
    goal = exponent * np.log(p) + (exponent - 1) * np.log(norms)

    def lacking(u: Floats) -> Floats:
        """Infinite where the point does not lie within all half-spaces."""
        products = cosines @ u
        inside = products.min() > 0
        return goal - np.log(products) - exponent * np.log(u) if inside else np.full_like(u, np.inf)

    nearest = _nearest_point(cosines)
    squared = nearest @ cosines @ nearest
    if squared <= 1e-14:
        return None
    u = nearest + 0.1 * squared / len(m)
    u *= np.exp(lacking(u).mean() / (1 + exponent))
    rest = lacking(u)
    for _ in range(1000):
        products = cosines @ u
        step = np.linalg.solve(cosines + np.diag(exponent * products / u), products * rest)
        length = min(1.0, 0.9 / max((-step / u).max(), 1e-300))
        while length > 1e-12 and (lacking(u + length * step) ** 2).sum() >= (rest**2).sum():
            length /= 2
        if length <= 1e-12:
            break
        u = u + length * step
        rest = lacking(u)
    solution: Floats = u / norms
    return solution


# Wolfe's algorithm. Gradients are scaled to length 1, so that tasks of very different size are told apart: with C the
# cosines, d_t = |g_shortest| / |g_t| and the weights w = d * u, it is min u^T C u over u >= 0, d^T u = 1.


def _nearest_point(m: Floats) -> Floats:
    """Weights of the min-norm point for one finite Gramian of at least one task."""
    shortest = int(m.diagonal().argmin())
    start: Floats = np.eye(len(m))[shortest]
    if m[shortest, shortest] <= 0:  # the origin is one of the points
        return start
    norms = np.sqrt(m.diagonal())
    cosines, d = m / norms[:, None] / norms, norms[shortest] / norms
    eps = float(np.finfo(np.float64).eps)
    u, support = start, [shortest]
    tried: set[int] = set()  # who entered since the square last fell; not twice, so that rounding cannot make a cycle
    while True:
        products = cosines @ u
        squared = u @ products
        gain = d * squared - products  # > 0: a step towards that task shortens the point
        gain -= 4 * eps * (np.abs(cosines) @ u)
        gain[[*support, *tried]] = -np.inf
        enters = int(gain.argmax())
        if gain[enters] <= 0 or squared <= 0:
            w: Floats = d * u / (d @ u)
            return w
        next_u, next_support = _minimize_on_support(cosines, d, u, [*support, enters])
        next_squared = next_u @ (cosines @ next_u)
        tried = set() if next_squared < squared else tried | {enters}
        # A much longer task changes the point by much more than the square can show.
        if next_squared < squared or (enters in next_support and next_squared <= squared * (1 + 4 * eps)):
            u, support = next_u, next_support


def _minimize_on_support(cosines: Floats, d: Floats, u: Floats, support: list[int]) -> tuple[Floats, list[int]]:
    """Go to the min-norm point of the affine hull; at the border of the convex hull drop who leaves, and go on."""
    while True:
        affine = np.zeros_like(u)
        affine[support] = _affine_minimum(cosines[np.ix_(support, support)], d[support])
        leaving = [t for t in support if affine[t] <= 0]
        if not leaving:
            return affine, support
        if len(leaving) == len(support):  # the system was singular to rounding
            return u, support
        reach = {t: u[t] / (u[t] - affine[t]) if u[t] > 0 else 0.0 for t in leaving}
        first = min(reach.values())
        u = np.maximum(u + first * (affine - u), 0)
        support = [t for t in support if reach.get(t, math.inf) > first]
        u[[t for t in range(len(u)) if t not in support]] = 0


def _affine_minimum(cosines: Floats, d: Floats) -> Floats:
    """``argmin u^T C u`` with ``d^T u = 1``, by its optimality system."""
    n, scale = len(d), d.max()
    system = np.zeros((n + 1, n + 1))
    system[:n, :n], system[:n, n], system[n, :n] = cosines, d / scale, d / scale
    right = np.zeros(n + 1)
    right[n] = 1
    try:
        solution = np.linalg.solve(system, right)
    except np.linalg.LinAlgError:  # dependent tasks
        solution = np.linalg.lstsq(system, right, rcond=None)[0]
    minimum: Floats = solution[:n] / scale
    return minimum


def is_symmetric(gramian: Tensor) -> bool:
    """See `fastmtl.ops.is_symmetric`."""
    difference = (gramian - gramian.mT).abs()
    scale = gramian.diagonal(dim1=-2, dim2=-1).abs().sqrt()
    bound = 1e-5 * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    return not bool(((difference > bound) & difference.isfinite()).any())
