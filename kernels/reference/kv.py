"""References of the kernels that use KV pages: KV write and paged attention."""

from __future__ import annotations

import torch
from avmp_kernels.pages import PageTable
from avmp_kernels.reference.pages import resolve_handle, resolve_handles


def _scaled(cache: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Return cached keys or values ``[tokens, kv_heads, head_size]`` as numbers."""
    if cache.dtype in (torch.uint8, torch.float8_e4m3fn):
        return cache.view(torch.float8_e4m3fn).to(dtype) * scale.to(dtype).reshape(-1, 1)
    return cache.to(dtype)


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
    """Write keys and values to their slots, one token after another."""
    page_tokens = key_cache.shape[1]
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        page, offset = divmod(slot, page_tokens)
        page = resolve_handle(pages, page, is_ssm=False)
        for new, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
            if cache.dtype in (torch.uint8, torch.float8_e4m3fn):
                limit = torch.finfo(torch.float8_e4m3fn).max
                scaled = (new[token].float() / scale.reshape(-1, 1)).clamp(-limit, limit)
                kept = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
                cache.view(torch.uint8)[page, offset] = kept
            else:
                cache[page, offset] = new[token].to(cache.dtype)


def paged_attention(
    out: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    *,
    pages: PageTable | None = None,
    softcap: float = 0.0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Attend each query to its request's tokens up to its own; see the kernel for the arguments."""
    out.zero_()
    page_tokens, group = key_cache.shape[1], query.shape[1] // key_cache.shape[2]
    for request, length in enumerate(seq_lens.tolist()):
        begin, end = int(query_start_loc[request]), int(query_start_loc[request + 1])
        if begin == end or length == 0:
            continue
        count = -(-length // page_tokens)
        physical = resolve_handles(pages, block_table[request, :count], is_ssm=False)
        keys = _scaled(key_cache[physical].flatten(0, 1)[:length], k_scale, dtype)
        values = _scaled(value_cache[physical].flatten(0, 1)[:length], v_scale, dtype)
        keys = keys.repeat_interleave(group, dim=1)
        values = values.repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", query[begin:end].to(dtype), keys) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        position = length - (end - begin) + torch.arange(end - begin, device=query.device)
        future = torch.arange(length, device=query.device)[None, :] > position[:, None]
        weights = torch.softmax(scores.masked_fill(future, float("-inf")), dim=-1)
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, values).to(out.dtype)
