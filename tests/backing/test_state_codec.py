"""States in half their bytes: how far a value is off, and what stays as it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avmp_vllm.backing.state_codec import ALIGNMENT, STEPS, Segment, StateCodec

#: A layer: what its convolution keeps, in bf16, and its state, in fp32; then bytes of nobody.
_CONVOLUTION, _ROW, _ROWS, _PAD = 96, 16, 24, 32
_STATE = 4 * _ROW * _ROWS
_STRIDE = _CONVOLUTION + _STATE + _PAD
_LAYERS = 3
BLOCK = -(-_LAYERS * _STRIDE // 128) * 128
SEGMENTS = (
    Segment(0, _STRIDE, _LAYERS, _CONVOLUTION),
    Segment(_CONVOLUTION, _STRIDE, _LAYERS, _STATE, _ROW),
)


def parts(block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes of the convolutions, and the rows of the states."""
    layers = block[: _LAYERS * _STRIDE].view(_LAYERS, _STRIDE)
    states = layers[:, _CONVOLUTION : _CONVOLUTION + _STATE].contiguous().view(torch.float32)
    return layers[:, :_CONVOLUTION], states.reshape(-1, _ROW)


def block_of(seed: int, scale: float = 1.0) -> torch.Tensor:
    """Random bytes, with sound values where there are values."""
    generator = torch.Generator().manual_seed(seed)
    block = torch.randint(0, 256, (BLOCK,), generator=generator, dtype=torch.uint8)
    layers = block[: _LAYERS * _STRIDE].view(_LAYERS, _STRIDE)
    states = torch.randn(_LAYERS, _STATE // 4, generator=generator) * scale
    states[0, :_ROW] = 0  # a row of zeros
    layers[:, _CONVOLUTION : _CONVOLUTION + _STATE] = states.view(torch.uint8)
    return block


@given(
    seed=st.integers(0, 2**31),
    exponent=st.integers(-30, 30),
    half=st.integers(0, 1),
    in_place=st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_values_are_off_by_half_a_step_at_most(seed, exponent, half, in_place) -> None:
    """Of the largest value of their row; convolutions and zeros are what they were."""
    codec, state = StateCodec(SEGMENTS, BLOCK), block_of(seed, 2.0**exponent)
    source = state.clone()
    cold = source if in_place else block_of(seed + 1)
    codec.encode(source, cold, half)
    found = torch.full_like(state, 255)
    codec.decode(cold, found, half)
    (convolutions, values), (same, near) = parts(state), parts(found)
    assert torch.equal(convolutions, same)
    step = values.abs().amax(1, keepdim=True) / STEPS
    assert ((values - near).abs() <= 0.501 * step).all()
    assert near[0].eq(0).all()
    # Once encoded, it stays the same however often it comes and goes.
    again = block_of(seed + 2)
    codec.encode(found, again, half)
    twice = torch.zeros_like(state)
    codec.decode(again, twice, half)
    assert torch.equal(parts(twice)[1], near)


def test_two_states_share_a_block() -> None:
    """Neither touches the other, nor what lies behind the block."""
    codec, states = StateCodec(SEGMENTS, BLOCK), [block_of(1), block_of(2)]
    memory = torch.zeros(3 * BLOCK, dtype=torch.uint8)
    memory[2 * BLOCK :] = 7
    cold, target = memory[BLOCK : 2 * BLOCK], torch.zeros(BLOCK, dtype=torch.uint8)
    for half, state in enumerate(states):
        codec.encode(state, cold, half)
    assert memory[:BLOCK].eq(0).all()
    assert memory[2 * BLOCK :].eq(7).all()
    for half, state in enumerate(states):
        codec.decode(cold, target, half)
        wanted, found = parts(state)[1], parts(target)[1]
        assert torch.allclose(found, wanted, atol=float(wanted.abs().max()) / STEPS)
    assert codec.half_bytes % ALIGNMENT == 0


def test_an_odd_number_of_values() -> None:
    """Two values share a byte of low bits, the last one has half of one."""
    segment = Segment(0, 60, 1, 60, row=5)
    codec = StateCodec([segment], 512)
    block = torch.zeros(512, dtype=torch.uint8)
    block[:60] = torch.randn(15).view(torch.uint8)
    cold, found = torch.zeros_like(block), torch.zeros_like(block)
    codec.encode(block, cold, 1)
    codec.decode(cold, found, 1)
    wanted, near = (one[:60].view(torch.float32) for one in (block, found))
    assert torch.allclose(wanted, near, atol=float(wanted.abs().max()) / STEPS)


def test_states_that_are_narrow_already_do_not_fit() -> None:
    """Those of bf16 are kept as they are, so two of them are no block."""
    with pytest.raises(ValueError, match="an encoded state has 1024 bytes, and half a block 512"):
        StateCodec([Segment(0, 1024, 1, 1024)], 1024)


def test_control_a_lost_bit_is_seen() -> None:
    """The bound above would notice one of the low bits."""
    codec, state = StateCodec(SEGMENTS, BLOCK), block_of(3)
    cold, found = torch.zeros(BLOCK, dtype=torch.uint8), torch.zeros(BLOCK, dtype=torch.uint8)
    codec.encode(state, cold, 0)
    low = SEGMENTS[1].sizes[2]
    begin = SEGMENTS[0].encoded + SEGMENTS[1].encoded - low
    cold[begin : begin + low] &= 0b0111_0111
    codec.decode(cold, found, 0)
    values, near = parts(state)[1], parts(found)[1]
    assert ((values - near).abs() > 0.501 * values.abs().amax(1, keepdim=True) / STEPS).any()
