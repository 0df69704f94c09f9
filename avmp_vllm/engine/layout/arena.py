"""Cache groups and tensors of an arena.

Stock vLLM gives every kind of layer one page size. Here all layers with states form one group, with
one exact state a block, and those with pages one or more, by what a request holds of them
(``groups.py``). One ``KVCacheTensor`` for each layout of a group describes its place in the page,
and all of them view the same buffer from byte 0, with plain strides::

    KV page k   at k * F: | layers of one layout | of another | pad |     F, of the widest group
    SSM block s at s * B: | layers of one layout | of another | pad |     B, of all states
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import lcm
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec, KVCacheTensor

from avmp_vllm.core import ArenaTooSmall, Geometry, Kind, PipelineGeometry
from avmp_vllm.core.capacity import STATE_ALIGNMENT
from avmp_vllm.core.tables import Layout, Role, arena_geometry, place, round_up
from avmp_vllm.engine.entry import last_line
from avmp_vllm.engine.entry.config import selected
from avmp_vllm.engine.layout.cold import state_codec
from avmp_vllm.engine.layout.elastic import Elastic, elastic_sizes
from avmp_vllm.engine.layout.groups import Layers, kind_of_spec, sort_layers
from avmp_vllm.engine.layout.limits import (
    clamp_sequences,
    fit_model_len,
    refuse_drafts,
    refuse_transfers,
)
from avmp_vllm.engine.layout.split import even_pages, in_cores_terms
from avmp_vllm.engine.layout.stages import Stage, require_every_kind, stages_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine.core import EngineCore


#: Bytes that surely hold a page of each kind, for what does not depend on them; never allocated.
ANY_ARENA = 1 << 50


@dataclass
class AVMPCacheConfig(KVCacheConfig):
    """vLLM's cache configuration with an arena behind it.

    ``geometry`` is what the scheduler decides with, over all pipeline stages; ``own`` is that of
    the arena in this worker. ``num_blocks`` counts the KV view's pages. Being a class of this
    module, it survives the deep copies and the pickling that vLLM does. vLLM's scheduler sees one
    layer's spec of each group; ``stages`` has those of all layers of each pipeline stage.
    ``elastic`` is None if the whole arena has memory. ``executor`` reaches the workers; the
    scheduler's copy for an elastic arena alone has it.
    """

    geometry: Geometry | None = None
    stages: list[Stage] = field(default_factory=list)
    stage: int = 0
    elastic: Elastic | None = None
    executor: Any = None

    @property
    def own(self) -> Geometry:
        """The arena of this worker."""
        assert self.geometry is not None
        return self.geometry.stage(self.stage)

    @property
    def shift(self) -> tuple[int, int]:
        """By how much this worker's physical indices exceed those of move plans, by kind."""
        assert self.geometry is not None
        kv, ssm = (self.own.origin(kind) - self.geometry.origin(kind) for kind in Kind)
        return kv, ssm

    @property
    def layer_specs(self) -> dict[str, KVCacheSpec]:
        """Specs of all layers of the model, by name."""
        return {name: spec for stage in self.stages for name, spec in stage.specs.items()}

    @property
    def reserve(self) -> int:
        """Least bytes of the gap when the engine starts."""
        assert self.geometry is not None
        return 0 if self.elastic is None else self.elastic.reserve(self.geometry)

    def num_blocks_of(self, tensor: KVCacheTensor) -> int:
        """Length of the view that a tensor describes."""
        spec = self.stages[self.stage].specs[tensor.layers[0]]
        return self.own.blocks if kind_of_spec(spec) is Kind.SSM else self.own.pages


