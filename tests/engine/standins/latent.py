"""Latent attention (MLA) over a paged cache, prefills and decodes alike.

vLLM's backend for CPUs reads one head size, takes pages for packed where it writes, and turns
chunked prefill and prefix caching off. This one keeps its layers, specs, tables and slots.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention.mla_attention import MLAAttention, MLACommonBackend
from vllm.models.kimi_k3.nvidia.mla import MultiHeadLatentAttention
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backend import AttentionMetadataBuilder, MultipleOf
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl
from vllm.v1.attention.backends.registry import _ATTN_OVERRIDES, AttentionBackendEnum


@dataclass
class LatentMetadata:
    """Of a batch: its pages, and where its tokens begin."""

    pages: torch.Tensor
    seq_lens: torch.Tensor
    starts: torch.Tensor
    num_actual_tokens: int
    num_decode_tokens: int = 0  # vLLM asks, for ranks that share a prompt


class LatentBuilder(AttentionMetadataBuilder[LatentMetadata]):
    """Reads the group's own block table."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> LatentMetadata:
        """What a step's batch is."""
        given = common_attn_metadata
        return LatentMetadata(
            given.block_table_tensor,
            given.seq_lens,
            given.query_start_loc,
            given.num_actual_tokens,
        )


class LatentImpl(CPUMLAImpl):
    """Writes by page and offset."""

    def do_kv_cache_update(
        self,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        *_: Any,
    ) -> None:
        """Put the step's latents into their slots."""
        if kv_cache.numel():
            write(kv_cache, slot_mapping, kv_c_normed, k_pe)


class LatentBackend(MLACommonBackend):
    """Any head size, any page of a multiple of 16 tokens."""

    @staticmethod
    def get_name() -> str:
        """In place of the stock one."""
        return "CPU_MLA"

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Any."""
        return []

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Pages are read by index."""
        return [MultipleOf(16)]

    @staticmethod
    def get_impl_cls() -> type[LatentImpl]:
        """The writer."""
        return LatentImpl

    @staticmethod
    def get_builder_cls() -> type[LatentBuilder]:
        """The reader of tables."""
        return LatentBuilder


def write(
    cache: torch.Tensor, slots: torch.Tensor, latents: torch.Tensor, k_pe: torch.Tensor
) -> None:
    """Put latents [tokens, rank] and keys [tokens, 1, rotary] into a cache [pages, page, both]."""
    slots = slots[: len(latents)].long()
    given = slots >= 0
    slots, rows = slots[given], torch.cat([latents, k_pe.flatten(1)], dim=1)[given]
    page = cache.shape[1]
    cache[slots // page, slots % page] = rows


def attend(
    layer: Any, q: torch.Tensor, cache: torch.Tensor, metadata: LatentMetadata, out: torch.Tensor
) -> None:
    """Attention of queries [tokens, heads, channels] over the pages of their requests.

    Keys are not expanded: the queries are brought to the latents instead, as at a decode.
    """
    heads, rank = q.shape[1], layer.kv_lora_rank
    nope = layer.qk_nope_head_dim
    latent_q = torch.einsum("thp,hpl->thl", q[..., :nope], layer.W_UK_T)
    q = torch.cat([latent_q, q[..., nope:]], dim=-1)
    starts, page = metadata.starts.tolist(), cache.shape[1]
    for index, length in enumerate(metadata.seq_lens.tolist()):
        begin, end = starts[index], starts[index + 1]
        if begin == end:
            continue
        pages = metadata.pages[index, : -(-length // page)].long()
        seen = cache[pages].flatten(0, 1)[:length]
        scores = torch.einsum("thl,sl->ths", q[begin:end], seen) * layer.scale
        at = torch.arange(length - (end - begin), length)
        later = torch.arange(length) > at[:, None]
        weights = scores.masked_fill(later[:, None], float("-inf")).softmax(-1)
        found = torch.einsum("ths,sl->thl", weights, seen[:, :rank])
        values = torch.einsum("thl,hlv->thv", found, layer.W_UV)
        out[begin:end] = values.reshape(end - begin, heads * layer.v_head_dim)


def kimi_attention(
    layer: Any,
    positions: torch.Tensor,
    q: torch.Tensor,
    kv_c_normed: torch.Tensor,
    k_pe: torch.Tensor,
    attn_out: torch.Tensor,
) -> None:
    """Take the place of ``MultiHeadLatentAttention._attention``."""
    context = get_forward_context()
    if context.attn_metadata is None:
        attn_out.zero_()
        return
    metadata = context.attn_metadata[layer.layer_name]
    count = metadata.num_actual_tokens
    slots = context.slot_mapping[layer.layer_name][:count]
    write(layer.kv_cache, slots, kv_c_normed[:count], k_pe[:count])
    attend(layer, q[:count], layer.kv_cache, metadata, attn_out)


def forward_impl(
    layer: Any,
    q: torch.Tensor,
    k_c_normed: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    attn_metadata: LatentMetadata | None,
    output: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """Take the place of ``MLAAttention.forward_impl``."""
    if attn_metadata is None:
        return output.fill_(0)
    count = attn_metadata.num_actual_tokens
    attend(layer, q[:count], kv_cache, attn_metadata, output)
    return output


def keeping_weights(stock: Callable[..., None]) -> Callable[..., None]:
    """Wrap the constructor of Kimi's layer: on CPU, the weights that it splits must stay as loaded.

    vLLM's other latent layer asks for the same.
    """

    def init(layer: Any, *args: Any, **kwargs: Any) -> None:
        stock(layer, *args, **kwargs)
        layer.kv_b_proj._cpu_skip_gemm_dispatch = True

    return init


def keeping_what_was_asked(stock: Callable[[Any], None]) -> classmethod:
    """Wrap the check that turns chunked prefill and prefix caching off for MLA."""

    def check(cls: type, vllm_config: Any) -> None:
        scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
        chunked, tokens = scheduler.enable_chunked_prefill, scheduler.max_num_batched_tokens
        caching, page = cache.enable_prefix_caching, cache.block_size
        stock(vllm_config)
        scheduler.enable_chunked_prefill, scheduler.max_num_batched_tokens = chunked, tokens
        cache.enable_prefix_caching, cache.block_size = caching, page

    return classmethod(check)


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Take the place of vLLM's backend for CPUs."""
    place = {AttentionBackendEnum.CPU_MLA: f"{__name__}.LatentBackend"}
    stock = CpuPlatform.check_and_update_config
    init = keeping_weights(MultiHeadLatentAttention.__init__)
    with (
        mock.patch.dict(_ATTN_OVERRIDES, place),
        mock.patch.object(torch.cpu, "_is_amx_tile_supported", return_value=False),
        mock.patch.object(CpuPlatform, "check_and_update_config", keeping_what_was_asked(stock)),
        mock.patch.object(MultiHeadLatentAttention, "__init__", init),
        mock.patch.object(MultiHeadLatentAttention, "_attention", kimi_attention),
        mock.patch.object(MLAAttention, "forward_impl", forward_impl),
    ):
        yield
