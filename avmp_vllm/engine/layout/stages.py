"""Pipeline stages: which layers each worker has, and the splits that give each stage every kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from vllm.model_executor.models.utils import extract_layer_index

from avmp_vllm.engine.entry.config import ConfigError
from avmp_vllm.engine.layout.groups import Layers

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec

#: vLLM's environment variable with the number of layers of each stage.
PARTITION = "VLLM_PP_LAYER_PARTITION"


@dataclass(frozen=True)
class Stage:
    """Workers with the same layers: the tensor parallel ranks of a pipeline stage.

    Attributes:
        specs: Layer name to its exact cache spec.
        arena_bytes: What the worker with the fewest bytes has for its arena.
        workers: Their ranks.
    """

    specs: Mapping[str, KVCacheSpec]
    arena_bytes: int
    workers: tuple[int, ...] = (0,)


def stages_of(
    kv_cache_specs: Sequence[dict[str, KVCacheSpec]], available_memory: Sequence[int]
) -> list[Stage]:
    """Sort workers, in the order of their ranks, into stages.

    Raises:
        ConfigError: Workers with the same layers keep different caches of them.
    """
    stages: list[Stage] = []
    for rank, (specs, memory) in enumerate(zip(kv_cache_specs, available_memory, strict=True)):
        last = stages[-1] if stages else None
        if last is None or last.specs.keys() != specs.keys():
            stages.append(Stage(specs, memory, (rank,)))
        elif last.specs != specs:
            raise ConfigError("ranks have different page sizes, which AVMP cannot serve")
        else:
            stages[-1] = Stage(specs, min(last.arena_bytes, memory), (*last.workers, rank))
    return stages


def require_every_kind(
    vllm_config: VllmConfig, tables: Sequence[Layers], stages: Sequence[Stage]
) -> None:
    """Refuse stages that lack what a request holds in others: its pages would be there for nothing.

    Raises:
        ConfigError: With the split of the layers that works, if there is one.
    """
    for number, stage in enumerate(stages):
        for table in tables:
            if not table.specs.keys() & stage.specs.keys():
                break
        else:
            continue
        split = _split(vllm_config, tables, len(stages))
        way_out = "lower --pipeline-parallel-size: no split of the layers has every kind in each"
        if split is not None:
            way_out = f"set {PARTITION}={','.join(map(str, split))}"
        raise ConfigError(
            f"--pipeline-parallel-size = {len(stages)}: stage {number} has no {table.kind.name} "
            f"layer ({table.role.value}), and AVMP keeps every kind in each stage; {way_out}"
        )


def _split(vllm_config: VllmConfig, tables: Sequence[Layers], stages: int) -> list[int] | None:
    """Layers of each stage, so that each has layers of every table and the longest is shortest."""
    count = vllm_config.model_config.get_total_num_hidden_layers()
    found: list[set[int]] = [set() for _ in range(count)]
    for index, table in enumerate(tables):
        for name in table.specs:
            if (layer := extract_layer_index(name)) < count:  # what drafts comes behind the last
                found[layer].add(index)
    return split_layers(found, stages, len(tables))


def split_layers(tables: Sequence[set[int]], stages: int, number: int) -> list[int] | None:
    """Split layers into stages of neighbours, each with layers of every table.

    Args:
        tables: Of each layer, those that it is in.
        stages: How many.
        number: Of tables.

    Returns:
        Layers of each stage, the longest as short as can be; None if there is no such split.
    """

    @cache
    def best(begin: int, left: int) -> tuple[int, tuple[int, ...]] | None:
        """The longest stage, and all, of the layers from one on."""
        choices: list[tuple[int, tuple[int, ...]]] = []
        ends = range(begin + 1, len(tables) + 1) if left > 1 else (len(tables),)
        for end in ends:
            if len(set().union(*tables[begin:end])) < number:
                continue
            if left == 1:
                choices.append((end - begin, (end - begin,)))
            elif (rest := best(end, left - 1)) is not None:
                choices.append((max(end - begin, rest[0]), (end - begin, *rest[1])))
        return min(choices, default=None)

    found = best(0, stages)
    return None if found is None else list(found[1])
