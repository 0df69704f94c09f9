"""A trace as a forecaster sees it: requests that arrive, grow and end.

Names of traces: a file that ``avmp bench scheduler`` reads, a file of Alpaca's lengths, or a drawn
log-normal one; several with ``+`` between them follow one another, which is a drift. A part may end
in ``[:count]``: its first so many requests.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from avmp_vllm.bench.inputs import InputError
from avmp_vllm.bench.prefix.trace import PAGE, Request, Run, requests_of, requests_of_blocks
from avmp_vllm.bench.scheduler.loads import (
    ALPACA_COLUMNS,
    LOGNORMAL,
    alpaca_lengths,
    is_alpaca,
    lognormal_lengths,
)
from avmp_vllm.bench.scheduler.traces import read_trace

LOGNORMAL_REQUESTS = 8000
#: Arrivals a second where a trace has no times, and conversations' pauses.
RATE = 2.0
CONVERSATION_RATE, PAUSE = 1.0, 30.0
#: Lengths at which a running answer is looked at: this and its doubles.
FIRST_LOOK = 16
#: More keys than a part of a drift has.
_KEYS = 1 << 40
_PART = re.compile(r"(?P<name>.+?)(?:\[:(?P<count>\d+)\])?")


@dataclass(frozen=True)
class Answer:
    """One request.

    Attributes:
        time: Of its arrival, seconds from the start.
        prompt: Tokens of its prompt.
        tokens: Of its answer.
        runs: Its full pages, prompt and answer, as runs of consecutive keys.
        part: Of the drift that it belongs to; parts share no page.
    """

    time: float
    prompt: int
    tokens: int
    runs: tuple[Run, ...] = ()
    part: int = 0

    @property
    def hashes(self) -> list[int]:
        """One for each full page of prompt and answer; equal ones stand for equal prefixes."""
        first = self.part * _KEYS
        return [first + key for run in self.runs for key in range(run.key, run.key + run.pages)]

    @property
    def prompt_hashes(self) -> list[int]:
        """Those of the prompt."""
        return self.hashes[: self.prompt // PAGE]


class Event(NamedTuple):
    """Something happens to a request.

    Attributes:
        kind: ``arrive``, ``progress`` or ``finish``.
        index: Of the request.
        tokens: That it has generated.
    """

    kind: str
    index: int
    tokens: int


@dataclass(frozen=True)
class Load:
    """Requests in order of arrival.

    Attributes:
        answers: The requests.
        starts: Indices at which parts of a drift begin; 0 is the first.
    """

    answers: tuple[Answer, ...]
    starts: tuple[int, ...]

    def events(self, token_seconds: float) -> Iterator[Event]:
        """What happens, in order of time.

        Args:
            token_seconds: Every request gets its tokens at this pace, from its arrival on. 0: each
                ends before the next arrives.
        """
        ahead: list[tuple[float, int, int, str]] = []
        for index, answer in enumerate(self.answers):
            while ahead and ahead[0][0] <= answer.time:
                _, other, tokens, kind = heapq.heappop(ahead)
                yield Event(kind, other, tokens)
            yield Event("arrive", index, 0)
            look = FIRST_LOOK
            while look < answer.tokens:
                at = answer.time + look * token_seconds
                heapq.heappush(ahead, (at, index, look, "progress"))
                look *= 2
            end = answer.time + answer.tokens * token_seconds
            heapq.heappush(ahead, (end, index, answer.tokens, "finish"))
        while ahead:
            _, other, tokens, kind = heapq.heappop(ahead)
            yield Event(kind, other, tokens)


def _of_requests(requests: Sequence[Request], part: int) -> list[Answer]:
    return [
        Answer(request.time, request.prompt, request.answer, request.runs, part)
        for request in requests
    ]


def _arrivals(count: int, rng: np.random.Generator) -> list[float]:
    times: list[float] = np.cumsum(rng.exponential(1 / RATE, count)).tolist()
    return times


def _part(text: str, number: int, seed: int) -> list[Answer]:
    matched = _PART.fullmatch(text)
    if not matched:
        raise InputError(Path(text), None, "is no trace")
    name, limit = matched["name"], int(matched["count"] or 0)
    rng = np.random.default_rng([seed, number])
    if name == LOGNORMAL:
        count = limit or LOGNORMAL_REQUESTS
        times = _arrivals(count, rng)
        lengths = lognormal_lengths(count, rng)
        return [Answer(time, *each) for time, each in zip(times, lengths, strict=True)]
    file, _, column = name.partition("@")
    path = Path(file)
    if path.suffix == ".csv" and is_alpaca(path):
        known = alpaca_lengths(path, column or ALPACA_COLUMNS[0])
        times = _arrivals(len(known), rng)
        found = [Answer(time, 1, each) for time, each in zip(times, known, strict=True)]
    else:
        trace = read_trace(path)
        if trace.conversations:
            count = sum(map(len, trace.conversations))
            drawn = trace.draw(seed, count, 1.0, CONVERSATION_RATE, PAUSE)
            found = _of_requests(requests_of(drawn), number)
        elif trace.ticked:
            found = _of_requests(requests_of_blocks(trace.requests), number)
        else:
            found = _of_requests(requests_of(trace.requests), number)
    return found[: limit or None]


def load(names: str, seed: int) -> Load:
    """Read or draw a load by its name.

    Raises:
        InputError: A part is missing or ill-formed.
    """
    answers: list[Answer] = []
    starts: list[int] = []
    for number, text in enumerate(names.split("+")):
        part = _part(text, number, seed)
        if not part:
            raise InputError(Path(text), None, "holds no request")
        starts.append(len(answers))
        shift = answers[-1].time - part[0].time if answers else -part[0].time
        answers += [replace(answer, time=answer.time + shift) for answer in part]
    return Load(tuple(answers), tuple(starts))
