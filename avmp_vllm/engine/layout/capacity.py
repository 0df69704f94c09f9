"""What fits into an arena, and what stock vLLM would fit into the same bytes.

The stock side is vLLM's own code: its page sizes are chosen by the rule of
``Platform._align_hybrid_block_size`` and everything after that (groups, blocks, blocks a request)
is what its planning functions answer for those sizes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from math import lcm
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

from avmp_vllm.core import Kind
from avmp_vllm.core.capacity import StockPlan, binding_pool, stock_block_tokens
from avmp_vllm.core.geometry import ceil_div
from avmp_vllm.engine.entry import minors
from avmp_vllm.engine.entry.config import selected
from avmp_vllm.engine.layout.arena import AVMPCacheConfig
from avmp_vllm.engine.layout.groups import group_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm." + __name__)


def plan_stock(vllm_config: VllmConfig, kv_cache_config: AVMPCacheConfig) -> StockPlan:
    """Plan the same layers and bytes as stock vLLM does."""
    specs = {kind: group_of(kv_cache_config, kind).kv_cache_spec for kind in Kind}
    kv, ssm = specs[Kind.KV], specs[Kind.SSM]
    cache = copy.copy(vllm_config.cache_config)
    unit = _stock_unit(vllm_config)
    tokens = stock_block_tokens(kv.block_size, kv.page_size_bytes, ssm.page_size_bytes, unit)
    page = kv.page_size_bytes // kv.block_size * tokens
    inflated: dict[str, KVCacheSpec] = {}
    for kind in Kind:
        spec = (
            replace(kv, block_size=tokens)
            if kind is Kind.KV
            else replace(
                ssm,
                page_size_padded=page,
                block_size=tokens if cache.mamba_cache_mode == "align" else ssm.block_size,
            )
        )
        inflated |= dict.fromkeys(group_of(kv_cache_config, kind).layer_names, spec)
    stock = minors.planning()
    groups = stock.get_kv_cache_groups(vllm_config, inflated)
    planned: KVCacheConfig = stock.get_kv_cache_config_from_groups(
        vllm_config, groups, kv_cache_config.kv_cache_tensors[0].size
    )
    ssm_groups = [g for g in groups if hasattr(g.kv_cache_spec, "mamba_cache_mode")]
    state = ssm_groups[0].kv_cache_spec
    return StockPlan(
        block_tokens=tokens,
        blocks=planned.num_blocks - 1,
        kv_groups=len(groups) - len(ssm_groups),
        ssm_groups=len(ssm_groups),
        states=ceil_div(state.max_memory_usage_bytes(vllm_config), state.page_size_bytes),
    )


def _stock_unit(vllm_config: VllmConfig) -> int:
    """Block size that stock vLLM would start from."""
    cache = vllm_config.cache_config
    unit = 128 if vllm_config.device_config.device_type == "cpu" else 16
    if cache.user_specified_block_size:
        unit = cache.block_size
    if cache.mamba_cache_mode == "align":
        unit = lcm(unit, minors.state_alignment(vllm_config))
    return unit


def states_per_sequence(vllm_config: VllmConfig, kv_cache_config: AVMPCacheConfig) -> int:
    """Blocks that vLLM reckons a running request holds: one, or two with prefix caching."""
    spec = group_of(kv_cache_config, Kind.SSM).kv_cache_spec
    return ceil_div(spec.max_memory_usage_bytes(vllm_config), spec.page_size_bytes)


def describe(vllm_config: VllmConfig, kv_cache_config: AVMPCacheConfig) -> list[str]:
    """The capacity block, a line each."""
    geometry = kv_cache_config.geometry
    assert geometry is not None
    stock = plan_stock(vllm_config, kv_cache_config)
    states = states_per_sequence(vllm_config, kv_cache_config)
    longest = vllm_config.model_config.max_model_len
    checkpoints = (
        f"a state is kept every {group_of(kv_cache_config, Kind.SSM).kv_cache_spec.block_size} "
        f"tokens, prefix hits land on {geometry.page_tokens}"
        if vllm_config.cache_config.mamba_cache_mode == "align"
        else "off"
    )
    lines = [
        f"AVMP arena: {geometry.arena_bytes:,} bytes, one buffer, two pools, no fixed split",
        f"  KV page    {geometry.page_bytes:>12,} bytes  {geometry.page_tokens} tokens of "
        f"{len(group_of(kv_cache_config, Kind.KV).layer_names)} attention layers; at most "
        f"{geometry.page_limit:,} pages = {geometry.page_limit * geometry.page_tokens:,} tokens",
        f"  SSM block  {geometry.block_bytes:>12,} bytes  one state of "
        f"{len(group_of(kv_cache_config, Kind.SSM).layer_names)} SSM layers; at most "
        f"{geometry.block_limit:,} blocks",
        f"  prefix cache: {checkpoints}",
        f"  stock vLLM: block of {stock.block_tokens} tokens, {stock.blocks:,} usable blocks, "
        f"{stock.kv_groups + stock.ssm_groups} block tables; AVMP has 2",
        f"  {'tokens each':>13} {'sequences':>10} {'tokens':>12} {'stock seqs':>11}  larger part",
    ]
    lengths = dict.fromkeys(min(length, longest) for length in (256, 4096, longest))
    for tokens in lengths:
        fit = geometry.sequences(tokens, states)
        lines.append(
            f"  {tokens:>13,} {fit:>10,} {fit * tokens:>12,} {stock.sequences(tokens):>11,}  "
            f"{binding_pool(geometry, tokens, states).name}"
        )
    return lines


def update_kv_cache_capacity(stock: Callable[..., None]) -> Callable[..., None]:
    """Wrap the engine core's ``update_kv_cache_capacity``: log and store what two pools hold."""

    def wrapper(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Any:
        if selected(vllm_config.additional_config) is None:
            return stock(vllm_config, kv_cache_config)
        assert isinstance(kv_cache_config, AVMPCacheConfig)
        geometry = kv_cache_config.geometry
        assert geometry is not None
        longest = vllm_config.model_config.max_model_len
        states = states_per_sequence(vllm_config, kv_cache_config)
        each = geometry.pages_for(longest) * geometry.page_bytes + states * geometry.block_bytes
        usable = geometry.pages * geometry.page_bytes - geometry.null_blocks * geometry.block_bytes
        cache = vllm_config.cache_config
        cache.kv_cache_max_concurrency = usable / each
        cache.kv_cache_size_tokens = int(usable / each * longest)
        for line in describe(vllm_config, kv_cache_config):
            logger.info("%s", line)
        return None

    return wrapper
