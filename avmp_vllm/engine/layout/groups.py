"""Which pool a layer's cache belongs to, and which layers share a block table.

Layers are told apart by the exact type of their cache's spec, never by a model's name:

====== ============================================================== ========================
role   specs                                                          held by a request
====== ============================================================== ========================
slots  full attention, MLA, compressed indexers                       a slot for every token
window sliding windows, with or without MLA, and local chunks         the last tokens
ring   circular buffers                                               one page
state  all SSM layers                                                 a block of the SSM pool
====== ============================================================== ========================

Layers of a role that need the same slots share a block table, whatever their bytes. Slots, windows
and rings are pages of the KV pool; all states together are one block of the SSM pool.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    CircularBufferSpec,
    CrossAttentionSpec,
    EncoderOnlyAttentionSpec,
    FullAttentionSpec,
    HiddenStateCacheSpec,
    HiSparseHotSpec,
    HiSparseResidentSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    RSWASpec,
    SinkFullAttentionSpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
    iter_layer_specs,
)

from avmp_vllm.core import Kind
from avmp_vllm.core.tables import Role, by_need
from avmp_vllm.engine.entry.config import ConfigError

ROLES: dict[type[KVCacheSpec], Role] = {
    FullAttentionSpec: Role.SLOTS,
    MLAAttentionSpec: Role.SLOTS,
    SlidingWindowSpec: Role.WINDOW,
    SlidingWindowMLASpec: Role.WINDOW,
    ChunkedLocalAttentionSpec: Role.WINDOW,
    CircularBufferSpec: Role.RING,
    MambaSpec: Role.STATE,
}
#: Specs that have no place in either pool, and why.
REFUSED: dict[type[KVCacheSpec], str] = {
    RSWASpec: "its gaps are given back out of order",
    SinkFullAttentionSpec: "its first pages are shared by all requests",
    HiddenStateCacheSpec: "it keeps hidden states for a draft model's training",
    CrossAttentionSpec: "its pages hold an encoder's output",
    EncoderOnlyAttentionSpec: "it keeps nothing",
    HiSparseHotSpec: "its pages have a copy on the host",
    HiSparseResidentSpec: "its pages have a copy on the host",
}


def role_of(name: str, spec: KVCacheSpec) -> Role:
    """What a request holds of a layer's cache.

    Raises:
        ConfigError: Neither pool can hold it.
    """
    role = ROLES.get(type(spec))
    if role is None or (not spec.prefix_cacheable and role is not Role.RING):
        why = REFUSED.get(type(spec), "AVMP does not know what a request holds of it")
        if role is not None:
            why = "a cached prefix is replayed from its window"
        raise ConfigError(
            f"layer {name} keeps a {type(spec).__name__}, which AVMP has no pool for ({why}); use "
            "--block-manager default"
        )
    return role


@dataclass(frozen=True)
class Layers:
    """Layers that share a block table.

    Attributes:
        role: What a request holds of their caches.
        specs: By name, in the model's order.
    """

    role: Role
    specs: Mapping[str, KVCacheSpec]

    @property
    def kind(self) -> Kind:
        """Which pool they belong to."""
        return Kind.SSM if self.role is Role.STATE else Kind.KV

    def among(self, names: Container[str]) -> Layers:
        """Those that are among others: a pipeline stage's own."""
        specs = {name: spec for name, spec in self.specs.items() if name in names}
        return Layers(self.role, specs)

    def layouts(self) -> Iterable[tuple[KVCacheSpec, list[str]]]:
        """Layers of equal spec, which one tensor describes."""
        names: dict[KVCacheSpec, list[str]] = {}
        for name, spec in self.specs.items():
            names.setdefault(spec, []).append(name)
        return names.items()

    def shared_spec(self) -> KVCacheSpec:
        """The spec of the group: that of its layers, or one that holds all of theirs."""
        first = next(iter(self.specs.values()))
        if all(spec == first for spec in self.specs.values()):
            return first
        return UniformTypeKVCacheSpecs(block_size=first.block_size, kv_cache_specs=dict(self.specs))


def sort_layers(specs: Mapping[str, KVCacheSpec]) -> list[Layers]:
    """Sort a rank's layers into block tables: slots first, states last.

    Raises:
        ConfigError: A cache that has no pool, no layer of a pool, or states that cannot move
            together.
    """
    named = ((role_of(name, spec), name, spec) for name, spec in specs.items())
    tables = [
        Layers(role, dict(members))
        for role, members in by_need(
            (role, _need(spec), (name, spec)) for role, name, spec in named
        )
    ]
    roles = {table.role for table in tables}
    for role, kind in ((Role.SLOTS, Kind.KV), (Role.STATE, Kind.SSM)):
        if role not in roles:
            raise ConfigError(
                f"there is no {kind.name} layer: AVMP manages models, and pipeline stages, that "
                "mix attention and SSM layers; use --block-manager default, or give each stage of "
                "--pipeline-parallel-size both by VLLM_PP_LAYER_PARTITION"
            )
    if tables[-2].role is Role.STATE:
        one, other = (next(iter(table.specs.items())) for table in tables[-2:])
        raise ConfigError(
            f"layers {one[0]} and {other[0]} keep states that cannot move together: {one[1]} "
            f"against {other[1]}; use --block-manager default"
        )
    return tables


def _need(spec: KVCacheSpec) -> tuple[object, ...]:
    """What the layers of a role's block table have in common."""
    if isinstance(spec, MambaSpec):
        return (
            spec.block_size,
            spec.mamba_cache_mode,
            spec.num_speculative_blocks,
            spec.num_prefill_checkpoint_blocks,
            spec.prefill_checkpoint_alignment,
        )
    if isinstance(spec, SlidingWindowSpec):
        return spec.block_size, spec.sliding_window, spec.extra_retained_tokens
    if isinstance(spec, ChunkedLocalAttentionSpec):
        return spec.block_size, "chunk", spec.attention_chunk_size
    return spec.block_size, spec.dcp_sharded


def first_spec(spec: KVCacheSpec) -> KVCacheSpec:
    """A layer's spec of a group, which is the group's own unless its layers differ."""
    return next(iter(iter_layer_specs(spec)))


def kind_of_spec(spec: KVCacheSpec) -> Kind:
    """Which pool a group's cache belongs to."""
    return Kind.SSM if isinstance(first_spec(spec), MambaSpec) else Kind.KV


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
    """The first cache group of a pool: the one with a slot for every token, or all states."""
    return next(
        group
        for group in kv_cache_config.kv_cache_groups
        if kind_of_spec(group.kv_cache_spec) is kind
    )


def state_spec(kv_cache_config: KVCacheConfig) -> MambaSpec:
    """What all states have in common, by the spec of one."""
    spec = first_spec(group_of(kv_cache_config, Kind.SSM).kv_cache_spec)
    assert isinstance(spec, MambaSpec)
    return spec


def checkpoint_spacing(kv_cache_config: KVCacheConfig) -> int:
    """Tokens between two state checkpoints of a running engine."""
    return state_spec(kv_cache_config).block_size
