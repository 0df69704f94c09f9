"""A Mamba-1 layer whose kernels resolve SSM handles themselves.

vLLM's projections, metadata and state layout, AVMP's convolution and scan. Mamba-2 layers keep
vLLM's kernels, over resolved indices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from avmp_kernels.conv1d import causal_conv1d, causal_conv1d_update
from avmp_kernels.saves import ChunkSaves
from avmp_kernels.selective_scan import selective_scan
from avmp_kernels.state_update import selective_state_update
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first

if TYPE_CHECKING:
    from avmp_kernels.pages import PageTable
    from vllm.model_executor.layers.mamba.mamba_mixer import MambaMixer


def forward_by_handles(
    layer: MambaMixer, pages: PageTable, hidden_states: torch.Tensor, output: torch.Tensor
) -> None:
    """Take the place of ``MambaMixer.forward_impl``.

    Args:
        layer: The layer; its metadata holds SSM handles where vLLM's kernels expect indices.
        pages: The worker's page table.
        hidden_states: ``[tokens, hidden]``, decodes first.
        output: As ``hidden_states``; written.
    """
    metadata = (get_forward_context().attn_metadata or {}).get(layer.prefix)
    if metadata is None:  # vLLM's profile run: no state to work on
        output.zero_()
        return
    decodes = metadata.num_decode_tokens
    tokens = decodes + metadata.num_prefill_tokens
    conv_state, ssm_state = layer.kv_cache
    if not is_conv_state_dim_first():
        conv_state = conv_state.transpose(-1, -2)
    weight, bias = layer.conv1d.weight.squeeze(1), layer.conv1d.bias
    weight = getattr(layer, "conv_weights", weight)  # CPUs may pack the other
    x, gate = layer.in_proj(hidden_states[:tokens])[0].chunk(2, dim=-1)
    convolved, y = torch.empty_like(x), torch.empty_like(x)
    if decodes:
        handles_d = metadata.state_indices_tensor_d[:, 0]
        causal_conv1d_update(
            convolved[:decodes], conv_state, handles_d, x[:decodes], weight, bias, pages=pages
        )
    if tokens > decodes:
        handles_p = metadata.state_indices_tensor_p
        found = layer.saves.of_handles(handles_p) if hasattr(layer, "saves") else None
        saves = ChunkSaves(*found) if found is not None else None
        causal_conv1d(
            convolved[decodes:],
            conv_state,
            handles_p,
            metadata.query_start_loc_p,
            metadata.has_initial_states_p,
            x[decodes:],
            weight,
            bias,
            saves=saves,
            pages=pages,
        )
    dt, B, C = layer._ssm_transform(convolved)
    dt = dt.transpose(-2, -1)
    D, dt_bias = layer.D, layer._time_proj_bias()
    if decodes:
        selective_state_update(
            y[:decodes],
            ssm_state,
            handles_d,
            convolved[:decodes],
            dt[:decodes],
            layer.A,
            B[:decodes],
            C[:decodes],
            D,
            gate[:decodes],
            dt_bias,
            pages=pages,
        )
    if tokens > decodes:
        selective_scan(
            y[decodes:],
            ssm_state,
            handles_p,
            metadata.query_start_loc_p,
            metadata.has_initial_states_p,
            convolved[decodes:],
            dt[decodes:],
            layer.A,
            B[decodes:],
            C[decodes:],
            D,
            gate[decodes:],
            dt_bias,
            saves=saves,
            pages=pages,
        )
    output[:tokens] = layer.out_proj(y)[0]
