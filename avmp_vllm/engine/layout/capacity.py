"""What fits into an arena, and what stock vLLM would fit into the same bytes.

The stock side is vLLM's own code: its page sizes are chosen by the rule of
``Platform._align_hybrid_block_size`` and everything after that (groups, blocks, blocks a request)
is what its planning functions answer for those sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import lcm
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SparseCacheRole,
)

from avmp_vllm.core import PageGroup
from avmp_vllm.core.capacity import StockPlan, binding_pool, stock_block_tokens
from avmp_vllm.core.geometry import ceil_div
from avmp_vllm.core.tables import Role, round_up
from avmp_vllm.engine.entry import minors
from avmp_vllm.engine.entry.config import selected
from avmp_vllm.engine.layout.arena import AVMPCacheConfig
from avmp_vllm.engine.layout.groups import (
    checkpoint_spacing,
    first_spec,
    role_of,
    sort_layers,
    state_spec,
)
from avmp_vllm.engine.layout.limits import most_pages

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm." + __name__)


def plan_stock(vllm_config: VllmConfig, kv_cache_config: AVMPCacheConfig) -> StockPlan | None:
    """Plan the same layers and bytes as stock vLLM does; None for layers that it cannot plan."""
    specs, elastic = kv_cache_config.layer_specs, kv_cache_config.elastic
    states = [spec for spec in specs.values() if isinstance(spec, MambaSpec)]
    slots = _attention(specs)
    tokens = stock_block_tokens(
        slots.block_size,
        slots.page_size_bytes,
        max(state.page_size_bytes for state in states),
        _stock_unit(vllm_config, slots),
    )
    config = selected(vllm_config.additional_config)
    if config is not None and config.page_tokens is None:
        # The page is what every backend takes, and stock's block is a multiple of that too.
        tokens = round_up(tokens, slots.block_size)
    page = slots.page_size_bytes // slots.block_size * tokens
    aligned = vllm_config.cache_config.mamba_cache_mode == "align"
    inflated = {name: _inflated(name, spec, tokens, page, aligned) for name, spec in specs.items()}
    try:
        stock = minors.planning()
        groups = stock.get_kv_cache_groups(vllm_config, inflated)
        blocks = min(
            stock.get_kv_cache_config_from_groups(
                vllm_config,
                stock._project_kv_cache_groups_to_worker(groups, stage.specs),
                elastic.budget if elastic else stage.arena_bytes,
            ).num_blocks
            for stage in kv_cache_config.stages
        )
    except (AssertionError, NotImplementedError, ValueError):
        return None
    firsts = [first_spec(group.kv_cache_spec) for group in groups]
    held = next(spec for spec in firsts if isinstance(spec, MambaSpec))
    return StockPlan(
        groups=tuple(
            PageGroup(spec.block_size, most_pages(vllm_config, role_of("", spec), spec))
            for spec in firsts
            if not isinstance(spec, MambaSpec)
        ),
        ssm_groups=sum(isinstance(spec, MambaSpec) for spec in firsts),
        states=ceil_div(held.max_memory_usage_bytes(vllm_config), held.page_size_bytes),
        blocks=blocks - 1,
    )


def _attention(specs: Mapping[str, KVCacheSpec]) -> AttentionSpec:
    """The spec of the model's attention, by which stock vLLM sizes its block: no indexer's."""
    return next(
        spec
        for name, spec in specs.items()
        if isinstance(spec, AttentionSpec)
        and role_of(name, spec) is Role.SLOTS
        and spec.tokens_per_state == 1
        and getattr(spec, "cache_role", None) is not SparseCacheRole.INDEXER
    )


def _inflated(name: str, spec: KVCacheSpec, tokens: int, page: int, aligned: bool) -> KVCacheSpec:
    """What a layer's spec would be under stock vLLM's block."""
    if isinstance(spec, MambaSpec):
        return replace(
            spec, page_size_padded=page, block_size=tokens if aligned else spec.block_size
        )
    return spec if role_of(name, spec) is Role.RING else spec.copy_with_new_block_size(tokens)


def _stock_unit(vllm_config: VllmConfig, slots: KVCacheSpec) -> int:
    """Tokens that stock vLLM's block would be a multiple of."""
    cache = vllm_config.cache_config
    unit = 128 if vllm_config.device_config.device_type == "cpu" else 16
    if cache.user_specified_block_size:
        unit = cache.block_size
    if isinstance(slots, MLAAttentionSpec):
        unit = max(unit, 128)
    if cache.mamba_cache_mode == "align":
        unit = lcm(unit, minors.state_alignment(vllm_config))
    return unit


def states_per_sequence(vllm_config: VllmConfig, kv_cache_config: AVMPCacheConfig) -> int:
    """Blocks that vLLM reckons a running request holds: one, or two with prefix caching."""
    spec = state_spec(kv_cache_config)
    return ceil_div(spec.max_memory_usage_bytes(vllm_config), spec.page_size_bytes)


