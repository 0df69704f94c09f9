"""Random streams of what users do: seeds to settings and events."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from fuzz_worker import VOCABULARY


@dataclass(frozen=True)
class Settings:
    """Of an engine.

    Attributes:
        caching: Prefix caching.
        checkpoints: Whether the layers save a state inside of a chunk where vLLM wants one, as
            Mamba-2 on CUDA.
        anywhere: Whether they save as many as are wanted at any position, as AVMP's Mamba-1.
        ahead: Steps that are scheduled before the output of the first of them arrives.
        asynchronous: Whether a request may be in several of them; else a pipeline is filled with
            steps of different requests.
        stages: Pipeline stages, each with a layer of each kind and of other sizes than the others'.
        retention: ``--prefix-cache-retention-interval``.
        policy: Of vLLM's scheduler.
        spacing: ``checkpoint_tokens``.
        state_cells: Eight bytes each; a token has two.
        memory_factor: Bytes of the arena, in the least that AVMP accepts.
        max_model_len: Longest request.
        budget: ``--max-num-batched-tokens``.
        threshold: ``--long-prefill-token-threshold``; 0 for none.
        sequences: ``--max-num-seqs``.
        batch: ``migration_batch``.
        growth: ``growth_tokens``.
        admission: ``admission``.
        victim: ``victim``.
        cut: ``cut_tokens``.
        answer: ``answer_tokens``.
        cold: ``cold_states``; `int12` loses nothing here, where a state is one value in all cells.
        verify: Check AVMP's own invariants at each step.
    """

    caching: bool = True
    checkpoints: bool = False
    anywhere: bool = False
    ahead: int = 0
    asynchronous: bool = True
    stages: int = 1
    retention: int | None = 0
    policy: str = "fcfs"
    spacing: int = 64
    state_cells: int = 100
    memory_factor: float = 1.0
    max_model_len: int = 256
    budget: int = 128
    threshold: int = 0
    sequences: int = 6
    batch: int = 1
    growth: int = 0
    admission: str = "growth"
    victim: str = "last"
    cut: int = 0
    answer: int = 64
    cold: str = "exact"
    verify: bool = True

    @property
    def chooses(self) -> bool:
        """Whether AVMP chooses which states are kept."""
        return self.caching and self.retention == 0


@dataclass(frozen=True)
class Add:
    """A request arrives."""

    name: str
    prompt: tuple[int, ...]
    limit: int
    salt: str | None = None
    priority: int = 0
    session: bool = False


@dataclass(frozen=True)
class Continue:
    """A streaming session's next input, or its end."""

    name: str
    prompt: tuple[int, ...] | None


@dataclass(frozen=True)
class Abort:
    """A user goes away."""

    name: str


@dataclass(frozen=True)
class Reset:
    """The prefix cache is emptied."""

    running: bool


@dataclass
class Stream:
    """Events by step."""

    settings: Settings
    steps: list[list[object]] = field(default_factory=list)


def draw_settings(rng: random.Random) -> Settings:
    """Settings of all kinds, many of them small."""
    caching = rng.random() < 0.9
    spacing = rng.choice((32, 64, 128))
    max_model_len = rng.choice((128, 256, 400))
    state_cells = rng.choice((16, 48, 90, 150, 300))
    layers = rng.choice(("cut", "checkpoints", "anywhere"))
    return Settings(
        caching=caching,
        checkpoints=layers == "checkpoints",
        anywhere=layers == "anywhere",
        ahead=rng.randrange(2),
        retention=rng.choice((0, 0, None, 2 * spacing, 4 * spacing)) if caching else 0,
        policy=rng.choice(("fcfs", "priority")),
        spacing=spacing,
        state_cells=state_cells,
        memory_factor=rng.choice((1.0, 1.0, 1.3, 2, 3, 6)),
        max_model_len=max_model_len,
        budget=rng.choice((48, 64, 100, 128, 192, 512)),
        threshold=rng.choice((0, 0, 0, 40)),
        sequences=rng.choice((1, 2, 4, 8)),
        batch=rng.choice((1, 1, 4, 32)),
        growth=rng.choice((0, 0, 64)),
        cut=rng.choice((0, 0, 40)),
        answer=rng.choice((0, 16, 64)),
    )


def draw(seed: int, **changes: object) -> Stream:
    """The stream of a seed.

    Args:
        seed: Any number.
        changes: Settings that are not left to chance.
    """
    rng = random.Random(seed)
    rules = {
        "admission": ("growth", "forecast")[seed % 2],
        "victim": ("last", "cheapest")[seed // 2 % 2],
    }
    settings = replace(draw_settings(rng), **rules | changes)
    if seed // 4 % 2 and "cold" not in changes and settings.chooses and settings.stages == 1:
        settings = replace(settings, cold="int12")
    stream = Stream(settings)
    longest = settings.max_model_len - 1
    known: list[tuple[int, ...]] = [()]
    names: list[str] = []
    for _ in range(rng.choice((10, 30, 60))):
        events: list[object] = []
        while rng.random() < 0.4 and len(names) < 24:
            prompt = _draw_prompt(rng, known)[:longest]
            known.append(prompt)
            names.append(f"r{len(names)}")
            events.append(
                Add(
                    names[-1],
                    prompt,
                    rng.choice((1, 2, 5, 20, 70, 200)),
                    salt=rng.choice((None, None, None, "a", "b")),
                    priority=rng.randrange(3),
                    session=rng.random() < 0.15,
                )
            )
        if names and rng.random() < 0.1:
            more = tuple(rng.randint(1, VOCABULARY) for _ in range(rng.choice((1, 20, 60))))
            events.append(Continue(rng.choice(names), rng.choice((more, more, None))))
        if names and rng.random() < 0.05:
            events.append(Abort(rng.choice(names)))
        if rng.random() < 0.02:
            events.append(Reset(running=rng.random() < 0.5))
        stream.steps.append(events)
    return stream


def _draw_prompt(rng: random.Random, known: list[tuple[int, ...]]) -> tuple[int, ...]:
    """A prompt that continues an earlier one, or a part of it."""
    trunk = rng.choice(known)
    if rng.random() < 0.5:
        trunk = trunk[: rng.randint(0, len(trunk))]
    more = rng.choice((1, 5, 16, 40, 100, 200))
    return trunk + tuple(rng.randint(1, VOCABULARY) for _ in range(more))


def without_sessions(stream: Stream) -> Stream:
    """The same stream with ordinary requests alone."""
    steps = [
        [replace(event, session=False) if isinstance(event, Add) else event for event in events]
        for events in stream.steps
    ]
    return Stream(
        stream.settings,
        [[event for event in events if not isinstance(event, Continue)] for events in steps],
    )
