"""Whether a vLLM is one that AVMP was written for.

The drift tests and ``avmp doctor`` ask the same questions, of the same tables. vLLM is read and not
imported, so that the tests can ask them of a release that is not installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from avmp_vllm.doctor.source import Function, Gone, SourceTree, parameters

if TYPE_CHECKING:
    from avmp_vllm.engine.entry.seams import Seam

#: Methods that AVMP's subclasses override or call, and the parameters they rely on: by place up to
#: a ``*``, by name behind it.
OVERRIDDEN: dict[str, tuple[str, ...]] = {
    "vllm.v1.core.block_pool:BlockPool.__init__": (
        "self",
        "num_gpu_blocks",
        "enable_caching",
        "hash_block_size",
        "enable_kv_cache_events",
        "metrics_collector",
    ),
    "vllm.v1.core.block_pool:BlockPool.get_new_blocks": ("self", "num_blocks"),
    "vllm.v1.core.block_pool:BlockPool.free_blocks": ("self", "ordered_blocks"),
    "vllm.v1.core.block_pool:BlockPool.touch": ("self", "blocks"),
    "vllm.v1.core.block_pool:BlockPool._maybe_evict_cached_block": ("self", "block"),
    "vllm.v1.core.block_pool:BlockPool.cache_full_blocks": (
        "self",
        "request",
        "blocks",
        "num_cached_blocks",
        "num_full_blocks",
        "block_size",
        "kv_cache_group_id",
        "block_mask",
    ),
    "vllm.v1.core.block_pool:BlockPool.cache_partial_block": (
        "self",
        "request",
        "block",
        "num_tokens",
        "kv_cache_group_id",
        "block_size",
    ),
    "vllm.v1.core.block_pool:BlockPool.evict_blocks": ("self", "block_ids"),
    "vllm.v1.core.block_pool:BlockPool.get_num_free_blocks": ("self",),
    "vllm.v1.core.block_pool:BlockPool.get_usage": ("self",),
    "vllm.v1.core.block_pool:BlockPool.move_block_hashes": ("self", "src_block", "dst_block"),
    "vllm.v1.core.block_pool:BlockPool.unpin_blocks": ("self", "blocks", "on_reuse"),
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.__init__": (
        "self",
        "*",
        "kv_cache_config",
        "max_model_len",
        "max_in_flight_tokens",
        "use_eagle",
        "enable_caching",
        "enable_kv_cache_events",
        "dcp_world_size",
        "pcp_world_size",
        "scheduler_block_size",
        "hash_block_size",
        "metrics_collector",
        "num_prefill_lookahead",
    ),
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.get_num_blocks_to_allocate": (
        "self",
        "request_id",
        "num_tokens",
        "new_computed_blocks",
        "num_encoder_tokens",
        "total_computed_tokens",
        "num_local_computed_tokens",
        "num_tokens_main_model",
        "apply_admission_cap",
        "prefill_end",
    ),
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.allocate_new_blocks": (
        "self",
        "request_id",
    ),
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.reset_prefix_cache": ("self",),
    "vllm.v1.core.kv_cache_coordinator:HybridKVCacheCoordinator.find_longest_cache_hit": (
        "self",
        "block_hashes",
        "max_cache_hit_length",
    ),
    "vllm.v1.core.single_type_kv_cache_manager:MambaManager.get_num_blocks_to_allocate": (
        "self",
        "request_id",
        "num_tokens",
        "new_computed_blocks",
        "total_computed_tokens",
        "num_local_computed_tokens",
        "num_tokens_main_model",
        "apply_admission_cap",
        "prefill_end",
    ),
    "vllm.v1.core.single_type_kv_cache_manager:MambaManager.allocate_new_blocks": (
        "self",
        "request_id",
        "num_tokens",
        "num_tokens_main_model",
    ),
    "vllm.v1.core.single_type_kv_cache_manager:MambaManager.pop_blocks_for_free": (
        "self",
        "request_id",
    ),
    "vllm.v1.core.single_type_kv_cache_manager:MambaManager.cache_blocks": (
        "self",
        "request",
        "num_tokens",
        "retention_interval",
        "replay_boundaries",
    ),
    "vllm.v1.core.single_type_kv_cache_manager:MambaManager._cache_partial_tail_block": (
        "self",
        "request",
        "num_tokens",
        "retention_interval",
    ),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.__init__": (
        "self",
        "kv_cache_config",
        "*",
        "max_model_len",
        "scheduler_block_size",
        "hash_block_size",
        "max_in_flight_tokens",
        "enable_caching",
        "use_eagle",
        "num_prefill_lookahead",
        "log_stats",
        "enable_kv_cache_events",
        "dcp_world_size",
        "pcp_world_size",
        "metrics_collector",
        "watermark",
    ),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots": ("self", "request"),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.free": ("self", "request"),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.pop_blocks_for_free": ("self", "request"),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.take_events": ("self",),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.evict_blocks": ("self", "block_ids"),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.take_kv_cache_block_copies": ("self",),
    "vllm.v1.core.sched.scheduler:Scheduler.__init__": (
        "self",
        "vllm_config",
        "kv_cache_config",
        "structured_output_manager",
        "block_size",
        "hash_block_size",
    ),
    "vllm.v1.core.sched.scheduler:Scheduler.schedule": ("self",),
    "vllm.v1.core.sched.scheduler:Scheduler._mamba_block_aligned_split": (
        "self",
        "request",
        "num_new_tokens",
        "num_new_local_computed_tokens",
        "num_external_computed_tokens",
    ),
    "vllm.v1.core.sched.scheduler:Scheduler._preempt_request": ("self", "request"),
    "vllm.v1.core.sched.scheduler:Scheduler._update_request_as_session": (
        "self",
        "session",
        "update",
    ),
    "vllm.v1.core.sched.scheduler:Scheduler.make_stats": ("self",),
    "vllm.v1.core.sched.scheduler:Scheduler.reset_prefix_cache": ("self",),
    "vllm.v1.worker.block_table:BlockTable.commit_block_table": ("self", "num_reqs"),
    "vllm.v1.worker.cpu_worker:CPUWorker.init_device": ("self",),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.execute_model": ("self", "scheduler_output"),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.initialize_kv_cache": (
        "self",
        "kv_cache_config",
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.initialize_kv_cache_tensors": (
        "self",
        "kv_cache_config",
        "kernel_block_sizes",
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._get_mamba_bufs": ("self",),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._init_minimal_kv_cache_for_profiling": (
        "self",
    ),
    "vllm.v1.worker.gpu_worker:Worker._make_model_runner": ("self",),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.initialize_kv_cache": (
        "self",
        "kv_cache_config",
        "is_profiling",
    ),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner._init_kv_zero_meta": ("self",),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model": ("self", "scheduler_output"),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_attn": ("self", "input_batch"),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_dummy_attn": (
        "self",
        "input_batch",
        "valid_state_slots",
    ),
    "vllm.v1.worker.gpu.block_table:BlockTables.__init__": (
        "self",
        "*",
        "block_sizes",
        "max_num_reqs",
        "max_num_batched_tokens",
        "max_num_blocks_per_group",
        "device",
        "cp_size",
        "cp_rank",
        "cp_interleave",
        "slot_mapping_enabled",
    ),
    "vllm.v1.worker.gpu.block_table:BlockTables.apply_staged_writes": ("self",),
    "vllm.v1.worker.gpu.block_table:BlockTables.init_block_table_layout_tensors": ("self",),
    "vllm.v1.worker.gpu.buffer_utils:FusedStagedWriter.apply": (
        "self",
        "tensors",
        "output_ptrs",
        "output_strides",
    ),
}


def drift(function: Function, expected: tuple[str, ...]) -> str:
    """How a function's parameters differ from those relied on; empty if they do not."""
    found = parameters(function)
    by_place = expected[: expected.index("*")] if "*" in expected else expected
    by_name = expected[len(by_place) + 1 :]
    if found[: len(by_place)] == by_place and set(by_name) <= set(found):
        return ""
    return f"takes ({', '.join(found)}) and not ({', '.join(expected)}, ...)"


def all_seams(minor: str) -> tuple[Seam, ...]:
    """Every seam that a minor release of vLLM has."""
    from avmp_vllm.engine.entry import seams

    return seams.of((*seams.SELECTION, *seams.ENGINE, *seams.RUNNER_V2), minor)


def relied_on(minor: str) -> dict[str, tuple[str, ...]]:
    """Every function of vLLM that AVMP wraps, overrides or calls, and the parameters relied on."""
    wrapped = {f"{seam.module}:{seam.path}": seam.signature for seam in all_seams(minor)}
    return wrapped | OVERRIDDEN


def drifted(tree: SourceTree, minor: str) -> list[str]:
    """A line for each function that AVMP relies on and that is not as expected.

    Args:
        tree: vLLM's source.
        minor: Its minor release.
    """
    lines = []
    for where, expected in relied_on(minor).items():
        try:
            node = tree.find(where).node
        except Gone as error:
            lines.append(f"{where} is gone ({error})")
            continue
        if not isinstance(node, Function):
            lines.append(f"{where} is no function any more")
        elif problem := drift(node, expected):
            lines.append(f"{where} {problem}")
    return lines
