"""Rivals that keep their cache in a radix tree: SGLang and Marconi.

Both keep the state at an answer's end, which costs no cut. States stand at whole pages here, where
SGLang's default has pages of one token: its hits come out up to 15 tokens short.
"""

from __future__ import annotations

import heapq

import numpy as np

from avmp_vllm.bench.prefix.cache import STEP_TOKENS, Served, Sizes
from avmp_vllm.bench.prefix.radix import Node, Radix
from avmp_vllm.bench.prefix.trace import PAGE, Request

#: SGLang's default ``--mamba-full-memory-ratio``: state bytes to KV bytes.
STATIC_RATIO = 0.9


class _Tree:
    """What both have in common: a tree within bytes, and a clock that counts requests' events."""

    def __init__(self, memory: int, sizes: Sizes) -> None:
        self.memory = self._all = memory
        self.sizes = sizes
        self.tree = Radix()
        self.now = 0
        self.evicted_states = self.evicted_pages = self.made = 0

    def bytes_used(self) -> int:
        """Bytes of the tree's pages and states."""
        return self.tree.pages * self.sizes.page + self.tree.states * self.sizes.state

    def verify(self) -> None:
        """Check the tree and its bytes."""
        self.tree.verify()
        assert self.bytes_used() <= self._all

    def probe(self, request: Request) -> int:
        """Prompt tokens that a request would hit now."""
        path, depth = self.tree.match(request.keys, request.reusable)
        node = self.hit_node(path, depth, request.prompt)
        return node.end * PAGE if node else 0

    def hold(self, pages: int, states: int) -> None:
        """Leave memory to requests that run."""
        held = pages * self.sizes.page + states * self.sizes.state
        self.memory = max(self._all - held, 0)

    def hit_node(self, path: list[Node], depth: int, prompt: int) -> Node | None:
        """The deepest node whose state a prompt can go on from."""
        for node in reversed(path):
            if node.state and node.end <= depth and node.state < prompt:
                return node
        return None


class Sglang(_Tree):
    """SGLang's ``MambaRadixCache`` with ``--enable-unified-memory``.

    States at the end of each prompt chunk and of the answer. Two lists of least recent use, and
    whatever a prompt's known prefix passes is used in both. A state goes alone from an inner node,
    with its pages from a leaf; pages go leaf by leaf, and leaves without a state go with them.
    """

    def __init__(self, memory: int, sizes: Sizes) -> None:
        super().__init__(memory, sizes)
        self._pages: list[tuple[int, int, Node]] = []
        self._states: list[tuple[int, int, Node]] = []
        self._order = 0
        self._begun = 0

    def _touch(self, node: Node) -> None:
        """Use a node and all above it; the child counts as used later than its parent."""
        path = []
        while node.parent is not None:
            path.append(node)
            node = node.parent
        for node in reversed(path):
            self.now += 1
            node.used = self.now
            heapq.heappush(self._pages, (self.now, self._next(), node))
            if node.state:
                node.state_used = self.now
                heapq.heappush(self._states, (self.now, self._next(), node))

    def _oldest(self, heap: list[tuple[int, int, Node]], states: bool) -> Node | None:
        """The node of a list that was not used for longest and may go."""
        while heap:
            used, _, node = heap[0]
            live = node.parent is not None and used == (node.state_used if states else node.used)
            if live and (node.state if states else not node.children):
                # The request that is being served holds what it used.
                return node if used <= self._begun else None
            heapq.heappop(heap)
        return None

    def _drop(self, node: Node) -> None:
        """Give a leaf up, and the leaves without a state that this leaves above it."""
        while True:
            self.evicted_pages += node.pages
            self.evicted_states += bool(node.state)
            node = self.tree.drop_leaf(node)
            if node.parent is None or node.children:
                return
            if node.state or node.used > self._begun:
                heapq.heappush(self._pages, (node.used, self._next(), node))
                return

    def _next(self) -> int:
        self._order += 1
        return self._order

    def _give_up_state(self) -> bool:
        node = self._oldest(self._states, True)
        if node is None:
            return False
        if node.children or node.used > self._begun:
            self.tree.drop_state(node)
            self.evicted_states += 1
        else:
            self._drop(node)
        return True

    def _give_up_pages(self) -> bool:
        node = self._oldest(self._pages, False)
        if node is None:
            return False
        self._drop(node)
        return True

    def _room(self, pages: int, states: int) -> bool:
        """Make room; each pool asks its own list first."""
        need = pages * self.sizes.page + states * self.sizes.state
        while self.bytes_used() + need > self.memory:
            first, second = self._give_up_pages, self._give_up_state
            if states:
                first, second = second, first
            if not (first() or second()):
                return False
        return True

    def _keep(self, request: Request, tokens: int) -> int:
        """Enter a sequence's first tokens and the state behind them; 1 if a state was made."""
        count = tokens // PAGE
        if not count:
            return 0
        path, depth = self.tree.match(request.keys, count)
        if path:
            # Whatever of it is there is in use while room is made for the rest.
            self._touch(path[-1])
        if not self._room(count - depth, 0):
            return 0
        node, _ = self.tree.insert(request.keys, count, self.now)
        self._touch(node)
        if node.state:
            return 0
        if not self._room(0, 1):
            return 0
        self.tree.set_state(node, tokens, self.now)
        self._touch(node)
        return 1

    def serve(self, request: Request) -> Served:
        """Serve one request."""
        self._begun = self.now
        gone = self.evicted_states, self.evicted_pages
        path, depth = self.tree.match(request.keys, request.reusable)
        node = self.hit_node(path, depth, request.prompt)
        hit = node.end * PAGE if node else 0
        if node:
            self._touch(node)
        made = 0
        for end in range(hit + STEP_TOKENS, request.prompt, STEP_TOKENS):
            made += self._keep(request, end)
        made += self._keep(request, request.prompt)
        made += self._keep(request, request.tokens - 1)
        return Served(
            hit=hit,
            states=made,
            evicted_states=self.evicted_states - gone[0],
            evicted_pages=self.evicted_pages - gone[1],
            copied_states=made - 1 if made else 0,
            kind="state" if hit else "",
        )


