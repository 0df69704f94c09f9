"""Plans of an elastic arena on real memory, and what they look like from below."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from strict_memory import Stream, StrictMemory

from avmp_vllm.backing.elastic_buffer import ElasticBuffer
from avmp_vllm.backing.elastic_pages import ElasticPages
from avmp_vllm.core import (
    AllocationFailure,
    Arena,
    Extents,
    Geometry,
    Kind,
    MovePlan,
    Relocation,
    Stage,
    kind_of,
)
from avmp_vllm.core.extents import reserve_for

HERE = Path(__file__).parent


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the worker in a process of its own."""
    return subprocess.run(
        [sys.executable, str(HERE / "elastic_worker.py"), *words],
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("driver", ["anonymous", "memfd"])
def test_no_byte_is_lost_and_memory_goes_back(driver: str) -> None:
    """Real pages over a gap that faults, under budgets that change; resident bytes follow them."""
    done = run(driver)
    assert done.returncode == 0, done.stderr
    print(done.stdout)


def test_control_without_mapping_the_worker_dies() -> None:
    assert run("anonymous", "without").returncode == -signal.SIGSEGV


class Launches:
    """Carries no plan out, but launches work on all pages that it names."""

    def __init__(self, buffer: ElasticBuffer, stream: Stream, geometry: Geometry) -> None:
        self.buffer, self.stream, self.geometry = buffer, stream, geometry

    def places(self, kind: Kind, index: int) -> set[int]:
        """Addresses of the chunks under a page."""
        unit, chunk = self.geometry.unit(kind), self.buffer.chunk_bytes
        return {
            self.buffer.address + byte // chunk * chunk
            for byte in range(unit * index, unit * (index + 1))
        }

    def apply(self, plan: MovePlan) -> None:
        touched: set[int] = set()
        for move in plan.relocations:
            touched |= self.places(move.kind, move.source) | self.places(move.kind, move.target)
        self.stream.launch(touched)


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_nothing_in_flight_loses_its_memory(lag: int) -> None:
    """Steps run behind the scheduler; each reads every live page; budgets rise and fall."""
    geometry, chunk = Geometry(4_000, 24, 160), 32
    arena = Arena(geometry, migration_batch=1, chunk_bytes=chunk)
    memory = StrictMemory(200, chunk)
    stream = Stream(memory)
    buffer = ElasticBuffer(memory, geometry.arena_bytes, chunk, geometry.high_end)
    buffer.set_budget(buffer.size)
    launches = Launches(buffer, stream, geometry)
    pages = ElasticPages(buffer, launches, stream.record)
    rng, held = random.Random(lag), []
    budget = buffer.size
    number = shrunk = 0
    for _ in range(1_500):
        arena.trim(rng.choice([0, 0, 200]))
        if rng.random() < 0.1:
            budget = rng.randint(12, buffer.size // chunk) * chunk
            arena.set_reserve(reserve_for(geometry.high_end, budget, chunk))
            if budget > buffer.budget:
                assert buffer.set_budget(budget) == budget
            shrunk += budget < buffer.budget
        for _ in range(rng.randint(0, 4)):
            if held and rng.random() < 0.5:
                handles = held.pop(rng.randrange(len(held)))
                for kind in Kind:
                    arena.release([h for h in handles if (h >> 30) == kind])
                continue
            try:
                held.append(arena.allocate(rng.randint(0, 20), rng.randint(0, 3)))
            except AllocationFailure:
                continue
        relocations, taken = arena.take_relocations(), arena.take_extents()
        if relocations or taken:
            number += 1
            stages, after = taken or ((), None)
            pages.apply(MovePlan(number, relocations, stages=stages, after=after))
        touched: set[int] = set()
        for handles in held:
            for handle in handles:
                touched |= launches.places(kind_of(handle), arena.physical(handle))
        stream.launch(touched)
        stream.finish_all_but(lag)
        buffer.set_budget(budget)
        assert buffer.needed <= budget or arena.over_bytes
    assert shrunk > 30
    assert buffer.statistics.regained > 100
    assert not lag or buffer.statistics.fence_waits > 10
    stream.finish_all_but(0)
    buffer.close()
    assert not memory.alive


class Watch:
    """Notes what has memory while a plan is carried out."""

    def __init__(self, buffer: ElasticBuffer) -> None:
        self.buffer, self.seen = buffer, []

    def apply(self, plan: MovePlan) -> None:
        self.seen.append((self.buffer.needed, self.buffer.mapped, len(plan.relocations)))


def test_each_part_of_a_plan_has_what_it_needs_and_no_more() -> None:
    """Two stages within a budget of ten chunks that one end uses after the other."""
    memory = StrictMemory(10, 32)
    buffer = ElasticBuffer(memory, 1_024, 32)
    buffer.set_budget(320)
    watch = Watch(buffer)
    pages = ElasticPages(buffer, watch)
    moves = [Relocation(Kind.KV, 1, 2, n, n + 1) for n in range(3)]
    stages = (Stage(0, Extents(320, 1_024)), Stage(2, Extents(32, 736)))
    pages.apply(MovePlan(1, moves, stages=stages, after=Extents(32, 960)))
    assert watch.seen == [(320, 320, 2), (320, 320, 1)]
    assert (buffer.needed, buffer.retired) == (96, 224)
    # Nothing more is needed: no call, and the plan is carried out all the same.
    memory.calls.clear()
    pages.apply(MovePlan(2, moves))
    assert watch.seen[-1] == (96, 320, 3)
    assert memory.calls == []


def test_after_the_last_request_the_null_bytes_are_left() -> None:
    geometry, chunk = Geometry(4_000, 24, 160), 32
    arena = Arena(geometry, chunk_bytes=chunk)
    memory = StrictMemory(200, chunk)
    buffer = ElasticBuffer(memory, geometry.arena_bytes, chunk, geometry.high_end)
    buffer.set_budget(buffer.size)

    class Nothing:
        def apply(self, plan: MovePlan) -> None:
            pass

    pages = ElasticPages(buffer, Nothing())
    handles = arena.allocate(40, 4)
    for turn in range(2):
        if turn:
            arena.release(handles[:40])
            arena.release(handles[40:])
            arena.trim()
        taken = arena.take_extents()
        assert taken is not None
        pages.apply(MovePlan(turn + 1, stages=taken[0], after=taken[1]))
    null = geometry.null_blocks * geometry.block_bytes
    assert arena.extents == Extents(null, geometry.high_end)
    assert buffer.needed < null + chunk
    assert buffer.retired > 0
    buffer.set_budget(-(-null // chunk) * chunk)
    assert buffer.mapped == buffer.budget == buffer.needed
