"""Which states a running engine makes and keeps: the core's keeper over vLLM's requests and blocks.

The keeper knows prefixes, tokens and bytes. This knows which blocks hold them, where each running
request stands in the tree, and where its prefill has to stop so that a state can be kept there.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

from avmp_vllm.core import ID_MASK, Arena, Kind
from avmp_vllm.core.geometry import ceil_div
from avmp_vllm.core.keeper import Origin, Record, StateKeeper, Stops
from avmp_vllm.core.prefix_tree import Node
from avmp_vllm.engine.scheduler.cold_states import ColdStates
from avmp_vllm.engine.scheduler.state_pool import StatePool
from avmp_vllm.engine.scheduler.visits import Intent, Visit

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

    from avmp_vllm.engine.scheduler.block_pool import AVMPBlockPool


class Checkpoints:
    """States and what they keep.

    Args:
        arena: The allocator, which asks here what goes next.
        pools: By kind.
        page_tokens: Of a KV page, which is what hashes are made of.
        tables: Block tables that have a page for every so many tokens.
        cut_tokens: As in ``StateKeeper``.
        answer_tokens: A running answer's state moves on every so many tokens, rounded up to whole
            pages; 0 keeps none.
        cold: Whether states are encoded before they go.

    Attributes:
        arena: As above.
        keeper: What decides.
        nodes: By the block of their state, or by the slot of one that is encoded.
        cold: The encoded states; None if none are.
        pages: KV pages that a kept state needs.
    """

    def __init__(
        self,
        arena: Arena,
        pools: dict[Kind, AVMPBlockPool],
        page_tokens: int,
        tables: int,
        cut_tokens: int,
        answer_tokens: int,
        cold: bool = False,
    ) -> None:
        geometry = arena.geometry
        self.keeper = StateKeeper(
            geometry.page_bytes * tables, geometry.block_bytes, page_tokens, cut_tokens
        )
        self.nodes: dict[int, Node] = {}
        self.pages: set[int] = set()
        self.arena = arena
        self._pools = pools
        self._page_tokens = page_tokens
        self._tables = tables
        # Prefixes end at pages.
        self._answer_tokens = ceil_div(answer_tokens, page_tokens) * page_tokens
        self.cold: ColdStates | None = None
        if cold:
            states = pools[Kind.SSM]
            assert isinstance(states, StatePool)
            self.cold = ColdStates(arena, states, self.keeper, self.nodes, page_tokens)
        self._intents: dict[str, tuple[Request, Intent]] = {}
        self._visits: dict[str, Visit] = {}

    # -- a request's way ---------------------------------------------------------------------------

    def intend(self, request: Request, hit: int, uncut: Container[int]) -> None:
        """Decide which states the prefill of a request that waits is to make.

        Nothing else changes: whether there is room for it is not known yet.

        Args:
            request: The request.
            hit: Tokens of its prefix hit, or of what it holds already.
            uncut: Positions of states that the layers save without a stop.
        """
        intent = self._intent(request, hit, uncut)
        visit = self._visits.get(request.request_id)
        if visit is None:
            self._intents[request.request_id] = request, intent
        else:  # a session's next input
            visit.prompt = request.num_prompt_tokens
            visit.stops = dict(intent.stops.made)

    def expect(self, request: Request) -> None:
        """A request is about to get blocks; if nothing was decided about it, it keeps no state."""
        name = request.request_id
        if name not in self._visits and name not in self._intents:
            self._intents[name] = request, Intent(Stops({}, {}), 0, None)

    def _intent(self, request: Request, hit: int, uncut: Container[int]) -> Intent:
        deepest = self._deepest(request, hit)
        turns = 0 if deepest is None else deepest.next_turns
        stops = self.keeper.stops(
            request.num_prompt_tokens, hit, request.shared_prefix_boundary, turns, uncut
        )
        return Intent(stops, turns, deepest)

    def _deepest(self, request: Request, hit: int) -> Record | None:
        """The record of the longest prefix whose state is known, kept or gone."""
        page, hashes, keeper = self._page_tokens, request.block_hashes, self.keeper
        longest = min((request.num_prompt_tokens - 1) // page, len(hashes))
        for index in range(longest - 1, hit // page - 1, -1):
            record = keeper.gone(hashes[index])
            if record is not None:
                return record
        return None

    def begin(self, request_id: str, state: KVCacheBlock | None, loaded: int = 0) -> None:
        """A request that waited runs, if it does not already.

        Args:
            request_id: Whose intent is carried out.
            state: The block that it resumes from, None if it begins at its first token.
            loaded: Where the state stands that a connector brings beyond that, 0 if none does.
        """
        if request_id in self._visits:
            return
        request, intent = self._intents.pop(request_id)
        keeper = self.keeper
        node = keeper.tree.root
        if state is not None:
            node = self.nodes.get(state.block_id, node)
        found: Record | None = node.note
        turns = intent.turns
        if intent.deepest is None and found is not None:
            turns = found.next_turns
        visit = Visit(node, dict(intent.stops.made), request.num_prompt_tokens, turns, found)
        self._visits[request.request_id] = visit
        if loaded:
            self._expect_loaded(request, visit, loaded)
        if not request.num_preemptions:
            keeper.tick()
            if intent.deepest is not None:
                keeper.used(intent.deepest)
            if found is not None:
                keeper.used(found)
            hashes, page = request.block_hashes, self._page_tokens
            for position, origin in intent.stops.refused.items():
                keeper.record(hashes[position // page - 1], origin, turns, position)
        keeper.step_on(node)

    def _expect_loaded(self, request: Request, visit: Visit, position: int) -> None:
        """Keep the state that a connector brings for a request, if that pays.

        If it was kept here before, it goes on as what it was.
        """
        record = self.keeper.gone(request.block_hashes[position // self._page_tokens - 1])
        origin = Origin.TAIL if record is None else record.origin
        spared = position - visit.node.position
        if self.keeper.pays(origin, visit.turns, spared, False, position):
            visit.stops = {position: origin}
            visit.loaded = position

    def leave(self, request_id: str) -> None:
        """A request's blocks go: it has ended, or begins anew later."""
        self._intents.pop(request_id, None)
        visit = self._visits.pop(request_id, None)
        if visit is not None:
            self._drop(self.keeper.step_off(visit.node))

    def inside(self, request_id: str, start: int, end: int) -> list[int]:
        """Positions inside of a request's chunk whose states are to be made, in ascending order."""
        visit = self._visits.get(request_id)
        stops = visit.stops if visit is not None else self._intents[request_id][1].stops.made
        if not stops:
            return []
        return sorted(stop for stop in stops if start < stop < end)

    def prompt_end(self, request_id: str) -> int:
        """Tokens of a running request's prompt."""
        visit = self._visits.get(request_id)
        return visit.prompt if visit is not None else 0

    def wants(self, request_id: str, position: int) -> bool:
        """Whether a request's state at a position is to be kept."""
        visit = self._visits.get(request_id)
        return visit is not None and position in visit.stops

    def answer_due(self, request_id: str, position: int) -> bool:
        """Whether a running answer's state is to be copied, now that it stands at a position."""
        visit, every = self._visits.get(request_id), self._answer_tokens
        if visit is None or not every or position % every or position <= visit.prompt:
            return False
        if position <= visit.node.position:
            return False
        if visit.answer is not None and visit.answer.state is not None:
            return True
        spared = position - visit.node.position
        return self.keeper.pays(Origin.ANSWER, visit.turns, spared, False, position)

    # -- states ------------------------------------------------------------------------------------

    def published(
        self,
        request: Request,
        state: KVCacheBlock,
        position: int,
        tables: Sequence[Sequence[KVCacheBlock]],
    ) -> None:
        """A request's state has been entered into the prefix cache.

        Args:
            request: The request.
            state: The block with the state.
            position: Where it stands.
            tables: The request's KV pages, all of them, in each block table.
        """
        visit = self._visits.get(request.request_id)
        if visit is None or position <= visit.node.position:
            return
        keeper, page = self.keeper, self._page_tokens
        origin = visit.stops.pop(position, Origin.ANSWER)
        key = request.block_hashes[position // page - 1]
        if self.cold is not None and (before := self.cold.of(key)) is not None:
            # Two requests had the same prefix; the whole state takes the encoded one's place.
            self._give_up_cold(before)
        record = keeper.record(key, origin, visit.turns, position)
        below = visit.node
        part = slice(below.position // page, position // page)
        # Table by table within a page of tokens, so that joined runs of pages stay in order.
        own = [
            block.block_id for row in zip(*(t[part] for t in tables), strict=True) for block in row
        ]
        node = keeper.tree.add(below, position, own, state.block_id)
        visit.node = node
        self.nodes[state.block_id] = node
        self.pages.update(own)
        keeper.keep(record, node)
        keeper.step_on(node)
        if position == visit.loaded:
            found, visit.found = visit.found, record
        else:
            found = visit.found
        if origin is Origin.ANSWER and position != visit.loaded:
            before, visit.answer = visit.answer, node
            if before is not None and before.state is not None:
                self._withdraw(before)
        self._drop(keeper.step_off(below))
        if found is not None:
            keeper.went_on(found)

    def _withdraw(self, node: Node) -> None:
        """Take a state out of the cache whose request has moved it on."""
        state = node.state
        assert state is not None
        if state < 0:
            self._give_up_cold(node)
            return
        del self.nodes[state]
        self._drop(self.keeper.give_up(node, for_room=False, moved=True))
        self._pools[Kind.SSM].evict((state,))
        if self.arena.is_cached(state):
            self.arena.drop(state)

    def _give_up_cold(self, node: Node) -> None:
        """Let go of an encoded state that nobody will miss, and of its block if that is all."""
        assert self.cold is not None
        assert node.state is not None
        del self.nodes[node.state]
        block = self.cold.vacate(node)
        if block is not None:
            self.arena.drop(block)
        self._drop(self.keeper.give_up(node, for_room=False, moved=True))

    def pages_of(self, state: int) -> list[list[int]] | None:
        """The KV pages of a kept state's prefix by table, None for a state that is not kept."""
        node: Node | None = self.nodes.get(state)
        if node is None:
            return None
        parts = []
        while node is not None:
            parts.append(node.pages)
            node = node.parent
        pages = [page for part in reversed(parts) for page in part]
        return [pages[table :: self._tables] for table in range(self._tables)]

    def renamed(self, old: int, new: int) -> None:
        """A state has moved to another block."""
        node = self.nodes.pop(old, None)
        if node is not None:
            node.state = new
            self.nodes[new] = node

    def unpublished(self, state: int) -> None:
        """A state has been taken out of the prefix cache."""
        node = self.nodes.pop(state, None)
        if node is not None:
            self._drop(self.keeper.give_up(node, for_room=False))

    def states_with(self, pages: set[int]) -> set[int]:
        """Blocks of kept states that need any of these KV pages; encoded ones are given up."""
        found: set[int] = set()
        ahead = [node for node in self.keeper.tree.nodes() if pages.intersection(node.pages)]
        while ahead:
            node = ahead.pop()
            ahead.extend(node.children)
            if node.state is None:
                continue
            if node.state >= 0:
                found.add(node.state)
                continue
            self._give_up_cold(node)
        return found

    def choose(self) -> list[int]:
        """Give the least of the kept prefixes up; the cached blocks that go with it.

        A whole state is encoded first, if that is what is done here.
        """
        while True:
            node = self.keeper.victim()
            if node is None:
                return []
            if self.cold is not None and self.cold.may_encode(node):
                freed = self.cold.encode(node)
                if freed is None:
                    continue
                return [freed]
            cached = [block for block in self._give_up(node) if self.arena.is_cached(block)]
            if cached:
                return cached

    def _give_up(self, node: Node) -> list[int]:
        """Give a kept prefix up for room; the blocks that are of no use any more."""
        state = node.state
        assert state is not None
        del self.nodes[state]
        blocks = [state]
        if state < 0:
            assert self.cold is not None
            freed = self.cold.vacate(node)
            blocks = [] if freed is None else [freed]
        elif not self.arena.is_cached(state):
            # In use, so its block stays; but nobody is to resume from what is kept no more.
            self._pools[Kind.SSM].evict((state,))
        pages = self.keeper.give_up(node)
        self.pages.difference_update(pages)
        return blocks + pages

    def _drop(self, pages: Sequence[int]) -> None:
        """Let go of pages that no state needs any more."""
        if not pages:
            return
        self.pages.difference_update(pages)
        cached = [page for page in pages if self.arena.is_cached(page)]
        self._pools[Kind.KV].evict(cached)
        for page in cached:
            self.arena.drop(page)

    def clear(self) -> None:
        """Forget what is kept; nothing is in use."""
        for node in list(self.nodes.values()):
            self.keeper.give_up(node, for_room=False, moved=True)
        self.nodes.clear()
        self.pages.clear()
        if self.cold is not None:
            self.cold.clear()

    def problems(self) -> list[str]:
        """What does not add up: orphans of either kind, and mistakes of the tree."""
        found = self.keeper.tree.problems()
        arena = self.arena
        cold: Container[int] = () if self.cold is None else self.cold.blocks
        whole = [state for state in self.nodes if state >= 0]
        for kind, kept in ((Kind.KV, self.pages), (Kind.SSM, whole)):
            pool = self._pools[kind]
            known = set(kept)
            orphans = [
                block
                for block in arena.cached_handles(kind)
                if block not in known and block not in cold
            ]
            if orphans:
                found.append(f"{kind.label}: {orphans[:5]} are cached, and no state needs them")
            lost = [block for block in kept if pool.blocks[block & ID_MASK].block_hash is None]
            if lost:
                found.append(f"{kind.label}: {lost[:5]} are needed, and cannot be found")
        owned = [page for node in self.keeper.tree.nodes() for page in node.pages]
        if len(owned) != len(self.pages) or set(owned) != self.pages:
            found.append(f"{len(owned)} pages in the tree, {len(self.pages)} needed")
        if self.cold is not None:
            found += self.cold.problems()
        return found
