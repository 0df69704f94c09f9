"""Byte sizes and index ranges of an arena.

Both pools view the whole arena from byte 0; stock kernels address pages with plain strides::

    index view of KV   0 | .. k0 ................................ K-1     page k  = bytes [kF, kF+F)
    index view of SSM  0 | .. s0 ........................... S-1          block s = bytes [sB, sB+B)
    bytes              null     SSM band ->      gap      <- KV band

Index 0 of both views is vLLM's null block, so bytes ``[0, max(F, B))`` are never given out:
``k0 = ceil(max(F, B) / F)`` and ``s0 = ceil(max(F, B) / B)``.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

from avmp_vllm.core.handles import Kind

#: SSM blocks start on this boundary, so that every state of every dtype is aligned (bytes).
BLOCK_ALIGNMENT = 128


class ArenaTooSmall(ValueError):
    """The arena cannot hold the null bytes and one request of the longest length."""


def ceil_div(numerator: int, denominator: int) -> int:
    """Integer division rounded up."""
    return -(-numerator // denominator)


@dataclass(frozen=True)
class PageGroup:
    """KV pages that one block table names.

    Args:
        page_tokens: Tokens that a page holds.
        most: Pages that a request holds at most (a sliding window, a ring), or None if it keeps a
            slot for every token.
    """

    page_tokens: int
    most: int | None = None

    def pages_for(self, tokens: int) -> int:
        """Pages that a request of so many tokens holds."""
        pages = ceil_div(tokens, self.page_tokens)
        return pages if self.most is None else min(pages, self.most)


@dataclass(frozen=True)
class Geometry:
    """Sizes that never change while an arena lives.

    Args:
        arena_bytes: Bytes of the arena, N.
        page_bytes: Bytes of a KV page, F: over all attention layers of the rank, or over those of
            the widest group.
        block_bytes: Bytes of an SSM block over all SSM layers of the rank, B.
        page_tokens: Tokens that a KV page holds in the first group.
        more_groups: Groups of KV pages beside the first, which has a slot for every token.

    Raises:
        ValueError: A size is not positive, or the arena cannot hold one page of each kind.
    """

    arena_bytes: int
    page_bytes: int
    block_bytes: int
    page_tokens: int = 16
    more_groups: tuple[PageGroup, ...] = ()

    def __post_init__(self) -> None:
        for name in ("arena_bytes", "page_bytes", "block_bytes", "page_tokens"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        least = self.null_bytes + self.page_bytes + self.block_bytes
        if self.page_limit < 1 or self.block_limit < 1:
            raise ArenaTooSmall(
                f"an arena of {self.arena_bytes} bytes holds no page of each kind: "
                f"about {least} bytes are the least"
            )

    @cached_property
    def groups(self) -> tuple[PageGroup, ...]:
        """All groups of KV pages."""
        return PageGroup(self.page_tokens), *self.more_groups

    @cached_property
    def null_bytes(self) -> int:
        """Bytes at the low end that both null pages cover."""
        return max(self.page_bytes, self.block_bytes)

    @cached_property
    def pages(self) -> int:
        """Length K of the KV view, null pages included."""
        return self.arena_bytes // self.page_bytes

    @cached_property
    def blocks(self) -> int:
        """Length S of the SSM view, null blocks included."""
        return self.arena_bytes // self.block_bytes

    @cached_property
    def null_blocks(self) -> int:
        """``s0``: SSM indices that overlap the null bytes."""
        return ceil_div(self.null_bytes, self.block_bytes)

    @cached_property
    def page_limit(self) -> int:
        """KV pages that exist if no SSM block does."""
        return (self.pages * self.page_bytes - self.null_blocks * self.block_bytes) // (
            self.page_bytes
        )

    @cached_property
    def block_limit(self) -> int:
        """SSM blocks that exist if no KV page does."""
        return self.pages * self.page_bytes // self.block_bytes - self.null_blocks

    @cached_property
    def null_end(self) -> int:
        """Byte at which the SSM band begins."""
        return self.null_blocks * self.block_bytes

    @cached_property
    def high_end(self) -> int:
        """Byte at which the highest KV page ends."""
        return self.pages * self.page_bytes

    @property
    def rounding_bytes(self) -> int:
        """Bytes above the last whole KV page, used by nobody."""
        return self.arena_bytes - self.high_end

    def stage(self, number: int) -> Geometry:
        """The arena of a pipeline stage, of which there is one here."""
        assert number == 0, number
        return self

    def origin(self, kind: Kind) -> int:
        """Physical index of position 0 of a pool's band, which holds no page."""
        return self.null_blocks - 1 if kind is Kind.SSM else self.pages

    def unit(self, kind: Kind) -> int:
        """Bytes of one page of a pool."""
        return self.block_bytes if kind is Kind.SSM else self.page_bytes

    def limit(self, kind: Kind) -> int:
        """Pages that a pool holds if the other is empty."""
        return self.block_limit if kind is Kind.SSM else self.page_limit

    def fits(self, pages: int, blocks: int, reserve: int = 0) -> bool:
        """Whether so many KV pages and SSM blocks can exist together. No other rule binds.

        Args:
            pages: KV pages.
            blocks: SSM blocks.
            reserve: Least bytes of the gap between them.
        """
        return (self.pages - pages) * self.page_bytes >= (
            self.null_blocks + blocks
        ) * self.block_bytes + reserve

    def pages_beside(self, blocks: int, reserve: int = 0) -> int:
        """KV pages that exist beside so many SSM blocks and a gap."""
        floor = (self.null_blocks + blocks) * self.block_bytes + reserve
        return self.pages - ceil_div(floor, self.page_bytes)

    def blocks_beside(self, pages: int, reserve: int = 0) -> int:
        """SSM blocks that exist beside so many KV pages and a gap."""
        return (
            (self.pages - pages) * self.page_bytes - reserve
        ) // self.block_bytes - self.null_blocks

    def beside(self, kind: Kind, others: int, reserve: int = 0) -> int:
        """Pages of a pool that exist beside so many of the other and a gap."""
        if kind is Kind.SSM:
            return self.blocks_beside(others, reserve)
        return self.pages_beside(others, reserve)

    def pages_for(self, tokens: int) -> int:
        """KV pages of a request of so many tokens, over all groups."""
        pages = ceil_div(tokens, self.page_tokens)
        for group in self.more_groups:
            pages += group.pages_for(tokens)
        return pages

    def longest(self, blocks_each: int = 1, reserve: int = 0) -> int:
        """Tokens of the longest request that fits alone.

        Args:
            blocks_each: SSM blocks that it holds.
            reserve: Least bytes of the gap.
        """
        pages = max(self.pages_beside(blocks_each, reserve), 0)
        return bisect_right(range(pages * self.page_tokens + 1), pages, key=self.pages_for) - 1

    def usable_bytes(self, reserve: int = 0) -> int:
        """Bytes that pages and blocks can have, above the null bytes and beside a gap."""
        return self.high_end - self.null_end - reserve

    def sequences(self, tokens: int, blocks_each: int = 1, reserve: int = 0) -> int:
        """How many sequences of so many tokens fit together.

        Args:
            tokens: Length of each sequence.
            blocks_each: SSM blocks that each holds.
            reserve: Least bytes of the gap.
        """
        usable = max(self.usable_bytes(reserve), 0)
        return usable // self._sequence_bytes(tokens, blocks_each)

    def concurrency(self, tokens: int, blocks_each: int = 1, reserve: int = 0) -> float:
        """The same without rounding."""
        return self.usable_bytes(reserve) / self._sequence_bytes(tokens, blocks_each)

    def _sequence_bytes(self, tokens: int, blocks_each: int) -> int:
        return self.pages_for(tokens) * self.page_bytes + blocks_each * self.block_bytes

    def require_one_request(self, tokens: int, blocks_each: int = 1, reserve: int = 0) -> None:
        """Refuse an arena that cannot hold one request of so many tokens.

        Args:
            tokens: Length of the request.
            blocks_each: SSM blocks that it holds.
            reserve: Least bytes of the gap.

        Raises:
            ArenaTooSmall: With the bytes needed, the bytes there are, and the longest that fits.
        """
        if self.fits(self.pages_for(tokens), blocks_each, reserve):
            return
        fixed = (self.null_blocks + blocks_each) * self.block_bytes
        # Whole KV pages count from byte 0, so what else there is takes whole ones too.
        needed = (self.pages_for(tokens) + ceil_div(fixed, self.page_bytes)) * self.page_bytes
        raise ArenaTooSmall(
            f"a request of max_model_len={tokens} tokens needs {needed} bytes "
            f"({self.pages_for(tokens)} KV pages, {blocks_each} SSM block(s) and the null bytes) "
            f"but the arena has {self.arena_bytes}"
            + (f", of which {reserve} get no memory" if reserve else "")
            + ": raise --kv-cache-memory-bytes or --gpu-memory-utilization, or "
            + ("'budget', or " if reserve else "")
            + f"set --max-model-len to at most {self.longest(blocks_each, reserve)}"
        )
