"""A range of addresses that is larger than the memory behind it.

Two levels, kept apart. The *budget* is physical memory that exists, in chunks: `set_budget` takes
it from the system and gives it back, outside of steps, and may get less than it asked for.
*Mapping* puts chunks of the budget where a step needs them; it takes nothing from the system, so it
cannot run out of memory.

A chunk that is needed no more is *retired*: it stays mapped until its memory is wanted elsewhere or
the budget falls, and is unmapped only when the fence that it was retired behind has passed. So a
buffer that breathes around one size makes no call at all::

    pool       handle, mapped nowhere
    needed     mapped, inside the extents
    retired    mapped, outside the extents, behind a fence

    pool + needed + retired == handles that exist
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

from avmp_vllm.backing.memory import BackingError, OutOfMemory, VirtualMemory
from avmp_vllm.core.extents import Extents


class BudgetExceeded(BackingError):
    """A step needs more chunks than the budget has. Nothing changed."""


class Fence(Protocol):
    """A point in a stream of work, as ``torch.cuda.Event``."""

    def query(self) -> bool:
        """Whether everything before it is done."""

    def synchronize(self) -> None:
        """Wait until everything before it is done."""


class Passed:
    """The fence of work that is done when its call returns, as on a CPU."""

    def query(self) -> bool:
        """True."""
        return True

    def synchronize(self) -> None:
        """Return at once."""


#: What to retire behind where nothing runs later.
PASSED = Passed()


@dataclass
class BackingStatistics:
    """What was asked of the driver.

    Attributes:
        calls: Driver calls by kind: create, map, allow, unmap, release.
        given_back: Bytes released to the system.
        fence_waits: Times that a step waited for a fence.
        regained: Retired chunks that were needed again before they were unmapped.
    """

    calls: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("create", "map", "allow", "unmap", "release"), 0)
    )
    given_back: int = 0
    fence_waits: int = 0
    regained: int = 0


def runs(chunks: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Group ascending numbers into runs: first, and how many."""
    first, count = -1, 0
    for chunk in chunks:
        if count and chunk == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = chunk, 1
    if count:
        yield first, count


#: Chunks ``[first, second)`` that are not needed; all others are.
Hole = tuple[int, int]


def _outside(chunks: Hole, other: Hole) -> Iterable[int]:
    """Chunks of one hole that are not in another, ascending."""
    (begin, end), (low, high) = chunks, other
    if low >= high:
        return range(begin, end)
    return chain(range(begin, min(end, low)), range(max(begin, high), end))


