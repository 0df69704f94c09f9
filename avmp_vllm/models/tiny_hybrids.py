"""Tiny random checkpoints of other families, for tests: hybrids, and one of each extreme.

Hybrids whose attention is latent are in ``tiny_latent.py``. Every function writes a folder, takes
``seed`` and fields of its config class as ``overrides``, and returns the folder. Attention heads
have 32 channels, the fewest that vLLM's CPU attention takes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    FalconH1Config,
    GraniteMoeHybridConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    NemotronHConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Zamba2Config,
)

from avmp_vllm.models.checkpoint import special_token_ids, write_checkpoint

_COMMON: dict[str, Any] = {
    "hidden_size": 128,
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
    "dtype": "float32",
}
_ATTENTION: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
}
# One group: with more, transformers normalises over all channels and vLLM over each group.
# 8 heads of 32 channels with 16 state elements: 16 KiB a layer in fp32, and the convolution.
_MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_chunk_size": 64,
}

# A gated delta net with two value heads for each key head: 16 KiB a layer in fp32.
_DELTA_NET: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
}


def write_tiny_granite_hybrid(path: str | Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Granite hybrid: Mamba-2 except layers 1 and 4 of 6, dense unless ``num_local_experts``."""
    layers = ["attention" if index in (1, 4) else "mamba" for index in range(6)]
    fields = {
        "num_hidden_layers": len(layers),
        "layer_types": layers,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 256,
        "position_embedding_type": "nope",
        "attention_multiplier": 32**-0.5,
    }
    config = GraniteMoeHybridConfig(
        **{**_COMMON, **_ATTENTION, **_MAMBA2, **fields, **special_token_ids(), **overrides}
    )
    return write_checkpoint(path, config, seed=seed)


