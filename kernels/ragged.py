"""Ragged batches: which request a block of tokens belongs to.

Requests lie one after another: request ``i`` owns the rows
``query_start_loc[i] : query_start_loc[i + 1]``. Rows after the last request are padding; they count
as one more request here, so that a kernel can clear them in the same launch.

The number of blocks each request needs is known on the device only. A launch therefore takes the
upper bound ``num_blocks``, gives request ``i`` the blocks from ``query_start_loc[i] // BLOCK + i``
on, and lets the blocks that turn out empty return at once.
"""

from __future__ import annotations

import triton
import triton.language as tl


def num_blocks(num_rows: int, num_requests: int, block: int) -> int:
    """Return how many blocks of ``block`` rows a launch needs, padding included."""
    return num_rows // block + num_requests + 1


@triton.jit
def find_request(query_start_loc, block, num_requests, BLOCK: tl.constexpr):
    """Return the request that owns a block: the largest ``i`` whose first block is <= ``block``.

    ``i == num_requests`` stands for the padding.
    """
    low = block * 0
    high = low + num_requests + 1
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_loc + middle) // BLOCK + middle <= block:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def row_range(query_start_loc, request, num_requests, num_rows):
    """Return the first row of a request and the row after its last one; padding included."""
    begin = tl.load(query_start_loc + request)
    following = tl.load(query_start_loc + request + 1, mask=request < num_requests, other=num_rows)
    return begin, following
