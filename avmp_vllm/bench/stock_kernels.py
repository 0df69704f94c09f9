"""vLLM's own kernels on the inputs of AVMP's, for `avmp bench kernels`.

They get physical indices and the same strided views of the same arena. Imports vLLM, whose compiled
operations need CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Inputs = dict[str, Any]

#: The largest batch, in tokens, of which vLLM captures a graph unless told otherwise.
LARGEST_GRAPH = 512


def available() -> str | None:
    """Return why stock kernels cannot be run here, or None if they can."""
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        return f"vLLM cannot be imported: {error}"
    return None if current_platform.is_cuda() else "the installed vLLM is not its CUDA build"


def resolve(given: Inputs) -> Callable[[], object]:
    """Gather and slot mapping of Model Runner V2: two launches."""
    from vllm.v1.worker.gpu.block_table import BlockTables

    kv, ssm, rows = given["kv"], given["ssm"], given["rows"]
    requests = kv.shape[0]
    tables = BlockTables(
        [given["page_tokens"], given["state_tokens"]],
        requests,
        requests,
        [kv.shape[1], ssm.shape[1]],
        kv.device,
        slot_mapping_enabled=[True, False],
    )
    for group, table in enumerate((kv, ssm)):
        tables.block_tables[group].gpu.copy_(table)
        tables.num_blocks.np[group] = table.shape[1]
    tables.num_blocks.copy_to_uva()

    def launch() -> None:
        tables.gather_block_tables(rows, requests)
        tables.compute_slot_mappings(rows, given["starts"], given["positions"], requests)

    return launch


def attention(given: Inputs) -> Callable[[], torch.Tensor]:
    """The Triton backend's kernel, split as that backend splits (16 segments for few requests)."""
    from vllm.v1.attention.backends.triton_attn import (
        MIN_LAUNCH_GRID_SIZE_2D,
        NUM_PAR_SOFTMAX_SEGMENTS,
    )
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    query, keys = given["query"], given["key_cache"]
    requests, heads, head_size = given["seq_lens"].shape[0], query.shape[1], query.shape[2]
    padded = 1 << (head_size - 1).bit_length()
    threshold = MIN_LAUNCH_GRID_SIZE_2D // keys.shape[2]
    shape = (max(threshold, requests), heads, NUM_PAR_SOFTMAX_SEGMENTS)
    partial = torch.empty(*shape, padded, device=query.device)
    largest, weight = torch.empty(2, *shape, device=query.device)
    out = torch.empty_like(query)

    def launch() -> torch.Tensor:
        unified_attention(
            q=query,
            k=keys,
            v=given["value_cache"],
            out=out,
            cu_seqlens_q=given["query_start_loc"],
            max_seqlen_q=given["max_queries"],
            seqused_k=given["seq_lens"],
            max_seqlen_k=given["max_length"],
            softmax_scale=given["scale"],
            causal=True,
            window_size=(-1, -1),
            block_table=given["table"],
            softcap=given["softcap"],
            q_descale=None,
            k_descale=None,
            v_descale=None,
            seq_threshold_3D=threshold,
            num_par_softmax_segments=NUM_PAR_SOFTMAX_SEGMENTS,
            softmax_segm_output=partial,
            softmax_segm_max=largest,
            softmax_segm_expsum=weight,
        )
        return out

    return launch


def flash_missing() -> str | None:
    """Return why FlashAttention cannot be run here, or None if it can."""
    try:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
        from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func  # noqa: F401

        version = get_flash_attn_version()
    except (ImportError, OSError, AssertionError, AttributeError) as error:
        first = (str(error) or "no such device").splitlines()[0]
        return f"vLLM's FlashAttention cannot be used: {type(error).__name__}: {first}"
    return None if version else "no version of vLLM's FlashAttention runs on this card"


def flash_schedule(
    given: Inputs, kv_heads: int, head_size: int, page_tokens: int | None
) -> tuple[torch.Tensor, int]:
    """FlashAttention 3's schedule of a batch, and the most splits.

    It is made once, since vLLM makes it once a step for all layers; batches that a CUDA graph may
    hold get that backend's bound on splits.

    Args:
        given: The batch.
        kv_heads: Heads of the cache.
        head_size: Of keys and values.
        page_tokens: None for a cache without pages.
    """
    from vllm.config.attention import AttentionConfig
    from vllm.vllm_flash_attn.flash_attn_interface import get_scheduler_metadata

    query, splits = given["query"], 0
    if query.shape[0] <= LARGEST_GRAPH:
        splits = AttentionConfig().flash_attn_max_num_splits_for_cuda_graph
    metadata = get_scheduler_metadata(
        batch_size=given["seq_lens"].shape[0],
        max_seqlen_q=given["max_queries"],
        max_seqlen_k=given["max_length"],
        num_heads_q=query.shape[1],
        num_heads_kv=kv_heads,
        headdim=head_size,
        cache_seqlens=given["seq_lens"],
        qkv_dtype=query.dtype,
        cu_seqlens_q=given["query_start_loc"],
        page_size=page_tokens,
        causal=True,
        window_size=(-1, -1),
        num_splits=splits,
    )
    return metadata, splits


