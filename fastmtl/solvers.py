"""The T x T solvers on NumPy arrays, without torch: what the gradient methods compute from a Gramian.

A Gramian here is any stack ``[..., T, T]`` of symmetric matrices of inner products ``<g_i, g_j>``. The solvers are the
compiled ones that `fastmtl.ops` runs on CPU tensors; the problems of a stack are solved in parallel, without the GIL.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastmtl import _extension
from fastmtl.checks import choice, real, whole


class _Missing:
    """In the extension's place: the package imports without it, only these solvers do not work."""

    def __getattr__(self, name: str) -> Any:
        raise ImportError(
            f"fastmtl.solvers needs the compiled extension ({_extension.missing_because}). Cure: {_extension.CURE}"
        )


_C: Any = _extension.module or _Missing()

__all__ = [
    "aligned_mtl",
    "cagrad",
    "dual_cone",
    "equal_cosines",
    "fairgrad",
    "frank_wolfe",
    "gradvac",
    "krum",
    "min_norm",
    "pcgrad",
    "projected_gradient",
    "random_weights",
    "simplex_lp",
    "visiting_order",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DISTRIBUTIONS = ("normal", "uniform", "dirichlet", "bernoulli", "constrained_bernoulli")
_ORDERS = {"random": 0, "fixed": 1, "shared": 2}


def min_norm(
    gramian: ArrayLike, mask: ArrayLike | None = None, lower_bounds: ArrayLike | None = None
) -> tuple[Floats, Floats]:
    """Find the point of smallest norm in the convex hull of the gradients, exactly.

    Minimises ``w^T M w`` over ``w >= lower_bounds``, ``sum(w) = 1``: the weights of MGDA, and with bounds of PE-LTR.

    Args:
        gramian: ``[..., T, T]``, symmetric.
        mask: bool ``[..., T]``: which tasks take part; None: all. Entries of the others are not used, and may be NaN.
        lower_bounds: c, ``[..., T]`` or ``[T]``: what the weights may not fall below, 0 to 1, of sum at most 1. Those
            of tasks that do not take part count as 0. None: 0.

    Returns:
        Weights ``[..., T]``, and the duality gap ``[...]``: ``|x|^2 - min_t <g_t, x>`` for ``x = sum_t w_t g_t``, twice
        which bounds from above how far ``|x|^2`` is from the optimum; at most 1e-9 of the smallest squared norm where
        the Gramian has full rank and the norms are within a factor 1e5. With bounds, and ``s = 1 - sum c``, it is
        ``sum_t (w_t - c_t) <g_t, x> - s min_t <g_t, x>``; at most 1e-9 of the smallest ``|sum_t c_t g_t + s g_i|^2``.
        Without bounds, a task with zero gradient takes all the weight. An absent task has weight 0; with no task
        present, all weights and the gap are 0. Where an entry that takes part is not finite, all are NaN.

    Raises:
        TypeError: An argument is not of real numbers or bool, as described.
        ValueError: A shape does not fit, ``gramian`` is not symmetric, or a bound is out of range; the message shows
            what was found.

    Note:
        Cost: 1 to 2 pivots per task of the solution, each T^2 / 2 multiply-adds. Accuracy of the weights with bounds,
        against exact rational arithmetic on random Gramians of full rank: 1e-13, however little the bounds leave;
        with gradients that differ by 1e-4 of their length, 1e-8.

    Reference:
        Désidéri: Multiple-gradient descent algorithm. 2012. Bounds: Lin et al.: A Pareto-Efficient Algorithm for
        Multiple Objective Optimization in E-Commerce Recommendation. RecSys 2019. The solvers are primal active-set
        methods of our own (csrc/solvers/active_set.h), not the Frank-Wolfe iteration of Sener and Koltun, NeurIPS 2018
        (that is `frank_wolfe`).

    Example:
        >>> w, gap = min_norm(np.diag([1.0, 4.0, 9.0]))
        >>> w.round(4)
        array([0.7347, 0.1837, 0.0816])
        >>> bool(gap < 1e-12)
        True
        >>> min_norm(np.diag([1.0, 4.0, 9.0]), lower_bounds=[0.0, 0.0, 0.4])[0].round(4)
        array([0.48, 0.12, 0.4 ])
    """
    m, present, batch = _problems(gramian, mask)
    bounds = None if lower_bounds is None else _lower_bounds(lower_bounds, (*batch, m.shape[-1]))
    weights, gap = _C.min_norm(m, present, None if bounds is None else bounds.reshape(m.shape[:2]))
    return weights.reshape(*batch, m.shape[-1]), gap.reshape(batch)


def dual_cone(
    gramian: ArrayLike, combinations: ArrayLike, mask: ArrayLike | None = None, noise: float = 0.0
) -> tuple[Floats, Floats]:
    """Project combinations of the gradients onto their dual cone ``{x: <g_t, x> >= 0 for all t}``, exactly.

    Minimises ``v^T M v`` over ``v >= u``, which gives the nearest point ``x = sum_t v_t g_t`` to ``p = sum_t u_t g_t``:
    DualProj's weights for ``u = 1/T``, and UPGrad's as the sum of those for the rows of ``eye(T) / T``.

    Args:
        gramian: ``[..., T, T]``, symmetric.
        combinations: u, ``[..., R, T]``, or ``[..., T]`` for one. Entries of tasks that do not take part count as 0.
        mask: bool ``[..., T]``: which tasks take part; None: all. Entries of the others are not used, and may be NaN.
        noise: Relative error of the Gramian's entries, 0 to 1, to be guarded against: 5e-7 fits gradients in float32.
            See `fastmtl.ops.dual_cone`.

    Returns:
        Weights v, of the shape of ``combinations``, and ``[..., R]`` (or ``[...]``) how far they are from optimal: the
        larger of ``sum_t (v_t - u_t) |<g_t, x>|`` and ``|p| max_t -<g_t, x> / |g_t|``. With ``noise=0`` that is at most
        1e-9 of ``|p|^2``, or what rounding in float64 makes of it, about ``1e-15 (sum_t v_t |g_t|)^2``, if that is
        more. Where the gradients are dependent x is unique but v is not. Where an entry that takes part is not finite,
        all are NaN.

    Raises:
        TypeError: An argument is not of real numbers or bool, as described.
        ValueError: A shape does not fit, ``gramian`` is not symmetric, or ``noise`` is out of range.

    Note:
        Cost per combination: a pivot of T^2 / 2 multiply-adds for each task to be projected onto, or somewhat more;
        next to nothing where p is in the cone.

    Reference:
        Quinton, Rey: Jacobian Descent for Multi-Objective Optimization. arXiv:2406.16232, 2024: the quadratic
        program. The solver is a primal active-set method of our own (csrc/solvers/active_set.h).

    Example:
        >>> J = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> dual_cone(J @ J.T, np.eye(2))[0].round(4)
        array([[1.    , 0.5789],
               [1.2222, 1.    ]])
    """
    noise = real("noise", noise, 0, 1)
    m, present, batch = _problems(gramian, mask)
    u = _real("combinations", combinations)
    shape, num_tasks = u.shape, m.shape[-1]
    if shape[: len(batch)] != batch or u.ndim - len(batch) not in (1, 2) or shape[-1] != num_tasks:
        expected = f"{[*batch, 'R', num_tasks]} or {[*batch, num_tasks]}".replace("'", "")
        raise ValueError(f"combinations: expected shape {expected}, found {list(shape)}")
    count = shape[len(batch)] if u.ndim - len(batch) == 2 else 1
    weights, gap = _C.dual_cone(m, present, u.reshape(len(m), count, num_tasks), noise)
    return weights.reshape(shape), gap.reshape(shape[:-1])


def frank_wolfe(
    gramian: ArrayLike,
    mask: ArrayLike | None = None,
    max_iter: int = 250,
    tol: float = 1e-5,
    start: str = "uniform",
) -> tuple[Floats, Floats]:
    """Go towards the point that `min_norm` finds exactly, by Frank-Wolfe steps.

    Args:
        gramian: ``[..., T, T]``, symmetric.
        mask: bool ``[..., T]``: which tasks take part; None: all. Entries of the others are not used.
        max_iter: The largest number of steps.
        tol: Stop where a step has changed the weights by less than this, in sum.
        start: ``"uniform"`` (paper): equal weights; ``"pair"`` (its public code): the shortest point between two tasks.

    Returns:
        Weights ``[..., T]`` and the duality gap ``[...]``, as `min_norm`.

    Raises:
        TypeError: As for `min_norm`, or an option is of the wrong type.
        ValueError: As for `min_norm`, or an option is out of range.

    Note:
        Cost: T operations a step. The gap falls as 1 / steps only.

    Reference:
        Sener, Koltun: Multi-Task Learning as Multi-Objective Optimization. NeurIPS 2018, Algorithms 1 and 2. Their
        public code also keeps a step within 0.001 to 0.999 where it should be 0 or 1, which we do not.

    Example:
        >>> frank_wolfe(np.diag([1.0, 4.0, 9.0]))[0].round(2)
        array([0.73, 0.18, 0.08])
    """
    max_iter, tol = whole("max_iter", max_iter, 0), real("tol", tol, 0)
    choice("start", start, ("uniform", "pair"))
    m, present, batch = _problems(gramian, mask)
    weights, gap = _C.frank_wolfe(m, present, max_iter, tol, start == "pair")
    return weights.reshape(*batch, m.shape[-1]), gap.reshape(batch)


def pcgrad(
    gramian: ArrayLike,
    order: str | ArrayLike | None = None,
    seed: int = 0,
    step: int = 0,
    mask: ArrayLike | None = None,
    include_self: bool = False,
    reduction: str = "sum",
) -> Floats:
    """Weights of PCGrad: every gradient, freed of its conflicts with the others, summed.

    Args:
        gramian: ``[..., T, T]``, symmetric.
        order: In which order each task meets the others: ``"random"`` (also None), ``"shared"`` (one random order for
            all tasks), ``"fixed"`` (0, 1, ..), or int ``[T, T]`` or ``[..., T, T]`` whose row i is task i's permutation
            of 0..T-1.
        seed: Of the random orders.
        step: Also of the random orders: a new value gives new ones. The same (seed, step) gives the same orders as on
            every device of `fastmtl.ops`.
        mask: bool ``[..., T]``: which tasks take part; None: all. Entries of the others are not used.
        include_self: Let each task also meet itself in its order, as most public ports do: it matters where a projected
            gradient has turned against its own original.
        reduction: ``"sum"`` (paper) or ``"mean"`` over the tasks that take part.

    Returns:
        Weights ``[..., T]``; 0 for absent tasks; all NaN where an entry that takes part is not finite.

    Raises:
        TypeError: An array is not of real numbers, bool or integers, as described.
        ValueError: A shape does not fit, ``gramian`` is not symmetric, a row of ``order`` is no permutation, or an
            option is unknown; the message shows what was found.

    Note:
        Cost: at most T^3 multiply-adds. Deterministic for given (seed, step) or order.

    Reference:
        Yu et al.: Gradient Surgery for Multi-Task Learning. NeurIPS 2020, Algorithm 1.

    Example:
        >>> J = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> pcgrad(J @ J.T).round(4)
        array([2.2222, 1.5789])
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction: expected 'sum' or 'mean', found {reduction!r}")
    m, present, batch = _problems(gramian, mask)
    kind, explicit = _order(order, batch, m.shape[-1])
    seed, step = _int64("seed", seed), _int64("step", step)
    weights: Floats = _C.pcgrad(m, present, kind, explicit, seed, step, include_self, reduction == "mean")
    return weights.reshape(*batch, m.shape[-1])


def gradvac(
    gramian: ArrayLike,
    targets: ArrayLike | None = None,
    beta: float = 0.01,
    order: str | ArrayLike | None = None,
    seed: int = 0,
    step: int = 0,
    mask: ArrayLike | None = None,
    ema_first: bool = False,
    ema_always: bool = True,
) -> tuple[Floats, Floats]:
    """Weights of GradVac: every gradient, turned to a target cosine with each of the others, summed.

    Args:
        gramian: ``[..., T, T]``, symmetric.
        targets: Target cosines ``[..., T, T]``: row i holds those of task i's gradient against the others'. None:
            zeros, as on the paper's first step, which equals PCGrad.
        beta: Rate of the targets' moving average, 0 to 1.
        order: As for `pcgrad`.
        seed: As for `pcgrad`.
        step: As for `pcgrad`.
        mask: bool ``[..., T]``: which tasks take part; None: all. Targets of the others stay as they are.
        ema_first: Move the targets before they are compared with; the paper moves them after.
        ema_always: Move them on every pair (paper); False: only where a correction is made.

    Returns:
        Weights ``[..., T]``, and the targets ``[..., T, T]`` after the step. Where an entry of the Gramian that takes
        part is not finite, the weights are NaN and the targets as they were.

    Raises:
        TypeError: As for `pcgrad`.
        ValueError: As for `pcgrad`, or ``beta`` is outside of 0 to 1.

    Note:
        Cost: at most T^3 multiply-adds, and T^2 cosines. Deterministic for given (seed, step) or order.

    Reference:
        Wang, Tsvetkov, Firat, Cao: Gradient Vaccine. ICLR 2021, Algorithm 1 and equation 3. Where the paper's formula
        has no value we differ: targets count as at most 1 - 1e-6, and a gradient of zero norm, or one that its
        corrections have shrunk to less than 1e-6 of what they added up, is passed over and moves no target.

    Example:
        >>> J = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> weights, targets = gradvac(J @ J.T)
        >>> weights.round(4)
        array([2.2222, 1.5789])
        >>> targets.round(4)
        array([[ 0.    , -0.0084],
               [-0.0084,  0.    ]])
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: expected 0 to 1, found {beta}")
    m, present, batch = _problems(gramian, mask)
    kind, explicit = _order(order, batch, m.shape[-1])
    before = np.zeros_like(m) if targets is None else _real("targets", targets)
    if targets is not None and before.shape != (*batch, *m.shape[-2:]):
        raise ValueError(f"targets: expected shape {[*batch, *m.shape[-2:]]}, found {list(before.shape)}")
    seed, step = _int64("seed", seed), _int64("step", step)
    weights, after = _C.gradvac(
        m, before.reshape(m.shape), present, kind, explicit, seed, step, beta, ema_first, ema_always
    )
    return weights.reshape(*batch, m.shape[-1]), after.reshape(*batch, *m.shape[-2:])


def cagrad(gramian: ArrayLike, c: float = 0.4, mask: ArrayLike | None = None) -> tuple[Floats, Floats]:
    """Find the direction near the mean gradient whose least gain is largest, exactly.

    With the mean gradient ``g_0``, ``d = sum_t w_t g_t`` maximises ``min_t <g_t, d>`` over ``|d - g_0| <= c |g_0|``.

    Args:
        gramian: ``[..., T, T]``, symmetric.
        c: At least 0; 0 gives the mean.
        mask: bool ``[..., T]``: which tasks take part; None: all. Entries of the others are not used, and may be NaN.

    Returns:
        Weights ``[..., T]``, and the duality gap ``[...]``: how much larger the least gain could be at most. An absent
        task has weight 0; with no task present, all are 0. Where an entry that takes part is not finite, all are NaN.

    Raises:
        TypeError: An argument is not of real numbers or bool, as described.
        ValueError: A shape does not fit, ``gramian`` is not symmetric, or ``c`` is negative; the message shows what was
            found.

    Note:
        Cost: on random problems 2 to 6 times `min_norm`. Where the optimum is ``g_w = 0`` (0 in the convex hull of the
        gradients) every d in the ball that conflicts with nobody is as good; it is then the one nearest to ``g_0``.

    Reference:
        Liu, Liu, Jin, Stone, Liu: Conflict-Averse Gradient Descent for Multi-Task Learning. NeurIPS 2021, equation 4.
        The solver is our own (csrc/solvers/cagrad.h).

    Example:
        >>> J = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> cagrad(J @ J.T, c=0.5)[0].round(4)
        array([0.7041, 0.5   ])
    """
    c = real("c", c, 0)
    m, present, batch = _problems(gramian, mask)
    weights, gap = _C.cagrad(m, present, c)
    return weights.reshape(*batch, m.shape[-1]), gap.reshape(batch)


def fairgrad(
    gramian: ArrayLike, alpha: float = 1.0, preference: ArrayLike | None = None, mask: ArrayLike | None = None
) -> tuple[Floats, Floats]:
    """Find the weights under which every task gains as alpha-fairness says, exactly.

    Solves ``(Mw)_t = (w_t / p_t)^(-1/alpha)``, ``w > 0``. The direction ``d = sum_t w_t g_t`` maximises, among all of
    its length, ``sum_t p_t <g_t, d>^(1-alpha) / (1-alpha)``; for alpha = 1 ``sum_t p_t log <g_t, d>``: the Nash
    bargaining solution.

    Args:
        gramian: ``[..., T, T]``, symmetric.
        alpha: The degree of fairness, 0.1 to 10: towards 0 the largest sum of the gains, towards infinity the largest
            of the least gains.
        preference: p, ``[T]``: not negative; a task of preference 0 does not take part. None: 1 for each.
        mask: bool ``[..., T]``: which tasks take part; None: all. Entries of the others are not used, and may be NaN.

    Returns:
        Weights ``[..., T]``, and the largest error ``[...]`` of the equations above, each relative to the sum of the
        absolute terms of ``(Mw)_t``. Where there is no solution, since 0 lies in the convex hull of the gradients, up
        to the precision of float64, the weights are 0 and the error is inf. An absent task has weight 0; with no task
        present, the error is 0, too. Where an entry that takes part is not finite, all are NaN.

    Raises:
        TypeError: An argument is not of real numbers or bool, as described.
        ValueError: A shape does not fit, ``gramian`` is not symmetric, or a number is out of range; the message shows
            what was found.

    Note:
        Cost: T^3 / 6 multiply-adds for a step of Newton's method. Steps: 4 to 8 for alpha = 1, whatever the gradients;
        7 to 14 for any alpha where their norms are alike; up to about 70 for alpha = 0.1 or 10 and norms over a factor
        of 400. Beyond that, for alpha below 0.3, there may be no solution in float64: the products of a solution then
        are below the rounding of the terms that they are summed from.

    Reference:
        Ban, Ji: Fair Resource Allocation in Multi-Task Learning. ICML 2024, equation 4. Navon et al.: Multi-Task
        Learning as a Bargaining Game. ICML 2022, equation 2. Preferences, in neither: Mo, Walrand: Fair End-to-End
        Window-Based Congestion Control. IEEE/ACM Transactions on Networking 8, 2000, (p, alpha)-proportional fairness.
        The solver is a primal-dual Newton method of our own
        (csrc/solvers/fairgrad.h), not the least squares of the former or the convex programs of the latter.

    Example:
        >>> J = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> w, error = fairgrad(J @ J.T)
        >>> w.round(4)
        array([0.5915, 0.4071])
        >>> (w * (J @ J.T @ w)).round(4)
        array([1., 1.])
    """
    alpha = real("alpha", alpha, 0.1, 10)
    m, present, batch = _problems(gramian, mask)
    p = None if preference is None else _preference(preference, m.shape[-1])
    weights, error = _C.fairgrad(m, present, p, alpha)
    return weights.reshape(*batch, m.shape[-1]), error.reshape(batch)


def aligned_mtl(
    gramian: ArrayLike, mask: ArrayLike | None = None, preference: ArrayLike | None = None, scale_mode: str = "min"
) -> Floats:
    """Weights of AlignedMTL: the gradients' principal components brought to one length.

    Args:
        gramian: ``[..., T, T]``, symmetric.
        mask: bool ``[..., T]``: which tasks take part; None: all. Entries of the others are not used.
        preference: ``[..., T]`` or ``[T]``: the weights before the alignment; None: one over the number of the tasks
            that take part.
        scale_mode: The components' common squared length: the ``"min"`` (paper), ``"median"`` or mean (``"rmse"``) of
            the Gramian's eigenvalues.

    Returns:
        Weights ``[..., T]``; 0 for absent tasks; all NaN where an entry that takes part is not finite.

    Raises:
        TypeError: An array is not of real numbers or bool, as described.
        ValueError: A shape does not fit, ``gramian`` is not symmetric, or the mode is unknown.

    Note:
        Cost: 2 T^3 multiply-adds, and about 0.8 T^2 rotations.

    Reference:
        Senushkin et al.: Independent Component Alignment for Multi-Task Learning. CVPR 2023, Algorithm 1; see
        `fastmtl.AlignedMTL`.

    Example:
        >>> J = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> aligned_mtl(J @ J.T).round(4)
        array([0.5591, 0.4083])
    """
    rule = ("min", "median", "rmse").index(choice("scale_mode", scale_mode, ("min", "median", "rmse")))
    return _spectral(gramian, mask, preference, rule)


def equal_cosines(
    gramian: ArrayLike,
    mask: ArrayLike | None = None,
    preference: ArrayLike | None = None,
    length: str = "projections",
) -> Floats:
    """Weights of the direction that has the same cosine with every gradient: ConFIG, IMTL-G.

    Args:
        gramian: ``[..., T, T]``, symmetric.
        mask: bool ``[..., T]``: which tasks take part; None: all. Entries of the others are not used.
        preference: ``[..., T]`` or ``[T]``: what the cosines are in proportion to; None: all the same.
        length: Of the direction: ``"projections"``: the sum of the gradients' projections onto it (ConFIG);
            ``"sum_to_one"``: the weights sum to 1 (IMTL-G).

    Returns:
        Weights ``[..., T]``; 0 for absent tasks and for gradients of zero; all NaN where an entry that takes part is
        not finite. Where gradients depend on each other such that no direction has those cosines, they hold in the
        sense of least squares; all weights are 0 where nothing of them is left.

    Raises:
        TypeError: An array is not of real numbers or bool, as described.
        ValueError: A shape does not fit, ``gramian`` is not symmetric, or the length is unknown.

    Note:
        Cost: T^3 / 2 multiply-adds; for dependent gradients besides what `aligned_mtl` costs.

    Reference:
        Liu, Chu, Thuerey: ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks. ICLR 2025; Liu et
        al.: Towards Impartial Multi-task Learning. ICLR 2021; see `fastmtl.ConFIG`, `fastmtl.IMTLG`.

    Example:
        >>> J = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> equal_cosines(J @ J.T, length="sum_to_one").round(4)
        array([0.5923, 0.4077])
    """
    rule = 3 + ("projections", "sum_to_one").index(choice("length", length, ("projections", "sum_to_one")))
    return _spectral(gramian, mask, preference, rule)


def _spectral(gramian: ArrayLike, mask: ArrayLike | None, preference: ArrayLike | None, rule: int) -> Floats:
    m, present, batch = _problems(gramian, mask)
    shape = (*batch, m.shape[-1])
    right = None
    if preference is not None:
        right = _real("preference", preference)
        if right.shape not in (shape, shape[-1:]):
            expected = " or ".join(str(list(s)) for s in dict.fromkeys((shape, shape[-1:])))
            raise ValueError(f"preference: expected shape {expected}, found {list(right.shape)}")
        right = np.broadcast_to(right, shape).reshape(m.shape[:2])
    weights: Floats = _C.spectral(m, present, right, rule)
    return weights.reshape(shape)


def simplex_lp(
    gramian: ArrayLike,
    objective: ArrayLike,
    bounds: ArrayLike,
    extra: ArrayLike,
    extra_bound: ArrayLike,
    mask: ArrayLike | None = None,
) -> tuple[Floats, Floats]:
    """Solve the linear program ``max q.w`` over ``w >= 0, sum w = 1, M w >= b, e.w >= f``: what EPO does in each step.

    Args:
        gramian: M, ``[..., T, T]``, symmetric.
        objective: q, ``[..., T]``.
        bounds: b, ``[..., T]``; -inf: no bound.
        extra: e, ``[..., T]``.
        extra_bound: f, ``[...]``; -inf: no bound.
        mask: bool ``[..., T]``: which tasks take part, as variables and as bounds; None: all.

    Returns:
        The weights ``[..., T]``, and ``[...]``: 0; or, where no w meets the bounds, by how much the weights returned
        miss one of them, in units of its largest coefficient. All NaN where anything that takes part is not finite.

    Raises:
        TypeError: An array is not of real numbers or bool, as described.
        ValueError: A shape does not fit, or ``gramian`` is not symmetric.

    Note:
        Cost: the simplex method, about T pivots of T^2 multiply-adds. Bounds hold, and the objective is reached, to
        about 1e-9 of the largest coefficients.

    Example:
        >>> simplex_lp([[1, -0.5], [-0.5, 2]], [3, 1], [0, 0], [0, 0], 0)[0].round(4)
        array([0.8, 0.2])
    """
    m, present, batch = _problems(gramian, mask)
    shape = (*batch, m.shape[-1])
    each = [
        _shaped(name, values, shape).reshape(m.shape[:2])
        for name, values in (("objective", objective), ("bounds", bounds), ("extra", extra))
    ]
    weights, violation = _C.simplex_lp(m, present, *each, _shaped("extra_bound", extra_bound, batch).reshape(-1))
    return weights.reshape(shape), violation.reshape(batch)


def krum(
    gramian: ArrayLike,
    num_byzantine: int = 0,
    num_selected: int = 1,
    distance: str = "squared",
    mask: ArrayLike | None = None,
) -> Floats:
    """Weights of Krum: the gradients that lie closest to the others.

    Args:
        gramian: ``[..., T, T]``, symmetric.
        num_byzantine: f, at least 0: a score adds up the distances to the ``n - f - 2`` closest of n present tasks, at
            least to one.
        num_selected: How many tasks have equal weights, at least 1; at most n.
        distance: ``"squared"`` or ``"euclidean"``.
        mask: bool ``[..., T]``: which tasks take part; None: all. Entries of the others are not used.

    Returns:
        Weights ``[..., T]``; 0 for absent tasks; all NaN where an entry that takes part is not finite.

    Raises:
        TypeError: An argument is not of the type described.
        ValueError: A shape does not fit, ``gramian`` is not symmetric, or an option is out of range.

    Note:
        Cost: T^2 log T operations.

    Reference:
        Blanchard et al.: Machine Learning with Adversaries. NeurIPS 2017; see `fastmtl.Krum`.

    Example:
        >>> g = np.array([[1.0, 0.0], [1.2, 0.0], [0.9, 0.1], [-9.0, 5.0]])
        >>> krum(g @ g.T, num_byzantine=1, num_selected=2)
        array([0.5, 0. , 0.5, 0. ])
    """
    f, selected = whole("num_byzantine", num_byzantine, 0), whole("num_selected", num_selected, 1)
    euclidean = choice("distance", distance, ("squared", "euclidean")) == "euclidean"
    m, present, batch = _problems(gramian, mask)
    weights: Floats = _C.krum(m, present, f, selected, euclidean)
    return weights.reshape(*batch, m.shape[-1])


def projected_gradient(
    gramian: ArrayLike,
    start: ArrayLike,
    mask: ArrayLike | None = None,
    pull: ArrayLike | None = None,
    lr: float = 0.1,
    momentum: float = 0.0,
    ridge: float = 0.0,
    num_steps: int = 1,
    scale_free: bool = False,
) -> Floats:
    """Take projected gradient steps on the simplex, as SDMGrad and MoDo do.

    In each step ``v <- momentum v + A (w + pull) + ridge w``, from ``v = 0``, and w becomes the nearest point to
    ``w - lr v`` that is not negative and has the sum of w.

    Args:
        gramian: ``[..., B T, B T]``, symmetric, of T tasks on B batches of data, one batch after the other. With one
            batch it is A; with more, A are the products of the first batch's gradients with the second's. A task takes
            part where it is present in all batches.
        start: w, ``[..., T]``, not negative; tasks that do not take part keep what they have.
        mask: bool ``[..., B T]``; None: all.
        pull: ``[..., T]``; None: 0.
        lr: Step size.
        momentum: 0 to below 1.
        ridge: Pull towards equal weights.
        num_steps: How many steps.
        scale_free: Divide A by the square of the mean norm, with ``A_tt`` as squared norms, where they are above 0.

    Returns:
        ``[..., T]``; all NaN where what takes part is not finite.

    Raises:
        TypeError: An argument is not of the type described.
        ValueError: A shape does not fit, ``gramian`` is not symmetric, or an option is out of range.

    Note:
        Cost: T^2 multiply-adds a step.

    Example:
        >>> projected_gradient(np.diag([1.0, 4.0]), [0.5, 0.5], num_steps=100).round(4)  # MGDA's
        array([0.8, 0.2])
    """
    m, present, batch = _problems(gramian, mask)
    w = _real("start", start)
    if w.ndim != len(batch) + 1 or w.shape[:-1] != batch or m.shape[-1] % max(w.shape[-1], 1):
        raise ValueError(f"start: expected shape {[*batch, 'T']} for B T = {m.shape[-1]} rows, found {list(w.shape)}")
    flat = (len(m), w.shape[-1])
    added = None if pull is None else _shaped("pull", pull, w.shape).reshape(flat)
    numbers = real("lr", lr), real("momentum", momentum), real("ridge", ridge), whole("num_steps", num_steps, 0)
    weights: Floats = _C.projected_gradient(m, present, w.reshape(flat), added, *numbers, scale_free)
    return weights.reshape(w.shape)


def random_weights(mask: ArrayLike, distribution: str = "normal", seed: int = 0, step: int = 0) -> Floats:
    """Draw random weights that sum to 1 over the tasks that take part: RLW, RandomGradWeights.

    Args:
        mask: bool ``[..., T]``: which tasks take part.
        distribution: As for `fastmtl.random.random_weights`.
        seed: Of the draws.
        step: Also: a new value gives new ones.

    Returns:
        Weights ``[..., T]``; 0 for absent tasks.

    Raises:
        TypeError: An argument is not of the type described.
        ValueError: An unknown distribution, or a seed or step that is no 64-bit integer.

    Reference:
        Lin et al.: Reasonable Effectiveness of Random Weighting. TMLR 2022.

    Example:
        >>> random_weights([True, True, False], "bernoulli", seed=1).sum()
        np.float64(1.0)
    """
    kind = DISTRIBUTIONS.index(choice("distribution", distribution, DISTRIBUTIONS))
    present = np.asarray(mask)
    if present.dtype != np.bool_ or present.ndim == 0:
        raise TypeError(f"mask: expected an array of bool, found {present.dtype} of shape {list(present.shape)}")
    flat = present.reshape(int(np.prod(present.shape[:-1], dtype=np.int64)), present.shape[-1])
    weights: Floats = _C.random_weights(flat, _int64("seed", seed), _int64("step", step), kind)
    return weights.reshape(present.shape)


def visiting_order(num_tasks: int, seed: int = 0, step: int = 0, problem: int = 0) -> Ints:
    """The random orders in which the tasks meet each other.

    Args:
        num_tasks: T, at most 65,536.
        seed: As given to `pcgrad`.
        step: As given to `pcgrad`.
        problem: Index of the problem in its stack (of the parameter group).

    Returns:
        ``[T, T]`` int64: row i is task i's permutation of 0..T-1.

    Raises:
        ValueError: ``num_tasks`` is out of range, or another argument is no 64-bit integer.

    Reference:
        Fisher-Yates shuffles of Philox words, specified in csrc/solvers/order.h.

    Example:
        >>> visiting_order(4, seed=1, step=2).shape
        (4, 4)
    """
    if not 0 <= num_tasks <= 65536:
        raise ValueError(f"num_tasks: expected 0 to 65536, found {num_tasks}")
    orders: Ints = _C.visiting_order(num_tasks, _int64("seed", seed), _int64("step", step), _int64("problem", problem))
    return orders


def _real(name: str, values: ArrayLike) -> Floats:
    array = np.asarray(values)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name}: expected an array of real numbers, found dtype {array.dtype}")
    return array.astype(np.float64)


