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
from typing import TYPE_CHECKING, Any, NamedTuple

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

if TYPE_CHECKING:
    from avmp_vllm.engine.layout.saves import ChunkSaves, RowSave


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

    Attributes:
        saves: Under AVMP, the states that a step saves inside of its prefills.
    """

    saves: ChunkSaves | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A view taken now keeps the weights [channels, kernel] as they are loaded. vLLM's Mamba-2
        # layer does the same; packing later gives `conv1d.weight` other data.
        weights = self.conv1d.weight.squeeze(1)
        self.register_buffer("conv_weights", weights.detach(), persistent=False)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """Return vLLM's spec, which says that states are saved at any position of a prefill."""
        spec = super().get_kv_cache_spec(vllm_config)
        if isinstance(spec, MambaSpec):
            spec = replace(spec, prefill_checkpoint_alignment=1)
        return spec

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
        saves: list[RowSave] = []
        if prefills and self.saves is not None:
            saves = self.saves.of_blocks(metadata.state_indices_tensor_p)
        x = self._convolve(x, metadata, saves)
        dt, B, C = self._ssm_transform(x)
        batch = _as_one_batch(metadata)
        if saves:
            batch = _cut(batch, saves, metadata.num_decodes)
        y = selective_scan(
            x,
            dt.transpose(-2, -1),
            self.A,
            B,
            C,
            self.kv_cache[1],
            **batch._asdict(),
            D=self.D,
            z=gate,
            dt_bias=self._time_proj_bias(),
        )
        output[:tokens] = self.out_proj(y)[0]

    def _convolve(
        self, x: torch.Tensor, metadata: Mamba1AttentionMetadata, saves: list[RowSave]
    ) -> torch.Tensor:
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
            _save_inputs(x[decodes:], state, metadata, saves)
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

    The scheduler then ends a prefill chunk where a checkpoint falls.
    """

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """Return vLLM's spec, with no block for a checkpoint inside a prefill."""
        spec = super().get_kv_cache_spec(vllm_config)
        if isinstance(spec, MambaSpec):
            spec = replace(spec, num_prefill_checkpoint_blocks=0, prefill_checkpoint_alignment=None)
        return spec


class Batch(NamedTuple):
    """Sequences of a scan; see ``selective_scan``."""

    slots: torch.Tensor
    query_start_loc: torch.Tensor
    has_initial_state: torch.Tensor
    sources: torch.Tensor | None = None


def _save_inputs(
    x: torch.Tensor, state: torch.Tensor, metadata: Mamba1AttentionMetadata, saves: list[RowSave]
) -> None:
    """Save the convolution's states inside of the prefills, before their own are overwritten.

    Args:
        x: [tokens, channels] of the prefills.
        state: [blocks, channels, width - 1]: the last inputs of each sequence, oldest first.
        metadata: Of the batch.
        saves: What to save.
    """
    width = state.shape[-1]
    for row, tokens, target in saves:
        begin = int(metadata.query_start_loc_p[row])
        fresh = x[begin + max(tokens - width, 0) : begin + tokens].T
        old = width - fresh.shape[1]
        if old:
            block = metadata.state_indices_tensor_p[row]
            resumes = metadata.has_initial_states_p[row]
            state[target, :, :old] = state[block, :, width - old :] if resumes else 0
        state[target, :, old:] = fresh


def _cut(batch: Batch, saves: list[RowSave], decodes: int) -> Batch:
    """Cut prefills where a state is saved.

    A piece leaves its state where it is to be saved, and the next begins from there.

    Args:
        batch: Decodes and prefills.
        saves: By row, and in it by position.
        decodes: Sequences before the first prefill.
    """
    slots, starts, resumes = (tensor.tolist() for tensor in batch[:3])
    cuts: dict[int, list[RowSave]] = {}
    for save in saves:
        cuts.setdefault(decodes + save.row, []).append(save)
    pieces: list[tuple[int, int, bool, int]] = []
    for sequence, slot in enumerate(slots):
        source, start, resume = slot, starts[sequence], resumes[sequence]
        for save in cuts.get(sequence, ()):
            pieces.append((save.target, start, resume, source))
            source, start, resume = save.target, starts[sequence] + save.tokens, True
        pieces.append((slot, start, resume, source))
    targets, begins, flags, sources = zip(*pieces, strict=True)
    return Batch(
        torch.tensor(targets),
        torch.tensor([*begins, starts[-1]]),
        torch.tensor(flags),
        torch.tensor(sources),
    )


def _as_one_batch(metadata: Mamba1AttentionMetadata) -> Batch:
    """Return decodes and prefills together.

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
    return Batch(torch.cat(slots), torch.cat(starts), torch.cat(resumes))
