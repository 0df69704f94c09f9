"""A user of the arena, a naive model of what it must do, and a memory in which lost bytes show.

The model knows nothing of bands, gaps, chunks or migration: it counts handles, and lays pages out
from both ends by trying every place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from avmp_vllm.core import (
    ID_MASK,
    AllocationFailure,
    Arena,
    Geometry,
    Kind,
    PageGroup,
    Relocation,
    kind_of,
)
from avmp_vllm.core.tables import Layout, Table, arena_geometry


def plain_geometry(arena_bytes: int, kv: Layout, ssm: Layout, page_tokens: int = 16) -> Geometry:
    """An arena over one layout of each kind.

    Args:
        arena_bytes: Bytes of the arena.
        kv: Attention layers, by the bytes of a token.
        ssm: SSM layers, by the bytes of a state.
        page_tokens: Tokens of a page.
    """
    page = Layout(kv.layer_bytes * page_tokens, kv.layers)
    return arena_geometry(arena_bytes, [Table((page,), PageGroup(page_tokens))], [ssm])


def assert_everything_happened(arena: Arena) -> None:
    """Both pools have grown, moved pages, given cached ones up and refused."""
    statistics = arena.statistics
    for kind in Kind:
        assert statistics.migrations[kind] > 5
        assert statistics.relocations[kind] > 5
        assert statistics.evictions[kind] > 5
        assert statistics.failures[kind] > 0


class NaiveModel:
    """Which handles are live and cached, and exactly when an allocation must succeed.

    Args:
        arena_bytes: N.
        page_bytes: F.
        block_bytes: B.
    """

    def __init__(self, arena_bytes: int, page_bytes: int, block_bytes: int) -> None:
        self.unit = {Kind.KV: page_bytes, Kind.SSM: block_bytes}
        self.arena_bytes = arena_bytes
        self.live: dict[int, int] = {}  # handle: references
        self.cached: dict[int, None] = {}  # the one to be evicted first in front
        null = max(page_bytes, block_bytes)
        first_block = next(s for s in range(null + 1) if s * block_bytes >= null)
        #: Where the bytes begin that blocks may have, and where those end that pages may have.
        self.low = first_block * block_bytes
        self.high = arena_bytes // page_bytes * page_bytes
        #: Bytes that must stay between the two ends.
        self.reserve = 0

    def count(self, kind: Kind, handles: Iterable[int]) -> int:
        """How many handles are of a pool."""
        return sum(kind_of(handle) is kind for handle in handles)

    def room(self, pages: int, blocks: int) -> bool:
        """Whether so many pages can lie at the high end and so many blocks at the low end."""
        top_of_blocks = self.low + blocks * self.unit[Kind.SSM]
        bottom_of_pages = self.high - pages * self.unit[Kind.KV]
        return top_of_blocks + self.reserve <= bottom_of_pages

    def must_succeed(self, pages: int, blocks: int) -> bool:
        """Whether the arena has to serve a request beside what is live; nothing always fits."""
        return not (pages or blocks) or self.room(
            self.count(Kind.KV, self.live) + pages, self.count(Kind.SSM, self.live) + blocks
        )

    def must_evict(self, pages: int, blocks: int) -> list[int]:
        """Cached handles that must go, in order, if no place is free otherwise."""
        wanted = [pages, blocks]
        for handle in (*self.live, *self.cached):
            wanted[kind_of(handle)] += 1
        gone = []
        for handle in self.cached:
            if self.room(*wanted):
                break
            wanted[kind_of(handle)] -= 1
            gone.append(handle)
        return gone


class Damage(AssertionError):
    """A page does not hold the bytes that were written to it."""


class ShadowMemory:
    """A worker: real bytes, and a page table that learns of moves from relocations alone.

    Args:
        geometry: Sizes of the arena.
    """

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.bytes = bytearray(geometry.arena_bytes)
        self.moved: dict[int, int] = {}

    def physical(self, handle: int) -> int:
        """Where a handle's page is, by what this worker has been told."""
        number = handle & ID_MASK
        if kind_of(handle) is Kind.SSM:
            start = self.geometry.null_blocks - 1 + number
        else:
            start = self.geometry.pages - number
        return self.moved.get(handle, start)

    def span(self, kind: Kind, index: int) -> slice:
        """The bytes of a physical page."""
        unit = self.geometry.unit(kind)
        assert unit * index >= self.geometry.null_bytes, "a page lies over the null bytes"
        assert unit * (index + 1) <= self.geometry.arena_bytes, "a page leaves the arena"
        return slice(unit * index, unit * (index + 1))

    def relocate(self, moves: Iterable[Relocation]) -> None:
        """Apply relocations in the order given."""
        for move in moves:
            source, target = (self.span(move.kind, index) for index in (move.source, move.target))
            self.bytes[target] = self.bytes[source]
            self.moved[move.handle] = move.target
            self.moved[move.displaced] = move.source

    def zero(self, kind: Kind, index: int) -> None:
        """Clear a physical page."""
        self.bytes[self.span(kind, index)] = bytes(self.geometry.unit(kind))

    def content(self, handle: int, tag: int) -> bytes:
        """What a page with this tag holds: no zero byte, and never as the 254 tags before it."""
        unit = self.geometry.unit(kind_of(handle))
        word = bytes(1 + tag // 255**place % 255 for place in range(4))
        return (word * (unit // 4 + 1))[:unit]

    def write(self, handle: int, tag: int) -> None:
        """Fill a page."""
        self.bytes[self.span(kind_of(handle), self.physical(handle))] = self.content(handle, tag)

    def check(self, handle: int, tag: int) -> None:
        """Compare a page with what was written.

        Raises:
            Damage: A byte differs.
        """
        if self.bytes[self.span(kind_of(handle), self.physical(handle))] != self.content(
            handle, tag
        ):
            raise Damage(f"handle {handle} lost the bytes of tag {tag}")


class Client:
    """Counts references, keeps what is worth keeping, and lets the worker write once a step.

    Args:
        geometry: Of the arena.
        migration_batch: Of the arena.
        memory: The worker's memory; None for an arena too large to hold in bytes.
        deliver: What happens to a step's relocations on the way to the worker (negative controls).
        chunk_bytes: Of the arena.
    """

    def __init__(
        self,
        geometry: Geometry,
        migration_batch: int,
        memory: ShadowMemory | None = None,
        deliver: Callable[[list[Relocation]], list[Relocation]] = list,
        chunk_bytes: int | None = None,
    ) -> None:
        self.evicted: list[int] = []
        self.arena = Arena(
            geometry,
            migration_batch=migration_batch,
            on_evict=self.evicted.extend,
            chunk_bytes=chunk_bytes,
        )
        self.model = NaiveModel(geometry.arena_bytes, geometry.page_bytes, geometry.block_bytes)
        self.memory = memory
        self.deliver = deliver
        self.zero_first = False
        self.tags: dict[int, int] = {}  # written pages
        self.unwritten: dict[int, int] = {}  # pages handed out since the last step
        self.zeros: list[int] = []
        self.steps: list[list[Relocation]] = []
        self._tag = 0

    # -- a page's life -------------------------------------------------------------------------

    def allocate(self, pages: int, blocks: int) -> list[int] | None:
        """Ask for pages; check the answer, what was evicted, and that a failure changed nothing."""
        arena, model = self.arena, self.model
        expected = model.must_succeed(pages, blocks)
        assert arena.fits(pages, blocks) == expected
        before = self.snapshot()
        try:
            handles = arena.allocate(pages, blocks)
        except AllocationFailure:
            assert not expected, (pages, blocks, "refused although it fits")
            assert self.snapshot() == before, "a failed allocation changed something"
            return None
        assert expected, (pages, blocks, "granted although it does not fit")
        assert [kind_of(handle) for handle in handles] == [Kind.KV] * pages + [Kind.SSM] * blocks
        self.expect_evicted(model.must_evict(pages, blocks) if pages or blocks else [])
        for handle in handles:
            assert handle & ID_MASK, "the null page was given out"
            assert handle not in model.live
            assert handle not in model.cached
            model.live[handle] = 1
            self._tag += 1
            self.tags.pop(handle, None)
            self.unwritten[handle] = self._tag
            if kind_of(handle) is Kind.KV:
                self.zeros.append(handle)
        return handles

    def expect_evicted(self, expected: list[int]) -> None:
        """The last call must have evicted these, in this order."""
        gone, self.evicted[:] = list(self.evicted), []
        assert gone == expected
        for handle in gone:
            del self.model.cached[handle]
        self._forget(gone)

    def share(self, handle: int) -> None:
        """Reference a live page once more."""
        self.model.live[handle] += 1

    def release(self, handles: list[int], keep: bool) -> None:
        """Drop one reference of each; the last one frees the page, or caches it."""
        last: list[int] = []
        for handle in handles:
            self.model.live[handle] -= 1
            if not self.model.live[handle]:
                del self.model.live[handle]
                last.append(handle)
        if keep:
            self.arena.cache(last)
            self.model.cached.update(dict.fromkeys(last))
            return
        for kind in Kind:
            mine = [handle for handle in last if kind_of(handle) is kind]
            self.arena.release(mine)
        self._forget(last)

    def revive(self, handle: int) -> None:
        """Reference a cached page again."""
        self.arena.revive(handle)
        del self.model.cached[handle]
        self.model.live[handle] = 1

    def drop(self, handle: int) -> None:
        """Free a cached page."""
        self.arena.drop(handle)
        del self.model.cached[handle]
        self._forget([handle])

    def _forget(self, handles: list[int]) -> None:
        for handle in handles:
            self.tags.pop(handle, None)
            self.unwritten.pop(handle, None)

    # -- a step --------------------------------------------------------------------------------

    def step(self) -> None:
        """End a scheduling step: the worker applies the plan, writes new pages, checks all."""
        moves = self.arena.take_relocations()
        self.steps.append(moves)
        memory = self.memory
        if memory is None:
            return
        zeros = [handle for handle in self.zeros if self.arena.inside(handle)]
        places = [self.arena.physical(handle) for handle in zeros]
        if self.zero_first:
            for place in places:
                memory.zero(Kind.KV, place)
        self.carry_out(self.deliver(moves))
        if not self.zero_first:
            for place in places:
                memory.zero(Kind.KV, place)
        self.zeros.clear()
        for handle, tag in self.unwritten.items():
            memory.write(handle, tag)
        self.tags.update(self.unwritten)
        self.unwritten.clear()
        self.check_bytes()

    def carry_out(self, moves: list[Relocation]) -> None:
        """The worker applies a step's relocations."""
        assert self.memory is not None
        self.memory.relocate(moves)

    def check_bytes(self) -> None:
        """Every written page that is live or cached holds its bytes, by the worker's own table."""
        assert self.memory is not None
        for handle, tag in self.tags.items():
            self.memory.check(handle, tag)

    # -- checks --------------------------------------------------------------------------------

    def snapshot(self) -> tuple[object, ...]:
        """Everything that a failed call must leave as it was."""
        arena = self.arena
        return (
            arena.digest(),
            [(arena.capacity(k), arena.free(k), arena.used(k)) for k in Kind],
            [arena.cached_handles(k) for k in Kind],
            arena.gap_bytes,
            arena.over_bytes,
            list(self.evicted),
        )

    def check(self) -> None:
        """Compare the arena with the model."""
        arena, model = self.arena, self.model
        arena.verify(referenced=model.live)
        for kind in Kind:
            assert arena.used(kind) == model.count(kind, model.live)
            assert arena.cached(kind) == model.count(kind, model.cached)
            assert arena.cached_handles(kind) == [h for h in model.cached if kind_of(h) is kind]
            more = arena.available(kind)
            asked = (more, 0) if kind is Kind.KV else (0, more)
            beyond = (more + 1, 0) if kind is Kind.KV else (0, more + 1)
            assert model.must_succeed(*asked)
            assert not model.must_succeed(*beyond)
        parts = sum((arena.used(k) + arena.cached(k) + arena.free(k)) * model.unit[k] for k in Kind)
        assert parts + arena.gap_bytes == model.high - model.low
