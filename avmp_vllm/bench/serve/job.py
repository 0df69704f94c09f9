"""A run: starts each scenario's servers, drives them in turn, keeps what is finished."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avmp_vllm.bench.results import Journal
from avmp_vllm.bench.serve import report, sides
from avmp_vllm.bench.serve.models import write_model
from avmp_vllm.bench.serve.rounds import Goal, Round
from avmp_vllm.demo.run import ENVIRONMENT

if TYPE_CHECKING:
    from avmp_vllm.bench.serve.load import Workload

#: What makes the tiny Jamba's servers compute the same; a real model keeps vLLM's defaults.
TINY_OPTIONS = ("--dtype", "float32", "--enforce-eager")
WARM_UP = 0  # number of the round that is not counted
#: Without a goal of the user's: this many times what stock took in its warm-up round.
GOAL_FACTOR = 2.0


class Job:
    """All scenarios of a run.

    Args:
        parameters: Of the run, as the result file has them.
        sharegpt: File of the conversations.
        folder: For checkpoints and logs.
        start_timeout_s: Seconds for a server to start.
        journal: Keeps finished rounds.
    """

    def __init__(
        self,
        parameters: dict[str, Any],
        *,
        sharegpt: Path,
        folder: Path,
        start_timeout_s: float,
        journal: Journal,
    ) -> None:
        self.parameters, self.journal = parameters, journal
        self._sharegpt, self._folder = sharegpt, folder
        self._start_timeout_s = start_timeout_s

    def scenarios(self) -> Iterator[str]:
        """``workload/regime`` of every scenario."""
        for workload in self.parameters["workloads"]:
            for regime in self.parameters["arena_mib"][workload]:
                yield f"{workload}/{regime}"

    def options(self, name: str, regime: str, workload: Workload) -> list[str]:
        """Options of ``vllm serve`` for all servers."""
        p = self.parameters
        return [
            *("--kv-cache-memory-bytes", str(p["arena_mib"][name][regime] << 20)),
            *("--max-model-len", str(p["max_model_len"])),
            *("--max-num-seqs", str(p["concurrency"])),
            "--disable-uvicorn-access-log",
            *workload.options,
            *(() if p["model"] else TINY_OPTIONS),
            *p["vllm_options"],
        ]

    def _workload(self, name: str, model: str) -> Workload:
        from avmp_vllm.bench.serve.load import Conversations, Load, SingleTurns

        p = self.parameters
        load = Load(
            self._sharegpt,
            p["requests"],
            p["concurrency"],
            p["answer_tokens"],
            p["max_model_len"],
            p["turns"],
            p["think_s"],
        )
        if name == report.SINGLE:
            return SingleTurns(load)
        from transformers import AutoTokenizer

        return Conversations(load, AutoTokenizer.from_pretrained(model))

    def run(self) -> None:
        """Run every round that the journal lacks."""
        for scenario in self.scenarios():
            numbers = range(1, self.parameters["rounds"] + 1)
            todo = [one for one in numbers if f"{scenario}/{one}" not in self.journal.done]
            if todo:
                self._run_scenario(scenario, todo)

    def _run_scenario(self, scenario: str, todo: list[int]) -> None:
        from tqdm import tqdm

        p = self.parameters
        name, regime = scenario.split("/")
        model = p["model"] or str(write_model(self._folder, p["shapes"][name]))
        workload = self._workload(name, model)
        logs = self._folder / "serve-logs" / scenario.replace("/", "-")
        made = sides.sides_of(p["stock"][name], p["control"][name], p.get("avmp"))
        print(f"{scenario}: starting {', '.join(made)}; logs in {logs}", file=sys.stderr)
        with sides.running(
            model,
            made,
            self.options(name, regime, workload),
            ENVIRONMENT if p["model"] is None else {},
            logs,
            self._start_timeout_s,
        ) as servers:
            bar = tqdm(total=len(made) * (len(todo) + 1), desc=scenario, unit="part", disable=None)

            def one(number: int, goal: Goal | None) -> dict[str, Any]:
                # Forwards and backwards, so that none gains by its place.
                order = list(servers) if number % 2 else list(reversed(servers))
                found: dict[str, Any] = {}
                rounds: dict[str, Round] = {}
                for side in order:
                    rounds[side], found[side] = sides.drive(
                        servers[side], workload, model, number, logs / "client.log", goal
                    )
                    bar.update()
                for side, several in rounds.items():
                    found[side]["equal"] = several.equal_to(rounds[sides.STOCK])
                return found

            warm = one(WARM_UP, None)
            if f"{scenario}/goal" not in self.journal.done:
                self.journal.add(f"{scenario}/goal", list(self._goal(warm)))
            goal = Goal(*self.journal.done[f"{scenario}/goal"])
            for number in todo:
                self.journal.add(f"{scenario}/{number}", one(number, goal))
            bar.close()

    def _goal(self, warm: Mapping[str, Any]) -> Goal:
        stock, p = warm[sides.STOCK]["figures"], self.parameters
        return Goal(
            p["goal_ttft_ms"] or GOAL_FACTOR * stock["ttft_p50_ms"],
            p["goal_tpot_ms"] or GOAL_FACTOR * stock["tpot_p50_ms"],
        )

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
