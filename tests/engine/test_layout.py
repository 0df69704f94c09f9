"""Which layers share a table and a tensor, by the specs of their caches alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
from families import FAMILIES, HALF, attention, layers, state, window
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    CircularBufferSpec,
    CrossAttentionSpec,
    EncoderOnlyAttentionSpec,
    FullAttentionSpec,
    HiddenStateCacheSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    RSWASpec,
    SinkFullAttentionSpec,
    SlidingWindowMLASpec,
    UniformTypeKVCacheSpecs,
)

from avmp_vllm.core import Kind
from avmp_vllm.core.tables import LAYOUT_ALIGNMENT, TABLE_COST, Role
from avmp_vllm.engine.entry.config import ConfigError
from avmp_vllm.engine.layout.arena import AVMPCacheConfig, arena_config
from avmp_vllm.engine.layout.groups import REFUSED, ROLES, first_spec, sort_layers
from avmp_vllm.engine.layout.limits import most_sequences, refuse_drafts, refuse_transfers
from avmp_vllm.engine.layout.split import even_pages, in_cores_terms


@dataclass
class Sizes:
    """What the layout reads of vLLM's configuration."""

    max_in_flight_tokens: int = 256
    max_concurrent_batches: int = 1

    @property
    def model_config(self) -> Any:
        return SimpleNamespace(max_model_len=4096)

    @property
    def cache_config(self) -> Any:
        return SimpleNamespace(prefix_cache_retention_interval=0)


def places(config: AVMPCacheConfig) -> dict[str, tuple[int, int, int]]:
    """First byte in page 0, bytes, and stride between pages of each layer."""
    return {
        name: (
            tensor.offset + number * tensor.layer_stride,
            config.layer_specs[name].page_size_bytes,
            tensor.block_stride,
        )
        for tensor in config.kv_cache_tensors
        for number, name in enumerate(tensor.layers)
    }


def check_layout(specs: dict[str, KVCacheSpec], config: AVMPCacheConfig) -> None:
    """Every layer has bytes of its own in the page of its group, and a group's page holds them."""
    geometry = config.geometry
    assert geometry is not None
    place = places(config)
    assert set(place) == set(specs)
    for group in config.kv_cache_groups:
        is_state = isinstance(first_spec(group.kv_cache_spec), MambaSpec)
        unit = geometry.unit(Kind.SSM if is_state else Kind.KV)
        end = 0
        for first, size, stride in sorted(place[name] for name in group.layer_names):
            assert first >= end, "two layers of a table share bytes"
            assert stride == unit
            assert first % LAYOUT_ALIGNMENT == 0 or size % LAYOUT_ALIGNMENT
            end = first + size
        assert end <= unit
    for tensor in config.kv_cache_tensors:
        kinds = {type(specs[name]) for name in tensor.layers}
        assert len(kinds) == 1
        is_state = kinds == {MambaSpec}
        assert config.num_blocks_of(tensor) == (geometry.blocks if is_state else geometry.pages)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_fit_two_pools(family):
    specs = layers(FAMILIES[family])
    config = arena_config(Sizes(), specs, 64 << 20)
    check_layout(specs, config)
    assert isinstance(first_spec(config.kv_cache_groups[-1].kv_cache_spec), MambaSpec)
    assert ROLES[type(first_spec(config.kv_cache_groups[0].kv_cache_spec))] is Role.SLOTS


