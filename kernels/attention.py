"""Paged attention over handles: prefill and decode requests in one batch.

Each program takes one KV head and the query heads that share it. Their queries are packed into the
rows of one tile, so that grouped-query decoding fills a matrix instruction::

    row of a tile    0 .. GROUP-1        GROUP .. 2*GROUP-1     ...
    query            first query         second query           ...
    query head       the GROUP heads of the KV head, in order

Requests of few queries (decodes) and of many (prefills) take different launches, each of which
passes over the other's requests. Decodes may be cut into segments of their keys, so that few long
requests fill the card; a third launch then merges the segments. No launch shape depends on anything
but the batch's padded shape, and nothing waits for the device.

Scores are kept in base 2: ``exp(x) = exp2(x * log2(e))``.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from avmp_kernels import fp8
from avmp_kernels.fp8 import decode_e4m3
from avmp_kernels.kv_write import cache_bytes, scale_stride
from avmp_kernels.pages import PageTable, resolve_kv, table_args
from avmp_kernels.ragged import find_request, num_blocks, row_range

_LOG2E = tl.constexpr(1.4426950408889634)
_NO_KEY = tl.constexpr(float("-inf"))
# A segment shorter than this costs more to merge than it saves.
_SEGMENT_TILES = 4
_MAX_SEGMENTS = 32


@triton.jit
def _numbers(stored, like, FP8: tl.constexpr, FP8_NATIVE: tl.constexpr):
    """Return cached keys or values in the type of the queries."""
    if FP8:
        if FP8_NATIVE:
            numbers = stored.to(tl.float8e4nv, bitcast=True).to(like.dtype)
        else:
            numbers = decode_e4m3(stored).to(like.dtype)
    else:
        numbers = stored.to(like.dtype)
    return numbers


@triton.jit
def _attend(
    q,  # [ROWS, DIM]
    position,  # [ROWS]: of each row's token in its request
    begin,
    end,
    table_row,
    key_cache,
    value_cache,
    entries,
    num_kv,
    k_page,
    k_slot,
    v_page,
    v_slot,
    scale,
    softcap,
    HEAD_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FP8: tl.constexpr,
    FP8_NATIVE: tl.constexpr,
    RESOLVE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attend to the keys ``begin : end`` of a request; ``begin`` is a multiple of TILE.

    Returns the weighted sum of the values ``[ROWS, DIM]``, the largest score and the sum of the
    weights relative to it ``[ROWS]``.
    """
    dim = tl.arange(0, DIM)
    total = tl.zeros([ROWS, DIM], dtype=tl.float32)
    largest = tl.full([ROWS], _NO_KEY, dtype=tl.float32)
    weight = tl.zeros([ROWS], dtype=tl.float32)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        token = start + tl.arange(0, TILE)
        live = token < end
        if PAGE_TOKENS % TILE == 0:
            # The tile lies in one page: one handle for all.
            page = tl.load(table_row + start // PAGE_TOKENS)
            if RESOLVE:
                page = resolve_kv(entries, page, num_kv, True)
        else:
            page = tl.load(table_row + token // PAGE_TOKENS, mask=live, other=0)
            if RESOLVE:
                page = resolve_kv(entries, page, num_kv, live)
        slot = token % PAGE_TOKENS
        k_at = page.to(tl.int64) * k_page + slot * k_slot
        v_at = page.to(tl.int64) * v_page + slot * v_slot
        # Pages inherit the bytes of states: what was not written may be NaN, even times zero.
        inside = live[:, None]
        if HEAD_SIZE != DIM:
            inside = inside & (dim < HEAD_SIZE)[None, :]
        k = tl.load(key_cache + k_at[:, None] + dim[None, :], mask=inside, other=0)
        v = tl.load(value_cache + v_at[:, None] + dim[None, :], mask=inside, other=0)
        k = _numbers(k, q, FP8, FP8_NATIVE)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if SOFTCAP:
            # softcap * tanh(score / softcap); the factor log2(e) is in ``softcap`` already.
            score = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(score)))
        seen = live[None, :] & (token[None, :] <= position[:, None])
        score = tl.where(seen, score, _NO_KEY)
        new = tl.maximum(largest, tl.max(score, axis=1))
        base = tl.where(new == _NO_KEY, 0.0, new)
        share = tl.exp2(score - base[:, None])
        fade = tl.exp2(largest - base)
        weight = weight * fade + tl.sum(share, axis=1)
        v = _numbers(v, q, FP8, FP8_NATIVE)
        total = total * fade[:, None]
        total = tl.dot(share.to(v.dtype), v, total, input_precision="ieee")
        largest = new
    return total, largest, weight


