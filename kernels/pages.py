"""Handles and the page table, as the kernels see them.

::

    handle      bit 30: pool (0 = KV, 1 = SSM), bits 29..0: page id; id 0 is the null page
    page table  | KV entries: num_kv             | SSM entries: num_ssm                |
                  entries[id] = physical index     entries[num_kv + id] = physical index

A kernel knows which pool it reads, so it takes handles of that pool only. A handle of the other
pool, an id outside of the table and an id that is not mapped all give physical index 0, the null
page, which exists in both views of the arena and is never given out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

SSM_TAG = 1 << 30
ID_MASK = SSM_TAG - 1
_TAG = tl.constexpr(SSM_TAG)


class PageTable(NamedTuple):
    """The device-resident page table.

    Attributes:
        entries: int32 ``[num_kv + num_ssm]``, contiguous: physical indices.
        num_kv: Number of KV entries, the null page included.
    """

    entries: torch.Tensor
    num_kv: int

    @property
    def num_ssm(self) -> int:
        """Number of SSM entries, the null page included."""
        return self.entries.numel() - self.num_kv


def table_args(pages: PageTable | None, unused: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """Return the kernel arguments (entries, num_kv, num_ssm).

    Without a page table the indices are physical already; ``unused`` then stands in for the pointer
    that the kernel never reads.
    """
    if pages is None:
        return unused, 0, 0
    return pages.entries, pages.num_kv, pages.num_ssm


@triton.jit
def resolve_kv(entries, handle, num_kv, mask):
    """Return the physical index of KV handles (int32, any shape); 0 where masked or unknown."""
    known = mask & (handle >= 0) & (handle < num_kv)
    return tl.load(entries + handle, mask=known, other=0)


@triton.jit
def resolve_ssm(entries, handle, num_kv, num_ssm, mask):
    """Return the physical index of SSM handles (int32, any shape); 0 where masked or unknown."""
    # Handles of the KV pool become negative here; what wraps around lands beyond num_ssm.
    page_id = handle - _TAG
    known = mask & (page_id >= 0) & (page_id < num_ssm)
    return tl.load(entries + num_kv + page_id, mask=known, other=0)


@triton.jit
def load_ssm_block(at, entries, num_kv, num_ssm, mask, RESOLVE: tl.constexpr):
    """Load SSM handles, or physical indices unless RESOLVE, and return the blocks' indices."""
    block = tl.load(at, mask=mask, other=0)
    if RESOLVE:
        block = resolve_ssm(entries, block, num_kv, num_ssm, mask)
    return block
