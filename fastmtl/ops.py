"""The operators: Gramian, combine, and the T x T solvers, on our kernels.

The only module that touches ``torch.ops``. Each function has a namesake with the same signature in
`fastmtl.reference`, which serves the devices that our kernels do not. All run on the device of their input, on its
current stream, without a host synchronisation, and work under ``torch.compile(fullgraph=True)``. None is
differentiable: backward through them raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl import _extension, reference
from fastmtl.checks import choice, real, whole
from fastmtl.random import DISTRIBUTIONS
from fastmtl.reference import check_dtype
from fastmtl.rows import Gradients, Rows, as_rows

ORDERS = {"random": 0, "fixed": 1, "shared": 2}
STARTS = ("uniform", "pair")
SCALE_MODES = ("min", "median", "rmse")
DISTANCES = ("squared", "euclidean")
LENGTHS = ("projections", "sum_to_one")
RULES = {"min": 0, "median": 1, "rmse": 2, "projections": 3, "sum_to_one": 4}


def gram(grads: Gradients | Rows, groups: Sequence[int] | None = None, precision: str = "full") -> Tensor:
    """Pairwise dot products of per-task gradients.

    Args:
        grads: A Jacobian ``[T, P]``; or one stacked ``[T, *shape]`` tensor per parameter; or T tensors or None (the
            task does not reach it) per parameter. float32, float64, bfloat16 or float16, on one device. Read where
            they lie; only tensors with gaps or unequal strides are copied first.
        groups: Per parameter the index of its group, 0..K-1. None: one group.
        precision: ``"full"``; or ``"fast"``: on CUDA, float32 gradients of more than 8 tasks may be rounded to TF32: an
            error of up to about 1e-3 of the norms in place of 5e-7. On the CPU both are the same.

    Returns:
        ``[K, T, T]`` float64: entry ``[k, a, b]`` is the dot product of the gradients of tasks a and b over the
        parameters of group k. Absent rows count as zeros.

    Raises:
        TypeError, ValueError: Naming the parameter and the task that do not fit.

    Note:
        Cost: one read of the gradients; at most 2 launches on a GPU for up to a few hundred parameters. float32,
        bfloat16 and float16 products are summed in float32 over at most 4,096 terms, then in float64: elements below
        about 1e-19 are lost and above 1e19 overflow to inf. Bitwise the same on every run and for any number of
        threads.

    Example:
        >>> import torch, fastmtl
        >>> fastmtl.ops.gram(torch.tensor([[-4., 1., 1.], [6., 1., 1.]]))
        tensor([[[ 18., -22.],
                 [-22.,  38.]]], dtype=torch.float64)
    """
    fast = check_precision(precision)
    rows = as_rows(grads, groups)
    if not _extension.kernels_on(rows.device.type):
        return reference.gram(rows)
    if all(g is None for g in rows.grads):
        return torch.zeros(rows.num_groups, rows.num_tasks, rows.num_tasks, dtype=torch.float64)
    return torch.ops.fastmtl.gram(rows.grads, rows.num_tasks, rows.stacked, rows.groups, rows.num_groups, fast)


def check_precision(precision: str) -> bool:
    """Whether ``precision`` is ``"fast"``; ValueError if it is not ``"full"`` either."""
    return choice("precision", precision, ("full", "fast")) == "fast"


def combine(
    grads: Gradients | Rows, weights: Tensor, groups: Sequence[int] | None = None, dtype: torch.dtype | None = None
) -> Any:
    """Weighted sum of per-task gradients.

    Args:
        grads: As for `gram`.
        weights: ``[K, T]``, or ``[T]`` for one group, any floating dtype, on the gradients' device. A row of
            weight 0 is not read.
        groups: As for `gram`.
        dtype: Of the result. None: the gradients' own; or float32 where they are bfloat16 or float16: the sums as they
            are, never rounded to 16 bits.

    Returns:
        ``[P]`` for a Jacobian ``[T, P]``, else a list with one tensor ``shape`` per parameter (None where no task
        reaches it).

    Raises:
        TypeError, ValueError: Naming the parameter and the task, the shape of the weights, or the dtype.

    Note:
        Cost: one read of the rows of non-zero weight and one write. Sums in float32 (float64 for float64 rows).

    Example:
        >>> import torch, fastmtl
        >>> fastmtl.ops.combine(torch.tensor([[-4., 1., 1.], [6., 1., 1.]]), torch.tensor([.5, .5]))
        tensor([1., 1., 1.])
    """
    rows = as_rows(grads, groups)
    w = check_weights(weights, rows)
    if dtype is not None:
        check_dtype(dtype, rows)
    if not _extension.kernels_on(rows.device.type):
        out = reference.combine(rows, w, dtype=dtype)
    else:
        out = _each_reached(rows, torch.ops.fastmtl.combine, w, dtype == torch.float32)
    return out[0] if isinstance(grads, Tensor) else out


def combine_(rows: Rows, weights: Tensor, out: Sequence[Tensor]) -> None:
    """As `combine`, added to existing tensors in place.

    Args:
        rows: The gradients.
        weights: As for `combine`.
        out: One tensor per parameter, of its gradients' shape; of their dtype, or float32 where they are bfloat16 or
            float16, and then nothing is rounded to 16 bits.

    Raises:
        TypeError, ValueError: As `combine`; nothing has been written then.
    """
    w = check_weights(weights, rows)
    if _extension.kernels_on(rows.device.type):
        with torch.no_grad():
            torch.ops.fastmtl.combine_(rows.grads, rows.num_tasks, rows.stacked, rows.groups, w, list(out))
    else:
        reference.combine_(rows, w, out)


def grad_drop(
    grads: Gradients | Rows,
    weights: Tensor,
    rng: Tensor,
    leak: Tensor | None = None,
    groups: Sequence[int] | None = None,
    widen: bool = False,
    f: Callable[[Tensor], Tensor] | None = None,
) -> Any:
    """Keeps of each element the positive or the negative parts, at random; see `fastmtl.GradDrop` for the method.

    Args:
        grads: As for `gram`.
        weights: As for `combine`: the rows are multiplied by them first. One of weight 0 takes no part.
        rng: int64 ``[2]``: seed and step, on the gradients' device. The same pair gives the same numbers on every
            device; which ones an element has goes by its place in memory and by its parameter's place among those
            that some task reaches.
        leak: ``[T]`` float64: the share of a task's element that passes where it is dropped. None: 0.
        groups: As for `gram`.
        widen: float32 results where the gradients are bfloat16 or float16.
        f: What is compared with the random number in place of the purity, from and to a tensor; not through the kernel
            then, but in plain PyTorch.

    Returns:
        As `combine`. NaN where an element is not finite.

    Raises:
        TypeError, ValueError: As `combine`.

    Note:
        Cost: one read of the rows and one write; bitwise the same for any number of threads. At most 2^34 elements per
        parameter have numbers of their own.
    """
    rows = as_rows(grads, groups)
    w = check_weights(weights, rows)
    if f is not None or not _extension.kernels_on(rows.device.type):
        out = reference.grad_drop(rows, w, rng, leak, widen=widen, f=f)
    else:
        out = _each_reached(rows, torch.ops.fastmtl.grad_drop, w, rng, leak, widen)
    return out[0] if isinstance(grads, Tensor) else out


def trimmed_mean(
    grads: Gradients | Rows,
    weights: Tensor,
    trim: int,
    groups: Sequence[int] | None = None,
    widen: bool = False,
) -> Any:
    """The mean of each element over the tasks, without the largest and the smallest values.

    Args:
        grads: As for `gram`.
        weights: As for `combine`: the rows are multiplied by them first. One of weight 0 takes no part.
        trim: How many of the largest and how many of the smallest values are left out; where n tasks take part, at most
            ``(n - 1) // 2``.
        groups: As for `gram`.
        widen: float32 results where the gradients are bfloat16 or float16.

    Returns:
        As `combine`; NaN where an element is NaN.

    Raises:
        TypeError, ValueError: As `combine`.

    Note:
        Cost: one read of the rows and one write; about ``2 trim`` comparisons per element of a row up to ``trim = 4``,
        ``log(T)^2 / 4`` above it, where CUDA takes at most 512 tasks.
    """
    rows = as_rows(grads, groups)
    w = check_weights(weights, rows)
    trim = whole("trim", trim, 0)
    if not _extension.kernels_on(rows.device.type):
        out = reference.trimmed_mean(rows, w, trim, widen=widen)
    else:
        out = _each_reached(rows, torch.ops.fastmtl.trimmed_mean, w, trim, widen)
    return out[0] if isinstance(grads, Tensor) else out


def _each_reached(rows: Rows, op: Any, *arguments: Any) -> list[Tensor | None]:
    """An operator that makes one gradient of T, on the parameters that some task reaches; None for the others."""
    reached = rows.reached()
    some = rows if len(reached) == rows.num_params else rows.select(reached)
    out: list[Tensor | None] = [None] * rows.num_params
    if reached:
        values = op(some.grads, some.num_tasks, some.stacked, some.groups, *arguments)
        for p, value in zip(reached, values, strict=True):
            out[p] = rows.unpack(p, value)
    return out


def check_weights(weights: Tensor, rows: Rows) -> Tensor:
    """Bring weights ``[K, T]`` or ``[T]`` into the kernels' form: float64, contiguous, on the rows' device."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights: expected a tensor, found {type(weights).__name__}")
    w = weights.unsqueeze(0) if weights.dim() == 1 else weights
    if w.shape != (rows.num_groups, rows.num_tasks):
        expected = f"[{rows.num_groups}, {rows.num_tasks}]"
        raise ValueError(f"weights: expected shape {expected}, found {list(weights.shape)}")
    if w.device != rows.device:
        raise ValueError(f"weights: on {w.device}, the gradients on {rows.device}")
    dtype = torch.float32 if rows.device.type == "mps" else torch.float64
    return w.detach().to(dtype).contiguous()


