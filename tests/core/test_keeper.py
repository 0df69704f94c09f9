"""Random requests on a keeper against a naive one, which computes every worth anew.

The client does what the engine does (``avmp_vllm/engine/scheduler/checkpoints.py``), without an
engine. The model knows prefixes by their pages, and what has happened to each state. Controls at
the end break the keeper in the ways that a careless change could; each must be noticed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from avmp_vllm.core import keeper as keeper_module
from avmp_vllm.core.hazards import EDGES, bin_of, gittins_indices
from avmp_vllm.core.keeper import (
    BEFORE_TAIL,
    COMMON,
    COPY_TOKENS,
    CUT_TOKENS,
    FAIR_SHARE,
    LEAST_REMEMBERED,
    LIFETIMES,
    LONGER,
    PRICE_HALF_LIFE,
    PRICE_STEP,
    REMEMBERED,
    SLACK,
    Counts,
    Origin,
    Record,
    StateKeeper,
    class_of,
)
from avmp_vllm.core.prefix_tree import Node, PrefixTree, Tidied
from avmp_vllm.core.reuse import Class, ReuseRates

#: Tokens of a page, and bytes of each kind: a state weighs as much as some pages.
PAGE, PAGE_BYTES, STATE_BYTES = 16, 100, 450
#: Page numbers of a prefix, by which the model knows it.
Pages = tuple[int, ...]


def new_keeper(cut_tokens: int = CUT_TOKENS) -> StateKeeper:
    """A keeper that keeps nothing yet."""
    return StateKeeper(PAGE_BYTES, STATE_BYTES, PAGE, cut_tokens)


@dataclass
class Known:
    """What the model knows of a state, kept or gone.

    Attributes:
        record: The keeper's record of the same state.
        since: Request at which its age began.
        cls: The class that it was in since then.
        share: Of its bytes that it takes.
    """

    record: Record
    origin: Origin
    turns: int
    position: int
    since: int
    cls: Class
    hits: int = 0
    superseded: bool = False
    share: float = 1.0

    def begin(self, now: int) -> None:
        """Its age begins now."""
        cls = class_of(self.origin, self.turns, self.position, self.hits, self.superseded)
        self.since, self.cls = now, cls


@dataclass
class Prefix:
    """What the model knows of a prefix that is needed."""

    node: Node
    known: Known | None = None
    users: int = 0


@dataclass
class Client:
    """Makes calls on a keeper and on the model, and compares them.

    Attributes:
        prefixes: Those that are needed, and the empty one.
        gone: States that are remembered, by key, the latest last.
        waited: Requests that states have waited, by class and bin.
        reuses: Uses by class and bin.
        withdrawn: States that were given up, but not for room.
        inherited: How often a state took the prospects of one that was given up.
        forgotten: How many states are remembered no more, because of others.
    """

    keeper: StateKeeper = field(default_factory=lambda: new_keeper())
    prefixes: dict[Pages, Prefix] = field(default_factory=dict)
    gone: dict[int, Known] = field(default_factory=dict)
    waited: Counter[tuple[Class, int]] = field(default_factory=Counter)
    reuses: Counter[tuple[Class, int]] = field(default_factory=Counter)
    withdrawn: int = 0
    inherited: int = 0
    forgotten: int = 0
    now: int = 0
    price: float = 0.0
    lifetime: float = 0.0
    trace: list[object] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.keeper.rates._growth = 1.0  # so that the model can count
        self.prefixes[()] = Prefix(self.keeper.tree.root)
        self.counts = {origin: Counts() for origin in Origin}
        self._pages = 0
        self._keys = 0

    # -- requests ----------------------------------------------------------------------------------

    def tick(self, count: int = 1) -> None:
        """So many requests come that use nothing."""
        for _ in range(count):
            self.keeper.tick()
        for known in self.alive():
            first, last = bin_of(self.now - known.since), bin_of(self.now + count - known.since)
            for age_bin in range(first, last + 1):
                begin = max(EDGES[age_bin], self.now - known.since)
                end = self.now + count - known.since
                if age_bin + 1 < len(EDGES):
                    end = min(end, EDGES[age_bin + 1])
                self.waited[known.cls, age_bin] += end - begin
        self.now += count
        self.price *= 2.0 ** (-count / PRICE_HALF_LIFE)
        self.lifetime += count * LONGER

    def begin(self, pages: Pages) -> None:
        """A request comes and builds upon a prefix."""
        self.tick()
        prefix = self.prefixes[pages]
        if prefix.known is not None:
            self.counts[prefix.known.origin].used += 1
            self._use(prefix.known)
        self.step_on(pages)

    def step_on(self, pages: Pages) -> None:
        """A request builds upon a prefix."""
        self.prefixes[pages].users += 1
        self.keeper.step_on(self.prefixes[pages].node)

    def miss(self, key: int) -> None:
        """A request would have used a state that is gone."""
        known = self.gone[key]
        assert self.keeper.gone(key) is known.record
        self.counts[known.origin].missed += 1
        self._use(known)

    def _use(self, known: Known) -> None:
        self.keeper.used(known.record)
        # In the request before, or now if it was made by the same one.
        self.reuses[known.cls, bin_of(max(self.now - known.since - 1, 0))] += 1
        known.hits += 1
        known.begin(self.now)

    def supersede(self, known: Known) -> None:
        """The conversation of a state, kept or gone, has a newer one."""
        self.keeper.supersede(known.record)
        if not known.superseded:
            known.superseded = True
            known.begin(self.now)

    def leave(self, pages: Pages) -> None:
        """A request builds upon a prefix no more."""
        self.prefixes[pages].users -= 1
        self._compare_loss(pages, self.keeper.step_off(self.prefixes[pages].node))

    # -- states ------------------------------------------------------------------------------------

    def record(
        self, origin: Origin, turns: int, key: int | None = None, position: int = 0
    ) -> Known:
        """A state is decided about; one that is gone may come back."""
        if key is None:
            key, self._keys = self._keys, self._keys + 1
        record = self.keeper.record(key, origin, turns, position)
        cls = class_of(origin, turns, position)
        known = Known(record, origin, turns, position, self.now, cls)
        self.counts[origin].refused += 1
        self._remember(known)
        return known

    def _remember(self, known: Known) -> None:
        """A state is gone, or was not made yet; the oldest of too many are forgotten."""
        key: int = known.record.key  # type: ignore[assignment]
        self.forgotten += self.gone.pop(key, None) is not None
        self.gone[key] = known
        while len(self.gone) > max(REMEMBERED * len(self.kept()), keeper_module.LEAST_REMEMBERED):
            del self.gone[next(iter(self.gone))]
            self.forgotten += 1

    def keep(self, parent: Pages, count: int, known: Known) -> Pages:
        """A state is made, so many pages behind a prefix."""
        own = list(range(self._pages, self._pages + count))
        self._pages += count
        pages = (*parent, *own)
        node = self.keeper.tree.add(self.prefixes[parent].node, len(pages) * PAGE, own, len(own))
        self.keeper.keep(known.record, node)
        known.share = 1.0
        # Where it stands is known now, if it was not before.
        known.position = len(pages) * PAGE
        known.begin(self.now)
        counts = self.counts[known.origin]
        counts.refused, counts.made, counts.kept = (
            counts.refused - 1,
            counts.made + 1,
            counts.kept + 1,
        )
        del self.gone[known.record.key]  # type: ignore[arg-type]
        self.prefixes[pages] = Prefix(node, known)
        return pages

    def walk(self, parent: Pages, count: int, known: Known) -> None:
        """A request makes a state and builds upon that from now on."""
        self.step_on(self.keep(parent, count, known))
        self.leave(parent)

    def takes(self, pages: Pages, share: float) -> None:
        """A state is kept in fewer bytes, or in all of them again."""
        prefix = self.prefixes[pages]
        assert prefix.known is not None
        before = prefix.known.share
        prefix.known.share = share
        worth = self.worth(pages)
        prefix.known.share = before
        if worth != pytest.approx(self.price):
            assert self.keeper.pays_at(prefix.node, share) == (worth > self.price)
        self.keeper.takes(prefix.node, share)
        prefix.known.share = share

    def give_up_least(self) -> None:
        """Room is needed."""
        node = self.keeper.victim()
        assert node is not None
        pages = next(pages for pages, prefix in self.prefixes.items() if prefix.node is node)
        known, heir = self.prefixes[pages].known, self.prefixes[self.above(pages)].known
        assert known is not None
        self.trace.append((known.record.key, self.keeper.price, self.keeper.lifetime))
        step = PRICE_STEP if self.price else 1.0
        self.price += step * (self.worth(pages) - self.price)
        self.lifetime += step * (self.now - known.since - self.lifetime)
        inherits = heir is not None and self.index(known) > self.index(heir)
        self._give_up(pages, for_room=True, moved=False)
        if heir is not None and inherits:
            heir.cls, heir.since = known.cls, known.since
            self.inherited += 1
            # Both count as having waited since the begin of the bin.
            age = self.now - heir.since
            self.waited[heir.cls, bin_of(age)] += age - EDGES[bin_of(age)]

    def withdraw(self, pages: Pages, moved: bool) -> None:
        """A state goes, but not for room."""
        self._give_up(pages, for_room=False, moved=moved)
        self.withdrawn += 1

    def _give_up(self, pages: Pages, for_room: bool, moved: bool) -> None:
        prefix = self.prefixes[pages]
        known, prefix.known = prefix.known, None
        assert known is not None
        counts = self.counts[known.origin]
        counts.kept, counts.given_up = counts.kept - 1, counts.given_up + for_room
        lost = self.keeper.give_up(prefix.node, for_room=for_room, moved=moved)
        if not moved:
            self._remember(known)
        self._compare_loss(pages, lost)

    def _compare_loss(self, pages: Pages, lost: list[int]) -> None:
        prefix = self.prefixes[pages]
        if pages and prefix.known is None and not prefix.users:
            del self.prefixes[pages]
        assert lost == [page for page in pages if not self.others_with(page)]

    def keys(self) -> list[int]:
        """Keys of states, kept or gone."""
        return [known.record.key for known in self.alive()]  # type: ignore[misc]

    # -- the naive keeper --------------------------------------------------------------------------

    def kept(self) -> list[Pages]:
        """Prefixes with states."""
        return [pages for pages, prefix in self.prefixes.items() if prefix.known is not None]

    def used(self) -> list[Pages]:
        """Prefixes that running requests build upon."""
        return [pages for pages, prefix in self.prefixes.items() if prefix.users]

    def alive(self) -> list[Known]:
        """States whose age counts."""
        kept = [prefix.known for prefix in self.prefixes.values() if prefix.known is not None]
        return [*kept, *self.gone.values()]

    def others_with(self, page: int, but: Pages | None = None) -> int:
        """How many states and requests need a page, apart from a prefix's own state."""
        return sum(
            prefix.users + (prefix.known is not None and pages != but)
            for pages, prefix in self.prefixes.items()
            if page in pages
        )

    def above(self, pages: Pages) -> Pages:
        """The longest kept prefix of a prefix, or the empty one."""
        shorter = (other for other in self.kept() if len(other) < len(pages))
        return max((o for o in shorter if pages[: len(o)] == o), key=len, default=())

    def index(self, known: Known) -> float:
        """Of a state's class and age, without leaving a trace in the keeper."""
        rates, age_bin = self.keeper.rates, bin_of(self.now - known.since)
        prospects = rates._prospects.get(known.cls)
        if prospects is not None and prospects.epoch == rates.epoch:
            return prospects.indices[age_bin]
        return gittins_indices(rates._hazards(known.cls))[age_bin]

    def worth(self, pages: Pages) -> float:
        """Index, times what a state spares, by what only it holds."""
        known = self.prefixes[pages].known
        assert known is not None
        spared = (len(pages) - len(self.above(pages))) * PAGE
        alone = sum(not self.others_with(page, but=pages) for page in pages)
        return self.index(known) * (spared / (STATE_BYTES * known.share + alone * PAGE_BYTES))

    def check(self) -> None:
        """Compare the keeper with the model."""
        keeper = self.keeper
        assert keeper.tree.problems() == []
        assert keeper.rates.now == self.now
        assert keeper.counts == self.counts
        assert keeper.kept == len(self.kept())
        every = keeper.counts.values()
        assert keeper.kept == sum(counts.kept for counts in every)
        gone = sum(counts.made - counts.given_up for counts in every) - self.withdrawn
        assert keeper.kept == gone
        assert keeper.price == pytest.approx(self.price, rel=1e-9, abs=0)
        assert keeper.lifetime == pytest.approx(self.lifetime, rel=1e-9)
        gone_records = {key: known.record for key, known in self.gone.items()}
        assert list(gone_records.items()) == list(keeper._gone.items())
        for known in self.alive():
            record = known.record
            assert (record.since, record.cls) == (known.since, known.cls)
            assert record.position == known.position
            assert record.age_bin == bin_of(self.now - known.since)
            assert (record.hits, record.superseded) == (known.hits, known.superseded)
        for key, known in self.gone.items():
            assert keeper.gone(key) is known.record
            assert known.record.node is None
        for prefix in self.prefixes.values():
            assert prefix.node.note is (prefix.known and prefix.known.record)
            assert prefix.known is None or prefix.known.record.node is prefix.node
        self.check_waiting()
        self.check_heaps()
        self.check_victim()

    def check_waiting(self) -> None:
        """What the rates have counted, and what states have waited in the bin they are in."""
        rates = self.keeper.rates
        waited: Counter[tuple[Class, int]] = Counter()
        for known in self.alive():
            age = self.now - known.since
            waited[known.cls, bin_of(age)] += age - EDGES[bin_of(age)]
        for cls, counts in rates._classes.items():
            for age_bin in range(len(EDGES)):
                there = cls, age_bin
                assert counts.waited[age_bin] + waited[there] == self.waited[there], there
                assert counts.reuses[age_bin] == self.reuses[there], there
        assert {cls for cls, _ in +self.waited} | {cls for cls, _ in self.reuses} <= set(
            rates._classes
        ) | {cls for cls, _ in +waited}

    def check_heaps(self) -> None:
        """Each kept state stands once where it belongs; the rest is out of date, and bounded."""
        keeper = self.keeper
        entries = [entry for heap in keeper._cells.values() for entry in heap]
        assert len(entries) == keeper._entries
        right = {
            record: (cell, density)
            for cell, heap in keeper._cells.items()
            for density, _, record, version in heap
            if version == record.version
        }
        assert len(right) == sum(version == record.version for _, _, record, version in entries)
        kept = [prefix.known.record for prefix in self.prefixes.values() if prefix.known]
        assert right == {r: ((r.cls, r.age_bin), r.density) for r in kept}

    def check_victim(self) -> None:
        """What goes next is worth the least of all that is kept."""
        worths = {pages: self.worth(pages) for pages in self.kept()}
        node = self.keeper.victim()
        if not worths:
            assert node is None
            return
        assert node is not None
        assert node.note is not None
        pages = next(pages for pages, prefix in self.prefixes.items() if prefix.node is node)
        assert worths[pages] == pytest.approx(min(worths.values()), rel=1e-12, abs=0)
        assert self.keeper.victim() is node


