"""Tiny random checkpoints of other families, for tests: Mamba-2 hybrids, and one of each extreme.

Every function writes a folder, takes ``seed`` and fields of its config class as ``overrides``, and
returns the folder. Attention heads have 32 channels, the fewest that vLLM's CPU attention takes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    FalconH1Config,
    GraniteMoeHybridConfig,
    LlamaConfig,
    MambaConfig,
    NemotronHConfig,
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
