"""How much memory an elastic arena has: the scheduler's decisions against strict workers, no model.

Each worker here is the code that real ones run, over a driver that has only so many chunks: a step
that needs memory which does not exist raises `BudgetExceeded`, and one that touches what is not
mapped is caught by the driver.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "backing"))

from strict_memory import Stream, StrictMemory

from avmp_vllm.backing.elastic_buffer import BudgetExceeded, ElasticBuffer
from avmp_vllm.backing.elastic_pages import ElasticPages
from avmp_vllm.core import Arena, Extents, Geometry, Kind, MovePlan, kind_of
from avmp_vllm.core.extents import backed_bytes, budget_for, reserve_for
from avmp_vllm.engine.entry.config import ConfigError
from avmp_vllm.engine.layout.elastic import Elastic
from avmp_vllm.engine.layout.message import RESIZE, WorkerMemory
from avmp_vllm.engine.scheduler.memory import ArenaMemory

CHUNK = 32
GEOMETRY = Geometry(6_000, 24, 160)
#: One request: 6 pages and 2 blocks.
LEAST = budget_for(GEOMETRY.high_end, GEOMETRY.usable_bytes(6 * 24 + 2 * 160), CHUNK)


class Worker:
    """A rank: the real buffer over a strict driver, and a stream that runs behind."""

    def __init__(self, capacity: int, lag: int) -> None:
        self.memory = StrictMemory(capacity, CHUNK)
        self.stream = Stream(self.memory)
        self.lag = lag
        self.buffer = ElasticBuffer(self.memory, GEOMETRY.arena_bytes, CHUNK, GEOMETRY.high_end)
        low = -(-GEOMETRY.null_bytes // CHUNK)
        self.wanted = low * CHUNK
        assert self.buffer.set_budget(self.wanted) == self.wanted
        self.buffer.map(Extents(self.wanted, GEOMETRY.high_end))
        self.pages = ElasticPages(self.buffer, self, self.stream.record)

    def apply(self, plan: MovePlan) -> None:
        """Copies run on the stream, and touch what they name."""
        touched: set[int] = set()
        for move in plan.relocations:
            touched |= self.places(move.kind, move.source) | self.places(move.kind, move.target)
        self.stream.launch(touched)

    def places(self, kind: Kind, index: int) -> set[int]:
        """Addresses of the chunks under a page."""
        unit = GEOMETRY.unit(kind)
        ends = unit * index // CHUNK, -(-unit * (index + 1) // CHUNK)
        return {self.buffer.address + chunk * CHUNK for chunk in range(*ends)}

    def resize(self, size: int | None, plan: MovePlan | None, wait: bool) -> WorkerMemory:
        if plan is not None:
            self.pages.apply(plan)
        if size is not None:
            self.wanted = size
            self.buffer.set_budget(size)
            if wait:
                self.buffer.settle()
        return WorkerMemory(self.buffer.budget, self.wanted, self.buffer.mapped, 0, 0, ())


class Engine:
    """A scheduler and its ranks."""

    def __init__(self, capacities: tuple[int, ...], budget: int, slack: int, lag: int = 0) -> None:
        elastic = Elastic(GEOMETRY.arena_bytes, budget, CHUNK, slack, LEAST)
        self.arena = Arena(GEOMETRY, migration_batch=1, chunk_bytes=CHUNK)
        self.memory = ArenaMemory(self.arena, elastic, self.take_plan)
        self.workers = [Worker(capacity, lag) for capacity in capacities]
        self.calls: list[int | None] = []
        self.held: list[list[int]] = []
        self.cached: list[int] = []
        self.plans = 0
        self.memory.connect(self)

    def collective_rpc(self, method: str, *, args) -> list[WorkerMemory]:
        """As vLLM's executor does."""
        assert method == RESIZE
        self.calls.append(args[0])
        return [worker.resize(*args) for worker in self.workers]

    def take_plan(self) -> MovePlan | None:
        relocations, taken = self.arena.take_relocations(), self.arena.take_extents()
        if not (relocations or taken):
            return None
        self.plans += 1
        stages, after = taken or ((), None)
        return MovePlan(self.plans, relocations, stages=stages, after=after)

    def allocate(self, pages: int, blocks: int) -> bool:
        """As the coordinator does."""
        self.memory.make_room(pages, blocks)
        if not self.arena.fits(pages, blocks):
            return False
        self.held.append(self.arena.allocate(pages, blocks))
        return True

    def release(self, index: int, keep: bool) -> None:
        handles = self.held.pop(index)
        for kind in Kind:
            mine = [handle for handle in handles if kind_of(handle) is kind]
            if keep:
                self.arena.cache(mine)
            else:
                self.arena.release(mine)

    def step(self, schedule) -> None:
        """Schedule and launch a step; every page in use is touched."""
        memory, arena = self.memory, self.arena
        memory.begin_step(idle=not self.held)
        bound = memory.held_bytes + memory.elastic.slack_bytes + 2 * CHUNK
        assert memory.exists <= bound or arena.over_bytes
        schedule()
        plan = self.take_plan()
        memory.note_plan(plan)
        arena.verify()
        assert not memory.problems()
        used = [handle for handles in self.held for handle in handles]
        for worker in self.workers:
            if plan is not None:
                worker.pages.apply(plan)
            worker.buffer.poll()
            touched: set[int] = set()
            for handle in used:
                touched |= worker.places(kind_of(handle), arena.physical(handle))
            worker.stream.launch(touched)
            worker.stream.finish_all_but(worker.lag)
            assert worker.buffer.needed <= memory.exists or arena.over_bytes


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("capacities", [(300,), (300, 300), (90, 60)], ids=str)
def test_no_step_wants_memory_that_does_not_exist(capacities, lag):
    """Traffic that comes and goes, budgets that change, ranks that have less than was planned."""
    rng = random.Random(f"{capacities} {lag}")
    engine = Engine(capacities, 150 * CHUNK, 12 * CHUNK, lag)
    refused = over = lowered = 0

    def schedule():
        nonlocal refused
        for _ in range(rng.randint(0, 5)):
            if engine.held and rng.random() < busy:
                engine.release(rng.randrange(len(engine.held)), rng.random() < 0.4)
            else:
                refused += not engine.allocate(rng.randint(0, 12), rng.randint(0, 3))

    for turn in range(1_000):
        busy = 0.3 if turn // 100 % 2 else 0.65
        if rng.random() < 0.05:
            budget = rng.randint(LEAST, GEOMETRY.arena_bytes)
            lowered += budget < engine.memory.budget
            engine.memory.set_budget(budget)
            assert engine.memory.exists <= engine.memory.budget <= budget
        if rng.random() < 0.02:  # requests end, the prefix cache is dropped
            while engine.held:
                engine.release(0, keep=False)
            for kind in Kind:
                for handle in engine.arena.cached_handles(kind):
                    engine.arena.drop(handle)
            engine.memory.rest()
            assert engine.memory.exists <= GEOMETRY.null_bytes + 2 * CHUNK
            assert {worker.buffer.budget for worker in engine.workers} == {engine.memory.exists}
        engine.step(schedule)
        over += engine.arena.over_bytes > 0
    assert refused > 100
    assert lowered > 5
    assert over > 5
    assert sum(engine.arena.statistics.relocations.values()) > 100
    if min(capacities) < 100:
        assert max(w.buffer.handles for w in engine.workers) <= min(capacities)
    if lag:
        assert any(worker.buffer.statistics.fence_waits for worker in engine.workers)


