"""A torch buffer and the worker's page table, fed with plans alone, keep every page's bytes."""

from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from arena_client import Client, Damage, ShadowMemory
from test_arena_shadow import by_pool, churn, last_first, there_and_back, without_last

from avmp_vllm.backing.page_table import PageTable
from avmp_vllm.backing.state_codec import Segment, StateCodec
from avmp_vllm.backing.torch_buffer import TorchBuffer
from avmp_vllm.core import (
    SSM_TAG,
    Arena,
    Copy,
    Geometry,
    Kind,
    MovePlan,
    Recode,
    Relocation,
    kind_of,
)

#: The torch buffer takes pages of whole 8-byte words.
SHAPES = [(64, 456, 16_000), (512, 96, 20_001), (128, 128, 9_000)]


class TorchMemory(ShadowMemory):
    """The same checks as in memory of plain bytes, through the code that workers run."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.raw = torch.zeros(geometry.arena_bytes, dtype=torch.uint8)
        self.bytes = memoryview(self.raw.numpy())  # type: ignore[assignment]
        self.buffer = TorchBuffer(self.raw, geometry)
        self.table = PageTable(geometry)
        self.number = 0

    def physical(self, handle: int) -> int:
        return self.table.physical(handle)

    def relocate(self, moves: Iterable[Relocation]) -> None:
        self.number += 1
        plan = MovePlan(self.number, relocations=list(moves))
        self.buffer.apply(plan)
        self.table.apply(plan.relocations)

    def zero(self, kind: Kind, index: int) -> None:
        assert kind is Kind.KV
        self.buffer.apply(MovePlan(self.number, zeros=[index]))


@pytest.mark.parametrize("batch", [1, 128])
@pytest.mark.parametrize(("page", "block", "size"), SHAPES)
def test_no_byte_is_lost(page: int, block: int, size: int, batch: int) -> None:
    geometry = Geometry(size, page, block)
    memory = TorchMemory(geometry)
    client = Client(geometry, batch, memory)
    churn(client, random.Random(f"torch {page} {block} {batch}"), steps=80)
    assert all(client.arena.statistics.relocations[kind] > 5 for kind in Kind)
    known, digest = client.arena.digest()
    assert memory.table.digest(dict(zip(Kind, known, strict=True))) == digest


@pytest.mark.parametrize("deliver", [last_first, by_pool, without_last])
def test_a_spoilt_plan_is_noticed(deliver: object) -> None:
    geometry = Geometry(20_800, 104, 1_040)
    client = Client(geometry, 1, TorchMemory(geometry), deliver)  # type: ignore[arg-type]
    with pytest.raises((Damage, AssertionError), match=r"lost the bytes|null bytes|leaves"):
        there_and_back(client)


def test_zeroing_and_copies_come_after_relocations() -> None:
    """One plan whose parts touch the same bytes: page 9 moves to 12, 9 is cleared, 12 is copied."""
    geometry = Geometry(16 * 64, 64, 128)
    raw = torch.arange(geometry.arena_bytes, dtype=torch.int64).to(torch.uint8)
    buffer = TorchBuffer(raw, geometry)
    page = raw.view(16, 64)
    page[9] = 7
    buffer.apply(
        MovePlan(
            1,
            relocations=[Relocation(Kind.KV, 3, 4, 9, 12)],
            zeros=[9],
            copies=[Copy(Kind.KV, 12, 14), Copy(Kind.SSM, 6, 2)],
        )
    )
    assert page[12].eq(7).all()
    assert page[9].eq(0).all()
    assert page[14].eq(7).all()
    assert page[4:6].reshape(-1)[:64].eq(7).all(), "block 2 holds page 12, which block 6 held"
    assert torch.equal(page[8], torch.arange(8 * 64, 9 * 64).to(torch.uint8))


def test_states_are_encoded_between_relocations() -> None:
    """Block 4 is encoded into 6, then taken by another; 6 moves to 9, and is decoded from there."""
    geometry = Geometry(12 * 512, 64, 512)
    raw = torch.zeros(geometry.arena_bytes, dtype=torch.uint8)
    buffer = TorchBuffer(raw, geometry, StateCodec([Segment(0, 512, 1, 512, row=16)], 512))
    blocks = raw.view(torch.float32).view(12, 128)
    state = torch.arange(128) - 60.0
    blocks[4], blocks[5], blocks[9] = state, 5, 9
    relocations = [Relocation(Kind.SSM, 1, 2, 5, 4), Relocation(Kind.SSM, 3, 4, 6, 9)]
    plan = MovePlan(1, relocations=relocations)
    plan.recodes = [Recode(0, 4, 6, 1, encode=True), Recode(2, 9, 2, 1, encode=False)]
    assert [part for part, _ in plan.in_order()] == [[], relocations, []]
    buffer.apply(plan)
    assert torch.allclose(blocks[2], state, atol=67 / 4094)
    assert blocks[4].eq(5).all()


@pytest.mark.parametrize(("page", "block", "name"), [(100, 128, "kv"), (64, 100, "ssm")])
def test_a_page_of_broken_words_is_refused(page: int, block: int, name: str) -> None:
    geometry = Geometry(10_000, page, block)
    with pytest.raises(ValueError, match=f"a {name} page of 100 bytes is not a multiple of 8"):
        TorchBuffer(torch.zeros(10_000, dtype=torch.uint8), geometry)


def test_a_short_buffer_is_refused() -> None:
    geometry = Geometry(10_000, 64, 128)
    with pytest.raises(ValueError, match="the buffer has 9992 bytes, the arena 10000"):
        TorchBuffer(torch.zeros(9_992, dtype=torch.uint8), geometry)


def test_any_dtype_will_do() -> None:
    geometry = Geometry(10_000, 64, 128)
    buffer = TorchBuffer(torch.zeros(2_500, dtype=torch.float32), geometry)
    assert buffer.page(Kind.SSM, 3) == slice(48, 64)


def test_tables_are_resolved_and_padding_becomes_null() -> None:
    geometry = Geometry(10_000, 64, 456)
    arena, table = Arena(geometry, migration_batch=1), PageTable(geometry)
    pages = arena.allocate(pages=arena.available(Kind.KV))
    arena.release(pages[:60])
    blocks = arena.allocate(blocks=5)
    table.apply(arena.take_relocations())
    for kind, handles in ((Kind.KV, pages[60:]), (Kind.SSM, blocks)):
        assert all(kind_of(handle) is kind for handle in handles)
        rows = np.array([[*handles[:4], 0, kind.tag | 0x3FFF_FFFF]], dtype=np.int32)
        out = np.full_like(rows, -1)
        table.resolve(kind, rows, out)
        assert out.tolist() == [[*map(arena.physical, handles[:4]), 0, 0]]
    assert table.physical(SSM_TAG) == table.physical(0) == 0


def test_a_table_that_missed_a_plan_has_another_digest() -> None:
    geometry = Geometry(10_000, 64, 456)
    arena, table = Arena(geometry, migration_batch=1), PageTable(geometry)
    pages = arena.allocate(pages=arena.available(Kind.KV))
    arena.release(pages[:60])
    arena.allocate(blocks=5)
    (kv, ssm), digest = arena.digest()
    known = {Kind.KV: kv, Kind.SSM: ssm}
    assert table.digest(known) != digest
    table.apply(arena.take_relocations())
    assert table.digest(known) == digest
