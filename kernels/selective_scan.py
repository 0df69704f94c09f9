"""Mamba-1's selective scan over the tokens of ragged requests, states found by handle.

For every request, channel ``d``, state element ``n`` and token ``t`` (Mamba paper, section 3.2)::

    dt      = softplus(dt[t, d] + dt_bias[d])
    h[d, n] = exp(dt * A[d, n]) * h[d, n] + dt * x[t, d] * B[t, n]
    y[t, d] = sum over n of h[d, n] * C[t, n] + D[d] * x[t, d],  times silu(z[t, d])

A program keeps the states of some channels of one request in registers and walks over its tokens
in chunks, pausing where a state is to be saved. Within a chunk the steps are unrolled and nothing
is stored, so that the loads of all of them can be in flight at once; a chunk's outputs leave
together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from avmp_kernels.pages import PageTable, load_ssm_block, table_args
from avmp_kernels.ragged import row_range
from avmp_kernels.saves import ChunkSaves
from avmp_kernels.state_update import check_supported, silu, softplus

_LOG2E = tl.constexpr(1.4426950408889634)
_CHUNK = 8
_TILE = 512  # state elements a program: 4 a thread


@triton.jit
def _scan_rows(
    h,
    begin,
    end,
    rate,
    bias,
    out_at,
    channel,
    in_dim,
    x,
    dt,
    B,
    C,
    D,
    z,
    dim,
    out_row: tl.int64,
    x_row: tl.int64,
    x_dim,
    dt_row: tl.int64,
    dt_dim,
    b_row: tl.int64,
    b_n,
    c_row: tl.int64,
    c_n,
    z_row: tl.int64,
    z_dim,
    N: tl.constexpr,
    N_PADDED: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
):
    """Walk over some rows of one request, write their outputs, and return the state after them."""
    n = tl.arange(0, N_PADDED)
    step = tl.arange(0, CHUNK)
    for start in tl.range(begin, end, CHUNK):
        # Channels first, as in the states, so that a step's outputs stay where they are computed.
        y = tl.zeros([CHANNELS, CHUNK], dtype=tl.float32)
        for i in tl.static_range(CHUNK):
            # Steps after the last token have dt = 0: the state stays as it is.
            token = start + i
            live = token < end
            here = channel < tl.where(live, dim, 0)
            wide = n < tl.where(live, N, 0)
            delta = tl.load(dt + token * dt_row + channel * dt_dim, mask=here, other=0.0)
            delta = delta.to(tl.float32) + bias
            if SOFTPLUS:
                delta = softplus(delta)
            delta = tl.where(live, delta, 0.0)
            value = tl.load(x + token * x_row + channel * x_dim, mask=here, other=0.0)
            into = tl.load(B + token * b_row + n * b_n, mask=wide, other=0.0).to(tl.float32)
            outof = tl.load(C + token * c_row + n * c_n, mask=wide, other=0.0).to(tl.float32)
            drive = (delta * value.to(tl.float32))[:, None] * into[None, :]
            h = tl.exp2(delta[:, None] * rate) * h + drive
            y_i = tl.sum(h * outof[None, :], axis=1)
            y = tl.where((step == i)[None, :], y_i[:, None], y)
        row = start + step
        row64 = row.to(tl.int64)[None, :]
        inside = in_dim[:, None] & (row < end)[None, :]
        if HAS_D:
            value = tl.load(x + row64 * x_row + (channel * x_dim)[:, None], mask=inside, other=0.0)
            skip = tl.load(D + channel, mask=in_dim, other=0.0).to(tl.float32)
            y += value.to(tl.float32) * skip[:, None]
        if HAS_Z:
            gate = tl.load(z + row64 * z_row + (channel * z_dim)[:, None], mask=inside, other=0.0)
            y *= silu(gate.to(tl.float32))
        tl.store(out_at + row64 * out_row, y.to(out_at.dtype.element_ty), mask=inside)
    return h


@triton.jit(do_not_specialize=["num_requests", "num_rows", "num_kv", "num_ssm", "num_saves"])
def _selective_scan_kernel(
    out,
    states,
    handles,
    query_start_loc,
    has_initial,
    entries,
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    save_tokens,
    save_targets,
    num_requests,
    num_rows,
    num_kv,
    num_ssm,
    num_saves,
    dim,
    out_row: tl.int64,
    out_dim,
    state_block: tl.int64,
    state_dim,
    state_n,
    handle_stride,
    x_row: tl.int64,
    x_dim,
    dt_row: tl.int64,
    dt_dim,
    a_dim,
    a_n,
    b_row: tl.int64,
    b_n,
    c_row: tl.int64,
    c_n,
    z_row: tl.int64,
    z_dim,
    N: tl.constexpr,
    N_PADDED: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RESOLVE: tl.constexpr,
    SAVES: tl.constexpr,
):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    request = tl.program_id(1)
    n = tl.arange(0, N_PADDED)
    step = tl.arange(0, CHUNK)
    in_dim = channel < dim
    begin, end = row_range(query_start_loc, request, num_requests, num_rows)
    if begin >= end:
        return
    is_real = request < num_requests
    handle_at = handles + request * handle_stride
    place = load_ssm_block(handle_at, entries, num_kv, num_ssm, is_real, RESOLVE)
    out_at = out + (channel * out_dim)[:, None]
    if place <= 0:
        # Padding, or a request whose state is null.
        zeros = tl.zeros([CHANNELS, CHUNK], dtype=out.dtype.element_ty)
        for start in tl.range(begin, end, CHUNK):
            row = start + step
            inside = in_dim[:, None] & (row < end)[None, :]
            tl.store(out_at + row.to(tl.int64)[None, :] * out_row, zeros, mask=inside)
        return

    cell = in_dim[:, None] & (n < N)[None, :]
    state_at = (
        states
        + place.to(tl.int64) * state_block
        + (channel * state_dim)[:, None]
        + (n * state_n)[None, :]
    )
    # Masks of scalars are limits here: the interpreter cannot combine a scalar and a vector mask.
    past = (channel < tl.where(tl.load(has_initial + request) != 0, dim, 0))[:, None]
    h = tl.load(state_at, mask=cell & past, other=0.0).to(tl.float32)
    rate = tl.load(A + (channel * a_dim)[:, None] + (n * a_n)[None, :], mask=cell, other=0.0)
    rate = rate.to(tl.float32) * _LOG2E
    bias = tl.zeros([CHANNELS], dtype=tl.float32)
    if HAS_BIAS:
        bias = tl.load(dt_bias + channel, mask=in_dim, other=0.0).to(tl.float32)

    start = begin
    if SAVES:
        # A state is saved where the rows before it end; what is left comes after the last one.
        for number in range(num_saves):
            save = request * num_saves + number
            tokens = tl.load(save_tokens + save)
            if tokens > 0:
                h = _scan_rows(
                    h, start, begin + tokens, rate, bias, out_at, channel, in_dim,
                    x, dt, B, C, D, z, dim, out_row, x_row, x_dim, dt_row, dt_dim,
                    b_row, b_n, c_row, c_n, z_row, z_dim,
                    N, N_PADDED, CHANNELS, CHUNK, SOFTPLUS, HAS_D, HAS_Z,
                )  # fmt: skip
                start = begin + tokens
                saved = load_ssm_block(save_targets + save, entries, num_kv, num_ssm, True, RESOLVE)
                kept = cell & (channel < tl.where(saved > 0, dim, 0))[:, None]
                there = state_at + (saved - place).to(tl.int64) * state_block
                tl.store(there, h.to(states.dtype.element_ty), mask=kept)
    h = _scan_rows(
        h, start, end, rate, bias, out_at, channel, in_dim,
        x, dt, B, C, D, z, dim, out_row, x_row, x_dim, dt_row, dt_dim,
        b_row, b_n, c_row, c_n, z_row, z_dim,
        N, N_PADDED, CHANNELS, CHUNK, SOFTPLUS, HAS_D, HAS_Z,
    )  # fmt: skip
    # Small tiles are held by several threads each: all must have read before one writes.
    tl.debug_barrier()
    tl.store(state_at, h.to(states.dtype.element_ty), mask=cell)


def selective_scan(
    out: torch.Tensor,
    states: torch.Tensor,
    handles: torch.Tensor,
    query_start_loc: torch.Tensor,
    has_initial: torch.Tensor,
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
) -> None:
    """Scan the tokens of ragged requests and write each one's last state back.

    Any strides; fp32, fp16 and bf16, computed in fp32. Rows that belong to no request, and requests
    whose state is null, get zeros. No two requests may name the same state.

    Args:
        out: ``[rows, channels]``, every element is written; must not overlap the inputs.
        states: ``[blocks, channels, n]``, one layer of the arena's SSM view.
        handles: int32 ``[requests]``, SSM handles; physical indices if ``pages`` is None.
        query_start_loc: int32 ``[requests + 1]``.
        has_initial: bool ``[requests]``: whether a request continues from its state.
        x: ``[rows, channels]``.
        dt: ``[rows, channels]``, before the bias.
        A: ``[channels, n]``, negative.
        B: ``[rows, n]``.
        C: ``[rows, n]``.
        D: ``[channels]``, contiguous, or None.
        z: ``[rows, channels]`` or None.
        dt_bias: ``[channels]``, contiguous, or None.
        dt_softplus: Whether dt goes through softplus.
        saves: States inside of the requests' rows that are written to blocks of their own, or None.
        pages: The page table.

    Raises:
        ValueError: If the shapes do not fit, or the states are of a type that is not taken.
    """
    check_supported(states.dtype)
    _, dim, n = states.shape
    num_rows, num_requests = x.shape[0], query_start_loc.shape[0] - 1
    if x.shape[1] != dim or A.shape != (dim, n) or B.shape != (num_rows, n):
        raise ValueError(
            f"states {tuple(states.shape)} do not fit x {tuple(x.shape)}, A {tuple(A.shape)}, "
            f"B {tuple(B.shape)}"
        )
    n_padded = triton.next_power_of_2(n)
    channels = min(triton.next_power_of_2(dim), max(_TILE // n_padded, 1))
    entries, num_kv, num_ssm = table_args(pages, handles)
    _selective_scan_kernel[(triton.cdiv(dim, channels), num_requests + 1)](
        out,
        states,
        handles,
        query_start_loc,
        has_initial.view(torch.uint8),
        entries,
        x,
        dt,
        A,
        B,
        C,
        D if D is not None else x,
        z if z is not None else x,
        dt_bias if dt_bias is not None else x,
        saves.tokens if saves is not None else handles,
        saves.targets if saves is not None else handles,
        num_requests,
        num_rows,
        num_kv,
        num_ssm,
        saves.tokens.shape[1] if saves is not None else 0,
        dim,
        *out.stride(),
        *states.stride(),
        handles.stride(0),
        *x.stride(),
        *dt.stride(),
        *A.stride(),
        *B.stride(),
        *C.stride(),
        *(z.stride() if z is not None else (0, 0)),
        N=n,
        N_PADDED=n_padded,
        CHANNELS=channels,
        CHUNK=_CHUNK,
        SOFTPLUS=dt_softplus,
        HAS_D=D is not None,
        HAS_Z=z is not None,
        HAS_BIAS=dt_bias is not None,
        RESOLVE=pages is not None,
        SAVES=saves is not None,
        num_warps=4,
    )
