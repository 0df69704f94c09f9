"""A worker's copy of the page table.

Handles start with the mapping that every arena starts with, and only relocations change it, so the
scheduler and all workers agree without ever sending the table itself.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from avmp_vllm.core import ID_MASK, Geometry, Kind, Relocation, kind_of


class PageTable:
    """Handle to physical index, for both pools.

    Args:
        geometry: Sizes of the arena.

    Attributes:
        entries: For each pool, ``int32[pages that can exist + 1]``; entry 0 is the null page.
    """

    def __init__(self, geometry: Geometry) -> None:
        self._origins = tuple(map(geometry.origin, Kind))
        kv = geometry.origin(Kind.KV) - np.arange(geometry.page_limit + 1, dtype=np.int32)
        ssm = geometry.origin(Kind.SSM) + np.arange(geometry.block_limit + 1, dtype=np.int32)
        self.entries: dict[Kind, npt.NDArray[np.int32]] = {Kind.KV: kv, Kind.SSM: ssm}
        for entries in self.entries.values():
            entries[0] = 0

    def apply(self, relocations: Iterable[Relocation]) -> None:
        """Write the entries that relocations swap, in order."""
        for move in relocations:
            entries = self.entries[move.kind]
            entries[move.handle & ID_MASK] = move.target
            entries[move.displaced & ID_MASK] = move.source

    def physical(self, handle: int) -> int:
        """Resolve one handle."""
        return int(self.entries[kind_of(handle)][handle & ID_MASK])

    def resolve(
        self, kind: Kind, handles: npt.NDArray[np.int32], out: npt.NDArray[np.int32]
    ) -> None:
        """Resolve an array of one pool's handles into ``out`` of the same shape.

        What is not a handle (ids beyond the table, as left in unused columns) becomes null.
        """
        entries = self.entries[kind]
        numbers = handles & ID_MASK
        numbers[numbers >= len(entries)] = 0
        np.take(entries, numbers, out=out)

    def digest(self, known: dict[Kind, int]) -> int:
        """Checksum of the first ``known`` handles' positions, to compare two copies."""
        return self._checksum(self.entries, known)

    def _checksum(self, entries: dict[Kind, npt.NDArray[np.int32]], known: dict[Kind, int]) -> int:
        """Whichever stage's indices the entries are, positions are the scheduler's."""
        value = 0
        for kind, origin in zip(Kind, self._origins, strict=True):
            table = entries[kind][: known[kind] + 1]
            positions = table - origin if kind is Kind.SSM else origin - table
            positions[0] = table[0]  # the null page has none
            value = zlib.crc32(positions.tobytes(), value)
        return value
