"""``AVMPBlockSpaceManager``: what vLLM's scheduler talks to."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.request import RequestStatus

from avmp_vllm.core import Copy, Geometry, InvariantViolation, Kind, MovePlan, Save, kind_of
from avmp_vllm.core.geometry import ceil_div
from avmp_vllm.engine.entry import minors
from avmp_vllm.engine.entry.config import AVMPConfig
from avmp_vllm.engine.layout.arena import AVMPCacheConfig
from avmp_vllm.engine.layout.groups import state_spec
from avmp_vllm.engine.scheduler.admission import admission_by, growing
from avmp_vllm.engine.scheduler.coordinator import (
    AVMPCoordinator,
    AVMPCoordinatorNoPrefixCache,
    without_blocks,
)
from avmp_vllm.engine.scheduler.inside_pages import inside_pages
from avmp_vllm.engine.scheduler.integrity import problems
from avmp_vllm.engine.scheduler.memory import ArenaMemory
from avmp_vllm.engine.scheduler.victims import Victims

if TYPE_CHECKING:
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.kv_cache_utils import KVCacheBlock, KVCacheBlockCopy
    from vllm.v1.request import Request

    from avmp_vllm.engine.scheduler.block_pool import AVMPBlockPool


class AVMPBlockSpaceManager(KVCacheManager):
    """vLLM's ``KVCacheManager`` with a dual-pool arena behind it.

    Args:
        kv_cache_config: The arena's configuration.
        config: AVMP's options.
        transfers: Whether a KV connector reads and writes pages beside the model.
        kwargs: Of ``KVCacheManager``.
    """

    block_pool: AVMPBlockPool

    def __init__(
        self,
        kv_cache_config: AVMPCacheConfig,
        config: AVMPConfig,
        *,
        transfers: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(without_blocks(kv_cache_config), **kwargs)
        self.kv_cache_config = kv_cache_config
        self.config = config
        common = {
            "max_model_len": self.max_model_len,
            "max_in_flight_tokens": kwargs["max_in_flight_tokens"],
            "use_eagle": self.use_eagle,
            "enable_kv_cache_events": self.enable_kv_cache_events,
            "dcp_world_size": kwargs["dcp_world_size"],
            "pcp_world_size": kwargs["pcp_world_size"],
            "scheduler_block_size": kwargs["scheduler_block_size"],
            "hash_block_size": kwargs["hash_block_size"],
            "metrics_collector": self.metrics_collector,
            "num_prefill_lookahead": kwargs["num_prefill_lookahead"],
            "transfers": transfers,
            **minors.hash_lookahead(self.block_pool),
        }
        self.coordinator = (
            AVMPCoordinator(kv_cache_config, config, enable_caching=True, **common)
            if self.enable_caching
            else AVMPCoordinatorNoPrefixCache(kv_cache_config, config, **common)
        )
        self.arena = self.coordinator.arena
        self.memory = None
        if kv_cache_config.elastic is not None:
            self.memory = ArenaMemory(
                self.arena, kv_cache_config.elastic, lambda: self.take_move_plan(None)
            )
            self.coordinator.memory = self.memory
        self.block_pool = self.coordinator.block_pool
        self._watermark = int(kwargs["watermark"] * kv_cache_config.num_blocks)
        # A running state moves to a new block at each checkpoint, and frees the old one after.
        self._move_pages = (
            ceil_div(self.geometry.block_bytes, self.geometry.page_bytes)
            if self.enable_caching
            else 0
        )
        self._held = self.coordinator.single_type_managers[
            self.coordinator.kinds.index(Kind.KV)
        ].req_to_blocks
        self.checkpoints = self.coordinator.checkpoints
        self.cold = None if self.checkpoints is None else self.checkpoints.cold
        self.admission = admission_by(
            config, self.geometry, self.states_each, self.max_model_len, self._held
        )
        self.victims = Victims() if config.victim == "cheapest" else None
        geometry = self.geometry
        self._growing = [group.page_tokens for group in growing(geometry)]
        self._most_each = len(self._growing) + ceil_div(geometry.block_bytes, geometry.page_bytes)
        #: Tokens computed a second time, after preemptions.
        self.recomputed = 0
        self._computed_before: dict[str, int] = {}
        self._inside_pages = None if transfers else inside_pages(self)
        self._plans = 0
        self._copies: list[Copy] = []
        self._saves: list[Save] = []

    @property
    def states_each(self) -> int:
        """Blocks of states that a running request holds."""
        return 1 + state_spec(self.kv_cache_config).num_speculative_blocks

    @property
    def geometry(self) -> Geometry:
        """Sizes of the arena."""
        return self.arena.geometry

    @property
    def usage(self) -> float:
        """Share of the arena's usable bytes that are referenced, 0 to 1."""
        geometry, memory = self.geometry, self.memory
        used = sum(self.arena.used(kind) * geometry.unit(kind) for kind in Kind)
        reserve = 0 if memory is None else memory.elastic.reserve(geometry, memory.budget)
        return used / geometry.usable_bytes(reserve)

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        new_computed_blocks: KVCacheBlocks | None = None,
        num_lookahead_tokens: int = 0,
        num_external_computed_tokens: int = 0,
        *args: Any,
        has_scheduled_reqs: bool = True,
        **kwargs: Any,
    ) -> KVCacheBlocks | None:
        """Give a request its next slots, as ``KVCacheManager`` does.

        vLLM keeps a watermark free when it admits a request beside others. Here it has room for
        what those may still need.
        """
        waits = request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        inside = self._inside_pages
        if inside is not None:
            if waits or num_new_tokens != 1:
                inside.forget(request.request_id)
            elif inside.goes_on(request):
                return self.empty_kv_cache_blocks
        hit = request.num_computed_tokens + num_new_computed_tokens + num_external_computed_tokens
        growth = self._watermark
        if waits and has_scheduled_reqs:
            room = self.admission.room(request)
            if room is None:
                return None
            growth += room
        self.watermark_blocks = growth + self._move_pages
        if self.checkpoints is not None:
            self.checkpoints.expect(request)
        if self.memory is not None:
            # One more: vLLM counts in whole pages what a state takes of the others' bytes.
            self.memory.headroom = self.watermark_blocks + 1 if waits else 0
        if num_external_computed_tokens and new_computed_blocks is not None:
            new_computed_blocks = self._continued_from_outside(request, new_computed_blocks, hit)
        allocate = partial(
            super().allocate_slots,
            request,
            num_new_tokens,
            num_new_computed_tokens,
            new_computed_blocks,
            num_lookahead_tokens,
            num_external_computed_tokens,
            *args,
            has_scheduled_reqs=has_scheduled_reqs,
            **kwargs,
        )
        blocks = allocate()
        if blocks is None and waits and self._may_do_without_move(growth):
            self.watermark_blocks = growth
            if self.memory is not None:
                self.memory.headroom = growth + 1
            blocks = allocate()
        if waits and blocks is None:
            self.admission.refused(request)
        elif waits:
            self._admitted(request, hit, hit + num_new_tokens)
        elif inside is not None and blocks is not None and num_new_tokens == 1:
            inside.note(request, hit + 1)
        return blocks

    def _may_do_without_move(self, growth: int) -> bool:
        """Whether a newcomer that was refused needs to leave no block for a state that moves.

        Where a state is a large part of the arena, one that is kept free is a request less. With
        ``growth_tokens`` 0 it is all the room that is kept, and what the cache has to live in.
        """
        return (
            self.checkpoints is not None
            and self.admission.move_tokens > 0
            # A newcomer needs a state of its own.
            and self._available_pages >= growth + self._move_pages > growth
            and not any(
                states.moves(self.admission.move_tokens)
                for states in self.coordinator.state_managers
            )
        )

    def _admitted(self, request: Request, hit: int, tokens: int) -> None:
        """A request that waited runs, or a connector loads what it begins with."""
        self.admission.admitted(request, hit, tokens)
        self.recomputed += max(self._computed_before.pop(request.request_id, 0) - hit, 0)
        if self.victims is not None:
            self.victims.admitted(request)

    @property
    def _available_pages(self) -> int:
        """KV pages that could be referenced now, with all memory that may exist."""
        if self.memory is None:
            return self.arena.available(Kind.KV)
        return self.memory.available_pages()

    def _continued_from_outside(
        self, request: Request, hit: KVCacheBlocks, end: int
    ) -> KVCacheBlocks:
        """A local hit that a connector goes on with: its pages, and not its state.

        Args:
            request: Whose hit it is.
            hit: Its blocks by cache group.
            end: Tokens of the prefix that is there when the connector's load has ended; the state
                of those is what it brings.
        """
        states = [
            group[-1]
            for group, kind in zip(hit.blocks, self.coordinator.kinds, strict=True)
            if kind is Kind.SSM and group
        ]
        self.coordinator.local_state = states[0] if states else None
        if self.checkpoints is not None:
            self.checkpoints.intend(request, end, ())
        return self.create_kv_cache_blocks(
            tuple(
                [] if kind is Kind.SSM else list(group)
                for group, kind in zip(hit.blocks, self.coordinator.kinds, strict=True)
            )
        )

    def preempted(self, request: Request) -> None:
        """A request is about to lose its blocks to others."""
        self._computed_before[request.request_id] = request.num_computed_tokens

    def may_fall_short(self, running: int, tokens: int) -> bool:
        """Whether a step might need more than there is.

        Args:
            running: Requests that run; each might take a page of every group and a state.
            tokens: That these get slots for at most.
        """
        return self._available_pages < running * self._most_each + sum(
            ceil_div(tokens, page_tokens) for page_tokens in self._growing
        )

    def _leave(self, request: Request) -> None:
        """A request's blocks go."""
        if self._inside_pages is not None:
            self._inside_pages.forget(request.request_id)
        if self.checkpoints is not None:
            self.checkpoints.leave(request.request_id)
        self.admission.left(request)
        if self.victims is not None:
            self.victims.left(request)
        if request.is_finished():
            self._computed_before.pop(request.request_id, None)

    def free(self, request: Request) -> None:
        """Free a request's blocks; those that no kept state needs do not stay in the cache."""
        self._leave(request)
        super().free(request)

    def pop_blocks_for_free(self, request: Request) -> list[KVCacheBlock]:
        """Take a request's blocks, which the caller frees later."""
        self._leave(request)
        return super().pop_blocks_for_free(request)

    def take_kv_cache_block_copies(self) -> tuple[list[KVCacheBlockCopy], list[KVCacheBlock]]:
        """Drain pending copies and saves; note where the copies' pages are now.

        The scheduler gives the endpoints' references back right after this call, and nothing is
        allocated in between, so this is the moment at which their places are final.
        """
        copies, retained = super().take_kv_cache_block_copies()
        self._copies += [
            Copy(
                kind_of(copy.dst_block_id),
                self.arena.physical(copy.src_block_id),
                self.arena.physical(copy.dst_block_id),
            )
            for copy in copies
        ]
        for states in self.coordinator.state_managers:
            self._saves += states.take_saves()
        return copies, retained

    def take_move_plan(self, to_zero: list[int] | None) -> MovePlan | None:
        """Drain what the workers must do before the step that has just been scheduled.

        Args:
            to_zero: Handles of KV pages that were handed out during the step.

        Returns:
            The plan, or None if there is nothing to do.
        """
        arena = self.arena
        relocations = arena.take_relocations()
        # A page may have been given back in the same step, and its bytes to the other pool.
        zeros = [arena.physical(handle) for handle in to_zero or () if arena.inside(handle)]
        copies, self._copies = self._copies, []
        saves, self._saves = self._saves, []
        extents = arena.take_extents()
        recodes = [] if self.cold is None else self.cold.take_recodes()
        if not (
            relocations or zeros or copies or saves or extents or recodes or self.config.verify
        ):
            return None
        self._plans += 1
        digest = arena.digest() if self.config.verify else None
        stages, after = extents or ((), None)
        return MovePlan(
            self._plans, relocations, zeros, copies, digest, saves, stages, after, recodes
        )

    def take_events(self) -> list[KVCacheEvent]:
        """Take the cache events of both pools."""
        kv, ssm = (self.coordinator.pools[kind] for kind in Kind)
        kv.kv_event_queue += ssm.take_events()
        return super().take_events()

    def evict_blocks(self, block_ids: set[int]) -> None:
        """Take blocks of either pool out of the prefix cache."""
        self.coordinator.evict_blocks(block_ids)

    def holds(self, request: Request) -> bool:
        """Whether a request has blocks."""
        return any(
            manager.req_to_blocks.get(request.request_id)
            for manager in self.coordinator.single_type_managers
        )

    def state_position(self, request: Request) -> int:
        """Tokens that a request's running state covers, once all scheduled steps have run."""
        return self.coordinator.state_managers[0].position(request.request_id)

    def unpublish_after(self, request: Request, num_tokens: int) -> None:
        """Take a request's blocks out of the prefix cache that cover more than so many tokens.

        vLLM publishes a chunk's blocks when it schedules the chunk. With priorities, a request may
        be preempted later in the same step, and the chunk is never computed.
        """
        if self._inside_pages is not None:
            self._inside_pages.forget(request.request_id)
        for states in self.coordinator.state_managers:
            states.lose_chunk(request.request_id)
        for manager in self.coordinator.single_type_managers:
            for block in manager.req_to_blocks.get(request.request_id, ()):
                if (block.block_hash_num_tokens or 0) > num_tokens:
                    manager.block_pool._maybe_evict_cached_block(block)

    def verify(self) -> None:
        """Check every invariant of the arena, and that vLLM's blocks agree with it.

        Raises:
            InvariantViolation: Naming what does not add up.
        """
        pools = self.coordinator.pools
        self.arena.verify([handle for pool in pools.values() for handle in pool.referenced()])
        if found := problems(self):
            raise InvariantViolation("; ".join(found[:20]))
