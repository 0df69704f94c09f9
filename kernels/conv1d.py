"""Causal depthwise conv1d over ragged requests, and its decode update, states found by handle.

A request's state holds its last ``width - 1`` inputs, oldest first::

    inputs of channel d   state[d, 0] .. state[d, width-2]   x[begin, d]  x[begin+1, d] ...
    output at token t     bias[d] + sum over k of weight[d, k] * input[t - (width-1) + k]
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from avmp_kernels.pages import PageTable, load_ssm_block, table_args
from avmp_kernels.ragged import find_request, num_blocks, row_range
from avmp_kernels.saves import ChunkSaves
from avmp_kernels.state_update import check_supported, silu

_TOKENS = 16  # tokens a prefill program works on: the width - 1 before them are read twice


@triton.jit
def _finish(y, bias, channel, in_dim, HAS_BIAS: tl.constexpr, ACTIVATE: tl.constexpr):
    if HAS_BIAS:
        y += tl.load(bias + channel, mask=in_dim, other=0.0).to(tl.float32)
    if ACTIVATE:
        y = silu(y)
    return y


@triton.jit(do_not_specialize=["num_requests", "num_rows", "num_kv", "num_ssm"])
def _prefill_kernel(
    out,
    states,
    handles,
    query_start_loc,
    has_initial,
    entries,
    x,
    weight,
    bias,
    num_requests,
    num_rows,
    num_kv,
    num_ssm,
    dim,
    out_row: tl.int64,
    out_dim,
    state_block: tl.int64,
    state_dim,
    state_tap,
    handle_stride,
    x_row: tl.int64,
    x_dim,
    w_dim,
    w_tap,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATE: tl.constexpr,
    RESOLVE: tl.constexpr,
):
    block = tl.program_id(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    in_dim = channel < dim
    request = find_request(query_start_loc, block, num_requests, TOKENS)
    begin, end = row_range(query_start_loc, request, num_requests, num_rows)
    first = (block - (begin // TOKENS + request)) * TOKENS
    count = end - begin
    if first >= count:
        return
    index = first + tl.arange(0, TOKENS)
    inside = (index < count)[:, None] & in_dim[None, :]
    out_at = out + (begin + index).to(tl.int64)[:, None] * out_row + (channel * out_dim)[None, :]
    is_real = request < num_requests
    handle_at = handles + request * handle_stride
    place = load_ssm_block(handle_at, entries, num_kv, num_ssm, is_real, RESOLVE)
    if place <= 0:
        # Padding, or a request whose state is null.
        tl.store(out_at, tl.zeros([TOKENS, CHANNELS], dtype=out.dtype.element_ty), mask=inside)
        return
    state = states + place.to(tl.int64) * state_block + channel * state_dim
    # Masks of scalars are limits here: the interpreter cannot combine a scalar and a vector mask.
    past_dim = tl.where(tl.load(has_initial + request) != 0, dim, 0)
    in_past = channel < past_dim
    x_at = x + begin.to(tl.int64) * x_row + channel * x_dim
    y = tl.zeros([TOKENS, CHANNELS], dtype=tl.float32)
    for tap in tl.static_range(WIDTH):
        source = index + (tap - (WIDTH - 1))
        taken = tl.load(
            x_at[None, :] + source.to(tl.int64)[:, None] * x_row,
            mask=inside & (source >= 0)[:, None],
            other=0.0,
        )
        taken = taken.to(tl.float32)
        if tap < WIDTH - 1:
            # Only the first tokens of a request reach back into its state.
            past = tl.load(
                state[None, :] + (source + (WIDTH - 1))[:, None] * state_tap,
                mask=((index < count) & (source < 0))[:, None] & in_past[None, :],
                other=0.0,
            )
            taken += past.to(tl.float32)
        factor = tl.load(weight + channel * w_dim + tap * w_tap, mask=in_dim, other=0.0)
        y += taken * factor.to(tl.float32)[None, :]
    y = _finish(y, bias, channel, in_dim, HAS_BIAS, ACTIVATE)
    tl.store(out_at, y.to(out.dtype.element_ty), mask=inside)

    if first == 0:
        # The program that reads the old state writes the new one, after all its threads have read.
        tl.debug_barrier()
        for tap in tl.static_range(WIDTH - 1):
            origin = count + (tap - (WIDTH - 1))
            fresh = tl.load(
                x_at + origin.to(tl.int64) * x_row,
                mask=channel < tl.where(origin >= 0, dim, 0),
                other=0.0,
            )
            kept = tl.load(
                state + (origin + (WIDTH - 1)) * state_tap,
                mask=channel < tl.where(origin < 0, past_dim, 0),
                other=0.0,
            )
            # One of the two is masked to zero.
            new = fresh.to(tl.float32) + kept.to(tl.float32)
            # Ascending taps read at or after what they write: nothing is overwritten unread.
            tl.debug_barrier()
            tl.store(state + tap * state_tap, new.to(states.dtype.element_ty), mask=in_dim)


@triton.jit(do_not_specialize=["num_saves", "num_kv", "num_ssm"])
def _save_kernel(
    states,
    handles,
    query_start_loc,
    has_initial,
    entries,
    x,
    save_tokens,
    save_targets,
    num_saves,
    num_kv,
    num_ssm,
    dim,
    state_block: tl.int64,
    state_dim,
    state_tap,
    handle_stride,
    x_row: tl.int64,
    x_dim,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    RESOLVE: tl.constexpr,
):
    save = tl.program_id(0)
    request = save // num_saves
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    tokens = tl.load(save_tokens + save)
    target = load_ssm_block(save_targets + save, entries, num_kv, num_ssm, tokens > 0, RESOLVE)
    handle_at = handles + request * handle_stride
    place = load_ssm_block(handle_at, entries, num_kv, num_ssm, tokens > 0, RESOLVE)
    if (target <= 0) | (place <= 0):
        return
    past_dim = tl.where(tl.load(has_initial + request) != 0, dim, 0)
    own = states + place.to(tl.int64) * state_block + channel * state_dim
    saved = states + target.to(tl.int64) * state_block + channel * state_dim
    x_at = x + tl.load(query_start_loc + request).to(tl.int64) * x_row + channel * x_dim
    for tap in tl.static_range(WIDTH - 1):
        origin = tokens + (tap - (WIDTH - 1))
        fresh = tl.load(
            x_at + origin.to(tl.int64) * x_row,
            mask=channel < tl.where(origin >= 0, dim, 0),
            other=0.0,
        )
        kept = tl.load(
            own + (origin + (WIDTH - 1)) * state_tap,
            mask=channel < tl.where(origin < 0, past_dim, 0),
            other=0.0,
        )
        # One of the two is masked to zero.
        new = fresh.to(tl.float32) + kept.to(tl.float32)
        tl.store(saved + tap * state_tap, new.to(states.dtype.element_ty), mask=channel < dim)


@triton.jit(do_not_specialize=["num_kv", "num_ssm"])
def _update_kernel(
    out,
    states,
    handles,
    entries,
    x,
    weight,
    bias,
    num_kv,
    num_ssm,
    dim,
    out_row: tl.int64,
    out_dim,
    state_block: tl.int64,
    state_dim,
    state_tap,
    handle_stride,
    x_row: tl.int64,
    x_dim,
    w_dim,
    w_tap,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATE: tl.constexpr,
    RESOLVE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    in_dim = channel < dim
    handle_at = handles + row * handle_stride
    place = load_ssm_block(handle_at, entries, num_kv, num_ssm, True, RESOLVE)
    out_at = out + row * out_row + channel * out_dim
    if place <= 0:
        tl.store(out_at, tl.zeros([CHANNELS], dtype=out.dtype.element_ty), mask=in_dim)
        return
    state = states + place.to(tl.int64) * state_block + channel * state_dim
    fresh = tl.load(x + row * x_row + channel * x_dim, mask=in_dim, other=0.0).to(tl.float32)
    last = tl.load(weight + channel * w_dim + (WIDTH - 1) * w_tap, mask=in_dim, other=0.0)
    y = fresh * last.to(tl.float32)
    for tap in tl.static_range(WIDTH - 1):
        past = tl.load(state + tap * state_tap, mask=in_dim, other=0.0).to(tl.float32)
        factor = tl.load(weight + channel * w_dim + tap * w_tap, mask=in_dim, other=0.0)
        y += past * factor.to(tl.float32)
        if tap > 0:
            tl.debug_barrier()
            tl.store(state + (tap - 1) * state_tap, past.to(states.dtype.element_ty), mask=in_dim)
    tl.debug_barrier()
    new = fresh.to(states.dtype.element_ty)
    tl.store(state + (WIDTH - 2) * state_tap, new, mask=in_dim)
    y = _finish(y, bias, channel, in_dim, HAS_BIAS, ACTIVATE)
    tl.store(out_at, y.to(out.dtype.element_ty), mask=in_dim)


def check_width(width: int) -> None:
    """Raise ValueError for a convolution that the kernels do not take."""
    if width < 2:
        raise ValueError(
            f"a causal convolution over {width} input is not taken by AVMP's kernels; they take 2 "
            "and more: set kernels to 'resolved' to use vLLM's"
        )


def _checked(x: torch.Tensor, states: torch.Tensor, weight: torch.Tensor) -> tuple[int, int]:
    """Return the number of channels and the width after checking the shapes and the type."""
    check_supported(states.dtype)
    dim, width = weight.shape
    check_width(width)
    if x.shape[1] != dim or states.shape[1:] != (dim, width - 1):
        raise ValueError(
            f"weight {tuple(weight.shape)} does not fit x {tuple(x.shape)} and states "
            f"{tuple(states.shape)}: states hold width - 1 inputs of every channel"
        )
    return dim, width


def causal_conv1d(
    out: torch.Tensor,
    states: torch.Tensor,
    handles: torch.Tensor,
    query_start_loc: torch.Tensor,
    has_initial: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: bool = True,
    saves: ChunkSaves | None = None,
    pages: PageTable | None = None,
) -> None:
    """Convolve the tokens of ragged requests, and keep each one's last inputs as its state.

    Any strides; fp32, fp16 and bf16, computed in fp32. Rows that belong to no request, and requests
    whose state is null, get zeros. No two requests may name the same state.

    Args:
        out: ``[rows, channels]``, every element is written; must not overlap ``x``.
        states: ``[blocks, channels, width - 1]``, one layer of the arena's SSM view.
        handles: int32 ``[requests]``, SSM handles; physical indices if ``pages`` is None.
        query_start_loc: int32 ``[requests + 1]``.
        has_initial: bool ``[requests]``: whether a request continues from its state.
        x: ``[rows, channels]``.
        weight: ``[channels, width]``.
        bias: ``[channels]``, contiguous, or None.
        activation: Whether silu follows.
        saves: States inside of the requests' rows that are written to blocks of their own, or None.
        pages: The page table.

    Raises:
        ValueError: If the shapes do not fit, or the states are of a type that is not taken.
    """
    dim, width = _checked(x, states, weight)
    if saves is not None:
        # First: some reach back into the states that the convolution is about to overwrite.
        _save_inputs(states, handles, query_start_loc, has_initial, x, width, saves, pages)
    num_rows, num_requests = x.shape[0], query_start_loc.shape[0] - 1
    channels = min(triton.next_power_of_2(dim), 256)
    entries, num_kv, num_ssm = table_args(pages, handles)
    grid = (num_blocks(num_rows, num_requests, _TOKENS), triton.cdiv(dim, channels))
    _prefill_kernel[grid](
        out,
        states,
        handles,
        query_start_loc,
        has_initial.view(torch.uint8),
        entries,
        x,
        weight,
        bias if bias is not None else weight,
        num_requests,
        num_rows,
        num_kv,
        num_ssm,
        dim,
        *out.stride(),
        *states.stride(),
        handles.stride(0),
        *x.stride(),
        *weight.stride(),
        WIDTH=width,
        TOKENS=_TOKENS,
        CHANNELS=channels,
        HAS_BIAS=bias is not None,
        ACTIVATE=activation,
        RESOLVE=pages is not None,
        num_warps=8,
    )


def _save_inputs(
    states: torch.Tensor,
    handles: torch.Tensor,
    query_start_loc: torch.Tensor,
    has_initial: torch.Tensor,
    x: torch.Tensor,
    width: int,
    saves: ChunkSaves,
    pages: PageTable | None,
) -> None:
    """Write the states inside of the requests' rows to their blocks; as for `causal_conv1d`."""
    dim = x.shape[1]
    channels = min(triton.next_power_of_2(dim), 512)
    entries, num_kv, num_ssm = table_args(pages, handles)
    _save_kernel[(saves.tokens.numel(), triton.cdiv(dim, channels))](
        states,
        handles,
        query_start_loc,
        has_initial.view(torch.uint8),
        entries,
        x,
        saves.tokens,
        saves.targets,
        saves.tokens.shape[1],
        num_kv,
        num_ssm,
        dim,
        *states.stride(),
        handles.stride(0),
        *x.stride(),
        WIDTH=width,
        CHANNELS=channels,
        RESOLVE=pages is not None,
        num_warps=4,
    )


def causal_conv1d_update(
    out: torch.Tensor,
    states: torch.Tensor,
    handles: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: bool = True,
    pages: PageTable | None = None,
) -> None:
    """Convolve one token a request and shift it into the request's state.

    Arguments as for `causal_conv1d`, with one row a request: ``out`` and ``x`` are
    ``[requests, channels]`` and may be the same tensor. Null states get zeros.

    Raises:
        ValueError: If the shapes do not fit, or the states are of a type that is not taken.
    """
    dim, width = _checked(x, states, weight)
    batch = x.shape[0]
    if batch == 0:
        return
    channels = min(triton.next_power_of_2(dim), 512)
    entries, num_kv, num_ssm = table_args(pages, handles)
    _update_kernel[(batch, triton.cdiv(dim, channels))](
        out,
        states,
        handles,
        entries,
        x,
        weight,
        bias if bias is not None else weight,
        num_kv,
        num_ssm,
        dim,
        *out.stride(),
        *states.stride(),
        handles.stride(0),
        *x.stride(),
        *weight.stride(),
        WIDTH=width,
        CHANNELS=channels,
        HAS_BIAS=bias is not None,
        ACTIVATE=activation,
        RESOLVE=pages is not None,
        num_warps=4,
    )
