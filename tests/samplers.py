"""Jacobians ``[T, P]`` of per-task gradients, float64, by property. Their Gramian is ``J @ J.T``."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Jacobian = NDArray[np.float64]
Sampler = Callable[[np.random.Generator, int], Jacobian]


def random(rng: np.random.Generator, num_tasks: int) -> Jacobian:
    return rng.standard_normal((num_tasks, 2 * num_tasks + 3))


def square(rng: np.random.Generator, num_tasks: int) -> Jacobian:
    """Full rank, but some of them nearly singular."""
    return rng.standard_normal((num_tasks, num_tasks))


def common_direction(rng: np.random.Generator, num_tasks: int) -> Jacobian:
    """Mostly in agreement: few conflicts."""
    return random(rng, num_tasks) + 2


def nearly_parallel(rng: np.random.Generator, num_tasks: int) -> Jacobian:
    """Differences of 1e-4, whose hull has its min-norm point inside."""
    return np.hstack([np.ones((num_tasks, 1)), 1e-4 * random(rng, num_tasks)])


def rank_deficient(rng: np.random.Generator, num_tasks: int) -> Jacobian:
    return rng.standard_normal((num_tasks, num_tasks // 3 + 1))


def duplicated(rng: np.random.Generator, num_tasks: int) -> Jacobian:
    """Every gradient about twice, and 0 outside of the hull."""
    return (random(rng, num_tasks) + 0.5)[rng.integers(0, num_tasks // 2 + 1, num_tasks)]


def opposite(rng: np.random.Generator, num_tasks: int) -> Jacobian:
    """Pairs that point in exactly opposite directions, of different lengths."""
    jacobian = random(rng, num_tasks)
    half = num_tasks // 2
    jacobian[half : 2 * half] = -jacobian[:half] * rng.integers(1, 4, (half, 1))
    return jacobian


def parallel(rng: np.random.Generator, num_tasks: int) -> Jacobian:
    """Rank 1, both signs."""
    return rng.uniform(0.5, 2, (num_tasks, 1)) * rng.choice([-1, 1], (num_tasks, 1)) * rng.standard_normal(5)


def identical(rng: np.random.Generator, num_tasks: int) -> Jacobian:
    return np.tile(rng.standard_normal(4), (num_tasks, 1))


def zero_rows(rng: np.random.Generator, num_tasks: int) -> Jacobian:
    """At least one zero gradient."""
    jacobian = random(rng, num_tasks)
    jacobian[rng.random(num_tasks) < 0.3] = 0
    jacobian[rng.integers(num_tasks)] = 0
    return jacobian


def strictly_conflicting(rng: np.random.Generator, num_tasks: int) -> Jacobian:
    """Every pair has a negative inner product."""
    center = rng.uniform(0.5, 1.5)
    return np.eye(num_tasks) - center / num_tasks


def pareto_stationary(rng: np.random.Generator, num_tasks: int) -> Jacobian:
    """A convex combination of all the gradients is zero."""
    jacobian = random(rng, num_tasks)
    return jacobian - rng.dirichlet(np.ones(num_tasks)) @ jacobian


FULL_RANK: dict[str, Sampler] = {f.__name__: f for f in (random, square, common_direction, nearly_parallel)}
DEGENERATE: dict[str, Sampler] = {
    f.__name__: f
    for f in (
        rank_deficient,
        duplicated,
        opposite,
        parallel,
        identical,
        zero_rows,
        strictly_conflicting,
        pareto_stationary,
    )
}
SAMPLERS: dict[str, Sampler] = FULL_RANK | DEGENERATE


def with_norms(rng: np.random.Generator, jacobian: Jacobian, spread: float = 6) -> Jacobian:
    """The same directions with lengths over e^-spread .. e^spread."""
    return jacobian * np.exp(rng.uniform(-spread, spread, (len(jacobian), 1)))