ORIGINS = st.sampled_from(Origin)


class KeeperMachine(RuleBasedStateMachine):
    """Requests come, make states, use them and go."""

    def __init__(self) -> None:
        super().__init__()
        self.client = Client()

    def some(self, data: st.DataObject, of: list[Pages]) -> Pages:
        """Draw one of them."""
        return of[data.draw(st.integers(0, len(of) - 1))]

    def known(self, data: st.DataObject, origin: Origin, turns: int) -> Known:
        """Decide about a state: a new one, one that is gone, or one of a prefix with another."""
        keys = [None, *dict.fromkeys(self.client.keys())]
        key = keys[data.draw(st.integers(0, len(keys) - 1))]
        return self.client.record(origin, turns, key, data.draw(st.sampled_from([0, 48, 800])))

    @rule(count=st.sampled_from([1, 1, 2, 3, 7, 16, 17, 65, 300, 2_000]))
    def tick(self, count: int) -> None:
        self.client.tick(count)

    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.client.begin(self.some(data, list(self.client.prefixes)))

    @precondition(lambda self: self.client.gone)
    @rule(data=st.data())
    def miss(self, data: st.DataObject) -> None:
        keys = list(self.client.gone)
        self.client.miss(keys[data.draw(st.integers(0, len(keys) - 1))])

    @rule(data=st.data(), origin=ORIGINS, turns=st.integers(0, 5))
    def refuse(self, data: st.DataObject, origin: Origin, turns: int) -> None:
        self.known(data, origin, turns)

    @rule(data=st.data(), count=st.integers(1, 6), origin=ORIGINS, turns=st.integers(0, 5))
    def keep(self, data: st.DataObject, count: int, origin: Origin, turns: int) -> None:
        parent = self.some(data, list(self.client.prefixes))
        self.client.keep(parent, count, self.known(data, origin, turns))

    @precondition(lambda self: self.client.used())
    @rule(data=st.data(), count=st.integers(1, 6), origin=ORIGINS, turns=st.integers(0, 5))
    def walk(self, data: st.DataObject, count: int, origin: Origin, turns: int) -> None:
        parent = self.some(data, self.client.used())
        self.client.walk(parent, count, self.known(data, origin, turns))

    @precondition(lambda self: self.client.used())
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.client.leave(self.some(data, self.client.used()))

    @precondition(lambda self: self.client.alive())
    @rule(data=st.data())
    def supersede(self, data: st.DataObject) -> None:
        alive = self.client.alive()
        self.client.supersede(alive[data.draw(st.integers(0, len(alive) - 1))])

    @precondition(lambda self: self.client.kept())
    @rule()
    def give_up_least(self) -> None:
        self.client.give_up_least()

    @precondition(lambda self: self.client.kept())
    @rule(data=st.data(), share=st.sampled_from([0.5, 1.0]))
    def takes(self, data: st.DataObject, share: float) -> None:
        self.client.takes(self.some(data, self.client.kept()), share)

    @precondition(lambda self: self.client.kept())
    @rule(data=st.data(), moved=st.booleans())
    def withdraw(self, data: st.DataObject, moved: bool) -> None:
        self.client.withdraw(self.some(data, self.client.kept()), moved)

    @invariant()
    def holds(self) -> None:
        self.client.check()


