"""Requests as a prefix cache sees them: keys of pages, in order of arrival.

A page is ``PAGE`` tokens, and its key stands for those tokens *and all before them*, as a chain of
hashes does. Keys are small integers: a trace's segments form a tree, each node of which owns the
keys of the pages that end inside of it, in one run of consecutive numbers::

    segments   | system 40 | question 30 | answer 50      |
    pages      0    1    2 :  3     4    :  5    6    7 (8 tokens are no page yet)
    keys       a  a+1      b  b+1        c  c+1  c+2

So two requests share a key exactly if they share every token up to its page's end. A request's keys
go on through its answer, since the next turn's prompt holds it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from avmp_vllm.bench.scheduler.traces import HASHED_TOKENS, Segment, Trace, TraceRequest

#: Tokens of a page.
PAGE = 16


class Run(NamedTuple):
    """Pages that end inside of one segment, behind one prefix.

    Attributes:
        key: Of the first page; the others' follow by one.
        pages: How many.
    """

    key: int
    pages: int


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        time: Of its arrival, seconds from the start.
        runs: Its whole pages, prompt and answer, in order; no run is empty.
        prompt: Tokens of the prompt.
        answer: Tokens of the answer.
        number: Its place in the trace.
    """

    time: float
    runs: tuple[Run, ...]
    prompt: int
    answer: int
    number: int = 0

    @property
    def tokens(self) -> int:
        """Prompt and answer."""
        return self.prompt + self.answer

    @property
    def reusable(self) -> int:
        """Most pages that may be hit: at least one token of a prompt must be computed."""
        return (self.prompt - 1) // PAGE

    @property
    def prompt_pages(self) -> int:
        """Whole pages of the prompt."""
        return self.prompt // PAGE

    @functools.cached_property
    def keys(self) -> list[int]:
        """Keys of all whole pages, prompt and answer."""
        return [key for run in self.runs for key in range(run.key, run.key + run.pages)]


class Keys:
    """Gives the pages of segments their keys."""

    def __init__(self) -> None:
        # (parent node, segment key, tokens) -> (node, first key)
        self._nodes: dict[tuple[int, str, int], tuple[int, int]] = {}
        self.count = 0

    def runs(self, segments: Iterable[Segment]) -> tuple[Run, ...]:
        """Runs of a sequence's whole pages."""
        node, tokens, runs = 0, 0, []
        for segment in segments:
            pages = (tokens + segment.tokens) // PAGE - tokens // PAGE
            identity = node, segment.key, segment.tokens
            found = self._nodes.get(identity)
            if found is None:
                found = self._nodes[identity] = len(self._nodes) + 1, self.count
                self.count += pages
            node, first = found
            tokens += segment.tokens
            if pages:
                runs.append(Run(first, pages))
        return tuple(runs)


def requests_of(requests: Sequence[TraceRequest]) -> list[Request]:
    """A trace's requests with the keys of their pages, in order of arrival."""
    keys = Keys()
    ordered = sorted(requests, key=lambda request: request.arrival)
    return [
        Request(
            request.arrival,
            keys.runs((*request.prompt, request.output)),
            request.prompt_tokens,
            request.output.tokens,
            number,
        )
        for number, request in enumerate(ordered)
    ]


def requests_of_blocks(requests: Sequence[TraceRequest]) -> list[Request]:
    """Requests whose prompts are known by hashes of blocks, one segment a block.

    Hashes show neither what a prompt's last, partial block holds nor its answer, but a later prompt
    that has all whole blocks of an earlier one, differs from it where that one's partial block
    stood, and is longer than it with its answer, is taken to go on from that answer, as the next
    turn of a conversation does. A request whose prompt is a single block is not gone on from: that
    block is everybody's system prompt.
    """
    ordered = sorted(requests, key=lambda request: request.arrival)
    holders: dict[str, int] = {}  # block -> the last request with it
    ended: dict[str, int] = {}  # last whole block -> the last request that ended behind it
    found: list[Request] = []
    fresh = 0
    for number, request in enumerate(ordered):
        blocks = [segment.key for segment in request.prompt if segment.tokens == HASHED_TOKENS]
        known = 0
        while known < len(blocks) and blocks[known] in holders:
            known += 1
        shared, source = known * HASHED_TOKENS, None
        if known:
            source = found[holders[blocks[known - 1]]]
            before = found[ended.get(blocks[known - 1], 0)]
            whole = before.prompt // HASHED_TOKENS
            if whole == known > 1 and shared < before.tokens <= request.prompt_tokens:
                shared, source = before.tokens, before
        runs, pages = [], shared // PAGE
        for run in source.runs if source else ():
            if pages > 0:
                runs.append(Run(run.key, min(run.pages, pages)))
                pages -= run.pages
        new = request.tokens // PAGE - shared // PAGE
        if new:
            runs.append(Run(fresh, new))
            fresh += new
        found.append(
            Request(
                request.arrival, tuple(runs), request.prompt_tokens, request.output.tokens, number
            )
        )
        for block in blocks:
            holders[block] = number
        if blocks:
            ended[blocks[-1]] = number
    return found


class Timing(NamedTuple):
    """When conversations begin and go on; files of conversations do not say.

    Attributes:
        copies: Times that each conversation is held, every time with other tokens.
        minutes: Length of the trace; conversations begin anywhere in it, and what would come
            behind its end does not.
        pause: Seconds between two turns, the median of a log-normal distribution.
        spread: Standard deviation of the pause's logarithm.
    """

    copies: int = 5
    minutes: float = 60.0
    pause: float = 145.0
    spread: float = 0.85


def held(
    conversations: Sequence[Sequence[TraceRequest]], timing: Timing, seed: int
) -> list[TraceRequest]:
    """Conversations' turns at drawn times."""
    rng = np.random.default_rng(seed)
    end = timing.minutes * 60
    found = []
    for copy in range(timing.copies):
        for turns in conversations:
            clock = rng.uniform(0, end)
            renamed: dict[str, Segment] = {}
            for request in turns:
                if clock >= end:
                    break
                found.append(_renamed(request, f"{copy}/", clock, renamed))
                clock += timing.pause * float(np.exp(rng.normal(0, timing.spread)))
    return sorted(found, key=lambda request: request.arrival)


def _renamed(
    request: TraceRequest, prefix: str, arrival: float, known: dict[str, Segment]
) -> TraceRequest:
    """The same request with other tokens, at another time."""

    def other(segment: Segment) -> Segment:
        if segment.key not in known:
            known[segment.key] = Segment(prefix + segment.key, segment.tokens)
        return known[segment.key]

    return TraceRequest(arrival, tuple(map(other, request.prompt)), other(request.output))


def load(
    trace: Trace,
    timing: Timing,
    seed: int,
    count: int | None = None,
    blocks_only: bool = False,
) -> list[Request]:
    """A trace file's requests: the first ``count``, or all.

    Conversations are held as ``timing`` says; other traces have their own times. ``blocks_only``
    leaves out what the hashes of blocks imply about answers.
    """
    if trace.conversations:
        return requests_of(held(trace.conversations, timing, seed)[:count])
    if trace.ticked and not blocks_only:
        return requests_of_blocks(trace.requests[:count])
    return requests_of(trace.requests[:count])
