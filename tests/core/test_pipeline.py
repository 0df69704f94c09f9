"""One arena over pipeline stages whose pages have different sizes."""

from __future__ import annotations

import random

import pytest
from arena_client import Client, Damage, ShadowMemory, assert_everything_happened
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_client import PipelineClient, PipelineMemory, shifts_of
from test_arena_shadow import churn

from avmp_vllm.core import Arena, ArenaTooSmall, Geometry, Kind, PipelineGeometry

#: Arena, page and block bytes of each stage: alike, uneven, with unequal bytes, of three.
PIPELINES = {
    "alike": [(16_000, 64, 456)] * 2,
    "uneven": [(16_000, 64, 304), (16_000, 64, 608)],
    "one has the states": [(16_000, 192, 152), (16_000, 64, 760)],
    "unequal bytes": [(9_000, 64, 152), (16_011, 128, 304)],
    "three": [(12_000, 64, 304), (12_007, 100, 90), (20_000, 33, 700)],
}


def over(sizes: list[tuple[int, int, int]]) -> PipelineGeometry:
    """The geometry of such stages."""
    geometry = PipelineGeometry.over([Geometry(*each) for each in sizes])
    assert isinstance(geometry, PipelineGeometry)
    return geometry


@pytest.mark.parametrize("batch", [1, 128])
@pytest.mark.parametrize("name", PIPELINES)
def test_no_byte_is_lost_in_any_stage(name: str, batch: int) -> None:
    """Every page's bytes are tagged in every stage; what fits is exact."""
    geometry = over(PIPELINES[name])
    client = PipelineClient(geometry, batch, PipelineMemory(geometry))
    churn(client, random.Random(f"{name} {batch}"), steps=100)
    assert_everything_happened(client.arena)


@pytest.mark.parametrize("name", ["one has the states", "unequal bytes", "three"])
def test_control_a_stage_with_anothers_indices_is_noticed(name: str) -> None:
    """All stages move pages as if they had the first one's geometry."""
    geometry = over(PIPELINES[name])
    shifts = shifts_of(geometry)
    assert shifts[0] == (0, 0)
    assert any(map(any, shifts))
    memory = PipelineMemory(geometry, shifts=[shifts[0]] * len(shifts))
    with pytest.raises((Damage, AssertionError), match=r"lost the bytes|null bytes|leaves"):
        churn(PipelineClient(geometry, 1, memory), random.Random(5), steps=100)


def test_equal_stages_decide_as_one_alone() -> None:
    """The same calls, the same moves."""
    single = Geometry(*PIPELINES["alike"][0])
    alone = Client(single, 8, ShadowMemory(single))
    geometry = over(PIPELINES["alike"])
    both = PipelineClient(geometry, 8, PipelineMemory(geometry))
    for client in (alone, both):
        churn(client, random.Random(3), steps=60)
    assert both.steps == alone.steps
    assert any(alone.steps)


_SIZES = st.tuples(st.integers(5_000, 50_000), st.integers(16, 600), st.integers(16, 900))


@settings(deadline=None)
@given(st.lists(_SIZES, min_size=2, max_size=4), st.integers(0, 80), st.integers(0, 80))
def test_what_fits_is_what_fits_everywhere(sizes, pages, blocks):
    geometry = over(sizes)
    assert geometry.fits(pages, blocks) == all(g.fits(pages, blocks) for g in geometry.stages)
    for kind, others in ((Kind.KV, blocks), (Kind.SSM, pages)):
        most = geometry.beside(kind, others)
        if most < 0:
            continue
        both = {kind: most, kind.other: others}
        assert geometry.fits(both[Kind.KV], both[Kind.SSM])
        both[kind] += 1
        assert not geometry.fits(both[Kind.KV], both[Kind.SSM])
    assert geometry.fits(geometry.page_limit, 0)
    assert geometry.fits(0, geometry.block_limit)
    tokens = max(geometry.longest(1), 0)
    if tokens:
        geometry.require_one_request(tokens)
        assert geometry.sequences(tokens) >= 1
    with pytest.raises(ArenaTooSmall, match=f"--max-model-len to at most {tokens}$"):
        geometry.require_one_request(tokens + geometry.page_tokens, 1)


def test_an_empty_arena_takes_all_that_fits() -> None:
    """Up to the tightest stage, and not a page more."""
    geometry = over(PIPELINES["one has the states"])
    arena = Arena(geometry)
    assert len(arena.allocate(pages=geometry.page_limit)) == geometry.page_limit
    assert arena.available(Kind.KV) == arena.available(Kind.SSM) == 0
    assert arena.gap_bytes > 0  # in the stage with room to spare
    arena.verify()


def test_one_stage_alone_is_an_arena_as_ever() -> None:
    single = Geometry(16_000, 64, 456)
    assert PipelineGeometry.over([single]) is single
    assert single.stage(0) is single


def test_an_elastic_arena_has_one_stage() -> None:
    with pytest.raises(ValueError, match="chunk_bytes = 64: an arena over 2 pipeline stages"):
        Arena(over(PIPELINES["alike"]), chunk_bytes=64)
