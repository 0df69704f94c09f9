"""Transfers that end late, over an arena whose pages move: each finds its bytes.

A made-up worker has them. It does what a step asks of it in the order of the real one: waits for
what it is told to wait for, moves pages, runs the forward pass, submits what the step begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from random import Random
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avmp_vllm.core import Geometry, Kind, Relocation, kind_of
from avmp_vllm.core.transfers import NotingArena, Place, Transfers
from avmp_vllm.engine.offload.fence import Fence

GEOMETRY = Geometry(arena_bytes=48 * 64, page_bytes=64, block_bytes=384, page_tokens=16)


@dataclass
class Job:
    """A transfer.

    Attributes:
        pages: Handles, and what a store must find in them or a load brings.
        load: Whether it is a load.
        places: Where it was told that they are, once it has been submitted.
    """

    pages: dict[int, int]
    load: bool = False
    places: dict[int, Place] | None = None


class World:
    """A scheduler and a worker around one arena.

    Args:
        random: Decides everything.
        fenced: Whether the fence's findings reach the worker.
    """

    def __init__(self, random: Random, fenced: bool = True) -> None:
        self.arena = NotingArena(GEOMETRY, migration_batch=1, on_evict=self._evicted)
        self.fence = Fence(self.arena)
        self.memory = [0] * GEOMETRY.arena_bytes
        self.tags: dict[int, int] = {}  # what is in each page, referenced or cached
        self.held: list[int] = []
        self.jobs: dict[int, Job] = {}
        self.bad: list[object] = []
        self.moved = 0
        self._random, self._fenced = random, fenced
        self._numbers = count(1)

    def _evicted(self, handles: Sequence[int]) -> None:
        for handle in handles:
            del self.tags[handle]

    def _some(self, handles: Iterable[int], most: int) -> list[int]:
        found = list(handles)
        return self._random.sample(found, min(len(found), self._random.randint(0, most)))

    def _place(self, handle: int) -> Place:
        return Place(kind_of(handle), self.arena.physical(handle))

    def _bytes(self, place: Place) -> slice:
        unit = GEOMETRY.unit(place.kind)
        return slice(place.page * unit, (place.page + 1) * unit)

    def _write(self, place: Place, tag: int) -> None:
        self.memory[self._bytes(place)] = [tag] * GEOMETRY.unit(place.kind)

    def _check(self, place: Place, tag: int, what: object) -> None:
        if set(self.memory[self._bytes(place)]) != {tag}:
            self.bad.append(what)

    def _end(self, number: int) -> None:
        """A transfer copies its bytes, from where it was told to or to there."""
        job = self.jobs.pop(number)
        assert job.places is not None
        for handle, tag in job.pages.items():
            if job.load:
                self._write(job.places[handle], tag)
            else:
                self._check(job.places[handle], tag, (number, handle))

    def step(self) -> None:
        """Schedule a step, and carry it out."""
        random, arena, jobs = self._random, self.arena, self.jobs
        for number in [number for number in jobs if random.random() < 0.3]:
            self._end(number)
        loading = {handle for job in jobs.values() if job.load for handle in job.pages}
        # Requests have ended: some of their pages stay cached, and are stored behind their back.
        gone = {handle: self.tags[handle] for handle in self._some(self.held, 3)}
        gone = {handle: tag for handle, tag in gone.items() if handle not in loading}
        for handle in gone:
            self.held.remove(handle)
            if random.random() < 0.5:
                arena.cache([handle])
            else:
                arena.release([handle])
                del self.tags[handle]
        # Others get pages, and what is in their way moves or goes.
        new: list[int] = []
        for pages, blocks in random.choices([(1, 0), (4, 0), (0, 1), (2, 1)], k=2):
            if arena.fits(pages, blocks):
                new += arena.allocate(pages, blocks)
        self.held += new
        self.tags.update((handle, next(self._numbers)) for handle in new)
        moves = arena.take_relocations()
        self.moved += len(moves)
        begun: dict[int, Job] = {}
        brought = self._some(new, 2)
        kept = [handle for handle in self.held if handle not in loading | set(brought)]
        for job, ended in (
            (Job(gone), True),
            (Job({handle: self.tags[handle] for handle in brought}, load=True), False),
            (Job({handle: self.tags[handle] for handle in self._some(kept, 2)}), False),
        ):
            if job.pages:
                number = next(self._numbers)
                begun[number] = jobs[number] = job
                if ended:
                    job.places = {handle: self._before(handle, moves) for handle in job.pages}
        metadata = SimpleNamespace(
            load_jobs={n: self._as_vllms(job) for n, job in begun.items() if job.load},
            store_jobs={n: self._as_vllms(job) for n, job in begun.items() if not job.load},
            jobs_to_flush=None,
        )
        self.fence.end_step(metadata, moves, {"ended"}, jobs)
        # The worker.
        for number in sorted(metadata.jobs_to_flush) if self._fenced else ():
            if number in jobs and jobs[number].places is not None:
                self._end(number)
        for move in moves:
            source, target = (Place(move.kind, page) for page in (move.source, move.target))
            self.memory[self._bytes(target)] = self.memory[self._bytes(source)]
        for handle in new:
            if handle not in brought:
                self._write(self._place(handle), self.tags[handle])
        for number in begun.keys() & jobs.keys():
            places = {handle: self._place(handle) for handle in jobs[number].pages}
            if self._fenced and jobs[number].places not in (None, places):
                self.bad.append((number, "is somewhere else when it is submitted"))
            jobs[number].places = places
        assert not self.fence.transfers.problems()
        arena.verify(self.held)

    def _before(self, handle: int, moves: Sequence[Relocation]) -> Place:
        """Where a handle was before some moves."""
        page = self.arena.physical(handle)
        for move in reversed(moves):
            if handle == move.handle:
                page = move.source
            elif handle == move.displaced:
                page = move.target
        return Place(kind_of(handle), page)

    def _as_vllms(self, job: Job) -> SimpleNamespace:
        """A job as vLLM's connector describes it to its workers."""
        device = SimpleNamespace(block_ids=list(job.pages), group_sizes=[len(job.pages)])
        host = SimpleNamespace(block_ids=list(job.pages))
        source, target = (host, device) if job.load else (device, host)
        return SimpleNamespace(
            req_id="ended" if job.places else "runs", src_spec=source, dst_spec=target
        )

    def finish(self) -> None:
        """All transfers end; what is held is there."""
        for number in list(self.jobs):
            self._end(number)
        for handle in self.held:
            self._check(self._place(handle), self.tags[handle], handle)


