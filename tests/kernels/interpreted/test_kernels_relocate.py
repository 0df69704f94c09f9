"""Relocate, zero and page-table update; and how a plan is cut into launches."""

from __future__ import annotations

import pytest
import torch
from avmp_kernels import page_table, relocate
from avmp_kernels.pages import SSM_TAG, PageTable
from avmp_kernels.reference import pages as reference
from batches import distinct_handles, generator, random_table
from hypothesis import given
from hypothesis import strategies as st

# KV page and SSM block: multiples of 16 that do not divide each other, either may be the larger.
_SIZES = st.sampled_from([(32, 112), (48, 32), (16, 1024), (64, 64), (16400, 32)])


def _arena(page_bytes: tuple[int, int], seed: int) -> torch.Tensor:
    size = 12 * max(page_bytes) + 8
    return torch.randint(0, 256, (size,), generator=generator(seed), dtype=torch.uint8)


def _pages_of(arena: torch.Tensor, page_bytes: tuple[int, int], kind: int) -> int:
    return min(arena.numel() // page_bytes[kind], 30)


@given(page_bytes=_SIZES, seed=st.integers(0, 1000), data=st.data())
def test_relocate_equals_one_by_one(page_bytes, seed, data) -> None:
    """Any ordered list, chains and overlaps of the two sizes included, ends in the same bytes."""
    arena = _arena(page_bytes, seed)
    moves = []
    for _ in range(data.draw(st.integers(0, 12))):
        kind = data.draw(st.integers(0, 1))
        index = st.integers(0, _pages_of(arena, page_bytes, kind) - 1)
        moves.append((kind, data.draw(index), data.draw(index)))
    wanted = arena.clone()
    reference.copy_pages(wanted, moves, page_bytes)
    launches = relocate.relocate(arena, moves, page_bytes)
    assert torch.equal(arena, wanted)
    assert launches == len(relocate.dependency_levels(moves, page_bytes))


@given(page_bytes=_SIZES, seed=st.integers(0, 1000), data=st.data())
def test_levels_allow_any_order(page_bytes, seed, data) -> None:
    """Within a level the order does not matter, which the interpreter alone cannot show."""
    arena = _arena(page_bytes, seed)
    moves = []
    for _ in range(data.draw(st.integers(0, 12))):
        kind = data.draw(st.integers(0, 1))
        index = st.integers(0, min(_pages_of(arena, page_bytes, kind), 8) - 1)
        moves.append((kind, data.draw(index), data.draw(index)))
    wanted = arena.clone()
    reference.copy_pages(wanted, moves, page_bytes)
    for level in relocate.dependency_levels(moves, page_bytes):
        reference.copy_pages(arena, data.draw(st.permutations(level)), page_bytes)
    assert torch.equal(arena, wanted)


def test_levels_of_known_plans() -> None:
    """Independent copies share a launch; a chain and a reuse of a vacated page do not."""
    sizes = (32, 112)
    assert len(relocate.dependency_levels([(0, 1, 2), (0, 3, 4), (1, 3, 4)], sizes)) == 1
    assert len(relocate.dependency_levels([(0, 1, 2), (0, 3, 1)], sizes)) == 2
    assert len(relocate.dependency_levels([(0, 1, 2), (0, 2, 3)], sizes)) == 2
    assert len(relocate.dependency_levels([(0, 1, 2), (0, 3, 2)], sizes)) == 2
    # KV page 7 is bytes 224..256, the first bytes of SSM block 2 (224..336).
    assert len(relocate.dependency_levels([(0, 7, 1), (1, 3, 2)], sizes)) == 2
    assert len(relocate.dependency_levels([(0, 6, 1), (1, 3, 2)], sizes)) == 1
    # Two reads of one page do not wait for each other.
    assert len(relocate.dependency_levels([(0, 1, 2), (0, 1, 3)], sizes)) == 1


def test_order_matters() -> None:
    """The same copies in the wrong order give other bytes: the tests above can fail."""
    arena = _arena((32, 112), seed=3)
    other = arena.clone()
    relocate.relocate(arena, [(0, 1, 2), (0, 3, 1)], (32, 112))
    relocate.relocate(other, [(0, 3, 1), (0, 1, 2)], (32, 112))
    assert not torch.equal(arena, other)


@given(page_bytes=_SIZES, seed=st.integers(0, 1000), data=st.data())
def test_zero(page_bytes, seed, data) -> None:
    """The listed pages are cleared, and nothing else."""
    arena = _arena(page_bytes, seed)
    listed = []
    for kind in (0, 1):
        index = st.integers(0, _pages_of(arena, page_bytes, kind) - 1)
        listed += [(kind, i) for i in data.draw(st.lists(index, max_size=4, unique=True))]
    wanted = arena.clone()
    reference.zero_pages(wanted, listed, page_bytes)
    targets = torch.tensor([index for _, index in listed], dtype=torch.int32)
    relocate.zero_pages(arena, targets, sum(kind == 0 for kind, _ in listed), page_bytes)
    assert torch.equal(arena, wanted)


def test_sizes_that_do_not_fit() -> None:
    """A page that is no multiple of 16 bytes, and a misaligned arena, are refused."""
    arena = torch.zeros(1024, dtype=torch.uint8)
    with pytest.raises(ValueError, match="SSM block of 40 bytes"):
        relocate.relocate(arena, [(0, 1, 2)], (32, 40))
    with pytest.raises(ValueError, match="aligned to 16 bytes"):
        relocate.relocate(arena[8:], [(0, 1, 2)], (32, 64))


@given(seed=st.integers(0, 1000), count=st.integers(0, 12))
def test_page_table_update(seed, count) -> None:
    """The last write of a handle wins; null and unknown handles are ignored."""
    pages = random_table(20, 8, seed)
    wanted = PageTable(pages.entries.clone(), pages.num_kv)
    random = generator(seed)
    known = torch.cat([distinct_handles(6, 20, False, seed), distinct_handles(4, 8, True, seed)])
    handles = known[torch.randint(0, 10, (count,), generator=random)].tolist()
    handles += [0, SSM_TAG, 20, 21, SSM_TAG + 8, -3, (1 << 31) - 1]
    updates = [(h, int(torch.randint(1, 99, (), generator=random))) for h in handles]
    reference.update_table(wanted, updates)
    page_table.update(pages, updates)
    assert torch.equal(pages.entries, wanted.entries)
