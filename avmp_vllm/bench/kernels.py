"""``avmp bench kernels``: AVMP's kernels on a GPU, first right, then fast.

1. Every kernel in bf16 (and fp8) against its float64 reference on the CPU, over ragged batches.
2. Its time against the floor: bytes over the measured copy bandwidth, or matrix operations over the
   measured rate, whichever is longer.
3. The same launch with physical indices, which shows what the page table costs.
4. vLLM's stock kernel on the same inputs, where a CUDA build of vLLM can be imported; for
   attention that is its Triton backend's, and FlashAttention as well.

Times are medians of CUDA-graph replays with the L2 overwritten in between, all in one process.
Needs no vLLM. Ends with status 1 if a kernel is wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import torch
from avmp_kernels import workloads
from avmp_kernels.measure import Limits, measure_limits, time_launch
from avmp_kernels.workloads import Workload

from avmp_vllm.bench import card, results, stock_kernels
from avmp_vllm.bench.tables import table

_MIB = 1 << 20
# A page of 16 tokens of four layers (8 heads of 128, bf16); states of 26 layers of a 3B Jamba.
_PAGE_BYTES = (4 * 16 * 8 * 2 * 128 * 2, 26 * (3 * 5120 * 2 + 5120 * 16 * 4))
_PAGE_TOKENS = (16, 32, 64, 128)
_FP8 = torch.float8_e4m3fn

#: vLLM's kernels: key of a row -> what they are called.
COLUMNS = {"stock": "vLLM's own kernels", "flash": "vLLM's FlashAttention"}

Make = Callable[[], Workload]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--output", type=Path, default=Path(".bench/kernels.json"), help="result")
    parser.add_argument("--only", default="", help="run what has this in its name")
    parser.add_argument("--no-stock", action="store_true", help="leave vLLM's kernels out")
    parser.add_argument(
        "--milliseconds", type=int, default=100, help="time spent on a figure (default: 100)"
    )


def checks(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Iterator[Make]:
    """Yield makers of small workloads that every kernel must get right."""
    w = workloads
    for kind in (0, 1):
        yield lambda kind=kind: w.relocation(100_000, (4096, 12_288), kind, device)
    yield lambda: w.zeroing(100_000, (4096, 12_288), device)
    yield lambda: w.resolving(7, 90, 16, device)
    yield lambda: w.writing(50, 16, device, dtype=dtype)
    yield lambda: w.writing(50, 16, device, dtype=dtype, cache_dtype=_FP8)
    mixed = ([200, 33, 1, 70, 512], [1, 33, 1, 20, 2])
    for head_size in (64, 128, 256):
        yield lambda head_size=head_size: w.attending(
            *mixed, 16, device, head_size=head_size, heads=(8, 2), dtype=dtype, label="mixed"
        )
    yield lambda: w.attending(*mixed, 64, device, dtype=dtype, softcap=30.0, label="soft cap")
    yield lambda: w.attending(*mixed, 16, device, dtype=dtype, cache_dtype=_FP8, label="mixed")
    yield lambda: w.attending([700], [1], 16, device, heads=(4, 1), dtype=dtype, label="split")
    yield lambda: w.updating(5, 1, 200, 16, device, dtype=dtype)
    yield lambda: w.updating(66, 1, 64, 16, device, dtype=dtype, state_dtype=torch.float32)
    yield lambda: w.updating(5, 8, 64, 128, device, dtype=dtype)
    yield lambda: w.convolving([1, 40, 3], 300, device, dtype=dtype)
    yield lambda: w.convolving([1] * 5, 300, device, dtype=dtype)
    yield lambda: w.scanning([1, 40, 3], 100, 16, device, dtype=dtype)


def timings(device: torch.device) -> Iterator[Make]:
    """Yield makers of the workloads that are timed: the target table's, and their neighbours."""
    w = workloads
    for mib in (1, 16, 64, 256):
        for kind in (0, 1):
            yield lambda mib=mib, kind=kind: w.relocation(mib * _MIB, _PAGE_BYTES, kind, device)
    yield lambda: w.zeroing(64 * _MIB, _PAGE_BYTES, device)
    yield lambda: w.resolving(256, 4096, 16, device)
    yield lambda: w.writing(8192, 16, device)
    yield lambda: w.writing(8192, 16, device, cache_dtype=_FP8)
    for page_tokens in _PAGE_TOKENS:
        yield lambda page=page_tokens: w.attending(
            [4096] * 64, [1] * 64, page, device, label="decode 64 x 4k"
        )
    for page_tokens in _PAGE_TOKENS:
        yield lambda page=page_tokens: w.attending(
            [2048] * 4, [2048] * 4, page, device, label="prefill 4 x 2k"
        )
    yield lambda: w.attending([65_536], [1], 16, device, label="decode 1 x 64k")
    yield lambda: w.attending(
        [4096] * 32 + [2048], [1] * 32 + [2048], 16, device, label="32 decodes x 4k, prefill 2k"
    )
    yield lambda: w.attending(
        [4096] * 64, [1] * 64, 16, device, cache_dtype=_FP8, label="decode 64 x 4k"
    )
    yield lambda: w.updating(256, 1, 8192, 16, device)
    yield lambda: w.updating(256, 1, 8192, 16, device, state_dtype=torch.float32)
    yield lambda: w.updating(128, 128, 64, 128, device)
    yield lambda: w.convolving([1] * 256, 8192, device)
    yield lambda: w.convolving([4096], 8192, device)
    yield lambda: w.scanning([4096], 8192, 16, device)
    yield lambda: w.scanning([512] * 8, 8192, 16, device)