def test_the_most_sequences_hold_a_state_for_each_draft():
    """At one page each: as many as fit with all of them."""
    specs = {"a": attention(), "s": state(num_speculative_blocks=3)}
    config = arena_config(Sizes(), specs, 1 << 20)
    page, block = config.geometry.page_bytes, config.geometry.block_bytes
    most = most_sequences(config)
    assert most == ((1 << 20) // page * page - config.geometry.null_end) // (page + 4 * block)
    plain = arena_config(Sizes(), specs | {"s": state()}, 1 << 20)
    assert most_sequences(plain) > most


def test_a_plain_hybrid_has_the_layout_it_always_had():
    """One group a pool, its layers' own spec, no padding between them."""
    specs = layers(FAMILIES["jamba"])
    config = arena_config(Sizes(), specs, 64 << 20)
    assert [group.kv_cache_spec for group in config.kv_cache_groups] == [attention(), state()]
    assert [tensor.offset for tensor in config.kv_cache_tensors] == [0, 0]
    assert config.geometry.page_bytes == 3 * attention().page_size_bytes
    assert config.geometry.more_groups == ()


def test_all_slots_are_one_table_whatever_their_bytes():
    specs = layers(FAMILIES["glm-5.3"])
    config = arena_config(Sizes(), specs, 64 << 20)
    slots, rings, states = config.kv_cache_groups
    assert isinstance(slots.kv_cache_spec, UniformTypeKVCacheSpecs)
    assert len(slots.layer_names) == 6
    assert rings.layer_names == ["r0", "r1", "r2"]
    assert states.layer_names == ["s0", "s1", "s2"]
    ring = config.geometry.more_groups[0]
    assert (ring.page_tokens, ring.most) == (32, 1)
    assert config.geometry.pages_for(4000) == 250 + 1


def test_states_of_every_size_are_one_block():
    specs = layers(FAMILIES["qwen4exp"])
    config = arena_config(Sizes(), specs, 64 << 20)
    assert set(config.kv_cache_groups[-1].layer_names) == {"s0", "s1", "s2", "c0", "c1", "c2"}
    assert config.geometry.block_bytes == -(-3 * (16000 + 1200) // 128) * 128


def test_windows_are_apart_and_bounded():
    specs = layers({**FAMILIES["windows"], "v": window(500)})
    config = arena_config(Sizes(), specs, 64 << 20)
    assert len(config.kv_cache_groups) == 4
    hundred, five_hundred = config.geometry.more_groups
    assert hundred.most == -(-(99 + 256) // 16) + 1
    assert five_hundred.most == -(-(499 + 256) // 16) + 1
    assert config.geometry.pages_for(4096) == 256 + hundred.most + five_hundred.most


@pytest.mark.parametrize(
    "spec",
    [
        attention(RSWASpec, rswa_window=64),
        attention(SinkFullAttentionSpec, sink_len=16),
        attention(HiddenStateCacheSpec, 1),
        CrossAttentionSpec(block_size=16, num_kv_heads=1, head_size=64, dtype=HALF),
        EncoderOnlyAttentionSpec(block_size=16, num_kv_heads=1, head_size=64, dtype=HALF),
        attention(SlidingWindowMLASpec, 1, sliding_window=64, bounded_replay=True),
        type("NewSpec", (FullAttentionSpec,), {})(
            block_size=16, num_kv_heads=1, head_size=64, dtype=HALF
        ),
    ],
    ids=lambda spec: type(spec).__name__,
)
def test_other_specs_are_refused_by_type(spec):
    """Subclasses of what is served, too: a new kind may mean anything."""
    with pytest.raises(ConfigError, match=f"layer x keeps a {type(spec).__name__}.*default"):
        sort_layers({"a": attention(), "s": state(), "x": spec})
    assert type(spec) in REFUSED or type(spec) in ROLES or type(spec).__name__ == "NewSpec"


@pytest.mark.parametrize("missing", ["a", "s"])
def test_a_model_without_one_kind_is_refused(missing):
    family = {name: spec for name, spec in FAMILIES["jamba"].items() if name != missing}
    with pytest.raises(ConfigError, match=r"there is no .* layer"):
        sort_layers(family)


@pytest.mark.parametrize("field", ["block_size", "num_speculative_blocks"])
def test_states_that_cannot_move_together_are_refused(field):
    with pytest.raises(ConfigError, match="s and t keep states that cannot move together"):
        sort_layers({"a": attention(), "s": state(), "t": state(**{field: 1024})})


@pytest.mark.parametrize(
    ("kind", "device", "v2", "refused"),
    [
        ("MAMBA1", "cuda", True, "a Mamba-1 layer"),
        ("MAMBA2", "cpu", False, "a Mamba-2 layer on the CPU"),
        ("MAMBA2", "cpu", True, None),
        ("MAMBA2", "cuda", False, None),
        ("GDN_ATTN", "cpu", False, None),
    ],
)
def test_drafts_that_a_state_cannot_follow_are_refused(kind, device, v2, refused):
    """Stock vLLM serves these and answers wrongly."""
    config = SimpleNamespace(
        device_config=SimpleNamespace(device_type=device), use_v2_model_runner=v2
    )
    spec = state(mamba_type=MambaAttentionBackendEnum[kind], num_speculative_blocks=3)
    if refused is None:
        refuse_drafts(config, {"a": attention(), "s": spec})
        return
    with pytest.raises(ConfigError, match=f"layer s is {refused}.*remove the option"):
        refuse_drafts(config, {"a": attention(), "s": spec})
    refuse_drafts(config, {"a": attention(), "s": replace(spec, num_speculative_blocks=0)})


def test_a_connector_is_refused_where_it_was_not_tried():
    """A window's pages are not those of a prefix."""
    config = SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_connector="OffloadingConnector"))
    plain = {"a": attention(), "s": state()}
    refuse_transfers(config, plain)
    with pytest.raises(ConfigError, match=r"layer w keeps a SlidingWindowSpec.*remove the option"):
        refuse_transfers(config, {**plain, "w": window(64)})
    refuse_transfers(SimpleNamespace(kv_transfer_config=None), {**plain, "w": window(64)})


def test_a_wide_table_is_split_where_that_spares_bytes():
    """24 layers of windows beside 8 with all slots: three tables of windows, no padding."""
    specs = {f"a{i}": attention() for i in range(8)} | {f"w{i}": window(1000) for i in range(24)}
    *paged, _ = even_pages(sort_layers({**specs, "s": state()}), Sizes())
    assert [len(table.specs) for table in paged] == [8, 8, 8, 8]


_KINDS = st.sampled_from(
    [
        attention(),
        attention(heads=1),
        attention(heads=3, head_size=48),
        attention(MLAAttentionSpec, 1, head_size=576),
        attention(MLAAttentionSpec, 1, head_size=128, tokens_per_state=4),
        window(64),
        window(64, heads=4),
        window(900),
        attention(ChunkedLocalAttentionSpec, attention_chunk_size=128),
        attention(CircularBufferSpec, 1, block_size=32, head_size=128),
        state(),
        state(77),
        state(4000),
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(_KINDS, max_size=40))
def test_any_mixture_has_a_layout(kinds):
    """Also: no split costs more bytes than the best of them by more than it is worth."""
    specs = {f"l{index}": spec for index, spec in enumerate([attention(), state(), *kinds])}
    config = arena_config(Sizes(), specs, 256 << 20)
    check_layout(specs, config)
    geometry = config.geometry
    tokens = 4096
    held = geometry.pages_for(tokens) * geometry.page_bytes
    needed = [in_cores_terms(table, Sizes()) for table in sort_layers(specs)[:-1]]
    pages = [table.group.pages_for(tokens) for table in needed]
    assert held >= sum(t.page_bytes * n for t, n in zip(needed, pages, strict=True))
    whole = max(table.page_bytes for table in needed) * sum(pages)
    allowed = (1 + TABLE_COST * len(needed)) / (1 + TABLE_COST * len(geometry.groups))
    assert held <= whole * allowed + 16 * geometry.pages_for(tokens)


def test_control_an_offset_forgotten_is_seen():
    specs = layers(FAMILIES["glm-5.3"])
    config = arena_config(Sizes(), specs, 64 << 20)
    config.kv_cache_tensors[1].offset = 0
    with pytest.raises(AssertionError, match="share bytes"):
        check_layout(specs, config)
