"""Gated delta nets, and Kimi's delta attention (KDA), whose gate has a value for each channel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.nn import functional
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.gdn.kimi_gdn_linear_attn import KimiGatedDeltaNetAttention
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
from vllm.utils.torch_utils import _resolve_layer_name


class Run(NamedTuple):
    """The tokens of one sequence in a batch, and its states.

    Attributes:
        tokens: Their places in the batch.
        begins: Block of the state that they go on from; None for none.
        ends: Block that gets the state after each token; without drafts the last one counts.
        history: Convolution inputs to skip in the first block, which holds more with drafts.
    """

    tokens: list[int]
    begins: int | None
    ends: list[int]
    history: int | None = None


def sequences(metadata: Any) -> Iterator[Run]:
    """A batch's sequences: those without drafts, then those with."""
    drafted = metadata.spec_sequence_masks is not None
    count = metadata.num_decodes + metadata.num_prefills
    if count:
        starts = metadata.non_spec_query_start_loc.tolist()
        slots = metadata.non_spec_state_indices_tensor.tolist()
        places = range(starts[count])
        if drafted:
            places = metadata.non_spec_token_indx.tolist()
        resumes = metadata.has_initial_state
        for index in range(count):
            tokens = list(places[starts[index] : starts[index + 1]])
            resume = resumes is None or bool(resumes[index])
            slot = slots[index]
            yield Run(tokens, slot if resume else None, [slot] * len(tokens))
    if drafted:
        starts = metadata.spec_query_start_loc.tolist()
        slots = metadata.spec_state_indices_tensor.tolist()
        places = range(starts[metadata.num_spec_decodes])
        if count:
            places = metadata.spec_token_indx.tolist()
        for index in range(metadata.num_spec_decodes):
            tokens = list(places[starts[index] : starts[index + 1]])
            accepted = int(metadata.num_accepted_tokens[index])
            if tokens:
                yield Run(tokens, slots[index][accepted - 1], slots[index], accepted - 1)


def convolve(x: torch.Tensor, layer: Any, metadata: Any) -> torch.Tensor:
    """Causal convolutions over ``x`` [tokens, channels] and the layer's first state.

    With drafts a state holds the inputs of all tokens that may still be rejected, in the first of
    a sequence's blocks.
    """
    weight = layer.conv1d.weight  # [channels, 1, width]
    past = weight.shape[-1] - 1
    states = layer.kv_cache[0] if is_conv_state_dim_first() else layer.kv_cache[0].mT
    result = torch.empty_like(x)
    for run in sequences(metadata):
        state = states[run.ends[0]]
        new = x[run.tokens].T
        if run.history is None:
            held = state[:, :past]
            before = torch.zeros_like(held) if run.begins is None else held.clone()
            seen = torch.cat([before, new], dim=1)
            held.copy_(seen[:, -past:])
        else:
            at = run.history
            seen = torch.cat([state[:, at : at + past], new], dim=1)
            kept = state[:, at + 1 : at + 1 + state.shape[1] - new.shape[1]]
            state.copy_(torch.cat([kept, new], dim=1))
        result[run.tokens] = functional.silu(
            functional.conv1d(seen[None], weight, layer.conv1d.bias, groups=len(seen))[0].T
        )
    return result


def recur(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    states: torch.Tensor,
    metadata: Any,
    out: torch.Tensor,
) -> None:
    """The gated delta rule, a token after another.

    Args:
        q, k: [tokens, heads, key channels], not normalised.
        v: [tokens, heads, value channels].
        decay: [tokens, heads, key channels or 1], its logarithm.
        beta: [tokens, heads].
        states: [blocks, heads, key channels, value channels].
        metadata: Of the batch.
        out: [tokens, heads, value channels].
    """
    q = functional.normalize(q, dim=-1) * q.shape[-1] ** -0.5
    k = functional.normalize(k, dim=-1)
    keep, beta = decay.exp()[..., None], beta[..., None]
    for run in sequences(metadata):
        state = torch.zeros_like(states[0]) if run.begins is None else states[run.begins].clone()
        for at, slot in zip(run.tokens, run.ends, strict=False):
            state *= keep[at]
            change = (v[at] - torch.einsum("hk,hkv->hv", k[at], state)) * beta[at]
            state += k[at][..., None] * change[:, None]
            out[at] = torch.einsum("hk,hkv->hv", q[at], state)
            if run.history is not None:
                states[slot].copy_(state)
        if run.history is None:
            states[run.ends[0]].copy_(state)


def gated_delta_net(
    mixed_qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, out: torch.Tensor, name: Any
) -> None:
    """Take the place of the op ``cpu_gdn_attention_core``."""
    context = get_forward_context()
    if context.attn_metadata is None:
        return
    layer = context.no_compile_layers[_resolve_layer_name(name)]
    metadata = context.attn_metadata[layer.prefix]
    count = metadata.num_actual_tokens
    q, k, v = layer.rearrange_mixed_qkv(convolve(mixed_qkv[:count], layer, metadata))
    q, k, v = (each.reshape(count, -1, each.shape[-1]) for each in (q, k, v))
    shared = v.shape[1] // k.shape[1]
    q, k = (each.repeat_interleave(shared, dim=1) for each in (q, k))
    decay = -layer.A_log.exp() * functional.softplus(a[:count] + layer.dt_bias)
    recur(q, k, v, decay[..., None], b[:count].sigmoid(), layer.kv_cache[1], metadata, out)


def kimi_delta(
    layer: Any,
    mixed_qkv: torch.Tensor,
    g1: torch.Tensor,
    g2: torch.Tensor,
    beta: torch.Tensor,
    core_attn_out: torch.Tensor,
) -> None:
    """Take the place of ``KimiGatedDeltaNetAttention._forward``."""
    metadata = (get_forward_context().attn_metadata or {}).get(layer.prefix)
    if metadata is None:
        return
    count = metadata.num_actual_tokens
    mixed = convolve(mixed_qkv[:count], layer, metadata)
    q, k, v = mixed.view(count, 3, -1, layer.head_dim).unbind(1)
    raw = g1[0, :count] + layer.dt_bias.view(-1, layer.head_dim)
    decay = -layer.A_log.exp()[:, None] * functional.softplus(raw)
    gate, states = beta[0, :count].sigmoid(), layer.kv_cache[1]
    recur(q, k, v, decay, gate, states, metadata, core_attn_out[0])
    core_attn_out.copy_(layer.o_norm(core_attn_out, g2))


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Take the place of both."""
    gdn_attention.register_cpu_gdn_attention_ops()
    with (
        mock.patch.object(torch.ops.vllm, "cpu_gdn_attention_core", gated_delta_net),
        mock.patch.object(KimiGatedDeltaNetAttention, "_forward", kimi_delta),
    ):
        yield
