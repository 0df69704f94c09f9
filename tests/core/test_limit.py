"""An allocation fails only at the physical limit: live bytes and the request exceed the arena."""

from __future__ import annotations

import random

import pytest
from arena_client import Client, NaiveModel, plain_geometry

from avmp_vllm.core import AllocationFailure, Arena, Geometry, Kind
from avmp_vllm.core.tables import Layout

BF16, FP8, FP32 = 2, 1, 4


def attention(layers: int, kv_heads: int, head: int, itemsize: int = BF16) -> Layout:
    """Layers that keep keys and values; bytes of a token."""
    return Layout(2 * kv_heads * head * itemsize, layers)


def mamba1(layers: int, inner: int, state: int, itemsize: int) -> Layout:
    """Mamba layers with a convolution over 4 steps, kept in bf16."""
    return Layout(inner * state * itemsize + inner * 3 * BF16, layers)


def heads(layers: int, count: int, key: int, value: int, conv: int, itemsize: int) -> Layout:
    """Mamba-2, GDN or KDA layers: a matrix a head, and a convolution of ``conv`` channels."""
    return Layout(count * key * value * itemsize + conv * 3 * BF16, layers)


#: Published layer shapes (config.json of each model; the names say which one it is like).
MODELS: dict[str, tuple[Layout, Layout, int]] = {
    "jamba-3b": (attention(2, 1, 128), mamba1(26, 5120, 16, FP32), 16),
    "jamba-1.5-mini": (attention(4, 8, 128), mamba1(28, 8192, 16, BF16), 16),
    "qwen3.5-35b": (attention(10, 2, 256), heads(30, 32, 128, 128, 8192, BF16), 16),
    "qwen3.5-35b-fp32-fp8": (attention(10, 2, 256, FP8), heads(30, 32, 128, 128, 8192, FP32), 16),
    "kimi-linear": (Layout(576 * BF16, 7), heads(20, 32, 128, 128, 12288, FP32), 16),
    "nemotron-3-nano": (attention(6, 2, 128), heads(23, 64, 64, 128, 6144, FP32), 16),
    "granite-4-h-small": (attention(4, 8, 128), heads(36, 128, 64, 128, 8448, BF16), 16),
    "falcon-h1-7b": (attention(44, 2, 128), heads(44, 24, 128, 256, 3584, BF16), 16),
    # Pages larger than blocks: much attention, small states.
    "small-states": (attention(40, 32, 128), mamba1(2, 1024, 16, BF16), 32),
    "tiny-jamba": (attention(2, 2, 32, FP32), mamba1(6, 256, 16, FP32), 32),
}

#: Bytes of one page of each kind, by hand, to pin the table above to peers' block sizes.
BLOCK_BYTES = {
    "jamba-3b": 26 * 358_400,
    "jamba-1.5-mini": 28 * 311_296,
    "qwen3.5-35b": 30 * 1_097_728,
    "qwen3.5-35b-fp32-fp8": 30 * 2_146_304,
    "kimi-linear": 20 * 2_170_880,
    "nemotron-3-nano": 23 * 2_134_016,
}
#: Tokens of stock vLLM's inflated attention block on the same shapes (smallest multiple of 16).
STOCK_BLOCKS = {
    "jamba-3b": 704,
    "jamba-1.5-mini": 80,
    "qwen3.5-35b": 544,
    "qwen3.5-35b-fp32-fp8": 2096,
    "kimi-linear": 1888,
    "nemotron-3-nano": 2096,
}


def geometry_of(model: str, sequences: int) -> Geometry:
    """A scaled-down arena: exact pages and blocks, room for so many sequences of 512 tokens."""
    kv, ssm, page_tokens = MODELS[model]
    sizes = plain_geometry(1 << 60, kv, ssm, page_tokens)
    each = sizes.block_bytes + sizes.pages_for(512) * sizes.page_bytes
    size = sizes.null_bytes + sequences * each + 12_345
    return plain_geometry(size, kv, ssm, page_tokens)


