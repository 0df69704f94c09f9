"""Which pool a layer's cache belongs to."""

from __future__ import annotations

from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec, MambaSpec

from avmp_vllm.core import Kind


def kind_of_spec(spec: KVCacheSpec) -> Kind:
    """Which pool a layer's cache belongs to."""
    return Kind.SSM if isinstance(spec, MambaSpec) else Kind.KV


def saves_anywhere(spec: KVCacheSpec) -> bool:
    """Whether a layer saves its state at any position inside of a chunk, into any block.

    Such a layer names an alignment for states saved in a prefill, and asks for no blocks for them:
    vLLM reserves none then, and AVMP finds its own. (vLLM's own machinery saves one state a chunk,
    at the last hash before its end, in the block before the running one's.)
    """
    return (
        isinstance(spec, MambaSpec)
        and spec.prefill_checkpoint_alignment == 1
        and not spec.num_prefill_checkpoint_blocks
        and not spec.num_speculative_blocks
    )


def group_of(kv_cache_config: KVCacheConfig, kind: Kind) -> KVCacheGroupSpec:
    """The cache group of a pool."""
    return next(
        group
        for group in kv_cache_config.kv_cache_groups
        if kind_of_spec(group.kv_cache_spec) is kind
    )


def checkpoint_spacing(kv_cache_config: KVCacheConfig) -> int:
    """Tokens between two state checkpoints of a running engine."""
    return group_of(kv_cache_config, Kind.SSM).kv_cache_spec.block_size
