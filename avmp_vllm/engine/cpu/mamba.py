"""Mamba layers on vLLM's CPU build, as out-of-tree layers.

Mamba-1 does not run there in vLLM 0.32: ``selective_scan_fwd`` has no CPU kernel, the CPU
``selective_state_update`` does not take a state without a head dimension, the layer hands a
transposed tensor to a GEMM that wants a contiguous one, and in bf16 it reads convolution weights
that were packed for other kernels on CPUs with AVX512-BF16. ``CpuMambaMixer`` keeps vLLM's
projections, convolutions, metadata and state layout, and brings its own scan.

Mamba-2 runs, but with prefix caching it offers to save a state in the middle of a prefill, which
needs the states of all chunks; the CPU scan returns the last one only, and the first prompt longer
than a block ends the engine. ``CpuMambaMixer2`` withdraws the offer.

Once the stock layers run on CPU, this file can go.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
from vllm.model_executor.layers.mamba.mamba_mixer import MambaMixer
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.model_executor.layers.mamba.ops.causal_conv1d import (
    causal_conv1d_fn,
    causal_conv1d_update,
)
from vllm.platforms import current_platform
from vllm.v1.attention.backends.mamba1_attn import Mamba1AttentionMetadata
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID
from vllm.v1.kv_cache_interface import KVCacheSpec, MambaSpec

from avmp_vllm.engine.cpu.scan import selective_scan


def register() -> None:
    """Have vLLM build the layers of this file instead of its own, if the platform is the CPU.

    Does nothing on other platforms, when called again, or for a layer that was replaced already.
    """
    if not current_platform.is_cpu():
        return
    for stock, layer in ((MambaMixer, CpuMambaMixer), (MambaMixer2, CpuMambaMixer2)):
        if stock.__name__ not in op_registry_oot:
            PluggableLayer.register_oot(layer, name=stock.__name__)


class CpuMambaMixer(MambaMixer):
    """vLLM's ``MambaMixer`` with the forward pass of the CPU.

    All tensors are [tokens, channels] with the decodes first, as vLLM orders a batch.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A view taken now keeps the weights [channels, kernel] as they are loaded. vLLM's Mamba-2
        # layer does the same; packing later gives `conv1d.weight` other data.
        weights = self.conv1d.weight.squeeze(1)
        self.register_buffer("conv_weights", weights.detach(), persistent=False)

    def forward_impl(self, hidden_states: torch.Tensor, output: torch.Tensor) -> None:
        """Write the layer's result for ``hidden_states`` [tokens, hidden] into ``output``."""
        metadata = (get_forward_context().attn_metadata or {}).get(self.prefix)
        if metadata is None:  # vLLM's profile run: no state to work on
            output.zero_()
            return
        decodes, prefills = metadata.num_decode_tokens, metadata.num_prefill_tokens
        if decodes != metadata.num_decodes:
            raise NotImplementedError(
                f"{self.prefix}: {decodes} tokens for {metadata.num_decodes} decodes. Speculative "
                "decoding does not work with Mamba-1 layers on CPU; start without "
                "--speculative-config"
            )
        tokens = decodes + prefills
        x, gate = self.in_proj(hidden_states[:tokens])[0].chunk(2, dim=-1)
        x = self._convolve(x, metadata)
        dt, B, C = self._ssm_transform(x)
        slots, query_start_loc, has_initial_state = _as_one_batch(metadata)
        y = selective_scan(
            x,
            dt.transpose(-2, -1),
            self.A,
            B,
            C,
            self.kv_cache[1],
            slots=slots,
            query_start_loc=query_start_loc,
            has_initial_state=has_initial_state,
            D=self.D,
            z=gate,
            dt_bias=self._time_proj_bias(),
        )
        output[:tokens] = self.out_proj(y)[0]

    def _convolve(self, x: torch.Tensor, metadata: Mamba1AttentionMetadata) -> torch.Tensor:
        """Run vLLM's causal convolutions over ``x`` [tokens, channels] and their states."""
        state = self.kv_cache[0]
        if not is_conv_state_dim_first():
            state = state.transpose(-1, -2)
        decodes = metadata.num_decode_tokens
        parts = []
        if decodes:
            parts.append(
                causal_conv1d_update(
                    x[:decodes],
                    state,
                    self.conv_weights,
                    self.conv1d.bias,
                    self.activation,
                    conv_state_indices=metadata.state_indices_tensor_d,
                )
            )
        if metadata.num_prefill_tokens:
            parts.append(
                causal_conv1d_fn(
                    x[decodes:].transpose(-2, -1),
                    self.conv_weights,
                    self.conv1d.bias,
                    activation=self.activation,
                    conv_states=state,
                    has_initial_state=metadata.has_initial_states_p,
                    cache_indices=metadata.state_indices_tensor_p,
                    query_start_loc=metadata.query_start_loc_p,
                    pad_slot_id=NULL_BLOCK_ID,
                ).transpose(-2, -1)
            )
        return torch.cat(parts)


class CpuMambaMixer2(MambaMixer2):
    """vLLM's ``MambaMixer2`` without checkpoints inside a prefill.

    The scheduler then ends a prefill chunk where a checkpoint falls, as it does for Mamba-1.
    """

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """Return vLLM's spec, with no block for a checkpoint inside a prefill."""
        spec = super().get_kv_cache_spec(vllm_config)
        if isinstance(spec, MambaSpec):
            spec = replace(spec, num_prefill_checkpoint_blocks=0, prefill_checkpoint_alignment=None)
        return spec


def _as_one_batch(
    metadata: Mamba1AttentionMetadata,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return slots, sequence starts and initial-state flags of decodes and prefills together.

    A decode is a sequence of one token that goes on from its state.
    """
    decodes = metadata.num_decodes
    slots, starts = [], [torch.arange(decodes, dtype=torch.int32)]
    resumes = [torch.ones(decodes, dtype=torch.bool)]
    if decodes:
        slots.append(metadata.state_indices_tensor_d[:, 0])
    if metadata.num_prefills:
        slots.append(metadata.state_indices_tensor_p)
        starts.append(metadata.query_start_loc_p + decodes)
        resumes.append(metadata.has_initial_states_p)
    else:
        starts.append(torch.tensor([decodes], dtype=torch.int32))
    return torch.cat(slots), torch.cat(starts), torch.cat(resumes)
