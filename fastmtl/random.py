"""Random numbers of a training step: a pure function of (seed, step), the same on every device and every rank.

The generator is counter-based (Philox), on the device: no host synchronisation, and a replay of a
captured CUDA graph draws anew once the step's number, a tensor on the device, has been advanced.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmtl.checks import choice

DISTRIBUTIONS = ("normal", "uniform", "dirichlet", "bernoulli", "constrained_bernoulli")
_LOW = 0xFFFFFFFF


def new_rng(generator: torch.Generator | None = None) -> Tensor:
    """The state of a method that draws: int64 ``[2]`` on the CPU: a seed, and 0, the step's number.

    Args:
        generator: Where the seed comes from; None: torch's default generator.

    Raises:
        TypeError: Not a generator.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, found {generator!r}")
    device = "cpu" if generator is None else generator.device
    seed = torch.randint(2**62, (), generator=generator, dtype=torch.int64, device=device)
    return torch.stack([seed.cpu(), torch.zeros_like(seed, device="cpu")])


def random_weights(rng: Tensor, present: Tensor, distribution: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random weights that sum to 1 over the present tasks.

    Args:
        rng: int64 ``[2]``: seed and step. The same pair gives the same weights everywhere, to rounding.
        present: bool ``[K, T]``. Whoever is absent does not change what the others draw; each group draws its own.
        distribution: ``"normal"``, ``"uniform"``: the softmax of draws from N(0, 1), from U(0, 1). ``"dirichlet"``:
            uniform on the simplex. ``"bernoulli"``: 0 or 1 by a fair coin, not all 0, divided by their sum.
            ``"constrained_bernoulli"``: one task of all has weight 1.
        dtype: Of the result.

    Returns:
        ``[K, T]``, 0 for absent tasks.

    Raises:
        ValueError: An unknown distribution.

    Note:
        Cost: about 100 elementwise operations on a few numbers per task, whatever T is. `fastmtl.ops.random_weights` is
        the same in one.

    Reference:
        Lin, Ye, Zhang, Tsang, "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning",
        TMLR 2022.
    """
    choice("distribution", distribution, DISTRIBUTIONS)
    num_groups, num_tasks = present.shape
    draws = normals if distribution == "normal" else uniforms
    x = draws(rng, num_groups, num_tasks, dtype)
    if distribution in ("normal", "uniform"):
        x = x.exp()  # of at most 7
    elif distribution == "dirichlet":
        x = -x.log()
    elif distribution == "constrained_bernoulli":
        x = _first_largest(torch.where(present, x, -1.0)).to(dtype)
    else:
        # All 0 is left out by drawing who is the first with a 1, out of what is then a geometric law cut off at n.
        place = present.cumsum(-1)
        u = uniforms(rng, num_groups, num_tasks + 1, dtype)[:, -1:]
        reached = u * (1 - 2.0 ** -place[:, -1:].to(dtype)) < 1 - 2.0 ** -place.to(dtype)
        first = _first_largest((reached & present).to(dtype))
        x = (first | (reached & (x < 0.5))).to(dtype)
    x = torch.where(present, x, 0.0)
    return x / x.sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)


def dirichlet(rng: Tensor, concentration: Tensor, tries: int = 8) -> Tensor:
    """A draw ``[T]`` from a Dirichlet distribution: independent gammas, divided by their sum.

    Args:
        rng: int64 ``[2]``: seed and step.
        concentration: ``[T]`` float64, above 0.
        tries: Proposals per gamma, of which the first that is accepted is taken; each is with probability 0.95 or more.

    Reference:
        Marsaglia, Tsang, "A Simple Method for Generating Gamma Variables", ACM Transactions on Mathematical Software
        2000; with a fixed number of proposals in place of a loop until one is accepted, which fails once in 10^10.
    """
    num_tasks = len(concentration)
    x = normals(rng, 1, tries * num_tasks)[0].view(tries, num_tasks)
    _, u, power = uniforms(rng, 3, tries * num_tasks)  # group 0 is that of the normals
    d = torch.where(concentration < 1, concentration + 1, concentration) - 1 / 3
    v = (1 + x / (9 * d).sqrt()).clamp(min=0) ** 3
    accepted = u.view(tries, num_tasks).log() < 0.5 * x**2 + d - d * v + d * v.log()
    first = _first_largest(accepted.double().movedim(0, -1)).movedim(-1, 0)
    logs = (d * torch.where(first, v, 0.0).sum(0)).log()
    return torch.softmax(logs + torch.where(concentration < 1, power[:num_tasks].log() / concentration, 0.0), 0)


def normals(rng: Tensor, num_groups: int, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draws ``[K, count]`` from N(0, 1), of 32 random bits each, within 6.7 of 0.

    Reference:
        Box and Muller, "A Note on the Generation of Random Normal Deviates", Annals of Mathematical Statistics 1958.
    """
    u = uniforms(rng, num_groups, count + count % 2, dtype).unflatten(-1, (-1, 2))
    radius, angle = (-2 * u[..., 0].log()).sqrt(), 2 * math.pi * u[..., 1]
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(-2)[:, :count]


def uniforms(rng: Tensor, num_groups: int, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draws ``[K, count]`` from U(0, 1): the middles of 2^32 equal intervals.

    Those of group k are the words of Philox4x32-10 with the key (low, high word of the seed), at the counters
    (block, k, low, high word of the step) for block = 0, 1, ...

    Args:
        rng: int64 ``[2]``: seed and step.
        num_groups: K.
        count: How many, below 2^34.
        dtype: Of the result; float32 rounds the draws to 24 bits.
    """
    blocks = -(-count // 4)
    key = torch.stack([rng[0] & _LOW, (rng[0] >> 32) & _LOW])
    step = torch.stack([rng[1] & _LOW, (rng[1] >> 32) & _LOW])
    block = torch.arange(blocks, device=rng.device).expand(num_groups, blocks)
    group = torch.arange(num_groups, device=rng.device).unsqueeze(-1).expand(num_groups, blocks)
    steps = step.view(2, 1, 1).expand(2, num_groups, blocks)
    words = philox4x32(torch.stack([block, group, steps[0], steps[1]]), key)
    u = (words.movedim(0, -1).flatten(-2)[:, :count].to(dtype) + 0.5) * 2.0**-32
    return u if dtype == torch.float64 else u.clamp(max=1 - 2.0**-24)


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10: four random 32-bit words per counter, held in int64.

    Args:
        counter: int64 ``[4, ...]``, values below 2^32.
        key: int64 ``[2]``, likewise.

    Returns:
        int64 ``[4, ...]``.

    Reference:
        Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. The products of two 32-bit
        words do not fit: the multipliers are taken less 2^32, which leaves the low words, and the high words less the
        factor.
    """
    shape = (2,) + (1,) * (counter.dim() - 1)
    multipliers = _pair(0xD2511F53 - 2**32, 0xCD9E8D57 - 2**32, counter.device).view(shape)
    weyl = _pair(0x9E3779B9, 0xBB67AE85, key.device)
    keys = ((key + torch.arange(10, device=key.device).unsqueeze(-1) * weyl) & _LOW).view(10, *shape)
    even, odd = counter[0::2], counter[1::2]
    for k in keys:
        product = even * multipliers
        high, low = ((product >> 32) + even) & _LOW, product & _LOW
        even, odd = high.flip(0) ^ odd ^ k, low.flip(0)
    return torch.stack([even[0], odd[0], even[1], odd[1]])


def _pair(first: int, second: int, device: torch.device) -> Tensor:
    """Two numbers made on the device: nothing is sent there."""
    return torch.arange(2, device=device) * (second - first) + first


def _first_largest(x: Tensor) -> Tensor:
    """Where the largest one of each row lies, the first of several, bool."""
    return torch.zeros_like(x, dtype=torch.bool).scatter(-1, x.argmax(-1, keepdim=True), True)
