"""Which pages and states a server's requests hold, step by step: busy, an ebb, then quiet.

Lengths are those of a trace, in its order. While the server is busy, a request that ends makes room
for the next one, so that always as many run; then none comes until only few are left; then always
that few run. Each step gives each request a token, and takes the time that it is said to take.
Nothing is shared between requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from avmp_vllm.bench.scheduler.traces import TraceRequest
from avmp_vllm.core.geometry import ceil_div

PAGE_TOKENS = 16
#: Parts of a run. The end is when nothing comes any more.
BUSY, EBB, QUIET, END = PARTS = ("busy", "ebb", "quiet", "end")


@dataclass(frozen=True)
class Load:
    """How many requests run, and how long steps take.

    Attributes:
        busy, quiet: Requests that run.
        quiet_share: Part of the requests that come when it is quiet.
        step, token, sequence: Seconds of a step, of a prompt token in it, of a sequence in it.
    """

    busy: int
    quiet: int
    quiet_share: float
    step: float
    token: float
    sequence: float


@dataclass
class Step:
    """What changes in a step.

    Attributes:
        begin: Seconds from the start.
        part: Of the run.
        lasts: Seconds until the next one.
        taken: Request, KV pages, states.
        dropped: Requests that end with this step.
        running: Requests that ran.
        idle: Whether nothing runs after it.
    """

    begin: float
    part: str
    lasts: float = 0.0
    taken: list[tuple[int, int, int]] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    running: int = 0
    idle: bool = False


def steps(requests: Sequence[TraceRequest], load: Load) -> Iterator[Step]:
    """The steps until the last request has ended."""
    busy_requests = round(len(requests) * (1 - load.quiet_share))
    running: dict[int, list[int]] = {}  # tokens now, tokens at the end, pages
    clock, coming, part = 0.0, 0, BUSY
    while coming < len(requests) or running:
        if part == BUSY and coming >= busy_requests:
            part = EBB
        if part == EBB and len(running) <= load.quiet:
            part = QUIET
        if part == QUIET and coming == len(requests):
            part = END
        step, prompt = Step(clock, part), 0
        most = {BUSY: load.busy, QUIET: load.quiet}.get(part, 0)
        while len(running) < most and coming < len(requests):
            tokens = requests[coming].prompt_tokens
            pages = ceil_div(tokens, PAGE_TOKENS)
            running[coming] = [tokens, requests[coming].tokens, pages]
            step.taken.append((coming, pages, 1))
            prompt += tokens
            coming += 1
        for number, state in running.items():
            state[0] += 1
            if state[0] > state[2] * PAGE_TOKENS:
                state[2] += 1
                step.taken.append((number, 1, 0))
            if state[0] >= state[1]:
                step.dropped.append(number)
        step.running = len(running)
        step.lasts = load.step + load.token * prompt + load.sequence * len(running)
        clock += step.lasts
        for number in step.dropped:
            del running[number]
        step.idle = not running
        yield step
