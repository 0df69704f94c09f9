"""Random streams through vLLM's real schedulers, stock and AVMP's, with every read checked.

``pytest tests/fuzz --streams 5000`` runs more of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from fuzz_engine import Engine, Stuck
from fuzz_stream import Add, Settings, Stream, draw, without_sessions
from fuzz_worker import SimulatedWorker, WrongContent
from vllm.v1.core.sched.scheduler import Scheduler

from avmp_vllm.core import InvariantViolation, Save
from avmp_vllm.engine.layout.arena import AVMPCacheConfig
from avmp_vllm.engine.scheduler.block_pool import AVMPBlockPool
from avmp_vllm.engine.scheduler.manager import AVMPBlockSpaceManager
from avmp_vllm.engine.scheduler.scheduler import MovePlanMixin
from avmp_vllm.engine.scheduler.sessions import StreamingSessions
from avmp_vllm.engine.scheduler.state_manager import StateManager
from avmp_vllm.engine.scheduler.state_pool import StatePool

#: Of engines whose prompts keep states.
_KEPT = {"checkpoints": False, "caching": True, "retention": 0}
#: Streams of one test.
BATCH = 20


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Spread the streams over tests of equal size."""
    if "first" in metafunc.fixturenames:
        metafunc.parametrize("first", range(0, metafunc.config.getoption("streams"), BATCH))


def run(stream: Stream, avmp: bool = True) -> Engine:
    """Run a stream; everything is checked on the way."""
    engine = Engine(stream.settings, avmp)
    engine.run(stream)
    engine.check_answers()
    return engine


def test_every_stream_ends_and_reads_what_it_wrote(first: int) -> None:
    """AVMP serves every stream to its end, also in the smallest arena that it accepts."""
    for seed in range(first, first + BATCH):
        try:
            run(draw(seed))
        except Exception as error:
            error.add_note(f"stream {seed}: {draw(seed).settings}")
            raise


def test_stock_and_avmp_say_the_same(first: int) -> None:
    """Over as many bytes; stock's own failures with streaming sessions are left out."""
    compared = 0
    for seed in range(first, first + BATCH):
        stream = without_sessions(draw(seed))
        try:
            stock = run(stream, avmp=False)
        except ValueError:
            continue  # too few bytes for stock
        ours = run(stream)
        for name, session in stock.sessions.items():
            if not (session.aborted or ours.sessions[name].aborted):
                assert ours.sessions[name].answer == session.answer, f"stream {seed}, {name}"
                compared += 1
    assert compared


def pipeline(seed: int, **changes: Any) -> Stream:
    """A stream through two or three pipeline stages, filled or scheduled ahead."""
    stages = 2 + seed % 2
    return draw(seed, stages=stages, ahead=stages - 1, asynchronous=seed % 4 < 2, **changes)


def test_every_stream_ends_in_a_pipeline() -> None:
    """In every stage, whose pages have other sizes, what is read is what was written."""
    moved = 0
    for seed in range(2 * BATCH):
        try:
            engine = run(pipeline(seed))
        except Exception as error:
            error.add_note(f"stream {seed}: {pipeline(seed).settings}")
            raise
        assert len(engine.workers) == 2 + seed % 2
        moved += sum(engine.scheduler.kv_cache_manager.arena.statistics.relocations.values())
    assert moved > 100


def test_control_a_stage_with_anothers_indices_reads_wrong_content(monkeypatch) -> None:
    """Every stage takes the plan's indices, which are the first one's, for its own."""
    monkeypatch.setattr(AVMPCacheConfig, "shift", (0, 0))

    def run_all() -> None:
        for seed in range(2 * BATCH):
            run(pipeline(seed, verify=False))

    with pytest.raises((WrongContent, IndexError)):
        run_all()


# -- the prompts that found it ---------------------------------------------------------------------


def branching(retention: int | None) -> Stream:
    """Four prompts that leave a common one at different places, one after the other."""
    trunk = draw_tokens(1, 1_400)
    prompts = (
        trunk[:620],
        trunk[:620] + draw_tokens(2, 1_180),
        trunk[:1_300],
        trunk[:1_300] + draw_tokens(3, 500),
    )
    settings = Settings(
        checkpoints=True,
        retention=retention,
        spacing=512,
        state_cells=1_000,
        memory_factor=4,
        max_model_len=2_048,
        budget=2_048,
    )
    steps: list[list[object]] = []
    for index, prompt in enumerate((*prompts, *prompts)):
        steps += [[Add(f"r{index}", prompt, 3)], [], [], [], []]
    return Stream(settings, steps)


def draw_tokens(seed: int, count: int) -> tuple[int, ...]:
    """Some tokens."""
    rng = random.Random(seed)
    return tuple(rng.randint(1, 7) for _ in range(count))


@pytest.mark.parametrize("retention", [0, None, 1_024])
def test_branching_prompts_resume_from_their_own_states(retention: int | None) -> None:
    """A request that resumes inside of a block of 512 leaves its state there to nobody else."""
    engine = run(branching(retention))
    assert engine.worker.reads > 100


