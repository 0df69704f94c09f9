"""The selective scan of Mamba-1 on a CPU, compiled by numba.

For every sequence of a ragged batch, channel ``d``, state element ``n`` and step ``t``
(Mamba paper, section 3.2)::

    h[d, n] = exp(dt[t, d] * A[d, n]) * h[d, n] + dt[t, d] * x[t, d] * B[t, n]
    y[t, d] = sum over n of h[d, n] * C[t, n] + D[d] * x[t, d]

One function serves prefill and decode: a decode is a sequence of one step that starts from a
stored state. It runs on one core and releases the interpreter lock.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from llvmlite.binding.ffi import lib as llvm_library
from numba import njit, types
from numba.extending import intrinsic

# vLLM 0.32 calls `vars(value).get` on every value of every loaded module when a CPU worker starts
# (triton_utils/dispatcher.py, _rebind_kernels). llvmlite's library object answers any name with a
# wrapped C function, `__dict__` included, which ends the worker. Give it a real one.
llvm_library._fntab.setdefault("__dict__", {})

Array: TypeAlias = np.ndarray[Any, Any]

# Channels worked on together: their states stay in the first-level cache over all steps, and one
# step of them is one cache line of x, dt and y.
_CHANNELS = 16

# exp(v) = 2**k * exp(r) with k = round(v / ln 2) and r = v - k ln 2, |r| <= 0.35. Adding
# 1.5 * 2**23 leaves k in the low bits of the sum. ln 2 is split so that k * _LN2_HIGH is exact.
_LOG2_E = np.float32(1.44269504)
_ROUND = np.float32(12582912.0)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
# Beyond these the result is outside of the normal fp32 numbers.
_LOWEST, _HIGHEST = np.float32(-87.0), np.float32(88.0)
# Minimax polynomial of (exp(r) - 1 - r) / r**2 (Cephes, expf).
_P0, _P1, _P2 = (
    np.float32(1.9875691500e-4),
    np.float32(1.3981999507e-3),
    np.float32(8.3334519073e-3),
)
_P3, _P4, _P5 = (
    np.float32(4.1665795894e-2),
    np.float32(1.6666665459e-1),
    np.float32(5.0000001201e-1),
)
_ONE = np.float32(1.0)
_ZERO = np.float32(0.0)


@intrinsic
def _power_of_two(typing_context: Any, rounded: Any) -> Any:
    """Return 2**k as fp32, where ``rounded`` is k + 1.5 * 2**23 in fp32."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[0], word)
        bits = builder.add(builder.shl(bits, word(23)), word(127 << 23))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.float32), codegen


