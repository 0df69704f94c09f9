"""What a worker must do to its copy of the arena before the next forward pass.

The order is part of the meaning: relocations as listed, with the page table written as they go, and
states encoded or decoded in between; then zeroing; then copy-on-write. A relocation's source may be
an earlier one's destination, and the two kinds of page share bytes, so copies may only be reordered
where their byte ranges allow it. States inside of a chunk are saved by the forward pass itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

from avmp_vllm.core.extents import Extents, Stage
from avmp_vllm.core.handles import Kind


class Relocation(NamedTuple):
    """Move one page's bytes inside its own band, and swap two page-table entries.

    Attributes:
        handle: The mapped page that moves; it resolves to ``target`` afterwards.
        displaced: The free page that was at ``target``; it resolves to ``source`` afterwards.
        source: Physical index that the bytes leave.
        target: Physical index that the bytes reach.
    """

    kind: Kind
    handle: int
    displaced: int
    source: int
    target: int


class Copy(NamedTuple):
    """Copy one page's bytes for copy-on-write; physical indices."""

    kind: Kind
    source: int
    target: int


class Recode(NamedTuple):
    """Encode a state into half a block, or decode it into a block; physical indices.

    Attributes:
        after: Relocations of the plan that come before it.
        source: SSM block that is read.
        target: SSM block that is written.
        half: Of the block with the encoded state.
        encode: Or decode.
    """

    after: int
    source: int
    target: int
    half: int
    encode: bool


class Save(NamedTuple):
    """Save a state inside of a request's chunk, in the pass that computes the chunk.

    Attributes:
        running: Handle of the block that the chunk leaves its last state in, by which the chunk is
            known: no two of a step leave theirs in the same.
        target: Handle of the block that gets the state.
        tokens: Of the chunk that the state covers; fewer than the chunk has, and at least one.
    """

    running: int
    target: int
    tokens: int


_Moves = TypeVar("_Moves", Relocation, Copy)


@dataclass
class MovePlan:
    """One step's plan.

    Attributes:
        number: Counts plans from 1 without gaps, so that a worker notices a lost one.
        relocations: In the order in which they must appear to happen.
        recodes: States that are encoded or decoded between them, in order.
        zeros: Physical KV pages to clear.
        copies: Copy-on-write pairs.
        digest: Under verification, the known handles of each pool and the checksum of their
            positions after this plan, which the worker compares with its own copy.
        saves: States that the step's forward pass leaves inside of its chunks; of each chunk in
            ascending order.
        stages: In an elastic arena, what must have memory *before*: one stage for each part of the
            relocations, the last one for what follows them too. Empty if the plan before left just
            what this one needs, before and after.
        after: In an elastic arena, what the steps *after* this plan need; None without stages.
    """

    number: int
    relocations: list[Relocation] = field(default_factory=list)
    zeros: list[int] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    digest: tuple[tuple[int, int], int] | None = None
    saves: list[Save] = field(default_factory=list)
    stages: tuple[Stage, ...] = ()
    after: Extents | None = None
    recodes: list[Recode] = field(default_factory=list)

    def in_order(self) -> Iterator[tuple[list[Relocation], Recode | None]]:
        """Runs of relocations, each with the state that is encoded or decoded after it."""
        begin = 0
        for recode in self.recodes:
            yield self.relocations[begin : recode.after], recode
            begin = recode.after
        yield self.relocations[begin:], None

    def shifted(self, by: tuple[int, int]) -> MovePlan:
        """The same plan where indices are so much larger, by kind: in another pipeline stage."""
        return replace(
            self,
            relocations=[
                move._replace(
                    source=move.source + by[move.kind], target=move.target + by[move.kind]
                )
                for move in self.relocations
            ],
            zeros=[page + by[Kind.KV] for page in self.zeros],
            copies=[
                Copy(copy.kind, copy.source + by[copy.kind], copy.target + by[copy.kind])
                for copy in self.copies
            ],
            recodes=[
                recode._replace(
                    source=recode.source + by[Kind.SSM], target=recode.target + by[Kind.SSM]
                )
                for recode in self.recodes
            ],
        )