def world_after(random: Random, fenced: bool = True) -> World:
    """A world that has gone on for a while."""
    world = World(random, fenced)
    for _ in range(25):
        world.step()
    world.finish()
    return world


@settings(max_examples=100, deadline=None)
@given(st.randoms(use_true_random=False))
def test_every_transfer_finds_its_bytes(random):
    """Stores read what was there and loads reach their page, whatever moves in between."""
    assert not world_after(random).bad


def test_the_world_moves_pages_and_waits():
    """Otherwise the test above shows nothing; and the control: where nobody waits, it fails."""
    worlds = [world_after(Random(seed)) for seed in range(20)]
    assert sum(bool(world.moved) for world in worlds) > 15
    assert sum(world.arena.waits for world in worlds) > 100
    assert sum(bool(world_after(Random(seed), fenced=False).bad) for seed in range(20)) > 10


def test_pages_of_either_kind_are_seen_across_their_views():
    """A state's bytes are those of several pages, and the other way round."""
    transfers = Transfers(GEOMETRY)
    transfers.begin(1, [Place(Kind.KV, 14)])  # bytes 896 to 960, of block 2: 768 to 1152
    transfers.begin(2, [Place(Kind.SSM, 4)])  # bytes 1536 to 1920: pages 24 to 29
    assert transfers.holding([Place(Kind.SSM, 2)]) == {1}
    assert transfers.holding([Place(Kind.SSM, 1), Place(Kind.SSM, 3)]) == set()
    assert transfers.holding([Place(Kind.KV, 24)]) == transfers.holding([Place(Kind.KV, 29)]) == {2}
    assert transfers.holding([Place(Kind.KV, 23), Place(Kind.KV, 30)]) == set()
    transfers.end(1)
    assert transfers.holding([Place(Kind.SSM, 2)]) == set()
    transfers.end_all_but(())
    assert len(transfers) == 0
    assert not transfers.problems()


@pytest.mark.parametrize("kind", Kind)
def test_a_page_that_two_transfers_read_is_held_until_both_have_ended(kind):
    """Two requests may store from one page."""
    transfers = Transfers(GEOMETRY)
    transfers.begin(1, [Place(kind, 5)])
    transfers.begin(2, [Place(kind, 5), Place(kind, 6)])
    transfers.end(1)
    assert transfers.holding([Place(kind, 5)]) == {2}
    transfers.end(2)
    assert not transfers.holding([Place(kind, 5), Place(kind, 6)])
