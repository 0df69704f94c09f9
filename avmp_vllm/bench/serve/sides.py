"""The servers of a scenario: AVMP, stock vLLM at several settings, and one of these again.

All stay up, and one is driven at a time while the others wait for requests, which costs
nothing. So the parts of a round are seconds apart, and what else the machine does meets all.
The order alternates from round to round.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from avmp_vllm.bench.serve.load import Workload
from avmp_vllm.bench.serve.rounds import Goal, Round
from avmp_vllm.demo.neighbours import cpu_times, foreign_share
from avmp_vllm.demo.server import Server, vllm_server

AVMP, STOCK = "avmp", "stock"
#: Setting of stock -> its options; all but the first concern prefix caching alone.
STOCK_SETTINGS: dict[str, tuple[str, ...]] = {
    STOCK: (),
    "stock-dense": ("--prefix-cache-retention-interval", "None"),  # every state is kept
    "stock-unit": ("--prefix-match-unit", "16"),
}
#: Behind a setting's name: a second server of it, as control.
AGAIN = "-again"


class Side(NamedTuple):
    """One server: its block manager, and options that others do not have."""

    manager: str
    options: tuple[str, ...]


def sides_of(
    settings: Sequence[str], control: str, avmp: Mapping[str, Any] | None = None
) -> dict[str, Side]:
    """AVMP, stock at each setting, the control.

    Args:
        settings: Of ``STOCK_SETTINGS``.
        control: One of them.
        avmp: AVMP's options.
    """
    own = ("--additional-config", json.dumps({"avmp": avmp})) if avmp else ()
    stock = {name: Side("default", STOCK_SETTINGS[name]) for name in settings}
    return {AVMP: Side("avmp", own), **stock, f"{control}{AGAIN}": stock[control]}


#: Counter of ``/metrics`` -> name here.
COUNTERS = {
    "vllm:num_preemptions_total": "preemptions",
    "vllm:prefix_cache_queries_total": "prefix_tokens",
    "vllm:prefix_cache_hits_total": "prefix_hit_tokens",
    "vllm:avmp_migrations_total": "migrations",
    "vllm:avmp_relocated_bytes_total": "relocated_bytes",
    "vllm:avmp_evictions_total": "evictions",
    "vllm:avmp_state_hits_total": "state_hits",
    "vllm:iteration_tokens_total_count": "steps",
}
#: Sums of seconds that requests spent -> their mean, here in milliseconds a request.
SPENT = {
    "vllm:request_queue_time_seconds": "queue_ms",
    "vllm:request_prefill_time_seconds": "prefill_ms",
}
#: Prompts that began at a state inside of an answer.
ANSWER_HITS = ("vllm:avmp_state_hits_total", "answer")


def processor_seconds(pid: int) -> float:
    """Processor time of a process and all its children so far, user and system."""
    process = psutil.Process(pid)
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = one.cpu_times()
            total += times.user + times.system
    return total


def counters(server: Server) -> dict[str, float]:
    """Counters so far; those that a server does not have are left out."""
    metrics = server.metrics()
    values = {name: metrics.value(sample) for sample, name in COUNTERS.items()}
    values["answer_hits"] = metrics.value(ANSWER_HITS[0], state=ANSWER_HITS[1])
    for sample, name in SPENT.items():
        values[name] = metrics.value(f"{sample}_sum")
    return {name: value for name, value in values.items() if value is not None}


@contextlib.contextmanager
def running(
    model: str,
    sides: Mapping[str, Side],
    options: Sequence[str],
    environment: Mapping[str, str],
    logs: Path,
    timeout_s: float,
) -> Iterator[dict[str, Server]]:
    """Start all servers together; stop them at the end.

    Args:
        model: Checkpoint or name.
        sides: What each one has of its own.
        options: Those of all.
        environment: Variables added to this process's own.
        logs: Folder for a log each.
        timeout_s: Seconds for each to start.

    Raises:
        ServerError: One did not start.
    """
    made = {
        side: vllm_server(
            model,
            block_manager=own.manager,
            log=logs / f"{side}.log",
            options=[*options, *own.options],
            environment=environment,
        )
        for side, own in sides.items()
    }
    with contextlib.ExitStack() as stack:
        for server in made.values():
            stack.enter_context(server)
        for server in made.values():
            server.wait_ready(timeout_s)
        yield made


def drive(
    server: Server, workload: Workload, model: str, seed: int, log: Path, goal: Goal | None
) -> tuple[Round, dict[str, Any]]:
    """Drive one server for one round.

    Returns:
        The round, and of it ``counts`` (of no clock), ``figures``, ``errors`` and
        ``foreign_share``, what other programs took of the machine. Preemptions, prefix hits and
        migrations depend on when requests meet, so they are figures.

    Raises:
        ServerError: It died.
    """
    server.check_alive()
    before, begin, spent = counters(server), cpu_times(), processor_seconds(server.pid)
    found = workload.drive(server.url, model, seed, log)
    server.check_alive()
    spent = processor_seconds(server.pid) - spent
    foreign, after = foreign_share(begin, cpu_times()), counters(server)
    counts = found.counts()
    figures = found.figures(goal)
    figures["cpu_ms_per_token"] = 1e3 * spent / max(counts["answer_tokens"], 1)
    for name, value in after.items():
        figures[name] = value - before.get(name, 0.0)
    for name in SPENT.values():
        if name in figures:
            figures[name] *= 1e3 / max(counts["answered"], 1)
    if queried := figures.get("prefix_tokens"):
        figures["hit_rate"] = figures.get("prefix_hit_tokens", 0.0) / queried
    return found, {
        "counts": counts,
        "figures": figures,
        "errors": found.errors[:3],
        "foreign_share": foreign,
    }
