"""vLLM's cache coordinator over the two pools of an arena.

vLLM's single-type managers keep the logic of prefix caching; the coordinator gives each of them the
pool of its kind, and answers the one question that needs both pools at once: whether a request's
pages and states fit together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_events import AllBlocksCleared
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_coordinator import (
    HybridKVCacheCoordinator,
    KVCacheCoordinator,
    KVCacheCoordinatorNoPrefixCache,
)

from avmp_vllm.core import Arena, Kind, kind_of
from avmp_vllm.core.geometry import ceil_div
from avmp_vllm.core.tables import Role
from avmp_vllm.core.transfers import NotingArena
from avmp_vllm.engine.entry import minors
from avmp_vllm.engine.entry.config import AVMPConfig, ConfigError
from avmp_vllm.engine.layout.arena import AVMPCacheConfig
from avmp_vllm.engine.layout.groups import kind_of_spec, role_of, state_spec
from avmp_vllm.engine.scheduler.block_pool import AVMPBlockPool
from avmp_vllm.engine.scheduler.checkpoints import Checkpoints
from avmp_vllm.engine.scheduler.memory import ArenaMemory
from avmp_vllm.engine.scheduler.state_manager import ROLE, StateManager
from avmp_vllm.engine.scheduler.state_pool import StatePool

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger("vllm." + __name__)

#: Answer to "how many blocks?" when they do not fit, larger than any number of free blocks.
NOT_NOW = 1 << 62
#: Class of each kind's pool.
POOLS: dict[Kind, type[AVMPBlockPool]] = {Kind.KV: AVMPBlockPool, Kind.SSM: StatePool}


def without_blocks(kv_cache_config: KVCacheConfig) -> KVCacheConfig:
    """The same configuration with one block, and with AVMP's manager for states.

    vLLM's constructors make an object for every block. Ours let them run on this and then bring the
    arena's own pools.
    """
    groups = [
        replace(group, role=ROLE) if kind_of_spec(group.kv_cache_spec) is Kind.SSM else group
        for group in kv_cache_config.kv_cache_groups
    ]
    return replace(kv_cache_config, num_blocks=1, kv_cache_groups=groups)


class DualPoolCoordinator(KVCacheCoordinator):
    """What both coordinators have in common.

    Args:
        kv_cache_config: The arena's configuration.
        config: AVMP's options.
        transfers: Whether a KV connector reads and writes pages beside the model.
        kwargs: Of vLLM's coordinator.

    Attributes:
        arena: The allocator.
        pools: By kind.
        states: The pool of SSM blocks.
        checkpoints: What decides which states are kept; None without prefix caching, and where a
            retention interval is given, which decides instead.
        kinds: Of each cache group.
        local_state: At the end of the local hit that a connector goes on with, if there is one.
    """

    block_pool: BlockPool

    def __init__(
        self,
        kv_cache_config: AVMPCacheConfig,
        config: AVMPConfig,
        transfers: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(without_blocks(kv_cache_config), **kwargs)
        self.kv_cache_config = kv_cache_config
        assert kv_cache_config.geometry is not None
        elastic = kv_cache_config.elastic
        self.arena = (NotingArena if transfers else Arena)(
            kv_cache_config.geometry,
            migration_batch=config.migration_batch,
            on_evict=self._evict,
            chunk_bytes=None if elastic is None else elastic.chunk_bytes,
        )
        #: Set by the manager if the arena is elastic.
        self.memory: ArenaMemory | None = None
        stock = self.block_pool
        self.pools = {
            kind: POOLS[kind](
                self.arena,
                kind,
                stock.enable_caching,
                stock.hash_block_size,
                stock.enable_kv_cache_events,
                stock.metrics_collector,
                **minors.hash_lookahead(stock),
            )
            for kind in Kind
        }
        self.block_pool = self.pools[Kind.KV]
        states = self.pools[Kind.SSM]
        assert isinstance(states, StatePool)
        self.states = states
        #: New pages and blocks of the allocation that vLLM has just found to fit.
        self._next = (0, 0)
        self.kinds = [kind_of_spec(g.kv_cache_spec) for g in kv_cache_config.kv_cache_groups]
        for manager, kind in zip(self.single_type_managers, self.kinds, strict=True):
            manager.block_pool = self.pools[kind]
            manager._null_block = self.pools[kind].null_block
        #: Those of SSM states.
        self.state_managers = [
            manager for manager in self.single_type_managers if isinstance(manager, StateManager)
        ]
        self.checkpoints: Checkpoints | None = None
        self.local_state: KVCacheBlock | None = None
        for states_of_group in self.state_managers:
            states_of_group.offers = transfers
        #: Groups with a page for every so many tokens, which a prefix hit needs all of.
        self.slots = self._slot_groups()
        # A drafter that reads the target's hidden states computes the page behind a hit again, so a
        # hit needs a page more than its state does: vLLM's own rules see to that.
        own_rules = self.retention_interval == 0 and not self.eagle_group_ids
        if stock.enable_caching and own_rules and self.slots:
            self._keep_checkpoints(config)
        elif config.cold_states != "exact":
            raise ConfigError(
                f"cold_states = {config.cold_states!r}: AVMP does not choose the states of this "
                "prefix cache (a retention interval, a drafter that reads hidden states, or "
                "windows do); set it to 'exact'"
            )

    def _slot_groups(self) -> list[int]:
        """KV groups whose pages a prefix hit needs; none if it needs windows, too.

        A kept state keeps the pages of its whole prefix. A window's pages at a position are not
        those of any longer prefix, so the tree of prefixes has no place for them.
        """
        hash_tokens = self.block_pool.hash_block_size
        needed = [
            (index, group.kv_cache_spec)
            for index, group in enumerate(self.kv_cache_config.kv_cache_groups)
            if self.kinds[index] is Kind.KV and group.kv_cache_spec.prefix_cacheable
        ]
        plain = all(
            role_of("", spec) is Role.SLOTS and spec.block_size == hash_tokens for _, spec in needed
        )
        return [index for index, _ in needed] if plain else []

    def _keep_checkpoints(self, config: AVMPConfig) -> None:
        """Let the worth of states decide what is kept."""
        self.checkpoints = Checkpoints(
            self.arena,
            self.pools,
            self.pools[Kind.KV].hash_block_size,
            len(self.slots),
            config.cut_tokens,
            # While it drafts, a request's state is in whichever block its last accepted token is.
            0 if state_spec(self.kv_cache_config).num_speculative_blocks else config.answer_tokens,
            config.cold_states != "exact",
        )
        self.arena.choose = self.checkpoints.choose
        self.pools[Kind.KV].kept = self.checkpoints.pages
        self.states.kept = self.checkpoints.nodes
        self.states.checkpoints = self.checkpoints
        managers = self.single_type_managers
        self._held_states = managers[self.kinds.index(Kind.SSM)].req_to_blocks
        for manager in self.state_managers:
            manager.checkpoints = self.checkpoints
            manager.tables = [managers[index].req_to_blocks for index in self.slots]

    def _evict(self, handles: Sequence[int]) -> None:
        self.pools[kind_of(handles[0])].evict(handles)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: tuple[Sequence[KVCacheBlock], ...],
        num_encoder_tokens: int,
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Bytes that a request needs beyond what it has, counted in KV pages.

        vLLM compares the answer with the KV pool's free pages, less a reserve that it wants kept.
        The answer is ``NOT_NOW`` when both pools cannot serve their parts together; otherwise it
        is never more than what is free, so that rounding refuses nothing that fits.
        """
        if self.retention_interval != 0:
            prefill_end = 0  # as in the parent: dense retention reserves on every chunk
        if apply_admission_cap:
            prefill_end = NOT_NOW  # a state saved inside of a chunk can be forgone
        need = [0, 0]
        for manager, kind, computed in zip(
            self.single_type_managers, self.kinds, new_computed_blocks, strict=True
        ):
            need[kind] += manager.get_num_blocks_to_allocate(
                request_id,
                num_tokens,
                computed,
                total_computed_tokens,
                num_local_computed_tokens,
                num_tokens_main_model,
                apply_admission_cap=apply_admission_cap,
                prefill_end=prefill_end,
            )
        pages, blocks = need[Kind.KV], need[Kind.SSM]
        arena = self.arena
        if not (pages or blocks):
            if not apply_admission_cap:
                self._next = 0, 0
            return 0
        if self.memory is not None:
            cached = self._cached(new_computed_blocks)
            self.memory.make_room(pages, blocks, (cached[Kind.KV], cached[Kind.SSM]))
        if not apply_admission_cap and not arena.fits(pages, blocks):
            blocks -= self._forgo(request_id)
        if not arena.fits(pages, blocks):
            # More states than can exist is how a manager says "in the next step": no failure.
            if not apply_admission_cap and blocks <= arena.geometry.block_limit:
                arena.note_failure(pages, blocks)
            return NOT_NOW
        if not apply_admission_cap:
            # What is cached is referenced before anything is allocated, and needs no free page.
            cached = self._cached(new_computed_blocks)
            self._next = pages - cached[Kind.KV], blocks - cached[Kind.SSM]
            # These must fit now, but can go again as soon as the step has been scheduled, so that
            # they keep nobody out for whom vLLM wants a reserve kept.
            for state_manager in self.state_managers:
                blocks -= state_manager.passing(request_id)
        geometry = arena.geometry
        in_pages = pages + ceil_div(blocks * geometry.block_bytes, geometry.page_bytes)
        return min(in_pages, arena.available(Kind.KV))

    def _cached(self, computed: tuple[Sequence[KVCacheBlock], ...]) -> dict[Kind, int]:
        """How many of a hit's pages nobody references, by kind."""
        cached = dict.fromkeys(Kind, 0)
        for manager, kind, blocks in zip(
            self.single_type_managers, self.kinds, computed, strict=True
        ):
            cached[kind] += manager._get_num_evictable_blocks(blocks)
        return cached

    def _forgo(self, request_id: str) -> int:
        """Give up the states that a step would save for others; how many blocks that spares."""
        return sum(manager.forgo(request_id) for manager in self.state_managers)

    def allocate_new_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: tuple[Sequence[KVCacheBlock], ...],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        skip_zeroing_group_ids: tuple[int, ...] = (),
    ) -> None:
        """Reference a prefix that was found, and allocate what a connector is to load."""
        if num_external_computed_tokens:
            self._next = 0, 0  # all of it is allocated here, one manager after the other
            state, self.local_state = self.local_state, None
            if self.checkpoints is not None:
                # First: what the request builds upon must not go for its own blocks.
                end = num_local_computed_tokens + num_external_computed_tokens
                self.checkpoints.begin(request_id, state, loaded=end)
        super().allocate_new_computed_blocks(
            request_id,
            new_computed_blocks,
            num_local_computed_tokens,
            num_external_computed_tokens,
            skip_zeroing_group_ids,
        )

    def allocate_new_blocks(
        self, request_id: str, *args: Any, **kwargs: Any
    ) -> tuple[list[KVCacheBlock], ...]:
        """Allocate what was just asked for, making room for both pools at once.

        vLLM's managers allocate one after the other. Alone, the first would take capacity that the
        second then has to bring back.
        """
        if self.checkpoints is not None:
            held = self._held_states.get(request_id)
            self.checkpoints.begin(request_id, held[-1] if held else None)
        (pages, blocks), self._next = self._next, (0, 0)
        if (pages or blocks) and self.arena.fits(pages, blocks):
            self.arena.reserve(pages, blocks)
        return super().allocate_new_blocks(request_id, *args, **kwargs)

    def evict_blocks(self, block_ids: set[int]) -> None:
        """Take blocks of either pool out of the prefix cache, with what is of no use then."""
        if self.checkpoints is not None:
            block_ids = block_ids | self.checkpoints.states_with(block_ids)
        for kind, pool in reversed(self.pools.items()):
            pool.evict_blocks({block_id for block_id in block_ids if kind_of(block_id) is kind})

    def reset_prefix_cache(self) -> bool:
        """Forget every hash of both pools, or of none if any block is referenced."""
        pages, states = (self.arena.used(kind) for kind in Kind)
        if pages or states:
            logger.warning(
                "AVMP: the prefix cache is not reset, because pages (%d) and states (%d) are in "
                "use; reset it when no request runs, or reset the running requests, too",
                pages,
                states,
            )
            return False
        if self.checkpoints is not None:
            self.checkpoints.clear()
        for pool in self.pools.values():
            pool.forget()
        if self.block_pool.enable_kv_cache_events:
            # In one queue, so that nothing that was cached before seems to be cached after.
            events = self.block_pool.kv_event_queue
            events += self.states.take_events()
            events.append(AllBlocksCleared())
        return True