TestKeeper = KeeperMachine.TestCase
TestKeeper.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True
)


def toggle(client: Client) -> None:
    """Requests come to one state and go, until the heaps are made anew."""
    keeper, node = client.keeper, client.prefixes[max(client.kept(), key=len)].node
    most = SLACK * keeper.kept + 1_000
    for _ in range(most):
        keeper.step_on(node)
        assert keeper.step_off(node) == []
        assert keeper._entries <= most


def churn(client: Client, rng: random.Random, steps: int, check: bool = True) -> None:
    """Conversations and requests that come once, with room for some states."""
    for number in range(steps):
        what, kept, used = rng.random(), client.kept(), client.used()
        if what < 0.25:
            client.begin(rng.choice([(), *kept[-6:]]))
        elif what < 0.5 and used:
            key = rng.choice([None, None, None, *list(client.gone)[-3:], *client.keys()[-1:]])
            position = rng.choice([0, 48, 800])
            known = client.record(rng.choice(list(Origin)), rng.randint(0, 4), key, position)
            if rng.random() < 0.8:
                client.walk(rng.choice(used), rng.randint(1, 6), known)
        elif what < 0.7 and used:
            client.leave(rng.choice(used))
        elif what < 0.76 and client.gone:
            client.miss(rng.choice(list(client.gone)))
        elif what < 0.82 and kept:
            client.supersede(rng.choice(client.alive()))
        elif what < 0.84 and kept:
            client.takes(rng.choice(kept), rng.choice([0.5, 1.0]))
        elif what < 0.87 and kept:
            client.withdraw(rng.choice(kept), moved=rng.random() < 0.5)
        else:
            client.tick(rng.choice([1, 2, 5, 30]))
        if number % 250 == 200:
            toggle(client)
        while len(client.kept()) > 15:
            client.give_up_least()
        if check:
            client.check()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("least_remembered", [LEAST_REMEMBERED, 8])
