"""The kernels that update states, on a state so far into the arena that 32 bits do not reach it.

Under AVMP a block's stride is all layers' states, so a block index times the stride passes 2**31
elements in a large arena. Kernels must widen the index first. Imported where Triton is interpreted,
whose integers wrap as compiled ones do. The memory is never touched but where states lie.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from cuda_mamba import as_on_cuda, selective_state_update

_STRIDE = 1 << 20
_NEAR, _FAR = 1, (1 << 31) // _STRIDE + 1
_HEADS, _DIM = 2, 32


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _mamba(states: Callable[..., torch.Tensor], index: torch.Tensor) -> torch.Tensor:
    state = states(_HEADS, _DIM, 16)
    out = torch.empty(1, _HEADS, _DIM)
    x, dt, A = _draw(1, _HEADS, _DIM), _draw(1, _HEADS, _DIM), -_draw(_HEADS, _DIM, 16).exp()
    B, C, D = _draw(1, 1, 16), _draw(1, 1, 16), _draw(_HEADS, _DIM)
    selective_state_update(
        state,
        x,
        dt,
        A,
        B,
        C,
        D,
        _draw(_HEADS, _DIM),
        dt_softplus=True,
        state_batch_indices=index,
        out=out,
    )
    return out


def _convolution(states: Callable[..., torch.Tensor], index: torch.Tensor) -> torch.Tensor:
    update = as_on_cuda("causal_conv1d").causal_conv1d_update
    return update(
        _draw(1, _DIM), states(_DIM, 3), _draw(_DIM, 4), None, "silu", conv_state_indices=index
    )


def _gated_delta_net(states: Callable[..., torch.Tensor], index: torch.Tensor) -> torch.Tensor:
    from vllm.third_party.flash_linear_attention.ops import fused_recurrent

    out = torch.empty(1, 1, _HEADS, _DIM)
    fused_recurrent.fused_recurrent_gated_delta_rule_packed_decode(
        _draw(1, 3 * _HEADS * _DIM),
        _draw(1, _HEADS),
        _draw(1, _HEADS),
        _draw(_HEADS),
        _draw(_HEADS),
        _DIM**-0.5,
        states(_HEADS, _DIM, _DIM),
        out,
        index,
        use_qk_l2norm_in_kernel=True,
    )
    return out


def _lightning(states: Callable[..., torch.Tensor], index: torch.Tensor) -> torch.Tensor:
    from vllm.model_executor.layers.lightning_attn import linear_decode_forward_triton

    q, k, v = (_draw(1, _HEADS, 1, _DIM + at)[..., :_DIM].contiguous() for at in range(3))
    return linear_decode_forward_triton(
        q, k, v, states(_HEADS, _DIM, _DIM), torch.ones(_HEADS), index
    )


@triton.jit
def _narrow_kernel(states, index, out, stride):
    tl.store(out, tl.load(states + tl.load(index) * stride))


def _narrow(states: Callable[..., torch.Tensor], index: torch.Tensor) -> torch.Tensor:
    """What must not be: the product in 32 bits."""
    state = states(1)
    out = torch.empty(1, dtype=state.dtype)
    _narrow_kernel[(1,)](state, index, out, state.stride(0))
    return out


def far_states() -> dict[str, Any]:
    """Of each kernel, whether a far state gives what a near one does, and is left as that one."""
    # As many bytes as the far block of 16-bit states needs, and twice that of 8-bit ones.
    raw = torch.empty(2 * (_FAR + 1) * _STRIDE, dtype=torch.uint8)
    found = {}
    for name, run, dtype, far in (
        ("mamba", _mamba, torch.float16, _FAR),
        ("convolution", _convolution, torch.float16, _FAR),
        ("gated delta net", _gated_delta_net, torch.float16, _FAR),
        ("lightning", _lightning, torch.float16, _FAR),
        # Twice as far, 32 bits wrap to a place that exists.
        ("control", _narrow, torch.uint8, 2 * _FAR),
    ):
        results = []
        for at in (_NEAR, far):

            def states(*shape: int, at: int = at, dtype: torch.dtype = dtype) -> torch.Tensor:
                inner = torch.empty(shape).stride()
                view = raw.view(dtype).as_strided((at + 1, *shape), (_STRIDE, *inner))
                view[at] = 100 * _draw(*shape).abs() if dtype is torch.uint8 else _draw(*shape)
                return view

            index = torch.tensor([at], dtype=torch.int32)
            result = run(states, index).clone()
            shape = (_HEADS, _DIM, _DIM)
            left = raw.view(dtype).as_strided(shape, (_DIM * _DIM, _DIM, 1), at * _STRIDE)
            results.append((result, left.clone()))
            raw.view(dtype)[at * _STRIDE :][:4096] = 0
        (near, near_state), (distant, distant_state) = results
        found[name] = {
            "same": torch.equal(near, distant),
            "left": torch.equal(near_state, distant_state),
        }
    return found
