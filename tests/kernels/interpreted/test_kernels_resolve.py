"""Resolve once: block tables, slots and states of all groups in one launch."""

from __future__ import annotations

import pytest
import torch
from avmp_kernels.pages import SSM_TAG
from avmp_kernels.reference.pages import resolve_group
from avmp_kernels.resolve import Resolver
from batches import generator, random_table, starts_of
from hypothesis import given
from hypothesis import strategies as st

_NUM_KV, _NUM_SSM, _MAX_REQUESTS, _WIDTHS = 40, 12, 6, (9, 3, 5)
_PAGE_TOKENS, _IS_SSM, _HAS_SLOTS = (4, 16, 8), (False, True, False), (True, False, True)


def _tables(seed: int) -> list[torch.Tensor]:
    """Return tables of handles, some of them bad: wrong pool, negative, beyond the table."""
    random = generator(seed)
    tables = []
    for width, is_ssm in zip(_WIDTHS, _IS_SSM, strict=True):
        size = _NUM_SSM if is_ssm else _NUM_KV
        ids = torch.randint(0, size + 2, (_MAX_REQUESTS, width), generator=random)
        table = ids + (SSM_TAG if is_ssm else 0)
        table[0, 0] = -5
        table[1, 0] = 3 if is_ssm else SSM_TAG + 3
        tables.append(table.int())
    return tables


@given(
    lengths=st.lists(st.integers(0, 9), max_size=_MAX_REQUESTS),
    padding=st.integers(0, 3),
    seed=st.integers(0, 1000),
    state_tokens=st.sampled_from([0, 7]),
    state_columns=st.sampled_from([1, 3]),
    translate=st.booleans(),
    dummies=st.booleans(),
)
def test_equals_reference(
    lengths, padding, seed, state_tokens, state_columns, translate, dummies
) -> None:
    """Every element of the outputs is the reference's, stale columns are untouched."""
    random = generator(seed)
    tables = _tables(seed)
    pages = random_table(_NUM_KV, _NUM_SSM, seed) if translate else None
    max_tokens = sum(lengths) + 5
    spacing = [0, state_tokens, 0]
    resolver = Resolver(
        tables,
        _PAGE_TOKENS,
        _IS_SSM,
        max_tokens,
        has_slots=_HAS_SLOTS,
        state_tokens=spacing,
        state_columns=state_columns,
    )
    for buffer in (*resolver.block_tables, resolver.state_indices, resolver.slot_mappings):
        buffer.fill_(-77)
    requests = torch.randperm(_MAX_REQUESTS, generator=random)[: len(lengths)].int()
    if dummies and len(lengths):
        requests[-1] = -1
    starts = starts_of(lengths)
    positions = torch.cat(
        [torch.arange(7, 7 + n) for n in lengths] + [torch.zeros(0, dtype=torch.int64)]
    )
    seq_lens = torch.tensor([7 + n for n in lengths], dtype=torch.int32)
    num_pages = torch.stack(
        [torch.randint(0, w + 1, (_MAX_REQUESTS,), generator=random) for w in _WIDTHS]
    ).int()
    num_rows = min(len(lengths) + padding, _MAX_REQUESTS)
    resolver.resolve(requests, starts, positions, seq_lens, num_pages, pages, num_rows)
    for group, table in enumerate(tables):
        wanted = resolve_group(
            table,
            _PAGE_TOKENS[group],
            _IS_SSM[group],
            _HAS_SLOTS[group],
            spacing[group],
            requests,
            starts,
            positions,
            seq_lens,
            num_pages[group],
            pages,
            num_rows,
            max_tokens,
            state_columns,
        )
        found = resolver.block_tables[group]
        stale = wanted.block_table == -1
        assert torch.equal(found[:num_rows].where(~stale, 0), wanted.block_table.where(~stale, 0))
        assert (found[:num_rows][stale] == -77).all()
        assert (found[num_rows:] == -77).all()
        assert torch.equal(resolver.slot_mappings[group], wanted.slots)
        assert torch.equal(resolver.state_indices[group, :num_rows], wanted.states)


def test_follows_the_page_table() -> None:
    """A changed page table changes the result: the test above can fail."""
    table = torch.tensor([[1, 2, 3]], dtype=torch.int32)
    resolver = Resolver([table], [4], [False], max_tokens=2)
    tokens = torch.tensor([0, 2], dtype=torch.int32)
    arguments = (
        torch.tensor([0], dtype=torch.int32),
        tokens,
        torch.tensor([5, 6]),
        torch.tensor([7], dtype=torch.int32),
        torch.tensor([[3]], dtype=torch.int32),
    )
    pages = random_table(8, 2, seed=1)
    pages.entries[1:4] = torch.tensor([6, 5, 4])
    resolver.resolve(*arguments, pages)
    assert resolver.block_tables[0].tolist() == [[6, 5, 4]]
    assert resolver.slot_mappings.tolist() == [[5 * 4 + 1, 5 * 4 + 2]]
    pages.entries[2] = 7
    resolver.resolve(*arguments, pages)
    assert resolver.slot_mappings.tolist() == [[7 * 4 + 1, 7 * 4 + 2]]


def test_more_rows_than_the_buffers_hold() -> None:
    """Asking for more rows than there are is refused with the numbers."""
    resolver = Resolver([torch.zeros(2, 3, dtype=torch.int32)], [4], [False], max_tokens=2)
    nothing = torch.zeros(0, dtype=torch.int32)
    with pytest.raises(ValueError, match="3 rows for 0 requests; the buffers hold 2"):
        resolver.resolve(nothing, nothing, nothing, nothing, nothing, None, 3)
