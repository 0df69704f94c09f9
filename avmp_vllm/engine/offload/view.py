"""The cache's configuration as the connector's code reads it.

vLLM's connector finds a state by the block that it ends, so it knows states at multiples of the
block alone. Under AVMP a state may stand at the end of any page. Told that a state's block is one
page long, the connector's own code stores and finds each state under the hash of just its prefix,
and takes the longest prefix of which the host has both the pages and the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import build_offloading_config
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.kv_cache_interface import KVCacheGroupSpec

from avmp_vllm.core import Kind
from avmp_vllm.core.geometry import Geometry
from avmp_vllm.engine.layout.arena import AVMPCacheConfig
from avmp_vllm.engine.layout.groups import first_spec, group_of, kind_of_spec

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.kv_offload.config import OffloadingConfig


def geometry_of(kv_cache_config: AVMPCacheConfig) -> Geometry:
    """Sizes of the arena behind a configuration."""
    assert kv_cache_config.geometry is not None
    return kv_cache_config.geometry


def page_tokens(kv_cache_config: AVMPCacheConfig) -> int:
    """Tokens of a KV page, which states' prefixes end at."""
    return int(first_spec(group_of(kv_cache_config, Kind.KV).kv_cache_spec).block_size)


def by_page(kv_cache_config: AVMPCacheConfig) -> AVMPCacheConfig:
    """The same configuration, with states whose blocks are a page long."""
    page = page_tokens(kv_cache_config)
    return replace(  # type: ignore[call-arg]  # vLLM's dataclass is not annotated as one
        kv_cache_config,
        num_blocks=geometry_of(kv_cache_config).pages,
        kv_cache_groups=[
            KVCacheGroupSpec(
                group.layer_names, replace(first_spec(group.kv_cache_spec), block_size=page)
            )
            if kind_of_spec(group.kv_cache_spec) is Kind.SSM
            else group
            for group in kv_cache_config.kv_cache_groups
        ],
    )


def offloading_config(
    vllm_config: VllmConfig, kv_cache_config: AVMPCacheConfig
) -> OffloadingConfig:
    """What an offloading spec is made from.

    A spec that counts one size for every entry of the host gives it room for a page and a state.
    Ranks share no entry: their arenas have the same handles, and may differ in bytes.
    """
    geometry = geometry_of(kv_cache_config)
    return replace(
        build_offloading_config(vllm_config, kv_cache_config),
        worker_kv_bytes_per_block=geometry.page_bytes + geometry.block_bytes,
        replicated_layout=False,
    )


def tables_by_page(
    blocks: KVCacheBlocks, kinds: Sequence[Kind], null: KVCacheBlock, pages: int
) -> KVCacheBlocks:
    """A request's blocks as the connector reads them.

    Args:
        blocks: Of each cache group; of states, the last is the one to load.
        kinds: Of each cache group.
        null: The null block.
        pages: Of the prefix that is there when the load has ended.
    """
    return KVCacheBlocks(
        tuple(
            [null] * (pages - 1) + [group[-1]] if kind is Kind.SSM else group
            for group, kind in zip(blocks.blocks, kinds, strict=True)
        )
    )
