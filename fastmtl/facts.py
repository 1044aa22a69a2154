"""What each method says of itself in a few words, for README's table and ``python -m fastmtl methods``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """A method in a few words. T is the number of tasks, K of groups, P of shared parameters.

    Attributes:
        answers: Which trouble: ``"magnitude"``, ``"velocity"``, ``"direction"``, some of these, or ``"none"``.
        paper: First author, venue and year.
        sums_to: What the weights sum to: ``"1"``, ``"T"``, ...; ``""``: nothing in particular.
        needs: What the user must provide besides the losses; ``""``: nothing.
        state: What it keeps between steps, in numbers; ``""``: nothing.
        up_to: So many tasks are weighed within about a fifth of a second on a CPU.
        cost: Time of one step beyond the gradients and their Gramian, as an order.
    """

    answers: str
    paper: str
    sums_to: str = ""
    needs: str = ""
    state: str = ""
    cost: str = "T"
    up_to: int = 512