def test_what_goes_is_worth_the_least(
    monkeypatch: pytest.MonkeyPatch, seed: int, least_remembered: int
) -> None:
    monkeypatch.setattr(keeper_module, "LEAST_REMEMBERED", least_remembered)
    client = Client()
    churn(client, random.Random(seed), 600)
    every = client.keeper.counts.values()
    assert sum(counts.given_up for counts in every) > 30
    assert sum(counts.used for counts in every) > 30
    assert sum(counts.missed for counts in every) > 20
    assert client.withdrawn > 10
    assert client.inherited > 3
    assert client.forgotten > (10 if least_remembered > 8 else 40)
    assert client.keeper.rates.epoch > 20


def test_equal_calls_give_equal_victims() -> None:
    traces = []
    for _ in range(2):
        client = Client()
        churn(client, random.Random(3), 2_000, check=False)
        traces.append((client.trace, client.keeper.price, client.keeper.counts))
    assert traces[0] == traces[1]
    assert len(traces[0][0]) > 100


# -- one rule each ---------------------------------------------------------------------------------


#: Of a new state at a prompt's last page: 160 tokens from its start, and not told where.
TAIL_160, TAIL = class_of(Origin.TAIL, 0, 160), class_of(Origin.TAIL, 0)


def kept_state(
    keeper: StateKeeper,
    key: int,
    position: int,
    parent: Node | None = None,
    origin: Origin = Origin.TAIL,
) -> Node:
    """A state that is made, with the pages behind its parent's."""
    parent = parent or keeper.tree.root
    count = (position - parent.position) // PAGE
    node = keeper.tree.add(parent, position, [key * 1_000 + i for i in range(count)], key)
    keeper.keep(keeper.record(key, origin, 0), node)
    return node