def check_all(makers: Iterator[Make], only: str) -> dict[str, float]:
    """Check workloads; return their errors as multiples of what is allowed, by name."""
    errors: dict[str, float] = {}
    for make in makers:
        workload = make()
        if only in workload.name:
            assert workload.check is not None
            errors[workload.name] = workload.check()
            verdict = "right" if errors[workload.name] <= 1 else "WRONG"
            print(f"  {verdict}  {workload.name}: {errors[workload.name]:.2g} of what is allowed")
    return errors


def left_out(no_stock: bool) -> dict[str, str]:
    """Why vLLM's kernels are left out, by column; those that are not in it can be run."""
    reason = "as asked" if no_stock else stock_kernels.available()
    if reason:
        return {"stock": reason, "flash": reason}
    missing = stock_kernels.flash_missing()
    return {"flash": missing} if missing else {}


def time_all(
    makers: Iterator[Make], only: str, limits: Limits, without: Container[str], milliseconds: int
) -> list[dict[str, Any]]:
    """Time workloads, except in the columns ``without``.

    Returns:
        A row for each, seconds unless named otherwise.
    """
    rows = []
    for make in makers:
        workload = make()
        if only not in workload.name:
            continue
        row: dict[str, Any] = {
            "name": workload.name,
            "floor": limits.floor(workload.moved, workload.operations),
            "avmp": time_launch(workload.run, milliseconds)._asdict(),
        }
        if workload.identity:
            row["identity"] = time_launch(workload.identity, milliseconds)._asdict()
        rivals = {}
        if workload.stock:
            rivals = {"stock": workload.stock, **stock_kernels.OTHERS.get(workload.stock, {})}
        for column, kernel in rivals.items():
            if column in without:
                continue
            try:
                launch = stock_kernels.STOCK[kernel](workload.inputs)
                row[column] = time_launch(launch, milliseconds)._asdict()
            except Exception as error:
                # A stock kernel that refuses a shape is a finding, not the end of the run.
                row[f"{column}_error"] = f"{type(error).__name__}: {error}"
        rows.append(row)
        print("  " + "  ".join(_cells(row)), flush=True)
        del workload
        torch.cuda.empty_cache()
    return rows


def _cells(row: dict[str, Any]) -> list[str]:
    own = row["avmp"]["median"]

    def ratio(name: str) -> str:
        if f"{name}_error" in row:
            return "error"
        return f"{own / row[name]['median']:.3f}" if name in row else "-"

    return [
        row["name"],
        f"{own * 1e6:.1f}",
        f"{row['floor'] / own:.1%}",
        ratio("identity"),
        ratio("stock"),
        ratio("flash"),
    ]


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if not torch.cuda.is_available():
        print(
            "avmp bench kernels needs a CUDA device, and torch sees none. On a machine with an "
            "NVIDIA GPU (sm_80 or newer): install the package with its `cuda` extra, or only torch "
            "with CUDA and triton, and run `avmp bench kernels` there. Without a GPU, "
            "`pytest tests/kernels` checks the kernels under Triton's interpreter and compiles "
            "them.",
            file=sys.stderr,
        )
        return 2
    began = time.monotonic()
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    print("Against float64 references:")
    errors = check_all(checks(device), args.only)
    wrong = sorted(name for name, value in errors.items() if not value <= 1)
    if wrong:
        print(f"wrong: {'; '.join(wrong)}", file=sys.stderr)
    limits = measure_limits()
    print(
        f"Copy bandwidth {limits.copy / 1e9:.0f} GB/s (read + written), bf16 matrix rate "
        f"{limits.matrix / 1e12:.0f} T/s"
    )
    without = left_out(args.no_stock)
    for column, reason in without.items():
        print(f"Left out: {COLUMNS[column]}: {reason}")
    print("Timing:")
    rows = time_all(timings(device), args.only, limits, without, args.milliseconds)
    print()
    head = ("kernel", "us", "of floor", "handles/physical", "AVMP/stock", "AVMP/FlashAttention")
    print(table(head, [_cells(row) for row in rows]))
    for row in rows:
        for column, title in COLUMNS.items():
            if error := row.get(f"{column}_error"):
                print(f"{row['name']}: {title}: {error}")
    result = {
        "format": results.FORMAT,
        "benchmark": "kernels",
        "environment": results.environment(0, ("torch", "triton", "vllm")) | card.describe(device),
        "parameters": {"only": args.only, "milliseconds": args.milliseconds, "left_out": without},
        "counts": {"wrong": wrong},
        "timings": {
            "errors": errors,
            "limits": limits._asdict(),
            "rows": rows,
            "seconds": time.monotonic() - began,
        },
    }
    results.write(args.output, result)
    print(f"Written to {args.output} after {time.monotonic() - began:.0f} s")
    return 1 if wrong else 0
