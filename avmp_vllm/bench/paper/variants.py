"""The allocators of the corrected grid: what each can hold in the same bytes.

Each gets ``total_bytes`` of device memory, null pages included: real kernels write somewhere for
padded rows, so every engine keeps a page that belongs to nobody. Pages hold 16 tokens except where
a rule says otherwise. All hand out page ids, keep them by request and use list slices, so that
their times compare.

==================== ===========================================================================
limit                bytes, to the token; no pages, no null page. Nothing can do better
stock_vllm           one pool of vLLM 0.32's rule: the attention block is raised until its page
                     covers one layer's state, the state padded up to it, the layers split into
                     groups of equal size; a request holds one block a group and one block for
                     each stretch of tokens. One null block
static_09            two pools, bytes 0.9 : 1 state to KV (SGLang's default). A null page in each
static_best          the same with the split that serves most in this very cell, found afterwards
two_ended            SGLang's unified memory: one buffer, pools from both ends, compacted at every
                     free. A null page in each
paper_avmp           the paper's AVMP b128: two slabs of ``total_bytes`` *each* (twice the memory of
                     everyone else), split in half, tail-only migration of 128 donor pages
paper_avmp_half      the same with two slabs of half the bytes, which is the same memory
avmp                 this project's allocator, `avmp_vllm.core.Arena`, as the engine uses it
avmp_null_outside    the same with its null bytes on top of the budget: what they cost
==================== ===========================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from avmp_vllm.bench.paper.allocators import NumberedPool
from avmp_vllm.bench.paper.models import PAGE_TOKENS, Model
from avmp_vllm.core import AllocationFailure, Arena, Geometry, Kind, capacity


class Space(Protocol):
    """What the corrected grid needs of an allocator."""

    #: Tokens of one page; a request asks for pages of this size.
    page_tokens: int
    #: Times that capacity went from one pool to the other.
    migrations: int
    #: Bytes of live pages that were copied to another place.
    copied_bytes: int

    def allocate(self, request: int, pages: int, blocks: int) -> bool:
        """Give a request KV pages and SSM states: all, or none and False."""

    def free(self, request: int) -> None:
        """Take back everything that a request holds."""


class _Plain:
    """Base of allocators that never move anything."""

    page_tokens = PAGE_TOKENS
    migrations = 0
    copied_bytes = 0


class Limit(_Plain):
    """Shared bytes without any granularity."""

    page_tokens = 1

    def __init__(self, model: Model, total_bytes: int) -> None:
        self._free = total_bytes
        self._token, self._block = model.token_bytes, model.block_bytes
        self._held: dict[int, int] = {}

    def allocate(self, request: int, pages: int, blocks: int) -> bool:
        size = pages * self._token + blocks * self._block
        if size > self._free:
            return False
        self._free -= size
        self._held[request] = self._held.get(request, 0) + size
        return True

    def free(self, request: int) -> None:
        self._free += self._held.pop(request)


class _Stack:
    """A fixed pool of page ids."""

    def __init__(self, count: int) -> None:
        # Id 0 is the null page.
        self.ids = list(range(max(count, 0), 0, -1))
        self.held: dict[int, list[int]] = {}

    def take(self, request: int, count: int) -> None:
        ids = self.ids
        if count == 1:
            taken = [ids.pop()]
        else:
            taken = ids[: -count - 1 : -1]
            del ids[-count:]
        mine = self.held.get(request)
        if mine is None:
            self.held[request] = taken
        else:
            mine += taken

    def give(self, request: int) -> None:
        self.ids += self.held.pop(request, ())


def stock_block_tokens(model: Model) -> int:
    """Tokens of vLLM's attention block: the least multiple of 16 that covers a layer's state."""
    return capacity.stock_block_tokens(
        PAGE_TOKENS, model.layer_page_bytes, model.layer_state_bytes, PAGE_TOKENS
    )


class StockVLLM(_Plain):
    """One pool of inflated blocks, one block a group and request."""

    def __init__(self, model: Model, total_bytes: int) -> None:
        self.page_tokens = stock_block_tokens(model)
        # Groups have as many layers as the rarer kind (vLLM takes the larger number only where the
        # two are within a factor of 1.5). A block spans the layers of its group.
        layers = min(model.kv_layers, model.ssm_layers)
        if max(model.kv_layers, model.ssm_layers) < 1.5 * layers:
            layers = max(model.kv_layers, model.ssm_layers)
        self._groups = -(-model.ssm_layers // layers)
        token_bytes = model.layer_page_bytes // PAGE_TOKENS
        block_bytes = self.page_tokens * token_bytes * layers
        self._pool = _Stack(total_bytes // block_bytes - 1)

    def allocate(self, request: int, pages: int, blocks: int) -> bool:
        count = pages + blocks * self._groups
        if count > len(self._pool.ids):
            return False
        self._pool.take(request, count)
        return True

    def free(self, request: int) -> None:
        self._pool.give(request)


class StaticSplit(_Plain):
    """Two pools that never exchange a byte.

    Args:
        model: Sizes.
        total_bytes: Of both pools.
        blocks: SSM blocks, the null block included; KV gets the rest.
    """

    def __init__(self, model: Model, total_bytes: int, blocks: int) -> None:
        pages = (total_bytes - blocks * model.block_bytes) // model.page_bytes
        self._kv, self._ssm = _Stack(pages - 1), _Stack(blocks - 1)

    def allocate(self, request: int, pages: int, blocks: int) -> bool:
        if pages > len(self._kv.ids) or blocks > len(self._ssm.ids):
            return False
        if pages:
            self._kv.take(request, pages)
        if blocks:
            self._ssm.take(request, blocks)
        return True

    def free(self, request: int) -> None:
        self._kv.give(request)
        self._ssm.give(request)


class CountedSplit(_Plain):
    """`StaticSplit` by numbers alone, for the search of the best split."""

    def __init__(self, model: Model, total_bytes: int, blocks: int) -> None:
        self._pages = (total_bytes - blocks * model.block_bytes) // model.page_bytes - 1
        self._blocks = blocks - 1
        self._held: dict[int, tuple[int, int]] = {}

    def allocate(self, request: int, pages: int, blocks: int) -> bool:
        if pages > self._pages or blocks > self._blocks:
            return False
        self._pages -= pages
        self._blocks -= blocks
        held_pages, held_blocks = self._held.get(request, (0, 0))
        self._held[request] = (held_pages + pages, held_blocks + blocks)
        return True

    def free(self, request: int) -> None:
        pages, blocks = self._held.pop(request)
        self._pages += pages
        self._blocks += blocks


def static_blocks(model: Model, total_bytes: int, state_to_kv: float) -> int:
    """SSM blocks of a static split, from the ratio of state bytes to KV bytes."""
    return int(total_bytes * state_to_kv / (1 + state_to_kv)) // model.block_bytes


class _CompactBand:
    """Pages of one kind packed against one end; handles stay, places change."""

    def __init__(self) -> None:
        self.place_of: dict[int, int] = {}
        self.handle_at: list[int] = []
        self._spare: list[int] = []
        self.held: dict[int, list[int]] = {}

    def take(self, request: int, count: int) -> None:
        spare, handle_at = self._spare, self.handle_at
        first = len(handle_at)
        fresh = count - len(spare)
        if fresh > 0:
            # Every handle is in use or spare, so the next new one is their number.
            total = first + len(spare)
            spare += range(total + fresh - 1, total - 1, -1)
        taken = spare[: -count - 1 : -1]
        del spare[-count:]
        handle_at += taken
        self.place_of.update(zip(taken, range(first, first + count), strict=True))
        mine = self.held.get(request)
        if mine is None:
            self.held[request] = taken
        else:
            mine += taken

    def give(self, request: int) -> int:
        """Free a request's pages and close the holes at once; pages copied."""
        handles = self.held.pop(request, None)
        if not handles:
            return 0
        place_of, handle_at = self.place_of, self.handle_at
        keep = len(handle_at) - len(handles)
        places = [place_of.pop(handle) for handle in handles]
        holes = [place for place in places if place < keep]
        if holes:
            movers = [handle for handle in handle_at[keep:] if handle in place_of]
            for handle, hole in zip(movers, holes, strict=True):
                handle_at[hole] = handle
                place_of[handle] = hole
        del handle_at[keep:]
        self._spare += handles
        return len(holes)