# -- mutants ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    """A mistake, and what to change to make it.

    Attributes:
        owner: Class with the function.
        name: Of the function.
        broken: What stands there instead, made from the right function.
        settings: In which it is soon noticed.
    """

    owner: type
    name: str
    broken: Callable[[Any], Any]
    settings: dict[str, Any]


def _without(what: str) -> Callable[[Any], Any]:
    """Leave a part of the move plan out."""

    def broken(right: Any) -> Any:
        def take_move_plan(self: Any, *args: Any) -> Any:
            plan = right(self, *args)
            if plan is not None:
                setattr(plan, what, [])
            return plan

        return take_move_plan

    return broken


def _unmoved(right: Any) -> Any:
    """The table is written, the bytes stay."""

    def move(self: SimulatedWorker, output: Any) -> None:
        kv, states = self.layout.kv.copy(), self.layout.states.copy()
        plan = getattr(output, "avmp_move_plan", None)
        right(self, output)
        for relocation in plan.relocations if plan else ():
            view, before = (
                (self.layout.kv, kv) if relocation.kind.tag == 0 else (self.layout.states, states)
            )
            view[relocation.target] = before[relocation.target]

    return move


def _reversed(right: Any) -> Any:
    """Relocations happen in the reverse order."""

    def move(self: SimulatedWorker, output: Any) -> None:
        plan = getattr(output, "avmp_move_plan", None)
        if plan is not None:
            plan.relocations.reverse()
        right(self, output)

    return move


def _kept_when_forgone(right: Any) -> Any:
    """The state is overwritten without a copy, and keeps its hash."""

    def forgo(self: StateManager, request_id: str) -> int:
        evict = StatePool._maybe_evict_cached_block
        StatePool._maybe_evict_cached_block = lambda *_: None  # type: ignore[method-assign]
        try:
            return right(self, request_id)
        finally:
            StatePool._maybe_evict_cached_block = evict  # type: ignore[method-assign]

    return forgo


def _one_page_off(right: Any) -> Any:
    """A state is saved one page before the position that it is published for."""

    def take_saves(self: StateManager) -> list[Save]:
        return [
            save._replace(tokens=save.tokens - 16) if save.tokens > 16 else save
            for save in right(self)
        ]

    return take_saves


MUTANTS = {
    "a state inside of a chunk is not saved": Mutant(
        AVMPBlockSpaceManager, "take_move_plan", _without("saves"), {"anywhere": True, **_KEPT}
    ),
    "a state inside of a chunk is saved elsewhere": Mutant(
        StateManager, "take_saves", _one_page_off, {"anywhere": True, **_KEPT}
    ),
    "a chunk that is never computed stays saved": Mutant(
        StateManager,
        "lose_chunk",
        lambda right: lambda self, name: self._saves.pop(name, None),
        {
            "anywhere": True,
            **_KEPT,
            "policy": "priority",
            "threshold": 20,
            "budget": 512,
            "memory_factor": 2,
            "max_model_len": 400,
            "state_cells": 16,
            "sequences": 12,
            "growth": 0,
        },
    ),
    "a copy is dropped": Mutant(
        AVMPBlockSpaceManager, "take_move_plan", _without("copies"), {"caching": True}
    ),
    "a relocation is dropped": Mutant(
        SimulatedWorker, "_move", _unmoved, {"memory_factor": 1.3, "batch": 1}
    ),
    "relocations are reversed": Mutant(
        SimulatedWorker, "_move", _reversed, {"memory_factor": 1.3, "batch": 1}
    ),
    "an evicted page keeps its hash": Mutant(
        AVMPBlockPool, "evict", lambda right: lambda *_: None, {"memory_factor": 2}
    ),
    "a forgone copy's state keeps its hash": Mutant(
        StateManager, "forgo", _kept_when_forgone, {"memory_factor": 1.0, "cut": 0}
    ),
    "full blocks are published wherever their state stands": Mutant(
        StatePool,
        "cache_full_blocks",
        lambda right: AVMPBlockPool.cache_full_blocks,
        {"checkpoints": True, "retention": None, "memory_factor": 6},
    ),
    "a chunk that is never computed stays published": Mutant(
        MovePlanMixin,
        "_preempt_request",
        lambda right: Scheduler._preempt_request,
        {
            "policy": "priority",
            "memory_factor": 2,
            "sequences": 8,
            "growth": 0,
            "caching": True,
            "spacing": 32,
            "retention": None,
        },
    ),
    "a session goes on from a state beyond its tokens": Mutant(
        StreamingSessions,
        "_update_request_as_session",
        lambda right: Scheduler._update_request_as_session,
        {"ahead": 1, "memory_factor": 6},
    ),
}


def noticed_after(mutant: Mutant, monkeypatch: Any, streams: int, **changes: Any) -> int | None:
    """Streams until a mistake is noticed, None if it is not."""
    right = getattr(mutant.owner, mutant.name)
    monkeypatch.setattr(mutant.owner, mutant.name, mutant.broken(right))
    for seed in range(streams):
        try:
            run(draw(seed, **mutant.settings, **changes))
        except (WrongContent, InvariantViolation, Stuck, RuntimeError):
            return seed + 1
    return None


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_is_seen_in_what_is_read(name: str, monkeypatch) -> None:
    """The control: without any of AVMP's own checks, the worker reads wrong content."""
    assert noticed_after(MUTANTS[name], monkeypatch, streams=200, verify=False)


@pytest.mark.parametrize("retention", [0, None, 1_024])
def test_verify_sees_a_state_that_is_published_elsewhere(retention, monkeypatch) -> None:
    """The control of ``verify``: it knows without looking at any content."""
    mutant = MUTANTS["full blocks are published wherever their state stands"]
    monkeypatch.setattr(mutant.owner, mutant.name, mutant.broken(None))
    stream = branching(retention)
    engine = Engine(stream.settings, avmp=True, check_published=False)
    with pytest.raises(InvariantViolation, match=r"is published for \d+ tokens and stands at \d+"):
        engine.run(stream)
