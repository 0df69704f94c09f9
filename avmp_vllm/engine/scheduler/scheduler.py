"""The schedulers: vLLM's own, with AVMP's manager, sending each step's move plan to the workers."""

from __future__ import annotations

import copy
from collections.abc import Container
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    get_mamba_prefill_checkpoint_position,
    is_mamba_prefill_checkpoint_valid,
)
from vllm.v1.request import RequestStatus

from avmp_vllm.core import Kind
from avmp_vllm.engine.entry import minors
from avmp_vllm.engine.entry.config import selected
from avmp_vllm.engine.layout.arena import AVMPCacheConfig
from avmp_vllm.engine.layout.groups import checkpoint_spacing, kind_of_spec, saves_anywhere
from avmp_vllm.engine.layout.message import PLAN
from avmp_vllm.engine.scheduler import metrics
from avmp_vllm.engine.scheduler.coordinator import without_blocks
from avmp_vllm.engine.scheduler.manager import AVMPBlockSpaceManager
from avmp_vllm.engine.scheduler.sessions import StreamingSessions

if TYPE_CHECKING:
    from vllm.config import CacheConfig, VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.request import Request


class MovePlanMixin(StreamingSessions):
    """What AVMP adds to either of vLLM's schedulers."""

    cache_config: CacheConfig
    running: list[Request]

    def __init__(
        self, vllm_config: VllmConfig, kv_cache_config: AVMPCacheConfig, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(vllm_config, without_blocks(kv_cache_config), *args, **kwargs)
        config = selected(vllm_config.additional_config)
        assert config is not None
        self.kv_cache_config = kv_cache_config
        # vLLM's scheduler reads block_size for one purpose: to end prefill chunks where a state is
        # checkpointed. The engine core sets it to the smaller of the groups' sizes, which here is
        # the KV page, and states would then be published under hashes of longer prefixes.
        self.cache_config = copy.copy(self.cache_config)
        self.cache_config.block_size = checkpoint_spacing(kv_cache_config)
        self._saves_anywhere = all(
            saves_anywhere(group.kv_cache_spec)
            for group in kv_cache_config.kv_cache_groups
            if kind_of_spec(group.kv_cache_spec) is Kind.SSM
        )
        self.kv_cache_manager = AVMPBlockSpaceManager(
            kv_cache_config,
            config,
            max_model_len=self.max_model_len,
            scheduler_block_size=self.block_size,
            hash_block_size=self.hash_block_size,
            max_in_flight_tokens=vllm_config.max_in_flight_tokens,
            enable_caching=self.cache_config.enable_prefix_caching,
            use_eagle=self.use_eagle_block_drop,
            num_prefill_lookahead=self.num_prefill_lookahead,
            log_stats=self.log_stats,
            enable_kv_cache_events=self.enable_kv_cache_events,
            dcp_world_size=self.dcp_world_size,
            pcp_world_size=1,
            metrics_collector=self.kv_metrics_collector,
            watermark=self.scheduler_config.watermark,
            transfers=self.connector is not None,
            **minors.hash_lookahead(self),
        )
        minors.renew_auxiliary_outputs(self)
        if self.connector is not None:
            self.connector.bind_kv_cache_manager(self.kv_cache_manager)
            # A local hit that does not end with a block is cut back to where one ends before the
            # connector is asked for more. Blocks are pages there: any hit may be gone on with.
            self.block_size: int = self.hash_block_size
        self._counters = metrics.Pace()
        if self.kv_cache_manager.memory is not None:
            self.kv_cache_manager.memory.connect(kv_cache_config.executor)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule a step and attach what the workers must move before it."""
        manager = self.kv_cache_manager
        memory = manager.memory
        if memory is not None:
            memory.begin_step(idle=not self.has_unfinished_requests())
        manager.admission.step()
        if manager.victims is not None and manager.victims.stale:
            running = len(self.running)
            tokens = self.max_num_scheduled_tokens + running * self.num_lookahead_tokens
            if manager.may_fall_short(running, tokens):
                self.running = manager.victims.order(self.running)
        output = super().schedule(*args, **kwargs)
        idle = not (output.num_scheduled_tokens or self.running or self.loading())
        if idle and self.has_unfinished_requests():
            self.release_paused()  # somebody waits for their blocks; the next step has them
        plan = manager.take_move_plan(output.new_block_ids_to_zero)
        # Both lists name handles; the plan has them as physical pages, in the right order.
        output.new_block_ids_to_zero = None
        output.kv_cache_block_copies = None
        setattr(output, PLAN, plan)
        if self.connector is not None:
            self.connector.end_step(output, plan)
        if memory is not None:
            memory.note_plan(plan)
        if manager.config.verify:
            manager.verify()
        return output

    def _mamba_block_aligned_split(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        """Where a prefill chunk ends, so that the states worth keeping can be kept.

        Every end before the prompt's own costs the request a step, so a chunk ends early only where
        a state is to be kept that the layers cannot save on their way. Anywhere else it may end
        where the step's budget does.
        """
        checkpoints = self.kv_cache_manager.checkpoints
        if checkpoints is None:  # a retention interval is given: vLLM's own rules
            aligned = super()._mamba_block_aligned_split(
                request, num_new_tokens, num_new_local_computed_tokens, num_external_computed_tokens
            )
            # Zero: the step's budget does not reach the next boundary, and might never.
            return aligned or num_new_tokens
        start = request.num_computed_tokens + num_new_local_computed_tokens
        if start >= request.num_prompt_tokens and request.status == RequestStatus.RUNNING:
            return num_new_tokens  # an answer is never cut
        end = start + num_new_tokens
        uncut: Container[int] = range(request.num_prompt_tokens)
        if not self._saves_anywhere:
            uncut = (self._saved_inside(start, end),)
        if request.status != RequestStatus.RUNNING:
            checkpoints.intend(request, start, uncut)
        stops = checkpoints.inside(request.request_id, start, end)
        return next((stop - start for stop in stops if stop not in uncut), num_new_tokens)

    def _saved_inside(self, start: int, end: int) -> int:
        """Position of the state that vLLM's layers save inside of a chunk, or 0."""
        position = get_mamba_prefill_checkpoint_position(
            end, self.hash_block_size, drop_eagle_block=False
        )
        saved = self.mamba_has_prefill_checkpoint_blocks and is_mamba_prefill_checkpoint_valid(
            query_start=start,
            query_end=end,
            checkpoint_position=position,
            hash_block_size=self.hash_block_size,
            mamba_block_size=self.cache_config.block_size,
            checkpoint_alignment=self.mamba_prefill_checkpoint_alignment,
        )
        return position if saved else 0

    def _update_waiting_for_remote_kv(self, request: Request) -> None:
        """Go on after a load; a request whose load has failed has no room reserved any more.

        vLLM would go on to keep room for what it held, and might never let it load again.
        """
        super()._update_waiting_for_remote_kv(request)
        if not request.num_computed_tokens:
            self._inflight_prefills.discard(request)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Preempt a request; if its chunk of this very step is lost, so is what it published."""
        self.kv_cache_manager.unpublish_after(request, request.num_computed_tokens)
        self.kv_cache_manager.preempted(request)
        super()._preempt_request(request, *args, **kwargs)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """Reset the prefix cache; an elastic arena gives its memory back."""
        done = super().reset_prefix_cache(*args, **kwargs)
        memory = self.kv_cache_manager.memory
        if done and memory is not None:
            memory.rest()
        return done

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """Add AVMP's counters to vLLM's statistics: now and then, and behind the last request."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None and self._counters.due(idle=not self.has_unfinished_requests()):
            metrics.attach(stats, self.kv_cache_manager)
        return stats


class AVMPScheduler(MovePlanMixin, Scheduler):
    """Schedules a step after the previous one's output."""


class AVMPAsyncScheduler(MovePlanMixin, AsyncScheduler):
    """Schedules a step while the previous one runs."""
