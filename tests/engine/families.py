"""Cache specs of families of hybrids, as their layers give them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from vllm.v1.kv_cache_interface import (
    CircularBufferSpec,
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

HALF = torch.bfloat16


def attention(kind: type = FullAttentionSpec, heads: int = 2, **fields: Any) -> KVCacheSpec:
    """A layer with keys and values of 64 channels."""
    fields = {"block_size": 16, "head_size": 64, "dtype": HALF, **fields}
    return kind(num_kv_heads=heads, **fields)


def state(size: int = 1000, **fields: Any) -> MambaSpec:
    """A layer with a state of so many fp32 numbers."""
    fields = {"block_size": 512, "mamba_cache_mode": "align", **fields}
    return MambaSpec(shapes=((size,),), dtypes=(torch.float32,), **fields)


def window(tokens: int = 100, **fields: Any) -> KVCacheSpec:
    """A layer that sees so many tokens back."""
    return attention(SlidingWindowSpec, sliding_window=tokens, **fields)


def with_blocks(
    family: Mapping[str, KVCacheSpec], page: int, spacing: int, **state_fields: Any
) -> dict[str, KVCacheSpec]:
    """A family with pages and checkpoints of other sizes; a ring keeps its own."""
    sized = {}
    for name, spec in family.items():
        if isinstance(spec, MambaSpec):
            sized[name] = replace(spec, block_size=spacing, **state_fields)
        elif isinstance(spec, CircularBufferSpec):
            sized[name] = spec
        else:
            sized[name] = replace(spec, block_size=page)
    return sized


def layers(family: Mapping[str, KVCacheSpec], each: int = 3) -> dict[str, KVCacheSpec]:
    """So many layers of each kind, in turn."""
    return {f"{name}{index}": spec for index in range(each) for name, spec in family.items()}


#: What each family keeps, a layer of each kind of it.
FAMILIES: dict[str, dict[str, KVCacheSpec]] = {
    "jamba": {"a": attention(), "s": state()},
    "kimi-linear": {"a": attention(MLAAttentionSpec, 1, head_size=576), "s": state(20_000)},
    "glm-5.3": {
        "a": attention(MLAAttentionSpec, 1, head_size=576),
        "i": attention(MLAAttentionSpec, 1, head_size=128, tokens_per_state=4),
        "r": attention(CircularBufferSpec, 1, block_size=32, head_size=128),
        "s": state(20_000),
    },
    "qwen4exp": {
        "a": attention(),
        "i": attention(MLAAttentionSpec, 1, head_size=128, tokens_per_state=2),
        "s": state(4000),
        "c": state(300),
    },
    "three layouts of each": {
        "a": attention(),
        "b": attention(heads=1),
        "c": attention(head_size=32),
        "s": state(),
        "t": state(77),
        "u": state(4000),
    },
    "two tables": {"a": attention(), "b": attention(dcp_sharded=False), "s": state()},
    "windows": {"a": attention(), "w": window(), "s": state()},
}
