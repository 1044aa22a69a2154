"""Scalarizations that ask how much each task counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.checks import preferences
from fastmtl.weighting.scalarization import Scalarization


class PreferenceScalarization(Scalarization):
    """Base class of the scalarizations with a preference, which `prefer` may change from step to step.

    Args:
        num_tasks: T.
        preference: T numbers, not negative and not all 0, scaled to sum to 1; None: 1/T each.

    Attributes:
        preference: ``[T]`` float64; state.
    """

    preference: Tensor

    def __init__(self, num_tasks: int, preference: Sequence[float] | Tensor | None = None) -> None:
        super().__init__(num_tasks)
        self.register_state("preference", (self.num_tasks,), 1 / self.num_tasks)
        if isinstance(preference, Tensor):  # whose values `prefer` does not look at
            preference = preference.tolist()
        self._first_preference = preference
        if preference is not None:
            self.prefer(preference)

    def prefer(self, preference: Sequence[float] | Tensor) -> None:
        """Change the preference.

        Args:
            preference: As for the constructor; but the values of a tensor ``[T]`` are not looked at, so that
                nothing is synchronised.

        Raises:
            TypeError: Not a sequence of numbers.
            ValueError: Not one number per task, or numbers that are not allowed.
        """
        if not isinstance(preference, Tensor):
            each = preferences(preference)
            if each is None:
                raise TypeError("preference: expected one number per task, found None")
            preference = torch.tensor(each, dtype=torch.float64)
        if list(preference.shape) != [self.num_tasks]:
            raise ValueError(
                f"preference: expected one number per task ({self.num_tasks}), found shape {list(preference.shape)}"
            )
        with torch.no_grad():
            wanted = preference.to(self.preference.device, torch.float64)
            self.preference = wanted / wanted.sum()  # another tensor: a graph may still need the last

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        return f"{super().extra_repr()}, preference={self._first_preference}"
