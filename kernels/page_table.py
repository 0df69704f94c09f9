"""Write to the device-resident page table from a packed list."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from avmp_kernels.pages import _TAG, PageTable
from avmp_kernels.relocate import upload

_BLOCK = 256


def pack_updates(updates: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return (handle, physical index) pairs with the last write of every handle only.

    The kernel writes in no particular order, so a handle may appear once in a list.
    """
    return list(dict(updates).items())


@triton.jit(do_not_specialize=["num_updates", "num_kv", "num_ssm"])
def _update_kernel(entries, updates, num_updates, num_kv, num_ssm, BLOCK: tl.constexpr):
    update = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = update < num_updates
    handle = tl.load(updates + update * 2, mask=live, other=0)
    physical = tl.load(updates + update * 2 + 1, mask=live, other=0)
    is_ssm = handle >= _TAG
    page_id = tl.where(is_ssm, handle - _TAG, handle)
    # Entry 0 of both pools is the null page and never changes.
    known = live & (page_id > 0) & (page_id < tl.where(is_ssm, num_ssm, num_kv))
    tl.store(entries + tl.where(is_ssm, num_kv, 0) + page_id, physical, mask=known)


def write_entries(pages: PageTable, updates: torch.Tensor) -> None:
    """Write page-table entries in one launch.

    Null handles and ids outside of the table are ignored.

    Args:
        pages: The page table, changed in place.
        updates: int32 ``[updates, 2]``, contiguous: handle, physical index. Every handle at most
            once (see `pack_updates`).
    """
    if updates.dtype != torch.int32 or not updates.is_contiguous():
        raise ValueError("the list of updates must be a contiguous int32 tensor")
    count = updates.shape[0]
    if count:
        _update_kernel[(triton.cdiv(count, _BLOCK),)](
            pages.entries,
            updates,
            count,
            pages.num_kv,
            pages.num_ssm,
            BLOCK=_BLOCK,
            num_warps=4,
        )


def update(pages: PageTable, updates: Iterable[tuple[int, int]]) -> None:
    """Apply (handle, physical index) writes in order: one upload and one launch."""
    packed = pack_updates(updates)
    if packed:
        write_entries(pages, upload(packed, pages.entries.device))
