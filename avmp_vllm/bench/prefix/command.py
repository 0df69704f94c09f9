"""``avmp bench prefix``: what each cache's rules hit on a trace, by memory."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from avmp_vllm.bench import results
from avmp_vllm.bench.inputs import InputError
from avmp_vllm.bench.prefix.cache import Cache, Served, Sizes
from avmp_vllm.bench.prefix.drift import SETTLING, Learner, joined, part_of
from avmp_vllm.bench.prefix.offline import bound, options_of, schedule
from avmp_vllm.bench.prefix.overlap import StepTimes, overlapped
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
        "--then", nargs="+", metavar="TRACE", help="further traces, each behind the one before it"
    )
    parser.add_argument(
        "--overlap",
        action="store_true",
        help="requests run at the same time, as long as --token-us and --cut-ms (a step) say",
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
    results.add_arguments(parser, BENCHMARK)


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
    "then",
    "overlap",
]
#: Of result files that were written before there was such an option.
_EARLIER: dict[str, Any] = {"then": None, "overlap": False}


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
    if parameters["then"] and parameters["overlap"]:
        raise ShapeError("--then and --overlap: one of both; learners are compared one by one")
    names = [name for name in parameters["caches"].split(",") if name]
    if unknown := [name for name in names if name not in CACHES]:
        raise ShapeError(f"--caches {unknown[0]}: unknown; known: {', '.join(CACHES)}")
    return names


def requests_for(parameters: dict[str, Any], name: str) -> list[Request]:
    """A trace's requests."""
    timing = Timing(*(parameters[name] for name in Timing._fields))
    seed, count = parameters["seed"], parameters["requests"]
    if name in GENERATED:
        return requests_of(GENERATED[name](seed, count or REQUESTS, timing)[:count])
    return load(read_trace(Path(name)), timing, seed, count, parameters["blocks_only"])


def run_cache(
    cache: Cache,
    requests: Sequence[Request],
    verify: bool = False,
    progress: Any = None,
    times: StepTimes | None = None,
    starts: Sequence[int] = (0,),
    unlearn: int | None = None,
) -> dict[str, Any]:
    """Serve all requests; the sums of what came of it.

    Args:
        cache: An empty one.
        requests: In order of arrival.
        verify: Check the books every 500 requests.
        progress: Called with how many requests were served since.
        times: Of requests that run at the same time; None serves one after the other.
        starts: Where the parts of the trace begin.
        unlearn: Where the cache forgets what it has learned of reuse.
    """
    sums: dict[str, Any] = dict.fromkeys(SUMS, 0) | {"hits": 0}
    parts = [[0, 0] for _ in starts]
    one_by_one = ((place, cache.serve(request)) for place, request in enumerate(requests))
    every = one_by_one if times is None else overlapped(cache, requests, times)
    if unlearn is not None:
        every = _unlearning(cache, requests, unlearn)
    for number, (place, served) in enumerate(every, 1):
        for name in SUMS:
            sums[name] += int(getattr(served, name))
        sums["hits"] += served.hit > 0
        part, settled = part_of(place, starts)
        parts[part][0] += served.hit
        parts[part][1] += served.hit * settled
        if number % 500 == 0:
            if verify:
                cache.verify()
            if progress is not None:
                progress(500)
    cache.verify()
    return sums | ({"parts": parts} if len(parts) > 1 else {})


def _unlearning(cache: Cache, requests: Sequence[Request], at: int) -> Iterator[tuple[int, Served]]:
    """Serve requests one after the other with a learner that begins anew at one of them."""
    assert isinstance(cache, Learner)
    for place, request in enumerate(requests):
        if place == at:
            cache.unlearn()
        yield place, cache.serve(request)


