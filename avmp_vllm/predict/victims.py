"""Which running request to preempt: the one that is cheapest to compute again.

vLLM preempts the last of its running requests, whatever that costs. Here it is the one with the
fewest tokens to compute again, so that the same pages come free for less work. Prompts that are not
computed yet go before requests that decode: the last places are also the last to get their share of
a step, and a decode behind a long prompt would stand still. Two rules keep everybody alive: the
oldest request is never preempted while another runs, and one that was preempted ``PATIENCE`` times
goes after all that were not, the youngest of those first.

Why nobody starves. A preempted request waits in front of all that never ran, so until it runs again
nobody new starts, and those that have started are finitely many. The oldest of them that runs is
not preempted; only an older one that runs again can take its place, and that happens finitely
often. One request always fits, so somebody ends, and they get fewer until the preempted request's
turn has come. The same holds of one that never ran: what was in front of it is finite.
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
        cost: Tokens that would have to be computed again if it were preempted.
        preemptions: How often it was preempted.
        prefilling: Whether its prompt, or what it had before a preemption, is not computed yet.
    """

    name: str
    arrival: float
    cost: int
    preemptions: int = 0
    prefilling: bool = False


def order(running: Iterable[Candidate], patience: int = PATIENCE) -> list[Candidate]:
    """Running requests in the order in which they are worth keeping; the last is the next victim.

    Args:
        running: In any order.
        patience: Preemptions after which a request is protected.
    """
    candidates = list(running)
    if not candidates:
        return []
    oldest = min(candidates, key=lambda each: each.arrival)

    def rank(each: Candidate) -> tuple[int, float, float]:
        if each is oldest:
            return (0, 0.0, 0.0)
        if each.preemptions >= patience:
            return (1, each.arrival, 0.0)
        # Of two that cost the same, the younger goes.
        return (3 if each.prefilling else 2, -each.cost, each.arrival)

    return sorted(candidates, key=rank)


def victim(running: Iterable[Candidate], patience: int = PATIENCE) -> Candidate | None:
    """The request to preempt next; None where one or none runs."""
    ordered = order(running, patience)
    return ordered[-1] if len(ordered) > 1 else None
