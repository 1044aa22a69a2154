"""PCGrad as it is commonly written today: a Python loop over pairs of flattened gradients.

Only here to be timed against ``fastmtl.PCGrad``, which computes the same thing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor


def pcgrad_by_pairs(
    losses: Sequence[Tensor], params: Sequence[Tensor], orders: Sequence[Sequence[int]] | None = None
) -> None:
    """Adds PCGrad's update direction to ``.grad`` of the parameters, by T backward passes and a loop over T² pairs.

    Args:
        losses: T scalars, whose graph is kept.
        params: the shared parameters; every loss must reach all of them.
        orders: for each task the order in which it visits the others; drawn at random if None.
    """
    gradients = [
        torch.cat([part.flatten() for part in torch.autograd.grad(loss, params, retain_graph=True)]) for loss in losses
    ]
    projected = [gradient.clone() for gradient in gradients]
    for i, gradient in enumerate(projected):
        others = [j for j in range(len(gradients)) if j != i]
        if orders is None:
            random.shuffle(others)
        else:
            others = [j for j in orders[i] if j != i]
        for j in others:
            dot = torch.dot(gradient, gradients[j]).item()
            if dot < 0:
                gradient -= dot / torch.dot(gradients[j], gradients[j]).item() * gradients[j]
    merged = torch.stack(projected).sum(dim=0)
    for param, part in zip(params, merged.split([param.numel() for param in params]), strict=True):
        part = part.view_as(param)
        param.grad = part if param.grad is None else param.grad + part
