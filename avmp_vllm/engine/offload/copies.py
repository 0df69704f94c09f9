"""Copies between an arena and the host's rows, in a worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from vllm.utils.torch_utils import PIN_MEMORY
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.gpu_worker import (
    CPUOffloadingWorker,
    SingleDirectionOffloadingHandler,
)

from avmp_vllm.core import Kind

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import (
        BlockIDsLoadStoreSpec,
        CanonicalKVCaches,
        GPULoadStoreSpec,
    )


def make_worker(caches: CanonicalKVCaches, slabs: int, span: int) -> OffloadingWorker:
    """A worker for the device that the caches are on, with the host's memory of its rank."""
    host = host_rows(caches, slabs, span)
    if caches.tensors[0].tensor.device.type == "cpu":
        return HostCopies(caches, host)
    return StreamCopies(caches, host)


def host_rows(caches: CanonicalKVCaches, slabs: int, span: int) -> list[torch.Tensor]:
    """The host's memory, as pages and as states.

    Returns:
        int8 ``[rows, page bytes]``, and ``[slabs, block bytes]`` of the same bytes.
    """
    page, block = (tensor.page_size_bytes for tensor in caches.tensors)
    pinned = PIN_MEMORY and caches.tensors[0].tensor.device.type != "cpu"
    pages = torch.zeros((slabs * span, page), dtype=torch.int8, pin_memory=pinned)
    return [pages, pages.view(slabs, span * page)[:, :block]]


class StreamCopies(CPUOffloadingWorker):
    """vLLM's copies on streams of a device, over rows of two sizes.

    Args:
        caches: The arena's two views.
        host: As `host_rows` makes it.
    """

    def __init__(self, caches: CanonicalKVCaches, host: list[torch.Tensor]) -> None:
        # Not the parent's constructor, which would make memory for each view.
        self._mmap_region = None
        device = [tensor.tensor for tensor in caches.tensors]
        self._store_handler, self._load_handler = (
            SingleDirectionOffloadingHandler(
                gpu_tensors=list(device),
                cpu_tensors=list(host),
                blocks_per_chunk=1,
                layer_refs_per_group=caches.group_data_refs,
                gpu_to_cpu=stores,
                host_memory_is_pinned=PIN_MEMORY,
            )
            for stores in (True, False)
        )


class HostCopies(OffloadingWorker):
    """Copies at once, where the arena is in the host's memory too.

    Args:
        caches: The arena's two views.
        host: As `host_rows` makes it.
    """

    def __init__(self, caches: CanonicalKVCaches, host: Sequence[torch.Tensor]) -> None:
        self._device = [tensor.tensor.numpy() for tensor in caches.tensors]
        self._host = [tensor.numpy() for tensor in host]
        self._kinds = [Kind(refs[0].tensor_idx) for refs in caches.group_data_refs]
        self._ended: list[TransferResult] = []

    def _copy(
        self, job_id: int, device: GPULoadStoreSpec, host: BlockIDsLoadStoreSpec, stores: bool
    ) -> bool:
        at = nbytes = 0
        for kind, count in zip(self._kinds, device.group_sizes, strict=True):
            here, there = self._device[kind], self._host[kind]
            part = slice(at, at := at + count)
            for page, row in zip(device.block_ids[part], host.block_ids[part], strict=True):
                if stores:
                    there[row] = here[page]
                else:
                    here[page] = there[row]
            nbytes += count * here.shape[1]
        self._ended.append(TransferResult(job_id, True, nbytes, 0.0))
        return True

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: BlockIDsLoadStoreSpec
    ) -> bool:
        """Copy pages to the host."""
        return self._copy(job_id, src_spec, dst_spec, stores=True)

    def submit_load(
        self,
        job_id: int,
        src_spec: BlockIDsLoadStoreSpec,
        dst_spec: GPULoadStoreSpec,
        expedited: bool = False,
    ) -> bool:
        """Copy pages from the host."""
        return self._copy(job_id, dst_spec, src_spec, stores=False)

    def get_finished(self) -> list[TransferResult]:
        """Transfers that have ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def wait(self, job_ids: set[int]) -> None:
        """Nothing to wait for."""
