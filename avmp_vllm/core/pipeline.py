"""One allocator over the arenas of several pipeline stages.

Each stage has other layers, so its pages have other sizes. What stages share is the *position* of a
page in its band: what is page 2 of the KV band in one stage is page 2 in every other::

    stage 0   | null | 1 2 3 ssm ->  |          gap         |    <- kv 3 2 1 |
    stage 1   | null | 1  2  3  ssm ->  |     gap     |   <- kv   3   2   1  |

So one pair of bands serves all of them, as long as it crosses in none. What fits is decided by the
stage in which it is tightest; bytes are those of all stages together. Indices of pages, as move
plans have them, are those of the first stage: each other one finds its own at a constant distance,
by kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from avmp_vllm.core.geometry import Geometry


@dataclass(frozen=True)
class PipelineGeometry(Geometry):
    """Sizes of the arenas of all stages, taken together.

    Args:
        stages: Of each stage's own arena; pages have the same tokens in all of them.
    """

    stages: tuple[Geometry, ...] = ()

    @classmethod
    def over(cls, stages: Sequence[Geometry]) -> Geometry:
        """The geometry of these stages: of one alone, its own.

        Raises:
            ArenaTooSmall: Not even one page of each kind fits into every stage.
        """
        first, *more = stages
        if not more:
            return first
        return cls(
            sum(stage.arena_bytes for stage in stages),
            sum(stage.page_bytes for stage in stages),
            sum(stage.block_bytes for stage in stages),
            first.page_tokens,
            first.more_groups,
            tuple(stages),
        )

    def stage(self, number: int) -> Geometry:
        """The arena of one stage."""
        return self.stages[number]

    # -- bytes of all stages -----------------------------------------------------------------------

    @cached_property
    def null_bytes(self) -> int:
        return sum(stage.null_bytes for stage in self.stages)

    @cached_property
    def null_end(self) -> int:
        return sum(stage.null_end for stage in self.stages)

    @cached_property
    def high_end(self) -> int:
        return sum(stage.high_end for stage in self.stages)

    # -- indices of the first stage ----------------------------------------------------------------

    @cached_property
    def pages(self) -> int:
        return self.stages[0].pages

    @cached_property
    def blocks(self) -> int:
        return self.stages[0].blocks

    @cached_property
    def null_blocks(self) -> int:
        return self.stages[0].null_blocks

    # -- what fits into every stage ----------------------------------------------------------------

    @cached_property
    def page_limit(self) -> int:
        return min(stage.page_limit for stage in self.stages)

    @cached_property
    def block_limit(self) -> int:
        return min(stage.block_limit for stage in self.stages)

    def fits(self, pages: int, blocks: int, reserve: int = 0) -> bool:
        return all(stage.fits(pages, blocks, reserve) for stage in self.stages)

    def pages_beside(self, blocks: int, reserve: int = 0) -> int:
        return min(stage.pages_beside(blocks, reserve) for stage in self.stages)

    def blocks_beside(self, pages: int, reserve: int = 0) -> int:
        return min(stage.blocks_beside(pages, reserve) for stage in self.stages)

    def sequences(self, tokens: int, blocks_each: int = 1, reserve: int = 0) -> int:
        return min(stage.sequences(tokens, blocks_each, reserve) for stage in self.stages)

    def concurrency(self, tokens: int, blocks_each: int = 1, reserve: int = 0) -> float:
        return min(stage.concurrency(tokens, blocks_each, reserve) for stage in self.stages)

    def require_one_request(self, tokens: int, blocks_each: int = 1, reserve: int = 0) -> None:
        tightest = min(self.stages, key=lambda stage: stage.longest(blocks_each, reserve))
        tightest.require_one_request(tokens, blocks_each, reserve)