def flash_attention(given: Inputs) -> Callable[[], torch.Tensor]:
    """FlashAttention, over the same strided views, as vLLM's backend launches it.

    Raises:
        ValueError: Its output is not that of the Triton backend: the figure would mean nothing.
    """
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

    query, keys = given["query"], given["key_cache"]
    page_tokens, kv_heads, head_size = keys.shape[1:]
    version = get_flash_attn_version(head_size=head_size, kv_cache_block_size=page_tokens)
    metadata, splits = None, 0
    if version == 3:
        metadata, splits = flash_schedule(given, kv_heads, head_size, page_tokens)
    out = torch.empty_like(query)

    def launch() -> torch.Tensor:
        flash_attn_varlen_func(
            q=query,
            k=keys,
            v=given["value_cache"],
            out=out,
            cu_seqlens_q=given["query_start_loc"],
            max_seqlen_q=given["max_queries"],
            seqused_k=given["seq_lens"],
            max_seqlen_k=given["max_length"],
            softmax_scale=given["scale"],
            causal=True,
            window_size=[-1, -1],
            block_table=given["table"],
            softcap=given["softcap"],
            scheduler_metadata=metadata,
            fa_version=version,
            num_splits=splits,
        )
        return out

    found, wanted = launch().float(), attention(given)().float()
    if not torch.allclose(found, wanted, atol=2e-2, rtol=2e-2):
        off = (found - wanted).abs().max().item()
        raise ValueError(f"other results than the Triton backend's, by up to {off:.3g}")
    return launch


def kv_write(given: Inputs) -> Callable[[], object]:
    """The Triton backend's reshape-and-cache."""
    from vllm.v1.attention.ops.triton_reshape_and_cache_flash import (
        triton_reshape_and_cache_flash,
    )

    one = torch.ones((), device=given["key"].device)
    arguments = [given[name] for name in ("key", "value", "keys", "values", "slots")]
    return lambda: triton_reshape_and_cache_flash(*arguments, "auto", one, one)


def state_update(given: Inputs) -> Callable[[], object]:
    """vLLM's selective state update."""
    from vllm.model_executor.layers.mamba.ops.mamba_ssm import selective_state_update

    out = torch.empty_like(given["x"])
    arguments = [given[name] for name in ("states", "x", "dt", "A", "B", "C", "D", "dt_bias")]
    return lambda: selective_state_update(
        *arguments,
        z=given["z"],
        dt_softplus=True,
        state_batch_indices=given["physical"],
        out=out,
    )


def conv1d_update(given: Inputs) -> Callable[[], object]:
    """vLLM's causal conv1d for decodes, in place."""
    from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_update

    return lambda: causal_conv1d_update(
        given["x"],
        given["states"],
        given["weight"],
        given["bias"],
        "silu",
        conv_state_indices=given["physical"],
    )


def selective_scan(given: Inputs) -> Callable[[], object]:
    """vLLM's C++ selective scan, on inputs in the layout it wants (channels first), in place."""
    from vllm.model_executor.layers.mamba.ops.mamba_ssm import selective_scan_fn

    x, dt, B, C, z = (given[name].T.contiguous() for name in ("x", "dt", "B", "C", "z"))
    return lambda: selective_scan_fn(
        x,
        given["states"],
        dt,
        given["A"],
        B,
        C,
        given["D"],
        z,
        given["dt_bias"],
        delta_softplus=True,
        cache_indices=given["physical"],
        has_initial_state=given["has_initial"],
        query_start_loc=given["starts"],
    )


STOCK: dict[str, Callable[[Inputs], Callable[[], object]]] = {
    "resolve": resolve,
    "attention": attention,
    "flash_attention": flash_attention,
    "kv_write": kv_write,
    "state_update": state_update,
    "conv1d_update": conv1d_update,
    "selective_scan": selective_scan,
}

#: Other kernels of vLLM's for the same work, by the key of the first: column -> key.
OTHERS = {"attention": {"flash": "flash_attention"}}