class SglangStatic(Sglang):
    """SGLang as it comes: two pools of fixed size, 0.9 bytes of states to one of KV."""

    def __init__(self, memory: int, sizes: Sizes) -> None:
        super().__init__(memory, sizes)
        self._states_limit = int(memory * STATIC_RATIO / (1 + STATIC_RATIO)) // sizes.state
        self._pages_limit = (memory - self._states_limit * sizes.state) // sizes.page
        self._limits = self._pages_limit, self._states_limit

    def hold(self, pages: int, states: int) -> None:
        """Leave each pool's part to requests that run."""
        self._pages_limit = max(self._limits[0] - pages, 0)
        self._states_limit = max(self._limits[1] - states, 0)

    def _room(self, pages: int, states: int) -> bool:
        while self.tree.pages + pages > self._pages_limit:
            if not self._give_up_pages():
                return False
        while self.tree.states + states > self._states_limit:
            if not self._give_up_state():
                return False
        return True


class MarconiLru(_Tree):
    """Marconi's admission (states at answers' ends and at junctions), least recent use.

    A node with two children or more stays. From a node with one child the state goes, and its pages
    become the child's; a leaf goes as a whole. Only the node that was hit is used by a hit.
    """

    def __init__(self, memory: int, sizes: Sizes) -> None:
        super().__init__(memory, sizes)
        self._heap: list[tuple[float, int, Node]] = []
        self._held: set[Node] = set()
        self._order = 0

    def _use(self, node: Node) -> None:
        node.used = self.now
        self._note(node)

    def _note(self, node: Node) -> None:
        """A node may have become a victim."""
        self._order += 1
        heapq.heappush(self._heap, (node.used, self._order, node))

    def _victim(self) -> Node | None:
        """The node to go: of those with at most one child, the one not used for longest."""
        kept, found = [], None
        while self._heap and found is None:
            entry = heapq.heappop(self._heap)
            used, _, node = entry
            if node.parent is None or node.used != used or len(node.children) > 1:
                continue
            if node in self._held:
                kept.append(entry)
            else:
                found = node
        for entry in kept:
            heapq.heappush(self._heap, entry)
        return found

    def _give_up(self, node: Node) -> None:
        self.evicted_states += bool(node.state)
        if node.children:
            if node.state:
                self.tree.drop_state(node)
            self._note(self.tree.join(node))
            return
        self.evicted_pages += node.pages
        parent = self.tree.drop_leaf(node)
        if parent.parent is not None:
            self._note(parent)

    def _room(self, pages: int, states: int) -> bool:
        need = pages * self.sizes.page + states * self.sizes.state
        while self.bytes_used() + need > self.memory:
            victim = self._victim()
            if victim is None:
                return False
            self._give_up(victim)
        return True

    def _keep(self, request: Request, tokens: int) -> int:
        """Enter a sequence's first tokens and the state behind them; 1 if a state was made."""
        count = tokens // PAGE
        if not count:
            return 0
        path, depth = self.tree.match(request.keys, count)
        self._held = set(path)
        split = bool(path) and depth < path[-1].end
        if not self._room(count - depth, 1):
            return 0
        node, _ = self.tree.insert(request.keys, count, self.now)
        if split:
            self._note(path[-1])
            upper = path[-1].parent
            assert upper is not None
            self._note(upper)
        made = not node.state
        if made:
            self.tree.set_state(node, tokens, self.now)
        self._use(node)
        self._held = set()
        return made

    def serve(self, request: Request) -> Served:
        """Serve one request."""
        self.now += 1
        gone = self.evicted_states, self.evicted_pages
        path, depth = self.tree.match(request.keys, request.reusable)
        node = self.hit_node(path, depth, request.prompt)
        hit = node.end * PAGE if node else 0
        if node:
            self._use(node)
        made = cuts = 0
        if depth * PAGE > hit and depth < path[-1].end:
            # The prompt leaves a known prefix inside of a node: others may do so, too.
            made += self._keep(request, depth * PAGE)
            cuts = made
        made += self._keep(request, request.tokens - 1)
        return Served(
            hit=hit,
            cuts=cuts,
            states=made,
            evicted_states=self.evicted_states - gone[0],
            evicted_pages=self.evicted_pages - gone[1],
            copied_states=cuts,
            kind="state" if hit else "",
        )


