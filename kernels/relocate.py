"""Relocate and zero: byte-exact work on pages of both sizes, one launch a dependency level.

KV page ``k`` lies at byte ``k * F`` of the arena and SSM block ``s`` at byte ``s * B``, so pages of
the two kinds share bytes, and a plan may hold ``a -> b`` and then ``c -> a``. A launch copies in no
particular order. `dependency_levels` therefore cuts a plan into runs of copies that do not touch
one another's bytes; the runs follow one another on the stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

KV, SSM = 0, 1
UNIT = 16  # bytes one thread moves at a time; pages must be multiples of it
_TILE_UNITS = 1024  # 16 KiB a program: eight 16-byte accesses in flight for each of 128 threads


class PageCopy(NamedTuple):
    """Copy one page; physical indices. ``kind`` is 0 for KV pages, 1 for SSM blocks."""

    kind: int
    source: int
    target: int


def dependency_levels(
    copies: Sequence[tuple[int, int, int]], page_bytes: tuple[int, int]
) -> list[list[PageCopy]]:
    """Cut ordered copies into levels that may each run in any order.

    A copy comes after an earlier one if it reads or overwrites what that one wrote, or overwrites
    what that one read; it joins the first level in which that holds. Running the levels one after
    another then gives the same bytes as running the copies one after another.

    Args:
        copies: (kind, source, target) as `PageCopy`, in the order in which they must appear to run.
        page_bytes: Bytes of a KV page and of an SSM block.
    """
    written: dict[tuple[int, int], int] = {}  # page -> last level that writes into it
    read: dict[tuple[int, int], int] = {}  # page -> last level that reads from it
    levels: list[list[PageCopy]] = []
    for copy in copies:
        kind, source, target = copy
        if source == target:
            continue
        level = 0
        for page in _sharing(kind, source, page_bytes):
            level = max(level, written.get(page, -1) + 1)
        for page in _sharing(kind, target, page_bytes):
            level = max(level, written.get(page, -1) + 1, read.get(page, -1) + 1)
        read[kind, source] = max(level, read.get((kind, source), 0))
        written[kind, target] = level
        if level == len(levels):
            levels.append([])
        levels[level].append(PageCopy(kind, source, target))
    return levels


def _sharing(kind: int, index: int, page_bytes: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield every page of either kind that shares a byte with the given one, itself included."""
    begin = index * page_bytes[kind]
    end = begin + page_bytes[kind]
    for other in (KV, SSM):
        size = page_bytes[other]
        for neighbour in range(begin // size, -(-end // size)):
            yield other, neighbour


def pack_copies(copies: Sequence[tuple[int, int, int]]) -> tuple[list[tuple[int, int]], int]:
    """Return (source, target) pairs, KV pages first, and how many of them are KV pages."""
    kv = [(source, target) for kind, source, target in copies if kind == KV]
    return kv + [(source, target) for kind, source, target in copies if kind == SSM], len(kv)


@triton.jit
def _locate(num_kv, num_kv_tiles, kv_units, ssm_units, kv_tiles, ssm_tiles, TILE: tl.constexpr):
    """Return this program's entry of the list, its page size and the units it works on."""
    program = tl.program_id(0)
    is_kv = program < num_kv_tiles
    local = tl.where(is_kv, program, program - num_kv_tiles)
    tiles = tl.where(is_kv, kv_tiles, ssm_tiles)
    entry = local // tiles + tl.where(is_kv, 0, num_kv)
    return entry, tl.where(is_kv, kv_units, ssm_units), local % tiles * TILE + tl.arange(0, TILE)


@triton.jit
def _unit_pointers(arena, index, units, unit):
    """Return pointers ``[TILE, 2]`` to both halves of some 16-byte units of a page."""
    word = (index.to(tl.int64) * units + unit) * 2
    return arena + word[:, None] + tl.arange(0, 2)[None, :]


@triton.jit(do_not_specialize=["num_kv_tiles", "num_kv"])
def _copy_kernel(
    arena,  # int64, the arena as pairs of 8 bytes
    pairs,  # [copies, 2] int32: source, target; KV pages first
    num_kv,
    num_kv_tiles,
    kv_units,
    ssm_units,
    kv_tiles,
    ssm_tiles,
    TILE: tl.constexpr,
):
    copy, units, unit = _locate(
        num_kv, num_kv_tiles, kv_units, ssm_units, kv_tiles, ssm_tiles, TILE
    )
    source = tl.load(pairs + copy * 2)
    target = tl.load(pairs + copy * 2 + 1)
    inside = (unit < units)[:, None]
    data = tl.load(_unit_pointers(arena, source, units, unit), mask=inside)
    tl.store(_unit_pointers(arena, target, units, unit), data, mask=inside)


@triton.jit(do_not_specialize=["num_kv_tiles", "num_kv"])
def _zero_kernel(
    arena,  # int64, the arena as pairs of 8 bytes
    targets,  # [pages] int32; KV pages first
    num_kv,
    num_kv_tiles,
    kv_units,
    ssm_units,
    kv_tiles,
    ssm_tiles,
    TILE: tl.constexpr,
):
    page, units, unit = _locate(
        num_kv, num_kv_tiles, kv_units, ssm_units, kv_tiles, ssm_tiles, TILE
    )
    pointers = _unit_pointers(arena, tl.load(targets + page), units, unit)
    zeros = tl.zeros([TILE, 2], dtype=tl.int64)
    tl.store(pointers, zeros, mask=(unit < units)[:, None])


def _words(arena: torch.Tensor, page_bytes: tuple[int, int]) -> torch.Tensor:
    """Return the arena as int64 after checking that 16-byte accesses are allowed."""
    for name, size in zip(("KV page", "SSM block"), page_bytes, strict=True):
        if size % UNIT:
            raise ValueError(f"a {name} of {size} bytes is not a multiple of {UNIT} bytes")
    if arena.dtype != torch.uint8 or not arena.is_contiguous() or arena.data_ptr() % UNIT:
        raise ValueError(f"the arena must be contiguous uint8, aligned to {UNIT} bytes")
    return arena[: arena.numel() // UNIT * UNIT].view(torch.int64)


def _launch(kernel, arena, listed, num_kv: int, page_bytes: tuple[int, int]) -> None:
    words = _words(arena, page_bytes)
    if listed.dtype != torch.int32 or not listed.is_contiguous():
        raise ValueError("the list of pages must be a contiguous int32 tensor")
    kv_units, ssm_units = (size // UNIT for size in page_bytes)
    kv_tiles, ssm_tiles = (triton.cdiv(units, _TILE_UNITS) for units in (kv_units, ssm_units))
    num_kv_tiles = num_kv * kv_tiles
    programs = num_kv_tiles + (listed.shape[0] - num_kv) * ssm_tiles
    if programs == 0:
        return
    kernel[(programs,)](
        words,
        listed,
        num_kv,
        num_kv_tiles,
        kv_units,
        ssm_units,
        kv_tiles,
        ssm_tiles,
        TILE=_TILE_UNITS,
        num_warps=4,
    )


def copy_pages(
    arena: torch.Tensor, pairs: torch.Tensor, num_kv: int, page_bytes: tuple[int, int]
) -> None:
    """Copy pages in one launch; none may touch the bytes that another one reads or writes.

    Args:
        arena: uint8, contiguous, aligned to 16 bytes.
        pairs: int32 ``[copies, 2]``: physical source and target, KV pages first.
        num_kv: How many of the pairs are KV pages.
        page_bytes: Bytes of a KV page and of an SSM block, multiples of 16.

    Raises:
        ValueError: If the arena or the sizes do not allow 16-byte accesses.
    """
    _launch(_copy_kernel, arena, pairs, num_kv, page_bytes)


def zero_pages(
    arena: torch.Tensor, targets: torch.Tensor, num_kv: int, page_bytes: tuple[int, int]
) -> None:
    """Clear pages in one launch.

    Args:
        arena: uint8, contiguous, aligned to 16 bytes.
        targets: int32 ``[pages]``: physical indices, KV pages first.
        num_kv: How many of them are KV pages.
        page_bytes: Bytes of a KV page and of an SSM block, multiples of 16.

    Raises:
        ValueError: If the arena or the sizes do not allow 16-byte accesses.
    """
    _launch(_zero_kernel, arena, targets, num_kv, page_bytes)


def relocate(
    arena: torch.Tensor, copies: Sequence[tuple[int, int, int]], page_bytes: tuple[int, int]
) -> int:
    """Apply an ordered list of page copies: one upload, then one launch a dependency level.

    Args:
        arena: uint8, contiguous, aligned to 16 bytes.
        copies: (kind, source, target) in the order in which they must appear to run.
        page_bytes: Bytes of a KV page and of an SSM block, multiples of 16.

    Returns:
        The number of launches.
    """
    levels = [pack_copies(level) for level in dependency_levels(copies, page_bytes)]
    if not levels:
        return 0
    listed = upload([pair for pairs, _ in levels for pair in pairs], arena.device)
    begin = 0
    for pairs, num_kv in levels:
        copy_pages(arena, listed[begin : begin + len(pairs)], num_kv, page_bytes)
        begin += len(pairs)
    return len(levels)


def upload(rows: Sequence, device: torch.device) -> torch.Tensor:
    """Return int32 rows on a device, without waiting for it."""
    host = torch.tensor(rows, dtype=torch.int32, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)
