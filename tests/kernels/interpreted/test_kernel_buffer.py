"""Move plans over a buffer whose pages are copied by kernels."""

from __future__ import annotations

import torch

from avmp_vllm.backing.kernel_buffer import KernelBuffer
from avmp_vllm.backing.state_codec import Segment, StateCodec
from avmp_vllm.core import Geometry, Kind, MovePlan, Recode, Relocation


def test_states_are_encoded_between_relocations() -> None:
    """Block 4 is encoded into 6, then taken by another; 6 moves to 9, and is decoded from there.

    With all relocations first, what 5 held would be encoded, and over what is decoded.
    """
    geometry = Geometry(12 * 512, 64, 512)
    raw = torch.zeros(geometry.arena_bytes, dtype=torch.uint8)
    buffer = KernelBuffer(raw, geometry, StateCodec([Segment(0, 512, 1, 512, row=16)], 512))
    blocks = raw.view(torch.float32).view(12, 128)
    state = torch.arange(128) - 60.0
    blocks[4], blocks[5], blocks[9] = state, 5, 9
    plan = MovePlan(1)
    plan.relocations = [Relocation(Kind.SSM, 1, 2, 5, 4), Relocation(Kind.SSM, 3, 4, 6, 9)]
    plan.recodes = [Recode(0, 4, 6, 1, encode=True), Recode(2, 9, 2, 1, encode=False)]
    buffer.apply(plan)
    assert torch.allclose(blocks[2], state, atol=67 / 4094)
    assert blocks[4].eq(5).all()