def min_norm(gramian: Tensor, mask: Tensor | None = None, lower_bounds: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The point of smallest norm in the convex hull of the gradients, exactly.

    Args:
        gramian: ``[K, T, T]`` float64, symmetric.
        mask: bool ``[K, T]``: which tasks take part; None: all. The entries of the others are not read.
        lower_bounds: ``[K, T]`` or ``[T]``: what the weights may not fall below; not negative, of sum at most 1 (not
            checked here, which would synchronise: a larger sum gives the bounds themselves). Those of tasks that do not
            take part count as 0. None: 0.

    Returns:
        The weights ``[K, T]``, float64, non-negative with sum 1, and the duality gap ``[K]``,
        ``|x|^2 - min_t (Mw)_t`` for ``x = sum_t w_t g_t`` (0 at the optimum); with bounds c it is
        ``sum_t (w_t - c_t) (Mw)_t - (1 - sum c) min_t (Mw)_t``. All NaN where an entry that takes part is not finite;
        all 0 where no task takes part.

    Note:
        Cost: an active-set method, about T pivots of T^2 operations; one launch on a GPU. Accuracy with bounds: see
        `fastmtl.solvers.min_norm`.

    Example:
        >>> import torch, fastmtl
        >>> w, gap = fastmtl.ops.min_norm(torch.diag(torch.tensor([1., 2., 3.], dtype=torch.float64) ** 2)[None])
        >>> w
        tensor([[0.7347, 0.1837, 0.0816]], dtype=torch.float64)
    """
    if not _extension.kernels_on(gramian.device.type):
        return reference.min_norm(gramian, mask, lower_bounds)
    return torch.ops.fastmtl.min_norm(gramian, mask, _per_task("lower_bounds", lower_bounds, gramian))


def frank_wolfe(
    gramian: Tensor, mask: Tensor | None = None, max_iter: int = 250, tol: float = 1e-5, start: str = "uniform"
) -> tuple[Tensor, Tensor]:
    """Frank-Wolfe steps towards the point that `min_norm` finds exactly.

    Args:
        gramian: ``[K, T, T]`` float64, symmetric.
        mask: bool ``[K, T]``, or None.
        max_iter: The largest number of steps.
        tol: Stop where a step has changed the weights by less than this, in sum.
        start: ``"uniform"`` (paper): equal weights; ``"pair"`` (its public code): the shortest point between two tasks.

    Returns:
        Weights ``[K, T]`` and the duality gap ``[K]``, as `min_norm`.

    Raises:
        ValueError: An option out of range.

    Note:
        Cost: T operations a step; one launch on a GPU. The gap falls as 1 / steps only.
    """
    check_frank_wolfe(max_iter, tol, start)
    if not _extension.kernels_on(gramian.device.type):
        return reference.frank_wolfe(gramian, mask, max_iter, tol, start)
    return torch.ops.fastmtl.frank_wolfe(gramian, mask, max_iter, tol, start == "pair")


def check_frank_wolfe(max_iter: int, tol: float, start: str) -> None:
    """Raise where an option of `frank_wolfe` is of the wrong type or out of range."""
    whole("max_iter", max_iter, 0)
    real("tol", tol, 0)
    choice("start", start, STARTS)


def dual_cone(
    gramian: Tensor, combinations: Tensor, mask: Tensor | None = None, noise: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Combinations of the gradients, projected onto their dual cone ``{x: <g_t, x> >= 0 for all t}``, exactly.

    Args:
        gramian: ``[K, T, T]`` float64, symmetric.
        combinations: u, ``[K, R, T]``: R sums ``p = sum_t u_t g_t`` to project. Entries of tasks that do not take part
            count as 0.
        mask: bool ``[K, T]``: which tasks take part; None: all. The entries of the others are not read.
        noise: Relative error of the Gramian's entries, at most 1: its entry ``(i, j)`` may be off by
            ``noise |g_i| |g_j|``. Where that makes ``|x|^2`` uncertain by about 1% of ``|p|^2``, because gradients
            nearly cancel under large weights, or leaves no solution, ``noise T |g_t|^2`` is added to the diagonal: x
            may then conflict by ``sqrt(noise T) |p|``, and no ``(v_t - u_t) |g_t|`` exceeds ``|p| / sqrt(noise T)``.
            0: never.

    Returns:
        The weights v ``[K, R, T]``, float64, of the nearest point ``x = sum_t v_t g_t`` in the cone: the ``v >= u`` of
        least ``|x|``; and ``[K, R]`` how far they are from optimal: the larger of ``sum_t (v_t - u_t) |<g_t, x>|`` and
        ``|p| max_t -<g_t, x> / |g_t|``, 0 at the optimum. All NaN where an entry that takes part is not finite; absent
        tasks have weight 0.

    Raises:
        TypeError, ValueError: ``combinations`` of another shape, ``noise`` out of range.

    Note:
        Cost per combination: an active-set method, a pivot of T^2 / 2 operations for each task to be projected onto, or
        somewhat more; T operations for each non-zero entry of u where p is in the cone. One launch on a GPU. Accuracy:
        see `fastmtl.solvers.dual_cone`.

    Example:
        >>> import torch, fastmtl
        >>> m = torch.tensor([[18., -22.], [-22., 38.]], dtype=torch.float64)
        >>> fastmtl.ops.dual_cone(m[None], torch.eye(2)[None])[0]
        tensor([[[1.0000, 0.5789],
                 [1.2222, 1.0000]]], dtype=torch.float64)
    """
    noise = real("noise", noise, 0, 1)
    if combinations.dim() != 3 or combinations.shape[::2] != gramian.shape[:2]:
        expected = f"[{gramian.shape[0]}, R, {gramian.shape[1]}]"
        raise ValueError(f"combinations: expected shape {expected}, found {list(combinations.shape)}")
    if not _extension.kernels_on(gramian.device.type):
        return reference.dual_cone(gramian, combinations, mask, noise)
    u = combinations.detach().to(gramian.device, torch.float64).contiguous()
    return torch.ops.fastmtl.dual_cone(gramian, mask, u, noise)


def simplex_lp(
    gramian: Tensor,
    objective: Tensor,
    bounds: Tensor,
    extra: Tensor,
    extra_bound: Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The linear program ``max q.w`` over ``w >= 0, sum w = 1, M w >= b, e.w >= f``.

    Args:
        gramian: M, ``[K, T, T]`` float64.
        objective: q, ``[K, T]`` float64.
        bounds: b, ``[K, T]`` float64; -inf: no bound.
        extra: e, ``[K, T]`` float64.
        extra_bound: f, ``[K]`` float64; -inf: no bound.
        mask: bool ``[K, T]``: which tasks take part, as variables and as bounds; None: all.

    Returns:
        The weights ``[K, T]``, and ``[K]``: 0; or, where no w meets the bounds, by how much the weights returned miss
        one of them, in units of its largest coefficient. All NaN where anything that takes part is not finite; 0 where
        no task takes part.

    Note:
        Cost: the simplex method, about T pivots of T^2 operations; one launch on a GPU. Bounds hold, and the objective
        is reached, to about 1e-9 of the largest coefficients.

    Example:
        >>> import torch, fastmtl
        >>> m, q = torch.tensor([[[1., -.5], [-.5, 2.]]]).double(), torch.tensor([[3., 1.]]).double()
        >>> fastmtl.ops.simplex_lp(m, q, 0 * q, 0 * q, torch.zeros(1).double())[0]
        tensor([[0.8000, 0.2000]], dtype=torch.float64)
    """
    if not _extension.kernels_on(gramian.device.type):
        return reference.simplex_lp(gramian, objective, bounds, extra, extra_bound, mask)
    return torch.ops.fastmtl.simplex_lp(gramian, mask, objective, bounds, extra, extra_bound)


def pcgrad(
    gramian: Tensor,
    mask: Tensor | None = None,
    order: Tensor | str = "random",
    rng: Tensor | None = None,
    include_self: bool = False,
    reduction: str = "sum",
) -> Tensor:
    """PCGrad's weights from the Gramian; see `fastmtl.PCGrad` for the method.

    Args:
        gramian: ``[K, T, T]`` float64, symmetric.
        mask: bool ``[K, T]``, or None.
        order: The order in which each task meets the others: ``"random"``, ``"shared"`` (one random order for all
            tasks), ``"fixed"`` (0, 1, ...), or an int64 tensor ``[T, T]`` or ``[K, T, T]`` whose row i is task i's
            permutation of 0..T-1.
        rng: int64 ``[2]``: seed and step, for the random orders. The same pair gives the same orders on every device.
        include_self: Let each task also meet itself, as most public ports do.
        reduction: ``"sum"`` or ``"mean"`` of the projected gradients.

    Returns:
        Weights ``[K, T]`` float64.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction: expected 'sum' or 'mean', found {reduction!r}")
    kind, explicit = _order(order)
    if not _extension.kernels_on(gramian.device.type):
        return reference.pcgrad(gramian, mask, order, rng, include_self, reduction)
    return torch.ops.fastmtl.pcgrad(gramian, mask, explicit, rng, kind, include_self, reduction == "mean")


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
    """GradVac's weights and moved target cosines; see `fastmtl.GradVac` for the method.

    Args:
        gramian: ``[K, T, T]`` float64, symmetric.
        targets: Target cosines ``[K, T, T]`` float64; row i holds those of task i's gradient against the others'.
        mask: bool ``[K, T]``, or None.
        order: As for `pcgrad`.
        rng: As for `pcgrad`.
        beta: Rate of the moving average.
        ema_first: Move the targets before comparing with them.
        ema_always: Move them on every pair (paper); else only where a correction was made.

    Returns:
        Weights ``[K, T]`` and the new targets ``[K, T, T]``, float64.
    """
    kind, explicit = _order(order)
    if not _extension.kernels_on(gramian.device.type):
        return reference.gradvac(gramian, targets, mask, order, rng, beta, ema_first, ema_always)
    return torch.ops.fastmtl.gradvac(gramian, mask, explicit, rng, kind, targets, beta, ema_first, ema_always)


def fairgrad(
    gramian: Tensor, mask: Tensor | None = None, preference: Tensor | None = None, alpha: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Weights under which every task gains as alpha-fairness says; see `fastmtl.FairGrad` for the method.

    Args:
        gramian: ``[K, T, T]`` float64, symmetric.
        mask: bool ``[K, T]``, or None.
        preference: p, ``[T]``, any floating dtype, not negative (not checked here, which would synchronise); a task of
            preference 0 counts as absent. None: 1 for each.
        alpha: The degree of fairness, 0.1 to 10. 1: the Nash bargaining solution.

    Returns:
        The weights ``[K, T]`` float64, above 0, with ``(Mw)_t = (w_t / p_t)^(-1/alpha)``, and the largest error ``[K]``
        of these equations, each relative to the sum of the absolute terms of ``(Mw)_t``. Where there is no solution (0
        lies in the convex hull of the gradients, to the precision of float64): 0, and inf. All NaN where an entry that
        takes part is not finite; all 0 where no task takes part.

    Raises:
        TypeError: ``alpha`` is not a number.
        ValueError: ``alpha`` is out of range, or ``preference`` of another shape.

    Note:
        Cost: Newton's method, T^3 / 6 multiply-adds a step; 4 to 8 steps for alpha = 1, see `fastmtl.solvers.fairgrad`;
        one launch on a GPU.

    Example:
        >>> import torch, fastmtl
        >>> w, error = fastmtl.ops.fairgrad(torch.diag(torch.tensor([1., 2., 4.], dtype=torch.float64) ** 2)[None])
        >>> w
        tensor([[1.0000, 0.5000, 0.2500]], dtype=torch.float64)
    """
    check_alpha(alpha)
    if preference is not None:
        if preference.shape != gramian.shape[1:2]:
            raise ValueError(f"preference: expected shape [{gramian.shape[1]}], found {list(preference.shape)}")
        preference = preference.detach().to(gramian.device, torch.float64).contiguous()
    if not _extension.kernels_on(gramian.device.type):
        return reference.fairgrad(gramian, mask, preference, alpha)
    return torch.ops.fastmtl.fairgrad(gramian, mask, preference, alpha)


def cagrad(gramian: Tensor, mask: Tensor | None = None, c: float = 0.4) -> tuple[Tensor, Tensor]:
    """CAGrad's weights, exactly; see `fastmtl.CAGrad` for the method.

    Args:
        gramian: ``[K, T, T]`` float64, symmetric.
        mask: bool ``[K, T]``, or None.
        c: The radius of the ball around the mean gradient, in units of its norm; at least 0.

    Returns:
        The weights ``[K, T]`` float64, ``1/T + lambda w``, and the duality gap ``[K]``: how much larger the least gain
        of a direction in the ball could be at most. All NaN where an entry that takes part is not finite; all 0 where
        no task takes part.

    Raises:
        TypeError, ValueError: ``c`` is not a number, or out of range.

    Note:
        Cost: a few min-norm problems; one launch on a GPU. See `fastmtl.solvers.cagrad`.

    Example:
        >>> import torch, fastmtl
        >>> g = torch.tensor([[-4., 1., 1.], [6., 1., 1.]])
        >>> fastmtl.ops.cagrad(fastmtl.ops.gram(g), c=0.5)[0]
        tensor([[0.7041, 0.5000]], dtype=torch.float64)
    """
    real("c", c, 0)
    if not _extension.kernels_on(gramian.device.type):
        return reference.cagrad(gramian, mask, c)
    return torch.ops.fastmtl.cagrad(gramian, mask, c)


def check_alpha(alpha: float) -> float:
    """The degree of fairness of `fairgrad`, as a float; raises where it is of the wrong type or out of range."""
    return real("alpha", alpha, 0.1, 10)


def aligned_mtl(
    gramian: Tensor, mask: Tensor | None = None, preference: Tensor | None = None, scale_mode: str = "min"
) -> Tensor:
    """AlignedMTL's weights from the Gramian; see `fastmtl.AlignedMTL` for the method.

    Args:
        gramian: ``[K, T, T]`` float64, symmetric.
        mask: bool ``[K, T]``, or None.
        preference: ``[T]`` or ``[K, T]``: the weights before the alignment; None: one over the number of present tasks.
        scale_mode: ``"min"``, ``"median"`` or ``"rmse"``.

    Returns:
        Weights ``[K, T]`` float64.

    Raises:
        ValueError: An unknown mode, or a preference of another shape.

    Note:
        Cost: 2 T^3 multiply-adds, and about 0.8 T^2 rotations one after the other; one launch on a GPU, where more than
        some 100 tasks are slow.
    """
    choice("scale_mode", scale_mode, SCALE_MODES)
    if not _extension.kernels_on(gramian.device.type):
        return reference.aligned_mtl(gramian, mask, preference, scale_mode)
    return torch.ops.fastmtl.spectral(gramian, mask, _per_task("preference", preference, gramian), RULES[scale_mode])


def equal_cosines(
    gramian: Tensor, mask: Tensor | None = None, preference: Tensor | None = None, length: str = "projections"
) -> Tensor:
    """Weights of the direction that has the same cosine with every gradient: `fastmtl.ConFIG`, `fastmtl.IMTLG`.

    Args:
        gramian: ``[K, T, T]`` float64, symmetric.
        mask: bool ``[K, T]``, or None.
        preference: ``[T]`` or ``[K, T]``: what the cosines are in proportion to; None: all the same.
        length: Of the direction: ``"projections"``: the sum of the gradients' projections onto it (ConFIG);
            ``"sum_to_one"``: the weights sum to 1 (IMTL-G).

    Returns:
        Weights ``[K, T]`` float64. Gradients of zero, which have no cosine, have weight 0. Where gradients depend on
        each other such that no direction has those cosines, they hold in the sense of least squares; all weights are 0
        where nothing of them is left.

    Raises:
        ValueError: An unknown length, or a preference of another shape.

    Note:
        Cost: T^3 / 2 multiply-adds; for dependent gradients besides what `aligned_mtl` costs. One launch on a GPU.
    """
    choice("length", length, LENGTHS)
    if not _extension.kernels_on(gramian.device.type):
        return reference.equal_cosines(gramian, mask, preference, length)
    return torch.ops.fastmtl.spectral(gramian, mask, _per_task("preference", preference, gramian), RULES[length])


def krum(
    gramian: Tensor,
    mask: Tensor | None = None,
    num_byzantine: int = 0,
    num_selected: int = 1,
    distance: str = "squared",
) -> Tensor:
    """Krum's weights from the Gramian; see `fastmtl.Krum` for the method.

    Args:
        gramian: ``[K, T, T]`` float64, symmetric.
        mask: bool ``[K, T]``, or None.
        num_byzantine: f, at least 0: a score adds up the distances to the ``n - f - 2`` closest of n present tasks, at
            least to one.
        num_selected: How many tasks have equal weights, at least 1; at most n.
        distance: ``"squared"`` or ``"euclidean"``.

    Returns:
        Weights ``[K, T]`` float64.

    Raises:
        TypeError, ValueError: An option of the wrong type or out of range.

    Note:
        Cost: T^2 log T operations; one launch on a GPU.
    """
    check_krum(num_byzantine, num_selected, distance)
    if not _extension.kernels_on(gramian.device.type):
        return reference.krum(gramian, mask, num_byzantine, num_selected, distance)
    euclidean = distance == "euclidean"
    return torch.ops.fastmtl.krum(gramian, mask, num_byzantine, num_selected, euclidean)


def check_krum(num_byzantine: int, num_selected: int, distance: str) -> None:
    """Raise where an option of `krum` is of the wrong type or out of range."""
    whole("num_byzantine", num_byzantine, 0)
    whole("num_selected", num_selected, 1)
    choice("distance", distance, DISTANCES)


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
    """Weights after projected gradient steps on the simplex: ``w - lr v``, projected, with ``v = A (w + pull) + ...``.

    In each step ``v <- momentum v + A (w + pull) + ridge w``, from ``v = 0``, and w becomes the nearest point to
    ``w - lr v`` that is not negative and has the sum of w.

    Args:
        gramian: ``[K, B T, B T]`` float64, symmetric, of T tasks on B batches of data, one batch after the other. With
            one batch it is A; with more, A are the products of the first batch's gradients with the second's. A task
            takes part where it is present in all batches.
        start: w, ``[K, T]`` float64, not negative; tasks that do not take part keep what they have.
        mask: bool ``[K, B T]``, or None.
        pull: ``[K, T]`` float64; None: 0.
        lr: Step size.
        momentum: 0 to below 1.
        ridge: Pull towards equal weights.
        num_steps: How many steps.
        scale_free: Divide A by the square of the mean norm, with ``A_tt`` as squared norms, where they are above 0.
        rate: One number ``[1]`` float64 on the device that multiplies ``lr``; None: 1.

    Returns:
        ``[K, T]`` float64; all NaN where what takes part is not finite.

    Raises:
        ValueError: Weights of a shape that does not fit.

    Note:
        Cost: T^2 multiply-adds a step; one launch on a GPU.

    Example:
        >>> import torch, fastmtl
        >>> m, w = torch.diag(torch.tensor([1., 4.])).double()[None], torch.full((1, 2), 0.5).double()
        >>> fastmtl.ops.projected_gradient(m, w, lr=0.1, num_steps=100)  # MGDA's
        tensor([[0.8000, 0.2000]], dtype=torch.float64)
    """
    if not _extension.kernels_on(gramian.device.type):
        return reference.projected_gradient(
            gramian, start, mask, pull, lr, momentum, ridge, num_steps, scale_free, rate
        )
    return torch.ops.fastmtl.projected_gradient(
        gramian, mask, start, pull, rate, lr, momentum, ridge, num_steps, scale_free
    )


def random_weights(rng: Tensor, present: Tensor, distribution: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random weights that sum to 1 over the present tasks; see `fastmtl.random.random_weights`.

    Args:
        rng: int64 ``[2]``: seed and step.
        present: bool ``[K, T]``.
        distribution: One of ``fastmtl.random.DISTRIBUTIONS``.
        dtype: Of the result.

    Returns:
        ``[K, T]``, 0 for absent tasks: the same on all devices, to rounding.

    Raises:
        TypeError, ValueError: An unknown distribution.

    Note:
        Cost: ten rounds of multiplications per task; one launch on a GPU.
    """
    choice("distribution", distribution, DISTRIBUTIONS)
    if dtype != torch.float64 or not _extension.kernels_on(present.device.type):
        return reference.random_weights(rng, present, distribution, dtype)
    return torch.ops.fastmtl.random_weights(present, rng, DISTRIBUTIONS.index(distribution))


def _per_task(name: str, values: Tensor | None, gramian: Tensor) -> Tensor | None:
    """Numbers ``[T]`` or ``[K, T]`` as the operators take them; ValueError for another shape."""
    if values is None:
        return None
    if values.shape not in (gramian.shape[:2], gramian.shape[1:2]):
        expected = f"[{gramian.shape[0]}, {gramian.shape[1]}] or [{gramian.shape[1]}]"
        raise ValueError(f"{name}: expected shape {expected}, found {list(values.shape)}")
    return values.detach().to(gramian.device, torch.float64).expand(gramian.shape[:2]).contiguous()


def _order(order: Tensor | str) -> tuple[int, Tensor | None]:
    if isinstance(order, Tensor):
        return ORDERS["fixed"], order
    if order not in ORDERS:
        raise ValueError(f"order: expected a tensor or one of {sorted(ORDERS)}, found {order!r}")
    return ORDERS[order], None


def is_symmetric(gramian: Tensor) -> bool:
    """Whether a matrix may be a Gramian: symmetric up to the rounding of float32, relative to its diagonal.

    Args:
        gramian: ``[K, T, T]`` float64, contiguous. Entries that are not finite do not count.

    Note:
        Cost: one read; synchronises with the host on a GPU.
    """
    if gramian.device.type == "cpu" and _extension.kernels_on("cpu"):
        return torch.ops.fastmtl.is_symmetric(gramian)  # type: ignore[no-any-return]
    return reference.is_symmetric(gramian)


def _register() -> None:
    """Shapes for tracing, and a clear error where somebody differentiates."""

    def gram_fake(
        rows: list, num_tasks: int, stacked: bool, groups: list | None, num_groups: int, fast: bool = False
    ) -> Tensor:
        first = next(r for r in rows if r is not None)
        return first.new_empty((num_groups, num_tasks, num_tasks), dtype=torch.float64)

    def combine_fake(
        rows: list, num_tasks: int, stacked: bool, groups: list | None, weights: Tensor, widen: bool = False
    ) -> list:
        if stacked:
            return [dense_like(r[0], widen) for r in rows]
        per_param = [rows[i : i + num_tasks] for i in range(0, len(rows), num_tasks)]
        return [dense_like(next(r for r in param if r is not None), widen) for param in per_param]

    def grad_drop_fake(
        rows: list,
        num_tasks: int,
        stacked: bool,
        groups: list | None,
        weights: Tensor,
        rng: Tensor,
        leak: Tensor | None,
        widen: bool = False,
    ) -> list:
        return combine_fake(rows, num_tasks, stacked, groups, weights, widen)

    def trimmed_mean_fake(
        rows: list,
        num_tasks: int,
        stacked: bool,
        groups: list | None,
        weights: Tensor,
        trim: int,
        widen: bool = False,
    ) -> list:
        return combine_fake(rows, num_tasks, stacked, groups, weights, widen)

    def dense_like(row: Tensor, widen: bool) -> Tensor:
        dtype = torch.float32 if widen and row.dtype.itemsize == 2 else row.dtype
        like = torch.empty_like(row, dtype=dtype)
        if like.stride() == row.stride():
            return like
        return torch.empty_like(row, dtype=dtype, memory_format=torch.contiguous_format)  # rows with gaps are copied

    def nothing(*args: Any) -> None:
        return None

    def yes(gramian: Tensor) -> bool:
        return True

    def weights_fake(gramian: Tensor, *args: Any) -> Tensor:
        return gramian.new_empty(gramian.shape[:2])

    def min_norm_fake(gramian: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        return gramian.new_empty(gramian.shape[:2]), gramian.new_empty(gramian.shape[:1])

    def dual_cone_fake(gramian: Tensor, mask: Tensor | None, u: Tensor, noise: float) -> tuple[Tensor, Tensor]:
        return torch.empty_like(u), u.new_empty(u.shape[:2])

    def gradvac_fake(gramian: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        return gramian.new_empty(gramian.shape[:2]), torch.empty_like(gramian)

    def start_fake(gramian: Tensor, mask: Tensor | None, start: Tensor, *args: Any) -> Tensor:
        return torch.empty_like(start)

    def present_fake(present: Tensor, rng: Tensor, distribution: int) -> Tensor:
        return present.new_empty(present.shape, dtype=torch.float64)

    fakes = {
        "gram": gram_fake,
        "combine": combine_fake,
        "combine_": nothing,
        "grad_drop": grad_drop_fake,
        "trimmed_mean": trimmed_mean_fake,
        "min_norm": min_norm_fake,
        "frank_wolfe": min_norm_fake,
        "dual_cone": dual_cone_fake,
        "simplex_lp": min_norm_fake,
        "pcgrad": weights_fake,
        "gradvac": gradvac_fake,
        "spectral": weights_fake,
        "fairgrad": min_norm_fake,
        "cagrad": min_norm_fake,
        "krum": weights_fake,
        "projected_gradient": start_fake,
        "random_weights": present_fake,
        "is_symmetric": yes,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"fastmtl::{name}", fake)  # type: ignore[arg-type]
        if name not in ("combine_", "is_symmetric"):
            torch.library.register_autograd(f"fastmtl::{name}", _not_differentiable(name))


def _not_differentiable(name: str) -> Any:
    def backward(ctx: Any, *grads: Any) -> Any:
        hint = f"; fastmtl.reference.{name} is" if name in ("gram", "combine") else ""
        raise RuntimeError(f"fastmtl.ops.{name} is not differentiable{hint}")

    return backward


if _extension.module is not None:
    _register()
