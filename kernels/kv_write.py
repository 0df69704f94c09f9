"""KV write: put a step's keys and values into their pages, found by handle."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from avmp_kernels import fp8
from avmp_kernels.fp8 import encode_e4m3
from avmp_kernels.pages import PageTable, resolve_kv, table_args

_MAX = tl.constexpr(fp8.E4M3_MAX)


@triton.jit
def _stored(values, scale, cache, FP8: tl.constexpr, FP8_NATIVE: tl.constexpr):
    """Return values as the cache keeps them."""
    if FP8:
        scaled = values.to(tl.float32) / scale
        if FP8_NATIVE:
            # The hardware's conversion turns what is too large into NaN unless it is clamped.
            stored = tl.clamp(scaled, -_MAX, _MAX).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            stored = encode_e4m3(scaled)
    else:
        stored = values.to(cache.dtype.element_ty)
    return stored


@triton.jit(do_not_specialize=["num_kv"])
def _kv_write_kernel(
    key,
    value,
    key_cache,
    value_cache,
    slots,
    entries,
    num_kv,
    k_scale,
    v_scale,
    key_row: tl.int64,
    key_head,
    value_row: tl.int64,
    value_head,
    k_page: tl.int64,
    k_slot,
    k_head,
    v_page: tl.int64,
    v_slot,
    v_head,
    k_scale_head,
    v_scale_head,
    PAGE_TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    FP8: tl.constexpr,
    FP8_NATIVE: tl.constexpr,
    RESOLVE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    page = (slot // PAGE_TOKENS).to(tl.int32)
    offset = slot % PAGE_TOKENS
    if RESOLVE:
        page = resolve_kv(entries, page, num_kv, True)
    page = page.to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = element < HEADS * HEAD_SIZE
    head = element // HEAD_SIZE
    at = element % HEAD_SIZE
    keys = tl.load(key + token * key_row + head * key_head + at, mask=live)
    values = tl.load(value + token * value_row + head * value_head + at, mask=live)
    k_by = 1.0
    v_by = 1.0
    if FP8:
        k_by = tl.load(k_scale + head * k_scale_head, mask=live, other=1.0)
        v_by = tl.load(v_scale + head * v_scale_head, mask=live, other=1.0)
    k_at = key_cache + page * k_page + offset * k_slot + head * k_head + at
    v_at = value_cache + page * v_page + offset * v_slot + head * v_head + at
    tl.store(k_at, _stored(keys, k_by, key_cache, FP8, FP8_NATIVE), mask=live)
    tl.store(v_at, _stored(values, v_by, value_cache, FP8, FP8_NATIVE), mask=live)


def kv_write(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    pages: PageTable | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Write keys and values of a step's tokens to their slots.

    Args:
        key: ``[tokens, kv_heads, head_size]``, last dimension contiguous.
        value: As ``key``.
        key_cache: ``[pages, page_tokens, kv_heads, head_size]``, one layer of the arena's KV view:
            any strides but the last, which is 1. fp8 caches are uint8 or float8_e4m3fn.
        value_cache: As ``key_cache``.
        slots: int64 ``[tokens or fewer]``: ``handle * page_tokens + offset``, negative for tokens
            that are not kept; ``physical page * page_tokens + offset`` if ``pages`` is None. An
            unknown handle writes to the null page.
        pages: The page table.
        k_scale: fp32, 1 element or one a KV head; an fp8 cache holds ``key / k_scale``.
        v_scale: As ``k_scale``.

    Raises:
        ValueError: If an fp8 cache has no scales, or the head size is not contiguous.
    """
    key_cache, value_cache, is_fp8 = cache_bytes(key_cache, value_cache, k_scale, v_scale)
    _, page_tokens, heads, head_size = key_cache.shape
    if key.stride(2) != 1 or value.stride(2) != 1:
        raise ValueError("the last dimension of key and value must be contiguous")
    tokens = slots.shape[0]
    if tokens == 0:
        return
    entries, num_kv, _ = table_args(pages, slots)
    block = min(triton.next_power_of_2(heads * head_size), 1024)
    _kv_write_kernel[(tokens, triton.cdiv(heads * head_size, block))](
        key,
        value,
        key_cache,
        value_cache,
        slots,
        entries,
        num_kv,
        k_scale if is_fp8 else slots,
        v_scale if is_fp8 else slots,
        *key.stride()[:2],
        *value.stride()[:2],
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        scale_stride(k_scale),
        scale_stride(v_scale),
        PAGE_TOKENS=page_tokens,
        HEADS=heads,
        HEAD_SIZE=head_size,
        BLOCK=block,
        FP8=is_fp8,
        FP8_NATIVE=fp8.has_fp8(key.device),
        RESOLVE=pages is not None,
        num_warps=max(1, min(4, block // 256)),
    )


def scale_stride(scale: torch.Tensor | None) -> int:
    """Return how far apart the scales of two KV heads are: 0 if there is one for all."""
    return 0 if scale is None or scale.numel() == 1 else 1


def cache_bytes(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Return both caches, fp8 ones as uint8, and whether they are fp8.

    Raises:
        ValueError: If the caches are of a type that the kernels do not take.
    """
    if key_cache.stride(3) != 1 or value_cache.stride(3) != 1:
        raise ValueError("the last dimension of the KV cache must be contiguous")
    if key_cache.dtype in (torch.float16, torch.bfloat16, torch.float32):
        return key_cache, value_cache, False
    if key_cache.dtype not in (torch.uint8, torch.float8_e4m3fn):
        raise ValueError(
            f"KV cache of type {key_cache.dtype} is not taken by AVMP's kernels; they take "
            "float16, bfloat16, float32 and fp8 (e4m3): set kernels to 'resolved' to use vLLM's"
        )
    if k_scale is None or v_scale is None:
        raise ValueError("an fp8 KV cache needs k_scale and v_scale")
    return key_cache.view(torch.uint8), value_cache.view(torch.uint8), True
