"""Tables, the places of layouts in a page, and the split of wide tables, against brute force."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avmp_vllm.core import PageGroup
from avmp_vllm.core.caches import Cache, Layers, Load
from avmp_vllm.core.stock import StockRules, plan_stock
from avmp_vllm.core.tables import (
    LAYOUT_ALIGNMENT,
    TABLE_COST,
    TYPICAL_TOKENS,
    Layout,
    Role,
    Table,
    by_need,
    deal,
    even_parts,
    place,
)

LOAD = Load(512, 4096)
_LAYOUTS = st.lists(
    st.builds(Layout, st.integers(1, 300), st.integers(1, 6)), min_size=1, max_size=3
)
_GROUPS = st.builds(PageGroup, st.sampled_from([16, 32, 64]), st.sampled_from([None, 1, 9]))
_TABLES = st.builds(lambda layouts, group: Table(tuple(layouts), group), _LAYOUTS, _GROUPS)


@given(_LAYOUTS)
def test_layouts_have_bytes_of_their_own(layouts):
    offsets, end = place(layouts)
    before = 0
    for offset, layout in zip(offsets, layouts, strict=True):
        assert before <= offset < before + LAYOUT_ALIGNMENT
        assert offset % LAYOUT_ALIGNMENT == 0
        before = offset + layout.layer_bytes * layout.layers
    assert end == before


@given(_LAYOUTS, st.integers(1, 20))
def test_dealing_loses_nothing_and_is_even(layouts, number):
    names = [[(index, n) for n in range(one.layers)] for index, one in enumerate(layouts)]
    parts = list(deal(names, number))
    dealt = [name for part in parts for members in part for name in members]
    assert sorted(dealt) == sorted(name for members in names for name in members)
    counts = [sum(map(len, part)) for part in parts]
    assert max(counts) - min(counts) <= 1
    assert len(parts) == min(number, len(dealt))


@settings(max_examples=60, deadline=None)
@given(st.lists(_TABLES, min_size=2, max_size=3))
def test_no_split_is_better(tables):
    """Against every combination of parts: bytes, and something for each table."""

    def cost(numbers):
        parts = [t.parts(n) for t, n in zip(tables, numbers, strict=True)]
        width = max(part.page_bytes for one in parts for part in one)
        pages = [t.group.pages_for(TYPICAL_TOKENS) for t in tables]
        held = width * sum(len(one) * held for one, held in zip(parts, pages, strict=True))
        return held * (1 + TABLE_COST * sum(map(len, parts)))

    chosen = even_parts(tables)
    best = min(map(cost, product(*(range(1, t.layers + 1) for t in tables))))
    assert cost(chosen) == pytest.approx(best)


def test_one_table_is_never_split():
    assert even_parts([Table((Layout(1000, 40),), PageGroup(16))]) == [1]


def test_tables_are_by_role_and_need():
    found = by_need(
        [
            (Role.STATE, 1, "s"),
            (Role.SLOTS, 16, "a"),
            (Role.RING, 4, "r"),
            (Role.SLOTS, 32, "b"),
            (Role.SLOTS, 16, "c"),
        ]
    )
    assert found == [
        (Role.SLOTS, ["a", "c"]),
        (Role.SLOTS, ["b"]),
        (Role.RING, ["r"]),
        (Role.STATE, ["s"]),
    ]


def test_what_a_request_holds_of_each_cache():
    """GLM-5.3's kinds beside a window, with their bytes by hand."""
    layers = Layers(
        (
            Cache(Role.SLOTS, 2, 1024, latent=True),
            Cache(Role.SLOTS, 2, 132, entry_tokens=16, latent=True),
            Cache(Role.WINDOW, 3, 100, window=64),
            Cache(Role.RING, 2, 512, window=16),
            Cache(Role.STATE, 5, 1000),
        )
    )
    assert layers.whole_tokens() == 16
    assert layers.state_bytes == 5000
    slots = 2 * 1024 * 100 + 2 * 132 * 7
    assert layers.sequence_bytes(100, 2) == slots + 3 * 100 * 64 + 2 * 512 * 16 + 2 * 5000
    geometry = layers.geometry(64 << 20, 32, LOAD)
    held = [group.pages_for(100) for group in geometry.groups]
    # Windows: 100 tokens are 4 pages, below the most of -(-(63 + 512) // 32) + 1 = 19.
    assert sorted(held) == sorted([1] * held.count(1) + [4] * (len(held) - held.count(1)))
    assert geometry.pages_for(4096) == sum(
        1 if group.most == 1 else min(128, group.most or 128) for group in geometry.groups
    )
    assert {group.most for group in geometry.groups} == {None, 1, 19}


@pytest.mark.parametrize(("latent", "planned"), [(False, True), (True, False)])
def test_stock_pads_no_latent_page(latent, planned):
    """Beside a wider layout; vLLM raises for it, and plans nothing."""
    layers = Layers(
        (
            Cache(Role.SLOTS, 2, 100, latent=latent),
            Cache(Role.SLOTS, 2, 130),
            Cache(Role.STATE, 4, 1000),
        )
    )
    plan = plan_stock(layers, 64 << 20, StockRules(16), 2, LOAD)
    assert (plan is not None) is planned


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 9), st.integers(1 << 20, 64 << 20))
def test_the_longest_request_is_exact(full, window, states, arena_bytes):
    """With several groups: it fits alone, and one token more does not."""
    layers = Layers(
        (
            Cache(Role.SLOTS, full, 300),
            Cache(Role.WINDOW, window, 300, window=200),
            Cache(Role.RING, 1, 64, window=16),
            Cache(Role.STATE, states, 5000),
        )
    )
    geometry = layers.geometry(arena_bytes, 16, Load(512, 1 << 20))
    longest = geometry.longest(3)
    assert longest < 1 or geometry.fits(geometry.pages_for(longest), 3)
    assert not geometry.fits(geometry.pages_for(longest + 1), 3)
