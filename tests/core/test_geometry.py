"""Sizes, limits and refusals of an arena."""

from __future__ import annotations

import re

import pytest
from arena_client import plain_geometry
from hypothesis import given, settings
from hypothesis import strategies as st

from avmp_vllm.core import AllocationFailure, Arena, ArenaTooSmall, Geometry
from avmp_vllm.core.tables import Layout


def test_jamba_3b_by_hand() -> None:
    """Two MQA layers of one 128-wide bf16 head; 26 Mamba layers, fp32 state, bf16 convolution."""
    geometry = plain_geometry(
        1 << 30, Layout(2 * 128 * 2, 2), Layout(5120 * 16 * 4 + 5120 * 3 * 2, 26)
    )
    assert geometry.page_bytes == 16 * 1024
    assert geometry.block_bytes == 9_318_400
    assert geometry.pages == 65_536
    assert geometry.null_blocks == 1
    assert geometry.page_limit == (2**30 - 9_318_400) // 16_384


def test_blocks_are_rounded_up_to_128_bytes_and_pages_are_not() -> None:
    geometry = plain_geometry(100_000, Layout(3, 3), Layout(129, 3), 16)
    assert geometry.page_bytes == 16 * 9
    assert geometry.block_bytes == 512


def test_halving_the_bytes_of_a_token_halves_the_page() -> None:
    """vLLM #55196: fp8 keys and values gained nothing on hybrids, as the page was inflated back."""
    states = Layout(1 << 20, 8)
    bf16 = plain_geometry(1 << 28, Layout(2048, 2), states)
    fp8 = plain_geometry(1 << 28, Layout(1024, 2), states)
    assert fp8.page_bytes * 2 == bf16.page_bytes
    assert fp8.block_bytes == bf16.block_bytes


def test_null_bytes_cover_index_0_of_both_views() -> None:
    small_page = Geometry(10_000, 64, 1_000)
    assert (small_page.null_bytes, small_page.null_blocks) == (1_000, 1)
    large_page = Geometry(10_000, 1_000, 300)
    assert (large_page.null_bytes, large_page.null_blocks) == (1_000, 4)


@pytest.mark.parametrize("name", ["arena_bytes", "page_bytes", "block_bytes", "page_tokens"])
@pytest.mark.parametrize("value", [0, -5])
def test_a_size_that_is_not_positive_is_named(name: str, value: int) -> None:
    sizes = {"arena_bytes": 1000, "page_bytes": 8, "block_bytes": 16, "page_tokens": 16}
    with pytest.raises(ValueError, match=rf"{name} must be positive, not {value}"):
        Geometry(**{**sizes, name: value})


def test_an_arena_without_one_page_of_each_kind_is_refused_with_the_bytes_it_needs() -> None:
    Geometry(1000 + 1000 + 100, 100, 1000)
    with pytest.raises(ArenaTooSmall, match=r"arena of 1999 bytes .* about 2100 bytes"):
        Geometry(1999, 100, 1000)


def test_a_request_that_does_not_fit_is_refused_with_the_way_out() -> None:
    geometry = Geometry(100_000, 1_000, 5_000, page_tokens=16)
    longest = (100_000 - 2 * 5_000) // 1_000 * 16
    geometry.require_one_request(longest)
    with pytest.raises(ArenaTooSmall) as refused:
        geometry.require_one_request(longest + 1)
    text = str(refused.value)
    assert f"max_model_len={longest + 1}" in text
    assert "101000 bytes" in text
    assert "the arena has 100000" in text
    assert "--kv-cache-memory-bytes" in text
    assert "--gpu-memory-utilization" in text
    assert text.endswith(f"--max-model-len to at most {longest}")


def test_the_longest_length_named_never_is_negative() -> None:
    geometry = Geometry(2_100, 100, 1_000)
    with pytest.raises(ArenaTooSmall, match=r"at most 0$"):
        geometry.require_one_request(16, blocks_each=3)


UNITS = st.integers(1, 5_000)


@settings(deadline=None)
@given(page=UNITS, block=UNITS, extra=st.integers(0, 200_000))
def test_limits_are_what_fits(page: int, block: int, extra: int) -> None:
    try:
        geometry = Geometry(2 * max(page, block) + page + block + extra, page, block)
    except ArenaTooSmall:
        return
    assert geometry.fits(geometry.page_limit, 0)
    assert not geometry.fits(geometry.page_limit + 1, 0)
    assert geometry.fits(0, geometry.block_limit)
    assert not geometry.fits(0, geometry.block_limit + 1)
    assert 0 <= geometry.rounding_bytes < page
    assert geometry.null_blocks * block >= max(page, block)
    # Physical indices of both kinds are inside their views.
    assert geometry.page_limit < geometry.pages
    assert geometry.null_blocks + geometry.block_limit <= geometry.blocks


@settings(deadline=None)
@given(
    page=st.integers(1, 300),
    block=st.integers(1, 3_000),
    extra=st.integers(0, 60_000),
    tokens=st.integers(1, 500),
    each=st.integers(1, 3),
)
def test_the_announced_number_of_sequences_fits_and_no_more(
    page: int, block: int, extra: int, tokens: int, each: int
) -> None:
    """vLLM #40691, #40384: the capacity in the log was wrong by a factor of two."""
    geometry = Geometry(3 * (page + block) + extra, page, block)
    arena = Arena(geometry)
    announced = geometry.sequences(tokens, each)
    for _ in range(announced):
        arena.allocate(geometry.pages_for(tokens), each)
    with pytest.raises(AllocationFailure):
        arena.allocate(geometry.pages_for(tokens), each)
    if announced:
        geometry.require_one_request(tokens, each)
    else:
        with pytest.raises(ArenaTooSmall) as refused:
            geometry.require_one_request(tokens, each)
        (needed,) = re.findall(r"needs (\d+) bytes", str(refused.value))
        Geometry(int(needed), page, block).require_one_request(tokens, each)
        with pytest.raises(ArenaTooSmall):
            Geometry(int(needed) - 1, page, block).require_one_request(tokens, each)
