"""Requests of a trace: when they arrive, and which tokens they share.

A request's tokens are a list of *segments*, each a key and a length; equal segments are equal
tokens, so that shared prefixes are shared and nothing else is. Three forms of file are read:

- CSV with ``arrived_at`` (s), ``num_prefill_tokens``, ``num_decode_tokens``;
- JSON lines with ``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids``, one for
  each 512 tokens of the prompt;
- JSON in ShareGPT's form, whose conversations become turns that repeat the whole history. It has
  neither times nor tokens: a token is four bytes of UTF-8, conversations arrive as a Poisson
  process, and a turn follows the one before it after a fixed pause.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from avmp_vllm.bench.inputs import InputError, read_table

#: Tokens that a hash of the JSON lines stands for.
HASHED_TOKENS = 512
#: Arrivals of that trace fall on ticks of so many seconds; they are spread within one.
TICK = 3.0
#: Bytes of UTF-8 to a token.
BYTES_PER_TOKEN = 4

VOCABULARY = 30_000


@dataclass(frozen=True)
class Segment:
    """Tokens that are the same wherever the key is."""

    key: str
    tokens: int

    def token_ids(self) -> list[int]:
        """The made-up tokens."""
        return list(_draw(self.key, self.tokens))


@functools.lru_cache(maxsize=4096)
def _draw(key: str, tokens: int) -> tuple[int, ...]:
    rng = np.random.default_rng(list(key.encode()))
    return tuple(rng.integers(10, VOCABULARY, tokens).tolist())


@dataclass(frozen=True)
class TraceRequest:
    """One request.

    Attributes:
        arrival: Seconds from the start.
        prompt: Its segments.
        output: What will be answered.
    """

    arrival: float
    prompt: tuple[Segment, ...]
    output: Segment

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return sum(segment.tokens for segment in self.prompt)

    @property
    def tokens(self) -> int:
        """Tokens of prompt and answer."""
        return self.prompt_tokens + self.output.tokens


def _number(path: Path, line: int, name: str, value: object, least: float, whole: bool) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
        fine = not isinstance(value, bool) and math.isfinite(number) and number >= least
        fine = fine and (not whole or number == int(number))
    except (TypeError, ValueError):
        fine = False
    if not fine:
        kind = "a whole number" if whole else "a number"
        raise InputError(path, line, f"{name} = {value!r} must be {kind} of at least {least:g}")
    return number


def _read_csv(path: Path) -> list[TraceRequest]:
    columns = ("arrived_at", "num_prefill_tokens", "num_decode_tokens")
    requests = []
    for line, row in read_table(path, columns):
        arrival = _number(path, line, columns[0], row[columns[0]], 0, False)
        prompt, output = (int(_number(path, line, c, row[c], 1, True)) for c in columns[1:])
        segment = Segment(f"{line}p", prompt)
        requests.append(TraceRequest(arrival, (segment,), Segment(f"{line}o", output)))
    return requests


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, None, f"cannot be read: {error}") from error


def _read_hashed(path: Path) -> list[TraceRequest]:
    requests = []
    for line, text in enumerate(_lines(path), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(path, line, f"is not JSON: {error.msg}") from error
        names = ("timestamp", "input_length", "output_length", "hash_ids")
        missing = [n for n in names if not isinstance(row, dict) or n not in row]
        if missing:
            raise InputError(path, line, f"lacks {', '.join(missing)}")
        arrival = _number(path, line, names[0], row[names[0]], 0, False) / 1000
        prompt, output = (int(_number(path, line, n, row[n], 1, True)) for n in names[1:3])
        hashes = row["hash_ids"]
        if not isinstance(hashes, list) or len(hashes) != math.ceil(prompt / HASHED_TOKENS):
            wanted = math.ceil(prompt / HASHED_TOKENS)
            raise InputError(path, line, f"hash_ids must be a list of {wanted} for {prompt} tokens")
        segments = []
        for index, name in enumerate(hashes):
            tokens = min(HASHED_TOKENS, prompt - index * HASHED_TOKENS)
            segments.append(Segment(f"h{name}", tokens))
        requests.append(TraceRequest(arrival, tuple(segments), Segment(f"{line}o", output)))
    return requests


def _text_tokens(text: str) -> int:
    return max(1, math.ceil(len(text.encode()) / BYTES_PER_TOKEN))


def _read_conversations(path: Path) -> list[list[TraceRequest]]:
    text = "\n".join(_lines(path))
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(path, error.lineno, f"is not JSON: {error.msg}") from error
    if not isinstance(rows, list):
        raise InputError(path, 1, "must be a list of conversations")
    conversations = []
    for number, row in enumerate(rows):
        try:
            turns = [(turn["from"], str(turn["value"])) for turn in row["conversations"]]
        except (KeyError, TypeError) as error:
            raise InputError(
                path, None, f"conversation {number} lacks 'conversations' of 'from' and 'value'"
            ) from error
        history: tuple[Segment, ...] = ()
        found: list[TraceRequest] = []
        for index, (speaker, value) in enumerate(turns):
            segment = Segment(f"c{number}.{index}", _text_tokens(value))
            if speaker == "gpt" and history:
                found.append(TraceRequest(0.0, history, segment))
            history = (*history, segment)
        if found:
            conversations.append(found)
    return conversations


@dataclass(frozen=True)
class Trace:
    """A trace file.

    Attributes:
        path: The file.
        requests: In order of arrival; empty for conversations.
        conversations: Turns of each conversation, without times.
        ticked: Arrivals fall on ticks.
    """

    path: Path
    requests: tuple[TraceRequest, ...]
    conversations: tuple[tuple[TraceRequest, ...], ...] = ()
    ticked: bool = False

    def draw(
        self, seed: int, count: int, scale: float, rate: float, pause: float
    ) -> list[TraceRequest]:
        """Requests of one run.

        Args:
            seed: Chooses the window of the trace (and what it leaves open: arrivals within a tick,
                arrivals of conversations).
            count: Most requests.
            scale: Arrivals come so many times as fast.
            rate: Conversations a second, where the file has no times.
            pause: Seconds between a conversation's turns.
        """
        rng = np.random.default_rng(seed)
        if self.conversations:
            order = rng.permutation(len(self.conversations))
            clock, drawn = 0.0, []
            for index in order:
                clock += rng.exponential(1 / rate)
                for turn, request in enumerate(self.conversations[index]):
                    drawn.append(replace(request, arrival=clock + turn * pause))
                if len(drawn) >= count:
                    break
            drawn = drawn[:count]
        else:
            last = max(len(self.requests) - count, 0)
            first = int(rng.integers(0, last + 1))
            window = self.requests[first : first + count]
            jitter = rng.uniform(0, TICK, len(window)) if self.ticked else np.zeros(len(window))
            drawn = [
                replace(request, arrival=request.arrival + float(late))
                for request, late in zip(window, jitter, strict=True)
            ]
        drawn.sort(key=lambda request: request.arrival)
        start = drawn[0].arrival
        return [replace(r, arrival=(r.arrival - start) / scale) for r in drawn]


def read_trace(path: Path) -> Trace:
    """Read a trace; its ending tells the form.

    Raises:
        InputError: Naming file and line.
    """
    if path.suffix == ".csv":
        trace = Trace(path, tuple(sorted(_read_csv(path), key=lambda r: r.arrival)))
    elif path.suffix == ".jsonl":
        requests = sorted(_read_hashed(path), key=lambda r: r.arrival)
        trace = Trace(path, tuple(requests), ticked=True)
    elif path.suffix == ".json":
        trace = Trace(path, (), tuple(map(tuple, _read_conversations(path))))
    else:
        raise InputError(path, None, "a trace ends in .csv, .jsonl or .json")
    if not trace.requests and not trace.conversations:
        raise InputError(path, None, "holds no request")
    return trace
