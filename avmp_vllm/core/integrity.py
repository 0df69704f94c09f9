"""Every invariant of an arena, looked at from outside; for `Arena.verify`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from avmp_vllm.core.handles import ID_MASK, Kind, kind_of

if TYPE_CHECKING:
    from avmp_vllm.core.arena import Arena


def problems(arena: Arena, referenced: Iterable[int] | None = None) -> list[str]:
    """Name what does not add up (empty: nothing).

    Args:
        arena: To look at; it is not changed.
        referenced: All handles that the arena's user holds, if it can list them.
    """
    geometry, (kv, ssm) = arena.geometry, arena._bands
    found = kv.problems() + ssm.problems()
    if not geometry.fits(kv.capacity, ssm.capacity):
        found.append(f"the bands cross by {-arena.gap_bytes} bytes")
    if arena.gap_bytes < arena.reserve_bytes and not arena._over:
        found.append(f"a gap of {arena.gap_bytes} bytes is below the reserve {arena.reserve_bytes}")
    if geometry.null_end < geometry.null_bytes:
        found.append("the SSM band begins inside the null bytes")
    total = geometry.null_end + arena.gap_bytes + geometry.rounding_bytes
    for kind in Kind:
        band = arena._bands[kind]
        if arena.used(kind) < 0:
            found.append(f"{kind.label}: more free and cached pages than the band holds")
        parts = arena.used(kind) + arena.cached(kind) + band.free
        total += parts * band.unit
        free = set(band.free_handles())
        for handle in arena._cached[kind]:
            if handle in free:
                found.append(f"{kind.label}: cached handle {handle} is also free")
            if not 1 <= band.position(handle) <= band.capacity:
                found.append(f"{kind.label}: cached handle {handle} is outside the band")
    if total != geometry.arena_bytes:
        found.append(f"bytes do not add up: {total} counted, {geometry.arena_bytes} exist")
    if referenced is not None:
        found += _of_referenced(arena, list(referenced))
    return found


def _of_referenced(arena: Arena, handles: list[int]) -> list[str]:
    """What does not add up between the arena and the handles that its user holds."""
    found: list[str] = []
    for kind in Kind:
        band, cached = arena._bands[kind], arena._cached[kind]
        mine = [h for h in handles if kind_of(h) is kind]
        distinct = set(mine)
        if len(distinct) != arena.used(kind):
            counted = f"{arena.used(kind)} pages counted as used"
            found.append(f"{kind.label}: {counted}, {len(distinct)} referenced")
        free = set(band.free_handles())
        for handle in distinct:
            if not 1 <= (handle & ID_MASK) <= band.known:
                found.append(f"{kind.label}: handle {handle} was never given out")
            elif handle in free or handle in cached:
                found.append(f"{kind.label}: referenced handle {handle} is free or cached")
            elif band.position(handle) > band.capacity:
                found.append(f"{kind.label}: referenced handle {handle} is outside the band")
    return found