class TwoEnded(_Plain):
    """Two pools growing towards each other, compacted at every free."""

    def __init__(self, model: Model, total_bytes: int) -> None:
        self._page, self._block = model.page_bytes, model.block_bytes
        self._gap = total_bytes - self._page - self._block
        self._kv, self._ssm = _CompactBand(), _CompactBand()

    def allocate(self, request: int, pages: int, blocks: int) -> bool:
        size = pages * self._page + blocks * self._block
        if size > self._gap:
            return False
        self._gap -= size
        if pages:
            self._kv.take(request, pages)
        if blocks:
            self._ssm.take(request, blocks)
        return True

    def free(self, request: int) -> None:
        before = len(self._kv.handle_at), len(self._ssm.handle_at)
        copied = self._kv.give(request) * self._page + self._ssm.give(request) * self._block
        self.copied_bytes += copied
        self._gap += (before[0] - len(self._kv.handle_at)) * self._page
        self._gap += (before[1] - len(self._ssm.handle_at)) * self._block


class PaperAVMP(_Plain):
    """The paper's AVMP without its eviction of running requests.

    Args:
        model: Sizes; pages and states are allocated layer by layer, as in the paper.
        budget: Bytes that both pools share; each has a slab of as many.
        batch: Donor pages that a migration moves.
    """

    def __init__(self, model: Model, budget: int, batch: int = 128) -> None:
        self._batch = batch
        self._unit = (model.layer_page_bytes, model.layer_state_bytes)
        self._each = (model.kv_layers, model.ssm_layers)
        null = (model.page_bytes, model.block_bytes)
        self._pools = tuple(
            NumberedPool(
                (budget // 2 - null[kind]) // self._unit[kind],
                (budget - null[kind]) // self._unit[kind],
            )
            for kind in Kind
        )

    def allocate(self, request: int, pages: int, blocks: int) -> bool:
        wanted = (pages, blocks)
        for kind in Kind:
            count = wanted[kind] * self._each[kind]
            if not count or self._take(kind, request, count):
                continue
            if kind is Kind.SSM:  # States come with the first pages only: undo those.
                self._pools[Kind.KV].free(request)
            return False
        return True

    def free(self, request: int) -> None:
        for pool in self._pools:
            pool.free(request)

    def _take(self, kind: Kind, request: int, count: int) -> bool:
        pool, donor = self._pools[kind], self._pools[kind.other]
        if pool.take(request, count):
            return True
        if not donor.cut(self._batch):
            return False
        if not pool.grow(self._batch * self._unit[kind.other] // self._unit[kind]):
            donor.grow(self._batch)
            return False
        self.migrations += 1
        return pool.take(request, count)


class AVMP(_Plain):
    """This project's arena.

    Args:
        model: Sizes.
        total_bytes: Of the arena.
        null_outside: Add the null bytes to the arena, to show what they cost.
    """

    def __init__(self, model: Model, total_bytes: int, null_outside: bool = False) -> None:
        arena_bytes = total_bytes + (null_bytes(model) if null_outside else 0)
        self._arena = Arena(Geometry(arena_bytes, model.page_bytes, model.block_bytes, PAGE_TOKENS))
        self._pages: dict[int, list[int]] = {}
        self._blocks: dict[int, list[int]] = {}

    def allocate(self, request: int, pages: int, blocks: int) -> bool:
        try:
            handles = self._arena.allocate(pages, blocks)
        except AllocationFailure:
            return False
        if blocks:
            self._blocks[request] = handles[pages:]
            self._pages[request] = handles[:pages]
        else:
            self._pages[request] += handles
        return True

    def free(self, request: int) -> None:
        arena = self._arena
        arena.release(self._pages.pop(request))
        arena.release(self._blocks.pop(request))

    @property
    def migrations(self) -> int:
        return sum(self._arena.statistics.migrations.values())

    @property
    def copied_bytes(self) -> int:
        return sum(self._arena.statistics.relocated_bytes.values())

    def verify(self) -> None:
        """Check the arena's invariants against what the requests hold."""
        held = [h for table in (self._pages, self._blocks) for ids in table.values() for h in ids]
        self._arena.verify(held)


def null_bytes(model: Model) -> int:
    """Bytes of AVMP's null page, whatever the arena."""
    geometry = Geometry(1 << 40, model.page_bytes, model.block_bytes, PAGE_TOKENS)
    return geometry.null_blocks * geometry.block_bytes


#: Every variant but the best static split, which needs a search.
SPACES: dict[str, Callable[[Model, int], Space]] = {
    "limit": Limit,
    "stock_vllm": StockVLLM,
    "static_09": lambda model, total: StaticSplit(model, total, static_blocks(model, total, 0.9)),
    "two_ended": TwoEnded,
    "paper_avmp": PaperAVMP,
    "paper_avmp_half": lambda model, total: PaperAVMP(model, total // 2),
    "avmp": AVMP,
    "avmp_null_outside": lambda model, total: AVMP(model, total, null_outside=True),
}
