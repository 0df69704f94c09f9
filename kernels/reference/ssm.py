"""References of the SSM kernels: state update, selective scan, causal conv1d."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from avmp_kernels.pages import PageTable
from avmp_kernels.reference.pages import resolve_handle
from avmp_kernels.saves import ChunkSaves


def saved_after(
    saves: ChunkSaves | None, request: int, tokens: int, pages: PageTable | None
) -> list[int]:
    """Return the blocks that get a request's state after some of its rows."""
    if saves is None:
        return []
    targets = saves.targets[request][saves.tokens[request] == tokens].tolist()
    blocks = [resolve_handle(pages, target, is_ssm=True) for target in targets]
    return [block for block in blocks if block]


def state_step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    """Advance one request by one token.

    Args:
        state: ``[heads, dim, n]``.
        x: ``[heads, dim]``, as ``dt``, ``D``, ``z`` and ``dt_bias``.
        A: ``[heads, dim, n]``.
        B: ``[groups, n]``, as ``C``.

    Returns:
        The new state and the output ``[heads, dim]``.
    """
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = F.softplus(dt)
    per_group = state.shape[0] // B.shape[0]
    into = B.repeat_interleave(per_group, dim=0)[:, None, :]
    outof = C.repeat_interleave(per_group, dim=0)[:, None, :]
    state = torch.exp(dt[..., None] * A) * state + (dt * x)[..., None] * into
    y = (state * outof).sum(-1)
    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * F.silu(z)
    return state, y


def selective_scan(
    out: torch.Tensor,
    states: torch.Tensor,
    handles: torch.Tensor,
    query_start_loc: torch.Tensor,
    has_initial: torch.Tensor | None,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    *,
    dt_softplus: bool = True,
    saves: ChunkSaves | None = None,
    pages: PageTable | None = None,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Run the recurrence over ragged requests, with a head and a group dimension in every tensor.

    Rows are tokens; `selective_state_update` is this with one token a request and
    ``has_initial=None``, which stands for "all". Computed in ``dtype``.
    """

    def exact(tensor, *at):
        return None if tensor is None else tensor[at].to(dtype) if at else tensor.to(dtype)

    out.zero_()
    for request in range(len(query_start_loc) - 1):
        block = resolve_handle(pages, int(handles[request]), is_ssm=True)
        begin, end = int(query_start_loc[request]), int(query_start_loc[request + 1])
        if block == 0 or begin == end:
            continue
        resume = has_initial is None or bool(has_initial[request])
        state = exact(states, block) if resume else torch.zeros_like(exact(states, block))
        for t in range(begin, end):
            state, y = state_step(
                state,
                exact(x, t),
                exact(dt, t),
                exact(A),
                exact(B, t),
                exact(C, t),
                exact(D),
                exact(z, t),
                exact(dt_bias),
                dt_softplus,
            )
            out[t] = y.to(out.dtype)
            for target in saved_after(saves, request, t + 1 - begin, pages):
                states[target] = state.to(states.dtype)
        states[block] = state.to(states.dtype)


def selective_state_update(out, states, handles, x, *arguments, **options) -> None:
    """Update a batch of single-token requests; arguments as the kernel's, heads included."""
    starts = torch.arange(x.shape[0] + 1)
    selective_scan(out, states, handles, starts, None, x, *arguments, **options)


def causal_conv1d(
    out: torch.Tensor,
    states: torch.Tensor,
    handles: torch.Tensor,
    query_start_loc: torch.Tensor,
    has_initial: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: bool = True,
    saves: ChunkSaves | None = None,
    pages: PageTable | None = None,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Convolve ragged requests with their last ``width - 1`` inputs, and keep the new ones.

    One token a request with ``has_initial=None`` ("all") is the decode update.
    """
    out.zero_()
    before = weight.shape[1] - 1
    for request in range(len(query_start_loc) - 1):
        block = resolve_handle(pages, int(handles[request]), is_ssm=True)
        begin, end = int(query_start_loc[request]), int(query_start_loc[request + 1])
        if block == 0 or begin == end:
            continue
        past = states[block].to(dtype)  # [dim, width - 1]
        if has_initial is not None and not has_initial[request]:
            past = torch.zeros_like(past)
        inputs = torch.cat([past, x[begin:end].to(dtype).T], dim=1)
        for t in range(begin, end):
            window = inputs[:, t - begin : t - begin + before + 1]
            y = (window * weight.to(dtype)).sum(1)
            if bias is not None:
                y = y + bias.to(dtype)
            out[t] = (F.silu(y) if activation else y).to(out.dtype)
            for target in saved_after(saves, request, t + 1 - begin, pages):
                states[target] = inputs[:, t - begin + 1 : t - begin + before + 1]
        states[block] = inputs[:, inputs.shape[1] - before :].to(states.dtype)