def initialize_kv_caches(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``EngineCore._initialize_kv_caches``: refuse pipeline stages that lack a kind of layer.

    vLLM fails over such stages earlier than it asks for cache configurations, without a reason.
    """

    @last_line.initialize_kv_caches
    def wrapper(self: EngineCore, vllm_config: VllmConfig) -> Any:
        several = vllm_config.parallel_config.pipeline_parallel_size > 1
        if several and selected(vllm_config.additional_config) is not None:
            specs = self.model_executor.get_kv_cache_specs()
            _block_tables(vllm_config, stages_of(specs, [ANY_ARENA] * len(specs)))
        return stock(self, vllm_config)

    return wrapper


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
        stages = stages_of(kv_cache_specs, available_memory)
        configs = configs_for(vllm_config, stages)
        refuse_drafts(vllm_config, configs[0].layer_specs)
        refuse_transfers(vllm_config, configs[0].layer_specs)
        state_codec(vllm_config, configs[0])
        fit_model_len(vllm_config, configs[0])
        clamp_sequences(vllm_config, configs[0])
        return [
            config for config, stage in zip(configs, stages, strict=True) for _ in stage.workers
        ]

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
        stages = stages_of(kv_cache_specs, [ANY_ARENA] * len(kv_cache_specs))
        return _groups(_block_tables(vllm_config, stages))

    return wrapper


def configs_for(vllm_config: VllmConfig, stages: Sequence[Stage]) -> list[AVMPCacheConfig]:
    """Lay each stage's layers out over the arena that the options ask for.

    Args:
        vllm_config: With AVMP's options.
        stages: With the bytes that vLLM leaves for the cache. An elastic arena has one.

    Raises:
        ConfigError: A kind of layer that has no pool, or sizes that do not fit one another.
        ArenaTooSmall: Not even one page of each kind.
    """
    options = selected(vllm_config.additional_config)
    elastic = None if options is None else elastic_sizes(options, stages[0].arena_bytes)
    if elastic is not None:
        (stage,) = stages
        stages = [replace(stage, arena_bytes=elastic.virtual_bytes)]
    configs = arena_configs(vllm_config, stages)
    for config in configs:
        config.elastic = elastic
    return configs


def config_for(
    vllm_config: VllmConfig, specs: Mapping[str, KVCacheSpec], available: int
) -> AVMPCacheConfig:
    """The same for the layers of one rank, with so many bytes for the cache."""
    (config,) = configs_for(vllm_config, [Stage(specs, available)])
    return config


def arena_config(
    vllm_config: VllmConfig, specs: Mapping[str, KVCacheSpec], arena_bytes: int
) -> AVMPCacheConfig:
    """Lay the layers of one rank out over an arena, as ``arena_configs`` does."""
    (config,) = arena_configs(vllm_config, [Stage(specs, arena_bytes)])
    return config


def arena_configs(vllm_config: VllmConfig, stages: Sequence[Stage]) -> list[AVMPCacheConfig]:
    """Lay each pipeline stage's layers out over an arena of its own.

    Block tables are the same in every stage, each with the stage's own layers.

    Args:
        vllm_config: For the retention setting, and what a request holds of a window.
        stages: In order.

    Raises:
        ConfigError: A kind of layer that has no pool, or a stage without some kind.
        ArenaTooSmall: Not even one page of each kind.
    """
    tables = _block_tables(vllm_config, stages)
    own = [[table.among(stage.specs) for table in tables] for stage in stages]
    geometries = [
        _geometry(vllm_config, tables, stage) for tables, stage in zip(own, stages, strict=True)
    ]
    geometry = PipelineGeometry.over(geometries)
    return [
        AVMPCacheConfig(
            num_blocks=geometry.pages,
            kv_cache_tensors=[
                KVCacheTensor(
                    size=stage.arena_bytes,
                    layers=names,
                    layer_stride=_stride(table, spec),
                    block_stride=geometries[number].unit(table.kind),
                    offset=offset,
                )
                for table in own[number]
                for offset, spec, names in _placed(table)
            ],
            kv_cache_groups=_groups(own[number]),
            prefix_cache_retention_interval=(
                vllm_config.cache_config.prefix_cache_retention_interval
            ),
            geometry=geometry,
            stages=list(stages),
            stage=number,
        )
        for number, stage in enumerate(stages)
    ]


def _block_tables(vllm_config: VllmConfig, stages: Sequence[Stage]) -> list[Layers]:
    """Block tables of all stages' layers, of which each stage has some of every one."""
    specs = {name: spec for stage in stages for name, spec in stage.specs.items()}
    if len(stages) > 1:
        # First, since a stage without attention does not even settle the sizes of its blocks.
        kinds = {kind: {n: s for n, s in specs.items() if kind_of_spec(s) is kind} for kind in Kind}
        by_kind = [Layers(Role.SLOTS, kinds[Kind.KV]), Layers(Role.STATE, kinds[Kind.SSM])]
        require_every_kind(vllm_config, by_kind, stages)
    tables = sort_layers(specs)
    if len(stages) == 1:
        # Where there are more, a part of a table might have no layer in some stage.
        tables = even_pages(tables, vllm_config)
    require_every_kind(vllm_config, tables, stages)
    return tables


def _groups(tables: Sequence[Layers]) -> list[KVCacheGroupSpec]:
    return [KVCacheGroupSpec(list(table.specs), table.shared_spec()) for table in tables]


def _geometry(vllm_config: VllmConfig, tables: Sequence[Layers], stage: Stage) -> Geometry:
    """Sizes of a stage's arena."""
    *paged, states = tables
    try:
        return arena_geometry(
            stage.arena_bytes,
            [in_cores_terms(table, vllm_config) for table in paged],
            _layouts(states),
            lcm(*(s.get_block_stride_alignment() for t in paged for s in t.specs.values())),
        )
    except ValueError as error:  # No bytes at all, or fewer than a page of each kind.
        raise ArenaTooSmall(
            f"{error}; raise --kv-cache-memory-bytes or --gpu-memory-utilization"
        ) from None


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
