"""Both servers of a scenario.

Both stay up, and one is driven at a time while the other waits for requests, which costs it
nothing. So the two halves of a pair are seconds apart, and what else the machine does meets both.
Which goes first alternates from round to round.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from avmp_vllm.bench.serve.load import Workload
from avmp_vllm.bench.serve.rounds import Goal, Round
from avmp_vllm.demo.neighbours import cpu_times, foreign_share
from avmp_vllm.demo.server import Server, vllm_server

AVMP, STOCK = "avmp", "stock"
#: Side -> value of ``--block-manager``.
SIDES = {AVMP: "avmp", STOCK: "default"}

#: Counter of ``/metrics`` -> name here.
COUNTERS = {
    "vllm:num_preemptions_total": "preemptions",
    "vllm:prefix_cache_hits_total": "prefix_hit_tokens",
    "vllm:avmp_migrations_total": "migrations",
    "vllm:avmp_relocated_bytes_total": "relocated_bytes",
    "vllm:avmp_evictions_total": "evictions",
}


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
    return {name: value for name, value in values.items() if value is not None}


@contextlib.contextmanager
def running_pair(
    model: str,
    options: Sequence[str],
    environment: Mapping[str, str],
    logs: Path,
    timeout_s: float,
) -> Iterator[dict[str, Server]]:
    """Start both servers together; stop them at the end.

    Raises:
        ServerError: One did not start.
    """
    made = {
        side: vllm_server(
            model,
            block_manager=manager,
            log=logs / f"{side}.log",
            options=options,
            environment=environment,
        )
        for side, manager in SIDES.items()
    }
    with contextlib.ExitStack() as stack:
        for server in made.values():
            stack.enter_context(server)
        for server in made.values():
            server.wait_ready(timeout_s)
        yield made


def drive(
    server: Server, workload: Workload, model: str, seed: int, log: Path, goal: Goal | None
) -> dict[str, Any]:
    """Drive one server for one round.

    Returns:
        ``counts`` (of no clock), ``figures``, ``errors`` and ``foreign_share``, what other programs
        took of the machine. Preemptions, prefix hits and
        migrations depend on when requests meet, so they are figures.

    Raises:
        ServerError: It died.
    """
    server.check_alive()
    before, begin, spent = counters(server), cpu_times(), processor_seconds(server.pid)
    found: Round = workload.drive(server.url, model, seed, log)
    server.check_alive()
    spent = processor_seconds(server.pid) - spent
    foreign, after = foreign_share(begin, cpu_times()), counters(server)
    counts = found.counts()
    figures = found.figures(goal)
    figures["cpu_ms_per_token"] = 1e3 * spent / max(counts["answer_tokens"], 1)
    for name, value in after.items():
        figures[name] = value - before.get(name, 0.0)
    return {
        "counts": counts,
        "figures": figures,
        "errors": found.errors[:3],
        "foreign_share": foreign,
    }
