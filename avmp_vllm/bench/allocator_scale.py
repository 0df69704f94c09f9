"""Start-up, host memory and cost of a page against the arena's size, a fresh process each."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

from avmp_vllm.core import Arena, Geometry, Kind

GIB = 1 << 30
#: Pages of the middle reading.
MANY = 1_000_000
#: Pages of one allocation while the arena is filled and timed.
BATCH = 256


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _measure(which: str, arena_bytes: int, page_bytes: int, block_bytes: int) -> dict[str, Any]:
    """Fill one arena, or stock's pool with as many blocks, and read time and memory on the way."""
    import gc

    from vllm.v1.core.block_pool import BlockPool

    from avmp_vllm.bench.timing import Subject, alternate
    from avmp_vllm.engine.scheduler.block_pool import AVMPBlockPool

    geometry = Geometry(arena_bytes, page_bytes, block_bytes)
    gc.collect()
    before, start = _resident(), time.perf_counter()
    pool: BlockPool
    if which == "avmp":
        arena = Arena(geometry)
        pools = [AVMPBlockPool(arena, kind, False, geometry.page_tokens) for kind in Kind]
        pool = pools[Kind.KV]
    else:
        pool = BlockPool(geometry.page_limit + 1, False, geometry.page_tokens)
    found: dict[str, Any] = {
        "pages": geometry.page_limit,
        "start_seconds": time.perf_counter() - start,
        "start_bytes": _resident() - before,
    }

    def cost() -> float:
        def work(_: None) -> None:
            for _ in range(64):
                pool.free_blocks(reversed(pool.get_new_blocks(BATCH)))

        return alternate({"pages": Subject(work, 64 * BATCH)}, rounds=15)["pages"]

    used = 0
    for name, target in (("early", 0), ("many", MANY), ("full", geometry.page_limit - BATCH)):
        if target > geometry.page_limit:
            continue
        # The blocks stay referenced by the pool's own list; no request holds them here.
        while used < target:
            count = min(BATCH, target - used)
            pool.get_new_blocks(count)
            used += count
        if name == "full":
            pool.get_new_blocks(BATCH)
            found["full_bytes"] = _resident() - before
            continue
        gc.collect()
        found[f"{name}_bytes"] = _resident() - before
        found[f"{name}_page_seconds"] = cost()
    return found


def scale(geometry: Geometry, which: str, arena_gib: int) -> dict[str, Any]:
    """Measure one size in a process of its own.

    Args:
        geometry: For the sizes of its pages.
        which: ``avmp`` or ``stock``.
        arena_gib: Size of the arena.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(
            _measure, (which, arena_gib * GIB, geometry.page_bytes, geometry.block_bytes)
        )
