"""vLLM's ``OffloadingConnector`` over an arena.

vLLM's code decides what goes to the host and comes back. Here it reads the cache by pages
(``view.py``), names pages by handle, and its workers resolve handles when a transfer is submitted
(``resolve.py``); the scheduler has each step wait for the transfers that its plan would disturb
(``fence.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1, KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    OffloadingConnectorScheduler,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import (
    OffloadingConnector as StockConnector,
)
from vllm.v1.kv_offload.factory import OffloadingSpecFactory

from avmp_vllm.core import MovePlan
from avmp_vllm.core.transfers import NotingArena
from avmp_vllm.engine.layout.arena import AVMPCacheConfig
from avmp_vllm.engine.layout.groups import kind_of_spec
from avmp_vllm.engine.offload import view
from avmp_vllm.engine.offload.fence import Fence
from avmp_vllm.engine.offload.host import HostSpec
from avmp_vllm.engine.offload.resolve import ArenaOffloadingWorker, ArenaWorkerMetadata

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_offload.base import OffloadingSpec
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from avmp_vllm.backing.page_table import PageTable

#: Name of vLLM's own kind of host, in whose place ours is.
NATIVE = "CPUOffloadingSpec"


class OffloadingConnector(StockConnector):
    """Offloads pages and states of an arena.

    Args:
        vllm_config: vLLM's configuration.
        role: Which side of it this process has.
        kv_cache_config: The arena's.

    Attributes:
        fence: Of the scheduler's side, what keeps transfers and plans apart.
    """

    _kv_cache_manager: Any
    fence: Fence

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: AVMPCacheConfig
    ) -> None:
        # Not the parent's constructor, which would size the host by the whole arena.
        KVConnectorBase_V1.__init__(self, vllm_config, role, kv_cache_config)
        config = view.by_page(kv_cache_config)
        offloading = view.offloading_config(vllm_config, config)
        self._canonical_layout = offloading.canonical_layout
        self._kinds = [kind_of_spec(group.kv_cache_spec) for group in config.kv_cache_groups]
        self._page_tokens = view.page_tokens(config)
        spec: OffloadingSpec
        if offloading.extra_config.get("spec_name", NATIVE) == NATIVE:
            spec = HostSpec(offloading, config, self._kinds)
        else:
            spec = OffloadingSpecFactory.create_spec(offloading)
        self._failed: set[int] = set()
        self.connector_scheduler = self.connector_worker = None
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = OffloadingConnectorScheduler(spec, vllm_config, config)
        else:
            self.connector_worker = ArenaOffloadingWorker(spec, vllm_config, config)

    # -- the scheduler's side ----------------------------------------------------------------------

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        """Follow a manager's arena; vLLM's own manager, which comes first, has none."""
        super().bind_kv_cache_manager(kv_cache_manager)
        arena = getattr(kv_cache_manager, "arena", None)
        if arena is not None:
            assert isinstance(arena, NotingArena)
            self.fence = Fence(arena)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Begin to load what a request has got blocks for."""
        if num_external_tokens:
            status = self.scheduler._req_status[request.request_id]
            end = status.num_locally_computed_tokens + num_external_tokens
            null = self._kv_cache_manager.block_pool.null_block
            blocks = view.tables_by_page(blocks, self._kinds, null, end // self._page_tokens)
        super().update_state_after_alloc(request, blocks, num_external_tokens)

    def end_step(self, output: SchedulerOutput, plan: MovePlan | None) -> None:
        """Have a step wait for the transfers that its plan would disturb."""
        metadata = output.kv_connector_metadata
        assert isinstance(metadata, OffloadingConnectorMetadata)
        self.fence.end_step(
            metadata,
            plan.relocations if plan is not None else (),
            output.finished_req_ids,
            self.scheduler._jobs,
        )

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Take what the workers tell about transfers that have ended, or failed.

        A store that failed is not on the host. A request whose load failed is offered no other.
        """
        meta, side = connector_output.kv_connector_worker_meta, self.scheduler
        if isinstance(meta, ArenaWorkerMetadata):
            self._failed |= meta.failed_jobs
            for number in self._failed & meta.completed_jobs.keys():
                job = side._jobs.get(number)
                if job is None or job.pending_count > meta.completed_jobs[number]:
                    continue  # reset meanwhile, or other workers are still at it
                self._failed.discard(number)
                status = side._req_status[job.req_id]
                if job.is_store:
                    side.manager.complete_store(job.keys, status.req_context, success=False)
                else:
                    status.max_load_tokens = 0
        super().update_connector_output(connector_output)

    # -- the workers' side -------------------------------------------------------------------------

    @property
    def worker(self) -> ArenaOffloadingWorker:
        """The worker's side."""
        assert isinstance(self.connector_worker, ArenaOffloadingWorker)
        return self.connector_worker

    def bind_page_table(self, page_table: PageTable) -> None:
        """Resolve handles by a worker's page table."""
        self.worker.bind_page_table(page_table)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Requests whose loads have ended or failed."""
        return self.worker.transfer_results(finished_req_ids)
