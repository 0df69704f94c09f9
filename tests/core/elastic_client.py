"""A user of an elastic arena, and a worker whose memory faults where nothing is backed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from arena_client import Client, ShadowMemory

from avmp_vllm.core import Extents, Geometry, Kind, Relocation, Stage
from avmp_vllm.core.extents import reserve_for


class Fault(AssertionError):
    """A worker touched bytes that have no memory."""


class ElasticShadow(ShadowMemory):
    """A worker that backs what the plan names, in chunks, and forgets what it no longer backs.

    Args:
        geometry: Sizes of the arena.
        chunk: Bytes that are backed at a time.
    """

    def __init__(self, geometry: Geometry, chunk: int) -> None:
        super().__init__(geometry)
        self.chunk = chunk
        self.backed: set[int] = set()
        self.most = 0

    def chunks(self, extents: Extents) -> set[int]:
        """The chunks that some byte of the two ends lies in."""
        high = self.geometry.pages * self.geometry.page_bytes
        ends = ((0, extents.low_end), (extents.high_begin, high))
        return {
            chunk
            for low, end in ends
            if low < end
            for chunk in range(low // self.chunk, -(-end // self.chunk))
        }

    def back(self, extents: Extents, only: bool = False) -> None:
        """Back what is needed; with ``only``, nothing else."""
        wanted = self.chunks(extents)
        for chunk in self.backed - wanted if only else ():
            self.forget(chunk)
        self.backed = wanted if only else self.backed | wanted
        self.most = max(self.most, len(self.backed))

    def forget(self, chunk: int) -> None:
        """Lose the bytes of a chunk."""
        place = slice(chunk * self.chunk, min((chunk + 1) * self.chunk, len(self.bytes)))
        self.bytes[place] = bytes(place.stop - place.start)

    def span(self, kind: Kind, index: int) -> slice:
        place = super().span(kind, index)
        for chunk in range(place.start // self.chunk, -(-place.stop // self.chunk)):
            if chunk not in self.backed:
                raise Fault(f"chunk {chunk} of bytes {place.start} to {place.stop} is not backed")
        return place


#: Spoils what a plan says about memory on its way to the worker.
Spoil = Callable[[tuple[Stage, ...]], tuple[Stage, ...]]


class ElasticClient(Client):
    """Follows budgets as an engine does: raise before, lower after the plan.

    Args:
        geometry: Of the arena.
        migration_batch: Of the arena.
        chunk: Bytes that are backed at a time.
        bytes_too: Whether there is a worker with bytes.
        spoil: For negative controls.
    """

    def __init__(
        self,
        geometry: Geometry,
        migration_batch: int,
        chunk: int,
        bytes_too: bool = True,
        spoil: Spoil = tuple,
    ) -> None:
        memory = ElasticShadow(geometry, chunk)
        super().__init__(
            geometry, migration_batch, memory if bytes_too else None, chunk_bytes=chunk
        )
        self.worker = memory
        self.spoil = spoil
        self.high_end = geometry.pages * geometry.page_bytes
        self.whole = -(-self.high_end // chunk)
        #: Chunks that may be backed, by what the arena knows.
        self.budget = self.whole
        #: Chunks that exist in the worker: the most of the budgets since the last plan.
        self.allowed = self.whole
        self.staged = 0
        memory.back(self.arena.extents)

    def set_budget(self, chunks: int) -> None:
        """Change the budget; check what goes for it."""
        arena, model, chunk = self.arena, self.model, self.worker.chunk
        model.reserve = reserve_for(self.high_end, chunks * chunk, chunk)
        gone = model.must_evict(0, 0)
        over = arena.set_reserve(model.reserve)
        self.expect_evicted(gone)
        assert (over > 0) == (not model.room(*self.used()))
        self.budget = chunks
        self.allowed = max(self.allowed, chunks)

    def used(self) -> tuple[int, int]:
        """Live pages of both pools."""
        kv, ssm = (self.model.count(kind, self.model.live) for kind in Kind)
        return kv, ssm

    def trim(self, slack: int = 0) -> None:
        """Bring the bands back; check that they did come."""
        arena, chunk = self.arena, self.worker.chunk
        gone = self.model.must_evict(0, 0) if arena.over_bytes else []
        gap = arena.gap_bytes
        assert arena.trim(slack) == arena.gap_bytes - gap
        self.expect_evicted(gone)
        for kind in Kind:
            unit = self.geometry_unit(kind)
            assert arena.free(kind) * unit < chunk + unit + slack + unit
        if not slack:
            held = sum((arena.used(k) + arena.cached(k)) * self.geometry_unit(k) for k in Kind)
            null = self.arena.geometry.null_blocks * self.arena.geometry.block_bytes
            needed = len(self.worker.chunks(arena.extents)) * chunk
            rounding = self.whole * chunk - self.high_end
            assert needed < held + null + rounding + 2 * chunk

    def geometry_unit(self, kind: Kind) -> int:
        """Bytes of a page."""
        return self.arena.geometry.unit(kind)

    # -- a step --------------------------------------------------------------------------------

    def carry_out(self, moves: list[Relocation]) -> None:
        self._follow(moves)

    def step(self) -> None:
        if self.memory is None:
            moves = self.arena.take_relocations()
            self.steps.append(moves)
            self._follow(moves)
        else:
            super().step()

    def _follow(self, moves: Iterable[Relocation]) -> None:
        """Back, move and let go as the plan says; never more than is allowed."""
        moves, worker = list(moves), self.worker
        taken = self.arena.take_extents()
        before = set(worker.backed)
        if taken is None:
            stages, after = (Stage(0, self.arena.extents),), self.arena.extents
            assert worker.chunks(after) == worker.backed, "a change without a plan"
        else:
            stages, after = taken
            assert stages[0].first == 0
            stages = self.spoil(stages)
        self.staged += len(stages) > 1
        cuts = [stage.first for stage in stages[1:]] + [len(moves)]
        for number, (stage, end) in enumerate(zip(stages, cuts, strict=True)):
            worker.back(stage.extents)
            if self.memory is not None:
                worker.relocate(moves[stage.first : end])
            if number + 1 < len(stages):
                worker.back(stage.extents.common(stages[number + 1].extents), only=True)
        assert worker.most <= max(self.allowed, len(before)), "more backed than exists"
        worker.back(after, only=True)
        assert after == self.arena.extents
        # The bound that counts: what is backed is within the budget, or what is referenced is not.
        assert len(worker.backed) <= self.budget or self.arena.over_bytes
        worker.most = len(worker.backed)
        self.allowed = max(self.budget, len(worker.backed))