def _stock_line(stock: StockPlan | None) -> str:
    if stock is None:
        return "stock vLLM: cannot plan these layers"
    return (
        f"stock vLLM: block of {stock.block_tokens} tokens, {stock.blocks:,} usable blocks, "
        f"{stock.tables} block tables"
    )


def _layer_counts(kv_cache_config: AVMPCacheConfig) -> list[int]:
    """Layers of each block table, in all pipeline stages."""
    if len(kv_cache_config.stages) == 1:
        return [len(group.layer_names) for group in kv_cache_config.kv_cache_groups]
    return [len(table.specs) for table in sort_layers(kv_cache_config.layer_specs)]


def _stage_lines(kv_cache_config: AVMPCacheConfig) -> list[str]:
    """What each of several pipeline stages has of the pages and bytes."""
    geometry, stages = kv_cache_config.geometry, kv_cache_config.stages
    assert geometry is not None
    if len(stages) == 1:
        return []
    lines = []
    for number, stage in enumerate(stages):
        own = geometry.stage(number)
        ssm = sum(isinstance(spec, MambaSpec) for spec in stage.specs.values())
        lines.append(
            f"  stage {number}: {own.arena_bytes:,} bytes; KV page {own.page_bytes:,} "
            f"({len(stage.specs) - ssm} layers), SSM block {own.block_bytes:,} ({ssm} layers)"
        )
    return lines


def describe(vllm_config: VllmConfig, kv_cache_config: AVMPCacheConfig) -> list[str]:
    """The capacity block, a line each."""
    geometry = kv_cache_config.geometry
    assert geometry is not None
    stock = plan_stock(vllm_config, kv_cache_config)
    states = states_per_sequence(vllm_config, kv_cache_config)
    longest = vllm_config.model_config.max_model_len
    checkpoints = (
        f"a state is kept every {checkpoint_spacing(kv_cache_config)} "
        f"tokens, prefix hits land on {geometry.page_tokens}"
        if vllm_config.cache_config.mamba_cache_mode == "align"
        else "off"
    )
    first, *more, ssm = _layer_counts(kv_cache_config)
    reserve = kv_cache_config.reserve
    lines = [
        f"AVMP arena: {geometry.arena_bytes:,} bytes, one buffer, two pools, no fixed split",
        *_elastic_lines(kv_cache_config),
        f"  KV page    {geometry.page_bytes:>12,} bytes  {geometry.page_tokens} tokens of "
        f"{first} attention layers; at most "
        f"{geometry.page_limit:,} pages = {geometry.longest(0):,} tokens",
        *(
            f"             and for {count} more: {pages.page_tokens} tokens, "
            + (f"at most {pages.most:,} pages a request" if pages.most else "a page each")
            for count, pages in zip(more, geometry.more_groups, strict=True)
        ),
        f"  SSM block  {geometry.block_bytes:>12,} bytes  one state of "
        f"{ssm} SSM layers; at most {geometry.block_limit:,} blocks",
        *_stage_lines(kv_cache_config),
        f"  prefix cache: {checkpoints}",
        f"  {_stock_line(stock)}; AVMP has {len(kv_cache_config.kv_cache_groups)} block tables",
        f"  {'tokens each':>13} {'sequences':>10} {'tokens':>12} {'stock seqs':>11}  larger part",
    ]
    lengths = dict.fromkeys(min(length, longest) for length in (256, 4096, longest))
    for tokens in lengths:
        fit = geometry.sequences(tokens, states, reserve)
        lines.append(
            f"  {tokens:>13,} {fit:>10,} {fit * tokens:>12,} "
            f"{f'{stock.sequences(tokens):,}' if stock else '-':>11}  "
            f"{binding_pool(geometry, tokens, states).name}"
        )
    return lines


def _elastic_lines(kv_cache_config: AVMPCacheConfig) -> list[str]:
    """What an elastic arena means for the figures; nothing for a fixed one."""
    elastic, geometry = kv_cache_config.elastic, kv_cache_config.geometry
    if elastic is None:
        return []
    assert geometry is not None
    return [
        f"  elastic: at most {elastic.budget:,} bytes of it have memory, in chunks of "
        f"{elastic.chunk_bytes:,}; sequences below are those that fit into them",
        f"  at rest: the null bytes of {geometry.null_bytes:,}, what the prefix cache holds, and "
        f"the rest of their chunks; under load up to {elastic.slack_bytes:,} more than is held",
    ]


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
        concurrency = geometry.concurrency(longest, states, kv_cache_config.reserve)
        cache = vllm_config.cache_config
        cache.kv_cache_max_concurrency = concurrency
        cache.kv_cache_size_tokens = int(concurrency * longest)
        for line in describe(vllm_config, kv_cache_config):
            logger.info("%s", line)
        return None

    return wrapper
