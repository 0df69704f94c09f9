"""Selective state update: one decode step of Mamba-1 and Mamba-2, states found by handle.

For every request, head ``h``, channel ``p`` and state element ``n`` (Mamba paper, section 3.2)::

    dt    = softplus(dt + dt_bias)
    state = exp(dt * A) * state + dt * B * x
    y     = sum over n of state * C + D * x,  times silu(z) if there is a gate

Mamba-1 has one head whose channels all differ; in Mamba-2 all channels of a head share dt and A,
which callers show by strides of 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from avmp_kernels.pages import PageTable, load_ssm_block, table_args

_LOG2E = tl.constexpr(1.4426950408889634)
# Elements of a program's tile: 8 a thread, so that 16-bit states move 16 bytes a thread.
_TILE = 1024


@triton.jit
def softplus(value):
    """Return log(1 + exp(value)) in fp32; beyond 20 that is the value itself."""
    return tl.where(value > 20.0, value, tl.log(1.0 + tl.exp(tl.minimum(value, 20.0))))


@triton.jit
def silu(value):
    """Return value * sigmoid(value) in fp32."""
    return value / (1.0 + tl.exp(-value))


@triton.jit(do_not_specialize=["batch", "num_kv", "num_ssm"])
def _state_update_kernel(
    states,
    handles,
    entries,
    x,
    dt,
    dt_bias,
    A,
    B,
    C,
    D,
    z,
    out,
    batch,
    num_kv,
    num_ssm,
    dim,
    state_block: tl.int64,
    state_head,
    state_dim,
    state_n,
    handle_stride,
    x_row: tl.int64,
    x_head,
    x_dim,
    dt_row: tl.int64,
    dt_head,
    dt_dim,
    bias_head,
    bias_dim,
    a_head,
    a_dim,
    a_n,
    b_row: tl.int64,
    b_group,
    b_n,
    c_row: tl.int64,
    c_group,
    c_n,
    d_head,
    d_dim,
    z_row: tl.int64,
    z_head,
    z_dim,
    out_row: tl.int64,
    out_head,
    out_dim,
    HEADS_PER_GROUP: tl.constexpr,
    N: tl.constexpr,
    N_PADDED: tl.constexpr,
    CHANNELS: tl.constexpr,
    REQUESTS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    SHARED_DT: tl.constexpr,
    RESOLVE: tl.constexpr,
):
    # Several requests a program: they share A, which is as large as one layer's fp32 state.
    row = tl.program_id(1) * REQUESTS + tl.arange(0, REQUESTS)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    head = tl.program_id(2)
    group = head // HEADS_PER_GROUP
    n = tl.arange(0, N_PADDED)
    in_batch = row < batch
    in_dim = channel < dim
    row64 = row.to(tl.int64)

    handle_at = handles + row * handle_stride
    block = load_ssm_block(handle_at, entries, num_kv, num_ssm, in_batch, RESOLVE)
    alive = in_batch & (block > 0)

    cell = in_dim[None, :, None] & (n < N)[None, None, :]
    live = alive[:, None, None] & cell
    pointers = (
        states
        + (block.to(tl.int64) * state_block + head * state_head)[:, None, None]
        + (channel * state_dim)[None, :, None]
        + (n * state_n)[None, None, :]
    )
    state = tl.load(pointers, mask=live, other=0.0).to(tl.float32)

    pair = alive[:, None] & in_dim[None, :]
    x_at = x + (row64 * x_row + head * x_head)[:, None] + (channel * x_dim)[None, :]
    value = tl.load(x_at, mask=pair, other=0.0).to(tl.float32)
    if SHARED_DT:
        step = tl.load(dt + row64 * dt_row + head * dt_head, mask=alive, other=0.0).to(tl.float32)
        if HAS_BIAS:
            step += tl.load(dt_bias + head * bias_head).to(tl.float32)
        if SOFTPLUS:
            step = softplus(step)
        decay = tl.exp2(step * (tl.load(A + head * a_head).to(tl.float32) * _LOG2E))
        decay = decay[:, None, None]
        drive = step[:, None] * value
    else:
        dt_at = dt + (row64 * dt_row + head * dt_head)[:, None] + (channel * dt_dim)[None, :]
        step = tl.load(dt_at, mask=pair, other=0.0).to(tl.float32)
        if HAS_BIAS:
            bias = tl.load(dt_bias + head * bias_head + channel * bias_dim, mask=in_dim, other=0.0)
            step += bias.to(tl.float32)[None, :]
        if SOFTPLUS:
            step = softplus(step)
        a_at = A + head * a_head + (channel * a_dim)[None, :, None] + (n * a_n)[None, None, :]
        rate = tl.load(a_at, mask=cell, other=0.0).to(tl.float32) * _LOG2E
        decay = tl.exp2(step[:, :, None] * rate)
        drive = step * value

    wide = alive[:, None] & (n < N)[None, :]
    b_at = B + (row64 * b_row + group * b_group)[:, None] + (n * b_n)[None, :]
    c_at = C + (row64 * c_row + group * c_group)[:, None] + (n * c_n)[None, :]
    into = tl.load(b_at, mask=wide, other=0.0).to(tl.float32)
    outof = tl.load(c_at, mask=wide, other=0.0).to(tl.float32)
    state = state * decay + drive[:, :, None] * into[:, None, :]
    # Small tiles are held by several threads each: all must have read before one writes.
    tl.debug_barrier()
    tl.store(pointers, state.to(states.dtype.element_ty), mask=live)

    y = tl.sum(state * outof[:, None, :], axis=2)
    if HAS_D:
        skip = tl.load(D + head * d_head + channel * d_dim, mask=in_dim, other=0.0)
        y += value * skip.to(tl.float32)[None, :]
    if HAS_Z:
        z_at = z + (row64 * z_row + head * z_head)[:, None] + (channel * z_dim)[None, :]
        y *= silu(tl.load(z_at, mask=pair, other=0.0).to(tl.float32))
    # A padding row holds anything, NaN included; what it gives is zero.
    y = tl.where(pair, y, 0.0)
    out_at = out + (row64 * out_row + head * out_head)[:, None] + (channel * out_dim)[None, :]
    tl.store(out_at, y.to(out.dtype.element_ty), mask=in_batch[:, None] & in_dim[None, :])


def check_supported(state_dtype: torch.dtype) -> None:
    """Raise ValueError for a type of state that the SSM kernels do not take."""
    if state_dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(
            f"SSM states of type {state_dtype} are not taken by AVMP's kernels; they take float16, "
            "bfloat16 and float32: set kernels to 'resolved' to use vLLM's"
        )


def _with_heads(tensor: torch.Tensor | None, dims: int, at: int) -> torch.Tensor | None:
    """Give a Mamba-1 tensor a head (or group) dimension of 1."""
    return tensor.unsqueeze(at) if tensor is not None and tensor.dim() < dims else tensor


def selective_state_update(
    out: torch.Tensor,
    states: torch.Tensor,
    handles: torch.Tensor,
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
    pages: PageTable | None = None,
) -> None:
    """Update the states of a batch of single-token requests and write their outputs.

    Mamba-1 leaves out ``heads`` and ``groups``. Any strides; fp32, fp16 and bf16, computed in fp32.
    A request whose state is null gets zeros and changes no state. No two requests may name the
    same state.

    Args:
        out: ``[batch, heads, dim]``, every element is written.
        states: ``[blocks, heads, dim, n]``, one layer of the arena's SSM view; updated in place.
        handles: int32 ``[batch]``, SSM handles; physical indices if ``pages`` is None.
        x: ``[batch, heads, dim]``.
        dt: ``[batch, heads, dim]``, before the bias.
        A: ``[heads, dim, n]``, negative.
        B: ``[batch, groups, n]``.
        C: ``[batch, groups, n]``.
        D: ``[heads, dim]`` or None.
        z: ``[batch, heads, dim]`` or None.
        dt_bias: ``[heads, dim]`` or None.
        dt_softplus: Whether dt goes through softplus.
        pages: The page table.

    Raises:
        ValueError: If the heads do not divide into the groups, shapes do not fit, or the states
            are of a type that the kernel does not take.
    """
    check_supported(states.dtype)
    states = _with_heads(states, 4, 1)
    out, x, dt, z = (_with_heads(t, 3, 1) for t in (out, x, dt, z))
    A = _with_heads(A, 3, 0)
    B, C = _with_heads(B, 3, 1), _with_heads(C, 3, 1)
    D, dt_bias = _with_heads(D, 2, 0), _with_heads(dt_bias, 2, 0)
    _, heads, dim, n = states.shape
    batch, groups = x.shape[0], B.shape[1]
    if x.shape != (batch, heads, dim) or A.shape != (heads, dim, n) or B.shape[2] != n:
        raise ValueError(
            f"states {tuple(states.shape)} do not fit x {tuple(x.shape)}, A {tuple(A.shape)}, "
            f"B {tuple(B.shape)}"
        )
    if heads % groups:
        raise ValueError(f"{heads} heads do not divide into {groups} groups")
    if batch == 0:
        return
    shared_dt = (
        dim > 1
        and dt.stride(2) == 0
        and A.stride(1) == 0
        and A.stride(2) == 0
        and (dt_bias is None or dt_bias.stride(1) == 0)
    )
    n_padded = triton.next_power_of_2(n)
    channels = min(triton.next_power_of_2(dim), max(_TILE // n_padded, 1))
    # A shared A costs nothing to reload; small batches want many programs.
    requests = 1 if shared_dt or batch < 64 else 2
    entries, num_kv, num_ssm = table_args(pages, handles)
    grid = (triton.cdiv(dim, channels), triton.cdiv(batch, requests), heads)
    _state_update_kernel[grid](
        states,
        handles,
        entries,
        x,
        dt,
        dt_bias if dt_bias is not None else x,
        A,
        B,
        C,
        D if D is not None else x,
        z if z is not None else x,
        out,
        batch,
        num_kv,
        num_ssm,
        dim,
        *states.stride(),
        handles.stride(0),
        *x.stride(),
        *dt.stride(),
        *(dt_bias.stride() if dt_bias is not None else (0, 0)),
        *A.stride(),
        *B.stride(),
        *C.stride(),
        *(D.stride() if D is not None else (0, 0)),
        *(z.stride() if z is not None else (0, 0, 0)),
        *out.stride(),
        HEADS_PER_GROUP=heads // groups,
        N=n,
        N_PADDED=n_padded,
        CHANNELS=channels,
        REQUESTS=requests,
        SOFTPLUS=dt_softplus,
        HAS_BIAS=dt_bias is not None,
        HAS_D=D is not None,
        HAS_Z=z is not None,
        SHARED_DT=shared_dt,
        RESOLVE=pages is not None,
        num_warps=4,
    )
