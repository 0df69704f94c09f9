"""Traces that no file holds, drawn by stated rules from a seed.

Lengths and pauses are log-normal, given as median and standard deviation of the logarithm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from avmp_vllm.bench.prefix.trace import Timing, held
from avmp_vllm.bench.scheduler.traces import Segment, TraceRequest


class LogNormal(NamedTuple):
    """A positive quantity."""

    median: float
    spread: float

    def draw(self, rng: np.random.Generator) -> float:
        """One value."""
        return self.median * float(np.exp(rng.normal(0, self.spread)))

    def tokens(self, rng: np.random.Generator) -> int:
        """One value, whole and at least 1."""
        return max(1, round(self.draw(rng)))


QUESTION, ANSWER, THOUGHT = LogNormal(60, 1.2), LogNormal(250, 0.8), LogNormal(600, 0.8)
#: Turns of a conversation are geometric with this mean.
TURNS = 4
#: The prompt that all conversations begin with.
SYSTEM_TOKENS = 1500

#: An agent: tools' descriptions before everything, then calls and what the tools say.
TOOLS_TOKENS, TOOL_SETS = 2500, 3
CALL, RESULT = LogNormal(80, 0.7), LogNormal(400, 1.0)
TOOL_SECONDS, TASK_SECONDS = LogNormal(3, 1.0), LogNormal(120, 1.0)
#: Calls of a task and tasks of a session are geometric with these means.
CALLS, TASKS = 8, 3
#: A step goes on in this many ways at once, every tenth step.
BRANCHES, BRANCH_EVERY = 3, 10


def _conversations(
    rng: np.random.Generator, count: int, system: int, thoughts: bool
) -> list[list[TraceRequest]]:
    """Conversations without times, with ``count`` turns or a few more."""
    found: list[list[TraceRequest]] = []
    left = count
    while left > 0:
        name = len(found)
        history: tuple[Segment, ...] = (Segment("system", system),) if system else ()
        turns = []
        for turn in range(int(rng.geometric(1 / TURNS))):
            history = (*history, Segment(f"{name}.{turn}q", QUESTION.tokens(rng)))
            said = Segment(f"{name}.{turn}a", ANSWER.tokens(rng))
            answer = said
            if thoughts:
                # The next turn holds what was said and not what was thought before it.
                answer = Segment(f"{name}.{turn}t", said.tokens + THOUGHT.tokens(rng))
            turns.append(TraceRequest(0.0, history, answer))
            history = (*history, said)
        found.append(turns)
        left -= len(turns)
    return found


def _chats(
    system: int = 0, thoughts: bool = False
) -> Callable[[int, int, Timing], list[TraceRequest]]:
    def draw(seed: int, count: int, timing: Timing) -> list[TraceRequest]:
        rng = np.random.default_rng(seed)
        conversations = _conversations(rng, count, system, thoughts)
        # Renaming a copy would rename the system prompt, so there is one copy.
        return held(conversations, timing._replace(copies=1), seed)

    return draw


def _agents(seed: int, count: int, timing: Timing) -> list[TraceRequest]:
    """Sessions of one growing context each, begun anywhere in the trace."""
    rng = np.random.default_rng(seed)
    end = timing.minutes * 60
    found: list[TraceRequest] = []
    session = 0
    while len(found) < count:
        clock = float(rng.uniform(0, end))
        kind = int(rng.integers(TOOL_SETS))
        context: tuple[Segment, ...] = (Segment(f"tools{kind}", TOOLS_TOKENS),)
        step = 0
        for task in range(int(rng.geometric(1 / TASKS))):
            context = (*context, Segment(f"{session}.{task}q", QUESTION.tokens(rng)))
            for call in range(int(rng.geometric(1 / CALLS))):
                if clock >= end:
                    break
                step += 1
                ways = 1 if step % BRANCH_EVERY else BRANCHES
                for way in range(ways):
                    name = f"{session}.{task}.{call}.{way}"
                    answer = Segment(name + "c", CALL.tokens(rng))
                    found.append(TraceRequest(clock + 0.01 * way, context, answer))
                # The last of several ways is the one that is gone on with.
                result = Segment(name + "r", RESULT.tokens(rng))
                context = (*context, answer, result)
                clock += TOOL_SECONDS.draw(rng)
            clock += TASK_SECONDS.draw(rng)
        session += 1
    return sorted(found, key=lambda request: request.arrival)


#: Name -> (seed, least requests before those behind the end are cut, timing) -> requests.
GENERATED: dict[str, Callable[[int, int, Timing], list[TraceRequest]]] = {
    "agent": _agents,
    "thinking": _chats(thoughts=True),
    "system": _chats(system=SYSTEM_TOKENS),
    "chat": _chats(),
}
#: Requests of a generated trace, unless told otherwise.
REQUESTS = 10_000
