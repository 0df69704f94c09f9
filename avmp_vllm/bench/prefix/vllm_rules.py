"""Prefix caching of vLLM 0.32 for hybrids, and AVMP's first way, which was built on it.

Ported from ``v1/core``: ``HybridKVCacheCoordinator.find_longest_cache_hit``,
``Scheduler._mamba_block_aligned_split``, ``MambaManager`` in ``align`` mode. A state exists where a
chunk of the prompt ends and, in decode, at each multiple of the block; the retention interval says
which of these are kept. One list of least recent use holds pages and states.
"""

from __future__ import annotations

from collections.abc import Iterator

from avmp_vllm.bench.prefix.cache import STEP_TOKENS, Served, Sizes
from avmp_vllm.bench.prefix.lru import PAGE_KIND, STATE_KIND, Lru, page_key, state_key
from avmp_vllm.bench.prefix.trace import PAGE, Request
from avmp_vllm.core.geometry import ceil_div

#: Stock's "interval" here, in blocks: the smallest that is not dense.
INTERVAL_BLOCKS = 2


class VllmRules:
    """Blocks of ``kv_tokens`` and a state at most every ``state_tokens``.

    Args:
        memory: Bytes that hold pages and states.
        kv_tokens: Tokens of a KV block.
        kv_bytes: Its bytes.
        state_tokens: Tokens of a state's block.
        state_bytes: Bytes of a state.
        unit: Tokens at whose multiples a prompt may hit.
        retention: None keeps each state that exists, 0 those at the prompt's last block and where
            known pages ended, a number of blocks those at its multiples besides.
    """

    def __init__(
        self,
        memory: int,
        kv_tokens: int,
        kv_bytes: int,
        state_tokens: int,
        state_bytes: int,
        unit: int,
        retention: int | None,
    ) -> None:
        self._kv_tokens, self._kv_bytes = kv_tokens, kv_bytes
        self._state_tokens, self._state_bytes = state_tokens, state_bytes
        self._unit = unit
        self._retention = retention
        self._fine = unit < state_tokens
        self._lru = Lru(memory)
        self._memory = memory

    def probe(self, request: Request) -> int:
        """Prompt tokens that a request would hit now."""
        return self._hit(request, self._known(request))

    def hold(self, pages: int, states: int) -> None:
        """Leave memory to requests that run."""
        blocks = ceil_div(pages * PAGE, self._kv_tokens)
        held = blocks * self._kv_bytes + states * self._state_bytes
        self._lru.memory = max(self._memory - held, 0)

    def bytes_used(self) -> int:
        """Bytes of cached blocks."""
        return self._lru.used

    def verify(self) -> None:
        """Check the list."""
        self._lru.verify()
        assert self._lru.used <= self._memory

    # -- lookup ------------------------------------------------------------------------------------

    def _known(self, request: Request) -> int:
        """Tokens whose pages are cached, at most all but one."""
        keys, find, size = request.keys, self._lru.find, self._kv_tokens
        limit = request.prompt - 1
        pages, blocks = size // PAGE, 0
        while (blocks + 1) * size <= limit:
            if find(page_key(keys[(blocks + 1) * pages - 1])) is None:
                break
            blocks += 1
        if self._unit < size:
            last = min((blocks + 1) * size - 1, limit) // self._unit
            for position in range(last, blocks * size // self._unit, -1):
                if find(page_key(keys[position * self._unit // PAGE - 1])) is not None:
                    return position * self._unit
        return blocks * size

    def _hit(self, request: Request, known: int) -> int:
        """Position of the last cached state within known pages, 0 if there is none."""
        step = self._unit if self._fine else self._state_tokens
        find = self._lru.find
        for position in range(known // step * step, 0, -step):
            if find(state_key(request.keys[position // PAGE - 1])) is not None:
                return position
        return 0

    # -- chunks ------------------------------------------------------------------------------------

    def _chunk(self, request: Request, start: int, end: int, hit: int, junction: int) -> int:
        """Where a chunk that would run from ``start`` to ``end`` stops.

        Args:
            request: Whose prompt it is.
            start, end: Of the chunk.
            hit: Tokens that the request hit, if this is its first chunk, else 0.
            junction: Where its known pages end, 0 if its state is there.
        """
        block, prompt = self._state_tokens, request.prompt
        last = (prompt - 1) // block * block
        if end < prompt:
            aligned = end // block * block
            if aligned > start or block <= STEP_TOKENS:
                end = aligned
        stops = [last]
        if start % block:
            stops.append((start // block + 1) * block)
        if self._fine:
            tail = (prompt - 1) // self._unit * self._unit
            if last < tail < prompt:
                stops.append(tail)
        if start < junction < end:
            stops.append(start + (junction - start) // block * block)
        return min((stop for stop in stops if start < stop < end), default=end)

    def _chunks(self, request: Request, hit: int, junction: int) -> Iterator[int]:
        """Ends of the prompt's chunks."""
        start, first = hit, hit
        while start < request.prompt:
            end = min(start + STEP_TOKENS, request.prompt)
            start = self._chunk(request, start, end, first, junction)
            first = 0
            yield start

    def _kept(self, request: Request, end: int, junction: int) -> bool:
        """Whether the state at ``end`` tokens, where it exists, is kept."""
        block = self._state_tokens
        if self._fine and end == (request.prompt - 1) // self._unit * self._unit:
            return True
        if end % block:
            return False
        if self._retention is None or (self._retention and end % (self._retention * block) == 0):
            return True
        return end in ((request.prompt - 1) // block * block, junction // block * block)

    # -- serving -----------------------------------------------------------------------------------

    def serve(self, request: Request) -> Served:
        """Serve one request."""
        lru, keys = self._lru, request.keys
        gone = list(lru.gone)
        known = self._known(request)
        hit = self._hit(request, known)
        junction = known if known > hit else 0
        size, pages = self._kv_tokens, self._kv_tokens // PAGE
        held = []
        for block in range(hit // size):
            entry = lru.find(page_key(keys[(block + 1) * pages - 1]))
            assert entry is not None
            lru.hold(entry)
            held.append(entry)
        # What is copied or left behind at once becomes idle before anything else does.
        idle: list[int] = []
        names = [state_key(keys[hit // PAGE - 1])] if hit else []
        if hit % size:
            names.append(page_key(keys[hit // PAGE - 1]))
        for name in names:
            entry = lru.find(name)
            if entry is not None:
                lru.hold(entry)
                idle.append(entry)
        states = 0
        full = True

        def keep(end: int) -> None:
            nonlocal states, full
            entry = lru.add((state_key(keys[end // PAGE - 1]),), self._state_bytes)
            if entry is None:
                full = False
            else:
                states += 1
                idle.append(entry)

        tail = (request.prompt - 1) // self._unit * self._unit
        computed = (request.tokens - 1) // size
        for block in range(len(held), computed + 1):
            names = []
            if block < computed:
                names.append(page_key(keys[(block + 1) * pages - 1]))
            if self._unit < size and block * size < tail < (block + 1) * size:
                names.append(page_key(keys[tail // PAGE - 1]))
            if names:
                entry = lru.add(tuple(names), self._kv_bytes)
                if entry is None:
                    break
                held.append(entry)
        chunks = 0
        for end in self._chunks(request, hit, junction):
            chunks += 1
            if self._kept(request, end, junction):
                keep(end)
        block = self._state_tokens
        for end in range((request.prompt // block + 1) * block, request.tokens, block):
            if self._kept(request, end, 0):
                keep(end)
        lru.release(idle)
        lru.release(reversed(held))
        return Served(
            hit=hit,
            cuts=chunks - ceil_div(request.prompt - hit, STEP_TOKENS),
            states=states,
            evicted_states=lru.gone[STATE_KIND] - gone[STATE_KIND],
            evicted_pages=(lru.gone[PAGE_KIND] - gone[PAGE_KIND]) * pages,
            copied_states=states if self._fine else 0,
            kind="state" if hit else "",
        )


class Stock(VllmRules):
    """vLLM as it comes: states at a prompt's last block and at junctions."""

    retention: int | None = 0
    unit: int | None = None

    def __init__(self, memory: int, sizes: Sizes) -> None:
        # The null block.
        blocks = max(memory // sizes.block - 1, 0)
        super().__init__(
            blocks * sizes.block,
            sizes.block_tokens,
            sizes.kv_blocks * sizes.block,
            sizes.block_tokens,
            sizes.state_blocks * sizes.block,
            self.unit or sizes.block_tokens,
            self.retention,
        )


class StockDense(Stock):
    """``--prefix-cache-retention-interval none``: each state that exists."""

    retention = None


class StockInterval(Stock):
    """A retention interval of so many blocks."""

    retention = INTERVAL_BLOCKS


class StockUnit(Stock):
    """``--prefix-match-unit 16``."""

    unit = PAGE


class StockUnitDense(StockUnit):
    """The same with each state that exists."""

    retention = None


class FirstAvmp(VllmRules):
    """AVMP before it chose its states: exact pages, one list of least recent use over both pools.

    A state at each 512 tokens or at the prompt's last page, where that spares ``tail`` tokens.
    """

    checkpoint_tokens = 512

    def __init__(self, memory: int, sizes: Sizes) -> None:
        super().__init__(
            # The null block and page.
            max(memory - sizes.state - sizes.page, 0),
            PAGE,
            sizes.page,
            self.checkpoint_tokens,
            sizes.state,
            PAGE,
            0,
        )
        self._tail_tokens = sizes.block_tokens

    def _chunk(self, request: Request, start: int, end: int, hit: int, junction: int) -> int:
        clipped = super()._chunk(request, start, end, hit, junction)
        prompt, spacing = request.prompt, self._state_tokens
        if clipped == end or end < prompt or start < junction < end:
            return clipped
        limit = end if start % spacing == 0 else min(end, ceil_div(start, spacing) * spacing)
        if limit < prompt:
            return clipped
        kept = (prompt - 1) // PAGE * PAGE
        return kept if kept > start and kept - hit >= self._tail_tokens else end
