"""The places where vLLM is changed: as expected, and only where AVMP is in charge."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import pytest

from avmp_vllm.engine import seams
from avmp_vllm.engine.config import SELECTED, ConfigError
from avmp_vllm.engine.selection import ASYNC_SCHEDULER, SCHEDULER, WORKERS, require_supported_vllm

ALL = (*seams.SELECTION, *seams.ENGINE, *seams.RUNNER_V2)

#: Methods that AVMP's subclasses override or call, and the parameters they rely on.
OVERRIDDEN = {
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


def _parameters(function) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _assert_begins(found: tuple[str, ...], expected: tuple[str, ...], where: str) -> None:
    assert found[: len(expected)] == expected, f"{where} drifted: it takes {found} now"


@pytest.mark.parametrize("seam", ALL, ids=lambda seam: seam.path)
def test_seam_has_the_signature_its_wrapper_relies_on(seam):
    """An upgrade of vLLM fails here, in words, before it fails in a stack trace."""
    _assert_begins(_parameters(seams.stock(seam)), seam.signature, f"{seam.module}.{seam.path}")
    assert seam.why
    assert seam.until


@pytest.mark.parametrize("where", OVERRIDDEN)
def test_overridden_methods_have_not_drifted(where):
    """The same for what AVMP's subclasses override."""
    module, path = where.split(":")
    owner = __import__(module, fromlist=["_"])
    for part in path.split("."):
        owner = getattr(owner, part)
    _assert_begins(_parameters(owner), OVERRIDDEN[where], where)


@pytest.mark.parametrize("name", [*WORKERS.values(), SCHEDULER, ASYNC_SCHEDULER])
def test_classes_named_in_the_configuration_exist(name):
    """vLLM imports them by name in other processes."""
    module, cls = name.rsplit(".", 1)
    if module.endswith("gpu_worker"):
        pytest.importorskip("vllm.v1.worker.gpu_worker")
    assert inspect.isclass(getattr(__import__(module, fromlist=["_"]), cls))


_UNTOUCHED = """
import os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=128,
          kv_cache_memory_bytes=8 << 20, additional_config={"block_manager": "default"})
llm.generate([{"prompt_token_ids": [20, 21, 22]}], SamplingParams(max_tokens=2), use_tqdm=False)
from avmp_vllm.engine import seams
assert all(seams.is_installed(seam) for seam in seams.SELECTION)
assert not any(seams.is_installed(seam) for seam in seams.ENGINE)
core = llm.llm_engine.engine_core.engine_core
assert type(core.scheduler.kv_cache_manager) is KVCacheManager
assert type(core.scheduler).__module__.startswith("vllm.")
worker = llm.llm_engine.model_executor.driver_worker.worker
assert type(worker).__module__.startswith("vllm.")
assert type(worker.model_runner).__module__.startswith("vllm.")
loaded = [name for name in sys.modules if name.startswith("avmp_vllm.core")]
assert not loaded, loaded
print("untouched")
"""


def test_default_leaves_vllm_untouched(tiny_jamba):
    """Without ``avmp`` nothing but the flag and the look at the configuration is there."""
    environment = {name: value for name, value in os.environ.items() if name != SELECTED}
    done = subprocess.run(
        [sys.executable, "-c", _UNTOUCHED, tiny_jamba],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip().endswith("untouched"), done.stdout + done.stderr


@pytest.mark.parametrize("found", ["0.31.4", "0.33.0", "1.0.0+cpu"])
def test_another_vllm_is_refused(found):
    """Both versions are named."""
    with pytest.raises(ConfigError, match=rf"vLLM 0.32.x.*{found.split('+')[0]}"):
        require_supported_vllm(found)


@pytest.mark.parametrize("found", ["0.32.0", "0.32.3+cpu"])
def test_the_supported_vllm_is_not(found):
    """Patch releases and builds do not matter."""
    require_supported_vllm(found)
