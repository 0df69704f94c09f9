"""What the engines are driven with."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

AMPLE, TIGHT = "ample", "tight"
DECODE, PREFILL, JOIN, PRESSURE = "decode", "prefill", "join", "pressure"

#: Steps at the head of a slice that are not counted: the engine's caches are cold after another one
#: ran, and with asynchronous scheduling the first step was computed before the pause.
DROPPED = 2
#: Prompts of a batch differ by up to so many tokens, so that their pages fill at different steps.
RAGGED = 64
#: Prompts that join in a slice, slices of a round, and decode steps behind each.
JOINS, JOIN_SLICES, JOIN_GAP = 8, 2, 3
#: Steps that one may take with those behind it, so long must the answers beside it last: generous.
JOIN_STEPS = 16


@dataclass(frozen=True)
class Workload:
    """Requests that start together, and how their engine is stepped.

    Attributes:
        name: As printed.
        kind: ``decode``: steady decode, timed step by step after the prefill. ``prefill``: one
            prompt and one token. ``join``: while the requests decode, prompts join them one after
            the other, for a token each. ``pressure``: to the end, timed as a whole.
        regime: ``ample`` or ``tight`` memory.
        requests: How many.
        prompt: Least tokens of a prompt; those of a batch are up to ``RAGGED`` longer.
        answer: Tokens of each answer.
        slices: Parts of a round, between which the engines take turns.
        slice_steps: Counted steps of a slice; of a join's, prompts that join.
        joiner: Tokens of a prompt that joins. Every second one goes on from the one before it,
            with as many tokens more.
        exact: Whether stock's kernels must give stock's tokens.
    """

    name: str
    kind: str
    regime: str
    requests: int
    prompt: int
    answer: int
    slices: int = 1
    slice_steps: int = 0
    joiner: int = 0
    exact: bool = True

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        ragged = 0 if self.kind == PREFILL else RAGGED
        return max(self.prompt + ragged + self.answer, 2 * self.joiner + 1)

    def prompts(self, seed: int, vocabulary: int) -> list[list[int]]:
        """Token ids of a round's prompts; the same for the same seed."""
        rng = random.Random(f"{self.name}/{seed}")
        ragged = 0 if self.kind == PREFILL else RAGGED
        return [
            [rng.randrange(10, vocabulary) for _ in range(self.prompt + rng.randint(0, ragged))]
            for _ in range(self.requests)
        ]

    def joiners(self, seed: int, vocabulary: int) -> list[list[int]]:
        """Token ids of the prompts that join in a slice; the same for the same seed."""
        rng = random.Random(f"{self.name}/joiners/{seed}")
        found: list[list[int]] = []
        for number in range(self.slice_steps):
            before = found[-1] if number % 2 else []
            found.append(before + [rng.randrange(10, vocabulary) for _ in range(self.joiner)])
        return found


def _until_all_decode(batch: int, parameters: dict[str, Any]) -> int:
    """Tokens that the first request has when the last of a batch gets its first.

    Generous: chunks may end early, and asynchronous scheduling is a step ahead.
    """
    prompts = batch * (parameters["prompt"] + RAGGED)
    return 4 + 2 * -(-prompts // int(parameters["step_tokens"]))


def workloads(parameters: dict[str, Any]) -> list[Workload]:
    """The workloads of a run.

    Args:
        parameters: ``batches``, ``prompt``, ``steps``, ``slice_steps``, ``prefill``,
            ``prefill_repeats``, ``join``, ``join_requests``, ``pressure_requests``,
            ``pressure_prompt``, ``pressure_answer``, ``step_tokens`` (most tokens of a step),
            ``prefix_caching``, ``platform`` and ``arena_mib`` by regime.
    """
    p, found = parameters, []
    if AMPLE in p["arena_mib"]:
        slices = -(-p["steps"] // p["slice_steps"])
        for batch in p["batches"]:
            answer = _until_all_decode(batch, p) + slices * (DROPPED + p["slice_steps"])
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
        if joiner := p.get("join"):  # which older results lack
            batch = p["join_requests"]
            found.append(
                Workload(
                    f"join {batch}",
                    JOIN,
                    AMPLE,
                    batch,
                    p["prompt"],
                    _until_all_decode(batch, p) + JOIN_SLICES * JOINS * JOIN_STEPS,
                    JOIN_SLICES,
                    JOINS,
                    joiner,
                )
            )
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
    # With a prefix cache prompts are cut to keep states, each side at places of its own; another
    # cut rounds otherwise in bf16, which is what runs on a card.
    exact = not p.get("prefix_caching") or p["platform"] == "cpu"
    return [replace(one, exact=exact) for one in found]
