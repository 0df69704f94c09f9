"""Whether the installed vLLM is the one that AVMP was written for.

The drift test of the engine and ``avmp doctor`` ask the same questions, of the same tables.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avmp_vllm.engine.seams import Seam

#: Methods that AVMP's subclasses override or call, and the parameters they rely on.
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
    "vllm.v1.core.kv_cache_manager:KVCacheManager.take_kv_cache_block_copies": ("self",),
    "vllm.v1.core.sched.scheduler:Scheduler.__init__": (
        "self",
        "vllm_config",
        "kv_cache_config",
        "structured_output_manager",
        "block_size",
        "hash_block_size",
    ),
    "vllm.v1.core.sched.scheduler:Scheduler._mamba_block_aligned_split": (
        "self",
        "request",
        "num_new_tokens",
    ),
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


def drift(function: Callable[..., Any], expected: tuple[str, ...]) -> str:
    """How a function's parameters differ from those expected at its start; empty if not."""
    found = tuple(inspect.signature(function).parameters)
    if found[: len(expected)] == expected:
        return ""
    return f"takes ({', '.join(found)}) and not ({', '.join(expected)}, ...)"


def find(where: str) -> Callable[..., Any]:
    """The function at ``module:path``.

    Raises:
        ImportError, AttributeError: It is gone.
    """
    module, path = where.split(":")
    owner: Any = importlib.import_module(module)
    for part in path.split("."):
        owner = getattr(owner, part)
    return owner


def all_seams() -> tuple[Seam, ...]:
    """Every seam, installed in this process or not."""
    from avmp_vllm.engine import seams

    return (*seams.SELECTION, *seams.ENGINE, *seams.RUNNER_V2)


def drifted() -> list[str]:
    """A line for each function of vLLM that AVMP wraps or overrides and that is not as expected."""
    from avmp_vllm.engine import seams

    wanted = [
        (f"{seam.module}:{seam.path}", lambda seam=seam: seams.stock(seam), seam.signature)
        for seam in all_seams()
    ]
    wanted += [(where, lambda where=where: find(where), OVERRIDDEN[where]) for where in OVERRIDDEN]
    lines = []
    for where, function, expected in wanted:
        try:
            problem = drift(function(), expected)
        except (ImportError, AttributeError) as error:
            problem = f"is gone ({error})"
        if problem:
            lines.append(f"{where} {problem}")
    return lines
