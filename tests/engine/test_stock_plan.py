"""The planner's rules of stock vLLM against vLLM's own code, over random mixtures of layers."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from families import HALF, attention
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import (
    CircularBufferSpec,
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from avmp_vllm.core import stock
from avmp_vllm.core.caches import Cache, Layers, Load
from avmp_vllm.core.stock import StockRules, plan_stock
from avmp_vllm.core.tables import Role
from avmp_vllm.engine.layout import capacity

ARENA, LONGEST, STEP = 256 << 20, 4096, 256


def config(packed: bool):
    """What vLLM's planning functions read."""
    layout = KVCacheLayout.BLHNC if packed else KVCacheLayout.LBHNC
    return SimpleNamespace(
        additional_config={},
        max_in_flight_tokens=STEP,
        model_config=SimpleNamespace(max_model_len=LONGEST),
        device_config=SimpleNamespace(device_type="cpu"),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        cache_config=SimpleNamespace(
            user_specified_block_size=False,
            mamba_cache_mode="align",
            block_size=16,
            num_gpu_blocks_override=None,
            prefix_cache_retention_interval=None,
            get_resolved_kv_cache_layout=lambda: layout,
        ),
    )


def spec_of(cache: Cache) -> KVCacheSpec:
    """The spec of a layer that keeps this; entries are numbers of two bytes."""
    if cache.role is Role.STATE:
        return MambaSpec(
            block_size=512,
            shapes=((cache.entry_bytes,),),
            dtypes=(torch.int8,),
            mamba_cache_mode="align",
            tp_replicated=cache.replicated,
        )
    size = cache.entry_bytes // 2
    if cache.role is Role.RING:
        return attention(
            CircularBufferSpec, 1, block_size=cache.window, head_size=size, head_size_v=0
        )
    if cache.role is Role.WINDOW:
        return attention(SlidingWindowSpec, 1, head_size=size // 2, sliding_window=cache.window)
    if cache.latent:
        return attention(MLAAttentionSpec, 1, head_size=size, tokens_per_state=cache.entry_tokens)
    return FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=size // 2, dtype=HALF)


_COUNTS = st.integers(1, 12)
_PLAIN = st.builds(Cache, st.just(Role.SLOTS), _COUNTS, st.sampled_from([256, 512, 768]))
_WINDOWS = st.builds(
    Cache, st.just(Role.WINDOW), _COUNTS, st.sampled_from([256, 512]), window=st.just(100)
)
_LATENT = st.builds(
    Cache, st.just(Role.SLOTS), _COUNTS, st.sampled_from([384, 1024]), latent=st.just(True)
)
_COMPRESSED = st.builds(
    Cache,
    st.just(Role.SLOTS),
    _COUNTS,
    st.sampled_from([128, 132]),
    entry_tokens=st.sampled_from([4, 16]),
    latent=st.just(True),
)
_RINGS = st.builds(
    Cache, st.just(Role.RING), _COUNTS, st.sampled_from([256, 512]), window=st.sampled_from([4, 16])
)
_STATES = st.builds(
    Cache,
    st.just(Role.STATE),
    _COUNTS,
    st.sampled_from([1000, 20_000, 70_144]),
    replicated=st.booleans(),
)


def _check(caches: list[Cache]) -> None:
    # Equal layers are one layout.
    kinds: dict[Cache, int] = {}
    for cache in caches:
        one = Cache(**{**cache.__dict__, "layers": 1})
        kinds[one] = kinds.get(one, 0) + cache.layers
    layers = Layers(tuple(Cache(**{**one.__dict__, "layers": n}) for one, n in kinds.items()))
    specs = {
        f"{number}.{index}": spec_of(cache)
        for number, cache in enumerate(layers.caches)
        for index in range(cache.layers)
    }
    packed = any(c.role is Role.RING or c.entry_tokens > 1 for c in layers.caches)
    stage = SimpleNamespace(specs=specs, arena_bytes=ARENA)
    arena = SimpleNamespace(layer_specs=specs, stages=[stage], elastic=None)
    theirs = capacity.plan_stock(config(packed), arena)
    ours = plan_stock(layers, ARENA, StockRules(128), 2, Load(STEP, LONGEST))
    assert (theirs is None) == (ours is None)
    if theirs is None:
        return

    def groups(plan):
        return sorted((group.page_tokens, group.most or 0) for group in plan.groups)

    assert groups(ours) == groups(theirs)
    assert (ours.ssm_groups, ours.states, ours.blocks) == (
        theirs.ssm_groups,
        theirs.states,
        theirs.blocks,
    )


@settings(max_examples=150, deadline=None)
@given(_PLAIN | _LATENT, st.lists(_STATES, min_size=1, max_size=2))
def test_one_layout_of_attention(slots, states):
    _check([slots, *states])


@settings(max_examples=150, deadline=None)
@given(_PLAIN, st.lists(_PLAIN | _WINDOWS, min_size=1, max_size=2), _STATES)
def test_several_widths_and_windows(slots, more, states):
    _check([slots, *more, states])


def _one_ring(caches: list[Cache]) -> bool:
    """No model has rings of two widths, and vLLM's own packing ends with an error over some."""
    return sum(cache.role is Role.RING for cache in caches) <= 1


@settings(max_examples=200, deadline=None)
@given(
    _PLAIN | _LATENT,
    st.lists(_COMPRESSED | _RINGS, min_size=1, max_size=3).filter(_one_ring),
    st.lists(_STATES, min_size=1, max_size=2),
)
def test_indexers_and_rings(slots, more, states):
    _check([slots, *more, *states])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 12))
def test_the_group_size_that_pads_least_is_vllms(counts, least):
    """Ties included."""
    least = min(least, max(counts))
    theirs = kv_cache_utils._approximate_gcd(counts, lower_bound=least)
    assert stock._least_padding(counts, least) == theirs


def test_control_a_rule_left_out_is_seen(monkeypatch):
    """Groups as many as layers, not of equal size: vLLM's plan has fewer blocks' worth."""
    monkeypatch.setattr(stock, "group_layers", lambda counts: (1, list(counts)))
    layers = [Cache(Role.SLOTS, 2, 256), Cache(Role.STATE, 6, 1000)]
    try:
        _check(layers)
    except AssertionError:
        return
    raise AssertionError("the comparison sees nothing")
