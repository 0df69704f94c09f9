"""The host's rows: none lost, none with two owners, and the right ones go."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given, settings

from avmp_vllm.core import Kind
from avmp_vllm.core.host_cache import HostCache


def filled(cache: HostCache, kind: Kind, *keys: str) -> list[object] | None:
    """Add entries that are ready; what went for them."""
    gone = cache.add(kind, keys)
    assert cache.end_write(keys) == (list(keys) if gone is not None else [])
    return gone


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.lists(
        st.tuples(
            st.sampled_from(["pages", "state", "use", "read", "end", "remove"]),
            st.integers(0, 1 << 16),
        ),
        max_size=60,
    ),
)
def test_rows_add_up(slabs, span, operations):
    """Whatever is added, used, read and removed; and refusals are exact."""
    cache, model = HostCache(slabs, span), {}
    for number, (operation, choice) in enumerate(operations):
        keys = sorted(model)
        picked = keys[choice % len(keys)] if keys else None
        if operation in ("pages", "state"):
            kind = Kind.KV if operation == "pages" else Kind.SSM
            new = [f"{number:03}-{i}" for i in range(1 + choice % 3 if kind is Kind.KV else 1)]
            before = set(model)
            gone = cache.add(kind, new)
            if gone is None:
                # Where nothing is pinned, only what is larger than the host is refused.
                assert cache.reading_rows + cache.writing_rows or len(new) > slabs * span
                assert set(model) == before
                continue
            assert not any(model[key].pinned for key in gone)
            for key in gone:
                del model[key]
            model.update((key, cache.get(key)) for key in new)
            if choice % 5:
                assert cache.end_write(new, arrived=bool(choice % 7)) == new
            if choice % 5 and not choice % 7:
                for key in new:
                    del model[key]
        elif picked is not None:
            entry = model[picked]
            if operation == "use":
                cache.use([picked, "gone"])
            elif operation == "read" and entry.ready:
                assert cache.begin_read([picked]) == [entry]
            elif operation == "end" and entry.readers:
                cache.end_read([picked])
            elif operation == "remove" and not entry.pinned:
                cache.remove(picked)
                del model[picked]
        assert not cache.problems()
        assert len(cache) == len(model)
        assert all(cache.get(key) is entry for key, entry in model.items())


def test_the_page_that_was_used_least_recently_goes_for_a_page():
    cache = HostCache(slabs=2, span=2)
    assert filled(cache, Kind.KV, "a", "b", "c", "d") == []
    cache.use(["a"])
    assert filled(cache, Kind.KV, "e") == ["b"]
    assert filled(cache, Kind.KV, "f", "g") == ["c", "d"]


def test_a_state_goes_for_as_many_pages_as_it_had_rows():
    cache = HostCache(slabs=1, span=3)
    assert filled(cache, Kind.SSM, "state") == []
    assert filled(cache, Kind.KV, "a") == ["state"]
    assert filled(cache, Kind.KV, "b", "c") == []


def test_the_slab_that_was_used_least_recently_goes_for_a_state():
    """Not the one with the oldest page, of which another page is in use."""
    cache = HostCache(slabs=2, span=2)
    filled(cache, Kind.KV, "a", "b", "c", "d")
    cache.use(["b"])  # in the slab of the oldest
    assert filled(cache, Kind.SSM, "state") == ["c", "d"]
    entry = cache.get("state")
    assert entry is not None
    assert entry.row % 2 == 0


def test_what_a_transfer_reads_or_writes_stays():
    cache = HostCache(slabs=1, span=2)
    assert cache.add(Kind.KV, ["arriving"]) == []
    assert filled(cache, Kind.KV, "read") == []
    cache.begin_read(["read"])
    assert cache.add(Kind.KV, ["more"]) is None
    assert cache.add(Kind.SSM, ["state"]) is None
    assert (cache.used_rows, cache.reading_rows, cache.writing_rows) == (2, 1, 1)
    cache.end_read(["read"])
    assert filled(cache, Kind.KV, "more") == ["read"]