def _shaped(name: str, values: ArrayLike, shape: tuple[int, ...]) -> Floats:
    array = _real(name, values)
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, found {list(array.shape)}")
    return array


def _problems(gramian: ArrayLike, mask: ArrayLike | None) -> tuple[Floats, Any, tuple[int, ...]]:
    """The Gramians ``[K, T, T]``, the mask ``[K, T]`` or None, and the shape of the stack; validated."""
    m = _real("gramian", gramian)
    if m.ndim < 2 or m.shape[-1] != m.shape[-2]:
        raise ValueError(f"gramian: expected shape [..., T, T], found {list(m.shape)}")
    batch, num_tasks = m.shape[:-2], m.shape[-1]
    count = int(np.prod(batch, dtype=np.int64))
    m = m.reshape(count, num_tasks, num_tasks)
    present = None
    if mask is not None:
        given = np.asarray(mask)
        if given.dtype != np.bool_:
            raise TypeError(f"mask: expected an array of bool, found dtype {given.dtype}")
        if given.shape != (*batch, num_tasks):
            raise ValueError(f"mask: expected shape {[*batch, num_tasks]}, found {list(given.shape)}")
        present = given.reshape(count, num_tasks)
    _check_symmetry(m, present)
    return m, present, batch


def _lower_bounds(values: ArrayLike, shape: tuple[int, ...]) -> Floats:
    """The bounds, broadcast to ``shape``; validated."""
    c = _real("lower_bounds", values)
    if c.shape not in (shape, shape[-1:]):
        expected = " or ".join(str(list(s)) for s in dict.fromkeys((shape, shape[-1:])))
        raise ValueError(f"lower_bounds: expected shape {expected}, found {list(c.shape)}")
    if not (c >= 0).all():
        where = tuple(int(i) for i in np.argwhere(~(c >= 0))[0])
        raise ValueError(f"lower_bounds: expected 0 to 1, found {c[where]} for task {where[-1]}")
    if not (c.sum(-1) <= 1 + 1e-12).all():
        raise ValueError(f"lower_bounds: expected a sum of at most 1, found {c.sum(-1).max()}")
    return np.broadcast_to(c, shape)


