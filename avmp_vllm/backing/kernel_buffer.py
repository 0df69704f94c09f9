"""An arena's bytes on a device with Triton, and move plans applied to them by kernels.

Every list of a plan is one upload and one launch (relocations and copies: one a dependency level),
whatever its length. Launches follow one another on the current stream, so nothing waits.
"""

from __future__ import annotations

import torch
from avmp_kernels.relocate import KV, UNIT, copy_pages, relocate, upload, zero_pages

from avmp_vllm.backing.state_codec import StateCodec
from avmp_vllm.backing.torch_buffer import BlockBytes
from avmp_vllm.core import Geometry, Kind, MovePlan

assert int(Kind.KV) == KV


class KernelBuffer:
    """The device buffer of an arena.

    Args:
        raw: Flat uint8 tensor over at least ``geometry.arena_bytes`` bytes.
        geometry: Sizes of the pages in it.
        codec: Of states that are encoded; None where none is.

    Raises:
        ValueError: A page size or the buffer does not allow 16-byte accesses, or the buffer is too
            short.
    """

    def __init__(
        self, raw: torch.Tensor, geometry: Geometry, codec: StateCodec | None = None
    ) -> None:
        for kind in Kind:
            if geometry.unit(kind) % UNIT:
                raise ValueError(
                    f"a {kind.label} page of {geometry.unit(kind)} bytes is not a multiple of "
                    f"{UNIT}, which the kernels copy at a time; choose other page_tokens"
                )
        if raw.numel() < geometry.arena_bytes:
            raise ValueError(
                f"the buffer has {raw.numel()} bytes, the arena {geometry.arena_bytes}"
            )
        if raw.data_ptr() % UNIT:
            raise ValueError(f"the buffer does not start on a boundary of {UNIT} bytes")
        self._bytes = raw
        self._blocks = BlockBytes(raw, geometry, codec)
        self._page_bytes = (geometry.unit(Kind.KV), geometry.unit(Kind.SSM))

    def warm_up(self) -> None:
        """Compile the kernels, so that no request waits for the compiler. Touches null pages only.

        A plan's later levels start in the middle of its list, for which Triton may compile a second
        variant; hence two calls.
        """
        pairs = upload([(0, 0)] * 3, self._bytes.device)
        for begin in (0, 1):
            copy_pages(self._bytes, pairs[begin : begin + 2], 1, self._page_bytes)
        zero_pages(self._bytes, pairs[0], 1, self._page_bytes)

    def apply(self, plan: MovePlan) -> None:
        """Carry a plan out: relocations in order, then zeroing, then copy-on-write."""
        for relocations, recode in plan.in_order():
            moves = [(move.kind, move.source, move.target) for move in relocations]
            relocate(self._bytes, moves, self._page_bytes)
            if recode is not None:
                self._blocks.recode(recode)
        if plan.zeros:
            targets = upload(plan.zeros, self._bytes.device)
            zero_pages(self._bytes, targets, len(plan.zeros), self._page_bytes)
        relocate(self._bytes, plan.copies, self._page_bytes)
