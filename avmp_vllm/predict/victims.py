"""Which running request to preempt: the one that is cheapest to compute again.

vLLM preempts the last of its running requests, whatever that costs. Here it is the one with the
fewest tokens to compute again, so that the same pages come free for less work. Two rules keep
everybody alive: the oldest request is never preempted while another runs, and one that was
preempted ``PATIENCE`` times comes after all that were not, the youngest of those first.

Why nobody starves. A preempted request waits in front of all that never ran. The oldest request of
all runs and is not preempted while another can be, and one request always fits, so it ends. Then
the next oldest is the oldest. What is in front of a request when it arrives is finite, so its turn
comes. With priorities this holds within the most important class that has requests.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

#: Preemptions after which a request is protected.
PATIENCE = 2


class Candidate(NamedTuple):
    """A running request.

    Attributes:
        name: Its name.
        arrival: When it arrived; any order will do, and no two requests have the same.
        cost: Tokens that would have to be computed again if it were preempted: those it has, less
            those that a kept prefix would still hold.
        preemptions: How often it was preempted.
        priority: Lower goes first; 0 for all without priority scheduling.
    """

    name: str
    arrival: float
    cost: int
    preemptions: int = 0
    priority: int = 0


def order(running: Iterable[Candidate], patience: int = PATIENCE) -> list[Candidate]:
    """Running requests in the order in which they are worth keeping; the last is the next victim.

    More important requests stand before less important ones whatever they cost. The oldest of the
    most important is the first of all.

    Args:
        running: In any order.
        patience: Preemptions after which a request is protected.
    """
    candidates = list(running)
    if not candidates:
        return []
    oldest = min(candidates, key=lambda each: (each.priority, each.arrival))

    def rank(each: Candidate) -> tuple[int, int, float, float]:
        if each is oldest:
            return (each.priority, 0, 0.0, 0.0)
        if each.preemptions >= patience:
            return (each.priority, 1, each.arrival, 0.0)
        # Of two that cost the same, the younger goes.
        return (each.priority, 2, -each.cost, each.arrival)

    return sorted(candidates, key=rank)


def victim(running: Iterable[Candidate], patience: int = PATIENCE) -> Candidate | None:
    """The request to preempt next; None where one or none runs."""
    ordered = order(running, patience)
    return ordered[-1] if len(ordered) > 1 else None
