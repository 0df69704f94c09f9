"""``avmp tiny-jamba``: a Jamba of three million parameters with random weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transformers import JambaConfig

from avmp_vllm.models.checkpoint import special_token_ids, write_checkpoint

# Eight layers as in Jamba: Mamba except layers 2 and 6, a mixture of experts in every second one.
# In fp32 one sequence's SSM block is 6 x 19 KiB = 114 KiB, a KV page of 32 tokens 2 x 16 KiB.
_HEAD_SIZE = 32  # the smallest that vLLM's CPU attention takes
_SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_key_value_heads": 2,
    "attn_layer_period": 4,
    "attn_layer_offset": 2,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_dt_rank": 8,
    "max_position_embeddings": 8192,
    "dtype": "float32",
}


def tiny_jamba_config(**overrides: Any) -> JambaConfig:
    """Return the config; ``overrides`` are fields of ``JambaConfig``."""
    fields = {**_SHAPE, **special_token_ids(), **overrides}
    fields.setdefault("num_attention_heads", fields["hidden_size"] // _HEAD_SIZE)
    return JambaConfig(**fields)


def write_tiny_jamba(path: str | Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a tiny Jamba checkpoint to the folder ``path``; return it.

    ``overrides`` are fields of ``JambaConfig``. Same arguments, same bytes.
    """
    return write_checkpoint(path, tiny_jamba_config(**overrides), seed=seed)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default 0)")
    parser.add_argument("--layers", type=int, default=_SHAPE["num_hidden_layers"])
    parser.add_argument(
        "--hidden-size",
        type=int,
        default=_SHAPE["hidden_size"],
        help=f"a multiple of {2 * _HEAD_SIZE} (default {_SHAPE['hidden_size']})",
    )
    parser.add_argument("--experts", type=int, default=_SHAPE["num_experts"])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=_SHAPE["dtype"])


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint and say where it is."""
    path = write_tiny_jamba(
        args.directory,
        seed=args.seed,
        num_hidden_layers=args.layers,
        hidden_size=args.hidden_size,
        num_experts=args.experts,
        dtype=args.dtype,
    )
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    print(f"{path}: {args.layers} layers, {args.dtype}, {size / 2**20:.1f} MiB")
    return 0