@triton.jit
def _scales(
    k_scale, v_scale, stride, kv_head, scale, softcap, SOFTCAP: tl.constexpr, FP8: tl.constexpr
):
    """Return the factor of the raw scores, the soft cap in base 2, and the factor of the output."""
    by_value = 1.0
    if FP8:
        scale *= tl.load(k_scale + kv_head * stride)
        by_value = tl.load(v_scale + kv_head * stride)
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (1 + exp(2 x)), with the exponential in base 2.
        scale = scale / softcap * 2.0
    return scale * _LOG2E, softcap * _LOG2E, by_value


@triton.jit
def _clear_padding(
    out, first, num_rows, kv_head, out_row, out_head, HEAD_SIZE: tl.constexpr, DIM: tl.constexpr,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr,
):  # fmt: skip
    """Write zeros to one KV head's part of the rows that belong to no request."""
    lane = tl.arange(0, GROUP_PADDED)
    dim = tl.arange(0, DIM)
    at = (kv_head * GROUP + lane)[:, None] * out_head + dim[None, :]
    inside = (lane < GROUP)[:, None] & (dim < HEAD_SIZE)[None, :]
    zeros = tl.zeros([GROUP_PADDED, DIM], dtype=out.dtype.element_ty)
    at = out + first.to(tl.int64) * out_row + at
    for _ in tl.range(first, num_rows):
        tl.store(at, zeros, mask=inside)
        at += out_row