# Only "contract" here: reassociation would undo the two-step reduction.
@njit(cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def exp32(value: np.float32) -> np.float32:
    """Return exp(value) in fp32, without branches or calls so that loops over it vectorise."""
    value = min(max(value, _LOWEST), _HIGHEST)
    rounded = value * _LOG2_E + _ROUND
    k = rounded - _ROUND
    r = value - k * _LN2_HIGH - k * _LN2_LOW
    p = _P0 * r + _P1
    p = p * r + _P2
    p = p * r + _P3
    p = p * r + _P4
    p = p * r + _P5
    return (p * r * r + r + _ONE) * _power_of_two(rounded)


# No "nnan" and no "ninf": a NaN in a state must come out as a NaN.
@njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")
def _scan(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    states: Array,
    stride: int,
    sources: Array,
    slots: Array,
    starts: Array,
    resume: Array,
    y: Array,
) -> None:
    """Run the recurrence over a ragged batch; see ``selective_scan`` for the arguments.

    ``states`` is one-dimensional; slot ``s`` holds its [D, N] state from element ``s * stride`` on.
    """
    channels, size = A.shape
    h = np.empty((_CHANNELS, size), np.float32)
    for sequence in range(len(slots)):
        first, last = starts[sequence], starts[sequence + 1]
        if slots[sequence] <= 0:
            y[first:last] = _ZERO
            continue
        for low in range(0, channels, _CHANNELS):
            count = min(_CHANNELS, channels - low)
            source = sources[sequence] * stride + low * size
            offset = slots[sequence] * stride + low * size
            for c in range(count):
                for n in range(size):
                    h[c, n] = states[source + c * size + n] if resume[sequence] else _ZERO
            for t in range(first, last):
                for c in range(count):
                    step = dt[t, low + c]
                    drive = step * x[t, low + c]
                    total = _ZERO
                    for n in range(size):
                        value = exp32(step * A[low + c, n]) * h[c, n] + drive * B[t, n]
                        h[c, n] = value
                        total += value * C[t, n]
                    y[t, low + c] = total
            if first < last:
                for c in range(count):
                    for n in range(size):
                        states[offset + c * size + n] = h[c, n]


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor,
    *,
    slots: torch.Tensor,
    query_start_loc: torch.Tensor,
    has_initial_state: torch.Tensor,
    sources: torch.Tensor | None = None,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = True,
) -> torch.Tensor:
    """Scan a ragged batch and leave each sequence's last state in its slot.

    Args:
        x: [tokens, channels], the input after the convolution.
        dt: [tokens, channels], the time step before bias and softplus.
        A: [channels, N], negative.
        B: [tokens, N].
        C: [tokens, N].
        state: [slots, channels, N], read and written in place. Slots may lie any distance apart;
            within a slot the elements are contiguous.
        slots: [sequences] integer, the slot of each sequence, no two the same. Zero (the null
            block) and below: padding, for which no state is read or written and the sum over the
            state is zero.
        query_start_loc: [sequences + 1] integer, where each sequence begins in ``tokens``.
        has_initial_state: [sequences] bool; where false the scan starts from zero.
        sources: [sequences] integer, the slot that each sequence begins from; its own if not given.
            Sequences run one after the other, so one may begin from what an earlier one has left.
        D: [channels], the skip weight.
        z: [tokens, channels], the gate: y is multiplied by silu(z).
        dt_bias: [channels], added to ``dt``.
        dt_softplus: whether softplus is applied to ``dt + dt_bias``.

    Returns:
        y, [tokens, channels], contiguous, in the dtype of ``x``. All arithmetic is fp32.

    Raises:
        ValueError: the elements of a slot are not contiguous.
    """
    channels, size = A.shape
    if state.stride()[1:] != (size, 1):
        raise ValueError(f"the state of a slot must be contiguous, got strides {state.stride()}")
    dtype = x.dtype
    x = x.float().contiguous()
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    if dt_softplus:
        dt = F.softplus(dt)

    y = torch.empty_like(x)
    indices = slots.to(torch.int64)
    begins = indices if sources is None else sources.to(torch.int64)
    if state.dtype == torch.float32:
        # numba vectorises one-dimensional contiguous arrays only, so the slots are one long run.
        span = (state.shape[0] - 1) * state.stride(0) + channels * size
        work, stride = state.as_strided((span,), (1,)), state.stride(0)
        rows, source_rows = indices, begins
    else:
        # numba knows no bf16: work on a copy, whose slot 0 is the null slot.
        named = torch.cat([indices.new_zeros(1), indices, begins]).clamp(min=0)
        used, places = named.unique(return_inverse=True)
        work, stride = state[used].float().view(-1), channels * size
        rows, source_rows = places[1:].chunk(2)
    _scan(
        x.numpy(),
        dt.contiguous().numpy(),
        A.detach().float().contiguous().numpy(),
        B.float().contiguous().numpy(),
        C.float().contiguous().numpy(),
        work.numpy(),
        stride,
        source_rows.numpy(),
        rows.numpy(),
        query_start_loc.to(torch.int64).numpy(),
        has_initial_state.numpy(),
        y.numpy(),
    )
    if state.dtype != torch.float32:
        state[used[1:]] = work.view(-1, channels, size)[1:].to(state.dtype)

    if D is not None:
        y.addcmul_(x, D.detach().float())
    if z is not None:
        y.mul_(F.silu(z.float()))
    return y.to(dtype)
