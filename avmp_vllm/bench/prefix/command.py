"""``avmp bench prefix``: what each cache's rules hit on a trace, by memory."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from avmp_vllm.bench import results
from avmp_vllm.bench.inputs import InputError
from avmp_vllm.bench.prefix.cache import Cache, Sizes
from avmp_vllm.bench.prefix.offline import bound, options_of, schedule
from avmp_vllm.bench.prefix.registry import CACHES
from avmp_vllm.bench.prefix.trace import Request, Timing, load, requests_of
from avmp_vllm.bench.prefix.workloads import GENERATED, REQUESTS
from avmp_vllm.bench.scheduler.traces import read_trace
from avmp_vllm.bench.status import exit_status
from avmp_vllm.bench.tables import table
from avmp_vllm.models.shapes import ModelShape, ShapeError, read_shape
from avmp_vllm.planner.command import parse_bytes

BENCHMARK = "prefix"
GIB = 1 << 30
_DEFAULT = Timing()
#: What a cell of the result sums over its requests.
SUMS = ("hit", "cuts", "states", "evicted_states", "evicted_pages", "copied_states")
#: The two that know the future.
FUTURE = ("offline", "bound")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's arguments."""
    parser.add_argument("--model", help="config.json, folder or hub name: sizes and parameters")
    parser.add_argument(
        "--trace", help=f".csv, .jsonl or .json (ShareGPT), or drawn: {', '.join(GENERATED)}"
    )
    parser.add_argument(
        "--memory",
        type=parse_bytes,
        nargs="+",
        default=[int(gib * GIB) for gib in (0.5, 1, 2, 4, 8, 16)],
        metavar="BYTES",
    )
    parser.add_argument("--caches", default=",".join(CACHES), help="which, by comma")
    parser.add_argument("--requests", type=int, help="the first so many of the trace")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--copies", type=int, default=_DEFAULT.copies, help="of conversations")
    parser.add_argument("--minutes", type=float, default=_DEFAULT.minutes, help="they take")
    parser.add_argument(
        "--pause", type=float, default=_DEFAULT.pause, help="seconds between turns, median"
    )
    parser.add_argument("--spread", type=float, default=_DEFAULT.spread, help="of its logarithm")
    parser.add_argument(
        "--blocks-only",
        action="store_true",
        help="of hashed traces: share what hashes show, not the answers that they imply",
    )
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--state-dtype", default="auto")
    parser.add_argument(
        "--token-us", type=float, default=20.0, help="seconds spared: of a prompt token (20)"
    )
    parser.add_argument("--cut-ms", type=float, default=8.0, help="and spent: of a cut (8)")
    parser.add_argument("--verify", action="store_true", help="check the books every 500 requests")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="result file (default .bench/prefix.json; with --check: none)",
    )
    parser.add_argument("--check", type=Path, metavar="FILE", help="run again and compare")


_PARAMETERS = [
    "model",
    "trace",
    "memory",
    "caches",
    "requests",
    "seed",
    "copies",
    "minutes",
    "pause",
    "spread",
    "blocks_only",
    "kv_dtype",
    "state_dtype",
    "token_us",
    "cut_ms",
]


def _validate(parameters: dict[str, Any]) -> list[str]:
    """Check what the parser cannot; return the caches' names."""
    for name in ("model", "trace"):
        if not parameters[name]:
            raise ShapeError(f"--{name} is needed")
    for name in ("requests", "copies", "minutes", "pause"):
        if parameters[name] is not None and not parameters[name] > 0:
            raise ShapeError(f"--{name} {parameters[name]}: must be more than 0")
    for name in ("spread", "token_us", "cut_ms"):
        if parameters[name] < 0:
            raise ShapeError(f"--{name.replace('_', '-')} {parameters[name]}: must not be below 0")
    names = [name for name in parameters["caches"].split(",") if name]
    if unknown := [name for name in names if name not in CACHES]:
        raise ShapeError(f"--caches {unknown[0]}: unknown; known: {', '.join(CACHES)}")
    return names


def requests_for(parameters: dict[str, Any]) -> list[Request]:
    """The trace's requests."""
    timing = Timing(*(parameters[name] for name in Timing._fields))
    name, seed, count = parameters["trace"], parameters["seed"], parameters["requests"]
    if name in GENERATED:
        return requests_of(GENERATED[name](seed, count or REQUESTS, timing)[:count])
    return load(read_trace(Path(name)), timing, seed, count, parameters["blocks_only"])


def run_cache(
    cache: Cache, requests: Sequence[Request], verify: bool = False, progress: Any = None
) -> dict[str, int]:
    """Serve all requests; the sums of what came of it."""
    sums = dict.fromkeys(SUMS, 0) | {"hits": 0}
    for number, request in enumerate(requests, 1):
        served = cache.serve(request)
        for name in SUMS:
            sums[name] += int(getattr(served, name))
        sums["hits"] += served.hit > 0
        if number % 500 == 0:
            if verify:
                cache.verify()
            if progress is not None:
                progress(500)
    cache.verify()
    return sums


