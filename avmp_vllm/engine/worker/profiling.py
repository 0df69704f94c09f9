"""The throwaway cache over which vLLM measures the memory of CUDA graphs before it sizes the arena.

Both runners plan that cache with vLLM's own functions, which know one page size. This one has room
for one page of each kind a sequence, as theirs has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from avmp_vllm.core.geometry import Geometry
from avmp_vllm.engine.entry.config import selected
from avmp_vllm.engine.layout.arena import ANY_ARENA, AVMPCacheConfig, arena_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec


def least_bytes(geometry: Geometry, sequences: int) -> int:
    """Bytes of an arena in which so many sequences of one page and one state fit.

    Args:
        geometry: For its page sizes.
        sequences: At least 1.
    """
    pages = sequences * len(geometry.groups) + 1
    return pages * geometry.page_bytes + (geometry.null_blocks + sequences) * geometry.block_bytes


def least_config(
    vllm_config: VllmConfig, specs: dict[str, KVCacheSpec], sequences: int
) -> AVMPCacheConfig:
    """The smallest arena in which so many sequences fit at one page and one state each."""
    geometry = arena_config(vllm_config, specs, ANY_ARENA).geometry
    assert geometry is not None
    return arena_config(vllm_config, specs, least_bytes(geometry, sequences))


def initialize_least_cache(runner: Any) -> None:
    """Give a model runner, of either version, the cache on which graphs are profiled."""
    sequences = min(runner.max_num_reqs, runner.compilation_config.max_cudagraph_capture_size) or 1
    config = least_config(runner.vllm_config, runner.get_kv_cache_spec(), sequences)
    runner.initialize_kv_cache(config, is_profiling=True)
    runner.cache_config.num_gpu_blocks = config.num_blocks


def init_minimal_kv_cache_for_profiling(stock: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wrap ``_init_minimal_kv_cache_for_profiling`` of Runner V2."""

    def wrapper(runner: Any) -> None:
        if selected(runner.vllm_config.additional_config) is None:
            return stock(runner)
        return initialize_least_cache(runner)

    return wrapper