class AVMPCoordinator(DualPoolCoordinator, HybridKVCacheCoordinator):
    """With prefix caching."""

    def find_longest_cache_hit(
        self, block_hashes: list[BlockHash], max_cache_hit_length: int
    ) -> tuple[tuple[list[KVCacheBlock], ...], int, int]:
        """Find the longest prefix that is cached.

        Of pages with equal content, those are taken that the state keeps: others may go at any
        time, and the state's would stay for nobody.
        """
        find = super().find_longest_cache_hit
        hits, length, uncached = find(block_hashes, max_cache_hit_length)
        cold = None if self.checkpoints is None else self.checkpoints.cold
        if cold is not None and cold.warm_up(block_hashes, length, max_cache_hit_length):
            hits, length, uncached = find(block_hashes, max_cache_hit_length)
        if self.checkpoints is not None and length:
            state = hits[self.kinds.index(Kind.SSM)][-1]
            tables = self.checkpoints.pages_of(state.block_id)
            if tables is not None:
                blocks = self.pools[Kind.KV].blocks
                for index, pages in zip(self.slots, tables, strict=True):
                    hits[index][:] = [blocks[page] for page in pages]
        return hits, length, uncached


class AVMPCoordinatorNoPrefixCache(DualPoolCoordinator, KVCacheCoordinatorNoPrefixCache):
    """Without prefix caching."""
