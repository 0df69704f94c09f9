"""How wide a KV page is where several block tables share the pool: the rule is the core's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

from avmp_vllm.core import PageGroup
from avmp_vllm.core.tables import Layout, Table, deal, even_parts
from avmp_vllm.engine.layout.groups import Layers
from avmp_vllm.engine.layout.limits import most_pages

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def even_pages(tables: Sequence[Layers], vllm_config: VllmConfig) -> list[Layers]:
    """Split KV tables where that spares padding; the last table, the states, stays as it is."""
    *paged, states = tables
    numbers = even_parts([in_cores_terms(layers, vllm_config) for layers in paged])
    parts = (
        part
        for layers, number in zip(paged, numbers, strict=True)
        for part in _parts(layers, number)
    )
    return [*parts, states]


def in_cores_terms(layers: Layers, vllm_config: VllmConfig) -> Table:
    """Layers that share a block table, in the core's terms."""
    layouts = [Layout(spec.page_size_bytes, len(names)) for spec, names in layers.layouts()]
    spec = next(iter(layers.specs.values()))
    most = most_pages(vllm_config, layers.role, spec)
    return Table(tuple(layouts), PageGroup(spec.block_size, most), layers.role)


def _parts(layers: Layers, number: int) -> list[Layers]:
    """A table's layers spread over so many, each layout evenly."""
    if number == 1:
        return [layers]
    names = [names for _, names in layers.layouts()]
    return [
        Layers(layers.role, {name: layers.specs[name] for name in chain(*part)})
        for part in deal(names, number)
    ]