@triton.jit(do_not_specialize=["num_requests", "num_rows", "num_kv"])
def _prefill_kernel(
    out,
    query,
    key_cache,
    value_cache,
    table,
    seq_lens,
    query_start_loc,
    entries,
    k_scale,
    v_scale,
    num_requests,
    num_rows,
    num_kv,
    scale,
    softcap,
    q_row: tl.int64,
    q_head,
    out_row: tl.int64,
    out_head,
    k_page: tl.int64,
    k_slot,
    k_head,
    v_page: tl.int64,
    v_slot,
    v_head,
    table_row: tl.int64,
    scale_head,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    SKIP: tl.constexpr,  # requests of so many queries or fewer are the decode launch's
    HEAD_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FP8: tl.constexpr,
    FP8_NATIVE: tl.constexpr,
    RESOLVE: tl.constexpr,
    STAGES: tl.constexpr,
):
    QUERIES: tl.constexpr = ROWS // GROUP
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    request = find_request(query_start_loc, block, num_requests, QUERIES)
    begin, end = row_range(query_start_loc, request, num_requests, num_rows)
    first = (block - (begin // QUERIES + request)) * QUERIES
    count = end - begin
    if first >= count:
        return
    if request == num_requests:
        last = tl.minimum(first + QUERIES, count)
        _clear_padding(
            out, begin + first, begin + last, kv_head, out_row, out_head, HEAD_SIZE, DIM,
            GROUP, GROUP_PADDED,
        )  # fmt: skip
        return
    if count <= SKIP:
        return
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    index = first + row // GROUP
    valid = (row < QUERIES * GROUP) & (index < count)
    inside = valid[:, None] & (dim < HEAD_SIZE)[None, :]
    token = (begin + index).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    q_at = query + (token * q_row + head * q_head)[:, None] + dim[None, :]
    q = tl.load(q_at, mask=inside, other=0.0)
    length = tl.load(seq_lens + request)
    position = length - count + index
    by_score, cap, by_value = _scales(
        k_scale, v_scale, scale_head, kv_head, scale, softcap, SOFTCAP, FP8
    )
    total, _, weight = _attend(
        q, position, 0, tl.minimum(length, length - count + first + QUERIES),
        table + request.to(tl.int64) * table_row, key_cache + kv_head * k_head,
        value_cache + kv_head * v_head, entries, num_kv, k_page, k_slot, v_page, v_slot,
        by_score, cap, HEAD_SIZE, DIM, ROWS, TILE, PAGE_TOKENS, SOFTCAP, FP8, FP8_NATIVE, RESOLVE,
        STAGES,
    )  # fmt: skip
    # A dummy request of length 0 has no keys: it gets zeros.
    total = total * (by_value / tl.where(weight == 0.0, 1.0, weight))[:, None]
    out_at = out + (token * out_row + head * out_head)[:, None] + dim[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _segment_tokens(length, SEGMENTS: tl.constexpr, TILE: tl.constexpr, LEAST: tl.constexpr):
    """Return how many keys a segment covers: a multiple of TILE, at least LEAST tiles."""
    tiles = (length + TILE * SEGMENTS - 1) // (TILE * SEGMENTS)
    return tl.maximum(tiles, LEAST) * TILE


@triton.jit(do_not_specialize=["num_requests", "num_rows", "num_kv"])
def _decode_kernel(
    out,
    partial,  # [requests, kv_heads, SEGMENTS, ROWS, DIM] fp32, used if SEGMENTS > 1
    partial_stats,  # [requests, kv_heads, SEGMENTS, 2, ROWS] fp32: largest score, weight
    query,
    key_cache,
    value_cache,
    table,
    seq_lens,
    query_start_loc,
    entries,
    k_scale,
    v_scale,
    num_requests,
    num_rows,
    num_kv,
    scale,
    softcap,
    q_row: tl.int64,
    q_head,
    out_row: tl.int64,
    out_head,
    k_page: tl.int64,
    k_slot,
    k_head,
    v_page: tl.int64,
    v_slot,
    v_head,
    table_row: tl.int64,
    scale_head,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    LEAST: tl.constexpr,
    PADDING: tl.constexpr,  # whether this launch clears the rows of no request
    HEAD_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FP8: tl.constexpr,
    FP8_NATIVE: tl.constexpr,
    RESOLVE: tl.constexpr,
    STAGES: tl.constexpr,
):
    QUERIES: tl.constexpr = ROWS // GROUP
    request = tl.program_id(0)
    kv_head = tl.program_id(1)
    segment = tl.program_id(2)
    begin, end = row_range(query_start_loc, request, num_requests, num_rows)
    if request == num_requests:
        if PADDING:  # noqa: SIM102 - decided when compiling, the other when running
            if segment == 0:
                _clear_padding(
                    out, begin, end, kv_head, out_row, out_head, HEAD_SIZE, DIM, GROUP,
                    GROUP_PADDED,
                )  # fmt: skip
        return
    count = end - begin
    if (count == 0) | (count > QUERIES):
        return
    length = tl.load(seq_lens + request)
    per_segment = _segment_tokens(length, SEGMENTS, TILE, LEAST) if SEGMENTS > 1 else length
    if SEGMENTS > 1 and segment * per_segment >= tl.maximum(length, 1):
        return
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    index = row // GROUP
    inside = (index < count)[:, None] & (dim < HEAD_SIZE)[None, :]
    token = (begin + index).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    q_at = query + (token * q_row + head * q_head)[:, None] + dim[None, :]
    q = tl.load(q_at, mask=inside, other=0.0)
    by_score, cap, by_value = _scales(
        k_scale, v_scale, scale_head, kv_head, scale, softcap, SOFTCAP, FP8
    )
    total, largest, weight = _attend(
        q, length - count + index, segment * per_segment,
        tl.minimum((segment + 1) * per_segment, length),
        table + request.to(tl.int64) * table_row, key_cache + kv_head * k_head,
        value_cache + kv_head * v_head, entries, num_kv, k_page, k_slot, v_page, v_slot,
        by_score, cap, HEAD_SIZE, DIM, ROWS, TILE, PAGE_TOKENS, SOFTCAP, FP8, FP8_NATIVE, RESOLVE,
        STAGES,
    )  # fmt: skip
    if SEGMENTS == 1:
        total = total * (by_value / tl.where(weight == 0.0, 1.0, weight))[:, None]
        out_at = out + (token * out_row + head * out_head)[:, None] + dim[None, :]
        tl.store(out_at, total.to(out.dtype.element_ty), mask=inside)
    else:
        part = (request.to(tl.int64) * KV_HEADS + kv_head) * SEGMENTS + segment
        used = index < count
        part_at = partial + part * (ROWS * DIM) + row[:, None] * DIM + dim[None, :]
        tl.store(part_at, total * by_value, mask=used[:, None])
        tl.store(partial_stats + part * (2 * ROWS) + row, largest, mask=used)
        tl.store(partial_stats + part * (2 * ROWS) + ROWS + row, weight, mask=used)


@triton.jit
def _merge_kernel(
    out,
    partial,
    partial_stats,
    seq_lens,
    query_start_loc,
    out_row: tl.int64,
    out_head,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    LEAST: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Merge the segments of one request and KV head, one row of its tile a program."""
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    request = tl.program_id(2)
    begin = tl.load(query_start_loc + request)
    count = tl.load(query_start_loc + request + 1) - begin
    index = row // GROUP
    if (count > ROWS // GROUP) | (index >= count):
        return
    length = tl.load(seq_lens + request)
    per_segment = _segment_tokens(length, SEGMENTS, TILE, LEAST)
    segment = tl.arange(0, SEGMENTS)
    dim = tl.arange(0, DIM)
    used = segment * per_segment < length
    part = (request.to(tl.int64) * KV_HEADS + kv_head) * SEGMENTS + segment
    largest = tl.load(partial_stats + part * (2 * ROWS) + row, mask=used, other=_NO_KEY)
    weight = tl.load(partial_stats + part * (2 * ROWS) + ROWS + row, mask=used, other=0.0)
    top = tl.max(largest, axis=0)
    fade = tl.where(used, tl.exp2(largest - tl.where(top == _NO_KEY, 0.0, top)), 0.0)
    total_at = partial + (part * (ROWS * DIM) + row * DIM)[:, None] + dim[None, :]
    total = tl.load(total_at, mask=used[:, None], other=0.0)
    total = tl.sum(total * fade[:, None], axis=0)
    weight = tl.sum(weight * fade, axis=0)
    total = total / tl.where(weight == 0.0, 1.0, weight)
    head = kv_head * GROUP + row % GROUP
    out_at = out + (begin + index).to(tl.int64) * out_row + head * out_head + dim
    tl.store(out_at, total.to(out.dtype.element_ty), mask=dim < HEAD_SIZE)


class Shape(NamedTuple):
    """The tile of a launch.

    Attributes:
        rows: Query rows.
        tile: Keys of one step of the loop.
        warps: Warps of a program.
        depth: Steps of the loop whose keys and values are on their way while one is worked on.
    """

    rows: int
    tile: int
    warps: int
    depth: int


def _decode_shape(group: int, dim: int, kv_bytes: int) -> Shape:
    # 8 KiB of keys a tile: two programs fit the 99 KiB of an sm_86.
    tile = max(16, min(128, 8192 // (dim * kv_bytes)))
    return Shape(max(16, triton.next_power_of_2(group)), tile, 4, 2)


def _prefill_shape(group: int, dim: int, query_bytes: int) -> Shape:
    # The largest that neither spills on sm_80 and sm_86 nor needs more than 99 KiB.
    rows, tile = (128, 32) if dim <= 128 else (64, 32)
    if query_bytes == 4:
        rows, tile = rows // 2, 16
    return Shape(max(rows, triton.next_power_of_2(group)), tile, 8, 1)


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def decode_segments(num_requests: int, kv_heads: int, device: torch.device) -> int:
    """Return into how many segments decodes are cut, so that there are programs for all SMs."""
    wanted = triton.cdiv(4 * _processors(device), max(num_requests * kv_heads, 1))
    return 1 if wanted <= 2 else min(triton.next_power_of_2(wanted), _MAX_SEGMENTS)


def workspace_size(num_requests: int, query_heads: int, kv_heads: int, head_size: int) -> int:
    """Return how many fp32 elements split decodes of a batch need at most."""
    rows = max(16, triton.next_power_of_2(query_heads // kv_heads))
    per_row = triton.next_power_of_2(head_size) + 2
    return num_requests * kv_heads * _MAX_SEGMENTS * rows * per_row


def paged_attention(
    out: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    max_query_len: int,
    scale: float,
    *,
    pages: PageTable | None = None,
    softcap: float = 0.0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    segments: int | None = None,
    workspace: torch.Tensor | None = None,
) -> None:
    """Attend each query to the tokens of its request up to its own.

    The keys and values of the step's own tokens must have been written. Rows of ``out`` that belong
    to no request, and requests of length 0, get zeros.

    Args:
        out: ``[rows, query_heads, head_size]``; every element is written.
        query: As ``out``: fp16, bf16 or fp32, last dimension contiguous.
        key_cache: ``[pages, page_tokens, kv_heads, head_size]``, one layer of the arena's KV view:
            any strides but the last, which is 1. The type of ``query``, or fp8 (uint8 or
            float8_e4m3fn).
        value_cache: As ``key_cache``.
        block_table: int32 ``[requests, pages]``: KV handles; physical indices if ``pages`` is None.
        seq_lens: int32 ``[requests]``: tokens of each request, this step's included.
        query_start_loc: int32 ``[requests + 1]``.
        max_query_len: Upper bound of a request's queries in this step, known to the host.
        scale: Factor of the scores, 1/sqrt(head_size) for most models.
        pages: The page table.
        softcap: Soft cap of the scores, 0 for none.
        k_scale: fp32, 1 element or one a KV head, for fp8 caches.
        v_scale: As ``k_scale``.
        segments: Parts a decode is cut into (a power of two up to 32); default: by the batch.
        workspace: fp32, at least `workspace_size` elements, if decodes may be cut; default: a
            fresh one.

    Raises:
        ValueError: For a head size, page size or type that the kernels do not take.
    """
    key_cache, value_cache, is_fp8 = cache_bytes(key_cache, value_cache, k_scale, v_scale)
    _, page_tokens, kv_heads, head_size = key_cache.shape
    num_rows, query_heads, _ = query.shape
    check_supported(query.dtype, head_size, page_tokens, query_heads, kv_heads)
    num_requests = seq_lens.shape[0]
    group = query_heads // kv_heads
    dim = triton.next_power_of_2(head_size)
    entries, num_kv, _ = table_args(pages, block_table)
    decode = _decode_shape(group, dim, key_cache.element_size())
    prefill = _prefill_shape(group, dim, query.element_size())
    decode_queries = decode.rows // group
    inputs = (
        query,
        key_cache,
        value_cache,
        block_table,
        seq_lens,
        query_start_loc,
        entries,
        k_scale if is_fp8 else seq_lens,
        v_scale if is_fp8 else seq_lens,
        num_requests,
        num_rows,
        num_kv,
        scale,
        float(softcap),
        *query.stride()[:2],
        *out.stride()[:2],
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        block_table.stride(0),
        scale_stride(k_scale),
    )
    common = {
        "GROUP": group,
        "GROUP_PADDED": triton.next_power_of_2(group),
        "HEAD_SIZE": head_size,
        "DIM": dim,
        "PAGE_TOKENS": page_tokens,
        "SOFTCAP": softcap > 0,
        "FP8": is_fp8,
        "FP8_NATIVE": fp8.has_fp8(query.device),
        "RESOLVE": pages is not None,
    }
    has_prefills = max_query_len > decode_queries
    if has_prefills:
        _prefill_kernel[(num_blocks(num_rows, num_requests, prefill.rows // group), kv_heads)](
            out,
            *inputs,
            **common,
            SKIP=decode_queries,
            **_launch_options(prefill, pages is not None),
        )
    if segments is None:
        segments = decode_segments(num_requests, kv_heads, query.device)
    partial = partial_stats = seq_lens
    if segments > 1:
        if workspace is None:
            size = workspace_size(num_requests, query_heads, kv_heads, head_size)
            workspace = torch.empty(size, dtype=torch.float32, device=query.device)
        size = num_requests * kv_heads * segments * decode.rows
        partial, partial_stats = workspace[: size * dim], workspace[size * dim :]
    _decode_kernel[(num_requests + 1, kv_heads, segments)](
        out,
        partial,
        partial_stats,
        *inputs,
        **common,
        KV_HEADS=kv_heads,
        SEGMENTS=segments,
        LEAST=_SEGMENT_TILES,
        PADDING=not has_prefills,
        **_launch_options(decode, pages is not None),
    )
    if segments > 1 and num_requests:
        _merge_kernel[(decode.rows, kv_heads, num_requests)](
            out,
            partial,
            partial_stats,
            seq_lens,
            query_start_loc,
            *out.stride()[:2],
            GROUP=group,
            KV_HEADS=kv_heads,
            SEGMENTS=segments,
            LEAST=_SEGMENT_TILES,
            HEAD_SIZE=head_size,
            DIM=dim,
            ROWS=decode.rows,
            TILE=decode.tile,
            num_warps=4,
        )


def _launch_options(shape: Shape, resolve: bool) -> dict[str, int]:
    # Triton spreads the stages of a loop over its chain of dependent loads (block table, page
    # table, keys). Fewer stages than this and keys would be waited for as soon as they are asked.
    chain = 3 if resolve else 2
    stages = chain * shape.depth + 1
    return {
        "ROWS": shape.rows,
        "TILE": shape.tile,
        "STAGES": stages,
        "num_warps": shape.warps,
        "num_stages": stages,
    }


def check_supported(
    dtype: torch.dtype, head_size: int, page_tokens: int, query_heads: int, kv_heads: int
) -> None:
    """Raise ValueError naming what the attention kernels do not take, and what to set instead."""
    instead = "set kernels to 'resolved' to use vLLM's attention"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype {dtype} is not float16, bfloat16 or float32; {instead}")
    if not 16 <= head_size <= 256 or head_size % 8:
        raise ValueError(f"head size {head_size} is not a multiple of 8 in 16..256; {instead}")
    if page_tokens < 1 or page_tokens & (page_tokens - 1):
        raise ValueError(f"page_tokens {page_tokens} is not a power of two; {instead}")
    if query_heads % kv_heads:
        raise ValueError(f"{query_heads} query heads do not divide into {kv_heads} KV heads")
