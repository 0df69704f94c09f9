"""What the engines are driven with."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

AMPLE, TIGHT = "ample", "tight"
DECODE, PREFILL, PRESSURE = "decode", "prefill", "pressure"

#: Steps at the head of a slice that are not counted: the engine's caches are cold after another one
#: ran, and with asynchronous scheduling the first step was computed before the pause.
DROPPED = 2
#: Prompts of a batch differ by up to so many tokens, so that their pages fill at different steps.
RAGGED = 64


@dataclass(frozen=True)
class Workload:
    """Requests that start together, and how their engine is stepped.

    Attributes:
        name: As printed.
        kind: ``decode``: steady decode, timed step by step after the prefill. ``prefill``: one
            prompt and one token. ``pressure``: to the end, timed as a whole.
        regime: ``ample`` or ``tight`` memory.
        requests: How many.
        prompt: Least tokens of a prompt; those of a batch are up to ``RAGGED`` longer.
        answer: Tokens of each answer.
        slices: Parts of a round, between which the engines take turns.
        slice_steps: Counted steps of a slice.
    """

    name: str
    kind: str
    regime: str
    requests: int
    prompt: int
    answer: int
    slices: int = 1
    slice_steps: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        ragged = 0 if self.kind == PREFILL else RAGGED
        return self.prompt + ragged + self.answer

    def prompts(self, seed: int, vocabulary: int) -> list[list[int]]:
        """Token ids of a round's prompts; the same for the same seed."""
        rng = random.Random(f"{self.name}/{seed}")
        ragged = 0 if self.kind == PREFILL else RAGGED
        return [
            [rng.randrange(10, vocabulary) for _ in range(self.prompt + rng.randint(0, ragged))]
            for _ in range(self.requests)
        ]


def workloads(parameters: dict[str, Any]) -> list[Workload]:
    """The workloads of a run.

    Args:
        parameters: ``batches``, ``prompt``, ``steps``, ``slice_steps``, ``prefill``,
            ``prefill_repeats``, ``pressure_requests``, ``pressure_prompt``, ``pressure_answer``,
            ``step_tokens`` (most tokens of a step) and ``arena_mib`` by regime.
    """
    p, found = parameters, []
    if AMPLE in p["arena_mib"]:
        slices = -(-p["steps"] // p["slice_steps"])
        for batch in p["batches"]:
            # While the last prompts are read, the first requests decode already. Generous: chunks
            # may end early, and asynchronous scheduling is a step ahead.
            before = 4 + 2 * -(-batch * (p["prompt"] + RAGGED) // p["step_tokens"])
            answer = before + slices * (DROPPED + p["slice_steps"])
            found.append(
                Workload(
                    f"decode {batch}",
                    DECODE,
                    AMPLE,
                    batch,
                    p["prompt"],
                    answer,
                    slices,
                    p["slice_steps"],
                )
            )
        if p["prefill"]:
            name = f"prefill {p['prefill']}"
            found.append(Workload(name, PREFILL, AMPLE, 1, p["prefill"], 1, p["prefill_repeats"]))
    if TIGHT in p["arena_mib"]:
        found.append(
            Workload(
                f"pressure {p['pressure_requests']}",
                PRESSURE,
                TIGHT,
                p["pressure_requests"],
                p["pressure_prompt"],
                p["pressure_answer"],
            )
        )
    return found