def test_control_memory_that_is_not_created_is_missed(monkeypatch):
    """A scheduler that counts on memory without having it made is caught by the workers."""
    monkeypatch.setattr(
        ArenaMemory, "_create", lambda self, target: setattr(self, "exists", target)
    )
    with pytest.raises(BudgetExceeded):
        test_no_step_wants_memory_that_does_not_exist((300,), 0)


def test_steady_traffic_makes_no_call():
    """Once it is up, what breathes within the slack asks nothing of the driver."""
    engine = Engine((300,), 150 * CHUNK, 16 * CHUNK)
    rng = random.Random(1)

    def schedule():
        while len(engine.held) < 8 and engine.allocate(rng.randint(2, 4), 1):
            pass
        engine.release(rng.randrange(len(engine.held)), keep=False)

    for _ in range(300):
        engine.step(schedule)
    engine.calls.clear()
    before = dict(engine.workers[0].buffer.statistics.calls)
    for _ in range(200):
        engine.step(schedule)
    assert engine.calls == []
    after = engine.workers[0].buffer.statistics.calls
    assert after["create"] == before["create"]
    assert after["release"] == before["release"]


def test_who_waits_has_no_memory_created():
    """What does not fit beside the others is asked for at every step, and gives no calls."""
    engine = Engine((300,), 150 * CHUNK, 4 * CHUNK)
    assert engine.allocate(60, 2)
    engine.step(lambda: None)
    engine.calls.clear()
    for _ in range(20):
        engine.step(lambda: engine.allocate(150, 0))
    assert len(engine.held) == 1
    assert engine.calls == []