def _preference(values: ArrayLike, num_tasks: int) -> Floats:
    p = _real("preference", values)
    if p.shape != (num_tasks,):
        raise ValueError(f"preference: expected shape {[num_tasks]}, found {list(p.shape)}")
    for t, x in enumerate(p):
        if not 0 <= x < np.inf:
            raise ValueError(f"preference: expected a number in [0, inf), found {x} for task {t}")
    return p


def _check_symmetry(m: Floats, present: Any) -> None:
    """Raise where finite entries of a pair of tasks that take part differ by more than rounding in float32."""
    with np.errstate(invalid="ignore"):
        scale = np.sqrt(np.abs(np.diagonal(m, axis1=-2, axis2=-1)))
        off = np.abs(m - m.swapaxes(-1, -2)) > 1e-5 * scale[:, :, None] * scale[:, None, :]
    if present is not None:
        off &= present[:, :, None] & present[:, None, :]
    if off.any():
        k, i, j = (int(x[0]) for x in np.nonzero(off))
        raise ValueError(
            f"gramian: expected a symmetric matrix, found {m[k, i, j]} at [{i}, {j}] but {m[k, j, i]} at [{j}, {i}]"
        )


def _order(order: str | ArrayLike | None, batch: tuple[int, ...], num_tasks: int) -> tuple[int, Ints | None]:
    if order is None or isinstance(order, str):
        if order is not None and order not in _ORDERS:
            raise ValueError(f"order: expected an array or one of {sorted(_ORDERS)}, found {order!r}")
        return _ORDERS[order or "random"], None
    explicit = np.asarray(order)
    if explicit.dtype.kind not in "iu":
        raise TypeError(f"order: expected an array of integers, found dtype {explicit.dtype}")
    shape = (num_tasks, num_tasks)
    if explicit.shape not in (shape, (*batch, *shape)):
        raise ValueError(f"order: expected shape {list(shape)} or {[*batch, *shape]}, found {list(explicit.shape)}")
    if not (np.sort(explicit, axis=-1) == np.arange(num_tasks)).all():
        raise ValueError(f"order: expected every row to be a permutation of 0..{num_tasks - 1}")
    rows = explicit.astype(np.int64)
    return _ORDERS["fixed"], rows if rows.shape == shape else rows.reshape(-1, *shape)


def _int64(name: str, value: int) -> int:
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"{name}: expected a 64-bit integer, found {value}")
    return value - 2**64 if value >= 2**63 else value