@pytest.mark.parametrize("model", BLOCK_BYTES)
def test_shapes_are_those_that_stock_inflates_to_its_published_blocks(model: str) -> None:
    kv, ssm, _ = MODELS[model]
    assert geometry_of(model, 8).block_bytes == BLOCK_BYTES[model]
    state, token = ssm.layer_bytes, kv.layer_bytes
    assert -(-state // (16 * token)) * 16 == STOCK_BLOCKS[model]


def give_back(arena: Arena, handles: list[int], keep: bool) -> None:
    """End a request; its pages come first in ``handles``, as the arena returned them."""
    if keep:
        arena.cache(reversed(handles))
        return
    cut = next((i for i, handle in enumerate(handles) if handle >> 30), len(handles))
    arena.release(handles[:cut])
    arena.release(handles[cut:])


@pytest.mark.parametrize("batch", [1, 128, 10**9])
@pytest.mark.parametrize("model", MODELS)
def test_failure_means_that_the_bytes_are_not_there(model: str, batch: int) -> None:
    geometry = geometry_of(model, sequences=16)
    arena, rng = Arena(geometry, migration_batch=batch), random.Random(f"{model} {batch}")
    naive = NaiveModel(geometry.arena_bytes, geometry.page_bytes, geometry.block_bytes)
    slack = geometry.block_bytes + geometry.page_bytes + geometry.null_bytes
    failures = 0
    running: list[tuple[list[int], int, int]] = []
    for turn in range(900):
        # Phases of short and of long requests, so that capacity has to move both ways.
        lengths = ([16, 48, 100], [900, 2_500, 6_000], [200, 512, 1_000])[turn // 100 % 3]
        what = rng.random()
        if what < 0.55 or not running:
            pages, blocks = geometry.pages_for(rng.choice(lengths)), 1
        elif what < 0.8:
            pages, blocks = rng.randint(1, 4), rng.randint(0, geometry.block_limit // 12)
        else:
            handles, *_ = running.pop(rng.randrange(len(running)))
            give_back(arena, handles, keep=rng.random() < 0.5)
            continue
        live = [sum(request[1 + kind] for request in running) for kind in Kind]
        must_succeed = naive.room(live[Kind.KV] + pages, live[Kind.SSM] + blocks)
        try:
            running.append((arena.allocate(pages, blocks), pages, blocks))
            assert must_succeed
        except AllocationFailure:
            assert not must_succeed
            failures += 1
            held = sum(live[kind] * geometry.unit(kind) for kind in Kind)
            request = pages * geometry.page_bytes + blocks * geometry.block_bytes
            assert held + request >= geometry.arena_bytes - slack
            for _ in range(min(rng.randint(1, 3), len(running))):
                handles, *_ = running.pop(rng.randrange(len(running)))
                give_back(arena, handles, keep=rng.random() < 0.5)
        if turn % 100 == 0:
            arena.verify(handle for handles, *_ in running for handle in handles)
    assert failures > 30
    # The bar was not cleared by standing still: capacity moved both ways.
    assert all(arena.statistics.migrations[kind] > 0 for kind in Kind)


@pytest.mark.parametrize("model", MODELS)
def test_the_last_page_and_the_last_block_can_be_had(model: str) -> None:
    """From any split, one kind can be filled to the brim and the other after it."""
    geometry = geometry_of(model, sequences=4)
    client = Client(geometry, 1)
    for kind in (Kind.KV, Kind.SSM, Kind.KV):
        first = client.arena.available(kind)
        handles = client.allocate(*((first, 0) if kind is Kind.KV else (0, first)))
        assert handles is not None
        assert len(handles) == geometry.limit(kind)
        rest = client.arena.available(kind.other)
        assert rest * geometry.unit(kind.other) < geometry.unit(kind) + geometry.unit(kind.other)
        client.release(handles, keep=True)
        client.check()
