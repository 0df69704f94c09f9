"""What the arena must hold at least, and how many requests it can hold at most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)

from avmp_vllm.core.extents import budget_for
from avmp_vllm.core.tables import Role
from avmp_vllm.engine.entry.config import ConfigError
from avmp_vllm.engine.layout.groups import role_of, state_spec

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from avmp_vllm.engine.layout.arena import AVMPCacheConfig

logger = init_logger("vllm." + __name__)


def most_pages(vllm_config: VllmConfig, role: Role, spec: KVCacheSpec) -> int | None:
    """Most KV pages that a request holds of a cache; None if one for every so many tokens."""
    if role is Role.RING:
        return 1
    if isinstance(spec, (SlidingWindowSpec, ChunkedLocalAttentionSpec)):
        return spec.max_admission_blocks_per_request(
            max_in_flight_tokens=vllm_config.max_in_flight_tokens,
            max_model_len=vllm_config.model_config.max_model_len,
        )
    return None


def refuse_drafts(vllm_config: VllmConfig, layers: Mapping[str, KVCacheSpec]) -> None:
    """Refuse speculative decoding where a layer's state cannot go back behind a rejected draft.

    Stock vLLM serves these models, too, and answers from states that rejected drafts have changed.

    Raises:
        ConfigError: Naming the layer.
    """
    on_cpu = vllm_config.device_config.device_type == "cpu" and not vllm_config.use_v2_model_runner
    stuck = {MambaAttentionBackendEnum.MAMBA1: "a Mamba-1 layer"}
    if on_cpu:
        stuck[MambaAttentionBackendEnum.MAMBA2] = "a Mamba-2 layer on the CPU"
    for name, spec in layers.items():
        if isinstance(spec, MambaSpec) and spec.num_speculative_blocks and spec.mamba_type in stuck:
            raise ConfigError(
                f"--speculative-config: layer {name} is {stuck[spec.mamba_type]}, and vLLM has no "
                "kernel that takes its state back when a draft token is rejected; remove the option"
            )


def refuse_transfers(vllm_config: VllmConfig, layers: Mapping[str, KVCacheSpec]) -> None:
    """Refuse a KV connector for caches that it was not tried with.

    Raises:
        ConfigError: Naming the layer.
    """
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector is None:
        return
    for name, spec in layers.items():
        if role_of(name, spec) in (Role.WINDOW, Role.RING):
            raise ConfigError(
                f"--kv-transfer-config with kv_connector = {transfer.kv_connector}: layer {name} "
                f"keeps a {type(spec).__name__}, and only layers with a slot for every token were "
                "tried with a connector; remove the option"
            )


def blocks_per_request(spec: MambaSpec, steps: int) -> int:
    """Most SSM blocks that one request must be able to hold at a time.

    With prefix caching, a running state moves to another block with its chunks. So a request holds
    the state of the last step that is known to have run, that of each step in flight with the one
    that it saves inside of its chunk, and that of the step being scheduled. One that begins at a
    cached state holds that, its private copy, and its own.

    Args:
        spec: Of the SSM layers.
        steps: That may be in flight at once, the one being scheduled included.
    """
    # The states behind draft tokens move along with the running one.
    drafts = spec.num_speculative_blocks
    if spec.mamba_cache_mode != "align":
        return 1 + drafts
    return drafts + max(3, 2 + (steps - 1) * (1 + spec.num_prefill_checkpoint_blocks))


def fit_model_len(vllm_config: VllmConfig, kv_cache_config: AVMPCacheConfig) -> None:
    """Check that a request of the longest length fits, or with ``-1`` find that length.

    Raises:
        ArenaTooSmall: With the numbers and what to change.
    """
    model, geometry = vllm_config.model_config, kv_cache_config.geometry
    assert geometry is not None
    blocks = blocks_per_request(state_spec(kv_cache_config), vllm_config.max_concurrent_batches)
    reserve = kv_cache_config.reserve
    if model.original_max_model_len == -1:
        longest = geometry.longest(blocks, reserve)
        if 0 < longest < model.max_model_len:
            logger.info("AVMP: max_model_len reduced to %d, which the arena holds", longest)
            model.max_model_len = longest
    geometry.require_one_request(model.max_model_len, blocks, reserve)
    elastic = kv_cache_config.elastic
    if elastic is not None:
        used = geometry.pages_for(model.max_model_len) * geometry.page_bytes
        used += blocks * geometry.block_bytes
        gap = geometry.usable_bytes(used)
        least = budget_for(geometry.high_end, gap, elastic.chunk_bytes)
        kv_cache_config.elastic = replace(elastic, least_budget=least)


def most_sequences(kv_cache_config: AVMPCacheConfig) -> int:
    """Sequences that fit at one page each: with a state, and one for each token drafted."""
    geometry = kv_cache_config.geometry
    assert geometry is not None
    return geometry.sequences(1, 1 + state_spec(kv_cache_config).num_speculative_blocks)


def clamp_sequences(vllm_config: VllmConfig, kv_cache_config: AVMPCacheConfig) -> None:
    """Lower ``max_num_seqs`` to what the arena can hold at one page each."""
    scheduler, geometry = vllm_config.scheduler_config, kv_cache_config.geometry
    assert geometry is not None
    fit = max(most_sequences(kv_cache_config), 1)
    if scheduler.max_num_seqs > fit:
        logger.warning(
            "AVMP: --max-num-seqs %d lowered to %d, the sequences of one page that the arena of "
            "%d bytes holds; give it more bytes with --kv-cache-memory-bytes to run more",
            scheduler.max_num_seqs,
            fit,
            geometry.arena_bytes,
        )
        scheduler.max_num_seqs = fit
