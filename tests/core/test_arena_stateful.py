"""Random calls on random arenas against a naive model, a shadow memory and a second arena."""

from __future__ import annotations

from arena_client import Client, ShadowMemory
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from avmp_vllm.core import Geometry, Kind, kind_of

#: Bytes of a page: tiny, odd, equal, and either kind much larger than the other.
UNITS = st.sampled_from([1, 3, 7, 8, 16, 24, 40, 64, 100, 128, 257])


class ArenaMachine(RuleBasedStateMachine):
    """Two equal arenas get the same calls; the first has the model and the memory."""

    @initialize(
        page=UNITS,
        block=UNITS,
        room=st.integers(0, 40),
        odd=st.integers(0, 300),
        batch=st.sampled_from([1, 2, 5, 128, 10**9]),
    )
    def make(self, page: int, block: int, room: int, odd: int, batch: int) -> None:
        null = -(-max(page, block) // block) * block
        size = null + page + block + room * max(page, block) + odd % (page + 1) + page
        geometry = Geometry(size, page, block)
        self.client = Client(geometry, batch, ShadowMemory(geometry))
        self.twin = Client(geometry, batch)

    def both(self, call: str, *args: object) -> object:
        """Make one call on both arenas; their answers must agree."""
        answers = [getattr(client, call)(*args) for client in (self.client, self.twin)]
        assert answers[0] == answers[1]
        return answers[0]

    def some(self, data: st.DataObject, handles: list[int]) -> list[int]:
        """Draw a run of handles: as a request's pages, or any."""
        start = data.draw(st.integers(0, len(handles) - 1))
        stop = data.draw(st.integers(start + 1, len(handles)))
        step = data.draw(st.sampled_from([1, 1, 2, 3]))
        run = handles[start:stop:step]
        return run[::-1] if data.draw(st.booleans()) else run

    @rule(pages=st.integers(0, 12), blocks=st.integers(0, 6))
    def allocate(self, pages: int, blocks: int) -> None:
        self.both("allocate", pages, blocks)

    @rule(kind=st.sampled_from(Kind), share=st.sampled_from([0.3, 0.7, 1.0]))
    def fill(self, kind: Kind, share: float) -> None:
        """Ask for much of what there is, which evicts and migrates."""
        count = int(self.client.arena.available(kind) * share)
        self.both("allocate", *((count, 0) if kind is Kind.KV else (0, count)))

    @rule(kind=st.sampled_from(Kind), beyond=st.integers(1, 5), other=st.integers(0, 3))
    def fail(self, kind: Kind, beyond: int, other: int) -> None:
        """Ask for more than there is."""
        count = self.client.arena.available(kind) + beyond
        asked = (count, other) if kind is Kind.KV else (other, count)
        assert self.both("allocate", *asked) is None

    @precondition(lambda self: self.client.model.live)
    @rule(data=st.data(), keep=st.booleans())
    def release(self, data: st.DataObject, keep: bool) -> None:
        self.both("release", self.some(data, list(self.client.model.live)), keep)

    @precondition(lambda self: self.client.model.live)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        for handle in self.some(data, list(self.client.model.live)):
            self.both("share", handle)

    @precondition(lambda self: self.client.model.cached)
    @rule(data=st.data())
    def revive(self, data: st.DataObject) -> None:
        for handle in self.some(data, list(self.client.model.cached)):
            self.both("revive", handle)

    @precondition(lambda self: self.client.model.cached)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        for handle in self.some(data, list(self.client.model.cached)):
            self.both("drop", handle)

    @rule()
    def step(self) -> None:
        self.both("step")

    @invariant()
    def holds(self) -> None:
        self.client.check()

    @invariant()
    def same(self) -> None:
        """The same calls give the same relocations, byte for byte."""
        assert self.client.snapshot() == self.twin.snapshot()
        assert repr(self.client.steps) == repr(self.twin.steps)
        assert self.client.arena.statistics == self.twin.arena.statistics

    def teardown(self) -> None:
        if not hasattr(self, "client"):
            return
        self.both("step")
        model = self.client.model
        for handle in list(model.cached):
            self.both("drop", handle)
        while model.live:
            self.both("release", list(model.live), False)
        self.client.check()
        geometry = self.client.arena.geometry
        for kind in Kind:
            count = geometry.limit(kind)
            taken = self.both("allocate", *((count, 0) if kind is Kind.KV else (0, count)))
            assert taken is not None, "the empty arena does not hold its limit of pages"
            assert all(kind_of(handle) is kind for handle in taken)
            self.both("release", taken, False)
        self.both("step")


TestArena = ArenaMachine.TestCase
TestArena.settings = settings(
    max_examples=300,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    derandomize=True,
)
