"""The pages of one pool: where they are, which are free, how the band grows and shrinks.

A band counts its pages by *position* from its outer end, so that both pools are one piece of code::

    position        1   2   3  ..............  capacity | capacity + 1 ...
    KV page      K-1 K-2 K-3                            |  gap
    SSM block     s0 s0+1 s0+2                          |  gap

Handles and positions are a bijection at all times: every handle that ever existed has one position,
and every position one handle, whether mapped or free. So allocating and freeing write nothing to
the page table; only a relocation does, by swapping two entries.

Free handles wait in one stack for each *chunk* of neighbouring positions. Allocation empties the
outermost chunk first, which keeps the inner end free and relocation rare, at the cost of a list
slice for a whole run of pages.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from heapq import heappop, heappush

from avmp_vllm.core.geometry import Geometry
from avmp_vllm.core.handles import ID_MASK, Kind
from avmp_vllm.core.plan import Relocation

#: A chunk spans about so many bytes, and so many pages at most.
CHUNK_BYTES = 1 << 24
CHUNK_PAGES = 64


def _chunk_shift(unit_bytes: int) -> int:
    pages = max(1, min(CHUNK_PAGES, CHUNK_BYTES // unit_bytes))
    return pages.bit_length() - 1


class Band:
    """One pool's band of the arena.

    Attributes:
        kind: Which pool.
        unit: Bytes of a page.
        capacity: Positions 1..capacity belong to the band.
        free: Free positions among them.
    """

    __slots__ = (
        "_chunks",
        "_handle_at",
        "_nonempty",
        "_origin",
        "_position_of",
        "_queued",
        "_shift",
        "_step",
        "capacity",
        "free",
        "kind",
        "unit",
    )

    def __init__(self, geometry: Geometry, kind: Kind) -> None:
        self.kind = kind
        self.unit = geometry.unit(kind)
        self.capacity = 0
        self.free = 0
        # physical = origin + step * position
        self._step = 1 if kind is Kind.SSM else -1
        self._origin = geometry.origin(kind)
        # The page table and its inverse; both grow with the largest capacity ever reached. Entry 0
        # is the null page's.
        self._position_of = array("i", [0])
        self._handle_at = array("i", [kind.tag])
        self._shift = _chunk_shift(self.unit)
        self._chunks: list[list[int]] = []
        # Chunks that may have free handles: a heap of chunk numbers, outermost first, and a flag
        # for each chunk so that none stands in it twice.
        self._nonempty: list[int] = []
        self._queued = bytearray()

    # -- the page table ------------------------------------------------------------------------

    def physical(self, handle: int) -> int:
        """Resolve a handle of this pool to its physical index; the null handle resolves to 0."""
        number = handle & ID_MASK
        return self._origin + self._step * self._position_of[number] if number else 0

    def position(self, handle: int) -> int:
        """Position of a handle, 1 for the outermost page."""
        return self._position_of[handle & ID_MASK]

    def positions(self) -> bytes:
        """Positions of all known handles in the order of their ids, the null page's 0 in front."""
        return self._position_of.tobytes()

    def handle_at(self, position: int) -> int:
        """Handle at a position."""
        return self._handle_at[position]

    @property
    def chunk_pages(self) -> int:
        """Pages of a whole chunk."""
        return 1 << self._shift

    @property
    def known(self) -> int:
        """Handles that exist so far, which is the largest capacity ever reached."""
        return len(self._position_of) - 1

    def free_handles(self) -> list[int]:
        """All free handles, outermost chunk first (for checks; the band is not changed)."""
        return [handle for chunk in self._chunks for handle in chunk]

    # -- allocation ----------------------------------------------------------------------------

    def take(self, count: int) -> list[int]:
        """Hand out free handles, outermost chunk first.

        Args:
            count: At most ``self.free``.
        """
        assert 0 <= count <= self.free, (count, self.free)
        self.free -= count
        chunks, nonempty = self._chunks, self._nonempty
        if count == 1:
            while not (chunk := chunks[nonempty[0]]):
                self._queued[heappop(nonempty)] = 0
            return [chunk.pop()]
        taken: list[int] = []
        while count:
            chunk = chunks[nonempty[0]]
            if count < len(chunk):
                taken += chunk[: -count - 1 : -1]
                del chunk[-count:]
                break
            taken += chunk[::-1]
            count -= len(chunk)
            chunk.clear()
            self._queued[heappop(nonempty)] = 0
        return taken

    def give(self, handles: Sequence[int]) -> None:
        """Take back handles that nobody uses any more."""
        position_of, chunks, shift = self._position_of, self._chunks, self._shift
        queued, current = self._queued, -1
        push: Callable[[int], None]
        for handle in handles:
            number = (position_of[handle & ID_MASK] - 1) >> shift
            if number != current:  # a request's pages mostly are neighbours
                current, push = number, chunks[number].append
                if not queued[number]:
                    queued[number] = 1
                    heappush(self._nonempty, number)
            push(handle)
        self.free += len(handles)

    # -- growth and shrinking ------------------------------------------------------------------

    def grow(self, count: int) -> None:
        """Add positions at the inner end; the caller knows that their bytes are in the gap."""
        first, last = self.capacity + 1, self.capacity + count
        if last >= len(self._position_of):
            tag, known = self.kind.tag, len(self._position_of)
            self._position_of.extend(range(known, last + 1))
            self._handle_at.extend(range(known + tag, last + 1 + tag))
        start = first
        while start <= last:
            number = (start - 1) >> self._shift
            end = min((number + 1) << self._shift, last)
            if number == len(self._chunks):
                self._chunks.append([])
                self._queued.append(0)
            # A stack hands out its last handle first: keep the outermost last.
            chunk = self._handle_at[start : end + 1].tolist()[::-1]
            self._chunks[number] = chunk + self._chunks[number]
            if not self._queued[number]:
                self._queued[number] = 1
                heappush(self._nonempty, number)
            start = end + 1
        self.capacity = last
        self.free += count

    def shrink(self, count: int) -> list[Relocation]:
        """Give up the innermost positions, moving mapped pages out of them.

        Args:
            count: At most ``self.free``, so that every mapped page finds a place.

        Returns:
            The relocations, in the order in which they must be applied.
        """
        assert 0 <= count <= self.free, (count, self.free)
        keep = self.capacity - count
        first_chunk = keep >> self._shift
        leaving: set[int] = set()
        for number in range(first_chunk, ((self.capacity - 1) >> self._shift) + 1):
            chunk = self._chunks[number]
            if number << self._shift < keep:  # the chunk in which the cut falls
                gone = [h for h in chunk if self._position_of[h & ID_MASK] > keep]
                self._chunks[number] = [h for h in chunk if self._position_of[h & ID_MASK] <= keep]
            else:
                gone = chunk
                self._chunks[number] = []
            leaving.update(gone)
        self.free -= len(leaving)
        # The innermost mapped page goes first; each takes the outermost hole.
        mapped = [
            position
            for position in range(self.capacity, keep, -1)
            if self._handle_at[position] not in leaving
        ]
        self.capacity = keep
        return list(map(self._swap, mapped, self._take_outermost(len(mapped))))

    def _take_outermost(self, count: int) -> list[int]:
        """Like `take`, by the page and not by the chunk: a page that moves shall rest."""
        taken: list[int] = []
        while len(taken) < count:
            chunk = self._chunks[self._nonempty[0]]
            chunk.sort(key=self.position, reverse=True)
            taken += self.take(min(count - len(taken), max(len(chunk), 1)))
        return taken

    def _swap(self, position: int, displaced: int) -> Relocation:
        """Exchange the mapped page at a position with a free one."""
        handle = self._handle_at[position]
        target = self._position_of[displaced & ID_MASK]
        self._position_of[handle & ID_MASK] = target
        self._position_of[displaced & ID_MASK] = position
        self._handle_at[target] = handle
        self._handle_at[position] = displaced
        return Relocation(
            self.kind,
            handle,
            displaced,
            self._origin + self._step * position,
            self._origin + self._step * target,
        )

    # -- checks --------------------------------------------------------------------------------

    def problems(self) -> list[str]:
        """Name what does not add up (empty: nothing)."""
        name, found = self.kind.label, []
        free = self.free_handles()
        if len(free) != self.free:
            found.append(f"{name}: {self.free} free pages counted, {len(free)} in the stacks")
        if len(set(free)) != len(free):
            found.append(f"{name}: a handle is free twice")
        for number in range(1, len(self._position_of)):
            position = self._position_of[number]
            if self._handle_at[position] != number | self.kind.tag:
                found.append(f"{name}: handle {number} and position {position} disagree")
        for chunk_number, chunk in enumerate(self._chunks):
            if chunk and not self._queued[chunk_number]:
                found.append(f"{name}: chunk {chunk_number} has free pages but is not queued")
            for handle in chunk:
                position = self._position_of[handle & ID_MASK]
                if (position - 1) >> self._shift != chunk_number or position > self.capacity:
                    found.append(f"{name}: free handle {handle} stands in chunk {chunk_number}")
        if len(set(self._nonempty)) != len(self._nonempty):
            found.append(f"{name}: a chunk is queued twice")
        return found
