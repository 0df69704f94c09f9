"""The paper's event loop, with its semantics and counters.

Events of one tick happen in the order departure, growth, arrival, then by request.

* Arrival: 4 calls for the prompt's KV pages (one a layer), then 28 for one SSM block each.
* Growth: 4 calls for one KV page each time the tokens cross a page boundary.
* Departure: everything held is freed.

A failed call is one OOM. Its layer is skipped; the request lives on as if nothing had happened, and
counts as completed if none of its own calls ever failed, even if its pages were taken away.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np

from avmp_vllm.bench.paper.allocators import PaperAllocator
from avmp_vllm.bench.paper.models import PAGE_TOKENS, Model, pages_for
from avmp_vllm.bench.paper.workloads import Trace
from avmp_vllm.core import Kind

DEPARTURE, GROWTH, ARRIVAL = range(3)

#: The paper samples the active requests after so many events.
SAMPLE_EVERY = 100


@dataclass
class Outcome:
    """What one replay gave.

    Attributes:
        oom_kv: Failed KV calls.
        oom_ssm: Failed SSM calls.
        submitted: Requests.
        completed: Requests of which no call failed (the paper's meaning).
        intact: Those of them that never lost a page either.
        infeasible: Requests that exceed all bytes of the cell.
        evictions: Times that a request lost all pages of a pool.
        self_evictions: Times that it was the asking request itself.
        requests_losing_state: Requests to which that happened.
        calls: Allocation calls.
        batch_mean: Mean of the sampled positive numbers of active requests; then percentiles.
        rebalance_count: Migrations.
        refused_migrations: Migrations that a live page forbade.
        migrated_bytes: Bytes of capacity moved.
        kv_bytes: Final size of the KV pool; None where there is no such pool.
        service_ns: Time in calls that succeeded, migrations included.
        retry_ns: Time in calls that failed.
        migration_ns: Time in migrations.
        idle_ns: Everything else: the loop itself and the departures.
    """

    oom_kv: int
    oom_ssm: int
    submitted: int
    completed: int
    intact: int
    infeasible: int
    evictions: int
    self_evictions: int
    requests_losing_state: int
    calls: int
    batch_mean: float
    batch_p50: float
    batch_p95: float
    batch_p99: float
    rebalance_count: int
    refused_migrations: int
    migrated_bytes: int
    kv_bytes: int | None
    ssm_bytes: int | None
    service_ns: int
    retry_ns: int
    migration_ns: int
    idle_ns: int

    @property
    def oom(self) -> int:
        """The paper's OOM count."""
        return self.oom_kv + self.oom_ssm


def events(
    trace: Trace, page_tokens: int = PAGE_TOKENS, requests: Iterable[int] | None = None
) -> list[tuple[int, int, int]]:
    """All events of a trace as (tick, kind of event, request), in order.

    Args:
        trace: The requests.
        page_tokens: A growth event stands wherever the tokens pass a multiple of this.
        requests: Which of them; all by default.
    """
    found: list[tuple[int, int, int]] = []
    for request in range(len(trace)) if requests is None else requests:
        arrival, prompt = trace.arrivals[request], trace.prompts[request]
        end = prompt + trace.generated[request]
        found.append((arrival, ARRIVAL, request))
        found.append((arrival + end, DEPARTURE, request))
        boundary = -(-prompt // page_tokens) * page_tokens + 1
        found += [(arrival + t, GROWTH, request) for t in range(boundary, end + 1, page_tokens)]
    found.sort()
    return found


def replay(trace: Trace, model: Model, allocator: PaperAllocator, total_bytes: int) -> Outcome:
    """Run one trace through one allocator.

    Args:
        total_bytes: Of the cell; only to count the requests that cannot fit at all.
    """
    begin = perf_counter_ns()
    counters, failures = allocator.counters, allocator.counters.failures
    take, rescue = allocator.take, allocator.rescue
    active: set[int] = set()
    spoilt: set[int] = set()
    samples: list[int] = []
    calls = service = retry = 0

    def allocate(kind: Kind, request: int, count: int, times: int) -> None:
        nonlocal calls, service, retry
        calls += times
        for _ in range(times):
            start = perf_counter_ns()
            done = take(kind, request, count) or rescue(kind, request, count)
            spent = perf_counter_ns() - start
            if done:
                service += spent
            else:
                retry += spent
                failures[kind] += 1
                spoilt.add(request)

    queue = events(trace)
    for number, (_, event, request) in enumerate(queue, 1):
        if event == GROWTH:
            if request in active:
                allocate(Kind.KV, request, 1, model.kv_layers)
        elif event == ARRIVAL:
            active.add(request)
            allocate(Kind.KV, request, pages_for(trace.prompts[request]), model.kv_layers)
            allocate(Kind.SSM, request, 1, model.ssm_layers)
        else:
            allocator.free(request)
            active.discard(request)
        if number % SAMPLE_EVERY == 0:
            samples.append(len(active))
    samples.append(len(active))
    whole = perf_counter_ns() - begin
    positive = [sample for sample in samples if sample]
    p50, p95, p99 = np.percentile(positive, (50, 95, 99)).tolist()
    return Outcome(
        oom_kv=failures[Kind.KV],
        oom_ssm=failures[Kind.SSM],
        submitted=len(trace),
        completed=len(trace) - len(spoilt),
        intact=len(trace) - len(spoilt | counters.robbed),
        infeasible=sum(
            pages_for(prompt + generated) * model.page_bytes + model.block_bytes > total_bytes
            for prompt, generated in zip(trace.prompts, trace.generated, strict=True)
        ),
        evictions=counters.evictions,
        self_evictions=counters.self_evictions,
        requests_losing_state=len(counters.robbed),
        calls=calls,
        batch_mean=float(np.mean(positive)),
        batch_p50=p50,
        batch_p95=p95,
        batch_p99=p99,
        rebalance_count=counters.migrations,
        refused_migrations=counters.refused,
        migrated_bytes=counters.migrated_bytes,
        kv_bytes=allocator.capacity_bytes(Kind.KV),
        ssm_bytes=allocator.capacity_bytes(Kind.SSM),
        service_ns=service,
        retry_ns=retry,
        migration_ns=counters.migration_ns,
        idle_ns=whole - service - retry,
    )
