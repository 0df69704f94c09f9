"""An arena whose gap has no memory: budgets that change, refusals, and what each plan needs."""

from __future__ import annotations

import random

import pytest
from arena_client import Damage
from elastic_client import ElasticClient, Fault, Spoil
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from avmp_vllm.core import (
    AllocationFailure,
    Arena,
    ArenaTooSmall,
    Extents,
    Geometry,
    InvariantViolation,
    Kind,
    Stage,
)
from avmp_vllm.core.extents import ExtentLog, backed_bytes, reserve_for

UNITS = st.sampled_from([1, 3, 7, 8, 16, 24, 40, 64, 100, 128, 257])
CHUNKS = st.sampled_from([1, 5, 16, 64, 200, 1000])


def sized(page: int, block: int, room: int, odd: int = 0) -> Geometry:
    """An arena with room for some pages and blocks."""
    null = -(-max(page, block) // block) * block
    return Geometry(
        null + page + block + room * max(page, block) + odd % (page + 1) + page, page, block
    )


def least_budget(client: ElasticClient) -> int:
    """Chunks that leave at least the null bytes."""
    geometry, chunk = client.arena.geometry, client.worker.chunk
    low = geometry.null_blocks * geometry.block_bytes + client.whole * chunk - client.high_end
    return -(-low // chunk) + 1


class ElasticMachine(RuleBasedStateMachine):
    """Calls on the arena and changes of its budget, over a worker that faults."""

    @initialize(
        page=UNITS,
        block=UNITS,
        room=st.integers(0, 40),
        odd=st.integers(0, 300),
        batch=st.sampled_from([1, 2, 5, 128, 10**9]),
        chunk=CHUNKS,
    )
    def make(self, page: int, block: int, room: int, odd: int, batch: int, chunk: int) -> None:
        self.client = ElasticClient(sized(page, block, room, odd), batch, chunk)

    def some(self, data: st.DataObject, handles: list[int]) -> list[int]:
        """Draw a run of handles."""
        start = data.draw(st.integers(0, len(handles) - 1))
        stop = data.draw(st.integers(start + 1, len(handles)))
        return handles[start : stop : data.draw(st.sampled_from([1, 1, 2, 3]))]

    @rule(pages=st.integers(0, 12), blocks=st.integers(0, 6))
    def allocate(self, pages: int, blocks: int) -> None:
        self.client.allocate(pages, blocks)

    @rule(kind=st.sampled_from(Kind), share=st.sampled_from([0.3, 0.7, 1.0]))
    def fill(self, kind: Kind, share: float) -> None:
        """Ask for much of what there is."""
        count = int(self.client.arena.available(kind) * share)
        self.client.allocate(*((count, 0) if kind is Kind.KV else (0, count)))

    @rule(kind=st.sampled_from(Kind), beyond=st.integers(1, 5))
    def fail(self, kind: Kind, beyond: int) -> None:
        """Ask for more than there is."""
        count = self.client.arena.available(kind) + beyond
        assert self.client.allocate(*((count, 0) if kind is Kind.KV else (0, count))) is None

    @precondition(lambda self: self.client.model.live)
    @rule(data=st.data(), keep=st.booleans())
    def release(self, data: st.DataObject, keep: bool) -> None:
        self.client.release(self.some(data, list(self.client.model.live)), keep)

    @precondition(lambda self: self.client.model.cached)
    @rule(data=st.data())
    def revive(self, data: st.DataObject) -> None:
        for handle in self.some(data, list(self.client.model.cached)):
            self.client.revive(handle)

    @rule(share=st.floats(0, 1))
    def set_budget(self, share: float) -> None:
        least = least_budget(self.client)
        if least <= self.client.whole:
            self.client.set_budget(least + int(share * (self.client.whole - least)))

    @rule(slack=st.sampled_from([0, 0, 10, 500]))
    def trim(self, slack: int) -> None:
        self.client.trim(slack)

    @rule()
    def step(self) -> None:
        self.client.step()

    @invariant()
    def holds(self) -> None:
        client = self.client
        client.check()
        needed = len(client.worker.chunks(client.arena.extents))
        assert needed <= client.budget or client.arena.over_bytes
        backed = backed_bytes(client.arena.extents, client.high_end, client.worker.chunk)
        assert backed == needed * client.worker.chunk

    def teardown(self) -> None:
        """Everything goes: what stays are the null bytes."""
        if not hasattr(self, "client"):
            return
        client = self.client
        client.step()
        for handle in list(client.model.cached):
            client.drop(handle)
        while client.model.live:
            client.release(list(client.model.live), False)
        client.trim()
        client.step()
        null = client.arena.geometry.null_blocks * client.arena.geometry.block_bytes
        assert len(client.worker.backed) * client.worker.chunk < null + 3 * client.worker.chunk
        client.check()


TestElastic = ElasticMachine.TestCase
TestElastic.settings = settings(
    max_examples=250,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    derandomize=True,
)


def churn(client: ElasticClient, rng: random.Random, operations: int, calls: int = 12) -> int:
    """Requests that come, grow and go under budgets that change; how many budgets there were."""
    model, requests, budgets = client.model, [], 0
    least = least_budget(client)
    longest = 4
    for turn in range(operations):
        what = rng.random()
        if what < 0.40:
            handles = client.allocate(rng.randint(0, longest), rng.randint(0, 2))
            if handles:
                requests.append(handles)
        elif what < 0.48 and requests:
            handles = client.allocate(rng.randint(1, 4), 0)
            if handles:
                rng.choice(requests).extend(handles)
        elif what < 0.54 and model.cached:
            revived = rng.sample(list(model.cached), rng.randint(1, min(5, len(model.cached))))
            for handle in revived:
                client.revive(handle)
            requests.append(revived)
        elif what < 0.58:
            budgets += 1
            client.set_budget(rng.randint(least, client.whole))
        elif requests:
            handles = requests.pop(rng.randrange(len(requests)))
            rng.shuffle(handles)
            client.release(handles, keep=rng.random() < 0.5)
        needed = len(client.worker.chunks(client.arena.extents))
        assert needed <= client.budget or client.arena.over_bytes
        if rng.random() < 1 / calls:
            client.step()
            if rng.random() < 0.5:
                client.trim(rng.choice([0, 0, 300]))
            longest = rng.choice([1, 4, 30, 60])
        if turn % 97 == 0:
            client.check()
    client.step()
    client.check()
    return budgets


@pytest.mark.parametrize(
    ("page", "block", "size", "chunk"),
    [
        (64, 456, 16_000, 512),
        (512, 96, 20_000, 256),
        (33, 700, 15_011, 1_000),
        (128, 128, 9_000, 64),
    ],
)
def test_refusals_are_exact_and_the_budget_holds(
    page: int, block: int, size: int, chunk: int, pytestconfig: pytest.Config
) -> None:
    """Each operation is compared with the model, each step with what the worker has."""
    client = ElasticClient(Geometry(size, page, block), 1, chunk)
    rng = random.Random(f"elastic {page} {block}")
    budgets = churn(client, rng, pytestconfig.getoption("operations") // 4)
    assert budgets > 50
    statistics = client.arena.statistics
    for kind in Kind:
        assert statistics.failures[kind] > 10
        assert statistics.migrations[kind] > 2
        assert statistics.relocations[kind] > 10
        assert statistics.evictions[kind] > 10


def both_reach_far(client: ElasticClient) -> None:
    """Within one step the blocks take nearly all of the budget, give it back, and the pages do."""
    client.set_budget(client.whole // 2)
    client.step()
    blocks = client.allocate(0, client.arena.available(Kind.SSM))
    assert blocks
    client.release(blocks[1:], keep=False)
    assert client.allocate(client.arena.available(Kind.KV) - 3, 0)
    client.step()


def test_a_plan_whose_bands_reached_too_far_has_stages() -> None:
    client = ElasticClient(Geometry(20_000, 100, 1_000), 1, 500)
    both_reach_far(client)
    assert client.staged == 1
    client.check()


def test_control_one_stage_for_both_is_noticed() -> None:
    """The furthest reach of both bands at once is more than the budget."""

    def merge(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        extents = stages[0].extents
        for stage in stages[1:]:
            extents = extents.union(stage.extents)
        return (Stage(0, extents),)

    client = ElasticClient(Geometry(20_000, 100, 1_000), 1, 500, spoil=merge)
    with pytest.raises(AssertionError, match="more backed than exists"):
        both_reach_far(client)


def only_the_last(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """The worker backs what the last stage needs, for all relocations."""
    return (Stage(0, stages[-1].extents),)


def as_afterwards(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """The worker backs next to nothing before the plan."""
    least = stages[0].extents
    return (Stage(0, Extents(1, 10**9).common(least)),)


@pytest.mark.parametrize("spoil", [only_the_last, as_afterwards])
def test_control_memory_that_comes_too_late_is_noticed(spoil: Spoil) -> None:
    client = ElasticClient(Geometry(16_000, 64, 456), 1, 512, spoil=spoil)
    with pytest.raises(
        (Fault, Damage, AssertionError), match=r"not backed|lost the bytes|more back"
    ):
        churn(client, random.Random(5), 4_000, calls=40)


def test_control_a_gap_below_the_reserve_is_noticed() -> None:
    arena = Arena(Geometry(16_000, 64, 456), chunk_bytes=512)
    arena.set_reserve(6_000)
    arena.allocate(pages=arena.available(Kind.KV))
    arena.verify()
    arena._bands[Kind.SSM].grow(1)
    with pytest.raises(InvariantViolation, match="is below the reserve 6000"):
        arena.verify()


def test_over_a_lowered_budget_free_pages_are_refused() -> None:
    """Pages that a request gives back are not handed out again until the budget holds."""
    client = ElasticClient(Geometry(16_000, 64, 456), 1, 512)
    pages = client.allocate(200, 0)
    assert pages
    client.set_budget(12)
    assert client.arena.over_bytes > 0
    client.release(pages[:10], keep=False)
    assert client.arena.free(Kind.KV) == 10
    assert client.allocate(1, 0) is None
    assert client.allocate(0, 0) == []
    client.release(pages[10:150], keep=True)
    assert client.allocate(1, 0)
    assert not client.arena.over_bytes
    client.step()
    client.set_budget(client.whole)
    assert client.allocate(100, 0)
    client.step()
    client.check()


def test_a_fixed_arena_has_no_reserve() -> None:
    arena = Arena(Geometry(16_000, 64, 456))
    assert arena.take_extents() is None
    with pytest.raises(ValueError, match="without chunk_bytes"):
        arena.set_reserve(1)


def test_reserves_that_cannot_be_are_refused() -> None:
    arena = Arena(Geometry(16_000, 64, 456), chunk_bytes=512)
    with pytest.raises(ValueError, match="-1"):
        arena.set_reserve(-1)
    with pytest.raises(ArenaTooSmall, match="leaves no null bytes"):
        arena.set_reserve(15_600)
    with pytest.raises(ValueError, match="chunk_bytes must be at least 1"):
        Arena(Geometry(16_000, 64, 456), chunk_bytes=0)
    arena.set_reserve(15_500)  # 16,000 less the null bytes, and no room for a page
    with pytest.raises(AllocationFailure, match="0 more pages or 0 more blocks"):
        arena.allocate(1, 0)


def test_growth_is_by_what_is_asked_and_not_by_the_bands_chunk() -> None:
    """A page of a Jamba 3B arena takes one chunk of 2 MiB, where a fixed arena takes 16 of them."""
    geometry, chunk = Geometry(1 << 30, 16_384, 9_318_400), 2 << 20
    held = {}
    for chunk_bytes in (None, chunk):
        arena = Arena(geometry, chunk_bytes=chunk_bytes)
        idle = backed_bytes(arena.extents, geometry.high_end, chunk)
        arena.allocate(1, 0)
        held[chunk_bytes] = backed_bytes(arena.extents, geometry.high_end, chunk) - idle
        # The rest of the chunk is there for the next pages.
        assert arena.free(Kind.KV) >= (chunk_bytes is None) * 63
    assert held[chunk] <= 2 * chunk
    arena.allocate(arena.free(Kind.KV), 0)
    assert backed_bytes(arena.extents, geometry.high_end, chunk) - idle == held[chunk]


def test_nothing_to_do_is_no_plan() -> None:
    arena = Arena(Geometry(16_000, 64, 456), chunk_bytes=512)
    first = arena.take_extents()
    assert first is not None
    assert first == ((Stage(0, arena.extents),), arena.extents)
    assert arena.take_extents() is None
    handles = arena.allocate(1, 0)
    taken = arena.take_extents()
    assert taken is not None
    assert taken[1] == arena.extents
    arena.release(handles)
    assert arena.take_extents() is None, "the band still has the page"
    assert arena.trim() > 0
    taken = arena.take_extents()
    assert taken is not None
    assert taken[0][0].extents != taken[1]
    # Out and back within one step: nothing is new afterwards, but the step touches the bytes.
    arena.release(arena.allocate(1, 0))
    arena.trim()
    taken = arena.take_extents()
    assert taken is not None
    assert taken[1] == arena.extents
    assert taken[0][0].extents.high_begin < taken[1].high_begin
    assert arena.trim() == 0


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_the_reserve_of_a_budget_keeps_it_and_no_smaller_one_does(chunk: int) -> None:
    """Every pair of ends that leaves the reserve is within the budget, by trying all."""
    high_end = 230

    def most(reserve: int) -> int:
        return max(
            backed_bytes(Extents(low, begin), high_end, chunk)
            for low in range(high_end - reserve + 1)
            for begin in range(low + reserve, min(low + reserve + 2 * chunk, high_end) + 1)
        )

    for budget in range(3 * chunk, 230, 11 * chunk):
        reserve = reserve_for(high_end, budget, chunk)
        assert most(reserve) <= budget < most(reserve - 1)
    assert reserve_for(high_end, 250, chunk) == 0


def test_the_log_keeps_the_furthest_reach() -> None:
    log = ExtentLog(Extents(10, 90))
    log.grown(Extents(30, 90), 0, reserve=20)
    log.grown(Extents(15, 60), 2, reserve=20)
    assert log.take(Extents(12, 80)) == ((Stage(0, Extents(30, 60)),), Extents(12, 80))
    log.grown(Extents(60, 80), 1, reserve=20)
    log.grown(Extents(20, 50), 3, reserve=20)
    stages = (Stage(0, Extents(60, 80)), Stage(3, Extents(20, 50)))
    assert log.take(Extents(20, 50)) == (stages, Extents(20, 50))
    assert log.take(Extents(20, 50)) is None
