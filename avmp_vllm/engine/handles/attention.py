"""Attention that resolves KV handles inside of its kernels: a backend for vLLM's registry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from avmp_kernels.attention import check_supported, paged_attention
from avmp_kernels.kv_write import kv_write
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from avmp_vllm.engine.entry.config import ConfigError

if TYPE_CHECKING:
    from avmp_kernels.pages import PageTable


class HandleAttentionBackend(AttentionBackend):
    """Full causal attention over handles."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = [
        "auto",
        "float16",
        "bfloat16",
        "fp8",
        "fp8_e4m3",
    ]
    forward_includes_kv_cache_update: bool = False

    @staticmethod
    def get_name() -> str:
        """Name of vLLM's slot for backends from elsewhere."""
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Pages of 16 tokens and more."""
        return [MultipleOf(16)]

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        """Of these, the powers of two."""
        return super().supports_block_size(block_size) and (
            block_size is None or block_size & (block_size - 1) == 0
        )

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """What the kernels take."""
        return 16 <= head_size <= 256 and head_size % 8 == 0

    @classmethod
    def validate_configuration(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: str | None,
        block_size: int | None,
        **others: Any,
    ) -> list[str]:
        """vLLM's reasons why the kernels cannot serve a layer, with the values and the way out."""
        values = {
            "head_size": head_size,
            "dtype": dtype,
            "kv_cache_dtype": kv_cache_dtype,
            "block_size": block_size,
        }
        reasons = super().validate_configuration(**values, **{"device_capability": None, **others})
        for index, reason in enumerate(reasons):
            name = reason.split()[0]
            value = f"{name} = {values[name]}: " if name in values else ""
            reasons[index] = f"{value}{reason}; set kernels to 'resolved' to use vLLM's attention"
        return reasons

    @staticmethod
    def get_impl_cls() -> type[HandleAttentionImpl]:
        """One object a layer."""
        return HandleAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[HandleAttentionBuilder]:
        """One object a cache group."""
        return HandleAttentionBuilder


@dataclass
class HandleAttentionMetadata(AttentionMetadata):
    """A step's batch, as all layers see it; handles in ``block_table``."""

    max_query_len: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor


class HandleAttentionBuilder(AttentionMetadataBuilder[HandleAttentionMetadata]):
    """Passes vLLM's persistent buffers on, so that captured graphs read them."""

    # A captured launch decides by the longest query whether there are prefills.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # abstract in vLLM, for builders to think about

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> HandleAttentionMetadata:
        """Describe a step."""
        common = common_attn_metadata
        return HandleAttentionMetadata(
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc[: common.num_reqs + 1],
            seq_lens=common.seq_lens[: common.num_reqs],
            block_table=common.block_table_tensor[: common.num_reqs],
        )


class HandleAttentionImpl(AttentionImpl):
    """One layer.

    Attributes:
        pages: The worker's page table; set once the cache exists.
    """

    pages: PageTable | None = None

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        for what, there in (
            ("ALiBi slopes", alibi_slopes is not None),
            ("a sliding window", sliding_window is not None),
            ("attention sinks", sinks is not None),
            (f"{attn_type} attention", attn_type != AttentionType.DECODER),
        ):
            if there:
                raise ConfigError(
                    f"kernels = 'handles': the model has {what}, which AVMP's attention kernels do "
                    "not know; set kernels to 'resolved'"
                )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.softcap = logits_soft_cap or 0.0
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self._fp8 = is_quantized_kv_cache(kv_cache_dtype)

    def bind(self, pages: PageTable, dtype: torch.dtype, page_tokens: int) -> None:
        """Take the page table, after checking that the kernels take this layer.

        Raises:
            ValueError: Naming what they do not take, and the setting that works.
        """
        check_supported(dtype, self.head_size, page_tokens, self.num_heads, self.num_kv_heads)
        self.pages = pages

    def _caches(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views ``[pages, page_tokens, kv_heads, head_size]`` of vLLM's cache of a layer."""
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        if self._fp8:
            keys, values = keys.view(torch.uint8), values.view(torch.uint8)
        return keys, values

    def _scales(self, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {"k_scale": layer._k_scale, "v_scale": layer._v_scale} if self._fp8 else {}

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write the step's keys and values; slots are ``handle * page_tokens + offset``."""
        assert self.pages is not None
        kv_write(
            key,
            value,
            *self._caches(kv_cache),
            slot_mapping[: key.shape[0]],
            pages=self.pages,
            **self._scales(layer),
        )

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: HandleAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend; ``query`` and ``output`` are ``[tokens, heads, head_size]``, padding included."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused output quantization; set kernels to 'resolved'")
        if attn_metadata is None:  # vLLM's profile run
            return output.fill_(0)
        assert self.pages is not None
        paged_attention(
            output,
            query,
            *self._caches(kv_cache),
            attn_metadata.block_table,
            attn_metadata.seq_lens,
            attn_metadata.query_start_loc,
            attn_metadata.max_query_len,
            self.scale,
            pages=self.pages,
            softcap=self.softcap,
            **self._scales(layer),
        )
        return output
