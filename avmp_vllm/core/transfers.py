"""Pages that a transfer reads or writes while the engine goes on.

A transfer is told physical places when it begins, and comes back for them later. Until it has
ended, their bytes must not change hands: neither may the page move, nor may a page of any kind be
written where it was. Nothing is pinned for that. Pins would keep an arena from being packed, and a
request could be refused for want of room that is there; instead, who is about to touch such bytes
waits for the transfer, which always ends. So the allocator stays exact and never waits.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import NamedTuple

from avmp_vllm.core.arena import Arena
from avmp_vllm.core.geometry import Geometry, ceil_div
from avmp_vllm.core.handles import Kind


class Place(NamedTuple):
    """Where a page's bytes are.

    Attributes:
        kind: Which pool's view.
        page: Physical index in it.
    """

    kind: Kind
    page: int


class NotingArena(Arena):
    """An arena that notes what it hands out, for a caller that must know whose bytes change.

    Attributes:
        waits: Transfers so far that a plan had to wait for; that caller counts them.
    """

    waits = 0
    _taken: list[int] | None = None

    def allocate(self, pages: int = 0, blocks: int = 0) -> list[int]:
        """Reference new pages, as in ``Arena``, and note them."""
        handles = super().allocate(pages, blocks)
        if self._taken is None:
            self._taken = []
        self._taken += handles
        return handles

    def take_taken(self) -> list[int]:
        """Drain the handles that were handed out since the last call."""
        taken, self._taken = self._taken, None
        return taken or []


class Transfers:
    """Transfers that have begun, and the places that each of them holds.

    Args:
        geometry: Of the arena.
    """

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._places: dict[int, list[Place]] = {}
        # Of each pool: jobs by physical index. Several may read one page.
        self._jobs: dict[Kind, dict[int, list[int]]] = {kind: {} for kind in Kind}

    def __len__(self) -> int:
        return len(self._places)

    def begin(self, job: int, places: Iterable[Place]) -> None:
        """A transfer begins to hold places.

        Args:
            job: Its number, which no other transfer has.
            places: What it reads or writes.
        """
        assert job not in self._places, job
        self._places[job] = held = list(places)
        for kind, index in held:
            self._jobs[kind].setdefault(index, []).append(job)

    def end(self, job: int) -> None:
        """A transfer has ended, or nothing happens before it has; it may be unknown."""
        for kind, index in self._places.pop(job, ()):
            jobs = self._jobs[kind][index]
            jobs.remove(job)
            if not jobs:
                del self._jobs[kind][index]

    def end_all_but(self, live: Container[int]) -> None:
        """Every transfer has ended but for these."""
        for job in [job for job in self._places if job not in live]:
            self.end(job)

    def holding(self, places: Iterable[Place]) -> set[int]:
        """Transfers that hold any byte of some places."""
        found: set[int] = set()
        if not self._places:
            return found
        for place in places:
            found.update(self._jobs[place.kind].get(place.page, ()))
            for index in self._across(place):
                found.update(self._jobs[place.kind.other].get(index, ()))
        return found

    def _across(self, place: Place) -> Iterable[int]:
        """Indices held in the other pool's view whose bytes may be a place's own."""
        held = self._jobs[place.kind.other]
        if not held:
            return ()
        own, other = (self._geometry.unit(kind) for kind in (place.kind, place.kind.other))
        span = range(place.page * own // other, ceil_div((place.page + 1) * own, other))
        return span if len(span) < len(held) else [index for index in held if index in span]

    def problems(self) -> list[str]:
        """What does not add up; nothing."""
        found = [
            f"transfer {job} holds {place} unnoticed"
            for job, places in self._places.items()
            for place in places
            if job not in self._jobs[place.kind].get(place.page, ())
        ]
        counted = sum(len(jobs) for by in self._jobs.values() for jobs in by.values())
        if counted != sum(map(len, self._places.values())):
            found.append("places are held by transfers that have ended")
        return found
