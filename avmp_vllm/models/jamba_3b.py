"""The layer sizes of AI21-Jamba-Reasoning-3B, for measurements without its weights."""

from __future__ import annotations

from transformers import JambaConfig


def jamba_3b_config() -> JambaConfig:
    """Return the config: 28 layers, 2 of them with attention, no mixture of experts.

    The layer counts are published; which two layers have attention changes no size.
    """
    return JambaConfig(
        architectures=["JambaForCausalLM"],
        hidden_size=2560,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=20,
        num_key_value_heads=1,
        attn_layer_period=14,
        attn_layer_offset=7,
        num_experts=1,
        num_experts_per_tok=1,
        mamba_d_state=16,
        mamba_d_conv=4,
        mamba_expand=2,
        max_position_embeddings=262_144,
        dtype="bfloat16",
    )
