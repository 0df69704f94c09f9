"""Requests by the name of a load: a trace's file, a drawn one, or several that follow one another.

==================== ===========================================================================
``azure.csv``        a trace's file (see ``traces``), a window of it
``alpaca.csv``       a file of Alpaca's answer lengths; prompts of 32 tokens
``lognormal``        drawn: long log-normal answers, and prompts that say nothing of them
``A[:300]*2+B[:50]`` 300 requests of A, arriving twice as fast, then 50 of B: a load that drifts
==================== ===========================================================================

What has no times arrives as a Poisson process.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from avmp_vllm.bench.inputs import InputError, read_table
from avmp_vllm.bench.scheduler.traces import Segment, TraceRequest, read_trace

#: The drawn load: its name, medians, spreads (of the logarithm), and the longest answer.
LOGNORMAL = "lognormal"
ANSWER_MEDIAN, ANSWER_SPREAD, ANSWER_CAP = 600.0, 1.0, 6000
PROMPT_MEDIAN, PROMPT_SPREAD = 400.0, 1.0
#: Alpaca's file has lengths and no times; these are its columns, and the first is the default.
ALPACA_COLUMNS = ("len_t0.7", "len_t0.5", "len_t0.3", "len_t0.0", "len_reference")
ALPACA_PROMPT = 32
_PART = re.compile(r"(?P<name>[^*]+?)(?:\[:(?P<count>\d+)\])?(?:\*(?P<factor>[\d.]+))?")


class Load(Protocol):
    """Anything that requests can be drawn from."""

    def draw(
        self, seed: int, count: int, scale: float, rate: float, pause: float
    ) -> list[TraceRequest]:
        """Requests of one run, as ``Trace.draw`` has it."""
        ...


def is_alpaca(path: Path) -> bool:
    """Whether a file holds Alpaca's lengths."""
    try:
        with path.open(encoding="utf-8") as file:
            return ALPACA_COLUMNS[-1] in file.readline()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, None, f"cannot be read: {error}") from error


def alpaca_lengths(path: Path, column: str) -> list[int]:
    """A column of Alpaca's lengths."""
    found = []
    for line, row in read_table(path, (column,)):
        if not row[column].isdigit() or int(row[column]) < 1:
            raise InputError(path, line, f"{column} = {row[column]!r} must be a length")
        found.append(int(row[column]))
    return found


def lognormal_lengths(count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Drawn lengths of prompts and answers."""
    answers = np.exp(rng.normal(math.log(ANSWER_MEDIAN), ANSWER_SPREAD, count))
    prompts = np.exp(rng.normal(math.log(PROMPT_MEDIAN), PROMPT_SPREAD, count))
    return [
        (max(1, round(prompt)), min(max(1, round(answer)), ANSWER_CAP))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


@dataclass(frozen=True)
class Lengths:
    """Requests of which nothing but lengths is known.

    Attributes:
        answers: To choose a window from; None for log-normal ones.
    """

    answers: tuple[int, ...] | None = None

    def draw(
        self, seed: int, count: int, scale: float, rate: float, pause: float
    ) -> list[TraceRequest]:
        """Requests of one run, as ``Trace.draw`` has it."""
        rng = np.random.default_rng(seed)
        if self.answers is None:
            lengths = lognormal_lengths(count, rng)
        else:
            first = int(rng.integers(0, max(len(self.answers) - count, 0) + 1))
            lengths = [(ALPACA_PROMPT, each) for each in self.answers[first : first + count]]
        times = np.cumsum(rng.exponential(1 / rate, len(lengths)))
        return [
            TraceRequest(
                float(time - times[0]) / scale,
                (Segment(f"s{seed}.{number}p", prompt),),
                Segment(f"s{seed}.{number}o", answer),
            )
            for number, (time, (prompt, answer)) in enumerate(zip(times, lengths, strict=True))
        ]


@dataclass(frozen=True)
class Part:
    """A load's place in one that drifts.

    Attributes:
        load: What it draws from.
        count: Most requests, or None for as many as are asked for.
        factor: Arrivals come so many times as fast.
    """

    load: Load
    count: int | None
    factor: float


@dataclass(frozen=True)
class Parts:
    """Loads that follow one another, each from another window; they share no token."""

    parts: tuple[Part, ...]

    def draw(
        self, seed: int, count: int, scale: float, rate: float, pause: float
    ) -> list[TraceRequest]:
        """Requests of one run, as ``Trace.draw`` has it; ``count`` is each part's most."""
        drawn: list[TraceRequest] = []
        for number, part in enumerate(self.parts):
            begin = drawn[-1].arrival if drawn else 0.0
            most = count if part.count is None else min(part.count, count)
            own_seed = seed + 1000 * number
            for request in part.load.draw(own_seed, most, scale * part.factor, rate, pause):
                drawn.append(
                    TraceRequest(
                        begin + request.arrival,
                        tuple(_own(segment, number) for segment in request.prompt),
                        _own(request.output, number),
                    )
                )
        return drawn


def _own(segment: Segment, part: int) -> Segment:
    return replace(segment, key=f"{part}/{segment.key}")


def read_load(names: str) -> Load:
    """Read a load by its name.

    Raises:
        InputError: A file is missing or ill-formed.
    """
    parts = [_part(text) for text in names.split("+")]
    if len(parts) == 1 and parts[0].count is None and parts[0].factor == 1:
        return parts[0].load
    return Parts(tuple(parts))


def _part(text: str) -> Part:
    matched = _PART.fullmatch(text)
    try:
        assert matched
        factor = float(matched["factor"] or 1)
        count = int(matched["count"]) if matched["count"] else None
        assert factor > 0
        assert count != 0
    except (AssertionError, ValueError):
        raise InputError(
            Path(text), None, "is no load: NAME, NAME[:COUNT] or NAME*FACTOR"
        ) from None
    name = matched["name"]
    if name == LOGNORMAL:
        return Part(Lengths(), count, factor)
    path = Path(name)
    if path.suffix == ".csv" and is_alpaca(path):
        return Part(Lengths(tuple(alpaca_lengths(path, ALPACA_COLUMNS[0]))), count, factor)
    return Part(read_trace(path), count, factor)
