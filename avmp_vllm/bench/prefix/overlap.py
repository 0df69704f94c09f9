"""Requests that run at the same time.

A request finds in the cache what those before it that are done have left there, and holds its
pages and a state until it is done itself. Only then is what it leaves entered, all of it: an engine
enters prompts as they are computed. None waits for room, however much is held.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from avmp_vllm.bench.prefix.cache import Cache, Served
from avmp_vllm.bench.prefix.trace import PAGE, Request
from avmp_vllm.core.geometry import ceil_div


@dataclass(frozen=True)
class StepTimes:
    """How long a request runs.

    Attributes:
        token_us: Microseconds of each prompt token that is computed.
        step_ms: Milliseconds of each step, of which an answer's token needs one.
    """

    token_us: float
    step_ms: float

    def seconds(self, request: Request, hit: int) -> float:
        """From a request's begin to its end."""
        computed = (request.prompt - hit) * self.token_us / 1e6
        return computed + request.answer * self.step_ms / 1e3


def overlapped(
    cache: Cache, requests: Sequence[Request], times: StepTimes
) -> Iterator[tuple[int, Served]]:
    """Serve requests that arrive at their times.

    Yields:
        A request's place in the sequence and what came of it, when it is done.
    """
    running: list[tuple[float, int, int, int]] = []  # end, place, hit, pages held
    pages = 0

    def finish() -> tuple[int, Served]:
        nonlocal pages
        _, place, hit, held = heapq.heappop(running)
        pages -= held
        cache.hold(pages, len(running))
        return place, cache.serve(requests[place])._replace(hit=hit)

    for place, request in enumerate(requests):
        while running and running[0][0] <= request.time:
            yield finish()
        hit = cache.probe(request)
        # Those that are hit are the cache's.
        held = ceil_div(request.prompt + request.answer // 2 - hit, PAGE)
        pages += held
        end = request.time + times.seconds(request, hit)
        heapq.heappush(running, (end, place, hit, held))
    while running:
        yield finish()
