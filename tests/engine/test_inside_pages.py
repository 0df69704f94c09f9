"""Steps that need nothing: sparing them changes no schedule, plan, hit or published state.

Each stream runs twice over vLLM's scheduler, with and without what spares them.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from test_manager import Driver, arena_for, prompt
from vllm.v1.request import RequestStatus

from avmp_vllm.engine.layout.message import PLAN
from avmp_vllm.engine.scheduler.inside_pages import InsidePages
from avmp_vllm.engine.scheduler.scheduler import AVMPAsyncScheduler, AVMPScheduler
from avmp_vllm.engine.scheduler.state_manager import StateManager

#: (scheduler, steps scheduled ahead, prefix caching)
WAYS = [
    pytest.param(AVMPScheduler, 0, True, id="cache"),
    pytest.param(AVMPScheduler, 0, False, id="no-cache"),
    pytest.param(AVMPAsyncScheduler, 1, True, id="ahead"),
    pytest.param(AVMPAsyncScheduler, 2, True, id="two-ahead"),
]


def stream(driver: Driver, seed: int) -> list[Any]:
    """Conversations that go on, preemptions, aborts and resets; what every step did."""
    rng = random.Random(seed)
    shared = prompt("shared", 160)
    requests, did = [], []

    def step() -> None:
        output = driver.step()
        published = [
            sorted(block.block_id for block in pool.blocks if block.block_hash is not None)
            for pool in driver.manager.coordinator.pools.values()
        ]
        plan = getattr(output, PLAN)
        did.append((dict(output.num_scheduled_tokens), plan, published))

    for index in range(24):
        name = f"r{index}"
        own = prompt(name, rng.choice([3, 40, 130, 400]))
        before = (shared if index % 3 == 0 else []) + own
        if index % 4 == 3:  # the next turn of an earlier conversation
            past = requests[rng.randrange(len(requests))]
            before = [*past.all_token_ids, *own[:40]][:700]
        requests.append(driver.add(name, before, rng.choice([1, 30, 120, 200])))
        for _ in range(rng.randint(0, 25)):
            step()
        if index % 7 == 6:
            victims = [request.request_id for request in driver.scheduler.running][-1:]
            driver.scheduler.finish_requests(victims, RequestStatus.FINISHED_ABORTED)
        if index == 15:
            driver.scheduler.reset_prefix_cache(reset_running_requests=True)
    for _ in range(5_000):
        if not driver.scheduler.has_unfinished_requests():
            break
        step()
    driver.check_empty()
    return [*did, driver.hits]


def run(model: str, spare: bool, scheduler: type, ahead: int, caching: bool, seed: int) -> Any:
    driver = Driver(model, arena_for(2.0), caching, scheduler, ahead=ahead)
    assert driver.manager._inside_pages is not None
    if not spare:
        driver.manager._inside_pages = None
    return stream(driver, seed), driver


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("scheduler", "ahead", "caching"), WAYS)
def test_sparing_steps_changes_nothing(
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    scheduler: type,
    ahead: int,
    caching: bool,
    seed: int,
) -> None:
    """Under pressure: capacity migrates and pages move. Most steps of an answer are spared."""
    spared = [0, 0]
    goes_on = InsidePages.goes_on

    def counting(self: InsidePages, request: Any) -> bool:
        found = goes_on(self, request)
        spared[found] += 1
        return found

    monkeypatch.setattr(InsidePages, "goes_on", counting)
    did, driver = run(model, True, scheduler, ahead, caching, seed)
    expected, _ = run(model, False, scheduler, ahead, caching, seed)
    assert did == expected
    assert spared[True] > 3 * spared[False]
    statistics = driver.arena.statistics
    assert not caching or sum(statistics.migrations.values()) > 0
    assert not caching or sum(statistics.relocations.values()) > 0


@pytest.mark.parametrize(
    ("scheduler", "ahead", "caching"), [WAYS[0].values, WAYS[2].values], ids=["cache", "ahead"]
)
def test_control_a_state_that_is_not_let_go_of_is_seen(
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    scheduler: type,
    ahead: int,
    caching: bool,
) -> None:
    """Without the question whether anything is pending, old states stay for another page."""

    def careless(self: StateManager, request_id: str, tokens: int) -> Any:
        return self.req_to_blocks[request_id][-1]

    expected, _ = run(model, False, scheduler, ahead, caching, 0)
    monkeypatch.setattr(StateManager, "settled", careless)
    did, _ = run(model, True, scheduler, ahead, caching, 0)
    assert did != expected


def test_control_a_page_that_begins_is_seen(
    model: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A token that begins a page needs one."""
    note = InsidePages.note

    def longer(self: InsidePages, request: Any, tokens: int) -> None:
        note(self, request, tokens)
        if request.request_id in self._stretches:
            self._stretches[request.request_id].end += 8

    monkeypatch.setattr(InsidePages, "note", longer)
    with pytest.raises((AssertionError, KeyError, IndexError)):
        run(model, True, AVMPScheduler, 0, True, 0)
