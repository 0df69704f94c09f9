"""Attention over contiguous KV against pages of 16 tokens, with vLLM's kernels unchanged.

Contiguous is vAttention's layout for all layers at once, ``[slot][token][layer][head][K|V]``: what
one token holds in all layers lies together, so that one chunk of physical memory backs a range of
tokens and a layer's keys are strided. Pages are AVMP's, ``[page][layer][head][token][K|V]``, in
random order. Both are views of the same bytes.

The question is what a kernel gains that need not look a page up, and what it loses to the stride,
which grows with the number of layers. Imports vLLM, whose compiled operations need CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from avmp_vllm.bench.tables import table

PAGE_TOKENS = 16
LAYERS = (1, 2, 4, 10, 32)
#: Query heads, KV heads and their size: of an attention layer of Jamba Reasoning 3B and alike.
HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128
#: Tokens of a request in all, and of its query in this step.
BATCHES = {"prefill 4 x 2k": (4, 2048, 2048), "decode 64 x 4k": (64, 4096, 1)}
#: Both have a launch over pages and one over contiguous memory.
KERNELS = ("flash", "triton")
#: Two kernels agree if their outputs differ by no more, in bf16.
TOLERANCE = 2e-2

Launch = Callable[[], torch.Tensor]


class Views(NamedTuple):
    """One layer's cache, seen in both ways.

    Attributes:
        paged: Keys and values ``[pages, page_tokens, kv_heads, head_size]``.
        contiguous: The same ``[slots, tokens, kv_heads, head_size]``.
    """

    paged: tuple[torch.Tensor, torch.Tensor]
    contiguous: tuple[torch.Tensor, torch.Tensor]


def views(arena: torch.Tensor, slots: int, tokens: int, layers: int, layer: int) -> Views:
    """Views of a layer over an arena of ``slots * tokens`` tokens of ``layers`` layers.

    Args:
        arena: One dimension, of ``slots * tokens * layers * KV_HEADS * 2 * HEAD_SIZE`` elements.
        slots: Requests.
        tokens: Of a slot, a multiple of `PAGE_TOKENS`.
        layers: That a page, or a token's place, holds.
        layer: The one looked at.
    """
    pages = slots * tokens // PAGE_TOKENS
    paged = arena.view(pages, layers, KV_HEADS, PAGE_TOKENS, 2 * HEAD_SIZE)[:, layer]
    contiguous = arena.view(slots, tokens, layers, KV_HEADS, 2 * HEAD_SIZE)[:, :, layer]
    return Views(
        tuple(paged.transpose(1, 2).split(HEAD_SIZE, dim=-1)),
        tuple(contiguous.split(HEAD_SIZE, dim=-1)),
    )


def trivial_pages(cache: torch.Tensor) -> torch.Tensor:
    """A contiguous cache as a paged one, whose page ``slot * per_slot + j`` is the slot's j-th."""
    slots, tokens = cache.shape[:2]
    per_slot = tokens // PAGE_TOKENS
    shape = (slots * per_slot, PAGE_TOKENS, *cache.shape[2:])
    return cache.as_strided(shape, (PAGE_TOKENS * cache.stride(1), *cache.stride()[1:]))


def flash_contiguous(given: dict[str, Any], keys: torch.Tensor, values: torch.Tensor) -> Launch:
    """FlashAttention over slots, without a block table.

    vLLM's Python wrapper asserts against lengths beside offsets, and the device code takes both,
    so its operations are called themselves.
    """
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    from avmp_vllm.bench.stock_kernels import flash_schedule

    query, lengths, starts = given["query"], given["seq_lens"], given["query_start_loc"]
    most_queries, longest, scale = given["max_queries"], given["max_length"], given["scale"]
    slots = given["slots"]
    out = torch.empty_like(query)
    if get_flash_attn_version(head_size=HEAD_SIZE) == 3:
        metadata, splits = flash_schedule(given, KV_HEADS, HEAD_SIZE, None)

        def launch() -> torch.Tensor:
            torch.ops._vllm_fa3_C.fwd(
                query, keys, values, None, None, None, out, starts, None, None, None, lengths,
                most_queries, longest, None, slots, None, None, None, None, None, None, None,
                scale, True, -1, -1, 0.0, True, metadata, splits, None, 0, None, 1, 0, None,
            )  # fmt: skip
            return out
    else:
        per_slot = keys.shape[1]
        flat = [one.flatten(0, 1) for one in (keys, values)]
        offsets = torch.cat([slots, slots[-1:] + 1]) * per_slot

        def launch() -> torch.Tensor:
            torch.ops._vllm_fa2_C.varlen_fwd(
                query, *flat, out, starts, offsets, lengths, None, None, None, most_queries,
                longest, 0.0, scale, False, True, -1, -1, 0.0, False, 0, None,
            )  # fmt: skip
            return out

    return launch


