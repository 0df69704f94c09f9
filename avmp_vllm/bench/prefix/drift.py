"""Traffic that changes: one trace after another, and learners that begin anew at the change.

A cache that goes on from one part to the next is compared with the same cache that forgets at the
change what it had learned of reuse. Both have served the same requests and keep the same states
then, so that they differ in what they have learned and in nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

from avmp_vllm.bench.prefix.trace import Request, Run

#: Requests of a part that a learner may need; what is compared comes behind them.
SETTLING = 500


@runtime_checkable
class Learner(Protocol):
    """A cache that learns of reuse."""

    def unlearn(self) -> None:
        """Know nothing of reuse any more; what is kept stays."""
        ...


def joined(parts: Sequence[Sequence[Request]]) -> tuple[list[Request], list[int]]:
    """Traces one after the other, which share no token.

    Returns:
        All requests, and where each part begins.
    """
    found: list[Request] = []
    starts = []
    keys, clock = 0, 0.0
    for part in parts:
        starts.append(len(found))
        for request in part:
            runs = tuple(Run(run.key + keys, run.pages) for run in request.runs)
            moved = replace(request, time=request.time + clock, runs=runs, number=len(found))
            found.append(moved)
        keys = max((r.key + r.pages for q in found for r in q.runs), default=0)
        clock = found[-1].time if found else 0.0
    return found, starts


def part_of(place: int, starts: Sequence[int]) -> tuple[int, bool]:
    """The part that a request is in, and whether it comes behind the first ones of it."""
    part = max(number for number, start in enumerate(starts) if start <= place)
    return part, place - starts[part] >= SETTLING