def measure(
    sizes: Sizes, parameters: dict[str, Any], journal: results.Journal, verify: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run every cache at every size of memory that the journal lacks.

    Returns:
        Deterministic counts, and seconds of processor time, each by cache, a list over memories.
    """
    from tqdm import tqdm

    names = _validate(parameters)
    requests = requests_for(parameters)
    if not requests:
        raise ShapeError(f"--trace {parameters['trace']}: no request within --minutes")
    options = options_of(requests)
    cells = len(parameters["memory"]) * (len(names) + 1)
    with tqdm(total=cells * len(requests), unit="req", unit_scale=True) as bar:
        for memory in parameters["memory"]:
            for name in names:
                bar.set_description(f"{memory / GIB:g} GiB {name}")
                begin, before = time.process_time(), bar.n
                if f"{memory}/{name}" not in journal.done:
                    cache = CACHES[name].make(memory, sizes)
                    sums = run_cache(cache, requests, verify, bar.update)
                    journal.add(f"{memory}/{name}", [sums, time.process_time() - begin])
                bar.update(before + len(requests) - bar.n)
            if f"{memory}/future" not in journal.done:
                bar.set_description(f"{memory / GIB:g} GiB bound")
                begin = time.process_time()
                most, prices = bound(options, sizes, memory)
                row = {"offline": schedule(options, sizes, memory, prices), "bound": most}
                row = {name: round(value) for name, value in row.items()}
                journal.add(f"{memory}/future", [row, time.process_time() - begin])
            bar.update(len(requests))
    done = [[journal.done[f"{memory}/{name}"] for memory in parameters["memory"]] for name in names]
    future = [journal.done[f"{memory}/future"] for memory in parameters["memory"]]
    counts = {
        "requests": len(requests),
        "prompt_tokens": sum(request.prompt for request in requests),
        "caches": {n: [cell[0] for cell in row] for n, row in zip(names, done, strict=True)},
        **{name: [cell[0][name] for cell in future] for name in FUTURE},
    }
    timings = {n: [cell[1] for cell in row] for n, row in zip(names, done, strict=True)}
    return counts, timings | {"future": [cell[1] for cell in future]}


def best_stock(counts: dict[str, Any], column: int) -> str | None:
    """The setting of stock vLLM that hits most at a size of memory."""
    rows = [name for name in counts["caches"] if name in CACHES and CACHES[name].stock]
    return max(rows, key=lambda name: counts["caches"][name][column]["hit"], default=None)


def report(shape: ModelShape, parameters: dict[str, Any], counts: dict[str, Any]) -> list[str]:
    """The tables, a block each."""
    caches, prompt = counts["caches"], counts["prompt_tokens"]
    memories = [f"{memory / GIB:g} GiB" for memory in parameters["memory"]]
    columns = range(len(memories))
    best = [best_stock(counts, column) for column in columns]

    def share(tokens: float) -> str:
        return f"{tokens / prompt:.3f}"

    rows = []
    for name, row in caches.items():
        cells = [
            share(row[column]["hit"]) + ("*" if best[column] == name else " ") for column in columns
        ]
        rows.append([name, *cells])
    rows += [[name, *(share(tokens) + " " for tokens in counts[name])] for name in FUTURE]
    blocks = [
        f"{counts['requests']:,} requests, {prompt:,} prompt tokens; requests are served one at a "
        "time and hold nothing while they run",
        table(["hit tokens / prompt tokens", *memories], rows)
        + "\n* the best of stock vLLM's settings",
        table(
            ["cuts / states made", *memories],
            [
                [name, *(f"{cell['cuts']:,} / {cell['states']:,}" for cell in row)]
                for name, row in caches.items()
            ],
        ),
    ]

    def seconds(cell: dict[str, int]) -> float:
        spared = cell["hit"] * parameters["token_us"] / 1e6
        return float(spared - cell["cuts"] * parameters["cut_ms"] / 1e3)

    head = [
        f"seconds of prefill spared ({parameters['token_us']:g} us a token, less "
        f"{parameters['cut_ms']:g} ms a cut)",
        *memories,
    ]
    blocks.append(
        table(head, [[n, *(f"{seconds(c):,.1f}" for c in row)] for n, row in caches.items()])
    )
    if shape.parameters:
        each = 2 * shape.parameters / 1e15
        blocks.append(
            table(
                ["PFLOPs spared (2 a parameter and token)", *memories],
                [
                    [name, *(f"{cell['hit'] * each:,.1f}" for cell in row)]
                    for name, row in caches.items()
                ],
            )
        )
    return blocks


def _run(args: argparse.Namespace) -> int:
    parameters = {name: getattr(args, name) for name in _PARAMETERS}
    expected, output = None, args.output
    if args.check:
        expected = results.read(args.check, BENCHMARK)
        parameters = expected["parameters"]
    elif output is None:
        output = Path(".bench/prefix.json")
    _validate(parameters)
    shape = read_shape(parameters["model"]).with_state_dtype(parameters["state_dtype"])
    sizes = Sizes.of(shape, parameters["kv_dtype"])
    with results.resuming(results.journal_of(output, args.check), parameters) as journal:
        counts, timings = measure(sizes, parameters, journal, args.verify)
        print("\n\n".join(report(shape, parameters, counts)))
        result = {
            "format": results.FORMAT,
            "benchmark": BENCHMARK,
            "environment": results.environment(parameters["seed"]),
            "parameters": parameters,
            "shape": asdict(shape),
            "sizes": asdict(sizes),
            "titles": {name: CACHES[name].title for name in counts["caches"]},
            "counts": counts,
            "timings": timings,
        }
        if output:
            results.write(output, result)
            print(f"Written: {output}")
    return int(expected is not None and results.compare(args.check, expected, result))


def run(args: argparse.Namespace) -> int:
    """Run the benchmark, or check a result file: 1 if a count differs, 2 for bad input."""
    return exit_status(
        BENCHMARK,
        lambda: _run(args),
        bad_input=(InputError, ShapeError, ValueError),
        interrupted="the same command goes on behind the runs that are done",
    )
