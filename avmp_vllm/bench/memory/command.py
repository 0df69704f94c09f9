"""``avmp bench memory``: calls of the driver, what each rule backs, attention over slots."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from avmp_vllm.backing.memory import BackingError
from avmp_vllm.bench import results
from avmp_vllm.bench.inputs import InputError, OptionError
from avmp_vllm.bench.memory import calls
from avmp_vllm.bench.memory.backed import replay, sizes_of
from avmp_vllm.bench.memory.traffic import EBB, QUIET, Load
from avmp_vllm.bench.scheduler.traces import TraceRequest, read_trace
from avmp_vllm.bench.status import exit_status
from avmp_vllm.bench.tables import table
from avmp_vllm.models.shapes import ShapeError, read_shape
from avmp_vllm.planner.command import parse_bytes

BENCHMARK = "memory"
MIB = 1 << 20
SHIPPED = Path("configs/models")
#: Backed bytes in the quiet part, to the live ones: the target.
TARGET = 1.2
TITLES = {
    "live": "live bytes",
    "avmp": "AVMP, what is needed",
    "avmp-held": "AVMP, given back after a while",
    "expandable": "expandable chunks, lowest place first",
    "kvcached": "kvcached's rule",
}
SHORT = {"avmp": "AVMP", "avmp-held": "held", "expandable": "expandable", "kvcached": "kvcached"}
RULES = tuple(SHORT)
#: On CUDA, the most seconds in which 10 GiB may go and come.
MOST_SECONDS = {"give back": 0.1, "take": 0.2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's arguments."""
    parser.add_argument(
        "--traces", nargs="*", default=[], help=".csv, .jsonl or .json (ShareGPT); none: no replay"
    )
    parser.add_argument(
        "--models", nargs="+", help="config.json, folder or hub name (default: configs/models)"
    )
    parser.add_argument("--requests", type=int, default=1500, help="of each trace (1500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--busy", type=int, default=96, help="requests that run (96)")
    parser.add_argument("--quiet", type=int, default=6, help="and later (6)")
    parser.add_argument(
        "--quiet-share", type=float, default=0.2, help="requests that come when it is quiet (0.2)"
    )
    parser.add_argument("--max-model-len", type=int, default=16384)
    parser.add_argument("--chunk", type=parse_bytes, default=2 * MIB, metavar="BYTES")
    parser.add_argument("--trim-every", type=int, default=16, help="steps (16)")
    parser.add_argument("--hold", type=float, default=10.0, help="seconds (10)")
    parser.add_argument("--step-ms", type=float, default=8.0, help="of every step (8)")
    parser.add_argument("--token-us", type=float, default=20.0, help="of a prompt token (20)")
    parser.add_argument("--sequence-us", type=float, default=30.0, help="of every sequence (30)")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--state-dtype", default="auto")
    parser.add_argument("--no-calls", action="store_true", help="leave the driver's calls out")
    parser.add_argument("--rounds", type=int, default=7, help="of the driver's calls (7)")
    parser.add_argument(
        "--milliseconds", type=int, default=100, help="of each attention kernel, on CUDA (100)"
    )
    results.add_arguments(parser, BENCHMARK)


_PARAMETERS = [
    "traces",
    "models",
    "requests",
    "seed",
    "busy",
    "quiet",
    "quiet_share",
    "max_model_len",
    "chunk",
    "trim_every",
    "hold",
    "step_ms",
    "token_us",
    "sequence_us",
    "kv_dtype",
    "state_dtype",
]


def _validate(parameters: dict[str, Any]) -> None:
    """Check what the parser cannot."""
    for name in ("busy", "quiet", "max_model_len", "chunk", "trim_every"):
        if not parameters[name] > 0:
            option = name.replace("_", "-")
            raise OptionError(f"--{option} {parameters[name]}: must be more than 0")
    for name in ("hold", "step_ms", "token_us", "sequence_us"):
        if parameters[name] < 0:
            option = name.replace("_", "-")
            raise OptionError(f"--{option} {parameters[name]}: must not be below 0")
    if parameters["requests"] < 2:
        raise OptionError(f"--requests {parameters['requests']}: must be at least 2")
    if not 0 < parameters["quiet_share"] < 1:
        raise OptionError(f"--quiet-share {parameters['quiet_share']}: must be between 0 and 1")
    if parameters["traces"] and not parameters["models"]:
        raise OptionError(f"--models: none given, and none in {SHIPPED}")


def requests_of(path: Path, parameters: dict[str, Any]) -> list[TraceRequest]:
    """The requests of a trace that a server would take."""
    drawn = read_trace(path).draw(parameters["seed"], parameters["requests"], 1.0, 1.0, 10.0)
    fitting = [request for request in drawn if request.tokens <= parameters["max_model_len"]]
    if len(fitting) < 2:
        raise InputError(path, None, "holds no two requests of at most --max-model-len tokens")
    return fitting


def measure_backed(parameters: dict[str, Any], journal: results.Journal) -> dict[str, Any]:
    """Replay every trace on every model that the journal lacks; by trace, then model."""
    from tqdm import tqdm

    load = Load(
        parameters["busy"],
        parameters["quiet"],
        parameters["quiet_share"],
        parameters["step_ms"] / 1e3,
        parameters["token_us"] / 1e6,
        parameters["sequence_us"] / 1e6,
    )
    traces = {trace: requests_of(Path(trace), parameters) for trace in parameters["traces"]}
    total = sum(map(len, traces.values())) * len(parameters["models"] or ())
    found: dict[str, Any] = {}
    with tqdm(total=total, unit="req", disable=not total) as bar:
        for trace, requests in traces.items():
            row = found[Path(trace).name] = {}
            for model in parameters["models"]:
                name = Path(model).name.removesuffix(".json")
                bar.set_description(f"{Path(trace).stem}, {name}")
                before = bar.n
                if f"{trace}/{model}" not in journal.done:
                    shape = read_shape(model).with_state_dtype(parameters["state_dtype"])
                    sizes = sizes_of(shape, parameters["kv_dtype"])
                    cell = replay(
                        *sizes,
                        requests,
                        load,
                        parameters["chunk"],
                        parameters["trim_every"],
                        parameters["hold"],
                        bar.update,
                    )
                    journal.add(f"{trace}/{model}", cell)
                row[name] = journal.done[f"{trace}/{model}"]
                bar.update(before + len(requests) - bar.n)
    return found


