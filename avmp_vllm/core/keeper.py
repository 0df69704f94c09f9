"""Which states are worth their bytes: what is made, and what goes first.

A state's index is the rate at which it will be used, times the tokens that it alone spares (back to
the nearest prefix that is kept anyway), by the bytes that go with it. What goes first is the least
index; what is made must be worth a fair part of what was given up for room lately. States that are
gone, or were never made, are remembered for a while: a prompt that would have used one teaches as
much as one that did.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Hashable
from dataclasses import dataclass
from enum import Enum

from avmp_vllm.core.hazards import EDGES, bin_of
from avmp_vllm.core.prefix_tree import Node, PrefixTree
from avmp_vllm.core.reuse import Class, ReuseRates

#: Tokens before a prompt's last page at which another state may be kept, for prompts that repeat
#: all but their last message.
BEFORE_TAIL = 512
#: Default of ``cut_tokens``.
CUT_TOKENS = 400
#: Tokens that could be computed in the time that the copies of a state take.
COPY_TOKENS = 4
#: Default of ``answer_tokens``: a running answer's state moves on every so many tokens.
ANSWER_TOKENS = 64
#: A state is made if it is worth this share of the price of memory.
FAIR_SHARE = 0.25
#: How much of the price a new victim sets.
PRICE_STEP = 0.05
#: Requests after which the price is half of what it was, if nothing is given up.
PRICE_HALF_LIFE = 1_000
#: Requests by which each request lengthens the expected lifetime, which what is given up shortens;
#: and in how many lifetimes a state must have paid for its cut.
LONGER, LIFETIMES = 4.0, 4
#: Uses that make a state a common prefix.
COMMON = 4
#: States that are remembered after they are gone, for each that is kept, and the least.
REMEMBERED = 2
LEAST_REMEMBERED = 4_096
#: Entries of the heaps for each state before those that are out of date are thrown out.
SLACK = 4


class Origin(Enum):
    """Where a state stands in its request."""

    TAIL = "tail"
    BEFORE_TAIL = "before_tail"
    JUNCTION = "junction"
    ANSWER = "answer"


def class_of(
    origin: Origin, turns: int, position: int = 0, hits: int = 0, superseded: bool = False
) -> Class:
    """The class of a state.

    One that many prompts have begun at is a common prefix, whatever else came after it. Long
    prefixes are told from short ones by octaves: conversations that near a limit of their context
    go on more seldom.
    """
    common = hits >= COMMON
    return Class(
        (origin.value, superseded and not common),
        (min(turns, 3), position.bit_length(), min(hits.bit_length(), 4)),
    )


#: A class, and a bin of age.
Cell = tuple[Class, int]

_PRICE_DECAY = 2.0 ** (-1 / PRICE_HALF_LIFE)


@dataclass(frozen=True)
class Stops:
    """States in the middle of a prompt, by position.

    Attributes:
        made: That are to be made.
        refused: That do not pay.
    """

    made: dict[int, Origin]
    refused: dict[int, Origin]


@dataclass(slots=True)
class Counts:
    """What was done with states of one origin.

    Attributes:
        kept: That are kept now.
        made: That were made.
        refused: That would not have paid.
        used: Prompts that began at one.
        missed: Prompts that would have begun at one that was gone.
        given_up: For room.
    """

    kept: int = 0
    made: int = 0
    refused: int = 0
    used: int = 0
    missed: int = 0
    given_up: int = 0


@dataclass(eq=False, slots=True)
class Record:
    """What is known of a state, kept or gone.

    Attributes:
        key: Of its prefix, by which it is found when it is gone.
        origin: Where it stands in its request.
        turns: States that came before it in its conversation.
        hits: Prompts that have used it.
        superseded: Whether its conversation has a newer one.
        position: Tokens of its prefix, 0 if they are not known.
        cls: Its class.
        since: Request at which it was made or used last.
        age_bin: Bin of its age.
        node: Its prefix while it is kept.
        density: Tokens it spares by the bytes that go with it.
        version: Counts what makes earlier entries of the heaps wrong.
        epoch: Counts what makes earlier entries of the calendar wrong.
        cell: Where it is entered while it is kept.
        share: Of a block that it takes while it is kept.
    """

    key: Hashable
    origin: Origin
    turns: int
    position: int
    since: int
    cls: Class
    hits: int = 0
    superseded: bool = False
    age_bin: int = 0
    node: Node | None = None
    density: float = 0.0
    version: int = 0
    epoch: int = 0
    cell: Cell | None = None
    share: float = 1.0

    @property
    def next_turns(self) -> int:
        """Turns of the states that a prompt makes which begins here."""
        return self.turns + (self.origin is not Origin.JUNCTION)

    @property
    def own_class(self) -> Class:
        """The class that follows from the above."""
        return class_of(self.origin, self.turns, self.position, self.hits, self.superseded)


class StateKeeper:
    """Keeps a tree of prefixes within its worth.

    Args:
        page_bytes: Of a KV page.
        state_bytes: Of a state.
        page_tokens: Of a page; states are kept at ends of pages only.
        cut_tokens: Tokens that could be computed in the time of one more step.

    Attributes:
        tree: What is kept.
        price: Running index of what was given up for room.
        lifetime: Running age of what was given up for room, in requests.
        kept: States that are kept.
        counts: What was done with states, by where they stand in their request.
    """

    def __init__(
        self,
        page_bytes: int,
        state_bytes: int,
        page_tokens: int,
        cut_tokens: int = CUT_TOKENS,
    ) -> None:
        self.tree = PrefixTree()
        self.rates = ReuseRates()
        self.price = 0.0
        self.lifetime = 0.0
        self.kept = 0
        self.counts = {origin: Counts() for origin in Origin}
        self._page_bytes = page_bytes
        self._state_bytes = state_bytes
        self._page_tokens = page_tokens
        self._cut_tokens = cut_tokens
        # States of a class and age by what they spare; of each cell, its least index, lowest first.
        self._cells: dict[Cell, list[tuple[float, int, Record, int]]] = {}
        self._order: list[tuple[float, int, Cell]] = []
        self._order_epoch = -1
        self._entries = 0
        self._calendar: list[tuple[int, int, Record, int]] = []
        self._gone: dict[Hashable, Record] = {}
        self._count = 0

    # -- requests ----------------------------------------------------------------------------------

    def tick(self) -> None:
        """A request has come: everything is one request older."""
        self.rates.tick()
        self.price *= _PRICE_DECAY
        self.lifetime += LONGER
        now = self.rates.now
        while self._calendar and self._calendar[0][0] <= now:
            _, _, record, epoch = heapq.heappop(self._calendar)
            if epoch != record.epoch:
                continue
            record_bin = record.age_bin
            self.rates.waited(record.cls, record_bin, EDGES[record_bin + 1] - EDGES[record_bin])
            record.age_bin += 1
            self._expect_aging(record)
            if record.node is not None:
                self._enter(record)

    def used(self, record: Record) -> None:
        """A prompt has used a state, or would have used one that is gone."""
        age = self.rates.now - record.since
        counts = self.counts[record.origin]
        if record.node is None:
            counts.missed += 1
        else:
            counts.used += 1
        # The bin in which it has waited last.
        self.rates.reused(record.cls, bin_of(max(age - 1, 0)))
        if record.node is None and self._gone.get(record.key) is not record:
            return  # forgotten since the prompt was looked up
        self._settle(record)
        record.hits += 1
        self._begin(record, self.rates.now)

    def gone(self, key: Hashable) -> Record | None:
        """The record of a state that is gone."""
        return self._gone.get(key)

    def supersede(self, record: Record) -> None:
        """The conversation of a state has a newer one."""
        if record.superseded:
            return
        self._settle(record)
        record.superseded = True
        self._begin(record, self.rates.now)

    def went_on(self, found: Record) -> None:
        """A prompt that began at a state has left a newer one; a junction belongs to nobody."""
        if found.node is not None and found.origin is not Origin.JUNCTION:
            self.supersede(found)

    def _begin(self, record: Record, since: int, cls: Class | None = None) -> None:
        """Let a record's age count from a request, in the class that it has now."""
        record.cls = cls or record.own_class
        record.since = since
        record.age_bin = bin_of(self.rates.now - since)
        record.epoch += 1
        self._expect_aging(record)
        if record.node is not None:
            self._enter(record)

    def _inherit(self, record: Record, heir: Record) -> None:
        """The prompts that would have used a state will use the next one before it."""
        rates = self.rates
        if rates.index(record.cls, record.age_bin) > rates.index(heir.cls, heir.age_bin):
            self._settle(heir)
            self._begin(heir, record.since, record.cls)

    def _settle(self, record: Record) -> None:
        """Count what a state has waited in its bin."""
        age = self.rates.now - record.since
        self.rates.waited(record.cls, record.age_bin, age - EDGES[record.age_bin])

    # -- making ------------------------------------------------------------------------------------

    def stops(
        self, prompt: int, hit: int, junction: int, turns: int, uncut: Container[int] = ()
    ) -> Stops:
        """Which states in the middle of a prompt are worth being made.

        Args:
            prompt: Its tokens.
            hit: Tokens that it need not compute.
            junction: Where it leaves pages that are known, beyond the hit; 0 if it does not.
            turns: States that came before its own in its conversation.
            uncut: Positions of states that can be saved without a cut.
        """
        page = self._page_tokens
        tail = (prompt - 1) // page * page
        candidates = {
            junction // page * page: Origin.JUNCTION,
            (tail - BEFORE_TAIL) // page * page: Origin.BEFORE_TAIL,
            tail: Origin.TAIL,
        }
        stops = Stops({}, {})
        last = hit
        for position, origin in sorted(candidates.items()):
            if not last < position < prompt:
                continue
            if self.pays(origin, turns, position - last, position not in uncut, position):
                stops.made[position] = origin
                last = position
            else:
                stops.refused[position] = origin
        return stops

    def pays(self, origin: Origin, turns: int, spared: int, cuts: bool, position: int = 0) -> bool:
        """Whether a state is worth being made.

        Args:
            origin: Where it stands in its request.
            turns: States that came before it in its conversation.
            spared: Tokens it would spare.
            cuts: Whether making it costs its request a step.
            position: Tokens of its prefix, 0 if they are not known.
        """
        cls = class_of(origin, turns, position)
        nbytes = self._state_bytes + spared // self._page_tokens * self._page_bytes
        if self.rates.index(cls, 0) * spared / nbytes < FAIR_SHARE * self.price:
            return False
        horizon = int(LIFETIMES * self.lifetime) if self.price else EDGES[-1]
        cost = self._cut_tokens if cuts else COPY_TOKENS
        return self.rates.chance(cls, horizon) * spared >= cost

    def record(self, key: Hashable, origin: Origin, turns: int, position: int = 0) -> Record:
        """A new state's record; it is remembered as one that was refused until `keep`."""
        self.counts[origin].refused += 1
        cls = class_of(origin, turns, position)
        record = Record(key, origin, turns, position, self.rates.now, cls)
        self._remember(record)
        self._expect_aging(record)
        return record

    def keep(self, record: Record, node: Node) -> None:
        """A record's state has been made."""
        self._gone.pop(record.key, None)
        record.position = node.position
        record.cls = record.own_class
        record.node = node
        node.note = record
        self.kept += 1
        counts = self.counts[record.origin]
        counts.kept += 1
        counts.made += 1
        counts.refused -= 1
        self._value(node)
        assert node.parent is not None
        self._value(node.parent)

    # -- giving up ---------------------------------------------------------------------------------

    def victim(self) -> Node | None:
        """The kept prefix of least index, None if there is none."""
        if self._order_epoch != self.rates.epoch:
            self._order_epoch = self.rates.epoch
            self._order = [entry for cell in list(self._cells) if (entry := self._least(cell))]
            heapq.heapify(self._order)
        while self._order:
            index, _, cell = self._order[0]
            entry = self._least(cell)
            if entry is None:
                heapq.heappop(self._order)
            elif entry[0] > index:
                heapq.heapreplace(self._order, entry)
            else:
                return self._cells[cell][0][2].node
        return None

    def _least(self, cell: Cell) -> tuple[float, int, Cell] | None:
        """A cell's entry in the order of cells, None if it is empty."""
        heap = self._cells.get(cell)
        while heap and heap[0][3] != heap[0][2].version:
            heapq.heappop(heap)
            self._entries -= 1
        if not heap:
            self._cells.pop(cell, None)
            return None
        density, number, _, _ = heap[0]
        return self.rates.index(*cell) * density, number, cell

    def give_up(self, node: Node, for_room: bool = True, moved: bool = False) -> list[int]:
        """Give a kept prefix's state up.

        Args:
            node: The prefix.
            for_room: Whether it was the least, and sets the price.
            moved: Whether its request has moved it on, so that nobody will miss it.

        Returns:
            The pages that go with it.
        """
        record: Record = node.note
        if for_room:
            index = self.rates.index(record.cls, record.age_bin) * record.density
            age = self.rates.now - record.since
            step = PRICE_STEP if self.price else 1.0
            self.price += step * (index - self.price)
            self.lifetime += step * (age - self.lifetime)
        record.version += 1
        record.node = None
        node.note = None
        self.kept -= 1
        self.counts[record.origin].kept -= 1
        self.counts[record.origin].given_up += for_room
        if moved:
            self._forget(record)
        else:
            self._remember(record)
        heir: Record | None = self.tree.ancestor(node).note
        if heir is not None and for_room:
            self._inherit(record, heir)
        below = list(self.tree.descendants(node))
        lost, changed = self.tree.give_up(node)
        for other in dict.fromkeys((*below, *changed)):
            self._value(other)
        return lost

    def _remember(self, record: Record) -> None:
        """Know a state that is gone, by its prefix."""
        old = self._gone.pop(record.key, None)
        if old is not None:
            self._forget(old)
        self._gone[record.key] = record
        limit = max(REMEMBERED * self.kept, LEAST_REMEMBERED)
        while len(self._gone) > limit:
            self._forget(self._gone.pop(next(iter(self._gone))))

    def _forget(self, record: Record) -> None:
        """Follow a record no longer."""
        self._settle(record)
        record.epoch += 1

    def pays_at(self, node: Node, share: float) -> bool:
        """Whether a kept state would be worth the price if it took such a share of a block."""
        record: Record = node.note
        return self.rates.index(record.cls, record.age_bin) * self._density(node, share) >= (
            self.price
        )

    def takes(self, node: Node, share: float) -> None:
        """A kept state takes such a share of a block from now on."""
        node.note.share = share
        self._value(node)

    # -- users -------------------------------------------------------------------------------------

    def step_on(self, node: Node) -> None:
        """A running request builds upon a prefix."""
        node.users += 1
        self._value(node)

    def step_off(self, node: Node) -> list[int]:
        """A running request builds upon a prefix no longer; the pages that nothing needs then."""
        node.users -= 1
        lost, changed = self.tree.tidy(node)
        for other in (node, *changed):
            self._value(other)
        return lost

    # -- values ------------------------------------------------------------------------------------

    def _value(self, node: Node) -> None:
        record: Record | None = node.note
        if record is None:
            return
        density = self._density(node, record.share)
        if density != record.density or record.cell is None:
            record.density = density
            self._enter(record)

    def _density(self, node: Node, share: float) -> float:
        """Tokens that a kept state spares by the bytes that go with it."""
        nbytes = self._state_bytes * share
        if node.is_leaf:
            nbytes += len(node.pages) * self._page_bytes
        return (node.position - self.tree.ancestor(node).position) / nbytes

    def _enter(self, record: Record) -> None:
        """Put a kept state's record into the heap of its class and age."""
        record.version += 1
        record.cell = cell = (record.cls, record.age_bin)
        self._count += 1
        self._entries += 1
        heap = self._cells.setdefault(cell, [])
        heapq.heappush(heap, (record.density, self._count, record, record.version))
        if heap[0][2] is record and self._order_epoch == self.rates.epoch:
            entry = (self.rates.index(*cell) * record.density, self._count, cell)
            heapq.heappush(self._order, entry)
        if self._entries > SLACK * self.kept + 1_000:
            self._throw_out()

    def _throw_out(self) -> None:
        """Make the heaps anew from what is kept."""
        self._cells = {}
        self._entries = 0
        self._order_epoch = -1
        for node in self.tree.nodes():
            if node.note is not None:
                self._enter(node.note)

    def _expect_aging(self, record: Record) -> None:
        if record.age_bin + 1 < len(EDGES):
            self._count += 1
            due = record.since + EDGES[record.age_bin + 1]
            heapq.heappush(self._calendar, (due, self._count, record, record.epoch))
