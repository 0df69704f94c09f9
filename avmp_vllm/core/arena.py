"""The arena: two bands, the gap between them, and the one allocator over both.

::

    low                                                                          high
    | null | SSM band ->            |        gap         |            <- KV band |
    0      s0*B        (s0+cap_ssm)*B                    (K-cap_kv)*F          K*F

Remedies for a pool that is short, in this order: its own free pages; the gap; the other band's free
pages, moving mapped ones out of the way; then eviction of unreferenced cached pages from either
pool, least recently used first. Only then does the allocation fail. Because a band can always be
packed, it fails only when the referenced bytes and the request exceed the arena. Who knows better
than age what is worth keeping can choose what goes.

In an *elastic* arena the gap needs no memory. It is then never less than a *reserve*, so that what
is backed stays within a budget which may change at any time; the bands grow by what is asked, come
back by `trim`, and each step's plan says how far they reached. A reserve that referenced pages do
not leave makes the arena *over*: it refuses every request until they have gone.

A page is *free*, *referenced* or *cached*. Who shares a referenced page, and what a cached page is
good for, is the caller's business. Nothing here looks at a clock, draws a number or walks a set to
decide, so the same calls give the same relocations.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from math import inf

from avmp_vllm.core.band import Band
from avmp_vllm.core.extents import ExtentLog, Extents, Stage
from avmp_vllm.core.geometry import ArenaTooSmall, Geometry, ceil_div
from avmp_vllm.core.handles import SSM_TAG, Kind, kind_of
from avmp_vllm.core.integrity import problems
from avmp_vllm.core.pipeline import PipelineGeometry
from avmp_vllm.core.plan import Relocation
from avmp_vllm.core.statistics import Statistics

#: Default of ``migration_batch``: least capacity that moves at once, in KV pages' worth of bytes.
MIGRATION_BATCH = 128


class AllocationFailure(Exception):
    """Neither free, nor gap, nor migrated, nor evicted bytes can serve a request."""


class InvariantViolation(AssertionError):
    """`Arena.verify` found something that must never be."""


class Arena:
    """Dual-pool allocator of KV pages and SSM blocks with capacity migration.

    Args:
        geometry: Sizes in bytes.
        migration_batch: Least capacity that a migration moves where the donor has it free, in KV
            pages' worth of bytes, so that a busy boundary does not flap.
        on_evict: Called with the handles of cached pages of one pool that are given up, before they
            are reused.
        chunk_bytes: Bytes that are backed at a time, if the arena is elastic.

    Attributes:
        choose: Names cached pages of either pool that go next, or none if it has no opinion; then,
            and without it, what is unreferenced longest goes.
        statistics: Counters.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        migration_batch: int = MIGRATION_BATCH,
        on_evict: Callable[[Sequence[int]], None] | None = None,
        chunk_bytes: int | None = None,
    ) -> None:
        if migration_batch < 1:
            raise ValueError(f"migration_batch must be at least 1, not {migration_batch}")
        if chunk_bytes is not None and chunk_bytes < 1:
            raise ValueError(f"chunk_bytes must be at least 1, not {chunk_bytes}")
        if chunk_bytes is not None and isinstance(geometry, PipelineGeometry):
            raise ValueError(
                f"chunk_bytes = {chunk_bytes}: an arena over {len(geometry.stages)} pipeline "
                "stages is not elastic"
            )
        self.geometry = geometry
        self.choose: Callable[[], Sequence[int]] | None = None
        self.statistics = Statistics()
        self._batch_bytes = migration_batch * geometry.page_bytes
        self._on_evict = on_evict
        self._bands = (Band(geometry, Kind.KV), Band(geometry, Kind.SSM))
        # Cached pages of each pool by handle, least recently used first, with the logical time at
        # which they lost their last reference; the pools' heads compare by it.
        self._cached: tuple[OrderedDict[int, int], OrderedDict[int, int]] = (
            OrderedDict(),
            OrderedDict(),
        )
        self._clock = 0
        self._relocations: list[Relocation] = []
        self._chunk_bytes = chunk_bytes
        self._reserve = 0
        self._over = False  # gap_bytes < reserve
        self._log = None if chunk_bytes is None else ExtentLog(self.extents)

    # -- sizes ---------------------------------------------------------------------------------

    def capacity(self, kind: Kind) -> int:
        """Pages that a pool's band holds now."""
        return self._bands[kind].capacity

    def free(self, kind: Kind) -> int:
        """Free pages of a pool's band."""
        return self._bands[kind].free

    def cached(self, kind: Kind) -> int:
        """Unreferenced cached pages of a pool."""
        return len(self._cached[kind])

    def cached_handles(self, kind: Kind) -> list[int]:
        """Handles of a pool's unreferenced cached pages, the next to be evicted first."""
        return list(self._cached[kind])

    def known(self, kind: Kind) -> int:
        """Largest page id of a pool so far; ids are given out without gaps."""
        return self._bands[kind].known

    def used(self, kind: Kind) -> int:
        """Referenced pages of a pool."""
        band = self._bands[kind]
        return band.capacity - band.free - len(self._cached[kind])

    def held(self, kind: Kind) -> int:
        """Referenced and cached pages of a pool."""
        band = self._bands[kind]
        return band.capacity - band.free

    @property
    def gap_bytes(self) -> int:
        """Bytes between the bands."""
        geometry, (kv, ssm) = self.geometry, self._bands
        high_begin = geometry.high_end - kv.capacity * kv.unit
        return high_begin - geometry.null_end - ssm.capacity * ssm.unit

    @property
    def extents(self) -> Extents:
        """The bytes outside the gap."""
        geometry, (kv, ssm) = self.geometry, self._bands
        return Extents(
            geometry.null_end + ssm.capacity * ssm.unit,
            geometry.high_end - kv.capacity * kv.unit,
        )

    @property
    def reserve_bytes(self) -> int:
        """Bytes that the gap has at least, unless the arena is over."""
        return self._reserve

    @property
    def over_bytes(self) -> int:
        """Bytes by which referenced pages keep the gap below the reserve."""
        return max(self._reserve - self.gap_bytes, 0)

    def fits(self, pages: int, blocks: int) -> bool:
        """Whether so many more KV pages and SSM blocks can be referenced. Exact."""
        return self.geometry.fits(
            self.used(Kind.KV) + pages, self.used(Kind.SSM) + blocks, self._reserve
        ) or not (pages or blocks)

    def available(self, kind: Kind) -> int:
        """How many pages of a pool could be referenced now if nothing else were asked."""
        beside = self.used(kind.other)
        if kind is Kind.KV:
            most = self.geometry.pages_beside(beside, self._reserve)
        else:
            most = self.geometry.blocks_beside(beside, self._reserve)
        return max(most - self.used(kind), 0)

    def physical(self, handle: int) -> int:
        """Resolve a handle to the physical index of its page in its pool's view."""
        return self._bands[kind_of(handle)].physical(handle)

    # -- a page's life -------------------------------------------------------------------------

    def allocate(self, pages: int = 0, blocks: int = 0) -> list[int]:
        """Reference new pages: all of them, or none.

        Args:
            pages: KV pages.
            blocks: SSM blocks.

        Returns:
            ``pages`` KV handles, then ``blocks`` SSM handles.

        Raises:
            AllocationFailure: Referenced bytes and the request exceed the arena. Nothing changed.
        """
        kv, ssm = self._bands
        if kv.free < pages or ssm.free < blocks or self._over:
            self._make_room(pages, blocks)
        handles = kv.take(pages)
        self._note_peak(kv)
        if blocks:
            handles += ssm.take(blocks)
            self._note_peak(ssm)
        return handles

    def reserve(self, pages: int, blocks: int) -> None:
        """Bring so many free pages into both bands at once.

        For a caller that allocates the two kinds one after the other: without it the first could
        take capacity that the second has to bring back.

        Raises:
            AllocationFailure: Referenced bytes and the request exceed the arena. Nothing changed.
        """
        kv, ssm = self._bands
        if kv.free < pages or ssm.free < blocks or self._over:
            self._make_room(pages, blocks)

    def note_failure(self, pages: int, blocks: int) -> None:
        """Count a request that does not fit, for a caller that asks `fits` before it allocates."""
        short = Kind.KV if self._bands[Kind.KV].free < pages else Kind.SSM
        self.statistics.failures[short] += 1

    def release(self, handles: Sequence[int]) -> None:
        """Free referenced pages of one pool whose last reference is gone."""
        if handles:
            self._bands[1 if handles[0] & SSM_TAG else 0].give(handles)

    def cache(self, handles: Iterable[int]) -> None:
        """Keep pages whose last reference is gone for as long as nobody needs their bytes.

        Args:
            handles: Of one or both pools, the one to be evicted first in front.
        """
        clock, (kv, ssm) = self._clock, self._cached
        for handle in handles:
            clock += 1
            (ssm if handle & SSM_TAG else kv)[handle] = clock
        self._clock = clock

    def revive(self, handle: int) -> None:
        """Reference a cached page again."""
        kind = kind_of(handle)
        del self._cached[kind][handle]
        self._note_peak(self._bands[kind])

    def drop(self, handle: int) -> None:
        """Free a cached page that is good for nothing any more (not counted as an eviction)."""
        kind = kind_of(handle)
        del self._cached[kind][handle]
        self._bands[kind].give((handle,))

    def inside(self, handle: int) -> bool:
        """Whether a handle's page lies inside its band, so that its bytes belong to its pool."""
        band = self._bands[kind_of(handle)]
        return 1 <= band.position(handle) <= band.capacity

    def is_cached(self, handle: int) -> bool:
        """Whether a page is cached and unreferenced."""
        return handle in self._cached[kind_of(handle)]

    @property
    def moved(self) -> int:
        """Relocations since they were last taken."""
        return len(self._relocations)

    def take_relocations(self) -> list[Relocation]:
        """Drain the relocations since the last call, in the order in which they must be applied."""
        relocations, self._relocations = self._relocations, []
        return relocations

    # -- an elastic arena ----------------------------------------------------------------------

    def set_reserve(self, reserve: int) -> int:
        """Change the least bytes of the gap: cached pages go and the bands come back as needed.

        Returns:
            Bytes by which referenced pages keep the gap below it; they go with those pages.

        Raises:
            ValueError: The arena is not elastic, or the reserve is negative.
            ArenaTooSmall: Not even the null bytes would be left.
        """
        if self._log is None:
            raise ValueError("an arena without chunk_bytes has no reserve")
        if reserve < 0:
            raise ValueError(f"a reserve must not be negative, and {reserve} is")
        if not self.geometry.fits(0, 0, reserve):
            raise ArenaTooSmall(
                f"a reserve of {reserve} bytes leaves no null bytes in an arena of "
                f"{self.geometry.arena_bytes}"
            )
        self._reserve = reserve
        self._come_back(0, 0)
        return self.over_bytes

    def trim(self, slack: int = 0) -> int:
        """Bring the bands back to what is referenced and cached, by whole chunks.

        A live page in the way is relocated. Free pages stay where their bytes are in a chunk that
        is needed anyway. Over its reserve, an arena gives up its cached pages too.

        Args:
            slack: Free bytes that each band keeps, so that it need not grow again at once.

        Returns:
            Bytes that went to the gap.
        """
        given = -self.gap_bytes
        if self._over:
            self._come_back(0, 0)
        for band in self._bands:
            spare = band.free - ceil_div(slack, band.unit)
            if spare > 0:
                spare -= self._rest_of_chunk(band, band.capacity - spare)
            if spare > 0:
                self._shrink(band, spare)
        self._over = self.gap_bytes < self._reserve
        return given + self.gap_bytes

    def take_extents(self) -> tuple[tuple[Stage, ...], Extents] | None:
        """Drain what the next plan needs: its stages, and what is needed after it.

        Returns:
            None if that is just what the last plan left, or if the arena is not elastic.
        """
        return None if self._log is None else self._log.take(self.extents)

    def _rest_of_chunk(self, band: Band, capacity: int) -> int:
        """Pages that lie between a band's end at some capacity and the end of that chunk.

        A KV band without pages needs no chunk; an SSM band has the null bytes below it.
        """
        chunk = self._chunk_bytes or 1
        if band.kind is Kind.SSM:
            rest = -(self.geometry.null_end + capacity * band.unit) % chunk
        elif capacity:
            rest = (self.geometry.high_end - capacity * band.unit) % chunk
        else:
            rest = 0
        return rest // band.unit

    def _come_back(self, pages: int, blocks: int) -> None:
        """Bring the gap back to its reserve beside a request, as far as referenced pages let it."""
        self._evict_for(pages, blocks)
        for band in self._bands:
            missing = self._reserve - self.gap_bytes
            if missing > 0:
                self._shrink(band, min(ceil_div(missing, band.unit), band.free))
        self._over = self.gap_bytes < self._reserve

    def _shrink(self, band: Band, count: int) -> None:
        """Give up a band's innermost pages, and note what has to move for it."""
        relocations = band.shrink(count)
        self._relocations += relocations
        self.statistics.relocations[band.kind] += len(relocations)
        self.statistics.relocated_bytes[band.kind] += len(relocations) * band.unit

    def _grow(self, band: Band, count: int) -> None:
        """Grow a band into the gap; in an elastic arena to the end of the last chunk, if it may."""
        if self._log is None:
            band.grow(count)
            return
        rest = self._rest_of_chunk(band, band.capacity + count)
        band.grow(max(min(count + rest, self._room(band.kind)), count))
        self._log.grown(self.extents, len(self._relocations), self._reserve)

    # -- making room ---------------------------------------------------------------------------

    def _room(self, kind: Kind) -> int:
        """Pages that a band can take from the gap."""
        geometry, (kv, ssm) = self.geometry, self._bands
        if kind is Kind.KV:
            return geometry.pages_beside(ssm.capacity, self._reserve) - kv.capacity
        return geometry.blocks_beside(kv.capacity, self._reserve) - ssm.capacity

    def _make_room(self, pages: int, blocks: int) -> None:
        """Bring so many free pages into both bands, or raise and change nothing."""
        if not self.fits(pages, blocks):
            self.note_failure(pages, blocks)
            raise AllocationFailure(
                f"{pages} KV page(s) and {blocks} SSM block(s) do not fit: "
                f"{self.used(Kind.KV)} pages and {self.used(Kind.SSM)} blocks are in use, room for "
                f"{self.available(Kind.KV)} more pages or {self.available(Kind.SSM)} more blocks"
            )
        if self._over:
            if not (pages or blocks):
                return
            self._come_back(pages, blocks)
        else:
            self._evict_for(pages, blocks)
        wanted = (pages, blocks)
        for kind in Kind:
            self._grow_from_gap(kind, wanted[kind] - self._bands[kind].free)
        for kind in Kind:
            missing = wanted[kind] - self._bands[kind].free
            if missing > 0:
                self._migrate(kind, missing, reserve=wanted[kind.other])

    def _grow_from_gap(self, kind: Kind, missing: int) -> None:
        """Grow a band into the gap by what is missing, or by as much as the gap has.

        While the gap is wide the band grows a chunk at a time, which spares later calls; in an
        elastic arena, where that would have to be backed, to the end of a physical chunk.
        """
        if missing <= 0:
            return
        band = self._bands[kind]
        if self._log is None:
            chunk = band.chunk_pages
            if self.gap_bytes - self._reserve - chunk * band.unit > self._batch_bytes:
                missing = max(missing, chunk)
        if count := min(missing, self._room(kind)):
            self._grow(band, count)

    def _migrate(self, kind: Kind, missing: int, reserve: int) -> None:
        """Move capacity from the other band to this one.

        Args:
            kind: The pool that is short.
            missing: Pages it needs beyond its free ones.
            reserve: Free pages that the donor must keep, for the same request.
        """
        band, donor = self._bands[kind], self._bands[kind.other]
        spare = donor.free - reserve
        left = self.geometry.beside(donor.kind, band.capacity + missing, self._reserve)
        batch = ceil_div(self._batch_bytes - self.gap_bytes + self._reserve, donor.unit)
        given = min(max(donor.capacity - left, batch), spare)
        self._shrink(donor, given)
        # What moves beyond what is missing waits in the gap where it would have to be backed.
        least = missing if self._log is not None else max(missing, self._batch_bytes // band.unit)
        self._grow(band, min(least, self._room(kind)))
        statistics = self.statistics
        statistics.migrations[kind] += 1
        statistics.migrated_bytes[kind] += given * donor.unit

    def _evict_for(self, pages: int, blocks: int) -> None:
        """Give cached pages of either pool up until growth and migration alone can serve a request
        that fits.
        """
        geometry = self.geometry
        wanted = [
            band.capacity - band.free + count
            for band, count in zip(self._bands, (pages, blocks), strict=True)
        ]
        reserve = self._reserve
        while not geometry.fits(wanted[Kind.KV], wanted[Kind.SSM], reserve):
            if not any(self._cached):  # only over a reserve that referenced pages do not leave
                return
            if self.choose is not None and (chosen := self.choose()):
                for kind in Kind:
                    evicted = [handle for handle in chosen if kind_of(handle) is kind]
                    wanted[kind] -= len(evicted)
                    if evicted:
                        self._evict(kind, evicted)
                continue
            (kv, kv_since), (ssm, ssm_since) = map(self._oldest, Kind)
            if kv_since < ssm_since:
                excess = wanted[Kind.KV] - geometry.pages_beside(wanted[Kind.SSM], reserve)
                kind = Kind.KV
                evicted = [h for h, since in islice(kv.items(), excess) if since < ssm_since]
            else:
                kind = Kind.SSM
                evicted = list(islice(ssm, 1))
            wanted[kind] -= len(evicted)
            self._evict(kind, evicted)

    def _oldest(self, kind: Kind) -> tuple[OrderedDict[int, int], float]:
        """A pool's cached pages, and since when the first of them is unreferenced."""
        cached = self._cached[kind]
        return cached, next(iter(cached.values()), inf)

    def _evict(self, kind: Kind, handles: list[int]) -> None:
        """Give cached pages of a pool up."""
        cached = self._cached[kind]
        for handle in handles:
            del cached[handle]
        if self._on_evict is not None:
            self._on_evict(handles)
        self.statistics.evictions[kind] += len(handles)
        self._bands[kind].give(handles)

    def _note_peak(self, band: Band) -> None:
        kind, peaks = band.kind, self.statistics.peak_used
        used = band.capacity - band.free - len(self._cached[kind])
        if used > peaks[kind]:
            peaks[kind] = used

    # -- checks --------------------------------------------------------------------------------

    def digest(self) -> tuple[tuple[int, int], int]:
        """Known handles of each pool, and a checksum of their positions."""
        kv, ssm = self._bands
        return (kv.known, ssm.known), zlib.crc32(ssm.positions(), zlib.crc32(kv.positions()))

    def verify(self, referenced: Iterable[int] | None = None) -> None:
        """Check every invariant of the design.

        Args:
            referenced: All handles that the caller holds, if it can list them.

        Raises:
            InvariantViolation: Naming everything that does not add up.
        """
        if found := problems(self, referenced):
            raise InvariantViolation("; ".join(found[:20]))
