"""What users of other systems report, as traces of an allocator: each must come out right here."""

from __future__ import annotations

import random

import pytest
from arena_client import Client, ShadowMemory

from avmp_vllm.core import Geometry, Kind

#: 200 pages of 100 bytes, or 19 blocks of 1,000 and the null block.
GEOMETRY = Geometry(20_000, 100, 1_000)


def full(client: Client, kind: Kind) -> list[int]:
    """Fill the whole arena with one kind of page."""
    count = client.arena.available(kind)
    handles = client.allocate(*((count, 0) if kind is Kind.KV else (0, count)))
    assert handles is not None
    return handles


@pytest.mark.parametrize("starved", list(Kind))
def test_a_pool_starves_while_the_other_is_evictable(starved: Kind) -> None:
    """SGLang #34441: dies on a 54 MB slot with a gap of 21 MB, because the state side never asks
    the KV side to evict what nobody uses."""
    client = Client(GEOMETRY, 128, ShadowMemory(GEOMETRY))
    client.release(full(client, starved.other), keep=True)
    assert client.arena.free(starved) == 0
    assert client.arena.gap_bytes < GEOMETRY.block_bytes
    one = (1, 0) if starved is Kind.KV else (0, 1)
    for _ in range(10):
        assert client.allocate(*one) is not None
    client.step()
    client.check()


def test_eviction_asks_the_pool_whose_page_is_oldest() -> None:
    """SGLang #34441 again: neither side's cache may be safe from the other side's need."""
    client = Client(GEOMETRY, 1)
    handles = client.allocate(90, 9)
    assert handles is not None
    pages, blocks = handles[:90], handles[90:]
    client.release(blocks[:4], keep=True)
    client.release(pages[:45], keep=True)
    client.release(blocks[4:], keep=True)
    client.release(pages[45:], keep=True)
    assert client.allocate(60, 4) is not None  # compares what went with one order over both
    assert min(client.arena.statistics.evictions.values()) > 0


def test_two_requests_do_not_evict_each_other_without_end() -> None:
    """SGLang #35158: retract livelock. A running request's pages are referenced, and referenced
    pages are never taken, so one of the two finishes and then the other one does."""
    client = Client(GEOMETRY, 1)
    need = {"a": 120, "b": 130}
    held: dict[str, list[int]] = {"a": [], "b": []}
    done: list[str] = []
    retracted = 0
    for _ in range(400):
        for name in [name for name in need if name not in done]:
            handles = client.allocate(*((5, 0) if held[name] else (5, 1)))
            if handles is None:
                # As a scheduler does: the younger of the two gives up its pages.
                victim = [n for n in need if n not in done and held[n]][-1]
                client.release(held[victim], keep=True)
                held[victim] = []
                retracted += 1
                continue
            held[name] += handles
            if len(held[name]) > need[name]:
                client.release(held[name], keep=True)
                done.append(name)
        client.check()
        if len(done) == 2:
            break
    assert done == ["a", "b"]
    assert 0 < retracted < 30


def test_a_request_that_fits_is_never_sent_back() -> None:
    """vLLM #52520: a request is requeued for ever although nothing else runs. What fits an empty
    arena fits one that holds nothing but cache, whatever happened before."""
    rng = random.Random(7)
    client = Client(GEOMETRY, 128)
    for _ in range(50):
        held = [client.allocate(rng.randint(0, 60), rng.randint(0, 6)) for _ in range(6)]
        for handles in held:
            if handles:
                rng.shuffle(handles)
                client.release(handles, keep=rng.random() < 0.8)
        largest = client.allocate(GEOMETRY.page_limit - 10, 1)
        assert largest is not None
        client.release(largest, keep=True)
        client.check()


@pytest.mark.parametrize("donor", list(Kind))
def test_a_live_page_at_the_tail_does_not_block_migration(donor: Kind) -> None:
    """AVMP's own prototype: 85% of its migrations are refused because a live page stands at the
    inner end of the donor's band. Here it moves, with its bytes and under its handle."""
    client = Client(GEOMETRY, 1, ShadowMemory(GEOMETRY))
    handles = full(client, donor)
    client.step()
    tail = min(handles, key=client.arena.physical)
    if donor is Kind.SSM:
        tail = max(handles, key=client.arena.physical)
    client.release([handle for handle in handles if handle != tail], keep=False)
    place = client.arena.physical(tail)
    everything_else = client.arena.available(donor.other)
    asked = (everything_else, 0) if donor is Kind.SSM else (0, everything_else)
    assert client.allocate(*asked) is not None
    assert client.arena.physical(tail) != place
    assert client.arena.statistics.relocations[donor] == 1
    client.step()  # reads the page back through the worker's own table
    client.check()