def measure_calls(rounds: int) -> dict[str, Any]:
    """Costs on every driver at hand."""
    found: dict[str, Any] = {}
    for name, make in calls.drivers():
        if make is None:
            found[name] = None
            continue
        print(f"  measuring {name} ...", flush=True)
        runs = found[name] = {"runs": {}}
        for chunk in (2 * MIB, 8 * MIB, 32 * MIB):
            for run in (1, 4, 16, 64):
                if chunk * run <= calls.MOST:
                    runs["runs"][f"{chunk}/{run}"] = calls.run_costs(make, chunk, run, rounds)
        size = (10 << 30) if name == "cuda" else (1 << 30)
        try:
            moved = {
                str(chunk): calls.give_and_take(make, size, chunk, min(rounds, 3))
                for chunk in (2 * MIB, 32 * MIB)
            }
        except BackingError as error:
            moved = {"error": str(error)}
        runs["give_and_take"] = {"bytes": size, **moved}
    return found


def report_calls(found: dict[str, Any]) -> list[str]:
    """The tables of driver calls."""
    blocks = []
    for name, costs in found.items():
        if costs is None:
            blocks.append(f"{name}: no such driver here; not measured yet")
            continue
        rows = []
        for key, cost in costs["runs"].items():
            chunk, run = map(int, key.split("/"))
            per = [f"{cost[kind] / run * 1e6:.1f}" for kind in calls.KINDS]
            rows.append([f"{chunk // MIB} MiB x {run}", *per])
        head = [f"{name}: us a chunk", *calls.KINDS]
        blocks.append(table(head, rows))
        moved = costs["give_and_take"]
        for chunk, times in moved.items():
            if chunk not in ("bytes", "error"):
                line = (
                    f"{name}: {moved['bytes'] / 2**30:g} GiB in chunks of {int(chunk) // MIB} MiB: "
                    f"given back in {times['give back'] * 1e3:.1f} ms, taken in "
                    f"{times['take'] * 1e3:.1f} ms"
                )
                if name == "cuda":
                    met = all(times[kind] <= most for kind, most in MOST_SECONDS.items())
                    goal = " and ".join(f"{1e3 * most:.0f}" for most in MOST_SECONDS.values())
                    line += f" (target {goal} ms: {'met' if met else 'MISSED'})"
                blocks.append(line)
        if "error" in moved:
            blocks.append(f"{name}: give and take: {moved['error']}")
    return blocks


def report_backed(counts: dict[str, Any]) -> list[str]:
    """The tables of backed bytes."""
    blocks = []
    for trace, models in counts.items():
        rows = []
        for model, cell in models.items():
            ebb, quiet = cell["mean"][EBB], cell["mean"][QUIET]
            live = max(quiet["live"], 1)
            rows.append(
                [
                    model,
                    f"{quiet['live'] / MIB:.0f}",
                    f"{1 + cell['null_bytes'] / live:.2f}",
                    *(f"{quiet[rule] / live:.2f}" for rule in RULES),
                    "met" if quiet["avmp"] <= TARGET * live else "MISSED",
                    *(f"{ebb[rule] / max(ebb['live'], 1):.2f}" for rule in RULES),
                    f"{cell['relocated_bytes'] / cell['taken_bytes']:.3f}",
                    f"{cell['steps_without_a_call'] / cell['steps']:.4f}",
                ]
            )
        head = [
            f"{trace}: backed / live",
            "live MiB",
            "live + null",
            *(SHORT[rule] for rule in RULES),
            f"AVMP <= {TARGET}",
            *(f"ebb: {SHORT[rule]}" for rule in RULES),
            "moved / taken",
            "no call",
        ]
        blocks.append(table(head, rows) + "\nmeans over time, of the quiet part unless said")
    return blocks


def _run(args: argparse.Namespace) -> int:
    if args.models is None:
        args.models = [str(path) for path in sorted(SHIPPED.glob("*.json"))]
    parameters = {name: getattr(args, name) for name in _PARAMETERS}
    output, expected = results.begin(args, BENCHMARK)
    if expected is not None:
        parameters = expected["parameters"]
    _validate(parameters)
    with results.resuming(results.journal_of(output, args.check), parameters) as journal:
        counts = measure_backed(parameters, journal)
        print("\n\n".join(report_backed(counts)))
        timings = {}
        if not args.no_calls and not args.check:
            timings = measure_calls(args.rounds)
            print("\n\n".join(["", *report_calls(timings)]))
            # Imported here: torch takes seconds, and a help text needs none.
            from avmp_vllm.bench.memory import contiguous

            timings["attention"] = contiguous.measure(args.milliseconds)
            print(f"\n{contiguous.report(timings['attention'])}")
        result = results.record(
            BENCHMARK,
            results.environment(parameters["seed"]),
            parameters,
            titles=TITLES,
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
        bad_input=(InputError, OptionError, ShapeError),
        failures=(BackingError,),
        interrupted="the same command goes on behind the replays that are done",
    )
