"""Blocks that hold two kept states each, encoded in half their bytes.

A state that would go to make room is encoded instead, together with another one, and decoded into a
block of its own when a prompt begins at it. So there are still two sizes of page, and a state that
is in use is always whole.
"""

from __future__ import annotations

from collections.abc import Iterator

#: States that share a block.
HALVES = 2


def slot_of(block: int, half: int) -> int:
    """The name of half a block: below zero, where no handle is."""
    return ~(HALVES * block + half)


def half_of(slot: int) -> tuple[int, int]:
    """The block of a slot, and which half of it."""
    return divmod(~slot, HALVES)


class ColdBlocks:
    """Which halves of which blocks hold a state."""

    def __init__(self) -> None:
        self._held: dict[int, list[bool]] = {}
        self._open: dict[int, None] = {}

    def __contains__(self, block: object) -> bool:
        return block in self._held

    def __iter__(self) -> Iterator[int]:
        return iter(self._held)

    def __len__(self) -> int:
        """Encoded states."""
        return HALVES * len(self._held) - len(self._open)

    def begin(self, block: int) -> int:
        """Encode a block's state where it is; the slot that it has then."""
        assert block not in self._held
        self._held[block] = [True, False]
        self._open[block] = None
        return slot_of(block, 0)

    def place(self) -> int | None:
        """Take a slot that is free beside another state; None if there is none."""
        if not self._open:
            return None
        block = next(iter(self._open))
        del self._open[block]
        held = self._held[block]
        half = held.index(False)
        held[half] = True
        return slot_of(block, half)

    def vacate(self, slot: int) -> int | None:
        """Let go of a slot; the block, if it holds no other state."""
        block, half = half_of(slot)
        held = self._held[block]
        assert held[half]
        held[half] = False
        if any(held):
            self._open[block] = None
            return None
        del self._held[block], self._open[block]
        return block

    def clear(self) -> None:
        """Hold nothing."""
        self._held.clear()
        self._open.clear()
