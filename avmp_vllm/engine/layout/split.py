"""How wide a KV page is where several block tables share the pool.

All KV pages have one size, so a narrow table pads its pages to the widest's. A wide table may be
split instead: its layers spread over several tables of fewer bytes, each with pages of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from avmp_vllm.core.geometry import ceil_div
from avmp_vllm.engine.layout.groups import Layers
from avmp_vllm.engine.layout.limits import most_pages

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: Tokens of the request whose padding is made least.
TYPICAL_TOKENS = 4096
#: More block tables cost each step a little: they must spare at least this share of the bytes.
WORTH = 0.05


def even_pages(tables: Sequence[Layers], vllm_config: VllmConfig) -> list[Layers]:
    """Split KV tables where that spares padding; the last table, the states, stays as it is."""
    *paged, states = tables
    if len(paged) == 1:
        return [*paged, states]
    pages = [_pages(table, vllm_config) for table in paged]
    widths = {_width(_parts(table, n)) for table in paged for n in range(1, len(table.specs) + 1)}
    found: list[tuple[int, int, list[Layers]]] = []
    for width in sorted(widths):
        split = [_within(table, width) for table in paged]
        if None in split:
            continue
        parts = [part for one in split if one is not None for part in one]
        held = sum(len(one) * n for one, n in zip(split, pages, strict=True) if one is not None)
        found.append((width * held, len(parts), parts))
    least = min(cost for cost, *_ in found)
    _, _, parts = min(
        (one for one in found if one[0] <= least * (1 + WORTH)), key=lambda one: (one[1], one[0])
    )
    return [*parts, states]


def _pages(table: Layers, vllm_config: VllmConfig) -> int:
    """Pages that a typical request holds of a table."""
    spec = next(iter(table.specs.values()))
    pages = ceil_div(TYPICAL_TOKENS, spec.block_size)
    most = most_pages(vllm_config, table.role, spec)
    return pages if most is None else min(pages, most)


def _parts(table: Layers, number: int) -> list[Layers]:
    """A table's layers spread over so many, each layout evenly."""
    if number == 1:
        return [table]
    names: list[list[str]] = [[] for _ in range(number)]
    turn = 0
    for _, layers in table.layouts():
        for name in layers:
            names[turn % number].append(name)
            turn += 1
    return [
        Layers(table.role, {name: table.specs[name] for name in part}) for part in names if part
    ]


def _width(tables: Sequence[Layers]) -> int:
    return max(table.page_bytes for table in tables)


def _within(table: Layers, width: int) -> list[Layers] | None:
    """The fewest parts of a table whose pages are no wider; None if there are none."""
    for number in range(1, len(table.specs) + 1):
        parts = _parts(table, number)
        if _width(parts) <= width:
            return parts
    return None
