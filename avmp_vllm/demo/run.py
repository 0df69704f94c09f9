"""``avmp demo``: the same conversations on AVMP and on stock vLLM, over real HTTP.

Builds a tiny Jamba, starts ``vllm serve`` with each block manager in turn and with the same cache
bytes, replays conversations, and compares every answer. The exit status is 0 only if each request
was answered by both, with the same text.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from avmp_vllm.demo import report as reports
from avmp_vllm.demo.neighbours import cpu_times, foreign_share
from avmp_vllm.demo.replay import Answer, Replay, peak, replay
from avmp_vllm.demo.server import Server, ServerError, vllm_server
from avmp_vllm.demo.workload import (
    SAMPLE,
    CountTokens,
    Message,
    Phase,
    Shape,
    WorkloadError,
    make_phases,
    read_conversations,
)

#: Label in the report -> value of ``--block-manager``.
SIDES = {reports.AVMP: "avmp", reports.STOCK: "default"}
TITLES = {reports.AVMP: "AVMP", reports.STOCK: "stock vLLM"}

# For the servers: the demo needs no network, and a model of this size computes faster on one thread
# than on several that wait for one another. The other cores serve HTTP and schedule.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

OK, DIFFERENT, USAGE, INTERRUPTED = 0, 1, 2, 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    shape = Shape(max_model_len=2048)
    parser.add_argument(
        "--sharegpt",
        type=Path,
        metavar="FILE",
        default=os.environ.get("SHAREGPT") or SAMPLE,
        help="conversations as ShareGPT JSON (default: $SHAREGPT, else a sample of this package)",
    )
    parser.add_argument(
        "--requests",
        type=positive,
        default=shape.requests,
        help=f"most requests to send to each server (default {shape.requests})",
    )
    parser.add_argument(
        "--arena-mib",
        type=positive,
        default=6,
        help="MiB of cache that each server gets (default 6)",
    )
    parser.add_argument(
        "--max-model-len",
        type=positive,
        default=shape.max_model_len,
        help=f"longest prompt and answer in tokens (default {shape.max_model_len})",
    )
    parser.add_argument(
        "--concurrency",
        type=positive,
        default=shape.short_concurrency,
        help=f"short chats at a time (default {shape.short_concurrency})",
    )
    parser.add_argument(
        "--long-concurrency",
        type=positive,
        default=shape.long_concurrency,
        help=f"long chats at a time (default {shape.long_concurrency})",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        default=Path(".demo"),
        help="folder for the checkpoint, the servers' logs and report.json (default .demo)",
    )
    parser.add_argument(
        "--vllm-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="one more option for both servers, as in --vllm-option=--no-enable-prefix-caching",
    )


def positive(text: str) -> int:
    """Argument type: a whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def run(args: argparse.Namespace) -> int:
    """Run the comparison; return the exit status."""
    console = Console()
    try:
        with termination_as_interrupt():
            return _run(args, console)
    except WorkloadError as error:
        print(f"avmp demo: error: {error}", file=sys.stderr)
        return USAGE
    except ServerError as error:
        print(f"avmp demo: error: {error}", file=sys.stderr)
        return DIFFERENT
    except KeyboardInterrupt:
        print("\navmp demo: interrupted; the servers are stopped", file=sys.stderr)
        return INTERRUPTED


def _run(args: argparse.Namespace, console: Console) -> int:
    begin = time.monotonic()
    conversations = read_conversations(args.sharegpt)
    with console.status("building a tiny Jamba"):
        model = tiny_jamba(args.output / "tiny-jamba")
    shape = replace(
        Shape(max_model_len=args.max_model_len),
        requests=args.requests,
        short_concurrency=args.concurrency,
        long_concurrency=args.long_concurrency,
    )
    with console.status("choosing the requests"):
        phases = make_phases(conversations, token_counter(model), shape)
    _describe(console, args, model, phases)

    outcomes = {}
    for side in SIDES:
        server = vllm_server(
            model,
            block_manager=SIDES[side],
            log=args.output / f"{side}.log",
            options=_options(args),
            environment=ENVIRONMENT,
        )
        outcomes[side] = _serve(console, TITLES[side], server, str(model), phases)

    setting = {
        "conversations": str(args.sharegpt),
        "arena_bytes": args.arena_mib * 2**20,
        "max_model_len": args.max_model_len,
        "phases": {phase.name: len(list(phase.requests)) for phase in phases},
        "vllm_options": _options(args),
        "seconds": time.monotonic() - begin,
    }
    report = reports.build_report(outcomes[reports.AVMP], outcomes[reports.STOCK], setting)
    path = args.output / "report.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    console.print()
    console.print(reports.table(report))
    for line in reports.complaints(report):
        console.print(line, markup=False, highlight=False)
    console.print(f"{setting['seconds']:.0f} s; the same figures and more: {path}", highlight=False)
    return OK if reports.passed(report) else DIFFERENT