def write_tiny_nemotron_h(path: str | Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Nemotron-H: Mamba-2, attention and MLP as layers of their own."""
    fields = {
        "layers_block_type": ["mamba", "mlp", "attention", "mlp", "mamba", "mlp", "attention"],
        "head_dim": 32,
        "mamba_num_heads": _MAMBA2["mamba_n_heads"],
        "mamba_head_dim": _MAMBA2["mamba_d_head"],
        "n_groups": _MAMBA2["mamba_n_groups"],
        "ssm_state_size": _MAMBA2["mamba_d_state"],
        "chunk_size": _MAMBA2["mamba_chunk_size"],
    }
    config = NemotronHConfig(
        **{**_COMMON, **_ATTENTION, **fields, **special_token_ids(), **overrides}
    )
    return write_checkpoint(path, config, seed=seed)


def write_tiny_falcon_h1(path: str | Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Falcon-H1: attention and Mamba-2 side by side in each of 4 layers."""
    fields = {"num_hidden_layers": 4, "mamba_d_ssm": 256}
    config = FalconH1Config(
        **{**_COMMON, **_ATTENTION, **_MAMBA2, **fields, **special_token_ids(), **overrides}
    )
    return write_checkpoint(path, config, seed=seed)


def write_tiny_zamba2(path: str | Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Zamba2: Mamba-2 in all of 5 layers, and in two of them one attention block, shared."""
    fields = {
        "num_hidden_layers": 5,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"],
        "n_mamba_heads": _MAMBA2["mamba_n_heads"],
        "mamba_headdim": _MAMBA2["mamba_d_head"],
        "mamba_ngroups": _MAMBA2["mamba_n_groups"],
        "mamba_d_state": _MAMBA2["mamba_d_state"],
        "chunk_size": _MAMBA2["mamba_chunk_size"],
        "num_key_value_heads": 4,
        "attention_head_dim": 64,  # it reads the layer's input and the embedding side by side
        "num_mem_blocks": 1,
        "adapter_rank": 8,
        "tie_word_embeddings": True,  # vLLM knows no other
        "use_mem_rope": True,
    }
    config = Zamba2Config(**{**_COMMON, **_ATTENTION, **fields, **special_token_ids(), **overrides})
    return write_checkpoint(path, config, seed=seed)


def write_tiny_lfm2(path: str | Path, *, seed: int = 0, **overrides: Any) -> Path:
    """LFM2: short convolutions except layers 1 and 4 of 5; a state is smaller than a page."""
    width = _COMMON["hidden_size"]
    fields = {
        "num_hidden_layers": 5,
        "layer_types": ["conv", "full_attention", "conv", "conv", "full_attention"],
        "conv_L_cache": 3,
        "tie_word_embeddings": True,  # vLLM knows no other
        "block_auto_adjust_ff_dim": False,
        # Not of the class, but in every checkpoint, and vLLM reads them.
        "conv_dim": width,
        "block_dim": width,
        "block_ff_dim": _ATTENTION["intermediate_size"],
        "block_multiple_of": 1,
        "block_ffn_dim_multiplier": 1.0,
    }
    config = Lfm2Config(**{**_COMMON, **_ATTENTION, **fields, **special_token_ids(), **overrides})
    return write_checkpoint(path, config, seed=seed)


def write_tiny_qwen3_next(path: str | Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Qwen3-Next: gated delta nets and attention in turn, experts."""
    fields = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    }
    config = Qwen3NextConfig(
        **{**_COMMON, **_ATTENTION, **_DELTA_NET, **fields, **special_token_ids(), **overrides}
    )
    return write_checkpoint(path, config, seed=seed)


def write_tiny_qwen3_5(path: str | Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Qwen3.5 without vision: gated delta nets and attention in turn, dense."""
    config = Qwen3_5TextConfig(
        **{**_COMMON, **_ATTENTION, **_DELTA_NET, **special_token_ids(), **overrides}
    )
    return write_checkpoint(path, config, seed=seed)


def write_tiny_llama(path: str | Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Llama, 2 layers: attention only."""
    fields = {"num_hidden_layers": 2}
    config = LlamaConfig(**{**_COMMON, **_ATTENTION, **fields, **special_token_ids(), **overrides})
    return write_checkpoint(path, config, seed=seed)


def write_tiny_mamba(path: str | Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Mamba (the first), 2 layers: SSM only."""
    fields = {"num_hidden_layers": 2, "state_size": 16, "residual_in_fp32": False}
    config = MambaConfig(**{**_COMMON, **fields, **special_token_ids(), **overrides})
    return write_checkpoint(path, config, seed=seed)


def write_tiny_qwen3_next_mtp(path: str | Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Qwen3-Next with a layer that drafts (multi-token prediction).

    transformers writes no such layer. It is the model's own last attention layer here, over the sum
    of a token's embedding and the hidden state before it: some of its drafts are accepted.
    """
    path = write_tiny_qwen3_next(path, seed=seed, num_nextn_predict_layers=1, **overrides)
    file = path / "model.safetensors"
    tensors = load_file(file)
    last = max(name for name in tensors if name.endswith(".self_attn.q_proj.weight"))
    layer = last.removesuffix("self_attn.q_proj.weight")
    drafter = {
        name.replace(layer, "mtp.layers.0."): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(layer)
    }
    width = _COMMON["hidden_size"]
    drafter["mtp.fc.weight"] = torch.eye(width).repeat(1, 2) / 2
    for name in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"):
        drafter[f"mtp.{name}.weight"] = torch.zeros(width)
    save_file(tensors | drafter, file, metadata={"format": "pt"})
    return path


def write_tiny_eagle(
    path: str | Path, method: str = "eagle", *, seed: int = 0, **overrides: Any
) -> Path:
    """A drafter beside a tiny model of this file (EAGLE or EAGLE-3): a Llama layer and its inputs.

    It has the model's embedding and head, and mostly hands a token's embedding on, which is the
    larger part of what the model adds its layers to: some of its drafts are accepted. EAGLE's layer
    has it in its input; that of EAGLE-3 sees it through its attention alone, which has a head of
    keys and values for each of queries.
    """
    path = Path(path)
    three = method == "eagle3"
    fields = {
        "num_hidden_layers": 1,
        "architectures": ["LlamaForCausalLM"],
        "head_dim": 32,
        "num_key_value_heads": 4 if three else 2,
    }
    config = LlamaConfig(**{**_COMMON, **_ATTENTION, **fields, **special_token_ids(), **overrides})
    config.save_pretrained(path)
    width, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    kv_heads = config.num_key_value_heads * config.head_dim
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5 / 4

    identity = torch.eye(width)
    layer = {
        "mlp.gate_proj": drawn(inner, width),
        "mlp.up_proj": drawn(inner, width),
        "mlp.down_proj": drawn(width, inner),
        "post_attention_layernorm": torch.ones(width),
    }
    if three:
        # A token attends to itself most, and its values are its embedding's.
        sharp = torch.cat([2 * identity, drawn(width, width)], 1)
        layer |= {"self_attn.q_proj": sharp, "self_attn.k_proj": sharp}
        layer["self_attn.v_proj"] = torch.cat([identity, drawn(width, width)], 1)
        layer |= {"self_attn.o_proj": identity, "input_layernorm": torch.ones(width)}
        layer["hidden_norm"] = torch.ones(width)
        # Of the states after three of the model's layers, a little.
        tensors = {"fc": drawn(width, 3 * width), "norm": torch.ones(width)}
        tensors |= {f"midlayer.{name}": tensor for name, tensor in layer.items()}
    else:
        layer["self_attn.q_proj"] = drawn(heads, width)
        layer["self_attn.k_proj"] = drawn(kv_heads, width)
        layer["self_attn.v_proj"] = drawn(kv_heads, width)
        layer["self_attn.o_proj"] = drawn(width, heads)
        tensors = {"fc": torch.cat([identity, identity / 4], 1)}
        tensors |= {f"layers.0.{name}": tensor for name, tensor in layer.items()}
    named = {f"{name}.weight": tensor.clone() for name, tensor in tensors.items()}
    save_file(named, path / "model.safetensors", metadata={"format": "pt"})
    return path