def test_one_page_of_each_chunk_pins_nothing() -> None:
    """kvcached: a chunk of device memory returns only when every block in it is free. Here the
    bytes of all free pages can be had, however the live ones are scattered."""
    client = Client(GEOMETRY, 128, ShadowMemory(GEOMETRY))
    pages = full(client, Kind.KV)
    client.step()
    live = pages[::10]
    client.release([page for page in pages if page not in live], keep=False)
    blocks = full(client, Kind.SSM)
    assert len(blocks) == (GEOMETRY.page_limit - len(live)) * 100 // 1_000
    client.step()
    client.check()


def test_there_is_no_ratio_to_get_wrong() -> None:
    """SGLang #25993, #38846: a split fixed at start gives 47% to states that nobody uses, or runs
    9 sequences of 32. One arena serves pages alone, states alone, and pages again."""
    client = Client(GEOMETRY, 128)
    for kind in (Kind.KV, Kind.SSM, Kind.KV):
        handles = full(client, kind)
        assert len(handles) == GEOMETRY.limit(kind)
        client.release(handles, keep=False)


def test_both_pools_live_in_the_bytes_of_one() -> None:
    """AVMP's own prototype: takes the memory twice, as each pool is backed in full."""
    client = Client(GEOMETRY, 1)
    rng = random.Random(3)
    for _ in range(100):
        handles = client.allocate(rng.randint(0, 80), rng.randint(0, 8))
        held = sum(client.arena.capacity(kind) * GEOMETRY.unit(kind) for kind in Kind)
        assert held + GEOMETRY.null_bytes + client.arena.gap_bytes <= GEOMETRY.arena_bytes
        for handle in handles or ():
            kind = Kind.SSM if handle >> 30 else Kind.KV
            end = (client.arena.physical(handle) + 1) * GEOMETRY.unit(kind)
            assert end <= GEOMETRY.arena_bytes
        if handles and rng.random() < 0.7:
            client.release(handles, keep=False)


def test_a_vacated_place_is_taken_again_in_the_same_plan() -> None:
    """SGLang #39982: a relocation's source waits for events before it may be used again, and the
    gates leak. Here a plan runs in order, so a place may be left and taken within one."""
    client = Client(GEOMETRY, 1, ShadowMemory(GEOMETRY))
    pages = full(client, Kind.KV)
    client.step()
    client.release(pages[:20], keep=False)
    assert client.allocate(0, 1) is not None  # ten pages move outwards
    client.release([page for page in pages[20:] if client.arena.physical(page) > 185], keep=False)
    assert client.allocate(0, 1) is not None
    moves = client.arena.take_relocations()
    sources = {move.source for move in moves}
    assert len(moves) > 10
    client.arena._relocations = moves  # give them back for the step
    blocks_end = client.arena.capacity(Kind.SSM) + GEOMETRY.null_blocks
    assert any(source * 100 < blocks_end * 1_000 for source in sources), "no source is reused"
    client.step()
    client.check()


def test_a_short_prompt_takes_a_page_and_a_block() -> None:
    """vLLM #54458: a prompt of 12 tokens takes 32.9% of the pool, so 2 or 3 requests run."""
    geometry = Geometry(64 * 1_000, 40, 1_000, page_tokens=16)
    client = Client(geometry, 128)
    running = 0
    while client.allocate(geometry.pages_for(12), 1) is not None:
        running += 1
    assert running == 63_000 // 1_040


def test_nothing_leaks() -> None:
    """kvcached #339, #364, #371: leaks. After the last request every byte is free or evictable."""
    client = Client(GEOMETRY, 128)
    rng = random.Random(11)
    for _ in range(300):
        handles = client.allocate(rng.randint(0, 40), rng.randint(0, 4))
        if handles:
            client.release(handles, keep=rng.random() < 0.5)
    arena = client.arena
    assert arena.used(Kind.KV) == arena.used(Kind.SSM) == 0
    parts = sum((arena.free(k) + arena.cached(k)) * GEOMETRY.unit(k) for k in Kind)
    null = GEOMETRY.null_blocks * GEOMETRY.block_bytes
    assert parts + arena.gap_bytes + null + GEOMETRY.rounding_bytes == GEOMETRY.arena_bytes
    client.check()
