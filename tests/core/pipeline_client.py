"""The naive model and the memories of several pipeline stages, for one arena over all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from arena_client import Client, NaiveModel, ShadowMemory

from avmp_vllm.core import Geometry, Kind, MovePlan, PipelineGeometry, Relocation

Shift = tuple[int, int]


class PipelineModel(NaiveModel):
    """An allocation must succeed exactly if it has room in every stage.

    Args:
        stages: Of each stage.
    """

    def __init__(self, stages: Sequence[Geometry]) -> None:
        self.stages = [NaiveModel(g.arena_bytes, g.page_bytes, g.block_bytes) for g in stages]
        super().__init__(*(sum(sizes) for sizes in zip(*map(_sizes, stages), strict=True)))
        self.low = sum(stage.low for stage in self.stages)
        self.high = sum(stage.high for stage in self.stages)

    def room(self, pages: int, blocks: int) -> bool:
        return all(stage.room(pages, blocks) for stage in self.stages)


def _sizes(geometry: Geometry) -> tuple[int, int, int]:
    return geometry.arena_bytes, geometry.page_bytes, geometry.block_bytes


def shifts_of(geometry: PipelineGeometry) -> list[Shift]:
    """By how much each stage's indices exceed those of the plan, by kind."""
    return [
        tuple(stage.origin(kind) - geometry.origin(kind) for kind in Kind)  # type: ignore[misc]
        for stage in geometry.stages
    ]


class PipelineMemory:
    """A worker in each stage, told of moves by the same plan.

    Args:
        geometry: Of all stages.
        memory: Makes a stage's memory.
        shifts: What each stage takes its indices' distance to be; the right one by default.
    """

    def __init__(
        self,
        geometry: PipelineGeometry,
        memory: Callable[[Geometry], ShadowMemory] = ShadowMemory,
        shifts: list[Shift] | None = None,
    ) -> None:
        self.stages = [memory(stage) for stage in geometry.stages]
        self.shifts = shifts_of(geometry) if shifts is None else shifts

    def relocate(self, moves: Iterable[Relocation]) -> None:
        """Apply relocations in the order given."""
        plan = MovePlan(1, relocations=list(moves))
        for stage, shift in zip(self.stages, self.shifts, strict=True):
            stage.relocate(plan.shifted(shift).relocations)

    def zero(self, kind: Kind, index: int) -> None:
        """Clear a page, by the index that the plan has."""
        assert kind is Kind.KV
        for stage, shift in zip(self.stages, self.shifts, strict=True):
            (page,) = MovePlan(1, zeros=[index]).shifted(shift).zeros
            stage.zero(kind, page)

    def write(self, handle: int, tag: int) -> None:
        """Fill a page in every stage."""
        for stage in self.stages:
            stage.write(handle, tag)

    def check(self, handle: int, tag: int) -> None:
        """Compare a page with what was written, in every stage."""
        for stage in self.stages:
            stage.check(handle, tag)


class PipelineClient(Client):
    """A user of an arena over several stages.

    Args:
        geometry: Of all stages.
        migration_batch: Of the arena.
        memory: Of all stages.
    """

    def __init__(
        self, geometry: PipelineGeometry, migration_batch: int, memory: PipelineMemory
    ) -> None:
        super().__init__(geometry, migration_batch, memory)  # type: ignore[arg-type]
        self.model = PipelineModel(geometry.stages)