def test_one_request_runs_within_the_least_budget():
    """Whatever is to be kept free beside others, and after a rest."""
    engine = Engine((300,), LEAST, 4 * CHUNK)
    engine.memory.headroom = 50
    for _ in range(3):
        assert engine.allocate(6, 2)
        engine.step(lambda: None)
        assert not engine.allocate(1, 0)
        engine.step(lambda: engine.release(0, keep=False))
        engine.step(lambda: None)


def test_a_budget_is_raised_again_without_a_restart():
    """Lowered by hand and by a rank that had no more, then raised."""
    engine = Engine((300, 60), 150 * CHUNK, 4 * CHUNK)
    while engine.allocate(3, 1):
        pass
    assert engine.memory.budget == engine.memory.exists == 60 * CHUNK
    assert {worker.buffer.handles for worker in engine.workers} == {60}
    many = len(engine.held)
    engine.workers[1].memory.capacity = 300
    engine.memory.set_budget(100 * CHUNK)
    while engine.allocate(3, 1):
        pass
    assert len(engine.held) > many + 3
    engine.step(lambda: None)
    engine.memory.set_budget(LEAST)
    assert engine.arena.over_bytes > 0
    assert not engine.allocate(1, 0)
    while engine.arena.over_bytes:
        engine.step(lambda: engine.release(0, keep=True))
    engine.step(lambda: None)  # by now the copies of the last one have ended
    assert {worker.buffer.budget for worker in engine.workers} <= {LEAST}


@pytest.mark.parametrize("budget", [LEAST - CHUNK, 1, GEOMETRY.arena_bytes + 2 * CHUNK])
def test_budgets_that_cannot_be(budget):
    """Named with both ends."""
    engine = Engine((300,), 150 * CHUNK, 4 * CHUNK)
    with pytest.raises(ConfigError, match=rf"needs {LEAST} bytes, .* addresses for 6016"):
        engine.memory.set_budget(budget)


def test_the_least_budget_holds_one_request_wherever_it_lies():
    """And a chunk less need not."""
    reserve = reserve_for(GEOMETRY.high_end, LEAST, CHUNK)
    assert GEOMETRY.fits(6, 2, reserve)
    assert not GEOMETRY.fits(6, 2, reserve_for(GEOMETRY.high_end, LEAST - CHUNK, CHUNK))
    for gap in range(-100, GEOMETRY.high_end):
        budget = budget_for(GEOMETRY.high_end, gap, CHUNK)
        assert reserve_for(GEOMETRY.high_end, budget, CHUNK) <= max(gap, 0)
        if budget > CHUNK:
            assert reserve_for(GEOMETRY.high_end, budget - CHUNK, CHUNK) > gap


def test_a_system_without_memory_waits_for_it():
    """Nothing can be created at first: the request waits, and runs once there is memory."""
    engine = Engine((7,), 150 * CHUNK, 4 * CHUNK)
    assert not engine.allocate(6, 2)
    assert engine.memory.budget == LEAST, "a budget in which no request runs would block for ever"
    engine.step(lambda: None)
    assert not engine.allocate(6, 2)
    engine.workers[0].memory.capacity = 300
    engine.step(lambda: None)
    assert engine.allocate(6, 2)
    backed = backed_bytes(engine.arena.extents, GEOMETRY.high_end, CHUNK)
    assert backed <= engine.memory.exists <= LEAST
