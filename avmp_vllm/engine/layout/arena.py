"""Cache groups and tensors of an arena.

Stock vLLM gives every kind of layer one page size. Here the attention layers form one group with
pages of ``page_tokens`` tokens, the SSM layers another with one exact state a block, and two
``KVCacheTensor`` descriptions lay both views over the same buffer from byte 0, with plain strides::

    KV page k   at k * F: | layer 0 | layer 1 | ... |         F = layers * one layer's page
    SSM block s at s * B: | layer 0 | layer 1 | ... | pad |   B = layers * one layer's state, padded
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    KVCacheTensor,
    MambaSpec,
)

from avmp_vllm.core import ArenaTooSmall, Geometry, Kind, KVLayer, SSMLayer
from avmp_vllm.core.capacity import STATE_ALIGNMENT
from avmp_vllm.core.geometry import ceil_div
from avmp_vllm.engine.entry.config import ConfigError, selected
from avmp_vllm.engine.layout.groups import group_of, kind_of_spec
from avmp_vllm.engine.layout.limits import clamp_sequences, fit_model_len

if TYPE_CHECKING:
    from vllm.config import VllmConfig


#: Bytes that surely hold a page of each kind, for what does not depend on them; never allocated.
ANY_ARENA = 1 << 50


@dataclass
class AVMPCacheConfig(KVCacheConfig):
    """vLLM's cache configuration with an arena behind it.

    ``num_blocks`` counts the KV view's pages. Being a class of this module, it survives the deep
    copies and the pickling that vLLM does.
    """

    geometry: Geometry | None = None

    def num_blocks_of(self, tensor: KVCacheTensor) -> int:
        """Length of the view that a tensor describes."""
        assert self.geometry is not None
        if set(tensor.layers) <= set(group_of(self, Kind.SSM).layer_names):
            return self.geometry.blocks
        return self.geometry.pages


def get_kv_cache_configs(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the engine core's ``get_kv_cache_configs``: one arena a rank, two groups over it.

    From vLLM 0.33 on the groups come as an argument of their own. They are made again here.
    """

    def wrapper(
        vllm_config: VllmConfig,
        kv_cache_specs: list[dict[str, KVCacheSpec]],
        available_memory: list[int],
        *groups: Any,
    ) -> list[KVCacheConfig]:
        if selected(vllm_config.additional_config) is None:
            return stock(vllm_config, kv_cache_specs, available_memory, *groups)
        configs = [
            arena_config(vllm_config, specs, min(available_memory)) for specs in kv_cache_specs
        ]
        geometry = configs[0].geometry
        assert geometry is not None
        if any(config.geometry != geometry for config in configs):
            raise ConfigError("ranks have different page sizes, which AVMP cannot serve")
        fit_model_len(vllm_config, configs[0])
        clamp_sequences(vllm_config, geometry)
        return list(configs)

    return wrapper


def get_global_kv_cache_groups(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the engine core's ``get_global_kv_cache_groups`` of vLLM 0.33: the arena's two groups.

    vLLM asks for them before it knows how many bytes there are.
    """

    def wrapper(
        vllm_config: VllmConfig, kv_cache_specs: list[dict[str, KVCacheSpec]]
    ) -> list[KVCacheGroupSpec]:
        if selected(vllm_config.additional_config) is None:
            return stock(vllm_config, kv_cache_specs)
        merged = {name: spec for specs in kv_cache_specs for name, spec in specs.items()}
        return list(arena_config(vllm_config, merged, ANY_ARENA).kv_cache_groups)

    return wrapper


def arena_config(
    vllm_config: VllmConfig, specs: dict[str, KVCacheSpec], arena_bytes: int
) -> AVMPCacheConfig:
    """Lay one rank's layers out over an arena.

    Args:
        vllm_config: For the retention setting.
        specs: Layer name to its exact cache spec.
        arena_bytes: Bytes of the arena.

    Raises:
        ConfigError: A kind of layer that has no pool, or more than one layout of a kind.
        ArenaTooSmall: Not even one page of each kind.
    """
    layers: dict[Kind, dict[str, KVCacheSpec]] = {kind: {} for kind in Kind}
    for name, spec in specs.items():
        if type(spec) is not FullAttentionSpec and not isinstance(spec, MambaSpec):
            raise ConfigError(
                f"layer {name} keeps a {type(spec).__name__}: AVMP has pools for full attention "
                "and SSM layers only; use --block-manager default"
            )
        layers[kind_of_spec(spec)][name] = spec
    shared = {kind: _only_spec(kind, layers[kind]) for kind in Kind}
    page = shared[Kind.KV].page_size_bytes
    state = ceil_div(shared[Kind.SSM].page_size_bytes, STATE_ALIGNMENT) * STATE_ALIGNMENT
    try:
        geometry = Geometry.from_layers(
            arena_bytes,
            [KVLayer(page // shared[Kind.KV].block_size)] * len(layers[Kind.KV]),
            [SSMLayer(state)] * len(layers[Kind.SSM]),
            shared[Kind.KV].block_size,
        )
    except ValueError as error:  # No bytes at all, or fewer than a page of each kind.
        raise ArenaTooSmall(
            f"{error}; raise --kv-cache-memory-bytes or --gpu-memory-utilization"
        ) from None
    return AVMPCacheConfig(
        num_blocks=geometry.pages,
        kv_cache_tensors=[
            KVCacheTensor(
                size=arena_bytes,
                layers=list(layers[kind]),
                layer_stride=stride,
                block_stride=geometry.unit(kind),
            )
            for kind, stride in ((Kind.KV, page), (Kind.SSM, state))
        ],
        kv_cache_groups=[KVCacheGroupSpec(list(layers[kind]), shared[kind]) for kind in Kind],
        prefix_cache_retention_interval=(vllm_config.cache_config.prefix_cache_retention_interval),
        geometry=geometry,
    )


def _only_spec(kind: Kind, layers: dict[str, KVCacheSpec]) -> KVCacheSpec:
    """The spec that all layers of a kind share."""
    if not layers:
        raise ConfigError(
            f"the model has no {kind.name} layer: AVMP manages models that mix attention and SSM "
            "layers; use --block-manager default"
        )
    first = next(iter(layers.values()))
    for name, spec in layers.items():
        if spec != first:
            raise ConfigError(
                f"layer {name} has another {kind.name} layout than the first: {spec} against "
                f"{first}; AVMP takes one layout of each kind, use --block-manager default"
            )
    return replace(first)