class ElasticBuffer:
    """A reserved range of which two ends have memory. One thread calls it.

    Args:
        memory: The driver; the buffer does not close it.
        size: Bytes of the range.
        chunk_bytes: Bytes of a chunk, a multiple of the driver's granularity.
        high_end: Where the high end's bytes end; what is above never gets memory of its own. The
            range's end by default.

    Attributes:
        address: First address of the range.
        size: Bytes of it, rounded up to whole chunks.
        chunk_bytes: Bytes of a chunk.
        statistics: Counters.

    Raises:
        Misaligned: The chunk is no multiple of the granularity.
        OutOfMemory: There is no room for so many addresses.
    """

    def __init__(
        self, memory: VirtualMemory, size: int, chunk_bytes: int, high_end: int | None = None
    ) -> None:
        self._memory = memory
        self.chunk_bytes = chunk_bytes
        self._high_end = size if high_end is None else high_end
        self._top = -(-self._high_end // chunk_bytes)
        self.size = -(-size // chunk_bytes) * chunk_bytes
        self.address = memory.reserve(self.size)
        self.statistics = BackingStatistics()
        self._hole: Hole = (0, self._top)
        self._handle_at: dict[int, int] = {}
        self._pool: list[int] = []
        self._retired: dict[int, Fence] = {}  # the longest retired first
        self._target = 0
        self._closed = False

    # -- sizes -------------------------------------------------------------------------------------

    @property
    def handles(self) -> int:
        """Chunks that exist."""
        return len(self._pool) + len(self._handle_at)

    @property
    def budget(self) -> int:
        """Bytes that exist."""
        return self.handles * self.chunk_bytes

    @property
    def mapped(self) -> int:
        """Bytes that are mapped, retired ones included."""
        return len(self._handle_at) * self.chunk_bytes

    @property
    def retired(self) -> int:
        """Bytes that are mapped and not needed."""
        return len(self._retired) * self.chunk_bytes

    @property
    def needed(self) -> int:
        """Bytes that are mapped and needed."""
        return self.mapped - self.retired

    # -- the budget --------------------------------------------------------------------------------

    def set_budget(self, budget: int) -> int:
        """Take memory from the system or give it back. Between steps only.

        What is needed, or behind a fence that has not passed, `poll` gives back when it can be.

        Args:
            budget: Bytes that shall exist; whole chunks of it do.

        Returns:
            Bytes that exist now. Fewer than asked for if the system has no more, in which case that
            is the budget.

        Raises:
            BackingError: The driver failed for another reason; what exists stays.
        """
        self._target = budget // self.chunk_bytes
        while self.handles < self._target:
            try:
                handle = self._memory.create(self.chunk_bytes)
            except OutOfMemory:
                self._target = self.handles
                break
            self.statistics.calls["create"] += 1
            self._pool.append(handle)
        self.poll()
        return self.budget

    def poll(self) -> int:
        """Give back what exceeds the budget and is neither needed nor behind a fence.

        Costs a comparison where nothing does.

        Returns:
            Bytes given back.
        """
        excess = self.handles - self._target
        if excess <= 0:
            return 0
        if excess > len(self._pool):
            self._unmap_retired(excess - len(self._pool), self._hole, wait=False)
        gone = min(excess, len(self._pool))
        for _ in range(gone):
            self._memory.release(self._pool[-1])
            self._pool.pop()
            self.statistics.calls["release"] += 1
        self.statistics.given_back += gone * self.chunk_bytes
        return gone * self.chunk_bytes

    def settle(self) -> int:
        """Wait for the fences of everything retired, then `poll`."""
        self._wait(self._retired.values())
        return self.poll()

    # -- steps -------------------------------------------------------------------------------------

    def map(self, extents: Extents) -> None:
        """Put memory behind everything that a step needs, beside what is needed already.

        Raises:
            BudgetExceeded: The budget has too few chunks. Nothing changed.
            BackingError: The driver failed. Nothing changed.
        """
        begin, end = self._hole_of(extents)
        hole = max(begin, self._hole[0]), min(end, self._hole[1])
        if hole == self._hole:
            return
        added = list(_outside(self._hole, hole))
        fresh = [chunk for chunk in added if chunk not in self._handle_at]
        if fresh:
            self._fill(fresh, hole)
        self._hole = hole
        for chunk in added:
            if self._retired.pop(chunk, None) is not None:
                self.statistics.regained += 1

    def retire(self, extents: Extents, fence: Fence) -> None:
        """Let go of everything that is not needed after a step.

        Args:
            extents: What is needed from here on, all of it needed before.
            fence: Passes when nothing that was launched touches the rest any more.
        """
        hole = self._hole_of(extents)
        for chunk in _outside(self._hole, hole):
            raise BackingError(f"chunk {chunk} is needed after a step and was not before")
        for chunk in _outside(hole, self._hole):
            self._retired[chunk] = fence
        self._hole = hole

    def close(self) -> None:
        """Wait for all fences and give everything back. Views of the range fault afterwards."""
        if self._closed:
            return
        self._wait(self._retired.values())
        self._retired.clear()
        self._unmap(sorted(self._handle_at))
        while self._pool:
            self._memory.release(self._pool.pop())
        self._memory.free(self.address)
        self._closed = True

    # -- parts -------------------------------------------------------------------------------------

    def _hole_of(self, extents: Extents) -> Hole:
        """The chunks that need no memory."""
        begin = -(-extents.low_end // self.chunk_bytes)
        end = self._top
        if extents.high_begin < self._high_end:
            end = extents.high_begin // self.chunk_bytes
        if begin > self._top:
            raise BackingError(f"{extents} reach beyond the {self._top} chunks of the buffer")
        return begin, max(begin, end)

    def _fill(self, chunks: Sequence[int], hole: Hole) -> None:
        """Map chunks from the pool, and for what it lacks from the retired ones inside the hole."""
        short = len(chunks) - len(self._pool)
        if short > 0:
            spare = sum(hole[0] <= chunk < hole[1] for chunk in self._retired)
            if spare < short:
                raise BudgetExceeded(
                    f"a step needs {len(chunks)} more chunk(s) of {self.chunk_bytes} bytes: "
                    f"{len(self._pool)} are in the pool, {spare} retired, {self.handles} exist"
                )
            self._unmap_retired(short, hole, wait=True)
        calls, done = self.statistics.calls, 0
        try:
            for first, count in runs(chunks):
                for chunk in range(first, first + count):
                    self._memory.map(self._at(chunk), self._pool[-1])
                    self._handle_at[chunk] = self._pool.pop()
                    calls["map"] += 1
                    done += 1
                self._memory.allow(self._at(first), count * self.chunk_bytes)
                calls["allow"] += 1
        except BackingError:
            self._unmap(chunks[:done])
            raise

    def _unmap_retired(self, count: int, hole: Hole, wait: bool) -> None:
        """Bring chunks into the pool that are retired inside a hole, the longest retired first.

        Args:
            count: How many.
            hole: Outside of it a chunk is about to be needed again.
            wait: Whether to wait for fences; else fewer chunks may come.
        """
        chosen: list[int] = []
        passed: Fence | None = None
        for chunk, fence in self._retired.items():
            if len(chosen) == count:
                break
            if not hole[0] <= chunk < hole[1]:
                continue
            if fence is not passed and not fence.query():
                if not wait:
                    break
                self._wait([fence])
            passed = fence
            chosen.append(chunk)
        self._unmap(sorted(chosen))

    def _unmap(self, chunks: Sequence[int]) -> None:
        """Unmap chunks by runs; their handles go to the pool."""
        for first, count in runs(chunks):
            self._memory.unmap(self._at(first), count * self.chunk_bytes)
            self.statistics.calls["unmap"] += 1
            for chunk in range(first, first + count):
                self._retired.pop(chunk, None)
                self._pool.append(self._handle_at.pop(chunk))

    def _wait(self, fences: Iterable[Fence]) -> None:
        """Wait for fences that have not passed."""
        passed: Fence | None = None
        for fence in fences:
            if fence is not passed and not fence.query():
                self.statistics.fence_waits += 1
                fence.synchronize()
            passed = fence

    def _at(self, chunk: int) -> int:
        return self.address + chunk * self.chunk_bytes