def test_price_and_lifetime_move_only_for_room() -> None:
    keeper = new_keeper()
    nodes = [kept_state(keeper, key, 160) for key in range(4)]
    for _ in range(10):
        keeper.tick()
    keeper.give_up(nodes[0], for_room=False)
    keeper.give_up(nodes[1], for_room=False, moved=True)
    assert (keeper.price, keeper.lifetime) == (0.0, 10 * LONGER)
    # The first one sets both; later ones move them by a step.
    index = keeper.rates.index(TAIL_160, bin_of(10))
    keeper.give_up(nodes[2])
    first = index * 160 / (STATE_BYTES + 10 * PAGE_BYTES)
    assert keeper.price == pytest.approx(first)
    assert keeper.lifetime == 10
    # In between, memory gets cheaper, and states are expected to last longer.
    for _ in range(30):
        keeper.tick()
    price, lifetime = first * 0.5 ** (30 / PRICE_HALF_LIFE), 10 + 30 * LONGER
    assert keeper.price == pytest.approx(price)
    assert keeper.lifetime == pytest.approx(lifetime)
    second = keeper.rates.index(TAIL_160, bin_of(40)) * first / index
    keeper.give_up(nodes[3])
    assert keeper.price == pytest.approx(price + PRICE_STEP * (second - price))
    assert keeper.lifetime == pytest.approx(lifetime + PRICE_STEP * (40 - lifetime))
    assert keeper.counts[Origin.TAIL] == Counts(kept=0, made=4, given_up=2)


def test_what_is_made_pays_a_fair_share_of_the_price() -> None:
    keeper = new_keeper()
    worth = keeper.rates.index(TAIL, 0)
    assert keeper.pays(Origin.TAIL, 0, PAGE, cuts=False), "memory is free until it was needed"
    keeper.lifetime = 1e6
    for pages in (1, 7, 50):
        density = pages * PAGE / (STATE_BYTES + pages * PAGE_BYTES)
        keeper.price = worth * density / FAIR_SHARE * 0.999
        assert keeper.pays(Origin.TAIL, 0, pages * PAGE, cuts=False)
        keeper.price = worth * density / FAIR_SHARE * 1.001
        assert not keeper.pays(Origin.TAIL, 0, pages * PAGE, cuts=False)


def test_what_costs_a_step_must_spare_one() -> None:
    keeper = new_keeper()
    chance = keeper.rates.chance(TAIL, EDGES[-1])
    assert 0 < chance <= 1
    enough = int(CUT_TOKENS / chance) + 1
    assert keeper.pays(Origin.TAIL, 0, enough, cuts=True)
    assert not keeper.pays(Origin.TAIL, 0, enough - 2, cuts=True)
    assert keeper.pays(Origin.TAIL, 0, enough - 2, cuts=False)
    # States that go soon have less of a chance.
    keeper.price, keeper.lifetime = 1e-12, 3.0
    assert not keeper.pays(Origin.TAIL, 0, enough, cuts=True)


def test_what_costs_a_step_must_spare_one_in_some_lifetimes() -> None:
    keeper, cls = new_keeper(), TAIL
    keeper.price = 1e-12
    for lifetime in (0.0, 1.0, 5.5, 40.0, 900.0):
        keeper.lifetime = lifetime
        enough = CUT_TOKENS / keeper.rates.chance(cls, int(LIFETIMES * lifetime))
        assert keeper.pays(Origin.TAIL, 0, int(enough) + 1, cuts=True)
        assert not keeper.pays(Origin.TAIL, 0, int(enough) - 1, cuts=True)


def test_what_costs_no_step_must_spare_its_copies() -> None:
    """Where nothing is used again, states are no longer made, even while memory is free."""
    keeper = new_keeper()
    enough = int(COPY_TOKENS / keeper.rates.chance(TAIL, EDGES[-1])) + 1
    assert keeper.pays(Origin.TAIL, 0, enough, cuts=False)
    assert not keeper.pays(Origin.TAIL, 0, enough - 2, cuts=False)
    made = 0
    for key in range(2_000):
        keeper.tick()
        if keeper.pays(Origin.TAIL, 0, 160, False, 160):
            kept_state(keeper, key, 160)
            made += 1
        else:
            keeper.record(key, Origin.TAIL, 0, 160)
    assert 0 < made < 300
    assert not keeper.pays(Origin.TAIL, 0, 160, False, 160)
    # Misses bring it back.
    for key in range(1_900, 2_000):
        keeper.tick()
        record = keeper.gone(key)
        assert record is not None
        keeper.used(record)
    for _ in range(256):  # until what was learned is looked at again
        keeper.tick()
    assert keeper.pays(Origin.TAIL, 0, 160, False, 160)


def test_classes_tell_lengths_apart_by_octaves() -> None:
    classes = {position: class_of(Origin.TAIL, 1, position) for position in (0, 16, 31, 32, 4_096)}
    assert classes[16] == classes[31]
    assert len(set(classes.values())) == 4
    assert len({cls.family for cls in classes.values()}) == 1


def test_a_states_class_follows_where_it_is_kept() -> None:
    keeper = new_keeper()
    told = keeper.record(1, Origin.TAIL, 0, 160)
    untold = keeper.record(2, Origin.TAIL, 0)
    assert (told.cls, untold.cls) == (TAIL_160, TAIL)
    node = keeper.tree.add(keeper.tree.root, 160, list(range(10)), 2)
    keeper.keep(untold, node)
    assert (untold.position, untold.cls) == (160, TAIL_160)


