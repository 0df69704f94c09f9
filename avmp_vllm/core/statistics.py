"""Counters of an arena; they only grow, apart from the peaks' reset."""

from __future__ import annotations

from dataclasses import dataclass, field

from avmp_vllm.core.handles import Kind


def _per_kind() -> dict[Kind, int]:
    return dict.fromkeys(Kind, 0)


@dataclass
class Statistics:
    """What has happened since the arena was made.

    Attributes:
        migrations: Times that a pool *received* capacity from the other, by receiving pool.
        migrated_bytes: Bytes of capacity that a pool received from the other.
        relocations: Mapped pages moved, by pool.
        relocated_bytes: Bytes of those pages.
        evictions: Cached pages given up, by pool.
        failures: Allocations that could not be served, by the pool that was short.
        peak_used: Most referenced pages at one time, by pool.
    """

    migrations: dict[Kind, int] = field(default_factory=_per_kind)
    migrated_bytes: dict[Kind, int] = field(default_factory=_per_kind)
    relocations: dict[Kind, int] = field(default_factory=_per_kind)
    relocated_bytes: dict[Kind, int] = field(default_factory=_per_kind)
    evictions: dict[Kind, int] = field(default_factory=_per_kind)
    failures: dict[Kind, int] = field(default_factory=_per_kind)
    peak_used: dict[Kind, int] = field(default_factory=_per_kind)
