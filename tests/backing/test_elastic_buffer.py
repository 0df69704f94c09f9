"""Random steps on an elastic buffer against a naive model, over a driver that forgives nothing."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)
from strict_memory import InFlight, Stream, StrictMemory

from avmp_vllm.backing.elastic_buffer import (
    PASSED,
    BudgetExceeded,
    ElasticBuffer,
    runs,
)
from avmp_vllm.backing.memory import BackingError, DriverError, Misaligned
from avmp_vllm.core.extents import Extents, backed_bytes, default_chunk_bytes

CHUNK = 8


class Rig:
    """A buffer over strict memory and a stream, driven as a worker drives it.

    Args:
        chunks: Of the range.
        capacity: Chunks that the system has.
        odd: Bytes that the last chunk's part of the arena lacks.
    """

    def __init__(self, chunks: int, capacity: int, odd: int = 0) -> None:
        self.memory = StrictMemory(capacity, CHUNK)
        self.stream = Stream(self.memory)
        self.size = chunks * CHUNK - odd
        self.chunks = chunks
        self.buffer = ElasticBuffer(self.memory, self.size, CHUNK)
        self.extents = Extents(0, self.size)

    def needed(self, extents: Extents) -> set[int]:
        """Addresses of the chunks in which some byte of the two ends lies, by trying every byte."""
        touched = [*range(extents.low_end), *range(extents.high_begin, self.size)]
        return {self.buffer.address + byte // CHUNK * CHUNK for byte in touched}

    def step(self, before: Extents, after: Extents) -> None:
        """Map, launch work on everything, retire."""
        self.buffer.map(before)
        everything = before.union(self.extents)
        assert self.needed(everything) <= self.memory.allowed
        self.stream.launch(self.needed(before))
        self.buffer.retire(after, self.stream.record())
        self.extents = after


class BufferMachine(RuleBasedStateMachine):
    """Budgets, steps and fences in any order."""

    @initialize(
        chunks=st.integers(1, 12), capacity=st.integers(0, 14), odd=st.integers(0, CHUNK - 1)
    )
    def make(self, chunks: int, capacity: int, odd: int) -> None:
        self.rig = Rig(chunks, capacity, odd)
        self.target = 0

    def draw_extents(self, data: st.DataObject, within: Extents | None = None) -> Extents:
        """Two ends that do not cross, inside others if any."""
        size = self.rig.size
        most_low, least_high = within or (size, 0)
        low = data.draw(st.integers(0, most_low))
        high = data.draw(st.integers(max(low, least_high), size))
        return Extents(low, high)

    @rule(chunks=st.integers(0, 14))
    def set_budget(self, chunks: int) -> None:
        buffer, memory = self.rig.buffer, self.rig.memory
        had = buffer.handles
        got = buffer.set_budget(chunks * CHUNK + 3)
        if chunks > had:
            assert got == min(chunks, memory.capacity) * CHUNK
        else:
            assert chunks * CHUNK <= got <= had * CHUNK
        self.target = min(chunks, max(had, memory.capacity))

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        rig = self.rig
        before = self.draw_extents(data)
        reach = before.union(rig.extents)
        after = self.draw_extents(data, within=reach)
        snapshot = self.snapshot()
        if len(rig.needed(reach)) > rig.buffer.handles:
            with pytest.raises(BudgetExceeded):
                rig.step(before, after)
            assert self.snapshot() == snapshot
        else:
            rig.step(before, after)

    @rule(data=st.data())
    def small_step(self, data: st.DataObject) -> None:
        """A step like most: near where the last one was."""
        rig = self.rig
        low = min(max(rig.extents.low_end + data.draw(st.integers(-5, 5)), 0), rig.size)
        high = min(max(rig.extents.high_begin + data.draw(st.integers(-5, 5)), low), rig.size)
        before = Extents(low, high)
        if len(rig.needed(before.union(rig.extents))) <= rig.buffer.handles:
            rig.step(before, before)

    @rule(count=st.integers(1, 4))
    def finish(self, count: int) -> None:
        self.rig.stream.finish(count)

    @rule()
    def poll(self) -> None:
        rig = self.rig
        before, released = rig.buffer.handles, rig.memory.calls.count("release")
        given = rig.buffer.poll()
        assert given == (before - rig.buffer.handles) * CHUNK
        assert rig.memory.calls.count("release") - released == before - rig.buffer.handles

    @rule()
    def settle(self) -> None:
        """After all fences, only what is needed can exceed the budget."""
        rig = self.rig
        rig.buffer.settle()
        needed = len(rig.needed(rig.extents))
        assert rig.buffer.handles <= max(self.target, needed)

    @rule(kind=st.sampled_from(["map", "allow"]), after=st.integers(0, 3), data=st.data())
    def fail(self, kind: str, after: int, data: st.DataObject) -> None:
        """The driver fails in the middle of a step: nothing is lost and nothing is left."""
        rig = self.rig
        before = self.draw_extents(data)
        if len(rig.needed(before.union(rig.extents))) > rig.buffer.handles:
            return
        rig.memory.fail_after[kind] = after
        needed = rig.needed(rig.extents)
        try:
            rig.buffer.map(before)
        except DriverError:
            pass
        else:
            rig.buffer.retire(rig.extents, rig.stream.record())
        rig.memory.fail_after.clear()
        assert needed <= rig.memory.allowed

    def snapshot(self) -> tuple[object, ...]:
        """What a refused call must leave as it was."""
        buffer, memory = self.rig.buffer, self.rig.memory
        return dict(memory.where), buffer.handles, buffer.mapped, buffer.retired, list(memory.calls)

    @invariant()
    def holds(self) -> None:
        rig, buffer, memory = self.rig, self.rig.buffer, self.rig.memory
        assert buffer.handles == len(memory.alive) <= memory.capacity
        assert buffer.mapped == len(memory.where) * CHUNK
        assert memory.allowed == set(memory.where)
        needed = rig.needed(rig.extents)
        assert needed <= memory.allowed
        assert buffer.needed == len(needed) * CHUNK == backed_bytes(rig.extents, rig.size, CHUNK)
        assert buffer.retired == (len(memory.where) - len(needed)) * CHUNK
        assert len(set(memory.where.values())) == len(memory.where)
        counted = buffer.statistics.calls
        assert counted == {kind: memory.calls.count(kind) for kind in counted}
        released = memory.calls.count("release") * CHUNK
        assert buffer.statistics.given_back == released

    def teardown(self) -> None:
        if not hasattr(self, "rig"):
            return
        self.rig.stream.finish(10**6)
        self.rig.buffer.close()
        self.rig.buffer.close()
        memory = self.rig.memory
        assert not memory.alive
        assert not memory.where
        assert memory.calls[-1] == "free"


TestBuffer = BufferMachine.TestCase
TestBuffer.settings = settings(
    max_examples=250,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
)


def breathe(rig: Rig, turns: int) -> None:
    """Steps around one size, with two of them in flight."""
    for turn in range(turns):
        low = (3 + turn % 3) * CHUNK
        high = rig.size - (2 + turn % 2) * CHUNK
        rig.step(Extents(low, high), Extents(low, high))
        if turn > 1:
            rig.stream.finish()


def test_steady_traffic_makes_no_call() -> None:
    rig = Rig(20, 20)
    rig.buffer.set_budget(10 * CHUNK)
    breathe(rig, 6)
    rig.memory.calls.clear()
    breathe(rig, 60)
    assert rig.memory.calls == []
    assert rig.buffer.statistics.regained > 20
    assert rig.buffer.statistics.fence_waits == 0


def test_memory_moves_from_one_end_to_the_other_behind_its_fence() -> None:
    rig = Rig(20, 20)
    rig.buffer.set_budget(6 * CHUNK)
    rig.step(Extents(6 * CHUNK, rig.size), Extents(CHUNK, rig.size))
    rig.memory.calls.clear()
    rig.step(Extents(CHUNK, rig.size - 5 * CHUNK), Extents(CHUNK, rig.size - 5 * CHUNK))
    # One call a run, the mapping itself excepted.
    assert rig.memory.calls == ["unmap"] + ["map"] * 5 + ["allow"]
    assert rig.buffer.statistics.fence_waits == 1


def test_control_a_fence_that_lies_is_noticed() -> None:
    rig = Rig(20, 20)
    rig.stream.honest = False
    rig.buffer.set_budget(6 * CHUNK)
    rig.step(Extents(6 * CHUNK, rig.size), Extents(CHUNK, rig.size))
    with pytest.raises(InFlight):
        rig.step(Extents(CHUNK, rig.size - 5 * CHUNK), Extents(CHUNK, rig.size - 5 * CHUNK))


def test_control_a_fence_recorded_too_early_is_noticed() -> None:
    """The event must be on the stream that runs the kernels, and behind them."""
    rig = Rig(20, 20)
    rig.buffer.set_budget(6 * CHUNK)
    early = rig.stream.record()
    rig.buffer.map(Extents(6 * CHUNK, rig.size))
    rig.stream.launch(rig.needed(Extents(6 * CHUNK, rig.size)))
    rig.buffer.retire(Extents(CHUNK, rig.size), early)
    with pytest.raises(InFlight):
        rig.buffer.map(Extents(CHUNK, rig.size - 5 * CHUNK))


def test_a_lowered_budget_waits_for_what_is_in_flight() -> None:
    rig = Rig(10, 10)
    rig.buffer.set_budget(8 * CHUNK)
    rig.step(Extents(8 * CHUNK, rig.size), Extents(2 * CHUNK, rig.size))
    assert rig.buffer.set_budget(4 * CHUNK) == 8 * CHUNK
    assert rig.buffer.poll() == 0
    rig.stream.finish()
    assert rig.buffer.poll() == 4 * CHUNK
    assert rig.buffer.budget == 4 * CHUNK
    assert rig.memory.calls.count("unmap") == 1
    # What is still retired comes back without a call.
    rig.memory.calls.clear()
    rig.buffer.map(Extents(4 * CHUNK, rig.size))
    assert rig.buffer.needed == 4 * CHUNK


def test_a_system_without_memory_makes_a_smaller_budget() -> None:
    rig = Rig(10, 3)
    assert rig.buffer.set_budget(8 * CHUNK) == 3 * CHUNK
    rig.memory.capacity = 9
    assert rig.buffer.poll() == 0, "it does not go on by itself"
    assert rig.buffer.set_budget(8 * CHUNK) == 8 * CHUNK


def test_what_comes_back_needs_no_room_for_a_driver_that_failed() -> None:
    """create fails for another reason than memory: what exists stays, and nothing leaks."""
    rig = Rig(10, 10)
    rig.memory.fail_after["create"] = 2
    with pytest.raises(DriverError):
        rig.buffer.set_budget(5 * CHUNK)
    assert rig.buffer.handles == len(rig.memory.alive) == 2
    rig.buffer.close()
    assert not rig.memory.alive


def test_a_driver_that_fails_in_a_step_leaves_it_as_it_was() -> None:
    """kvcached once leaked what it had mapped of a batch when the rest failed."""
    for kind, after in (("map", 2), ("allow", 0), ("allow", 1)):
        rig = Rig(10, 10)
        rig.buffer.set_budget(8 * CHUNK)
        rig.memory.fail_after[kind] = after
        with pytest.raises(DriverError):
            rig.buffer.map(Extents(4 * CHUNK, rig.size - 3 * CHUNK))
        assert not rig.memory.where
        assert (rig.buffer.mapped, rig.buffer.handles) == (0, 8)
        rig.memory.fail_after.clear()
        rig.buffer.map(Extents(4 * CHUNK, rig.size - 4 * CHUNK))
        assert rig.buffer.needed == 8 * CHUNK


def test_what_a_step_needs_again_is_not_taken_for_what_it_needs_anew() -> None:
    """Chunk 1 is retired the longest, and needed: the other retired one serves the high end."""
    rig = Rig(10, 10)
    rig.buffer.set_budget(4 * CHUNK)
    rig.step(Extents(3 * CHUNK, rig.size), Extents(CHUNK, rig.size))
    rig.stream.finish()
    rig.step(Extents(2 * CHUNK, rig.size - 2 * CHUNK), Extents(2 * CHUNK, rig.size - 2 * CHUNK))
    assert rig.buffer.statistics.regained == 1
    assert rig.memory.calls.count("unmap") == 1


def test_what_is_needed_after_a_step_was_needed_before() -> None:
    rig = Rig(10, 10)
    rig.buffer.set_budget(10 * CHUNK)
    rig.buffer.map(Extents(CHUNK, rig.size))
    with pytest.raises(BackingError, match="chunk 1 is needed after a step and was not before"):
        rig.buffer.retire(Extents(2 * CHUNK, rig.size), PASSED)


def test_wrong_sizes_are_refused() -> None:
    memory = StrictMemory(4, CHUNK)
    with pytest.raises(Misaligned):
        ElasticBuffer(memory, 100, CHUNK + 1)
    buffer = ElasticBuffer(memory, 4 * CHUNK, CHUNK)
    buffer.set_budget(4 * CHUNK)
    with pytest.raises(BackingError, match="reach beyond the 4 chunks"):
        buffer.map(Extents(4 * CHUNK + 1, 4 * CHUNK + 1))


def test_chunks_of_a_budget() -> None:
    mib = 1 << 20
    assert default_chunk_bytes(100 * mib, 4096) == 2 * mib
    assert default_chunk_bytes(4096 * mib, 2 * mib) == 16 * mib
    assert default_chunk_bytes(1 << 40, 2 * mib) == 32 * mib
    assert default_chunk_bytes(700 * mib, 2 * mib) == 2 * mib
    assert list(runs([1, 2, 3, 5, 8, 9])) == [(1, 3), (5, 1), (8, 2)]
    assert list(runs([])) == []