def test_classes_tell_hits_apart_until_a_prefix_is_common() -> None:
    hits = [class_of(Origin.TAIL, 0, 0, hits).detail[2] for hits in range(20)]
    assert hits == [0, 1, 2, 2, 3, 3, 3, 3, *[4] * 12]
    assert [class_of(Origin.TAIL, turns).detail[0] for turns in range(6)] == [0, 1, 2, 3, 3, 3]
    for uses in range(10):
        old, new = (class_of(Origin.TAIL, 1, 0, uses, superseded) for superseded in (True, False))
        assert (old == new) == (uses >= COMMON)


def naive_stops(
    keeper: StateKeeper, page: int, prompt: int, hit: int, junction: int, inside: int
) -> tuple[dict[int, Origin], dict[int, Origin]]:
    """Every page's end is looked at, in order."""
    made: dict[int, Origin] = {}
    refused: dict[int, Origin] = {}
    last = max(position for position in range(0, prompt, page))
    before = max((position for position in range(0, last - BEFORE_TAIL + 1, page)), default=0)
    for position in range(hit + 1, prompt):
        if position == last:
            origin = Origin.TAIL
        elif position == before:
            origin = Origin.BEFORE_TAIL
        elif position == junction - junction % page:
            origin = Origin.JUNCTION
        else:
            continue
        spared = position - max([hit, *made])
        pays = keeper.pays(origin, 0, spared, position != inside, position)
        (made if pays else refused)[position] = origin
    return made, refused


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    prompt=st.integers(1, 3_000),
    shares=st.tuples(*[st.floats(0, 1)] * 3),
    junctions=st.sampled_from(["none", "any", "tail", "before"]),
    price=st.sampled_from([0.0, 1e-6, 1e-4, 3e-4, 1e-2]),
    cut_tokens=st.sampled_from([0, 100, 400, 1_000]),
    page=st.sampled_from([PAGE, 48, 528, 1_024]),
)
def test_a_prompt_is_cut_where_a_state_pays(
    prompt: int,
    shares: tuple[float, float, float],
    junctions: str,
    price: float,
    cut_tokens: int,
    page: int,
) -> None:
    keeper = StateKeeper(PAGE_BYTES, STATE_BYTES, page, cut_tokens)
    keeper.price, keeper.lifetime = price, 500.0
    hit, anywhere, inside = (int(share * (prompt - 1)) // page * page for share in shares)
    tail = (prompt - 1) // page * page
    junction = {"none": 0, "any": anywhere + 5, "tail": tail, "before": tail - BEFORE_TAIL}
    at = max(junction[junctions], 0)
    stops = keeper.stops(prompt, hit, at, 0, (inside,))
    assert (stops.made, stops.refused) == naive_stops(keeper, page, prompt, hit, at, inside)
    for position in (*stops.made, *stops.refused):
        assert hit < position < prompt
        assert position % page == 0


def test_the_prefix_before_inherits_prospects() -> None:
    keeper = new_keeper()
    for key in range(300):  # junctions are used, tails are not
        junction = kept_state(keeper, key, 160, origin=Origin.JUNCTION)
        tail = kept_state(keeper, 1_000 + key, 160, origin=Origin.TAIL)
        for _ in range(3):
            keeper.tick()
        keeper.used(junction.note)
        keeper.give_up(junction, for_room=False, moved=True)
        keeper.give_up(tail, for_room=False)
    before = kept_state(keeper, 5_000, 160, origin=Origin.TAIL)
    for _ in range(100):
        keeper.tick()
    node = kept_state(keeper, 5_001, 320, before, origin=Origin.JUNCTION)
    keeper.tick()
    record, heir = node.note, before.note
    keeper.give_up(node)
    assert (heir.cls, heir.since, heir.age_bin) == (record.cls, record.since, bin_of(1))
    assert keeper.gone(5_001) is record
    # Whoever uses it then finds it what it is.
    keeper.used(heir)
    assert heir.cls == class_of(Origin.TAIL, 0, 160, hits=1)
    # What is worth less leaves nothing, nor does what was not given up for room.
    tail = kept_state(keeper, 5_002, 320, before, origin=Origin.TAIL)
    for _ in range(100):
        keeper.tick()
    keeper.used(heir)
    heir_cls, heir_since = heir.cls, heir.since
    keeper.give_up(tail)
    assert (heir.cls, heir.since) == (heir_cls, heir_since)
    moved = kept_state(keeper, 5_003, 320, before, origin=Origin.JUNCTION)
    keeper.give_up(moved, for_room=False)
    assert (heir.cls, heir.since) == (heir_cls, heir_since)


def test_states_that_were_given_up_are_forgotten_oldest_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keeper_module, "LEAST_REMEMBERED", 6)
    keeper = new_keeper()
    nodes = [kept_state(keeper, key, 160) for key in range(20)]
    keeper.tick()
    for count, node in enumerate(nodes, 1):
        keeper.give_up(node)
        limit = max(REMEMBERED * keeper.kept, 6)
        remembered = [key for key in range(20) if keeper.gone(key) is not None]
        assert remembered == list(range(count))[-limit:]
    keeper.tick()
    # The forgotten ones have waited one request, and wait no more.
    waited = keeper.rates._classes[TAIL_160].waited
    assert waited[0] == pytest.approx(20, rel=1e-2)
    assert waited[1] == pytest.approx(6, rel=1e-2)