def launches(arena: torch.Tensor, batch: str, layers: int) -> dict[str, Launch]:
    """The four kernels of a batch, over one arena."""
    from avmp_vllm.bench import stock_kernels

    slots, tokens, queries = BATCHES[batch]
    device = arena.device
    paged, contiguous = views(arena, slots, tokens, layers, layers // 2)
    per_slot = tokens // PAGE_TOKENS
    count = slots * per_slot
    given = {
        "query": torch.randn(slots * queries, HEADS, HEAD_SIZE, device=device, dtype=arena.dtype),
        "seq_lens": torch.full((slots,), tokens, dtype=torch.int32, device=device),
        "query_start_loc": torch.arange(slots + 1, dtype=torch.int32, device=device) * queries,
        "slots": torch.randperm(slots, device=device).int(),
        "max_queries": queries,
        "max_length": tokens,
        "scale": HEAD_SIZE**-0.5,
        "softcap": 0.0,
    }
    scattered = torch.randperm(count, device=device).int().view(slots, per_slot)
    trivial = torch.arange(count, device=device).int().view(slots, per_slot)[given["slots"].long()]
    on_pages = given | {"key_cache": paged[0], "value_cache": paged[1], "table": scattered}
    on_slots = given | {
        "key_cache": trivial_pages(contiguous[0]),
        "value_cache": trivial_pages(contiguous[1]),
        "table": trivial.contiguous(),
    }
    found = {
        "triton, pages": stock_kernels.attention(on_pages),
        "triton, contiguous": stock_kernels.attention(on_slots),
    }
    if stock_kernels.flash_missing() is None:
        found["flash, pages"] = stock_kernels.flash_attention(on_pages)
        found["flash, contiguous"] = flash_contiguous(given, *contiguous)
        off = (found["flash, contiguous"]() - found["triton, contiguous"]()).abs().max().item()
        if not off <= TOLERANCE:
            raise ValueError(f"FlashAttention over slots is off by {off:.3g}")
    return found


def row(batch: str, layers: int, milliseconds: int) -> dict[str, Any]:
    """Seconds of each kernel over an arena, or under ``error`` why there are none."""
    from avmp_kernels.measure import time_launch

    slots, tokens, _ = BATCHES[batch]
    elements = slots * tokens * layers * KV_HEADS * 2 * HEAD_SIZE
    found: dict[str, Any] = {"batch": batch, "layers": layers}
    if 2 * elements > 0.9 * torch.cuda.mem_get_info()[0]:
        return found | {"error": f"{2 * elements / 2**30:.1f} GiB are not free"}
    arena = torch.empty(elements, dtype=torch.bfloat16, device="cuda").normal_()
    try:
        timed = launches(arena, batch, layers)
        return found | {name: time_launch(one, milliseconds).median for name, one in timed.items()}
    except Exception as error:
        # A kernel that refuses the layout is a finding, not the end of the run.
        return found | {"error": f"{type(error).__name__}: {error}"}


def measure(milliseconds: int) -> dict[str, Any]:
    """The card and each batch's `row` by layers; or under ``error`` why there are none.

    Args:
        milliseconds: Spent on each kernel.
    """
    if not torch.cuda.is_available():
        return {"error": "torch sees no CUDA device"}
    from avmp_vllm.bench import card, stock_kernels

    if missing := stock_kernels.available():
        return {"error": missing}
    found = []
    for batch in BATCHES:
        for layers in LAYERS:
            found.append(row(batch, layers, milliseconds))
            torch.cuda.empty_cache()
            print(f"  {'  '.join(_cells(found[-1]))}", flush=True)
    return {**card.describe(torch.device("cuda")), "rows": found}


def _cells(found: dict[str, Any]) -> list[str]:
    """Microseconds over pages, and contiguous to pages, of both kernels."""
    cells = [found["batch"], str(found["layers"])]
    if "error" in found:
        return [*cells, found["error"], *[""] * (2 * len(KERNELS) - 1)]
    for kernel in KERNELS:
        pages, slots = found.get(f"{kernel}, pages"), found.get(f"{kernel}, contiguous")
        cells += ["-", "-"] if pages is None else [f"{pages * 1e6:.1f}", f"{slots / pages:.3f}"]
    return cells


def report(found: dict[str, Any]) -> str:
    """The table of what was measured."""
    if "error" in found:
        return f"attention over contiguous memory: {found['error']}; not measured"
    head = ["batch", "layers"]
    for kernel in KERNELS:
        head += [f"{kernel}: us over pages", "contiguous / pages"]
    return table(head, [_cells(one) for one in found["rows"]])
