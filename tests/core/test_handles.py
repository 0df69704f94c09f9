"""Names of pages: the bits of a handle, and that they never change while a page lives."""

from __future__ import annotations

import struct

import pytest

from avmp_vllm.core import ID_MASK, SSM_TAG, AllocationFailure, Arena, Geometry, Kind, kind_of


def test_bits() -> None:
    assert (SSM_TAG, ID_MASK) == (1 << 30, (1 << 30) - 1)
    for kind in Kind:
        for number in (0, 1, ID_MASK):
            handle = number | kind.tag
            assert kind_of(handle) is kind
            assert handle & ID_MASK == number
            assert struct.unpack("=i", struct.pack("=i", handle)) == (handle,)
    assert Kind.KV.other is Kind.SSM
    assert Kind.SSM.other is Kind.KV
    assert [kind.label for kind in Kind] == ["kv", "ssm"]


def test_the_null_handles_resolve_to_index_0() -> None:
    arena = Arena(Geometry(10_000, 100, 700))
    assert arena.physical(0) == 0
    assert arena.physical(SSM_TAG) == 0


def test_ids_are_given_out_from_1_without_gaps() -> None:
    arena = Arena(Geometry(10_000, 100, 700), migration_batch=1)
    handles = arena.allocate(pages=5, blocks=2)
    assert arena.known(Kind.KV) >= 5
    for kind in Kind:
        mine = [handle & ID_MASK for handle in handles if kind_of(handle) is kind]
        assert all(1 <= number <= arena.known(kind) for number in mine)


def test_outer_places_go_first() -> None:
    """Pages from the high end downwards, blocks from the low end upwards."""
    geometry = Geometry(20_000, 100, 700)
    arena = Arena(geometry)
    handles = arena.allocate(pages=4, blocks=3)
    places = [arena.physical(handle) for handle in handles]
    assert places == [199, 198, 197, 196, 1, 2, 3]
    assert arena.physical(arena.allocate(pages=1)[0]) == 195
    assert arena.physical(arena.allocate(blocks=1)[0]) == 4


def test_a_batch_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="migration_batch must be at least 1, not 0"):
        Arena(Geometry(10_000, 100, 700), migration_batch=0)


def test_a_failure_says_what_there_is() -> None:
    arena = Arena(Geometry(10_000, 100, 700))
    arena.allocate(pages=50, blocks=1)
    pages, blocks = arena.available(Kind.KV), arena.available(Kind.SSM)
    with pytest.raises(AllocationFailure) as failure:
        arena.allocate(pages=pages, blocks=1)
    assert str(failure.value) == (
        f"{pages} KV page(s) and 1 SSM block(s) do not fit: 50 pages and 1 blocks are in use, "
        f"room for {pages} more pages or {blocks} more blocks"
    )
    assert arena.statistics.failures == {Kind.KV: 1, Kind.SSM: 0}


def test_peaks_are_of_referenced_pages() -> None:
    arena = Arena(Geometry(10_000, 100, 700))
    handles = arena.allocate(pages=7, blocks=3)
    arena.cache(handles)
    arena.allocate(pages=2)
    for handle in handles[:6]:
        arena.revive(handle)
    assert arena.statistics.peak_used == {Kind.KV: 8, Kind.SSM: 3}


def test_what_moved_is_counted_in_pages_and_bytes() -> None:
    geometry = Geometry(100 * 100, 100, 1_000)
    arena = Arena(geometry, migration_batch=1)
    pages = arena.allocate(pages=geometry.page_limit)
    arena.release(pages[:80])  # the outer ones: what stays stands at the inner end
    arena.allocate(blocks=7)
    statistics = arena.statistics
    assert statistics.migrations == {Kind.KV: 0, Kind.SSM: 1}
    moves = arena.take_relocations()
    assert len(moves) == statistics.relocations[Kind.KV] == 10
    assert statistics.relocated_bytes == {Kind.KV: 1_000, Kind.SSM: 0}
    assert statistics.migrated_bytes[Kind.SSM] == 7_000
    assert arena.take_relocations() == []
    places = {arena.physical(handle) for handle in pages[80:]}
    assert len(places) == 10
    assert places <= set(range(80, 100))


def test_a_migration_moves_at_least_the_batch() -> None:
    """So that a busy boundary does not flap: the next blocks find room without a migration."""
    geometry = Geometry(100 * 100, 100, 1_000)
    for batch, moved in ((1, 1_000), (35, 3_500), (10**9, 9_000)):
        arena = Arena(geometry, migration_batch=batch)
        arena.release(arena.allocate(pages=geometry.page_limit))
        arena.allocate(blocks=1)
        assert arena.statistics.migrated_bytes[Kind.SSM] == moved
        assert arena.capacity(Kind.SSM) == moved // 1_000


def test_room_for_both_kinds_is_made_at_once() -> None:
    """Two allocations after one `reserve` bring nothing back that the first took."""
    geometry = Geometry(100 * 100, 100, 1_000)
    arena = Arena(geometry, migration_batch=10**9)
    arena.release(arena.allocate(blocks=geometry.block_limit))
    arena.reserve(40, 3)
    before = dict(arena.statistics.migrations)
    assert sum(before.values()) == 1
    arena.allocate(pages=40)
    arena.allocate(blocks=3)
    assert arena.statistics.migrations == before
    with pytest.raises(AllocationFailure):
        arena.reserve(50, 3)
    arena.verify()