def test_what_comes_back_is_not_remembered_twice() -> None:
    keeper = new_keeper()
    node = kept_state(keeper, 7, 160)
    keeper.give_up(node)
    first = keeper.gone(7)
    assert first is not None
    keeper.tick()
    second = keeper.record(7, Origin.ANSWER, 2)
    assert keeper.gone(7) is second is not first
    for _ in range(50):
        keeper.tick()
    assert first.age_bin == 1, "its age counts no more"
    assert second.age_bin == bin_of(50)


def test_nothing_is_given_up_where_nothing_is_kept() -> None:
    keeper = new_keeper()
    assert keeper.victim() is None
    keeper.give_up(kept_state(keeper, 1, 160))
    assert keeper.victim() is None


# -- mended defects --------------------------------------------------------------------------------


def junction_of_two(keeper: StateKeeper) -> tuple[Node, Node]:
    """Two states behind a prefix of ten pages whose own state was given up."""
    junction = kept_state(keeper, 0, 160)
    one, other = (kept_state(keeper, key, 176, junction) for key in (1, 2))
    keeper.give_up(junction, for_room=False)
    return one, other


ALONE = 176 / (STATE_BYTES + 11 * PAGE_BYTES)


def test_a_sibling_that_is_left_alone_weighs_more() -> None:
    """It takes the pages of the junction, which only it needs then."""
    keeper = new_keeper()
    one, other = junction_of_two(keeper)
    keeper.give_up(other, for_room=False)
    assert len(one.pages) == 11
    assert one.note.density == pytest.approx(ALONE)


def test_a_sibling_that_a_request_leaves_alone_weighs_more() -> None:
    client = Client()
    junction = client.keep((), 10, client.record(Origin.JUNCTION, 0))
    client.keep(junction, 1, client.record(Origin.TAIL, 0))
    client.begin(junction)
    client.withdraw(junction, moved=False)
    client.check()
    client.leave(junction)
    client.check()
    (node,) = client.keeper.tree.nodes()
    assert node.note.density == pytest.approx(ALONE)


def test_refused_states_are_bounded_in_number() -> None:
    """A server with short prompts alone, whose states never pay, gives nothing up either."""
    keeper = new_keeper()
    for key in range(LEAST_REMEMBERED + 100):
        keeper.tick()
        keeper.record(key, Origin.TAIL, 0)
    assert list(keeper._gone) == list(range(100, LEAST_REMEMBERED + 100))


def test_heaps_do_not_grow_while_there_is_room() -> None:
    """One request after the other resumes from the same state, and nothing is given up."""
    keeper = new_keeper()
    node = kept_state(keeper, 1, 160)
    for _ in range(2_000):
        keeper.tick()
        keeper.used(node.note)
        keeper.step_on(node)
        assert keeper.step_off(node) == []
        entries = sum(len(heap) for heap in keeper._cells.values())
        assert entries == keeper._entries <= SLACK * keeper.kept + 1_000
    assert len(keeper._calendar) < 100
    assert keeper.victim() is node


def test_what_is_forgotten_has_waited_until_then() -> None:
    """Whether it is replaced by a new record, or was moved on."""
    for moved in (False, True):
        keeper = new_keeper()
        keeper.rates._growth = 1.0
        node = kept_state(keeper, 7, 160)
        for _ in range(21):
            keeper.tick()
        keeper.give_up(node, for_room=False, moved=moved)
        assert (keeper.gone(7) is None) == moved
        keeper.record(7, Origin.TAIL, 1)
        waited = keeper.rates._classes[TAIL_160].waited
        assert sum(waited) == 21
        assert waited[bin_of(21)] == 21 - 16
        for _ in range(50):
            keeper.tick()
        assert sum(waited) == 21


def test_two_states_of_one_prefix_are_remembered_once() -> None:
    """Two requests with one prompt that ran side by side have each made a state of it."""
    keeper = new_keeper()
    nodes = [kept_state(keeper, 7, 160) for _ in range(2)]
    records = [node.note for node in nodes]
    for node in nodes:
        keeper.give_up(node)
    for _ in range(8):
        keeper.tick()
    assert [keeper.gone(7) is record for record in records] == [False, True]
    assert [record.age_bin for record in records] == [0, bin_of(8)]


def test_no_state_is_used_more_than_once_a_request() -> None:
    """A use at age 1 falls into the bin that begins there, in which nothing has waited then."""
    keeper = new_keeper()
    node = kept_state(keeper, 1, 160)
    for _ in range(1_000):
        keeper.tick()
        keeper.used(node.note)
    keeper.tick()
    assert node.note.age_bin == 1
    assert keeper.rates.index(node.note.cls, 1) <= 1.01
    # The price that such a state leaves is one that none can pay: nothing is kept any more.
    keeper.give_up(node)
    assert keeper.pays(Origin.TAIL, 0, 10**6, cuts=False)


@pytest.mark.parametrize("page_tokens", [48, 1_024])
def test_states_are_kept_at_ends_of_pages_only(page_tokens: int) -> None:
    keeper = StateKeeper(PAGE_BYTES, STATE_BYTES, page_tokens, cut_tokens=0)
    stops = keeper.stops(5_000, hit=0, junction=0, turns=0)
    assert Origin.BEFORE_TAIL in stops.made.values()
    assert [position % page_tokens for position in stops.made] == [0, 0]


# -- controls --------------------------------------------------------------------------------------


def nothing_valued_below(patch: pytest.MonkeyPatch) -> None:
    """What stands below a prefix that is given up is not valued again."""
    give_up = StateKeeper.give_up

    def without(self: StateKeeper, node: Node, *args: bool, **names: bool) -> list[int]:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self.tree, "descendants", lambda node: iter(()), raising=False)
            return give_up(self, node, *args, **names)

    patch.setattr(StateKeeper, "give_up", without)