def measure(
    sizes: Sizes, parameters: dict[str, Any], journal: results.Journal, verify: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run every cache at every size of memory that the journal lacks.

    Returns:
        Deterministic counts, and seconds of processor time, each by cache, a list over memories.
    """
    from tqdm import tqdm

    names = _validate(parameters)
    traces = [parameters["trace"], *(parameters["then"] or ())]
    parts = [requests_for(parameters, trace) for trace in traces]
    for trace, part in zip(traces, parts, strict=True):
        if not part:
            raise ShapeError(f"--trace {trace}: no request within --minutes")
    requests, starts = joined(parts)
    options = options_of(requests)
    times = StepTimes(parameters["token_us"], parameters["cut_ms"])
    # What is run for each cache: as it is, and with a learner that begins anew at each change.
    rows: list[tuple[str, str, int | None]] = [(name, name, None) for name in names]
    for name in names:
        if isinstance(CACHES[name].make(0, sizes), Learner):
            rows += [(f"{name}, anew at {start}", name, start) for start in starts[1:]]
    cells = len(parameters["memory"]) * (len(rows) + 1)
    with tqdm(total=cells * len(requests), unit="req", unit_scale=True) as bar:
        for memory in parameters["memory"]:
            for row, name, unlearn in rows:
                bar.set_description(f"{memory / GIB:g} GiB {row}")
                begin, before = time.process_time(), bar.n
                if f"{memory}/{row}" not in journal.done:
                    cache = CACHES[name].make(memory, sizes)
                    overlap = times if parameters["overlap"] else None
                    sums = run_cache(cache, requests, verify, bar.update, overlap, starts, unlearn)
                    journal.add(f"{memory}/{row}", [sums, time.process_time() - begin])
                bar.update(before + len(requests) - bar.n)
            if f"{memory}/future" not in journal.done:
                bar.set_description(f"{memory / GIB:g} GiB bound")
                begin = time.process_time()
                most, prices = bound(options, sizes, memory)
                future = {"offline": schedule(options, sizes, memory, prices), "bound": most}
                future = {name: round(value) for name, value in future.items()}
                journal.add(f"{memory}/future", [future, time.process_time() - begin])
            bar.update(len(requests))

    def found(row: str) -> list[Any]:
        return [journal.done[f"{memory}/{row}"] for memory in parameters["memory"]]

    counts = {
        "requests": len(requests),
        "prompt_tokens": sum(request.prompt for request in requests),
        "caches": {name: [cell[0] for cell in found(name)] for name in names},
        **{name: [cell[0][name] for cell in found("future")] for name in FUTURE},
    }
    if len(parts) > 1:
        tokens = [[sum(r.prompt for r in part[skip:]) for skip in (0, SETTLING)] for part in parts]
        fresh = {row: [cell[0]["parts"] for cell in found(row)] for row, _, at in rows if at}
        counts["parts"] = {"starts": starts, "prompt_tokens": tokens, "fresh": fresh}
    timings = {name: [cell[1] for cell in found(name)] for name in names}
    return counts, timings | {"future": [cell[1] for cell in found("future")]}


def part_tables(parameters: dict[str, Any], counts: dict[str, Any]) -> list[str]:
    """Hits of each part behind its first requests, a table each."""
    found, blocks = counts["parts"], []
    memories = [f"{memory / GIB:g} GiB" for memory in parameters["memory"]]
    for part, trace in enumerate([parameters["trace"], *parameters["then"]]):
        prompt = found["prompt_tokens"][part][1]
        if not prompt:
            continue
        rows = {n: [cell["parts"] for cell in row] for n, row in counts["caches"].items()}
        at = found["starts"][part]
        rows |= {n: row for n, row in found["fresh"].items() if n.endswith(f" {at}")}
        head = [f"{Path(trace).name}, hits behind its first {SETTLING} requests", *memories]
        cells = [[n, *(f"{c[part][1] / prompt:.3f}" for c in row)] for n, row in rows.items()]
        blocks.append(table(head, cells))
    return blocks


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
    how = "one at a time and hold nothing while they run"
    if parameters["overlap"]:
        how = "as they come and hold their pages and a state while they run"
    blocks = [
        f"{counts['requests']:,} requests, {prompt:,} prompt tokens; requests are served {how}",
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
    if "parts" in counts:
        blocks += part_tables(parameters, counts)
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
    output, expected = results.begin(args, BENCHMARK)
    if expected is not None:
        parameters = _EARLIER | expected["parameters"]
    _validate(parameters)
    shape = read_shape(parameters["model"]).with_state_dtype(parameters["state_dtype"])
    sizes = Sizes.of(shape, parameters["kv_dtype"])
    with results.resuming(results.journal_of(output, args.check), parameters) as journal:
        counts, timings = measure(sizes, parameters, journal, args.verify)
        print("\n\n".join(report(shape, parameters, counts)))
        result = results.record(
            BENCHMARK,
            results.environment(parameters["seed"]),
            parameters,
            shape=shape.as_json(),
            sizes=asdict(sizes),
            titles={name: CACHES[name].title for name in counts["caches"]},
            counts=counts,
            timings=timings,
        )
        results.save(output, result)
    return results.verdict(args.check, expected, result)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark, or check a result file: 1 if a count differs, 2 for bad input."""
    return exit_status(
        BENCHMARK,
        lambda: _run(args),
        bad_input=(InputError, ShapeError, ValueError),
        interrupted="the same command goes on behind the runs that are done",
    )
