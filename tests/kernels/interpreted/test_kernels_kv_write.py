"""KV write against its reference, fp8 included, and the fp8 conversions on every value."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from avmp_kernels import fp8, kv_write
from avmp_kernels.reference import kv as reference
from batches import distinct_handles, generator, random_table
from hypothesis import given
from hypothesis import strategies as st

_NUM_KV = 12


def kv_views(blocks, page_tokens, heads, head_size, dtype, seed):
    """Return one layer's key and value caches, strided as inside of a page of several layers.

    A page holds, for every head and token, the key and after it the value.
    """
    size = heads * page_tokens * 2 * head_size
    arena = torch.randn(blocks, size + 32, generator=generator(seed)).to(dtype)
    layer = arena[:, 16 : 16 + size].unflatten(1, (heads, page_tokens, 2 * head_size))
    keys, values = layer.transpose(1, 2).split(head_size, dim=-1)
    return keys, values, arena


@given(
    tokens=st.integers(0, 7),
    heads=st.sampled_from([1, 3]),
    head_size=st.sampled_from([16, 24]),
    page_tokens=st.sampled_from([4, 16]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]),
    native=st.booleans(),
    per_head=st.booleans(),
    translate=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_reference(
    tokens, heads, head_size, page_tokens, dtype, native, per_head, translate, seed
) -> None:
    """The whole arena is compared, so a write beside its slot would show."""
    random = generator(seed)
    is_fp8 = dtype == torch.float8_e4m3fn
    given_dtype = torch.float16 if is_fp8 else dtype
    key, value = torch.randn(2, tokens, heads, head_size * 2, generator=random).to(given_dtype)[
        ..., :head_size
    ]
    keys, values, arena = kv_views(_NUM_KV, page_tokens, heads, head_size, dtype, seed)
    wanted_keys, wanted_values, wanted = kv_views(
        _NUM_KV, page_tokens, heads, head_size, dtype, seed
    )
    pages = random_table(_NUM_KV, 3, seed) if translate else None
    handles = distinct_handles(tokens, _NUM_KV, False, seed).long()
    slots = handles * page_tokens + torch.randint(0, page_tokens, (tokens,), generator=random)
    if tokens > 2:
        slots[1] = -1
        slots[2] = (_NUM_KV + 5) * page_tokens if translate else 0  # nothing: the null page
    scales = {}
    if is_fp8:
        count = heads if per_head else 1
        scales = {
            name: torch.rand(count, generator=random) + 0.01 for name in ("k_scale", "v_scale")
        }
    if is_fp8 and native:
        # The interpreter's own conversion rounds wrongly, so here nothing may need rounding.
        key, value = (tensor.to(dtype).to(given_dtype) for tensor in (key, value))
        scales = {name: torch.full((count,), 0.5) for name in scales}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8, "has_fp8", lambda device: native)
        kv_write.kv_write(key, value, keys, values, slots, pages=pages, **scales)
    reference.kv_write(key, value, wanted_keys, wanted_values, slots, pages=pages, **scales)
    assert torch.equal(arena.view(torch.uint8), wanted.view(torch.uint8))


@triton.jit
def _convert(values, codes, decoded, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    code = fp8.encode_e4m3(tl.load(values + at))
    tl.store(codes + at, code)
    tl.store(decoded + at, fp8.decode_e4m3(code))


def test_fp8_in_integers_is_exact() -> None:
    """Every fp8 number, the points between neighbours and a step beside them, and large values."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].unique()
    middles = (numbers[1:] + numbers[:-1]) / 2
    values = torch.cat([numbers, middles])
    values = torch.cat([values, values.nextafter(values + 1), values.nextafter(values - 1)])
    values = torch.cat([values, torch.tensor([500.0, -1e9, 1e-30])])
    padded = torch.zeros(2048)
    padded[: len(values)] = values
    codes = torch.full((2048,), 77, dtype=torch.uint8)
    decoded = torch.full((2048,), float("nan"), dtype=torch.float16)
    _convert[(1,)](padded, codes, decoded, COUNT=2048)
    wanted = padded.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(codes, wanted.view(torch.uint8))
    assert torch.equal(decoded, wanted.half())


def test_what_is_refused() -> None:
    """A cache type that the kernels do not take names the setting that works."""
    cache = torch.zeros(2, 4, 1, 16, dtype=torch.int8)
    key = torch.zeros(1, 1, 16)
    slots = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="'resolved'"):
        kv_write.kv_write(key, key, cache, cache, slots)
    cache = cache.view(torch.uint8)
    with pytest.raises(ValueError, match="needs k_scale"):
        kv_write.kv_write(key, key, cache, cache, slots)
