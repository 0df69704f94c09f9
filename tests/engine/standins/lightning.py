"""Lightning attention: linear attention with a decay for each head."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from vllm.model_executor.layers.mamba.linear import bailing_linear_attn
from vllm.model_executor.layers.mamba.linear.bailing_linear_attn import (
    BailingGroupRMSNormGate,
    BailingMoELinearAttention,
)


def attend(
    layer: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_cache: torch.Tensor,
    state_indices_tensor: torch.Tensor,
    attn_metadata: Any,
) -> torch.Tensor:
    """Decodes and prefills of a batch; tensors are [tokens, heads, channels].

    vLLM clears the state of a sequence that begins before it calls this.
    """
    keep = torch.exp(-layer.tp_slope.float()).view(-1, 1, 1)
    starts, slots = attn_metadata.query_start_loc.tolist(), state_indices_tensor.tolist()
    result = torch.empty_like(q)
    for index in range(attn_metadata.num_decodes + attn_metadata.num_prefills):
        state = kv_cache[slots[index]].clone()
        for at in range(starts[index], starts[index + 1]):
            state = state * keep + k[at][..., None] * v[at][:, None]
            result[at] = torch.einsum("hk,hkv->hv", q[at], state)
        kv_cache[slots[index]].copy_(state)
    return result.flatten(1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *_: Any, eps: float, **__: Any) -> torch.Tensor:
    """Take the place of ``layernorm_fn``, over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def gated_rms_norm(layer: Any, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    """Take the place of the norm that follows, whose gate comes afterwards."""
    assert gate is None, "these checkpoints norm in one group, and gate outside"
    return rms_norm(x, layer.weight, eps=layer.eps)


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Take the place of both Triton paths, and of the norms around them."""
    with (
        mock.patch.object(BailingMoELinearAttention, "_prefill_and_mix_infer", attend),
        mock.patch.object(BailingMoELinearAttention, "_decode_infer", attend),
        mock.patch.object(bailing_linear_attn, "layernorm_fn", rms_norm),
        mock.patch.object(BailingGroupRMSNormGate, "forward", gated_rms_norm),
    ):
        yield
