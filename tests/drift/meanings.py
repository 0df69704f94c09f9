"""What functions of vLLM said when somebody last read them, as hashes.

A function can keep its signature and change what it means. So every function that AVMP wraps or
overrides, and those of ``CALLED``, whose meaning it builds upon, is hashed for each minor release.
A hash that differs says: read what has changed, mend AVMP where it matters, then record it with

    python tests/drift/meanings.py 0.33
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from avmp_vllm.doctor import drift
from avmp_vllm.doctor.source import Gone, SourceTree

RECORD = Path(__file__).with_name("meanings.json")

_CORE, _WORKER = "vllm.v1.core.", "vllm.v1.worker."
_OFFLOADING = "vllm.distributed.kv_transfer.kv_connector.v1.offloading."
#: Not overridden or wrapped, or not by itself, but relied on to do what they did.
CALLED = (
    f"{_CORE}kv_cache_coordinator:KVCacheCoordinator.allocate_new_computed_blocks",
    f"{_CORE}kv_cache_coordinator:KVCacheCoordinator.cache_blocks",
    f"{_CORE}kv_cache_coordinator:KVCacheCoordinator.free",
    f"{_CORE}kv_cache_coordinator:KVCacheCoordinator.remove_skipped_blocks",
    f"{_CORE}kv_cache_manager:KVCacheManager.cache_blocks",
    f"{_CORE}kv_cache_manager:KVCacheManager.get_computed_blocks",
    f"{_CORE}kv_cache_utils:generate_scheduler_kv_cache_config",
    f"{_CORE}kv_cache_utils:resolve_cache_hit_alignment_tokens",
    f"{_CORE}kv_cache_utils:resolve_kv_cache_block_sizes",
    f"{_CORE}sched.async_scheduler:AsyncScheduler._update_after_schedule",
    f"{_CORE}sched.scheduler:Scheduler._free_request",
    f"{_CORE}sched.scheduler:Scheduler._get_new_block_ids_to_zero",
    f"{_CORE}sched.scheduler:Scheduler._handle_stopped_request",
    f"{_CORE}sched.scheduler:Scheduler._update_request_with_output",
    f"{_CORE}sched.scheduler:Scheduler.update_from_output",
    f"{_CORE}single_type_kv_cache_manager:FullAttentionManager.find_longest_cache_hit",
    f"{_CORE}single_type_kv_cache_manager:MambaManager.find_longest_cache_hit",
    f"{_CORE}single_type_kv_cache_manager:MambaManager.remove_skipped_blocks",
    f"{_CORE}single_type_kv_cache_manager:SingleTypeKVCacheManager.cache_blocks",
    f"{_CORE}single_type_kv_cache_manager:SingleTypeKVCacheManager.pop_blocks_for_free",
    "vllm.device_allocator.sleep_mode_backend:CuMemBackend.suspend",
    f"{_OFFLOADING}config:build_offloading_config",
    f"{_OFFLOADING}scheduler:OffloadingConnectorScheduler._build_aligned_boundary_store_jobs",
    f"{_OFFLOADING}scheduler:OffloadingConnectorScheduler._build_store_jobs",
    f"{_OFFLOADING}scheduler:OffloadingConnectorScheduler._lookup_complete_chunks",
    f"{_OFFLOADING}scheduler:OffloadingConnectorScheduler._update_req_states",
    f"{_OFFLOADING}scheduler:OffloadingConnectorScheduler.build_connector_meta",
    f"{_OFFLOADING}scheduler:OffloadingConnectorScheduler.reset_cache",
    f"{_OFFLOADING}scheduler:OffloadingConnectorScheduler.update_connector_output",
    f"{_OFFLOADING}scheduler:OffloadingConnectorScheduler.update_state_after_alloc",
    f"{_OFFLOADING}worker:OffloadingConnectorWorker.get_finished",
    f"{_OFFLOADING}worker:OffloadingConnectorWorker.handle_preemptions",
    f"{_OFFLOADING}worker:OffloadingConnectorWorker.prepare_store_kv",
    f"{_OFFLOADING}worker:OffloadingConnectorWorker.start_kv_transfers",
    "vllm.model_executor.layers.mamba.abstract:MambaBase.get_kv_cache_spec",
    "vllm.model_executor.layers.mamba.checkpoint:compute_mamba_prefill_checkpoints",
    "vllm.model_executor.models.config:HybridAttentionMambaModelConfig.verify_and_update_config",
    "vllm.platforms.cpu:CpuPlatform.update_block_size_for_backend",
    "vllm.platforms.interface:Platform.update_block_size_for_backend",
    "vllm.v1.engine.core:EngineCore.release_kv_cache_memory",
    "vllm.v1.engine.core:EngineCore.sleep",
    "vllm.v1.engine.core:EngineCore.wake_up",
    "vllm.v1.kv_cache_interface:get_mamba_prefill_checkpoint_position",
    "vllm.v1.kv_cache_interface:is_mamba_prefill_checkpoint_valid",
    "vllm.v1.kv_cache_interface:MambaSpec.max_memory_usage_bytes",
    "vllm.v1.kv_offload.cpu.gpu_worker:SingleDirectionOffloadingHandler.transfer_async",
    f"{_WORKER}block_table:BlockTable.compute_slot_mapping",
    f"{_WORKER}gpu.block_table:BlockTables.append_block_ids",
    f"{_WORKER}gpu.block_table:BlockTables.get_dummy_block_tables",
    f"{_WORKER}gpu.cudagraph_utils:profile_cudagraph_memory",
    f"{_WORKER}gpu.kv_connector:ActiveKVConnector",
    f"{_WORKER}gpu.model_states.mamba_hybrid:MambaHybridModelState",
    f"{_WORKER}kv_connector_model_runner_mixin:KVConnectorModelRunnerMixin",
    f"{_WORKER}mamba_utils:preprocess_mamba",
)


def of(tree: SourceTree, minor: str) -> dict[str, str]:
    """Hashes of a minor release's source; what is gone has none."""
    hashes = {}
    for where in (*drift.relied_on(minor), *CALLED):
        try:
            hashes[where] = tree.digest(where)
        except Gone:
            hashes[where] = "gone"
    return hashes


def recorded(minor: str) -> dict[str, str]:
    """Those that were read."""
    found: dict[str, str] = json.loads(RECORD.read_text()).get(minor, {})
    return found


def main() -> None:
    """Record the minor releases that are named."""
    import releases

    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for minor in sys.argv[1:]:
        record[minor] = dict(sorted(of(releases.tree(minor), minor).items()))
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
