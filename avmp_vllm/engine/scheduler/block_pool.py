"""vLLM's ``BlockPool`` over one pool of the arena.

The prefix cache (hashes, events, metrics) stays vLLM's. What changes is where free blocks come
from: the arena hands them out, and keeps the unreferenced cached ones in one eviction order over
both pools. A block's id is its handle. Block objects are made when the band first reaches them, so
a large arena costs nothing until it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.core.block_pool import BlockHashToBlockMap, BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from avmp_vllm.core import ID_MASK, Arena, Kind, kind_of

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_metrics import KVCacheMetricsCollector
    from vllm.v1.request import Request


class AVMPBlockPool(BlockPool):
    """One pool's blocks.

    Args:
        arena: Shared by both pools.
        kind: Which pool.
        enable_caching: As in ``BlockPool``.
        hash_block_size: As in ``BlockPool``.
        enable_kv_cache_events: As in ``BlockPool``.
        metrics_collector: As in ``BlockPool``.
        others: Of ``BlockPool``, what only some minor releases have.

    Attributes:
        kept: Blocks that stay in the prefix cache when nobody references them; None for all.
    """

    def __init__(
        self,
        arena: Arena,
        kind: Kind,
        enable_caching: bool,
        hash_block_size: int,
        enable_kv_cache_events: bool = False,
        metrics_collector: KVCacheMetricsCollector | None = None,
        **others: Any,
    ) -> None:
        # The parent makes the null block, id 0, and nothing else.
        super().__init__(
            1, enable_caching, hash_block_size, enable_kv_cache_events, metrics_collector, **others
        )
        self.arena = arena
        self.kind = kind
        self.kept: Container[int] | None = None
        self._is_kv = kind is Kind.KV
        # Limit of ids; a manager that wants to wait asks for one more than this.
        self.num_gpu_blocks = arena.geometry.limit(kind) + 1

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """Reference new blocks.

        Raises:
            AllocationFailure: The arena cannot hold them; the coordinator checks that first.
        """
        if not num_blocks:
            return []
        if self._is_kv:
            numbers = self.arena.allocate(num_blocks)
        else:
            numbers = [handle & ID_MASK for handle in self.arena.allocate(0, num_blocks)]
        try:
            new = list(map(self.blocks.__getitem__, numbers))
        except IndexError:
            self._make_blocks()
            new = list(map(self.blocks.__getitem__, numbers))
        collector = self.metrics_collector
        for block in new:
            assert not block.ref_cnt
            block.ref_cnt = 1
            if collector:
                collector.on_block_allocated(block)
        return new

    def _make_blocks(self) -> None:
        """Make the objects of handles that the band has reached for the first time."""
        tag = self.kind.tag
        self.blocks.extend(
            KVCacheBlock(number | tag, pool=self)
            for number in range(len(self.blocks), self.arena.known(self.kind) + 1)
        )

    def cache_full_blocks(
        self,
        request: Request,
        blocks: list[KVCacheBlock],
        num_cached_blocks: int,
        num_full_blocks: int,
        block_size: int,
        kv_cache_group_id: int,
        block_mask: list[bool] | None = None,
    ) -> None:
        """Publish full blocks under their hashes, as in ``BlockPool``.

        A prompt has many small pages here, and nearly all of them are new to the cache: those are
        entered in one tight loop, the rest by the parent's general one.
        """
        first = num_cached_blocks
        if (
            block_size == self.hash_block_size
            and block_mask is None
            and not self.enable_kv_cache_events
        ):
            entries = self.cached_block_hash_to_block._cache
            group = kv_cache_group_id.to_bytes(4, "big", signed=False)
            tokens = first * block_size
            hashes = request.block_hashes
            for number in range(first, num_full_blocks):
                block, key = blocks[number], hashes[number] + group
                if block._block_hash is not None or block.is_null or key in entries:
                    break
                first = number + 1
                tokens += block_size
                entries[key] = block
                block._block_hash = key
                block._block_hash_num_tokens = tokens
        super().cache_full_blocks(
            request, blocks, first, num_full_blocks, block_size, kv_cache_group_id, block_mask
        )

    def touch(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Reference cached blocks once more."""
        for block in blocks:
            if block.is_null:  # nobody reads its count; vLLM 0.33 keeps none
                continue
            if block.ref_cnt == 0:
                self.arena.revive(block.block_id)
            block.ref_cnt += 1
            if self.metrics_collector:
                self.metrics_collector.on_block_accessed(block)

    def free_blocks(self, ordered_blocks: Iterable[KVCacheBlock]) -> None:
        """Drop one reference of each block, the one to be evicted first in front.

        Blocks of the other pool are handed over to it.
        """
        free: list[int] = []
        cached: list[int] = []
        useless: list[int] = []
        kept = self.kept
        others: list[KVCacheBlock] = []
        for block in ordered_blocks:
            if block.pool is not self:
                others.append(block)
                continue
            block.ref_cnt = count = block.ref_cnt - 1
            if not count and not block.is_null:
                # The slot, not the property: this is the innermost loop of a request's end.
                block_id = block.block_id
                if block._block_hash is None:
                    free.append(block_id)
                elif kept is None or block_id in kept:
                    cached.append(block_id)
                else:
                    useless.append(block_id)
        if useless:
            self.evict(useless)
            free += useless
        if free:
            self.arena.release(free)
        if cached:
            self.arena.cache(cached)
        if others:
            pool = others[0].pool
            assert pool is not None
            pool.free_blocks(others)

    def evict(self, handles: Sequence[int]) -> None:
        """Forget the hashes of cached blocks whose pages the arena is about to reuse.

        Nearly every page has one hash that no other page has; the parent's general way is for the
        rest.
        """
        entries = self.cached_block_hash_to_block._cache
        several = self.cached_block_hashes_by_block
        plain = not self.enable_kv_cache_events and not self.metrics_collector
        for handle in handles:
            block = self.blocks[handle & ID_MASK]
            key = block._block_hash
            if plain and key is not None and handle not in several and entries.get(key) is block:
                del entries[key]
                block._block_hash = block._block_hash_num_tokens = None
            else:
                self._maybe_evict_cached_block(block)

    def evict_blocks(self, block_ids: set[int]) -> None:
        """Take blocks of this pool out of the prefix cache; unreferenced ones become free."""
        for block_id in sorted(block_ids):
            assert kind_of(block_id) is self.kind, f"block {block_id} is of the other pool"
            self._maybe_evict_cached_block(self.blocks[block_id & ID_MASK])
            if self.arena.is_cached(block_id):
                self.arena.drop(block_id)

    def forget(self) -> None:
        """Forget every hash; no block is referenced."""
        for block_id in self.arena.cached_handles(self.kind):
            self.blocks[block_id & ID_MASK].reset_hash()
            self.arena.drop(block_id)
        self.cached_block_hash_to_block = BlockHashToBlockMap()
        self.cached_block_hashes_by_block.clear()
        if self.metrics_collector:
            self.metrics_collector.reset()

    def get_num_free_blocks(self) -> int:
        """Blocks that could be referenced now if the other pool asked for nothing."""
        return self.arena.available(self.kind)

    def get_usage(self) -> float:
        """Share of the arena's usable bytes that this pool's referenced blocks hold."""
        limit = self.arena.geometry.limit(self.kind)
        return self.arena.used(self.kind) / limit if limit else 0.0

    def unpin_blocks(
        self, blocks: Iterable[KVCacheBlock], on_reuse: Callable[[KVCacheBlock], None]
    ) -> None:
        """Not offered: no KV connector that AVMP serves needs it."""
        raise NotImplementedError("AVMP serves no KV connector that unpins blocks")

    def referenced(self) -> list[int]:
        """Handles of all referenced blocks, for verification."""
        return [b.block_id for b in self.blocks if b.ref_cnt and not b.is_null]
