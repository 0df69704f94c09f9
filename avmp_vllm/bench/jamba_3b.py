"""Both cache managers on the shape of AI21-Jamba-Reasoning-3B, without an engine or weights.

28 layers: 2 with attention (one KV head of 128, bf16), 26 Mamba (inner size 5120, state 16 in
fp32, convolution over 4 in bf16). Stock's side is planned by vLLM's own functions from the block
size that its rule for hybrid models gives.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256_cbor
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MambaSpec,
)
from vllm.v1.request import Request

from avmp_vllm.core.capacity import stock_block_tokens
from avmp_vllm.engine.entry import minors
from avmp_vllm.engine.entry.config import AVMPConfig
from avmp_vllm.engine.layout.arena import arena_config
from avmp_vllm.engine.layout.pages import CHECKPOINT_TOKENS
from avmp_vllm.engine.scheduler.manager import AVMPBlockSpaceManager
from avmp_vllm.models.jamba_3b import jamba_3b_config

#: Longest request; a prompt of that length is prefilled in one chunk.
MAX_MODEL_LEN = 8192
#: Tokens of AVMP's KV page on a GPU, and the unit of stock's blocks there.
PAGE_TOKENS = 16
_LAYERS = 28
_ATTENTION = (7, 21)


@dataclass(frozen=True)
class Side:
    """One manager and what it was made from.

    Attributes:
        manager: Stock's or AVMP's.
        config: Its cache configuration.
        hash_block_size: Tokens that a prefix hash covers.
    """

    manager: KVCacheManager
    config: KVCacheConfig
    hash_block_size: int

    def request(self, name: str, tokens: list[int]) -> Request:
        """Make a request as the engine does, hashed for this side if prefix caching is on."""
        hasher = (
            kv_cache_utils.get_request_block_hasher(self.hash_block_size, sha256_cbor)
            if self.manager.enable_caching
            else None
        )
        return Request(
            request_id=name,
            prompt_token_ids=tokens,
            sampling_params=SamplingParams(max_tokens=MAX_MODEL_LEN - len(tokens)),
            pooling_params=None,
            block_hasher=hasher,
        )


def _vllm_config(prefix_caching: bool) -> VllmConfig:
    """A configuration that vLLM makes of the model's (what matters of it here)."""
    model = jamba_3b_config()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            enable_prefix_caching=prefix_caching,
            max_model_len=MAX_MODEL_LEN,
            max_num_batched_tokens=MAX_MODEL_LEN,
            max_num_seqs=256,
            enforce_eager=True,
        ).create_engine_config()
    # Left to the engine core, which asks the workers.
    config.cache_config.kv_cache_layout = "LBNHC"
    return config


def _layers(kv: FullAttentionSpec, ssm: MambaSpec) -> dict[str, KVCacheSpec]:
    return {f"layers.{i}": kv if i in _ATTENTION else ssm for i in range(_LAYERS)}


def managers(arena_bytes: int, prefix_caching: bool) -> dict[str, Side]:
    """Make ``stock`` and ``avmp`` managers over the same number of bytes."""
    vllm_config = _vllm_config(prefix_caching)
    kv_cache_utils.init_none_hash(sha256_cbor)
    mode = "align" if prefix_caching else "none"
    kv = FullAttentionSpec(
        block_size=PAGE_TOKENS, num_kv_heads=1, head_size=128, dtype=torch.bfloat16
    )
    ssm = MambaSpec(
        block_size=CHECKPOINT_TOKENS if prefix_caching else MAX_MODEL_LEN,
        shapes=((3, 5120), (5120, 16)),
        dtypes=(torch.bfloat16, torch.float32),
        mamba_type=MambaAttentionBackendEnum.MAMBA1,
        mamba_cache_mode=mode,
    )
    arena = arena_config(vllm_config, _layers(kv, ssm), arena_bytes)
    block = stock_block_tokens(
        PAGE_TOKENS, kv.page_size_bytes, ssm.page_size_bytes, unit=PAGE_TOKENS
    )
    stock_kv = replace(kv, block_size=block)
    stock_ssm = replace(
        ssm,
        block_size=block if prefix_caching else MAX_MODEL_LEN,
        page_size_padded=stock_kv.page_size_bytes,
    )
    (stock,) = minors.stock_cache_configs(
        vllm_config, [_layers(stock_kv, stock_ssm)], [arena_bytes]
    )

    def side(config: KVCacheConfig, build: Any) -> Side:
        scheduler_block, hash_block = kv_cache_utils.resolve_kv_cache_block_sizes(
            config, vllm_config
        )
        manager = build(
            config,
            max_model_len=MAX_MODEL_LEN,
            scheduler_block_size=scheduler_block,
            hash_block_size=hash_block,
            max_in_flight_tokens=vllm_config.max_in_flight_tokens,
            enable_caching=prefix_caching,
            use_eagle=False,
            num_prefill_lookahead=0,
            log_stats=False,
            enable_kv_cache_events=False,
            dcp_world_size=1,
            pcp_world_size=1,
            metrics_collector=None,
            watermark=0.0,
        )
        return Side(manager, config, hash_block)

    return {
        "stock": side(stock, KVCacheManager),
        "avmp": side(
            arena,
            lambda config, **options: AVMPBlockSpaceManager(config, AVMPConfig(), **options),
        ),
    }
