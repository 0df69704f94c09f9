"""How many bytes are backed for the same pages and states, by whose rules.

Every rule has its own virtual space and as much memory as it asks for; what it may not do is to
back less than it holds. None keeps memory back for later, except where that is said.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from heapq import heappop, heappush
from typing import Protocol

from avmp_vllm.backing.elastic_buffer import ElasticBuffer
from avmp_vllm.backing.elastic_pages import ElasticPages
from avmp_vllm.bench.memory.null_memory import NullMemory
from avmp_vllm.bench.memory.traffic import Step
from avmp_vllm.core import Arena, Geometry, MovePlan, kind_of
from avmp_vllm.core.extents import backed_bytes
from avmp_vllm.core.geometry import ceil_div


class Rule(Protocol):
    """A way to place pages and states."""

    def step(self, step: Step) -> int:
        """Follow a step; bytes that are backed after it."""


class Live:
    """The bytes of what is held, and nothing else: no rule can back less."""

    def __init__(self, page_bytes: int, block_bytes: int) -> None:
        self._sizes = page_bytes, block_bytes
        self._held: dict[int, int] = {}

    def step(self, step: Step) -> int:
        for request, pages, blocks in step.taken:
            more = pages * self._sizes[0] + blocks * self._sizes[1]
            self._held[request] = self._held.get(request, 0) + more
        for request in step.dropped:
            del self._held[request]
        return sum(self._held.values())


class Avmp:
    """The arena of the engine: bands, relocation, trim; its null bytes are counted.

    Args:
        geometry: Of the arena.
        chunk: Bytes that are backed at a time.
        every: Steps between two trims; when nothing runs, it is trimmed at once.

    Attributes:
        needed: Bytes outside the gap after the last step, by chunks.
    """

    def __init__(self, geometry: Geometry, chunk: int, every: int) -> None:
        self.arena = Arena(geometry, chunk_bytes=chunk)
        self.needed = 0
        self._chunk, self._every, self._count = chunk, every, 0
        self._held: dict[int, list[int]] = {}

    def step(self, step: Step) -> int:
        arena = self.arena
        for request, pages, blocks in step.taken:
            self._held.setdefault(request, []).extend(arena.allocate(pages, blocks))
        for request in step.dropped:
            handles = self._held.pop(request)
            for kind in (0, 1):
                arena.release([handle for handle in handles if kind_of(handle) == kind])
        self._count += 1
        if step.idle or self._count % self._every == 0:
            arena.trim()
        arena.take_relocations()
        self.needed = backed_bytes(arena.extents, arena.geometry.high_end, self._chunk)
        return self.needed


class _Nothing:
    """Pages whose bytes nobody wants."""

    def apply(self, plan: MovePlan) -> None:
        """Do nothing."""


class AvmpHeld:
    """The same through the buffer that workers have, which gives back what was idle for a while.

    Args:
        avmp: Follows the steps; this one reads where its bands are.
        chunk: As there.
        hold: Seconds for which memory is kept that is not needed.

    Attributes:
        steps, quiet_steps: In all; and without any call of the driver.
    """

    def __init__(self, avmp: Avmp, chunk: int, hold: float) -> None:
        geometry = avmp.arena.geometry
        self._avmp, self._chunk, self._hold = avmp, chunk, hold
        self.buffer = ElasticBuffer(
            NullMemory(chunk), geometry.arena_bytes, chunk, geometry.high_end
        )
        self._pages = ElasticPages(self.buffer, _Nothing())
        self._most: deque[tuple[float, int]] = deque()  # falling needs, the oldest first
        self.steps = self.quiet_steps = 0

    def step(self, step: Step) -> int:
        buffer, arena = self.buffer, self._avmp.arena
        before = sum(buffer.statistics.calls.values())
        while self._most and self._most[-1][1] <= self._avmp.needed:
            self._most.pop()
        self._most.append((step.begin, self._avmp.needed))
        if (taken := arena.take_extents()) is not None:
            stages, after = taken
            top = arena.geometry.high_end
            reach = max(backed_bytes(stage.extents, top, self._chunk) for stage in stages)
            if reach > buffer.budget:
                buffer.set_budget(reach)
            self._pages.apply(MovePlan(self.steps, stages=stages, after=after))
        while self._most[0][0] < step.begin - self._hold:
            self._most.popleft()
        if self._most[0][1] < buffer.budget:
            buffer.set_budget(self._most[0][1])
        self.steps += 1
        self.quiet_steps += before == sum(buffer.statistics.calls.values())
        return buffer.budget


class _Pool:
    """Units of one size in chunks, without relocation.

    Args:
        unit: Bytes of a page or state.
        chunk: Bytes that are backed at a time.
    """

    def __init__(self, unit: int, chunk: int) -> None:
        # A unit larger than a chunk lies in as many as it needs, and shares them with none.
        self.chunk = ceil_div(unit, chunk) * chunk if unit > chunk else chunk
        self.units = self.chunk // unit
        self.held = 0


class KvcachedPool(_Pool):
    """kvcached 0.1: the chunk that last came back is filled first; chunks that are empty go."""

    def __init__(self, unit: int, chunk: int) -> None:
        super().__init__(unit, chunk)
        self._free: OrderedDict[int, int] = OrderedDict()  # chunks with some free: how many
        self._used: dict[int, int] = {}
        self._next = 0

    def take(self, count: int) -> list[int]:
        """Chunks of so many units."""
        taken: list[int] = []
        while len(taken) < count:
            if self._free:
                chunk, free = self._free.popitem()
            else:
                chunk, free = self._next, self.units
                self._next += 1
                self._used[chunk] = 0
                self.held += 1
            some = min(free, count - len(taken))
            self._used[chunk] += some
            if some < free:
                self._free[chunk] = free - some
            taken += [chunk] * some
        return taken

    def give(self, chunks: list[int]) -> None:
        """Take units back."""
        counts: dict[int, int] = {}
        for chunk in chunks:
            counts[chunk] = counts.get(chunk, 0) + 1
        for chunk, count in counts.items():
            free = self._free.pop(chunk, 0) + count
            self._used[chunk] -= count
            if self._used[chunk]:
                self._free[chunk] = free
            else:
                del self._used[chunk]
                self.held -= 1


class ExpandablePool(_Pool):
    """The lowest free place of one range, which is the densest that no relocation can do."""

    def __init__(self, unit: int, chunk: int) -> None:
        super().__init__(unit, chunk)
        self._unit, self._size = unit, chunk
        self._holes: list[int] = []
        self._end = 0
        self._touching: dict[int, int] = {}  # chunk: units that lie in it

    def _chunks(self, place: int) -> range:
        """Chunks under a unit; here they need not begin with one."""
        begin = place * self._unit
        return range(begin // self._size, ceil_div(begin + self._unit, self._size))

    def take(self, count: int) -> list[int]:
        """Places of so many units."""
        taken: list[int] = []
        for _ in range(count):
            if self._holes:
                place = heappop(self._holes)
            else:
                place, self._end = self._end, self._end + 1
            for chunk in self._chunks(place):
                self._touching[chunk] = self._touching.get(chunk, 0) + 1
            taken.append(place)
        self.held = len(self._touching)
        return taken

    def give(self, places: list[int]) -> None:
        """Take units back."""
        for place in places:
            heappush(self._holes, place)
            for chunk in self._chunks(place):
                self._touching[chunk] -= 1
                if not self._touching[chunk]:
                    del self._touching[chunk]
        self.held = len(self._touching)

    @property
    def bytes(self) -> int:
        """Bytes of the chunks that are touched."""
        return self.held * self._size


class TwoPools:
    """Pages and states in pools of their own.

    Args:
        pool: Kind of both.
        page_bytes, block_bytes: Of a unit.
        chunk: Bytes that are backed at a time.
    """

    def __init__(
        self,
        pool: type[KvcachedPool] | type[ExpandablePool],
        page_bytes: int,
        block_bytes: int,
        chunk: int,
    ) -> None:
        self._pools = pool(page_bytes, chunk), pool(block_bytes, chunk)
        self._held: dict[int, tuple[list[int], list[int]]] = {}

    def step(self, step: Step) -> int:
        for request, *counts in step.taken:
            held = self._held.setdefault(request, ([], []))
            for pool, mine, count in zip(self._pools, held, counts, strict=True):
                mine += pool.take(count)
        for request in step.dropped:
            for pool, mine in zip(self._pools, self._held.pop(request), strict=True):
                pool.give(mine)
        return sum(
            pool.bytes if isinstance(pool, ExpandablePool) else pool.held * pool.chunk
            for pool in self._pools
        )
