"""Handles: opaque 32-bit names of pages that survive relocation.

::

    bit 31   30    29 ............ 0
        0   pool        page id

Bit 31 stays clear so that a handle is a positive ``int32`` in a block table. Page id 0 is the null
page of both pools, so the value 0, with which vLLM pads its tables, needs no translation.
"""

from __future__ import annotations

from enum import IntEnum

SSM_TAG = 1 << 30
ID_MASK = SSM_TAG - 1


class Kind(IntEnum):
    """Which pool a page belongs to."""

    KV = 0
    SSM = 1

    # An enum's own hash is a Python call, and counters are kept by kind.
    __hash__ = int.__hash__

    @property
    def tag(self) -> int:
        """The bits that every handle of this pool carries."""
        return SSM_TAG if self is Kind.SSM else 0

    @property
    def other(self) -> Kind:
        """The other pool."""
        return Kind.KV if self is Kind.SSM else Kind.SSM

    @property
    def label(self) -> str:
        """Lower-case name for metrics and messages."""
        return self.name.lower()


def kind_of(handle: int) -> Kind:
    """Return the pool that a handle names."""
    return Kind.SSM if handle & SSM_TAG else Kind.KV
