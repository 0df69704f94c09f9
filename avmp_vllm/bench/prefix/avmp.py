"""AVMP's rules: the core's keeper of states, as the engine runs it."""

from __future__ import annotations

from avmp_vllm.bench.prefix.cache import Served, Sizes
from avmp_vllm.bench.prefix.trace import PAGE, Request
from avmp_vllm.core.cold import HALVES
from avmp_vllm.core.keeper import ANSWER_TOKENS, Origin, Record, StateKeeper
from avmp_vllm.core.prefix_tree import Node
from avmp_vllm.core.reuse import ReuseRates


class Avmp:
    """Keeps states by their worth, and the pages that they need.

    Args:
        memory: Bytes of the arena.
        sizes: Of the model's pages and states.
    """

    #: Whether the layers save the state at a prompt's last page without a step of its own.
    inside = False

    def __init__(self, memory: int, sizes: Sizes) -> None:
        # The null block and page.
        self._memory = self._all = max(memory - sizes.state - sizes.page, 0)
        self._sizes = sizes
        self._keeper = StateKeeper(sizes.page, sizes.state, PAGE)
        self._nodes: dict[int, Node] = {}
        self._pages: dict[int, int] = {}
        self._page_count = 0

    def serve(self, request: Request) -> Served:
        """Look a request up, compute the rest, answer, and keep what is worth it."""
        keeper, keys = self._keeper, request.keys
        keeper.tick()
        hit, node, deepest = self._look_up(request)
        self._begin_at(node)
        found: Record | None = node.note
        junction = hit
        while junction < request.reusable and keys[junction] in self._pages:
            junction += 1
        turns = deepest.next_turns if deepest is not None else 0
        uncut = (request.reusable * PAGE,) if self.inside else ()
        stops = keeper.stops(
            request.prompt, hit * PAGE, junction * PAGE if junction > hit else 0, turns, uncut
        )
        for record in dict.fromkeys((deepest, found)):
            if record is not None:
                keeper.used(record)
        for position, origin in stops.refused.items():
            keeper.record(keys[position // PAGE - 1], origin, turns, position)
        made = 0
        for position, origin in stops.made.items():
            made += self._keep(request, position // PAGE, origin, turns)
        answer = (request.tokens - 1) // ANSWER_TOKENS * ANSWER_TOKENS
        last = max(stops.made, default=hit * PAGE)
        copies = 0
        if answer > max(request.prompt, last):
            copies = answer // ANSWER_TOKENS - request.prompt // ANSWER_TOKENS
            if keeper.pays(Origin.ANSWER, turns, answer - last, False, answer):
                made += self._keep(request, answer // PAGE, Origin.ANSWER, turns)
            else:
                copies = 0
                keeper.record(keys[answer // PAGE - 1], Origin.ANSWER, turns, answer)
        if made and found is not None:
            keeper.went_on(found)
        states, pages = self._make_room()
        kind = found.origin.value if found is not None else ""
        cuts = sum(position not in uncut for position in stops.made)
        return Served(hit * PAGE, cuts, made, states, pages, copies, kind)

    def probe(self, request: Request) -> int:
        """Prompt tokens that a request would hit now."""
        return self._look_up(request)[0] * PAGE

    def hold(self, pages: int, states: int) -> None:
        """Leave memory to requests that run."""
        held = pages * self._sizes.page + states * self._sizes.state
        self._memory = max(self._all - held, 0)

    def unlearn(self) -> None:
        """Know nothing of reuse any more, nor of the price; what is kept stays."""
        keeper, known = self._keeper, self._keeper.rates
        keeper.rates = ReuseRates(known.now)
        keeper.rates.epoch = known.epoch + 1
        keeper.price = keeper.lifetime = 0.0

    def _look_up(self, request: Request) -> tuple[int, Node, Record | None]:
        """Pages that are hit, the state there, and the longest prefix of a known state."""
        deepest: Record | None = None
        for index in range(request.reusable - 1, -1, -1):
            node = self._nodes.get(request.keys[index])
            if node is not None:
                return index + 1, node, deepest or node.note
            deepest = deepest or self._keeper.gone(request.keys[index])
        return 0, self._keeper.tree.root, deepest

    def _begin_at(self, node: Node) -> None:
        """A request begins at a prefix."""

    def _spare(self, victim: Node) -> bool:
        """Whether the least prefix can be kept in fewer bytes."""
        return False

    def _keep(self, request: Request, pages: int, origin: Origin, turns: int) -> bool:
        """Keep a request's state behind so many pages, unless there is one."""
        keys = request.keys
        if keys[pages - 1] in self._nodes:
            return False
        below = next(
            (self._nodes[key] for key in reversed(keys[: pages - 1]) if key in self._nodes),
            self._keeper.tree.root,
        )
        own = keys[below.position // PAGE : pages]
        record = self._keeper.record(keys[pages - 1], origin, turns, pages * PAGE)
        node = self._keeper.tree.add(below, pages * PAGE, own, 0)
        self._nodes[keys[pages - 1]] = node
        for key in own:
            self._pages[key] = self._pages.get(key, 0) + 1
        self._page_count += len(own)
        self._keeper.keep(record, node)
        return True

    def _make_room(self) -> tuple[int, int]:
        """Give up what is worth least; states and pages that went."""
        states = lost = 0
        while self.bytes_used() > self._memory:
            victim = self._keeper.victim()
            assert victim is not None
            if self._spare(victim):
                continue
            pages = self._lose(victim)
            states += 1
            lost += len(pages)
            self._page_count -= len(pages)
            for page in pages:
                self._pages[page] -= 1
                if not self._pages[page]:
                    del self._pages[page]
        return states, lost

    def _lose(self, victim: Node) -> list[int]:
        """Give a prefix up; the pages that go with it."""
        key = victim.note.key
        pages = self._keeper.give_up(victim)
        del self._nodes[key]
        return pages

    def bytes_used(self) -> int:
        """Bytes of kept states and of the pages that they need."""
        return self._keeper.kept * self._sizes.state + self._page_count * self._sizes.page

    def verify(self) -> None:
        """Raise AssertionError if the books do not add up."""
        nodes = list(self._keeper.tree.nodes())
        assert not self._keeper.tree.problems()
        assert self._keeper.kept == len(self._nodes) == sum(n.state is not None for n in nodes)
        assert self._page_count == sum(len(node.pages) for node in nodes)
        assert self.bytes_used() <= self._all


class AvmpInside(Avmp):
    """The same over layers that save a state inside of a chunk.

    Those are vLLM's Mamba-2 layers and AVMP's own Mamba-1 ones.
    """

    inside = True


class AvmpCold(AvmpInside):
    """The same with states of float32, two of which share a block before they go.

    It is `cold_states: int12`; that a decoded state is not quite what it was, no cache sees.
    """

    def __init__(self, memory: int, sizes: Sizes) -> None:
        super().__init__(memory, sizes)
        self._cold: set[Node] = set()

    def _begin_at(self, node: Node) -> None:
        if node in self._cold:
            self._cold.remove(node)
            self._keeper.takes(node, 1.0)

    def _spare(self, victim: Node) -> bool:
        if victim in self._cold or not self._keeper.pays_at(victim, 1 / HALVES):
            return False
        self._cold.add(victim)
        self._keeper.takes(victim, 1 / HALVES)
        return True

    def _lose(self, victim: Node) -> list[int]:
        self._cold.discard(victim)
        return super()._lose(victim)

    def bytes_used(self) -> int:
        """Bytes of kept states and of the pages that they need."""
        cold = len(self._cold)
        return super().bytes_used() - (cold - -(-cold // HALVES)) * self._sizes.state