def version_not_raised(patch: pytest.MonkeyPatch) -> None:
    """Earlier entries of the heaps stay right."""
    enter = StateKeeper._enter

    def same(self: StateKeeper, record: Record) -> None:
        record.version -= 1
        enter(self, record)

    patch.setattr(StateKeeper, "_enter", same)


def pages_not_merged(patch: pytest.MonkeyPatch) -> None:
    """A node that goes does not leave its pages to the one below."""
    tidy = PrefixTree.tidy

    def without(self: PrefixTree, node: Node) -> Tidied:
        before = [(below, list(below.pages)) for below in node.children]
        tidied = tidy(self, node)
        for below, pages in before:
            below.pages = pages
        return tidied

    patch.setattr(PrefixTree, "tidy", without)


def never_older(patch: pytest.MonkeyPatch) -> None:
    """Ages are not followed."""
    patch.setattr(StateKeeper, "_expect_aging", lambda self, record: None)


def aged_in_the_old_heap(patch: pytest.MonkeyPatch) -> None:
    """Who gets older stays in the heap of the younger."""
    tick, enter = StateKeeper.tick, StateKeeper._enter

    def without(self: StateKeeper) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(StateKeeper, "_enter", lambda self, record: None)
            tick(self)

    patch.setattr(StateKeeper, "tick", without)
    assert StateKeeper._enter is enter


def nothing_inherited(patch: pytest.MonkeyPatch) -> None:
    """The prospects of what is given up are lost."""
    patch.setattr(StateKeeper, "_inherit", lambda self, record, heir: None)


def users_not_seen(patch: pytest.MonkeyPatch) -> None:
    """Prefixes are not valued again when their users change."""

    def step_on(self: StateKeeper, node: Node) -> None:
        node.users += 1

    patch.setattr(StateKeeper, "step_on", step_on)


def heirs_not_valued(patch: pytest.MonkeyPatch) -> None:
    """Who gets the pages of a junction is not valued again."""
    tidy = PrefixTree.tidy
    patch.setattr(PrefixTree, "tidy", lambda self, node: Tidied(tidy(self, node).lost, [node]))


def order_of_an_earlier_epoch(patch: pytest.MonkeyPatch) -> None:
    """Cells stay in the order that they once had."""
    victim = StateKeeper.victim

    def without(self: StateKeeper) -> Node | None:
        if self._order:
            self._order_epoch = self.rates.epoch
        return victim(self)

    patch.setattr(StateKeeper, "victim", without)


def new_least_not_ordered(patch: pytest.MonkeyPatch) -> None:
    """The order of the cells does not know what has become the least of one since."""
    enter = StateKeeper._enter

    def without(self: StateKeeper, record: Record) -> None:
        order = list(self._order)
        enter(self, record)
        self._order = order

    patch.setattr(StateKeeper, "_enter", without)


def shares_not_seen(patch: pytest.MonkeyPatch) -> None:
    """A state that takes half its bytes weighs as much as before."""
    patch.setattr(StateKeeper, "takes", lambda self, node, share: None)


def thrown_out_for_good(patch: pytest.MonkeyPatch) -> None:
    """What is kept goes with the entries that are out of date."""

    def without(self: StateKeeper) -> None:
        self._cells, self._entries, self._order_epoch = {}, 0, -1

    patch.setattr(StateKeeper, "_throw_out", without)


def used_in_the_bin_that_begins(patch: pytest.MonkeyPatch) -> None:
    """A use at an age counts behind the request that waited for it."""
    used, reused = StateKeeper.used, ReuseRates.reused

    def late(self: StateKeeper, record: Record) -> None:
        age_bin = bin_of(self.rates.now - record.since)
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(ReuseRates, "reused", lambda self, cls, _: reused(self, cls, age_bin))
            used(self, record)

    patch.setattr(StateKeeper, "used", late)


def replaced_without_an_end(patch: pytest.MonkeyPatch) -> None:
    """Records that are forgotten go on waiting."""
    patch.setattr(StateKeeper, "_forget", lambda self, record: None)


def price_stays(patch: pytest.MonkeyPatch) -> None:
    """Memory stays as dear as it once was."""
    patch.setattr(keeper_module, "_PRICE_DECAY", 1.0)


def waiting_not_settled(patch: pytest.MonkeyPatch) -> None:
    """What was waited in the last bin is lost."""
    patch.setattr(StateKeeper, "_settle", lambda self, record: None)


def oldest_goes(patch: pytest.MonkeyPatch) -> None:
    """The index is left out: what waits longest goes first."""
    patch.setattr(ReuseRates, "index", lambda self, cls, age_bin: 1.0 / (1 + age_bin))


@pytest.mark.parametrize(
    "breakage",
    [
        nothing_valued_below,
        version_not_raised,
        pages_not_merged,
        never_older,
        aged_in_the_old_heap,
        nothing_inherited,
        users_not_seen,
        heirs_not_valued,
        order_of_an_earlier_epoch,
        new_least_not_ordered,
        shares_not_seen,
        thrown_out_for_good,
        used_in_the_bin_that_begins,
        replaced_without_an_end,
        price_stays,
        waiting_not_settled,
        oldest_goes,
    ],
)
def test_control_a_broken_keeper_is_noticed(
    monkeypatch: pytest.MonkeyPatch, breakage: Callable[[pytest.MonkeyPatch], None]
) -> None:
    breakage(monkeypatch)
    with pytest.raises(AssertionError):
        _churn_a_few_times()


def _churn_a_few_times() -> None:
    for seed in range(4):
        churn(Client(), random.Random(seed), 600)
