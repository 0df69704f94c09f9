"""The paper's grid under rules that a hostile reader can accept.

**A request's life.** At its arrival a request asks for its whole prompt's KV pages and its state,
in one all-or-nothing call over all layers. While it generates it asks for a page each time its
tokens cross a page boundary. A request that is refused, at arrival or later, has failed: it gives
back what it holds and is gone. *Nobody ever loses a page while running*; there is no silent
eviction, no skipped layer, no retry. A request is **intact** if it departs with every page that it
needed.

**Which requests.** Those whose prompt, answer and state exceed the arena's bytes are left out for
everyone and counted (`too_large`). The rest is offered in three ways:

``served``
    The demand that fits. First the limit (bytes shared to the token) goes through the trace and
    admits whom it can *guarantee* the final size; the others fail in any allocator that keeps its
    promises (`unavoidable`), and are left out for everyone. Then each variant meets exactly the
    requests that the limit serves, growing as they go. Whatever fails now fits in the bytes and
    failed for the allocator's sake: an **avoidable failure**. The limit has none by construction,
    no allocator can exceed it, and nobody gains by refusing others.

``tight``
    The same with the requests that the limit completes *without* guarantees, admitting whoever
    fits at the moment. At its peaks this demand fills the arena to the token, so that rounding to
    pages alone costs requests; ``served`` leaves room where guaranteed bytes are not yet used.

``overload``
    Every request that fits the arena, offered without an oracle. The paper's workloads ask for
    several times the memory, so most fail in any allocator, and refusing one 60,000-token request
    makes room for twenty short ones: a variant that *cannot hold* long requests completes more
    short ones. Hence intact tokens stand beside the counts. Differences of a few requests are
    order effects, not capacity: they go up and down alike if the limit's page grows to 16 tokens.

**Time.** Microseconds an operation (a call to allocate or free, over all layers at once) of Python
in this process, the fastest of three runs; never "goodput". `two_ended` and `avmp` also copy bytes
on the device, which is given as bytes, not time. `migration` is the time of calls in which capacity
changed pools, which `service` and `refused` leave out; `idle` is the event loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from time import perf_counter_ns

from avmp_vllm.bench.paper.models import Model
from avmp_vllm.bench.paper.replay import ARRIVAL, DEPARTURE, GROWTH, events
from avmp_vllm.bench.paper.variants import SPACES, CountedSplit, Limit, Space, StaticSplit
from avmp_vllm.bench.paper.workloads import Trace

BEST = "static_best"
LIMIT = "limit"
OURS = "avmp"
#: In the order of the printed tables.
VARIANTS = (
    LIMIT,
    "stock_vllm",
    "static_09",
    BEST,
    "two_ended",
    "paper_avmp",
    "paper_avmp_half",
    OURS,
    "avmp_null_outside",
)
LIVES = ("served", "tight", "overload")

#: Arenas of the corrected grid in GiB.
ARENAS = (1, 4, 8)

#: Phases of an outcome's time, in printing order.
PHASES = ("service", "refused", "migration", "idle")

#: Each variant runs so often; its fastest run gives the time, so that other load counts less.
REPEATS = 3

#: Static splits tried in a first pass over all shares, and then around the best.
COARSE, FINE = 24, 12


class Demand:
    """The requests that are offered in one cell.

    Args:
        trace: All requests.
        requests: Those offered.
    """

    def __init__(self, trace: Trace, requests: Iterable[int]) -> None:
        self.trace = trace
        self.requests = sorted(requests)
        self._events: dict[int, list[tuple[int, int, int]]] = {}

    def events(self, page_tokens: int) -> list[tuple[int, int, int]]:
        """Events for a page size, kept for the next variant."""
        if page_tokens not in self._events:
            self._events[page_tokens] = events(self.trace, page_tokens, self.requests)
        return self._events[page_tokens]

    def tokens(self, requests: Iterable[int]) -> int:
        """Prompt and answer tokens of some requests."""
        trace = self.trace
        return sum(trace.prompts[r] + trace.generated[r] for r in requests)


@dataclass
class Life:
    """What one variant did with one demand.

    Attributes:
        intact: Requests that departed whole.
        refused: Refused at arrival.
        broken: Failed while growing.
        operations: Calls to allocate and free.
        pages: Pages and states handed out by them.
        migrations: Times that capacity changed pools.
        copied_bytes: Bytes of live pages moved on the device.
        service_ns: Time of calls that succeeded without migration, frees included.
        refused_ns: Time of calls that failed.
        migration_ns: Time of calls in which capacity changed pools.
        idle_ns: The event loop.
    """

    intact: set[int]
    refused: int
    broken: int
    operations: int
    pages: int
    migrations: int
    copied_bytes: int
    service_ns: int
    refused_ns: int
    migration_ns: int
    idle_ns: int

    @property
    def busy_ns(self) -> int:
        """Time of all operations."""
        return self.service_ns + self.refused_ns + self.migration_ns


def live(demand: Demand, space: Space) -> Life:
    """Run a demand through an allocator by the rules above."""
    trace, page_tokens = demand.trace, space.page_tokens
    queue = demand.events(page_tokens)
    allocate, free = space.allocate, space.free
    running: set[int] = set()
    intact: set[int] = set()
    refused = broken = operations = given = service = failing = migrating = 0
    begin = perf_counter_ns()
    for _, event, request in queue:
        if event != ARRIVAL and request not in running:
            continue
        operations += 1
        if event == DEPARTURE:
            running.discard(request)
            intact.add(request)
            start = perf_counter_ns()
            free(request)
            service += perf_counter_ns() - start
            continue
        pages = 1 if event == GROWTH else -(-trace.prompts[request] // page_tokens)
        migrations = space.migrations
        start = perf_counter_ns()
        done = allocate(request, pages, 0 if event == GROWTH else 1)
        spent = perf_counter_ns() - start
        if space.migrations != migrations:
            migrating += spent
        elif done:
            service += spent
        else:
            failing += spent
        if done:
            running.add(request)
            given += pages + (event == ARRIVAL)
        elif event == ARRIVAL:
            refused += 1
        else:
            broken += 1
            operations += 1
            running.discard(request)
            start = perf_counter_ns()
            free(request)
            service += perf_counter_ns() - start
    whole = perf_counter_ns() - begin
    return Life(
        intact,
        refused,
        broken,
        operations,
        given,
        space.migrations,
        space.copied_bytes,
        service,
        failing,
        migrating,
        whole - service - failing - migrating,
    )


def fitting(trace: Trace, model: Model, total_bytes: int) -> list[int]:
    """Requests whose final size fits an empty arena of so many bytes."""
    return [
        request
        for request in range(len(trace))
        if (trace.prompts[request] + trace.generated[request]) * model.token_bytes
        + model.block_bytes
        <= total_bytes
    ]


def guaranteed(trace: Trace, model: Model, total_bytes: int, requests: Iterable[int]) -> set[int]:
    """Requests that the limit serves if it only admits whom it can guarantee the final size."""
    limit, admitted = Limit(model, total_bytes), set()
    for _, event, request in events(trace, 1 << 62, requests):
        if event == ARRIVAL:
            final = trace.prompts[request] + trace.generated[request]
            if limit.allocate(request, final, 1):
                admitted.add(request)
        elif event == DEPARTURE and request in admitted:
            limit.free(request)
    return admitted


def best_split(demand: Demand, model: Model, total_bytes: int) -> int:
    """SSM blocks of the static split that leaves most requests intact, known afterwards.

    `COARSE` shares over the whole range are tried, then `FINE` more around the best of them; of
    equals the one with more intact tokens, then the smaller wins.
    """
    most = (total_bytes - 2 * model.page_bytes) // model.block_bytes
    scores: dict[int, tuple[int, int, int]] = {}

    def score(blocks: int) -> tuple[int, int, int]:
        if blocks not in scores:
            intact = live(demand, CountedSplit(model, total_bytes, blocks)).intact
            scores[blocks] = (len(intact), demand.tokens(intact), -blocks)
        return scores[blocks]

    def spread(low: int, high: int, count: int) -> list[int]:
        return sorted({low + round((high - low) * i / (count - 1)) for i in range(count)})

    coarse = spread(2, most, COARSE)
    at = coarse.index(max(coarse, key=score))
    fine = spread(coarse[max(at - 1, 0)], coarse[min(at + 1, len(coarse) - 1)], FINE)
    return max([*coarse, *fine], key=score)


def run_cell(
    trace: Trace, model: Model, total_bytes: int, life: str
) -> tuple[dict[str, int], dict[str, Life]]:
    """Run all variants on one cell.

    Args:
        trace: The requests.
        model: Sizes.
        total_bytes: Device memory of every variant.
        life: One of `LIVES`.

    Returns:
        Counts of the demand (submitted, too_large, unavoidable, offered, tokens, best_split), and
        each variant's outcome.
    """
    requests: Iterable[int] = fitting(trace, model, total_bytes)
    too_large = len(trace) - len(list(requests))
    if life == "served":
        requests = guaranteed(trace, model, total_bytes, requests)
    elif life == "tight":
        everyone = Demand(trace, requests)
        requests = live(everyone, Limit(model, total_bytes)).intact
    demand = Demand(trace, requests)
    split = best_split(demand, model, total_bytes)
    spaces = SPACES | {BEST: lambda model, total: StaticSplit(model, total, split)}
    outcomes: dict[str, Life] = {}
    for name in VARIANTS:
        runs = [live(demand, spaces[name](model, total_bytes)) for _ in range(REPEATS)]
        outcomes[name] = min(runs, key=lambda run: run.busy_ns)
    offered = len(demand.requests)
    counts = {
        "submitted": len(trace),
        "too_large": too_large,
        "unavoidable": len(trace) - too_large - offered,
        "offered": offered,
        "tokens": demand.tokens(demand.requests),
        "best_split": split,
    }
    return counts, outcomes
