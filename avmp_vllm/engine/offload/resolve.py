"""The connector's worker over an arena: two views of one buffer, handles resolved on submission.

vLLM's worker ends the engine when a transfer fails. Here the scheduler is told: what was not stored
is not there, and what could not be loaded is vLLM's to recompute, or its request to fail.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import (
    OffloadingConnectorWorker,
)
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
    OffloadingWorker,
)

from avmp_vllm.backing.torch_buffer import bytes_behind
from avmp_vllm.core import Geometry, Kind
from avmp_vllm.engine.layout.groups import kind_of_spec
from avmp_vllm.engine.offload.view import geometry_of

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import LoadStoreSpec, TransferResult

    from avmp_vllm.backing.page_table import PageTable
    from avmp_vllm.engine.layout.arena import AVMPCacheConfig


class ArenaOffloadingWorker(OffloadingConnectorWorker):
    """vLLM's worker side, with the arena's two views in place of the layers' tensors."""

    kv_cache_config: AVMPCacheConfig

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Register the whole pages of each pool; which layers are in them is nobody's business."""
        raw = bytes_behind(next(iter(kv_caches.values())))
        worker = self.spec.get_worker(canonical(raw, self.kv_cache_config))
        self.worker = self._resolving = ResolvingWorker(worker)

    def bind_page_table(self, page_table: PageTable) -> None:
        """Resolve handles by this table from now on."""
        self._resolving.page_table = page_table

    def transfer_results(self, finished: set[str]) -> KVConnectorTransferResults:
        """Requests whose loads have ended, and of those the ones that failed."""
        requests = dict(self._load_jobs)
        sent, received = self.get_finished(finished)
        failed = self._resolving.failed & requests.keys()
        return KVConnectorTransferResults(
            finished_sending=sent,
            finished_recving=received,
            failed_recving={requests[job] for job in failed},
        )

    def build_connector_worker_meta(self) -> ArenaWorkerMetadata | None:
        """Transfers that have ended since the last call, and of those the ones that failed."""
        meta = super().build_connector_worker_meta()
        if meta is None:
            return None
        failed, self._resolving.failed = self._resolving.failed, set()
        return ArenaWorkerMetadata(meta.completed_jobs, meta.transfer_stats, failed)


@dataclass
class ArenaWorkerMetadata(OffloadingWorkerMetadata):
    """What a worker tells the scheduler about transfers.

    Attributes:
        failed_jobs: Of those that have ended.
    """

    failed_jobs: set[int] = field(default_factory=set)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> ArenaWorkerMetadata:
        """What two workers tell."""
        assert isinstance(other, ArenaWorkerMetadata)
        both = super().aggregate(other)
        assert isinstance(both, OffloadingWorkerMetadata)
        return ArenaWorkerMetadata(
            both.completed_jobs, both.transfer_stats, self.failed_jobs | other.failed_jobs
        )


def canonical(raw: torch.Tensor, kv_cache_config: AVMPCacheConfig) -> CanonicalKVCaches:
    """The arena as vLLM's offloading workers take it.

    Args:
        raw: uint8 ``[arena bytes]``.
        kv_cache_config: With the groups, all of which are offloaded.

    Returns:
        int8 ``[pages, page bytes]`` and ``[blocks, block bytes]``, and for each group its pool's.
    """
    geometry = geometry_of(kv_cache_config)
    return CanonicalKVCaches(
        tensors=[
            CanonicalKVCacheTensor(_view(raw, geometry, kind), geometry.unit(kind)) for kind in Kind
        ],
        group_data_refs=[
            [CanonicalKVCacheRef(kind, geometry.unit(kind))]
            for kind in (kind_of_spec(g.kv_cache_spec) for g in kv_cache_config.kv_cache_groups)
        ],
    )


def _view(raw: torch.Tensor, geometry: Geometry, kind: Kind) -> torch.Tensor:
    """int8 view of a pool, one row for each physical index."""
    rows = geometry.pages if kind is Kind.KV else geometry.blocks
    unit = geometry.unit(kind)
    return raw[: rows * unit].view(torch.int8).view(rows, unit)


class ResolvingWorker(OffloadingWorker):
    """An offloading worker that is told handles.

    Args:
        worker: What moves the bytes, by physical index.

    Attributes:
        page_table: The worker's page table, as the last plan left it.
        failed: Transfers that have ended without success, and were not reported yet.
    """

    page_table: PageTable

    def __init__(self, worker: OffloadingWorker) -> None:
        self.worker = worker
        self.failed: set[int] = set()

    def _resolve(self, spec: GPULoadStoreSpec) -> GPULoadStoreSpec:
        return GPULoadStoreSpec(
            [self.page_table.physical(int(handle)) for handle in spec.block_ids],
            group_sizes=spec.group_sizes,
            block_indices=spec.block_indices,
        )

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec
    ) -> bool:
        """Begin to copy pages to the host, from where they are now."""
        return self.worker.submit_store(job_id, self._resolve(src_spec), dst_spec)

    def submit_load(
        self,
        job_id: int,
        src_spec: LoadStoreSpec,
        dst_spec: GPULoadStoreSpec,
        *args: Any,
        **kwargs: Any,
    ) -> bool:
        """Begin to copy pages from the host, to where they are now."""
        return self.worker.submit_load(job_id, src_spec, self._resolve(dst_spec), *args, **kwargs)

    def get_finished(self) -> list[TransferResult]:
        """Transfers that have ended, whether or not they succeeded: vLLM takes success alone."""
        results = self.worker.get_finished()
        for result in results:
            if not result.success:
                self.failed.add(result.job_id)
                result.success = True
                result.transfer_size = result.transfer_time = None
        return results

    def wait(self, job_ids: set[int]) -> None:
        """Wait for transfers."""
        self.worker.wait(job_ids)

    def shutdown(self) -> None:
        """Let go of the host's memory."""
        self.worker.shutdown()