def _options(args: argparse.Namespace) -> list[str]:
    """Options of ``vllm serve`` for both servers."""
    return [
        *("--kv-cache-memory-bytes", str(args.arena_mib * 2**20)),
        *("--max-model-len", str(args.max_model_len)),
        *("--max-num-seqs", str(max(args.concurrency, args.long_concurrency))),
        *("--dtype", "float32"),  # so that equal means equal, whatever runs beside a request
        "--enforce-eager",
        *args.vllm_option,
    ]


def _describe(
    console: Console, args: argparse.Namespace, model: Path, phases: Sequence[Phase]
) -> None:
    console.print(f"model: {model}; cache: {args.arena_mib} MiB", highlight=False)
    console.print(f"conversations: {args.sharegpt}", highlight=False)
    for phase in phases:
        prompts = sorted(request.prompt_tokens for request in phase.requests)
        console.print(
            f"  {phase.name}: {len(prompts)} requests of {prompts[0]} to {prompts[-1]} prompt "
            f"tokens, {phase.concurrency} chats at a time",
            highlight=False,
        )


def tiny_jamba(path: Path) -> Path:
    """Write the tiny Jamba to a folder."""
    # Imported here: torch and transformers take seconds, and `avmp demo --help` needs neither.
    from transformers.utils import logging

    from avmp_vllm.models.tiny_jamba import write_tiny_jamba

    logging.disable_progress_bar()
    return write_tiny_jamba(path)


def token_counter(model: Path) -> CountTokens:
    """Length of a chat prompt in the model's tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def count(messages: list[Message]) -> int:
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return len(ids)

    return count


def _serve(
    console: Console, title: str, server: Server, model: str, phases: Sequence[Phase]
) -> reports.Outcome:
    """Start a server, replay the phases, read its counters, stop it.

    Raises:
        ServerError: It did not start, or died on the way.
    """
    with server:
        with console.status("") as status:
            start_s = server.wait_ready(
                on_wait=lambda s: status.update(f"{title}: starting, {s:.0f} s; log: {server.log}")
            )
        console.print(f"{title}: ready after {start_s:.0f} s; log: {server.log}", highlight=False)
        begin = cpu_times()
        result, peak_running = asyncio.run(_replay_and_watch(console, title, server, model, phases))
        server.check_alive()
        outcome = reports.Outcome(
            result, server.metrics(), peak_running, start_s, foreign_share(begin, cpu_times())
        )
        with console.status(f"{title}: stopping"):
            server.stop()
    return outcome


async def _replay_and_watch(
    console: Console, title: str, server: Server, model: str, phases: Sequence[Phase]
) -> tuple[Replay, float | None]:
    """Replay with a progress bar; also return how many requests ran at once at most."""
    total = sum(len(list(phase.requests)) for phase in phases)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    done = asyncio.Event()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total, note="")

        def on_answer(phase: Phase, answer: Answer) -> None:
            progress.update(task, advance=1, note=phase.name)
            if answer.error is not None:
                progress.console.print(f"{answer.name}: {answer.error}", markup=False)

        def running() -> float | None:
            with contextlib.suppress(OSError):
                return server.metrics().value("vllm:num_requests_running")
            return None

        watcher = asyncio.create_task(peak(running, done))
        try:
            result = await replay(server.url, model, phases, on_answer=on_answer)
        finally:
            done.set()
        progress.update(task, note=f"{result.seconds:.1f} s")
        return result, await watcher


@contextlib.contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind like Ctrl-C, so that the servers are stopped."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
