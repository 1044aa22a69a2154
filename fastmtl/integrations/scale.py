"""What a training library multiplies losses by before their backward pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class LossScale:
    """Stands for a ``torch.amp.GradScaler`` where fastmtl asks for one.

    Its scale, divided by the number of steps that gradients are accumulated over: methods see raw losses, and ``.grad``
    is what the library expects.
    """

    def __init__(self, scaler: Any, steps: int) -> None:
        self.scaler = scaler
        self.steps = steps

    @staticmethod
    def options(scaler: Any, steps: int) -> dict[str, Any]:
        """As options of `fastmtl.backward`: none where nothing is scaled."""
        return {} if scaler is None and steps == 1 else {"scaler": LossScale(scaler, steps)}

    def scale(self, x: Tensor) -> Tensor:
        """As a scaler's."""
        return (x if self.scaler is None else self.scaler.scale(x)) / self.steps
