"""Which bytes of an elastic arena must have memory, before and after a move plan.

::

    low                                                                          high
    | null | SSM band ->            |        gap         |            <- KV band |
    0 ............................ low_end         high_begin ................. K*F

What is backed is two intervals, and what is not is one. While a step is scheduled the bands may
grow and shrink again, and relocations may read and write wherever they were: a plan needs the
furthest that both reached.
"""

from __future__ import annotations

from typing import NamedTuple

#: Chunks of an arena by default: a part of the budget, between these (bytes).
LEAST_CHUNK, MOST_CHUNK, CHUNKS_OF_BUDGET = 2 << 20, 32 << 20, 256


def default_chunk_bytes(budget: int, granularity: int = LEAST_CHUNK) -> int:
    """Bytes of a chunk for a budget, a multiple of the driver's granularity."""
    chunk = min(max(budget // CHUNKS_OF_BUDGET, LEAST_CHUNK), MOST_CHUNK)
    return max(chunk // granularity, 1) * granularity


def reserve_for(high_end: int, budget: int, chunk_bytes: int) -> int:
    """The least gap that keeps an arena within a budget, wherever the gap lies (bytes).

    A gap of ``(n + 1) * chunk_bytes - 2`` bytes may hold only ``n - 1`` whole chunks, one byte more
    holds ``n`` everywhere; ``n`` are to hold no memory.

    Args:
        high_end: End of the KV view, ``K*F``.
        budget: Bytes that may be backed at most, whole chunks.
        chunk_bytes: Bytes that are backed at a time.
    """
    whole = -(-high_end // chunk_bytes) * chunk_bytes
    if budget >= whole:
        return 0
    return whole - budget + chunk_bytes - 1


def budget_for(high_end: int, gap: int, chunk_bytes: int) -> int:
    """The least budget, in whole chunks, whose reserve a gap leaves; `reserve_for` turned round.

    Args:
        high_end: End of the KV view.
        gap: Bytes of the gap; negative if what is asked does not fit at all.
        chunk_bytes: Bytes that are backed at a time.
    """
    whole = -(-high_end // chunk_bytes) * chunk_bytes
    return whole - max((gap + 1) // chunk_bytes - 1, 0) * chunk_bytes


def backed_bytes(extents: Extents, high_end: int, chunk_bytes: int) -> int:
    """Bytes of the chunks that the two ends touch."""
    low = -(-extents.low_end // chunk_bytes)
    top = -(-high_end // chunk_bytes)
    high = extents.high_begin // chunk_bytes if extents.high_begin < high_end else top
    return (top - max(high - low, 0)) * chunk_bytes


class Extents(NamedTuple):
    """Bytes that must have memory: from 0 to ``low_end``, and from ``high_begin`` up.

    Attributes:
        low_end: End of the SSM band, the null bytes included.
        high_begin: Begin of the KV band.
    """

    low_end: int
    high_begin: int

    def union(self, other: Extents) -> Extents:
        """What either needs."""
        return Extents(max(self.low_end, other.low_end), min(self.high_begin, other.high_begin))

    def common(self, other: Extents) -> Extents:
        """What both need."""
        return Extents(min(self.low_end, other.low_end), max(self.high_begin, other.high_begin))


class Stage(NamedTuple):
    """A part of a plan, and what it needs.

    Attributes:
        first: Index of the part's first relocation; it ends where the next one begins.
        extents: The furthest that the bands reached meanwhile.
    """

    first: int
    extents: Extents


class ExtentLog:
    """Follows the bands of an arena from one plan to the next.

    Both bands' furthest reach may be more than the arena may back at all, if one shrank before the
    other grew. Then the plan gets another stage, between which memory can move from one end to the
    other.

    Args:
        extents: Of the arena when it is made.
    """

    def __init__(self, extents: Extents) -> None:
        self._told: Extents | None = None
        self._stages = [Stage(0, extents)]

    def grown(self, extents: Extents, relocations: int, reserve: int) -> None:
        """Note that a band has grown.

        Args:
            extents: Now.
            relocations: How many the plan has so far.
            reserve: Least bytes of the gap.
        """
        last = self._stages[-1]
        furthest = last.extents.union(extents)
        if furthest.high_begin - furthest.low_end >= reserve:
            self._stages[-1] = Stage(last.first, furthest)
        else:
            self._stages.append(Stage(relocations, extents))

    def take(self, extents: Extents) -> tuple[tuple[Stage, ...], Extents] | None:
        """Drain what a plan needs.

        Args:
            extents: Now.

        Returns:
            The stages, and what is needed afterwards; None if the last plan left just that.
        """
        stages = tuple(self._stages)
        self._stages = [Stage(0, extents)]
        told, self._told = self._told, extents
        if len(stages) == 1 and stages[0].extents == extents == told:
            return None
        return stages, extents
