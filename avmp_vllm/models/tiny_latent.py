"""Tiny random checkpoints of hybrids with latent attention (MLA), for tests.

vLLM and transformers name a config's fields differently here, or transformers does not know the
model at all. So these are written tensor by tensor, under the names of the published checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from avmp_vllm.models.checkpoint import special_token_ids, write_weights

_WIDTH, _HEADS, _HEAD, _MLP = 128, 4, 32, 256
_LATENT: dict[str, Any] = {
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
_COMMON: dict[str, Any] = {
    "hidden_size": _WIDTH,
    "intermediate_size": _MLP,
    "num_attention_heads": _HEADS,
    "num_hidden_layers": 4,
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
    "dtype": "float32",
}
_CONVOLUTION = 4


class BailingHybridConfig(PretrainedConfig):  # type: ignore[misc]
    """Ling and Ring 2.5, whose config class is published with their checkpoints only."""

    model_type = "bailing_hybrid"


AutoConfig.register(BailingHybridConfig.model_type, BailingHybridConfig, exist_ok=True)


def write_tiny_kimi_linear(path: str | Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Kimi-Linear: delta attention (KDA) except layers 1 and 3 of 4, which are latent; dense."""
    from vllm.transformers_utils.configs.kimi_linear import KimiLinearConfig

    fields = {
        "num_experts": None,
        "mla_use_nope": True,
        "linear_attn_config": {
            "kda_layers": [1, 3],  # counted from 1
            "full_attn_layers": [2, 4],
            "head_dim": _HEAD,
            "num_heads": _HEADS,
            "short_conv_kernel_size": _CONVOLUTION,
        },
        "architectures": ["KimiLinearForCausalLM"],
    }
    config = KimiLinearConfig(
        **{**_COMMON, **_LATENT, **fields, **special_token_ids(), **overrides}
    )
    shapes = _ends("model.embed_tokens.weight", config.vocab_size)
    inner = _HEADS * _HEAD
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}."
        shapes |= _layer(layer)
        if not config.is_kda_layer(index):
            shapes |= _latent(config, layer + "self_attn.", "o_proj")
            continue
        attention = layer + "self_attn."
        for name in "qkv":
            shapes[f"{attention}{name}_proj.weight"] = (inner, _WIDTH)
            shapes[f"{attention}{name}_conv1d.weight"] = (inner, 1, _CONVOLUTION)
        for name in "fg":
            shapes[f"{attention}{name}_a_proj.weight"] = (_HEAD, _WIDTH)
            shapes[f"{attention}{name}_b_proj.weight"] = (inner, _HEAD)
        shapes |= {
            attention + "b_proj.weight": (_HEADS, _WIDTH),
            attention + "A_log": (_HEADS,),
            attention + "dt_bias": (inner,),
            attention + "o_norm.weight": (_HEAD,),
            attention + "o_proj.weight": (_WIDTH, inner),
        }
    return write_weights(path, config, shapes, seed=seed)


def write_tiny_bailing_2_5(path: str | Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Ling 2.5: lightning attention except every second of 4 layers, which is latent; dense."""
    fields = {
        "num_experts": 1,
        "layer_group_size": 2,
        "head_dim": _HEAD,
        "num_key_value_heads": _HEADS,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "use_bias": False,
        "use_qkv_bias": False,
        "use_qk_norm": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "partial_rotary_factor": 0.5,
        "architectures": ["BailingMoeV2_5ForCausalLM"],
    }
    config = BailingHybridConfig(
        **{**_COMMON, **_LATENT, **fields, **special_token_ids(), **overrides}
    )
    shapes = _ends("model.word_embeddings.weight", config.vocab_size)
    inner = _HEADS * config.head_dim
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}."
        shapes |= _layer(layer)
        attention = layer + "attention."
        if (index + 1) % config.layer_group_size == 0:
            shapes |= _latent(config, attention, "dense")
            continue
        shapes |= {
            attention + "query_key_value.weight": (3 * inner, _WIDTH),
            attention + "query_layernorm.weight": (config.head_dim,),
            attention + "key_layernorm.weight": (config.head_dim,),
            attention + "g_proj.weight": (inner, _WIDTH),
            attention + "g_norm.weight": (inner,),
            attention + "dense.weight": (_WIDTH, inner),
        }
    return write_weights(path, config, shapes, seed=seed)


def _ends(embeddings: str, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """What comes before the layers and after them."""
    return {
        embeddings: (vocabulary, _WIDTH),
        "model.norm.weight": (_WIDTH,),
        "lm_head.weight": (vocabulary, _WIDTH),
    }


def _layer(layer: str) -> dict[str, tuple[int, ...]]:
    """A layer without its attention."""
    return {
        layer + "input_layernorm.weight": (_WIDTH,),
        layer + "post_attention_layernorm.weight": (_WIDTH,),
        layer + "mlp.gate_proj.weight": (_MLP, _WIDTH),
        layer + "mlp.up_proj.weight": (_MLP, _WIDTH),
        layer + "mlp.down_proj.weight": (_WIDTH, _MLP),
    }


def _latent(config: PretrainedConfig, attention: str, output: str) -> dict[str, tuple[int, ...]]:
    """Latent attention without a compressed query."""
    rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
    key, value = config.qk_nope_head_dim, config.v_head_dim
    return {
        attention + "q_proj.weight": (_HEADS * (key + rope), _WIDTH),
        attention + "kv_a_proj_with_mqa.weight": (rank + rope, _WIDTH),
        attention + "kv_a_layernorm.weight": (rank,),
        attention + "kv_b_proj.weight": (_HEADS * (key + value), rank),
        attention + output + ".weight": (_WIDTH, _HEADS * value),
    }
