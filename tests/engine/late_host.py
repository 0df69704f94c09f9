"""An offloading spec for engines without a GPU, whose transfers take steps as they are told.

vLLM's own workers copy by CUDA streams alone (``vllm/v1/kv_offload/cpu/spec.py``, ``get_worker``).
This one keeps vLLM's manager, and copies with plain torch, late: a transfer reads and writes its
bytes when it has been asked after some number of times, or when somebody waits for it. Whatever
happens to those bytes in between, it does not notice, as a copy on a stream would not.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from enginelib import tokens
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

#: Workers that were made in this process, the latest last.
WORKERS: list[LateWorker] = []


@dataclass
class Late:
    """A transfer that has been submitted."""

    job: int
    is_load: bool
    device: GPULoadStoreSpec
    host: list[int]
    asked: int = 0
    success: bool | None = None


class LateWorker(OffloadingWorker):
    """Copies when it must.

    Args:
        caches: The device's tensors.
        chunks: Entries of the host.
        delay: How often a transfer is asked after before it has ended.

    Attributes:
        loaded: Bytes that came from the host.
        stored: Bytes that went there.
        fail_loads: So many loads fail from here on.
        fail_stores: So many stores do.
    """

    def __init__(self, caches: CanonicalKVCaches, chunks: int, delay: int) -> None:
        self._caches, self._delay = caches, delay
        self._host = [
            torch.zeros((chunks, tensor.page_size_bytes), dtype=torch.int8)
            for tensor in caches.tensors
        ]
        self._queue: deque[Late] = deque()
        self.loaded = self.stored = 0
        self.fail_loads = self.fail_stores = 0
        WORKERS.append(self)

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: LoadStoreSpec) -> bool:
        return self._submit(job_id, False, src_spec, dst_spec)

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: Any) -> bool:
        return self._submit(job_id, True, dst_spec, src_spec)

    def _submit(self, job: int, is_load: bool, device: GPULoadStoreSpec, host: Any) -> bool:
        assert len(device.block_ids) == len(host.block_ids)
        self._queue.append(Late(job, is_load, device, [int(chunk) for chunk in host.block_ids]))
        return True

    def _copy(self, late: Late) -> int:
        """Copy a transfer's bytes now; how many they are."""
        copied = at = 0
        for group, size in enumerate(late.device.group_sizes):
            pairs = zip(
                late.device.block_ids[at : at + size], late.host[at : at + size], strict=True
            )
            for block, chunk in pairs:
                for ref in self._caches.group_data_refs[group]:
                    part = slice(ref.page_size_bytes)
                    device = self._caches.tensors[ref.tensor_idx].tensor[int(block)][part]
                    host = self._host[ref.tensor_idx][chunk][part]
                    if late.is_load:
                        device.copy_(host)
                    else:
                        host.copy_(device)
                    copied += ref.page_size_bytes
            at += size
        return copied

    def _end(self, late: Late) -> None:
        """A transfer ends, if it has not already: its bytes are copied, or it fails."""
        if late.success is not None:
            return
        fails = self.fail_loads if late.is_load else self.fail_stores
        late.success = not fails
        if late.is_load:
            self.fail_loads -= bool(fails)
        else:
            self.fail_stores -= bool(fails)
        if late.success and late.is_load:
            self.loaded += self._copy(late)
        elif late.success:
            self.stored += self._copy(late)

    def get_finished(self) -> list[TransferResult]:
        ended = []
        for late in list(self._queue):
            late.asked += 1
            if late.asked > self._delay or late.success is not None:
                self._queue.remove(late)
                self._end(late)
                ended.append(TransferResult(late.job, success=bool(late.success)))
        return ended

    def wait(self, job_ids: set[int]) -> None:
        for late in self._queue:
            if late.job in job_ids:
                self._end(late)


class LateSpec(CPUOffloadingSpec):
    """vLLM's host spec with a late worker; ``delay`` is one of its options."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        return LateWorker(kv_caches, self.num_chunks, int(self.extra_config.get("delay", 0)))


def turns() -> list[list[dict[str, list[int]]]]:
    """Two rounds of short prompts, each of the second going on from one of the first."""
    rng = random.Random(3)
    first = [tokens(rng, count) for count in (70, 30, 66, 100, 40, 72, 90)]
    second = [prompt + tokens(rng, 9) for prompt in first]
    return [[{"prompt_token_ids": prompt} for prompt in prompts] for prompts in (first, second)]


def config(host_bytes: int, delay: int, **others: Any) -> dict[str, Any]:
    """``kv_transfer_config`` of an engine with such a host."""
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "LateSpec",
            "spec_module_path": "late_host",
            "cpu_bytes_to_use": host_bytes,
            "delay": delay,
            **others,
        },
    }
