"""Debug mode: check handles on the device and name the first bad one.

Release mode needs none of this: a handle that names no page resolves to the null page.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from avmp_kernels.pages import _TAG, ID_MASK, SSM_TAG, PageTable, resolve_kv, resolve_ssm

_BLOCK = 1024
_NONE = (1 << 63) - 1


@triton.jit(do_not_specialize=["limit", "num_kv", "num_ssm"])
def _check_kernel(
    table,  # [rows, width] int32
    width,
    num_pages,  # [rows] int32
    entries,
    num_kv,
    num_ssm,
    limit,
    first,  # [1] int64: row << 32 | column of the first bad handle
    IS_SSM: tl.constexpr,
    BLOCK: tl.constexpr,
    NONE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(num_pages + row)
    found = tl.full([], NONE, dtype=tl.int64)
    for start in tl.range(0, count, BLOCK):
        column = start + tl.arange(0, BLOCK)
        live = column < count
        handle = tl.load(table + row * width + column, mask=live, other=0)
        if IS_SSM:
            index = resolve_ssm(entries, handle, num_kv, num_ssm, live)
            null = (handle == 0) | (handle == _TAG)
        else:
            index = resolve_kv(entries, handle, num_kv, live)
            null = handle == 0
        bad = live & ~null & ((index <= 0) | (index >= limit))
        where = tl.where(bad, (row << 32) | column.to(tl.int64), NONE)
        found = tl.minimum(found, tl.min(where, axis=0))
    if found != NONE:
        tl.atomic_min(first, found)


class HandleCheck:
    """Checks block tables on the device; `raise_if_bad` then reads the verdict.

    `check` only launches, and may be called inside of a captured graph. `raise_if_bad` waits for
    the device, which is why this is a debug mode.
    """

    def __init__(self, groups: int, device: torch.device) -> None:
        self._first = torch.full((groups,), _NONE, dtype=torch.int64, device=device)
        self._tables: dict[int, tuple[torch.Tensor, bool, PageTable]] = {}

    def check(
        self,
        group: int,
        table: torch.Tensor,
        num_pages: torch.Tensor,
        is_ssm: bool,
        pages: PageTable,
        limit: int,
    ) -> None:
        """Look for handles that name no page of the group's pool.

        Args:
            group: Which group the table belongs to.
            table: int32 ``[rows, width]``, contiguous: handles.
            num_pages: int32 ``[rows]``: live columns of every row.
            is_ssm: Which pool the group's handles must name.
            pages: The page table.
            limit: Number of pages of that kind that the arena holds, the null page included.
        """
        self._tables[group] = (table, is_ssm, pages)
        if table.shape[0]:
            _check_kernel[(table.shape[0],)](
                table,
                table.stride(0),
                num_pages,
                pages.entries,
                pages.num_kv,
                pages.num_ssm,
                limit,
                self._first[group:],
                IS_SSM=is_ssm,
                BLOCK=_BLOCK,
                NONE=_NONE,
                num_warps=4,
            )

    def raise_if_bad(self, requests: Sequence[str] | None = None) -> None:
        """Wait for the checks so far.

        Args:
            requests: Names of the rows, for the message.

        Raises:
            ValueError: Naming the first bad handle, if there is one.
        """
        for group, first in enumerate(self._first.tolist()):
            if first != _NONE:
                self._first.fill_(_NONE)
                row, column = first >> 32, first & 0xFFFFFFFF
                owner = f"row {row}" if requests is None else f"request {requests[row]}"
                raise ValueError(self._describe(group, row, column, owner))

    def _describe(self, group: int, row: int, column: int, owner: str) -> str:
        table, is_ssm, pages = self._tables[group]
        handle = int(table[row, column])
        pool, size = ("SSM", pages.num_ssm) if is_ssm else ("KV", pages.num_kv)
        page_id = handle & ID_MASK
        if handle < 0 or bool(handle & SSM_TAG) != is_ssm:
            why = f"it is not a handle of the {pool} pool"
        elif page_id >= size:
            why = f"the page table has {size} {pool} entries"
        else:
            entry = int(pages.entries[page_id + (pages.num_kv if is_ssm else 0)])
            why = "it is not mapped" if entry == 0 else f"it maps to {entry}, outside of the arena"
        return (
            f"bad handle {handle:#x} ({pool} page id {page_id}) in group {group}, {owner}, "
            f"column {column}: {why}"
        )
