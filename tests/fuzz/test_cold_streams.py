"""Conversations whose states are encoded and decoded between their turns, with every read checked.

In the simulated worker encoding loses nothing, so whatever is read must be what was written.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from fuzz_engine import Engine
from fuzz_stream import Add, Settings, Stream
from fuzz_worker import VOCABULARY, SimulatedWorker, WrongContent

from avmp_vllm.core import InvariantViolation, MovePlan, Recode
from avmp_vllm.core.cold import ColdBlocks, half_of, slot_of
from avmp_vllm.engine.scheduler.cold_states import ColdStates

#: States as large as twenty pages, room for a few of them, pages that move.
_TIGHT = {
    "state_cells": 600,
    "memory_factor": 2.2,
    "max_model_len": 512,
    "budget": 256,
    "sequences": 3,
    "spacing": 128,
}


def conversations(seed: int, **changes: Any) -> Stream:
    """Six conversations that take turns; each prompt goes on from the one before it.

    Now and then somebody else asks the same at the same time, or a little later.
    """
    rng = random.Random(seed)
    settings = Settings(cold="int12", **{**_TIGHT, "ahead": seed % 2, **changes})
    prompts: list[tuple[int, ...]] = [()] * 6
    steps: list[list[object]] = []
    for turn in range(36):
        one = rng.randrange(len(prompts))
        more = rng.randrange(20, 60)
        prompt = prompts[one] + tuple(rng.randint(1, VOCABULARY) for _ in range(more))
        prompts[one] = prompt[: settings.max_model_len - 80]
        steps.append([Add(f"r{turn}", prompts[one], rng.choice((1, 5, 40)))])
        steps += [[] for _ in range(rng.randrange(4))]
        if rng.random() < 0.3:
            steps[-1].append(Add(f"again{turn}", prompts[one], rng.choice((1, 5, 40))))
    return Stream(settings, steps)


def serve(streams: int, **changes: Any) -> list[ColdStates]:
    """Run streams, with all checks but AVMP's own unless asked; what each has encoded."""
    found = []
    for seed in range(streams):
        stream = conversations(seed, **changes)
        engine = Engine(stream.settings, avmp=True)
        try:
            engine.run(stream)
            engine.check_answers()
        except Exception as error:
            error.add_note(f"stream {seed}: {stream.settings}")
            raise
        found.append(engine.scheduler.kv_cache_manager.cold)
    return found


def test_what_is_decoded_is_what_was_encoded() -> None:
    """Layers that cut, and those that save a state inside of a chunk."""
    for anywhere in (False, True):
        cold = serve(12, anywhere=anywhere)
        assert sum(one.encoded for one in cold) > 200
        assert sum(one.decoded for one in cold) > 50


def _last(right: Any) -> Any:
    """States are encoded and decoded when everything has moved."""

    def in_order(self: MovePlan) -> Any:
        yield self.relocations, None
        for recode in self.recodes:
            yield [], recode

    return in_order


def _other_half(right: Any) -> Any:
    """A state is decoded from its neighbour."""

    def note(self: ColdStates, state: int, slot: int, encode: bool) -> None:
        block, half = half_of(slot)
        right(self, state, slot if encode else slot_of(block, 1 - half), encode)

    return note


def _never_open(right: Any) -> Any:
    """A half that is free again is taken for the other one."""

    def place(self: ColdBlocks) -> int | None:
        slot = right(self)
        if slot is None:
            return None
        block, _ = half_of(slot)
        return slot_of(block, 1)

    return place


def _not_decoded(right: Any) -> Any:
    """The worker leaves a new block as it is."""

    def recode(self: SimulatedWorker, recode: Recode) -> None:
        if recode.encode:
            right(self, recode)

    return recode


MUTANTS: dict[str, tuple[type, str, Callable[[Any], Any]]] = {
    "encoded when everything has moved": (MovePlan, "in_order", _last),
    "decoded from its neighbour": (ColdStates, "_note", _other_half),
    "placed over its neighbour": (ColdBlocks, "place", _never_open),
    "not decoded": (SimulatedWorker, "_recode", _not_decoded),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_control_a_mistake_is_seen_in_what_is_read(name, monkeypatch) -> None:
    """Without any of AVMP's own checks."""
    owner, function, broken = MUTANTS[name]
    monkeypatch.setattr(owner, function, broken(getattr(owner, function)))
    with pytest.raises((WrongContent, AssertionError, KeyError)):
        serve(40, verify=False)


def test_control_verify_sees_two_states_of_one_prefix(monkeypatch) -> None:
    """Two requests reach the same prefix, and the first one's state is encoded before that."""
    monkeypatch.setattr(ColdStates, "of", lambda self, prefix: None)
    with pytest.raises(InvariantViolation, match="not found by their prefixes"):
        serve(40)