class _Weighted(MarconiLru):
    """Marconi's eviction with a given weight: the node of least recency + alpha x efficiency.

    Both terms are scaled to 0..1 over the candidates; efficiency is tokens spared (from the parent
    on; prefill FLOPs are near to linear in them) for each byte that would be freed.

    Candidates stand in arrays, a slot each, so that a victim costs one pass of numpy over them.
    """

    def __init__(self, memory: int, sizes: Sizes, alpha: float) -> None:
        super().__init__(memory, sizes)
        self.alpha = alpha
        self._slots: dict[Node, int] = {}
        self._free: list[int] = []
        self._nodes: list[Node | None] = []
        self._used = np.zeros(0)
        self._efficiency = np.zeros(0)

    def _note(self, node: Node) -> None:
        """Enter, renew or strike a node."""
        if node.parent is None or len(node.children) > 1:
            slot = self._slots.pop(node, None)
            if slot is not None:
                self._used[slot] = np.nan
                self._nodes[slot] = None
                self._free.append(slot)
            return
        if node not in self._slots:
            if not self._free:
                size = len(self._nodes)
                self._free = list(range(2 * size + 15, size - 1, -1))
                self._nodes += [None] * (size + 16)
                more = np.full(size + 16, np.nan)
                self._used = np.concatenate((self._used, more))
                self._efficiency = np.concatenate((self._efficiency, more))
            self._slots[node] = self._free.pop()
        slot = self._slots[node]
        sizes = self.sizes
        freed = sizes.state * bool(node.state)
        freed += 0 if node.children else node.pages * sizes.page
        self._nodes[slot] = node
        self._used[slot] = node.used
        self._efficiency[slot] = node.pages * PAGE / freed if freed else 0.0

    def _victim(self) -> Node | None:
        held = [self._slots[node] for node in self._held if node in self._slots]
        used = self._used.copy()
        used[held] = np.nan
        there = np.flatnonzero(~np.isnan(used))
        if not len(there):
            return None
        used, efficiency = used[there], self._efficiency[there]
        score = (used - used.min()) / (np.ptp(used) or 1.0)
        score += self.alpha * (efficiency - efficiency.min()) / (np.ptp(efficiency) or 1.0)
        # Of equal ones the one entered first.
        ties = there[score == score.min()]
        found: Node | None = min((self._nodes[slot] for slot in ties), key=self._age)
        return found

    @staticmethod
    def _age(node: Node | None) -> tuple[int, int]:
        assert node is not None
        return node.used, node.keys[node.end - 1]

    def _give_up(self, node: Node) -> None:
        parent, children = node.parent, list(node.children.values())
        super()._give_up(node)
        for changed in (node, parent, *children):
            assert changed is not None
            self._note(changed)

    def _keep(self, request: Request, tokens: int) -> int:
        made = super()._keep(request, tokens)
        for node in self.tree.match(request.keys, tokens // PAGE)[0]:
            self._note(node)
            for child in node.children.values():
                self._note(child)
        return made


class Marconi:
    """Marconi with its own eviction, whose weight it finds by itself.

    Until five times as many requests have come as were there at the first eviction it goes by least
    recent use; then it replays them with each weight and goes on with the best.
    """

    WEIGHTS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0)
    WINDOW = 5

    def __init__(self, memory: int, sizes: Sizes) -> None:
        self._cache = _Weighted(memory, sizes, 0.0)
        self._seen: list[Request] | None = []
        self._until: int | None = None

    def bytes_used(self) -> int:
        """Bytes of the tree's pages and states."""
        return self._cache.bytes_used()

    def verify(self) -> None:
        """Check the tree and its bytes."""
        self._cache.verify()

    def probe(self, request: Request) -> int:
        """Prompt tokens that a request would hit now."""
        return self._cache.probe(request)

    def hold(self, pages: int, states: int) -> None:
        """Leave memory to requests that run."""
        self._cache.hold(pages, states)

    @property
    def alpha(self) -> float:
        """The weight."""
        return self._cache.alpha

    def serve(self, request: Request) -> Served:
        """Serve one request."""
        served = self._cache.serve(request)
        if self._seen is not None:
            self._seen.append(request)
            if self._until is None and (served.evicted_states or served.evicted_pages):
                self._until = self.WINDOW * len(self._seen)
            if self._until is not None and len(self._seen) >= self._until:
                self._cache.alpha = max(self.WEIGHTS, key=self._replayed)
                self._seen = None
        return served

    def _replayed(self, alpha: float) -> tuple[int, float]:
        """Tokens that a weight would have hit; the smaller of equally good ones."""
        assert self._seen is not None
        cache = _Weighted(self._cache.memory, self._cache.sizes, alpha)
        return sum(cache.serve(request).hit for request in self._seen), -alpha
