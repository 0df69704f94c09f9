"""Random page tables and ragged batches for the kernels' tests."""

from __future__ import annotations

import torch
from avmp_kernels.pages import SSM_TAG, PageTable
from avmp_kernels.saves import ChunkSaves


def generator(seed: int) -> torch.Generator:
    """Return a seeded random source."""
    return torch.Generator().manual_seed(seed)


def random_table(num_kv: int, num_ssm: int, seed: int, kv_spread: int = 1) -> PageTable:
    """Return a page table that maps every id of both pools to a random physical page.

    The null pages stay 0. KV pages are spread over ``(num_kv - 1) * kv_spread`` physical places.
    """
    random = generator(seed)
    kv = 1 + torch.randperm((num_kv - 1) * kv_spread, generator=random)[: num_kv - 1]
    ssm = 1 + torch.randperm(num_ssm - 1, generator=random)
    null = torch.zeros(1, dtype=torch.int64)
    return PageTable(torch.cat([null, kv, null, ssm]).int(), num_kv)


def distinct_handles(count: int, size: int, is_ssm: bool, seed: int) -> torch.Tensor:
    """Return ``count`` different non-null handles (int32) of a pool with ``size`` entries."""
    ids = 1 + torch.randperm(size - 1, generator=generator(seed))[:count]
    assert len(ids) == count, f"{count} handles asked of a pool of {size}"
    return (ids + (SSM_TAG if is_ssm else 0)).int()


def starts_of(lengths: list[int]) -> torch.Tensor:
    """Return int32 ``query_start_loc`` of requests with these numbers of tokens."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def random_saves(
    lengths: list[int], handles: torch.Tensor, num_ssm: int, is_ssm: bool, seed: int, most: int = 3
) -> ChunkSaves | None:
    """Return up to ``most`` saves inside of each request, into handles that are not in use.

    None where no request is long enough, or nothing was drawn. One target is null.
    """
    random = generator(seed + 1)
    used = {int(handle) % SSM_TAG for handle in handles}
    free = [number for number in range(1, num_ssm) if number not in used]
    tokens = torch.zeros(len(lengths), most, dtype=torch.int32)
    targets = torch.zeros_like(tokens)
    for request, length in enumerate(lengths):
        count = min(int(torch.randint(0, most + 1, (), generator=random)), max(length - 1, 0))
        inside = 1 + torch.randperm(max(length - 1, 0), generator=random)[:count].sort().values
        for number, position in enumerate(inside.tolist()):
            if not free:
                break
            tokens[request, number] = position
            targets[request, number] = free.pop(0) + (SSM_TAG if is_ssm else 0)
    if not tokens.any():
        return None
    if tokens.count_nonzero() > 1:
        targets[tuple(tokens.nonzero()[-1].tolist())] = 0
    return ChunkSaves(tokens, targets)


def block_table(pages_per_request: list[int], size: int, seed: int, spare: int = 2) -> torch.Tensor:
    """Return an int32 block table of distinct KV handles, with garbage after each row's pages."""
    width = max(pages_per_request, default=0) + spare
    table = torch.full((len(pages_per_request), width), 0x7ABCDEF, dtype=torch.int32)
    handles = distinct_handles(sum(pages_per_request), size, False, seed)
    begin = 0
    for row, count in enumerate(pages_per_request):
        table[row, :count] = handles[begin : begin + count]
        begin += count
    return table
