"""References of the page-table kernels: resolve once, update, relocate, zero, check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from avmp_kernels.pages import ID_MASK, SSM_TAG, PageTable


def resolve_handle(pages: PageTable | None, handle: int, is_ssm: bool) -> int:
    """Return the physical index of one handle; 0 if it is not of that pool or not in the table."""
    if pages is None:
        return handle
    if handle < 0 or bool(handle & SSM_TAG) != is_ssm:
        return 0
    page_id = handle & ID_MASK
    if page_id >= (pages.num_ssm if is_ssm else pages.num_kv):
        return 0
    return int(pages.entries[page_id + (pages.num_kv if is_ssm else 0)])


def resolve_handles(pages: PageTable | None, handles: torch.Tensor, is_ssm: bool) -> torch.Tensor:
    """Return the physical indices (int64) of handles of any shape."""
    flat = [resolve_handle(pages, int(handle), is_ssm) for handle in handles.flatten()]
    return torch.tensor(flat, dtype=torch.int64).reshape(handles.shape)


class Resolved(NamedTuple):
    """One group's part of a resolved step."""

    block_table: torch.Tensor
    slots: torch.Tensor
    states: torch.Tensor


def resolve_group(
    table: torch.Tensor,
    page_tokens: int,
    is_ssm: bool,
    has_slots: bool,
    state_tokens: int,
    request_rows: torch.Tensor,
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    seq_lens: torch.Tensor,
    num_pages: torch.Tensor,
    pages: PageTable | None,
    num_rows: int,
    max_tokens: int,
    state_columns: int,
) -> Resolved:
    """Resolve one group of a step; see ``avmp_kernels.resolve.Resolver`` for the arguments.

    Columns that the kernel leaves alone are -1 in the block table returned here.
    """
    block_table = torch.full((num_rows, table.shape[1]), -1, dtype=torch.int32)
    slots = torch.full((max_tokens,), -1, dtype=torch.int64)
    states = torch.zeros(num_rows, state_columns, dtype=torch.int32)
    for row in range(num_rows):
        request = int(request_rows[row]) if row < len(request_rows) else -1
        if request < 0:
            block_table[row] = 0
            continue
        count = int(num_pages[request])
        handles = table[request, :count]
        physical = resolve_handles(pages, handles, is_ssm)
        block_table[row, :count] = physical.int()
        if is_ssm:
            first = max(int(seq_lens[row]) - 1, 0) // state_tokens if state_tokens else 0
            for column in range(state_columns):
                if first + column < count:
                    states[row, column] = physical[first + column]
        if has_slots:
            for token in range(int(query_start_loc[row]), int(query_start_loc[row + 1])):
                page, offset = divmod(int(positions[token]), page_tokens)
                if page < count:
                    slots[token] = physical[page] * page_tokens + offset
    return Resolved(block_table, slots, states)


def copy_pages(
    arena: torch.Tensor, copies: Sequence[tuple[int, int, int]], page_bytes: tuple[int, int]
) -> None:
    """Copy pages (kind, source, target) one after another, in place."""
    for kind, source, target in copies:
        size = page_bytes[kind]
        moved = arena[source * size : (source + 1) * size].clone()
        arena[target * size : (target + 1) * size] = moved


def zero_pages(
    arena: torch.Tensor, targets: Sequence[tuple[int, int]], page_bytes: tuple[int, int]
) -> None:
    """Clear pages (kind, physical index) in place."""
    for kind, index in targets:
        size = page_bytes[kind]
        arena[index * size : (index + 1) * size] = 0


def update_table(pages: PageTable, updates: Sequence[tuple[int, int]]) -> None:
    """Write (handle, physical index) pairs one after another; unknown handles are ignored."""
    for handle, physical in updates:
        page_id = handle & ID_MASK
        is_ssm = bool(handle & SSM_TAG)
        if 0 < page_id < (pages.num_ssm if is_ssm else pages.num_kv):
            pages.entries[page_id + (pages.num_kv if is_ssm else 0)] = physical


def first_bad_handle(
    table: torch.Tensor, num_pages: torch.Tensor, is_ssm: bool, pages: PageTable, limit: int
) -> tuple[int, int] | None:
    """Return (row, column) of the first handle that names no page of the pool, or None.

    ``limit`` is the number of pages of that kind that the arena holds. Null handles are good.
    """
    for row in range(table.shape[0]):
        for column in range(int(num_pages[row])):
            handle = int(table[row, column])
            if handle in (0, SSM_TAG if is_ssm else 0):
                continue
            if not 0 < resolve_handle(pages, handle, is_ssm) < limit:
                return row, column
    return None
