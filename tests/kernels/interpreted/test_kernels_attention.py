"""Paged attention against its reference: ragged batches of prefills and decodes."""

from __future__ import annotations

import pytest
import torch
from avmp_kernels import attention, fp8, page_table, relocate
from avmp_kernels.pages import PageTable
from avmp_kernels.reference import kv as reference
from batches import block_table, generator, random_table, starts_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_kv_write import kv_views

_TOLERANCE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
}


class Batch:
    """A ragged batch over a random page table; unwritten slots of live pages hold NaN."""

    def __init__(
        self, lengths, queries, *, padding=0, page_tokens=16, heads=(2, 1), head_size=64,
        dtype=torch.float32, fp8_cache=False, translate=True, seed=0,
    ) -> None:  # fmt: skip
        random = generator(seed)
        query_heads, kv_heads = heads
        counts = [-(-length // page_tokens) for length in lengths]
        size = sum(counts) + 4
        cache_dtype = torch.float8_e4m3fn if fp8_cache else dtype
        self.keys, self.values, self.arena = kv_views(
            size, page_tokens, kv_heads, head_size, cache_dtype, seed
        )
        self.pages = random_table(size, 2, seed) if translate else None
        self.table = block_table(counts, size, seed)
        if not fp8_cache:
            for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
                if length % page_tokens:
                    handle = self.table[row, count - 1]
                    page = self.pages.entries[handle] if translate else handle
                    self.keys[page, length % page_tokens :] = float("nan")
                    self.values[page, length % page_tokens :] = float("nan")
        rows = sum(queries) + padding
        self.query = torch.randn(rows, query_heads, head_size, generator=random).to(dtype)
        self.starts = starts_of(queries)
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.max_query_len = max(queries, default=0)
        self.scale = head_size**-0.5
        self.scales = {}
        if fp8_cache:
            self.scales = {
                "k_scale": torch.rand(1, generator=random) + 0.5,
                "v_scale": torch.rand(kv_heads, generator=random) + 0.5,
            }
            self.scales["k_scale"] = self.scales["k_scale"].expand(kv_heads).contiguous()

    def arguments(self, pages: PageTable | None) -> dict:
        return {
            "query": self.query,
            "key_cache": self.keys,
            "value_cache": self.values,
            "block_table": self.table,
            "seq_lens": self.lengths,
            "query_start_loc": self.starts,
            "scale": self.scale,
            "pages": pages,
            **self.scales,
        }

    def run(self, **options) -> torch.Tensor:
        """Return what the kernel writes over a poisoned output."""
        out = torch.full_like(self.query, float("nan"))
        arguments = self.arguments(options.pop("pages", self.pages))
        attention.paged_attention(out, **arguments, max_query_len=self.max_query_len, **options)
        return out

    def wanted(self, **options) -> torch.Tensor:
        out = torch.empty_like(self.query)
        reference.paged_attention(out, **self.arguments(self.pages), **options)
        return out


_REQUESTS = st.lists(
    st.tuples(st.sampled_from([1, 1, 1, 0, 2, 9, 40]), st.integers(0, 170)), max_size=4
)


@settings(max_examples=40)
@given(
    requests=_REQUESTS,
    padding=st.sampled_from([0, 3]),
    page_tokens=st.sampled_from([16, 16, 32, 128]),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 2), (17, 1)]),
    head_size=st.sampled_from([16, 64, 80]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    cache=st.sampled_from(["same", "same", "fp8 native", "fp8 in integers"]),
    softcap=st.sampled_from([0.0, 2.0]),
    segments=st.sampled_from([1, 4, 32]),
    translate=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_reference(
    requests, padding, page_tokens, heads, head_size, dtype, cache, softcap, segments, translate,
    seed,
) -> None:  # fmt: skip
    """Every element, padding rows and empty requests included."""
    batch = Batch(
        [queries + context for queries, context in requests],
        [queries for queries, _ in requests],
        padding=padding,
        page_tokens=page_tokens,
        heads=heads,
        head_size=head_size,
        dtype=dtype,
        fp8_cache=cache != "same",
        translate=translate,
        seed=seed,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8, "has_fp8", lambda device: cache == "fp8 native")
        patch.setattr(attention, "_SEGMENT_TILES", 1)  # so that short requests are cut, too
        found = batch.run(softcap=softcap, segments=segments)
    torch.testing.assert_close(found, batch.wanted(softcap=softcap), **_TOLERANCE[dtype])


def test_large_heads_and_long_context() -> None:
    """Head size 256, several tiles a segment, and the default number of segments."""
    batch = Batch([300, 7], [1, 3], heads=(2, 1), head_size=256, dtype=torch.float16, seed=4)
    torch.testing.assert_close(batch.run(segments=2), batch.wanted(), **_TOLERANCE[torch.float16])
    torch.testing.assert_close(batch.run(), batch.wanted(), **_TOLERANCE[torch.float16])


def test_dummy_requests_get_zeros() -> None:
    """A warm-up request has queries but no tokens, and its table row is anything."""
    batch = Batch([0, 0, 20], [1, 30, 1], seed=5)
    for segments in (1, 4):
        out = batch.run(segments=segments)
        assert (out[:31] == 0).all()
        torch.testing.assert_close(out[31], batch.wanted()[31], **_TOLERANCE[torch.float32])


def test_bad_handles_read_the_null_page() -> None:
    """A handle of no page, or of the other pool, is read as the null page and nothing else."""
    batch = Batch([20], [1], seed=6)
    batch.keys[0], batch.values[0] = 0.5, 0.25
    for bad in (0, -4, 1 << 30, (1 << 30) + 1, 10_000):
        batch.table[0, 0] = batch.table[0, 1] = bad
        torch.testing.assert_close(batch.run(), torch.full_like(batch.query, 0.25))


def test_wrong_page_table_changes_the_result() -> None:
    """Two entries swapped without moving the bytes: the comparison above can fail."""
    batch = Batch([64, 50], [1, 1], seed=7)
    entries = batch.pages.entries.clone()
    first, second = batch.table[0, 0], batch.table[1, 0]
    entries[first], entries[second] = batch.pages.entries[second], batch.pages.entries[first]
    other = batch.run(pages=PageTable(entries, batch.pages.num_kv))
    assert not torch.allclose(batch.run(), other, atol=1e-2)


def test_relocation_changes_nothing() -> None:
    """Pages moved with their table entries, the places they left overwritten: the same output."""
    batch = Batch([64, 50], [1, 30], seed=8)
    before = batch.run()
    rows = batch.arena.shape[0]
    size = batch.arena.shape[1] * 4
    # Twice the room, so that there are holes to move into.
    arena = torch.full((2 * rows, batch.arena.shape[1]), float("nan"))
    arena[:rows] = batch.arena
    keys, values = (
        arena.as_strided((2 * rows, *view.shape[1:]), view.stride(), view.storage_offset())
        for view in (batch.keys, batch.values)
    )
    batch.keys, batch.values = keys, values
    live = [int(h) for row, n in enumerate([4, 4]) for h in batch.table[row, :n]]
    moves, updates, hole = [], [], rows
    for handle in live[::2]:
        moves.append((0, int(batch.pages.entries[handle]), hole))
        updates.append((handle, hole))
        hole += 1
    # A second move into a place that the first one left, and a chain.
    moves.append((0, int(batch.pages.entries[live[1]]), moves[0][1]))
    updates.append((live[1], moves[0][1]))
    moves.append((0, updates[0][1], hole))
    updates.append((live[0], hole))
    relocate.relocate(arena.view(torch.uint8).flatten(), moves, (size, size))
    stale = batch.run()
    page_table.update(batch.pages, updates)
    mapped = set(batch.pages.entries[: batch.pages.num_kv].tolist())
    for place in range(2 * rows):
        if place not in mapped:
            arena[place] = float("nan")
    assert torch.equal(batch.run(), before)
    assert not torch.equal(stale, before)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((torch.float64, 64, 16, 4, 2), "float64 is not"),
        ((torch.float16, 288, 16, 4, 2), "head size 288"),
        ((torch.float16, 64, 48, 4, 2), "page_tokens 48"),
        ((torch.float16, 64, 16, 5, 2), "5 query heads"),
    ],
)
def test_what_is_refused(arguments, why) -> None:
    """What the kernels do not take is named, with the setting that works."""
    with pytest.raises(ValueError, match=why):
        attention.check_supported(*arguments)
