"""Which layers share a block table, and how wide a KV page is where several tables share the pool.

All layers with states are one SSM block. Layers with pages share a table where a request holds the
same slots of them, whatever their bytes. Within a page the layouts of a table lie one after the
other::

    page of a table   | layers of one layout | layers of another | pad |

All KV pages have one size, so a narrow table pads its pages to the widest's. A wide table may be
split instead: its layers spread over several tables of fewer bytes, each with pages of its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from math import lcm
from typing import NamedTuple, TypeVar

from avmp_vllm.core.geometry import BLOCK_ALIGNMENT, Geometry, PageGroup, ceil_div

#: Pages, and layouts inside of them, start on this boundary (bytes), which covers every dtype.
LAYOUT_ALIGNMENT = 16
#: Tokens of the request whose padding is made least.
TYPICAL_TOKENS = 4096
#: A block table costs each step a little: one more must spare at least this share of the bytes.
TABLE_COST = 0.02

_T = TypeVar("_T")


class Role(Enum):
    """What a request holds of a layer's cache."""

    SLOTS = "a slot for every token"
    WINDOW = "the last tokens"
    RING = "one page"
    STATE = "a state"


def by_need(layers: Iterable[tuple[Role, Hashable, _T]]) -> list[tuple[Role, list[_T]]]:
    """Sort layers into block tables: slots first, states last, otherwise in their own order.

    Args:
        layers: Role, what the layers of a table have in common beside it, and the layer.
    """
    tables: dict[tuple[Role, Hashable], list[_T]] = {}
    for role, need, layer in layers:
        tables.setdefault((role, need), []).append(layer)
    order = list(Role)
    found = [(role, members) for (role, _), members in tables.items()]
    return sorted(found, key=lambda table: order.index(table[0]))


def round_up(value: int, unit: int) -> int:
    """The next multiple of a unit."""
    return ceil_div(value, unit) * unit


class Layout(NamedTuple):
    """Layers of equal caches in a table.

    Attributes:
        layer_bytes: Bytes from one layer to the next.
        layers: How many.
    """

    layer_bytes: int
    layers: int


def place(layouts: Sequence[Layout]) -> tuple[list[int], int]:
    """Offset in the page of each layout, and the bytes of the page."""
    offsets, end = [], 0
    for layout in layouts:
        offsets.append(round_up(end, LAYOUT_ALIGNMENT))
        end = offsets[-1] + layout.layers * layout.layer_bytes
    return offsets, end


@dataclass(frozen=True)
class Table:
    """A block table of KV pages.

    Attributes:
        layouts: Of its layers.
        group: Tokens of its pages, and how many a request holds at most.
        role: What a request holds of its layers.
    """

    layouts: tuple[Layout, ...]
    group: PageGroup
    role: Role = Role.SLOTS

    @property
    def layers(self) -> int:
        """Layers in all."""
        return sum(layout.layers for layout in self.layouts)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of all of them, without what aligns their layouts."""
        return sum(layout.layer_bytes * layout.layers for layout in self.layouts)

    def parts(self, number: int) -> list[Table]:
        """Its layers spread over so many tables, each layout evenly."""
        layers = [range(layout.layers) for layout in self.layouts]
        return [
            Table(
                tuple(
                    Layout(layout.layer_bytes, len(members))
                    for layout, members in zip(self.layouts, part, strict=True)
                    if members
                ),
                self.group,
                self.role,
            )
            for part in deal(layers, number)
        ]


def deal(layouts: Sequence[Sequence[_T]], number: int) -> Iterator[list[list[_T]]]:
    """Deal the layers of each layout to so many parts in turn; what a part gets of each layout."""
    parts: list[list[list[_T]]] = [[[] for _ in layouts] for _ in range(number)]
    turn = 0
    for index, layers in enumerate(layouts):
        for layer in layers:
            parts[turn % number][index].append(layer)
            turn += 1
    return (part for part in parts if any(part))


def even_parts(tables: Sequence[Table]) -> list[int]:
    """Into how many parts to split each table, so that a typical request's pages pad least."""
    if len(tables) == 1:
        return [1]
    pages = [table.group.pages_for(TYPICAL_TOKENS) for table in tables]
    widths = {_width(table.parts(n)) for table in tables for n in range(1, table.layers + 1)}
    found: list[tuple[float, int, list[int]]] = []
    for width in sorted(widths):
        numbers = [_within(table, width) for table in tables]
        parts = [number for number in numbers if number is not None]
        if len(parts) == len(tables):
            held = sum(number * n for number, n in zip(parts, pages, strict=True))
            number = sum(parts)
            found.append((width * held * (1 + TABLE_COST * number), number, parts))
    return min(found)[-1]


def arena_geometry(
    arena_bytes: int, tables: Sequence[Table], states: Sequence[Layout], alignment: int = 1
) -> Geometry:
    """Geometry of an arena over a rank's layers.

    Args:
        arena_bytes: Bytes of the arena.
        tables: Block tables of KV pages, the first with a slot for every token.
        states: Layouts of the states.
        alignment: What the bytes of a KV page must be a multiple of besides.

    Raises:
        ValueError: Not even one page of each kind.
    """
    first, *more = (table.group for table in tables)
    widest = max(place(table.layouts)[1] for table in tables)
    return Geometry(
        arena_bytes,
        round_up(widest, lcm(LAYOUT_ALIGNMENT, alignment)),
        round_up(place(states)[1], BLOCK_ALIGNMENT),
        first.page_tokens,
        tuple(more),
    )


def _width(tables: Sequence[Table]) -> int:
    return max(table.page_bytes for table in tables)


def _within(table: Table, width: int) -> int | None:
    """The fewest parts of a table whose pages are no wider; None if there are none."""
    for number in range(1, table.layers + 1):
        if _width(table.parts(number)) <= width:
            return number
    return None
