"""Cache groups and tensors of an arena.

Stock vLLM gives every kind of layer one page size. Here all layers with states form one group, with
one exact state a block, and those with pages one or more, by what a request holds of them
(``groups.py``). One ``KVCacheTensor`` for each layout of a group describes its place in the page,
and all of them view the same buffer from byte 0, with plain strides::

    KV page k   at k * F: | layers of one layout | of another | pad |     F, of the widest group
    SSM block s at s * B: | layers of one layout | of another | pad |     B, of all states
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import lcm
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec, KVCacheTensor

from avmp_vllm.core import ArenaTooSmall, Geometry, Kind
from avmp_vllm.core.capacity import STATE_ALIGNMENT
from avmp_vllm.core.tables import Layout, Role, arena_geometry, place, round_up
from avmp_vllm.engine.entry.config import ConfigError, selected
from avmp_vllm.engine.layout.elastic import Elastic, elastic_sizes
from avmp_vllm.engine.layout.groups import Layers, kind_of_spec, sort_layers
from avmp_vllm.engine.layout.limits import (
    clamp_sequences,
    fit_model_len,
    refuse_drafts,
    refuse_transfers,
)
from avmp_vllm.engine.layout.split import even_pages, in_cores_terms

if TYPE_CHECKING:
    from vllm.config import VllmConfig


#: Bytes that surely hold a page of each kind, for what does not depend on them; never allocated.
ANY_ARENA = 1 << 50


@dataclass
class AVMPCacheConfig(KVCacheConfig):
    """vLLM's cache configuration with an arena behind it.

    ``num_blocks`` counts the KV view's pages. Being a class of this module, it survives the deep
    copies and the pickling that vLLM does. vLLM's scheduler sees one layer's spec of each group;
    ``layer_specs`` are those of all layers. ``elastic`` is None if the whole arena has memory.
    ``executor`` reaches the workers; the scheduler's copy for an elastic arena alone has it.
    """

    geometry: Geometry | None = None
    layer_specs: dict[str, KVCacheSpec] = field(default_factory=dict)
    elastic: Elastic | None = None
    executor: Any = None

    @property
    def reserve(self) -> int:
        """Least bytes of the gap when the engine starts."""
        assert self.geometry is not None
        return 0 if self.elastic is None else self.elastic.reserve(self.geometry)

    def num_blocks_of(self, tensor: KVCacheTensor) -> int:
        """Length of the view that a tensor describes."""
        assert self.geometry is not None
        is_state = kind_of_spec(self.layer_specs[tensor.layers[0]]) is Kind.SSM
        return self.geometry.blocks if is_state else self.geometry.pages


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
            config_for(vllm_config, specs, min(available_memory)) for specs in kv_cache_specs
        ]
        geometry = configs[0].geometry
        assert geometry is not None
        if any(config.geometry != geometry for config in configs):
            raise ConfigError("ranks have different page sizes, which AVMP cannot serve")
        refuse_drafts(vllm_config, configs[0].layer_specs)
        refuse_transfers(vllm_config, configs[0].layer_specs)
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


def config_for(
    vllm_config: VllmConfig, specs: dict[str, KVCacheSpec], available: int
) -> AVMPCacheConfig:
    """Lay one rank's layers out over the arena that the options ask for.

    Args:
        vllm_config: With AVMP's options.
        specs: Layer name to its exact cache spec.
        available: Bytes that vLLM leaves for the cache, on the rank that has the fewest.

    Raises:
        ConfigError: A kind of layer that has no pool, or sizes that do not fit one another.
        ArenaTooSmall: Not even one page of each kind.
    """
    options = selected(vllm_config.additional_config)
    elastic = None if options is None else elastic_sizes(options, available)
    size = available if elastic is None else elastic.virtual_bytes
    config = arena_config(vllm_config, specs, size)
    config.elastic = elastic
    return config


def arena_config(
    vllm_config: VllmConfig, specs: dict[str, KVCacheSpec], arena_bytes: int
) -> AVMPCacheConfig:
    """Lay one rank's layers out over an arena.

    Args:
        vllm_config: For the retention setting, and what a request holds of a window.
        specs: Layer name to its exact cache spec.
        arena_bytes: Bytes of the arena.

    Raises:
        ConfigError: A kind of layer that has no pool.
        ArenaTooSmall: Not even one page of each kind.
    """
    tables = even_pages(sort_layers(specs), vllm_config)
    *paged, states = tables
    try:
        geometry = arena_geometry(
            arena_bytes,
            [in_cores_terms(table, vllm_config) for table in paged],
            _layouts(states),
            lcm(*(s.get_block_stride_alignment() for t in paged for s in t.specs.values())),
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
                layers=names,
                layer_stride=_stride(table, spec),
                block_stride=geometry.unit(Kind.SSM if table is states else Kind.KV),
                offset=offset,
            )
            for table in tables
            for offset, spec, names in _placed(table)
        ],
        kv_cache_groups=[
            KVCacheGroupSpec(list(table.specs), table.shared_spec()) for table in tables
        ],
        prefix_cache_retention_interval=(vllm_config.cache_config.prefix_cache_retention_interval),
        geometry=geometry,
        layer_specs=dict(specs),
    )


def _stride(table: Layers, spec: KVCacheSpec) -> int:
    """Bytes from one layer of a layout to the next."""
    unit = STATE_ALIGNMENT if table.role is Role.STATE else 1
    return round_up(spec.page_size_bytes, unit)


def _layouts(table: Layers) -> list[Layout]:
    return [Layout(_stride(table, spec), len(names)) for spec, names in table.layouts()]


def _placed(table: Layers) -> Iterator[tuple[int, KVCacheSpec, list[str]]]:
    """Offset in the page, spec and layers of each layout."""
    offsets, _ = place(_layouts(table))
    for offset, (spec, names) in zip(offsets, table.layouts(), strict=True):
        yield offset, spec, names
